"""Every model of open_clip: what is read, how close it comes, and which formats hold it.

python -m benchmarks.open_clip_models                   all 144 models: about six minutes
python -m benchmarks.open_clip_models --markdown        the table of docs/interchange.md
python -m benchmarks.open_clip_models --quick --json | tail -1

open_clip builds each model with random weights, full width, one block in each tower and a vocabulary of 1,000. Its
weights are imported, and written again under the names of open_clip and, where it can express the model, of
transformers. The normalized embeddings of two images and two texts are compared. Exits with 1 if a weight does not come
back to the bit or an embedding differs by more than 1e-5. Needs the extra `torch`.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import functools
import importlib
import json
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import jax
import numpy as np
import tqdm

from tclip_jax.interop.hugging_face import from_hugging_face, to_hugging_face
from tclip_jax.interop.hugging_face_config import hugging_face_config
from tclip_jax.interop.open_clip import from_open_clip, to_open_clip
from tclip_jax.models.clip import CLIP, param_shapes
from tclip_jax.models.config import CLIPConfig
from tclip_jax.numerics.torch_side import import_torch
from tclip_jax.pages import aligned

VOCABULARY = 1000
TOLERANCE = 1e-5
QUICK = ("ViT-B-32", "ViT-B-16-SigLIP2")


@dataclasses.dataclass(frozen=True)
class Row:
    """One model.

    Attributes:
      name: its name in open_clip.
      parameters: of the whole model.
      image, text: the largest difference of an embedding.
      exact: whether all weights come back to the bit.
      formats: whose names and configuration hold it: open_clip, and transformers where it can.
    """

    name: str
    parameters: int
    image: float
    text: float
    exact: bool
    formats: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return self.exact and max(self.image, self.text) <= TOLERANCE


def import_open_clip() -> Any:
    """Return the module open_clip. Raises ValueError if PyTorch is not installed."""
    import_torch()
    return importlib.import_module("open_clip")


def config_of(name: str) -> CLIPConfig | str:
    """Return the configuration of a model of open_clip, or why it is refused."""
    try:
        return CLIPConfig.from_open_clip(import_open_clip().get_model_config(name))
    except ValueError as error:
        return str(error)


def shallow(name: str) -> Any:
    """Return open_clip's model with one block in each tower, a small vocabulary and random weights."""
    torch, open_clip = import_torch(), import_open_clip()
    cfg = copy.deepcopy(open_clip.get_model_config(name))
    cfg["text_cfg"] |= {"layers": 1, "vocab_size": VOCABULARY, "hf_tokenizer_name": None}
    cfg["vision_cfg"] |= {} if cfg["vision_cfg"].get("timm_model_name") else {"layers": 1}
    build = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    timm = open_clip.timm_model.timm
    torch.manual_seed(0)
    with mock.patch.object(timm, "create_model", functools.partial(timm.create_model, depth=1)):
        module = build(**cfg).eval()
    with torch.no_grad():
        for parameter in module.parameters():  # biases and gains differ from zeros and ones
            parameter += 0.02 * torch.randn_like(parameter)
    return module


def measure(name: str, config: CLIPConfig) -> Row:
    """Compare a model with open_clip's, one block deep."""
    torch, module = import_torch(), shallow(name)
    small = dataclasses.replace(
        config,
        vision=dataclasses.replace(config.vision, layers=1),
        text=dataclasses.replace(config.text, layers=1, vocab_size=VOCABULARY),
    )
    state = {key: value.numpy() for key, value in module.state_dict().items()}
    params = from_open_clip(state, small)
    exact = CLIPConfig.from_open_clip(config.to_open_clip()) == config and _same(to_open_clip(params, small), state)
    formats = ["open_clip"]
    try:
        hugging_face_config(config)
    except ValueError:
        pass
    else:
        formats.append("transformers")
        back = from_hugging_face(to_hugging_face(state, small), small)
        exact = exact and _same(back, state)
    generator = np.random.default_rng(0)
    pixels = generator.standard_normal((2, *config.vision.image_size, 3)).astype(np.float32)
    tokens = generator.integers(3, VOCABULARY, (2, config.text.context_length)).astype(np.int32)
    tokens[:, 5] = config.text.eos_id
    with torch.no_grad():
        image = module.encode_image(torch.from_numpy(pixels.transpose(0, 3, 1, 2)), normalize=True)
        text = module.encode_text(torch.from_numpy(tokens).long(), normalize=True)
    ours: Any = jax.jit(CLIP(small).apply)({"params": params}, pixels, tokens)
    of_image, of_text = (float(np.abs(ours[i] - each.numpy()).max()) for i, each in enumerate((image, text)))
    return Row(name, parameters(config), of_image, of_text, exact, tuple(formats))


def _same(found: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    return found.keys() == expected.keys() and all(
        np.array_equal(np.asarray(found[key]), value) for key, value in expected.items()
    )


def parameters(config: CLIPConfig) -> int:
    """Return the number of parameters of the whole model."""
    return sum(leaf.size for leaf in jax.tree.leaves(param_shapes(config)))


def table(rows: list[Row], markdown: bool) -> str:
    """Return the rows as an aligned table, or in Markdown."""
    lines = [["model", "parameters", "image, max \\|Δ\\|" if markdown else "image", "text", "to the bit", "formats"]]
    for row in rows:
        figures = [
            f"{row.parameters / 1e6:,.1f} M",
            f"{row.image:.1e}",
            f"{row.text:.1e}",
            "yes" if row.exact else "NO",
        ]
        lines.append([row.name, *figures, ", ".join(row.formats)])
    if not markdown:
        return "\n".join(aligned(lines))
    ruled = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in ruled)


def main() -> int:
    """Print the table and the number of models that are read, and with --json one object last."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.open_clip_models", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--markdown", action="store_true", help="print the table in Markdown")
    parser.add_argument("--quick", action="store_true", help=f"only {' and '.join(QUICK)}; under a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    args = parser.parse_args()
    found = {name: config_of(name) for name in (QUICK if args.quick else import_open_clip().list_models())}
    rows = []
    for name, config in tqdm.tqdm(found.items(), disable=None, leave=False):
        if isinstance(config, CLIPConfig):
            rows.append(measure(name, config))
            jax.clear_caches()
    refused = {name: config for name, config in found.items() if isinstance(config, str)}
    print(table(rows, args.markdown))
    print(f"\n{len(rows)} of {len(found)} models are read; {sum(row.passed for row in rows)} equal open_clip's")
    if args.json:
        print(
            json.dumps({"rows": [dataclasses.asdict(row) | {"passed": row.passed} for row in rows], "refused": refused})
        )
    return 0 if rows and all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
