"""Models saved by open_clip and transformers in every usual form give the same parameters and embeddings."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax.traverse_util import flatten_dict

from tclip_jax.artifacts import read_artifact
from tclip_jax.data.images import HALF_MEAN, HALF_STD, Preprocess
from tclip_jax.inference.load import load_model
from tclip_jax.interop.checkpoints import is_checkpoint, open_checkpoint, resize_positions
from tclip_jax.interop.export import export_model
from tclip_jax.interop.importing import import_checkpoint
from tclip_jax.interop.open_clip import to_open_clip
from tclip_jax.interop.recover import NotTernaryError
from tclip_jax.models.clip import CLIP
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.presets import PRESETS
from tclip_jax.ternary import TernaryTensor

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

TINY = CLIPConfig.from_open_clip(PRESETS["tiny"])
MODEL_CFG = PRESETS["tiny"]


def assert_same(actual: Params, expected: Params) -> None:
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(np.asarray(a), b), actual, expected)


def open_clip_folder(
    folder: pathlib.Path, params: Params, model_cfg: dict[str, Any] | None = None, dtype: str = "float32"
) -> pathlib.Path:
    """Write what open_clip's push_to_hf_hub writes, without the tokenizer."""
    folder.mkdir()
    document = {"model_cfg": model_cfg or MODEL_CFG, "preprocess_cfg": {"mean": HALF_MEAN, "std": HALF_STD}}
    (folder / "open_clip_config.json").write_text(json.dumps(document))
    state = {key: value.astype(dtype) for key, value in to_open_clip(params, TINY).items()}
    safetensors.numpy.save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def params(random_params: Draw) -> Params:
    return random_params(TINY)


@pytest.fixture
def folder(tmp_path: pathlib.Path, params: Params) -> pathlib.Path:
    return open_clip_folder(tmp_path / "theirs", params)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_an_open_clip_folder_becomes_an_artifact(dtype: str, tmp_path: pathlib.Path, params: Params) -> None:
    source = open_clip_folder(tmp_path / "theirs", params, dtype=jax.numpy.dtype(dtype))
    results = import_checkpoint(source, tmp_path / "out")
    assert len(results) == 12 and all(isinstance(each, NotTernaryError) for each in results.values())
    artifact = read_artifact(tmp_path / "out")
    assert_same(artifact.params, jax.tree.map(lambda leaf: leaf.astype(dtype).astype(np.float32), params))
    assert (artifact.config, artifact.preprocess) == (TINY, Preprocess(32, HALF_MEAN, HALF_STD))
    provenance = artifact.manifest["provenance"]
    assert provenance["source"] == str(source) and len(provenance["source_sha256"]["open_clip_model.safetensors"]) == 64
    assert_same(load_model(source).params, artifact.params)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("kind", "quick_gelu"),
    [
        ("open_clip.bin", False),
        ("hugging_face", True),
        ("hugging_face", False),
        ("sharded", False),
        ("pytorch_model.bin", True),
        ("openai.pt", True),
        ("openai.pt", False),
    ],
)
def test_embeddings_are_those_of_the_library(kind: str, quick_gelu: bool, tmp_path: pathlib.Path) -> None:
    import open_clip
    import torch
    import transformers

    from tclip_jax.interop.hugging_face_config import hugging_face_config

    vision = dataclasses.replace(TINY.vision, width=128, head_width=64)
    text = dataclasses.replace(TINY.text, width=64, heads=1, context_length=12)
    config = dataclasses.replace(TINY, vision=vision, text=text, quick_gelu=quick_gelu)
    torch.manual_seed(0)
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(1, 49408, (2, 12))
    tokens[:, -1] = 49407
    source = tmp_path / "theirs"
    source.mkdir()
    with torch.no_grad():
        if kind in ("open_clip.bin", "openai.pt"):
            model = open_clip.CLIP(**config.to_open_clip()).eval()
            expected = [model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)]
            scale = model.logit_scale
        else:
            fields = hugging_face_config(config)
            hub_model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(fields)).eval()
            outputs = hub_model(pixel_values=images, input_ids=tokens)
            expected, scale = [outputs.image_embeds, outputs.text_embeds], hub_model.logit_scale
            (source / "preprocessor_config.json").write_text(json.dumps(Preprocess(32).to_hugging_face()))
            hub_model.save_pretrained(source, max_shard_size="5MB" if kind == "sharded" else "1GB")
            assert (source / "model.safetensors.index.json").exists() == (kind == "sharded")
            if kind == "pytorch_model.bin":
                (source / "model.safetensors").unlink()
                torch.save(hub_model.state_dict(), source / kind)
        if kind == "open_clip.bin":
            document = {"model_cfg": config.to_open_clip(), "preprocess_cfg": {}}
            (source / "open_clip_config.json").write_text(json.dumps(document))
            torch.save(
                {"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}},
                source / "open_clip_pytorch_model.bin",
            )
        elif kind == "openai.pt":
            source /= kind
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # TorchScript is deprecated
                torch.jit.trace(model, (images, tokens), check_trace=False).save(str(source))
    checkpoint = open_checkpoint(source)
    assert (checkpoint.config, checkpoint.preprocess) == (config, Preprocess(32))
    params = jax.tree.map(np.asarray, checkpoint.params)
    with jax.default_matmul_precision("highest"):
        image, text_embedding, _ = CLIP(config).apply(
            {"params": params}, images.permute(0, 2, 3, 1).numpy(), tokens.int().numpy()
        )
    np.testing.assert_allclose(image, expected[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(text_embedding, expected[1], rtol=0, atol=1e-5)
    assert params["logit_scale"] == scale.detach().numpy()


@pytest.mark.torch
@pytest.mark.parametrize(("old", "new"), [(4, (6, 6)), (7, (3, 5)), (4, (4, 4))])
def test_positions_are_resized_as_by_open_clip(old: int, new: tuple[int, int]) -> None:
    import types

    import torch
    from open_clip.model import resize_pos_embed

    embedding = np.random.default_rng(0).normal(size=(1 + old * old, 24)).astype(np.float32)
    state = {"visual.positional_embedding": torch.from_numpy(embedding)}
    resize_pos_embed(state, types.SimpleNamespace(visual=types.SimpleNamespace(grid_size=new)))
    np.testing.assert_allclose(
        resize_positions(embedding, new), state["visual.positional_embedding"], rtol=0, atol=2e-6
    )


def test_another_image_size_only_when_asked_for(tmp_path: pathlib.Path, folder: pathlib.Path, params: Params) -> None:
    import_checkpoint(folder, tmp_path / "out", image_size=64)
    artifact = read_artifact(tmp_path / "out")
    assert artifact.config.vision.image_size == artifact.preprocess.size == (64, 64)
    np.testing.assert_allclose(
        artifact.params["image"]["position_embedding"], resize_positions(params["image"]["position_embedding"], (8, 8))
    )
    cfg = MODEL_CFG | {"vision_cfg": MODEL_CFG["vision_cfg"] | {"image_size": 64}}
    (tmp_path / "large.json").write_text(json.dumps(cfg))
    assert open_checkpoint(folder, like=str(tmp_path / "large.json")).preprocess.size == (64, 64)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg}))
    with pytest.raises(ValueError, match=r"theirs: visual\.positional_embedding has shape \(17, 64\).* \(65, 64\)$"):
        open_checkpoint(folder)
    with pytest.raises(ValueError, match=r"theirs: vision_cfg\.image_size is \(0, 0\): it must be at least 1$"):
        open_checkpoint(folder, image_size=0)
    with pytest.raises(ValueError, match="only a square grid can be resized"):
        resize_positions(np.zeros((6, 2)), (2, 2))


def with_ternary(params: Params, scale: np.float32) -> Params:
    """Trits times that scale in the MLPs of the images and in the token embedding."""
    rng, changed = np.random.default_rng(1), jax.tree.map(np.copy, params)
    for leaf in (changed["image"]["blocks"]["mlp"]["fc1"], changed["image"]["blocks"]["mlp"]["fc2"]):
        leaf["kernel"][:] = rng.integers(-1, 2, leaf["kernel"].shape) * scale
    table = changed["text"]["token_embedding"]["embedding"]
    table[:] = rng.integers(-1, 2, table.shape) * rng.random((len(table), 1), np.float32)
    return changed


def test_trits_are_recovered_and_load_as_the_same_weights(tmp_path: pathlib.Path, params: Params) -> None:
    dequantised = with_ternary(params, np.float32(0.1))
    results = import_checkpoint(open_clip_folder(tmp_path / "theirs", dequantised), tmp_path / "out")
    ternary = {path: each for path, each in results.items() if isinstance(each, TernaryTensor)}
    assert {path: t.scale.shape for path, t in ternary.items()} == {
        "image/blocks/mlp/fc1/kernel": (3, 1, 1),
        "image/blocks/mlp/fc2/kernel": (3, 1, 1),
        "text/token_embedding/embedding": (49408, 1),
    }
    leaves = flatten_dict(read_artifact(tmp_path / "out").params, sep="/")
    for path, expected in flatten_dict(dequantised, sep="/").items():
        leaf = leaves[path].dequantize() if path in ternary else leaves[path]
        np.testing.assert_array_equal(leaf, expected, err_msg=path)
    import_checkpoint(tmp_path / "theirs", tmp_path / "float", ternary=False)
    assert_same(read_artifact(tmp_path / "float").params, dequantised)


def test_an_export_of_an_import_is_the_same_bytes(tmp_path: pathlib.Path, params: Params) -> None:
    weights = with_ternary(params, np.float32(0.1))
    export_model(tmp_path / "a", config=TINY, preprocess=Preprocess(32), params=weights)
    import_checkpoint(tmp_path / "a", tmp_path / "artifact")
    model = load_model(tmp_path / "artifact")
    export_model(tmp_path / "b", config=model.config, preprocess=model.preprocess, params=model.params)
    for name in ("open_clip_model.safetensors", "model.safetensors", "open_clip_config.json", "config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name


@pytest.mark.parametrize("library", ["open_clip", "hf"])
def test_an_export_for_one_library_is_read_back(library: str, tmp_path: pathlib.Path, params: Params) -> None:
    export_model(tmp_path / "out", config=TINY, preprocess=Preprocess(32), params=params, formats=[library])
    checkpoint = open_checkpoint(tmp_path / "out")
    assert_same(checkpoint.params, params)
    assert (checkpoint.config, checkpoint.preprocess) == (TINY, Preprocess(32))
    (file,) = checkpoint.files
    file.unlink()
    with pytest.raises(FileNotFoundError, match=rf"out has no weights beside its .*config\.json: .*{file.name}"):
        open_checkpoint(tmp_path / "out")


def test_a_bare_file_needs_a_preset(tmp_path: pathlib.Path, folder: pathlib.Path, params: Params) -> None:
    file = folder / "open_clip_model.safetensors"
    with pytest.raises(ValueError, match=r"model\.safetensors does not state its architecture"):
        open_checkpoint(file)
    checkpoint = open_checkpoint(file, like="tiny")
    assert_same(checkpoint.params, params)
    assert (checkpoint.config, checkpoint.preprocess) == (TINY, Preprocess(32))
    document = {"model_cfg": MODEL_CFG, "preprocess_cfg": {"mean": HALF_MEAN, "std": HALF_STD}}
    (tmp_path / "tiny.json").write_text(json.dumps(document))
    assert open_checkpoint(file, like=str(tmp_path / "tiny.json")).preprocess.mean == HALF_MEAN


@pytest.mark.parametrize("like", ["ViT-B-32", "ViT-B-16"])
def test_a_wrong_preset_leaves_nothing(like: str, tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    for source, message in ((folder, "its embed_dim is 64"), (folder / "open_clip_model.safetensors", "missing trans")):
        with pytest.raises(ValueError, match=rf"{source.name}: .*{message}"):
            import_checkpoint(source, tmp_path / "out", like=like)
    assert not list(tmp_path.glob("out*"))


def test_a_swapped_activation_is_refused(tmp_path: pathlib.Path, folder: pathlib.Path, params: Params) -> None:
    (tmp_path / "quick.json").write_text(json.dumps(MODEL_CFG | {"quick_gelu": True}))
    with pytest.raises(ValueError, match=r"theirs: its quick_gelu is False, but the given model's is True$"):
        open_checkpoint(folder, like=str(tmp_path / "quick.json"))
    export_model(tmp_path / "both", config=TINY, preprocess=Preprocess(32), params=params)
    path = tmp_path / "both" / "config.json"
    path.write_text(path.read_text().replace('"gelu"', '"quick_gelu"'))
    with pytest.raises(ValueError, match=r"both/config\.json has hidden_act quick_gelu, but .* quick_gelu False"):
        open_checkpoint(tmp_path / "both")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite_leave_nothing(value: float, tmp_path: pathlib.Path, params: Params) -> None:
    params["text"]["blocks"]["mlp"]["fc2"]["kernel"][1, 2, 3] = value
    source = open_clip_folder(tmp_path / "theirs", params)
    with pytest.raises(ValueError, match=r"theirs: text/blocks/mlp/fc2/kernel is not finite in float32"):
        import_checkpoint(source, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_truncated_file_and_a_missing_shard_leave_nothing(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    weights = folder / "open_clip_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"open_clip_model\.safetensors is truncated"):
        import_checkpoint(folder, tmp_path / "out")
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"theirs has no weights beside its open_clip_config\.json: expected"):
        import_checkpoint(folder, tmp_path / "out")
    (folder / "open_clip_model.safetensors.index.json").write_text('{"weight_map": {"a": "m-1.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"m-1\.safetensors is missing"):
        import_checkpoint(folder, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_what_is_a_checkpoint(tmp_path: pathlib.Path, folder: pathlib.Path) -> None:
    assert (
        is_checkpoint("hf-hub:org/name") and is_checkpoint(folder) and is_checkpoint(folder / "open_clip_config.json")
    )
    (tmp_path / "config.json").write_text('{"model": {}}')
    assert not is_checkpoint(tmp_path) and not is_checkpoint(tmp_path / "nothing")
    (tmp_path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds neither open_clip_config\.json nor config\.json"):
        open_checkpoint(tmp_path)


WRAPPERS = (
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "_orig_mod.module.",
    "model.",
    "ema.module.",
    "model.text.",
)


@pytest.mark.torch
@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pt"])
@pytest.mark.parametrize("prefix", WRAPPERS)
def test_names_of_wrappers_are_those_of_the_model(
    prefix: str, suffix: str, folder: pathlib.Path, params: Params
) -> None:
    """Prefixes of DataParallel, torch.compile, FSDP and training loops, in any order, in a weights file."""
    import torch

    path = folder / f"wrapped{suffix}"
    state = safetensors.numpy.load_file(folder / "open_clip_model.safetensors")
    if prefix.endswith("text."):
        text = prefix, prefix.removesuffix("text.")
        state = {text["visual" in key or key == "logit_scale"] + key: value for key, value in state.items()}
    else:
        state = {prefix + key: value for key, value in state.items()}
    if suffix == ".safetensors":
        safetensors.numpy.save_file(state, path)
    else:
        torch.save({"model": {key: torch.from_numpy(value) for key, value in state.items()}, "epoch": 3}, path)
    assert_same(open_checkpoint(path, like="tiny").params, params)


@pytest.mark.torch
@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
def test_what_pytorch_itself_wraps_is_read(file: str, tmp_path: pathlib.Path, params: Params) -> None:
    """Names made by PyTorch: compiled towers, checkpointed blocks, an average; also around transformers' model."""
    import torch
    import transformers
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    from tclip_jax.interop.hugging_face import to_hugging_face
    from tclip_jax.interop.hugging_face_config import hugging_face_config

    document = hugging_face_config(TINY)
    model = transformers.CLIPModel(transformers.CLIPConfig.from_dict(document))
    theirs = {
        key: torch.from_numpy(np.array(value))
        for key, value in to_hugging_face(to_open_clip(params, TINY), TINY).items()
    }
    model.load_state_dict(theirs)
    model.text_model.encoder.layers[0] = checkpoint_wrapper(model.text_model.encoder.layers[0])
    model.vision_model = torch.compile(model.vision_model, backend="eager")
    wrapped = torch.nn.DataParallel(torch.optim.swa_utils.AveragedModel(model))
    state = wrapped.state_dict()
    assert "module.module.vision_model._orig_mod.pre_layrnorm.weight" in state and "module.n_averaged" in state
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(document))
    if file.endswith(".bin"):
        torch.save({"state_dict": state}, folder / file)
    else:
        safetensors.numpy.save_file({key: value.numpy() for key, value in state.items()}, folder / file)
    assert_same(open_checkpoint(folder).params, params)


def test_two_models_in_one_file_are_named(folder: pathlib.Path) -> None:
    path = folder / "open_clip_model.safetensors"
    state = safetensors.numpy.load_file(path)
    safetensors.numpy.save_file(state | {f"ema.{key}": value for key, value in state.items()}, path)
    with pytest.raises(ValueError, match=r"theirs: the state dict holds \S+ twice, as (\S+) and (ema\.)?\S+$"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [(None, Preprocess(32)), ({}, Preprocess(32)), ({"mean": HALF_MEAN}, Preprocess(32, HALF_MEAN))],
)
def test_a_folder_of_transformers_without_a_preprocessor_has_a_stated_default(
    stated: dict[str, Any] | None,
    expected: Preprocess,
    tmp_path: pathlib.Path,
    params: Params,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The default is CLIP's own, which the log shows; --model-cfg may state another."""
    export_model(tmp_path / "export", config=TINY, preprocess=Preprocess(32), params=params)
    source, like = tmp_path / "saved", None
    source.mkdir()
    for name in ("config.json", "model.safetensors"):
        (source / name).symlink_to(tmp_path / "export" / name)
    if stated is not None:
        like = str(tmp_path / "model.json")
        document = {"model_cfg": MODEL_CFG} | ({"preprocess_cfg": stated} if stated else {})
        pathlib.Path(like).write_text(json.dumps(document))
    import_checkpoint(source, tmp_path / "out", like=like)
    artifact = read_artifact(tmp_path / "out")
    assert artifact.preprocess == expected
    assert_same(jax.tree.map(np.asarray, artifact.params), params)
    assumed = [
        line for line in caplog.messages if line.startswith(f"{source} has no preprocessor_config.json: assuming")
    ]
    assert len(assumed) == (expected == Preprocess(32))
