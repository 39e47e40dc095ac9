"""`--to torch`: a folder whose package gives the model's embeddings in PyTorch, on its own and in other libraries."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
import subprocess
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model
from tclip_jax.interop import torch_packed
from tclip_jax.interop.examples import Examples, make_examples
from tclip_jax.interop.hugging_face_config import hugging_face_config
from tclip_jax.interop.model_card import model_card
from tclip_jax.interop.privacy import find_private
from tclip_jax.interop.torch_packed import BUDGET, verify_torch, write_torch
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer, TernaryTensor
from tclip_jax.ternary.kernels import native_cpu

torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install -e '.[test]')")

import tclip_torch  # noqa: E402  it imports torch
from tclip_torch import linear as layers  # noqa: E402

pytestmark = pytest.mark.torch

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

ROOT = pathlib.Path(__file__).resolve().parents[2]
RULES = ternary_rules("Q-ALL", Quantizer(group=24))
# Widths that fill no panel, no byte and no group, and three words for queries, keys and values.
CONFIG = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=(16, 16), patch_size=8, width=60, layers=2, head_width=30),
    text=TextConfig(context_length=9, width=42, heads=3, layers=2),
    quick_gelu=True,
)


@pytest.fixture(scope="module")
def params(random_params: Draw) -> Params:
    return pack_params(random_params(CONFIG), RULES)


@pytest.fixture(scope="module")
def examples(params: Params) -> Examples:
    return make_examples(CONFIG, params, count=3)


@pytest.fixture(scope="module")
def folder(params: Params, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of the model; tests must not change it."""
    folder = tmp_path_factory.mktemp("export") / "torch"
    write_torch(epath.Path(folder), config=CONFIG, preprocess=Preprocess(CONFIG.vision.image_size), params=params)
    return folder


@pytest.fixture
def changed(folder: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    """A copy of the folder."""
    return shutil.copytree(folder, tmp_path / "changed")


@pytest.fixture(autouse=True)
def native(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernel in the library of tclip_jax; without it, PyTorch's products."""
    monkeypatch.setenv("TCLIP_TORCH_LIBRARY", str(native_cpu.LIBRARY))
    layers.kernel.cache_clear()
    layers.instruction_sets.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers.kernel()
    yield
    layers.kernel.cache_clear()
    layers.instruction_sets.cache_clear()


def inputs(examples: Examples) -> tuple[Any, Any]:
    pixels = np.ascontiguousarray(examples.pixels.transpose(0, 3, 1, 2))
    return torch.from_numpy(pixels), torch.from_numpy(examples.tokens.astype(np.int64))


def assert_embeds_as(examples: Examples, image: Any, text: Any, atol: float = BUDGET) -> None:
    assert np.abs(examples.image).max() > 0.1
    np.testing.assert_allclose(image.float(), examples.image, rtol=0, atol=atol)
    np.testing.assert_allclose(text.float(), examples.text, rtol=0, atol=atol)


def open_clip_model(config: CLIPConfig = CONFIG) -> Any:
    import open_clip

    torch.manual_seed(0)
    return open_clip.CLIP(**config.to_open_clip())


def transformers_model(config: CLIPConfig = CONFIG) -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.CLIPModel(transformers.CLIPConfig(**hugging_face_config(config, "float32")))


def embed(model: Any, pixels: Any, tokens: Any) -> tuple[Any, Any]:
    """L2-normalised embeddings by any of the three models."""
    with torch.inference_mode():
        if hasattr(model, "vision_model"):
            output = model(pixel_values=pixels, input_ids=tokens)
            return output.image_embeds, output.text_embeds
        if isinstance(model, tclip_torch.CLIP):
            return model(pixels, tokens)
        return model.encode_image(pixels, normalize=True), model.encode_text(tokens, normalize=True)


def size(model: Any) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in (*model.parameters(), *model.buffers()))


def models(folder: pathlib.Path, activations: str) -> dict[str, Any]:
    return {
        "its own": tclip_torch.load(folder, activations),
        "open_clip": tclip_torch.replace_linears(open_clip_model(), folder, activations),
        "transformers": tclip_torch.replace_linears(transformers_model(), folder, activations),
    }


@pytest.mark.parametrize("activations", ["A32", "A16", "A8"])
def test_all_three_models_give_the_embeddings_of_jax(
    activations: Any, folder: pathlib.Path, params: Params, examples: Examples
) -> None:
    ours = Model(CONFIG, Preprocess(CONFIG.vision.image_size), params).repacked(activations=activations)
    same = examples._replace(image=ours.encode_image(examples.pixels), text=ours.encode_text(examples.tokens))
    # Differences of 1e-7, from sums in another order, round to other integers. So embeddings differ no more from JAX's
    # than these from the exact ones; products of the same activations are equal to the bit, as the next test shows.
    rounding = max(np.abs(same.image - examples.image).max(), np.abs(same.text - examples.text).max())
    assert rounding < {"A32": BUDGET, "A16": 1e-4, "A8": 2e-2}[activations]
    for model in models(folder, activations).values():
        assert_embeds_as(same, *embed(model, *inputs(examples)), BUDGET if activations == "A32" else 2 * rounding)


@pytest.mark.skipif(not native_cpu.instruction_sets(), reason="the native library was not built")
@pytest.mark.parametrize("activations", ["A32", "A16", "A8"])
def test_products_have_the_bits_of_jax(activations: Any, folder: pathlib.Path, params: Params) -> None:
    leaf = params["image"]["blocks"]["mlp"]["fc1"]["kernel"]
    w = native_cpu.pack(jax.tree.map(lambda stacked: stacked[1], leaf))
    bias = params["image"]["blocks"]["mlp"]["fc1"]["bias"][1]
    layer = tclip_torch.load(folder, activations).visual.blocks[1].c_fc
    for rows in (1, 50, 197):
        x = np.random.default_rng(rows).standard_normal((rows, w.layer_shape[0]), np.float32)
        ours = native_cpu.dense(jnp.asarray(x), w, activations=activations, bias=jnp.asarray(bias))
        np.testing.assert_array_equal(layer(torch.from_numpy(x)), ours)


def test_the_default_activations_are_those_of_jax(folder: pathlib.Path, params: Params) -> None:
    ours = Model(CONFIG, Preprocess(CONFIG.vision.image_size), params).repacked()
    assert tclip_torch.load(folder).text.blocks[0].c_fc.activations == ours.activations


def test_memory_is_that_of_two_bits_a_weight(folder: pathlib.Path, params: Params) -> None:
    ternary = {path: leaf for path, leaf in flatten(params).items() if isinstance(leaf, TernaryTensor)}
    floats = sum(np.asarray(leaf).nbytes for path, leaf in flatten(params).items() if path not in ternary)
    trits = sum(leaf.trits.size for leaf in ternary.values())
    before = size(open_clip_model())
    for name, model in models(folder, "A32").items():
        # Small widths pad much; scales are bfloat16 for every 24 weights; masks and indices of the libraries.
        assert size(model) < floats + trits * 0.45, name
        assert size(model) < before / 3
        packed = [each for each in model.modules() if isinstance(each, layers.PackedLinear | layers.PackedEmbedding)]
        assert len(packed) == (25 if name == "transformers" else 17)
        assert not any(isinstance(each, torch.nn.MultiheadAttention) for each in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training


def test_bfloat16_models_stay_bfloat16(folder: pathlib.Path, examples: Examples) -> None:
    pixels, tokens = inputs(examples)
    for model in (open_clip_model(), transformers_model()):
        model = tclip_torch.replace_linears(model.bfloat16(), folder, "A32")
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        image, text = embed(model, pixels.bfloat16(), tokens)
        assert image.dtype == text.dtype == torch.bfloat16
        assert_embeds_as(examples, image, text, 0.02)


@pytest.mark.slow
def test_whole_towers_compile_without_a_break(folder: pathlib.Path, examples: Examples) -> None:
    pixels, tokens = inputs(examples)
    own, theirs, other = models(folder, "A8").values()
    for tower, given in (
        (own.visual, pixels),
        (own.text, tokens),
        (theirs.visual, pixels),
        (theirs.encode_text, tokens),
        (other.get_image_features, pixels),
    ):
        compiled = torch.compile(tower, backend="aot_eager", fullgraph=True)
        with torch.inference_mode():
            actual, expected = compiled(given), tower(given)
        if not isinstance(actual, torch.Tensor):
            actual, expected = actual.pooler_output, expected.pooler_output
        np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-2)


@pytest.mark.slow
@pytest.mark.parametrize("rules", ["Q-FFN", "everything", "tensor", "none"])
def test_every_kind_of_pooling_norm_and_scale(rules: str, tmp_path: pathlib.Path, random_params: Draw) -> None:
    vision = dataclasses.replace(
        CONFIG.vision, pool_type="avg", ls_init_value=0.1, no_ln_pre=True, final_ln_after_pool=rules == "none"
    )
    text = dataclasses.replace(CONFIG.text, pool_type="last", no_causal_mask=True, ls_init_value=0.2)
    config = dataclasses.replace(CONFIG, vision=vision, text=text, quick_gelu=False)
    chosen = {
        "everything": ((".*", Quantizer(group="channel")),),
        "tensor": ternary_rules("Q-ALL", Quantizer(group="tensor", scale_bits=24)),
    }
    drawn = pack_params(random_params(config), chosen.get(rules) or ternary_rules(rules, Quantizer(group=32)))
    write_torch(epath.Path(tmp_path), config=config, preprocess=Preprocess(16), params=drawn)
    expected = make_examples(config, drawn)
    verify_torch(epath.Path(tmp_path), config=config, params=drawn, examples=expected)
    for model in (
        tclip_torch.load(tmp_path, "A32"),
        tclip_torch.replace_linears(open_clip_model(config), tmp_path, "A32"),
    ):
        assert_embeds_as(expected, *embed(model, *inputs(expected)))
    with pytest.raises(ValueError, match="CLIPModel cannot express the exported model"):
        tclip_torch.replace_linears(transformers_model(), tmp_path)


def test_a_flipped_trit_is_found(changed: pathlib.Path, params: Params, examples: Examples) -> None:
    given: Any = {"config": CONFIG, "params": params, "examples": examples}
    path = changed / "model.safetensors"
    stored = safetensors.numpy.load_file(path)
    stored["visual.transformer.resblocks.1.mlp.c_fc.weight.words"][1, 2, 3] ^= 1
    safetensors.numpy.save_file(stored, path)
    with pytest.raises(ValueError, match=r"safetensors: visual\S+1\.mlp\.c_fc\.weight is not the weight of the model$"):
        verify_torch(epath.Path(changed), **given)


@pytest.mark.slow
def test_other_embeddings_and_a_broken_package_are_found(
    changed: pathlib.Path, params: Params, examples: Examples
) -> None:
    given: Any = {"config": CONFIG, "params": params, "examples": examples}
    note = verify_torch(epath.Path(changed), **given)
    assert note.startswith("torch: weights verified; embeddings differ by at most ") and note.endswith(" from JAX's")
    given["examples"] = examples._replace(image=-examples.image)
    with pytest.raises(ValueError, match=r"changed: its image embeddings differ by \d\.\d+ from those of the model$"):
        verify_torch(epath.Path(changed), **given)
    (changed / "tclip_torch" / "clip.py").write_text("import tclip_jax\n")
    with pytest.raises(ValueError, match=r"tclip_torch fails: ModuleNotFoundError: import of tclip_jax halted"):
        verify_torch(epath.Path(changed), **given)


def test_without_pytorch_the_export_says_what_was_not_compared(
    folder: pathlib.Path, params: Params, examples: Examples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_packed.importlib.util, "find_spec", lambda name: None)
    note = verify_torch(epath.Path(folder), config=CONFIG, params=params, examples=examples)
    assert note == "torch: weights verified; PyTorch is not installed, so embeddings were not compared with JAX's"


def test_nothing_in_the_package_is_private(folder: pathlib.Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            assert not list(find_private(path, str(path.relative_to(folder)))), path


@pytest.mark.slow
def test_the_command_writes_a_folder_whose_wheel_needs_no_jax(
    params: Params, examples: Examples, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    artifact, out = tmp_path / "artifact", tmp_path / "out"
    size = Preprocess(CONFIG.vision.image_size)
    write_artifact(artifact, config=CONFIG, preprocess=size, params=params, rules=RULES, rest_dtype="float32")
    assert main(["export", str(artifact), "--to", "torch", "--out", str(out)]) == 0
    weights, note, last = capsys.readouterr().out.splitlines()
    assert weights.split()[0].endswith("torch/model.safetensors") and note.startswith("torch: weights verified")
    assert last == f"{out}: torch; see README.md there to load it"
    card = (out / "README.md").read_text()
    assert 'tclip_torch.load("FOLDER/torch")' in card and "tags: [clip, ternary, torch]" in card

    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--wheel-dir",
        str(tmp_path),
        str(out / "torch"),
    ]
    built = subprocess.run(build, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("tclip_torch-*-py3-none-linux_*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    native = tmp_path / "site" / "tclip_torch" / "native"
    assert [path.name for path in native.glob("*.so")] == ["libtclip_torch.so"]
    code = (
        "import sys; sys.modules['jax'] = sys.modules['tclip_jax'] = None; import tclip_torch, torch;"
        "print(tclip_torch.__file__, tclip_torch.linear.best_instructions());"
        "print(tclip_torch.load(sys.argv[1]).encode_text(torch.zeros(1, 9, dtype=int)).norm().item())"
    )
    environment = {"PYTHONPATH": str(tmp_path / "site"), "PATH": ""}
    command = [sys.executable, "-c", code, str(out / "torch")]
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900)
    assert ran.returncode == 0, ran.stderr
    where, norm = ran.stdout.splitlines()
    assert where.startswith(str(tmp_path / "site")) and not where.endswith(" ") and abs(float(norm) - 1) < 1e-5


def test_the_file_holds_packed_weights(folder: pathlib.Path, params: Params) -> None:
    described = json.loads((folder / "config.json").read_text())
    assert described["model_cfg"] == CONFIG.to_open_clip() and described["preprocess_cfg"]["size"] == [16, 16]
    stored = safetensors.numpy.load_file(folder / "model.safetensors")
    assert len(described["packed"]) == 17 and set(stored) >= {f"{name}.words" for name in described["packed"]}
    assert not set(described["packed"]) & set(stored)


def test_the_code_of_the_page_and_of_the_model_card_runs(
    folder: pathlib.Path, params: Params, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "release" / "torch")
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page.partition("\n## PyTorch, packed\n")[2], re.DOTALL)
    assert len(code.splitlines()) <= 10
    shown: dict[str, Any] = {}
    exec(code, shown)
    theirs = shown["theirs"].encode_image(torch.zeros(1, 3, 16, 16), normalize=True)
    np.testing.assert_allclose(theirs, shown["image"], rtol=0, atol=1e-4)
    (code,) = re.findall(r"```python\n(.*?)```", model_card(params, "float32", {}, ["torch"]), re.DOTALL)
    given = {"pixels": torch.zeros(2, 3, 16, 16), "ids": torch.zeros(2, 4, dtype=int)}
    exec(code.replace("FOLDER", "release"), given)
    assert given["image"].shape == given["text"].shape == (2, CONFIG.embed_dim)
