"""The tokenizers of folders against open_clip and transformers, and through artifacts and exports."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from etils import epath

from tclip_jax.artifacts.files import MAX_OTHER_BYTES
from tclip_jax.artifacts.format import read_artifact, write_artifact
from tclip_jax.artifacts.manifest import ArtifactError, content_digest, dump_manifest
from tclip_jax.cli import main
from tclip_jax.data.file_tokenizer import FileTokenizer
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.load import load_known, load_packed, load_tokenizer
from tclip_jax.inference.model import Model, fingerprint
from tclip_jax.interop.checkpoints import open_checkpoint
from tclip_jax.interop.export import export_model
from tclip_jax.interop.hugging_face_config import config_from_hugging_face
from tclip_jax.interop.importing import import_checkpoint
from tclip_jax.interop.metadata import HUGGING_FACE, OPEN_CLIP
from tclip_jax.interop.tokenizer_files import read_tokenizer
from tclip_jax.models.clip import CLIP, init_params
from tclip_jax.models.config import CLIPConfig, TextConfig
from tests.small_tokenizers import CONTEXT, captions, write_gemma, write_spiece, write_t5

Write = Callable[..., int]
SMALL = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
PIXELS = Preprocess(16, (0.5,) * 3, (0.5,) * 3, resize_mode="squash")
KINDS: list[tuple[Write, dict[str, Any]]] = [
    (write_gemma, {}),
    (write_gemma, {"add_bos_token": True, "padding_side": "left", "truncation_side": "left"}),
    (write_gemma, {"tokenizer_class": "PreTrainedTokenizerFast", "lower": True}),
    (write_gemma, {"tokenizer_class": "Siglip2Tokenizer"}),
    (write_t5, {}),
    (write_t5, {"tokenizer_class": "TokenizersBackend", "pad_token": {"__type": "AddedToken", "content": "<pad>"}}),
    (write_spiece, {}),
    (write_spiece, {"do_lower_case": False, "pad_token": "<pad>"}),
]
NAMES = [f"{write.__name__[6:]} {'-'.join(map(str, changed.values()))}" for write, changed in KINDS]


def text_config(size: int) -> TextConfig:
    return TextConfig(context_length=CONTEXT, vocab_size=size, hf_tokenizer_name="org/small")


def write_open_clip(folder: pathlib.Path, **text: Any) -> None:
    stated = {"hf_tokenizer_name": "org/small", "context_length": CONTEXT, **text}
    (folder / OPEN_CLIP).write_text(json.dumps({"model_cfg": {"text_cfg": stated}}))


def read(folder: pathlib.Path, size: int, library: str = HUGGING_FACE) -> FileTokenizer:
    tokenizer = read_tokenizer(epath.Path(folder), library, text_config(size))
    assert tokenizer is not None
    return tokenizer


def transformers_ids(folder: pathlib.Path, texts: tuple[str, ...]) -> np.ndarray:
    tokenizer = pytest.importorskip("transformers").AutoTokenizer.from_pretrained(folder)
    options = {"padding": "max_length", "max_length": CONTEXT, "truncation": True, "return_tensors": "np"}
    return np.asarray(tokenizer(list(texts), **options).input_ids)


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize(("write", "changed"), KINDS, ids=NAMES)
def test_ids_are_those_of_transformers(write: Write, changed: dict[str, Any], tmp_path: pathlib.Path) -> None:
    size = write(tmp_path, **changed)
    assert len(captions()) == 5000
    np.testing.assert_array_equal(read(tmp_path, size)(captions()), transformers_ids(tmp_path, captions()))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore:This sequence already has")
@pytest.mark.parametrize("clean", [None, "lower", "canonicalize"])
@pytest.mark.parametrize(("write", "changed"), KINDS[1::2], ids=NAMES[1::2])
def test_ids_are_those_of_open_clip_also_after_an_export(
    write: Write, changed: dict[str, Any], clean: str | None, tmp_path: pathlib.Path
) -> None:
    open_clip = pytest.importorskip("open_clip")
    size = write(tmp_path, **changed)
    write_open_clip(tmp_path, tokenizer_kwargs={"clean": clean} if clean else {})
    tokenizer = read(tmp_path, size, OPEN_CLIP)
    ids = tokenizer(captions())
    np.testing.assert_array_equal(ids, open_clip.get_tokenizer(f"local-dir:{tmp_path}")(list(captions())).numpy())
    exported = tmp_path / "exported"
    exported.mkdir()
    tokenizer.save(exported)
    write_open_clip(exported, tokenizer_kwargs=tokenizer.open_clip_kwargs)
    np.testing.assert_array_equal(ids, open_clip.get_tokenizer(f"local-dir:{exported}")(list(captions())).numpy())
    np.testing.assert_array_equal(ids, read(exported, size, OPEN_CLIP)(captions()))
    # What transformers cannot do is to repair texts.
    plain = tuple(text for text in captions() if text.isascii() and not set(text) & set("&<>\x00\x07\x1b\t\n"))
    if clean != "canonicalize":
        plain = tuple(text for text in plain if text == text.strip())
    elif write is write_spiece:  # SiglipTokenizer removes underlines, which open_clip replaces by spaces
        plain = tuple(text for text in plain if "_" not in text)
    assert len(plain) > 2000
    np.testing.assert_array_equal(tokenizer(plain), transformers_ids(exported, plain))


@pytest.mark.parametrize(
    ("write", "changed", "message"),
    [
        (
            write_gemma,
            {"tokenizer_class": "BertTokenizer"},
            "tokenizer_config.json: tokenizer_class is 'BertTokenizer'",
        ),
        (write_gemma, {"tokenizer_class": 5}, "tokenizer_class is 5: only SiglipTokenizer, "),
        (write_gemma, {"tokenizer_class": None}, "tokenizer_config.json: tokenizer_class is missing"),
        (write_gemma, {"tokenizer_class": "SiglipTokenizer"}, "spiece.model is missing: the tokenizer_class Siglip"),
        (
            write_spiece,
            {"tokenizer_class": "T5TokenizerFast"},
            "tokenizer.json is missing: the tokenizer_class T5Token",
        ),
        (write_gemma, {"pad_token": "[PAD]"}, r"pad_token is '\[PAD\]', which tokenizer.json does not have"),
        (write_gemma, {"pad_token": 5}, "tokenizer_config.json: pad_token is 5: it must be a token"),
        (write_gemma, {"padding_side": "both"}, "padding_side is 'both': it must be left or right"),
        (write_gemma, {"split_special_tokens": True}, "split_special_tokens is true: only false"),
        (write_gemma, {"model_max_length": 9}, "model_max_length is 9: it must be the model's context length, 16"),
        (write_gemma, {"added_tokens_decoder": []}, "added_tokens_decoder is .*: it must be a JSON object"),
        (write_spiece, {"unk_token": "[U]"}, r"unk_token is '\[U\]': it must be <unk>"),
        (write_spiece, {"eos_token": "[E]"}, r"eos_token is '\[E\]', which spiece.model does not have"),
        (write_spiece, {"legacy": False}, "legacy is False: only True is read"),
        (write_spiece, {"sp_model_kwargs": {"nbest_size": 3}}, "sp_model_kwargs is {'nbest_size': 3}: only {} is read"),
        (write_spiece, {"additional_special_tokens": 5}, "additional_special_tokens is 5: it must be a list of tokens"),
        (write_spiece, {"do_lower_case": 1}, "do_lower_case is 1: only True and False is read"),
        (write_spiece, {"additional_special_tokens": ["[A]"]}, r"additional_special_tokens has '\[A\]'"),
    ],
)
def test_metadata_that_is_not_understood_is_refused_by_key(
    write: Write, changed: dict[str, Any], message: str, tmp_path: pathlib.Path
) -> None:
    size = write(tmp_path, **changed)
    with pytest.raises(ValueError, match=message) as caught:
        read(tmp_path, size)
    assert "\n" not in str(caught.value) and str(caught.value).startswith(str(tmp_path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            {"tokenizer_kwargs": {"clean": "all"}},
            "tokenizer_kwargs.clean is 'all': it must be one of whitespace, lower,",
        ),
        ({"tokenizer_kwargs": {"clean": ""}}, "tokenizer_kwargs.clean is ''"),
        (
            {"tokenizer_kwargs": {"strip_sep_token": True}},
            "tokenizer_kwargs.strip_sep_token is True: only clean is read",
        ),
        ({"tokenizer_kwargs": 5}, "tokenizer_kwargs is 5: it must be a JSON object"),
        ({"tokenizer_mode": "clips"}, "text_cfg.tokenizer_mode is 'clips'"),
    ],
)
def test_metadata_of_open_clip_is_refused_by_key(text: dict[str, Any], message: str, tmp_path: pathlib.Path) -> None:
    size = write_gemma(tmp_path)
    write_open_clip(tmp_path, **text)
    with pytest.raises(ValueError, match=f"{OPEN_CLIP}: .*{message}"):
        read(tmp_path, size, OPEN_CLIP)


@pytest.mark.parametrize("document", [{"model_cfg": [1]}, {"model_cfg": {"text_cfg": "x"}}])
def test_metadata_of_open_clip_that_is_no_object_is_refused(document: Any, tmp_path: pathlib.Path) -> None:
    size = write_gemma(tmp_path)
    (tmp_path / OPEN_CLIP).write_text(json.dumps(document))
    with pytest.raises(ValueError, match=f"{OPEN_CLIP}: .*_cfg is .*: it must be a JSON object"):
        read(tmp_path, size, OPEN_CLIP)


def test_bad_files_are_refused(tmp_path: pathlib.Path) -> None:
    size = write_gemma(tmp_path)
    with pytest.raises(ValueError, match=f"has {size} tokens, but the model's embedding .* has {size + 1}: they must"):
        read(tmp_path, size + 1)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
        read(tmp_path, size)
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(MAX_OTHER_BYTES + 1)
    with pytest.raises(ValueError, match=f"tokenizer.json has {MAX_OTHER_BYTES + 1} bytes: at most"):
        read(tmp_path, size)
    (tmp_path / "tokenizer.json").unlink()
    assert read_tokenizer(epath.Path(tmp_path), HUGGING_FACE, text_config(size)) is None


def test_older_files_name_special_tokens_beside(tmp_path: pathlib.Path) -> None:
    size = write_gemma(tmp_path, pad_token=None)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<mask>"}}))
    assert read(tmp_path, size)("a")[0, -1] == 4
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "siglip"}')
    (tmp_path / "special_tokens_map.json").unlink()
    size = write_spiece(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()  # transformers then reads it by the type of the model
    assert read(tmp_path, size)("a")[0, -1] == 1


@pytest.fixture(params=[write_gemma, write_spiece], ids=["json", "spiece"])
def folder(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of transformers with a small SigLIP and its tokenizer."""
    write: Write = request.param
    (tmp_path / "tokenizer").mkdir()
    size = write(tmp_path / "tokenizer")
    config = siglip(size)
    params = init_params(CLIP(config), jax.random.key(0))
    tokenizer = read(tmp_path / "tokenizer", size)
    folder = tmp_path / "checkpoint"
    export_model(folder, config=config, preprocess=PIXELS, params=params, tokenizer=tokenizer, formats=("hf",))
    return folder


def siglip(size: int) -> CLIPConfig:
    text = SMALL | {"vocab_size": size, "max_position_embeddings": CONTEXT, "projection_size": 32}
    vision = SMALL | {"image_size": 16, "patch_size": 8}
    return config_from_hugging_face({"model_type": "siglip", "vision_config": vision, "text_config": text})


def test_the_tokenizer_goes_through_an_artifact_and_an_export(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    texts = list(captions()[:300])
    ids = load_known(folder)[0].tokenize(texts)
    import_checkpoint(folder, tmp_path / "artifact")
    model = Model.load(tmp_path / "artifact")
    np.testing.assert_array_equal(model.tokenize(texts), ids)
    assert model.encode_text(texts[:3]).shape == (3, 32)
    stored = load_packed(tmp_path / "artifact")
    assert load_tokenizer(tmp_path / "artifact", stored.config.text) == stored.tokenizer == model.tokenizer
    exported = export_model(
        tmp_path / "again",
        config=stored.config,
        preprocess=PIXELS,
        params=stored.params,
        tokenizer=stored.tokenizer,
        formats=("hf",),
    )
    assert "open_clip repairs mojibake, HTML entities and spaces" in exported.notes[-1]
    np.testing.assert_array_equal(load_known(tmp_path / "again")[0].tokenize(texts), ids)
    cfg = json.loads((tmp_path / "again" / OPEN_CLIP).read_text())["model_cfg"]["text_cfg"]
    assert cfg["tokenizer_kwargs"] == {"clean": "whitespace"} and cfg["hf_tokenizer_name"]


def test_open_clip_metadata_decides_how_its_folder_is_cleaned(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    document = json.loads((folder / OPEN_CLIP).read_text())
    document["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (folder / OPEN_CLIP).write_text(json.dumps(document))
    (folder / HUGGING_FACE).unlink()
    tokenizer = open_checkpoint(folder).tokenizer
    assert tokenizer is not None and tokenizer.clean == "canonicalize"
    import_checkpoint(folder, tmp_path / "artifact")
    artifact = read_artifact(tmp_path / "artifact")
    assert artifact.tokenizer == tokenizer and artifact.manifest["tokenizer"]["clean"] == "canonicalize"


def test_two_files_of_metadata_that_disagree_are_named(folder: pathlib.Path, caplog: pytest.LogCaptureFixture) -> None:
    open_checkpoint(folder)
    assert "is read" not in caplog.text  # an export's files agree
    document = json.loads((folder / OPEN_CLIP).read_text())
    document["model_cfg"]["text_cfg"]["no_causal_mask"] = False
    (folder / OPEN_CLIP).write_text(json.dumps(document))
    open_checkpoint(folder)
    assert "text.no_causal_mask is True, and False by open_clip_config.json: config.json is read" in caplog.text
    document["model_cfg"]["vision_cfg"]["mlp_ratio"] = 3
    (folder / OPEN_CLIP).write_text(json.dumps(document))
    open_checkpoint(folder)
    assert "vision.mlp width is 48, and 96 by open_clip_config.json" in caplog.text


def test_weights_alone_encode_images_and_refuse_texts(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with_tokenizer, origin = load_known(folder)
    for name in ("tokenizer.json", "spiece.model"):
        (folder / name).unlink(missing_ok=True)
    import_checkpoint(folder, tmp_path / "artifact")
    model = Model.load(tmp_path / "artifact")
    assert model.encode_image(np.zeros((1, 16, 16, 3), np.uint8)).shape == (1, 32)
    with pytest.raises(ValueError, match=r"import it again with --tokenizer FOLDER, which has its tokenizer\.json or"):
        model.encode_text("a photo")
    assert (
        main(["import", str(folder), "--out", str(tmp_path / "whole"), "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    )
    np.testing.assert_array_equal(
        Model.load(tmp_path / "whole").tokenize(["a photo"]), with_tokenizer.tokenize(["a photo"])
    )
    text = with_tokenizer.config.text
    (tmp_path / "tokenizer" / HUGGING_FACE).write_text('{"model_type": "siglip"}')  # no weights are needed beside it
    assert load_tokenizer(tmp_path / "tokenizer", text) == with_tokenizer.tokenizer
    with pytest.raises(ValueError, match=r"whole: .*padding to 16 tokens|whole: .* tokens, but the model's embedding"):
        load_tokenizer(tmp_path / "whole", dataclasses.replace(text, context_length=9, vocab_size=50))
    with pytest.raises(ValueError, match=r"checkpoint: the tokenizer for it is nowhere"):
        import_checkpoint(folder, tmp_path / "none", tokenizer=lambda text: None)
    assert not (tmp_path / "none").exists()
    cfg = with_tokenizer.config.to_open_clip()
    cfg["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (tmp_path / "model.json").write_text(json.dumps(cfg))
    take = functools.partial(load_tokenizer, tmp_path / "tokenizer")
    import_checkpoint(folder, tmp_path / "cleaned", like=str(tmp_path / "model.json"), tokenizer=take)
    assert Model.load(tmp_path / "cleaned").tokenizer == dataclasses.replace(
        with_tokenizer.tokenizer, clean="canonicalize"
    )
    other, without = load_known(folder)
    assert without["content"] != origin["content"]
    assert fingerprint(other, folder) != fingerprint(with_tokenizer, folder)


def rewritten(artifact: pathlib.Path, change: Callable[[dict[str, Any]], Any]) -> pathlib.Path:
    manifest = json.loads((artifact / "tclip.json").read_text())
    change(manifest)
    fields = {key: value for key, value in manifest.items() if key not in ("format", "format_version", "sha256")}
    (artifact / "tclip.json").write_bytes(dump_manifest(fields))
    return artifact


def test_a_bad_artifact_is_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    artifact = tmp_path / "artifact"
    import_checkpoint(folder, artifact)
    manifest = json.loads((artifact / "tclip.json").read_text())
    file, options = manifest["tokenizer"]["file"], manifest["tokenizer"]
    assert content_digest(manifest) != content_digest(manifest | {"tokenizer": options | {"clean": "lower"}})
    data = (artifact / file).read_bytes()
    (artifact / file).write_bytes(data[:-1] + b"x")
    with pytest.raises(ArtifactError, match=f"{file} is damaged"):
        read_artifact(artifact)
    with pytest.raises(ArtifactError, match=f"{file} is damaged"):
        load_tokenizer(artifact, siglip(9).text)
    (artifact / file).write_bytes(data)
    for value, message in (
        (5, "tokenizer is 5: it must be an object"),
        (options | {"file": "rest.safetensors"}, "tokenizer.file is 'rest.safetensors'"),
        (options | {"clean": None}, "tokenizer.clean is None"),
    ):
        with pytest.raises(ArtifactError, match=message):
            read_artifact(rewritten(artifact, lambda manifest, value=value: manifest.update(tokenizer=value)))
    rewritten(artifact, lambda manifest: (manifest.update(tokenizer=options), manifest["files"].pop(file)))
    with pytest.raises(ArtifactError, match=f"files lacks {file}, which tokenizer.file names"):
        read_artifact(artifact)


def test_an_artifact_of_a_clip_has_no_key_for_it(tmp_path: pathlib.Path) -> None:
    clip = CLIPConfig.from_open_clip(
        {
            "embed_dim": 16,
            "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
            "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
        }
    )
    params = init_params(CLIP(clip), jax.random.key(0))
    write_artifact(tmp_path / "a", config=clip, preprocess=Preprocess(16), params=params, rules=())
    assert "tokenizer" not in json.loads((tmp_path / "a" / "tclip.json").read_text())
    assert read_artifact(tmp_path / "a").tokenizer is None
    export_model(tmp_path / "clip", config=clip, preprocess=Preprocess(16), params=params, formats=("open_clip",))
    with pytest.raises(ValueError, match="clip: CLIP's own tokenizer is that of the model: it takes no other"):
        import_checkpoint(tmp_path / "clip", tmp_path / "refused", tokenizer=lambda text: None)
