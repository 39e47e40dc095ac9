from __future__ import annotations

import json
import pathlib

import jax
import numpy as np
import pytest

from tclip_jax.data.images import Preprocess
from tclip_jax.interop.checkpoints import open_checkpoint
from tclip_jax.models.clip import CLIP


@pytest.mark.torch
@pytest.mark.parametrize(("form", "vocabulary"), [("vision_config", 49408), ("vision_config_dict", 49410)])
def test_a_config_json_of_what_differs(form: str, vocabulary: int, tmp_path: pathlib.Path) -> None:
    """transformers 4 saved only fields that differ from the defaults; the embeddings equal those of CLIPModel."""
    import torch
    import transformers

    torch.manual_seed(0)
    text = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "vocab_size": vocabulary}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "image_size": 64}
    model = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=vision)).eval()
    folder = tmp_path / "theirs"
    model.save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    defaults = transformers.CLIPConfig().to_dict()
    for name in ("text_config", "vision_config"):
        kept = {key: value for key, value in document.pop(name).items() if defaults[name].get(key) != value}
        document[name if name[0] == "t" else form] = kept
    assert document[form] == vision and ("vocab_size" in document["text_config"]) == (vocabulary != 49408)
    document = {key: value for key, value in document.items() if defaults.get(key) != value} | {"model_type": "clip"}
    (folder / "config.json").write_text(json.dumps(document))
    tokens = torch.randint(1, 49406, (3, 77))
    tokens[:, -1] = 49407
    images = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        expected = transformers.CLIPModel.from_pretrained(folder)(pixel_values=images, input_ids=tokens)
    checkpoint = open_checkpoint(folder)
    assert checkpoint.preprocess == Preprocess(64) and checkpoint.config.text.vocab_size == vocabulary
    with jax.default_matmul_precision("highest"):
        ours = CLIP(checkpoint.config).apply(
            {"params": jax.tree.map(np.asarray, checkpoint.params)},
            images.permute(0, 2, 3, 1).numpy(),
            tokens.int().numpy(),
        )
    np.testing.assert_allclose(ours[0], expected.image_embeds, rtol=0, atol=1e-5)
    np.testing.assert_allclose(ours[1], expected.text_embeds, rtol=0, atol=1e-5)
