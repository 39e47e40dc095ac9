"""`--to stablehlo`: programs of both towers that give the model's embeddings without this package."""

from __future__ import annotations

import ast
import dataclasses
import pathlib
import re
import runpy
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
import safetensors.numpy
from etils import epath

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.artifacts.pack import flatten
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.inference.model import Model
from tclip_jax.interop import stablehlo
from tclip_jax.interop.stablehlo import BUDGET, verify_stablehlo, write_stablehlo
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig
from tclip_jax.models.ternary_rules import ATTENTION, MLP, TOKEN_EMBEDDING, ternary_rules
from tclip_jax.ternary import Quantizer, TernaryTensor
from tclip_jax.ternary.packing import unpack_2bit

Params = dict[str, Any]
Draw = Callable[[CLIPConfig], Params]

ROOT = pathlib.Path(__file__).resolve().parents[2]
RULES = ternary_rules("Q-ALL", Quantizer(group=24))
# Widths that fill no byte and no group, so that packing pads.
CONFIG = CLIPConfig(
    embed_dim=16,
    vision=VisionConfig(image_size=(16, 24), patch_size=8, width=60, layers=2, head_width=30),
    text=TextConfig(context_length=9, vocab_size=301, width=42, heads=3, layers=2),
    quick_gelu=True,
)


@pytest.fixture(scope="module")
def params(random_params: Draw) -> Params:
    return pack_params(random_params(CONFIG), RULES)


@pytest.fixture(scope="module")
def programs(params: Params, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of the model; tests must not change it."""
    folder = tmp_path_factory.mktemp("programs") / "stablehlo"
    write_stablehlo(epath.Path(folder), config=CONFIG, params=params)
    return folder


@pytest.fixture
def changed(programs: pathlib.Path, tmp_path: pathlib.Path) -> epath.Path:
    """A copy of the folder."""
    return epath.Path(shutil.copytree(programs, tmp_path / "changed"))


def inputs(config: CLIPConfig, count: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(count)
    pixels = rng.standard_normal((count, *config.vision.image_size, 3), np.float32)
    return pixels, rng.integers(0, config.text.vocab_size, (count, config.text.context_length), np.int32)


def assert_gives_the_embeddings_of(folder: pathlib.Path, config: CLIPConfig, params: Params, count: int) -> None:
    encode_image, encode_text = runpy.run_path(str(folder / "load.py"))["load"]()
    pixels, tokens = inputs(config, count)
    model = Model(config, Preprocess(config.vision.image_size), params)
    for ours, theirs in (
        (model.encode_image(pixels), encode_image(pixels)),
        (model.encode_text(tokens), encode_text(tokens)),
    ):
        assert theirs.dtype == np.float32 and np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(theirs, ours, rtol=0, atol=BUDGET)


@pytest.mark.parametrize("count", [1, 5])
def test_a_batch_of_any_size_gives_the_embeddings_of_the_model(
    count: int, programs: pathlib.Path, params: Params
) -> None:
    assert_gives_the_embeddings_of(programs, CONFIG, params, count)


@pytest.mark.slow
def test_every_kind_of_pooling_norm_and_scale(tmp_path: pathlib.Path, random_params: Draw) -> None:
    vision = dataclasses.replace(
        CONFIG.vision, pool_type="avg", ls_init_value=0.1, no_ln_pre=True, final_ln_after_pool=True
    )
    text = dataclasses.replace(CONFIG.text, pool_type="last", no_causal_mask=True, ls_init_value=0.2)
    config = dataclasses.replace(CONFIG, vision=vision, text=text, quick_gelu=False)
    for group in ("channel", "tensor"):
        params = pack_params(random_params(config), ternary_rules("Q-ALL", Quantizer(group=group)))
        write_stablehlo(epath.Path(tmp_path / group), config=config, params=params)
        assert_gives_the_embeddings_of(tmp_path / group, config, params, 2)
    floats = random_params(config)
    write_stablehlo(epath.Path(tmp_path / "float"), config=config, params=floats)
    assert_gives_the_embeddings_of(tmp_path / "float", config, floats, 2)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_stay_packed_too(bits: Any, random_params: Draw, tmp_path: pathlib.Path) -> None:
    rules = ((TOKEN_EMBEDDING, Quantizer(kind="uniform", bits=bits, group=8)), (MLP, Quantizer()))
    rules = ((ATTENTION, Quantizer(kind="uniform", bits=bits, group="channel")), *rules)
    params = pack_params(random_params(CONFIG), rules)
    write_stablehlo(epath.Path(tmp_path / "out"), config=CONFIG, params=params)
    assert_gives_the_embeddings_of(tmp_path / "out", CONFIG, params, 2)
    stored = safetensors.numpy.load_file(tmp_path / "out" / "weights.safetensors")
    for path in (TOKEN_EMBEDDING, "image/blocks/attention/qkv/kernel"):
        assert stored[path].tobytes() == np.asarray(flatten(params)[path].data).tobytes()


def test_weights_are_packed_four_to_a_byte_and_exact(programs: pathlib.Path, params: Params) -> None:
    stored = safetensors.numpy.load_file(programs / "weights.safetensors")
    ternary = 0
    for path, leaf in flatten(params).items():
        if not isinstance(leaf, TernaryTensor):
            assert stored[path].dtype == np.float32 and np.array_equal(stored[path], leaf), path
            continue
        ternary += 1
        length = leaf.shape[leaf.axis]
        np.testing.assert_array_equal(unpack_2bit(stored[path], length, leaf.axis), leaf.trits, err_msg=path)
        assert stored[f"{path}.scale"].tobytes() == np.asarray(leaf.scale).tobytes(), path
        assert stored[path].nbytes == leaf.trits.size // length * -(-length // 4)
    assert ternary == 9 and len(stored) == len(flatten(params)) + ternary


def test_programs_are_small_for_every_platform_and_have_no_kernel_of_ours(programs: pathlib.Path) -> None:
    for tower in ("image", "text"):
        data = (programs / f"{tower}.bin").read_bytes()
        program = jax.export.deserialize(bytearray(data))
        assert set(program.platforms) == {"cpu", "tpu", "cuda"} and len(data) < 60_000
        text = program.mlir_module()
        # The one call checks that the batch is not empty, and is gone when a program is compiled.
        assert set(re.findall(r"custom_call @(\w+)", text)) <= {"shape_assertion"}
        assert text.count("precision = [HIGHEST") == text.count("stablehlo.dot_general") > 0
        assert b"tclip" not in data and str(ROOT).encode() not in data and b"site-packages" not in data


def test_the_loader_imports_jax_numpy_and_safetensors_alone(programs: pathlib.Path) -> None:
    tree = ast.parse((programs / "load.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert modules == {"pathlib", "jax", "numpy", "safetensors.numpy"}


@pytest.mark.slow
def test_what_is_not_the_model_is_found(changed: epath.Path, params: Params) -> None:
    verify_stablehlo(changed, config=CONFIG, params=params)

    other = dataclasses.replace(CONFIG, quick_gelu=False)
    write_stablehlo(changed / "other", config=other, params=params)
    (changed / "other" / "text.bin").copy(changed / "text.bin", overwrite=True)
    with pytest.raises(ValueError, match=r"text\.bin: its embeddings differ by 0\.\d+ from those of the model$"):
        verify_stablehlo(changed, config=CONFIG, params=params)

    (changed / "text.bin").write_bytes((changed / "text.bin").read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"load\.py fails: (?!no message)[^\n]+$"):
        verify_stablehlo(changed, config=CONFIG, params=params)


def test_a_flipped_trit_is_found(changed: epath.Path, params: Params) -> None:
    path = changed / "weights.safetensors"
    stored = safetensors.numpy.load_file(path)
    stored["image/blocks/mlp/fc1/kernel"][1, 3, 5] ^= 1
    safetensors.numpy.save_file(stored, path)
    with pytest.raises(ValueError, match=r"weights\.safetensors: image/blocks/mlp/fc1/kernel is not the weight of"):
        verify_stablehlo(changed, config=CONFIG, params=params)


def test_the_loader_cannot_fall_back_on_this_package(changed: epath.Path, params: Params) -> None:
    (changed / "load.py").write_text("import tclip_jax\n")
    with pytest.raises(ValueError, match=r"load\.py fails: ModuleNotFoundError: import of tclip_jax halted"):
        verify_stablehlo(changed, config=CONFIG, params=params)


def test_sources_have_their_paths_again_after_an_export(programs: pathlib.Path) -> None:
    assert jax.config.values["jax_traceback_in_locations_limit"] != 0


@pytest.fixture
def artifact(params: Params, tmp_path: pathlib.Path) -> pathlib.Path:
    folder = tmp_path / "artifact"
    size = Preprocess(CONFIG.vision.image_size)
    write_artifact(folder, config=CONFIG, preprocess=size, params=params, rules=RULES, rest_dtype="float32")
    return folder


@pytest.mark.slow
def test_the_command_writes_programs_and_says_how_to_load_them(
    artifact: pathlib.Path, params: Params, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(artifact), "--to", "stablehlo", "--out", str(out)]) == 0
    *files, last = capsys.readouterr().out.splitlines()
    assert [pathlib.Path(line.split()[0]).name for line in files] == ["image.bin", "text.bin", "weights.safetensors"]
    assert last == f"{out}: stablehlo; see README.md there to load it"
    assert_gives_the_embeddings_of(out / "stablehlo", CONFIG, params, 2)
    card = (out / "README.md").read_text()
    assert "exported from tclip_jax as StableHLO" in card and "tags: [clip, ternary, stablehlo]" in card
    assert "encode_image, encode_text = load()" in card and "library_name" not in card
    assert not (out / "check.py").exists() and (out / "tokenizer.json").exists()


def test_refusals_leave_nothing(
    artifact: pathlib.Path,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["export", str(artifact), "--to", "stablehlo", "--out", str(tmp_path / "out")]
    assert main([*command, "--dtype", "float16"]) == 2
    assert capsys.readouterr().err.endswith("--to is stablehlo: the other formats fix their dtypes\n")
    monkeypatch.setattr(stablehlo.importlib.util, "find_spec", lambda name: None)
    assert main(command) == 2
    error = capsys.readouterr().err
    assert error.endswith("jax.export needs the package flatbuffers: pip install 'tclip-jax[stablehlo]'\n")
    assert error.count("\n") == 1 and not list(tmp_path.glob("out*"))
