from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from tclip_jax.artifacts import pack_params, write_artifact
from tclip_jax.artifacts.inspection import inspect_artifact, inspection_text, plot_inspection
from tclip_jax.artifacts.pack import flatten
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.models.config import CLIPConfig
from tclip_jax.models.ternary_rules import ternary_rules
from tclip_jax.ternary import Quantizer
from tclip_jax.ternary.kernels import native_cpu

Tree = dict[str, Any]

TABLE = "text/token_embedding/embedding"


@pytest.fixture(scope="module")
def found(written: pathlib.Path) -> Tree:
    return inspect_artifact(written)


def test_bytes_are_those_of_the_files(found: Tree, written: pathlib.Path) -> None:
    stored = safetensors.numpy.load_file(written / "ternary.safetensors")
    assert found["bytes"]["trits"] == sum(array.nbytes for name, array in stored.items() if name.endswith(".trits"))
    assert found["bytes"]["scales"] == sum(array.nbytes for name, array in stored.items() if name.endswith(".scale"))
    files = ("ternary.safetensors", "rest.safetensors")
    assert sum(found["bytes"].values()) == found["weight_bytes"] == sum((written / f).stat().st_size for f in files)


def test_layers_are_counted_one_by_one(found: Tree, packed: Tree) -> None:
    rows = {(row["path"], row["layer"]): row for row in found["layers"]}
    assert len(rows) == 4 * 2 + 4 * 1 + 1
    for (path, layer), row in rows.items():
        trits = flatten(packed)[path].trits
        own = trits if layer is None else trits[layer]
        shares = [float(np.mean(own == trit)) for trit in (-1, 0, 1)]
        assert (row["trits"], [row["minus"], row["zeros"], row["plus"]]) == (own.size, pytest.approx(shares))
        assert row["entropy"] == pytest.approx(-sum(share * np.log2(share) for share in shares if share))
    trits, zeros = (sum(row["trits"] * row.get(key, 1) for row in rows.values()) for key in ("", "zeros"))
    assert zeros / trits == pytest.approx(found["zeros"])
    assert rows[TABLE, None]["zeros"] != found["zeros_without_token_embedding"] != found["zeros"]


def test_it_is_json_and_carries_what_the_author_wrote(found: Tree) -> None:
    assert json.loads(json.dumps(found)) == found
    assert found["figures"] == {"top1": 0.5} and "numpy" in found["provenance"]["versions"]


def test_the_tables_show_shares_in_per_cent(found: Tree) -> None:
    lines = inspection_text(found).splitlines()
    row = next(row for row in found["layers"] if row["path"].endswith("fc1/kernel") and row["layer"] == 1)
    header = next(line for line in lines if line.startswith("layer")).split("  ")
    column = [name.strip() for name in header if name].index("image fc1")
    assert next(line for line in lines if line.startswith("1 ")).split()[column] == f"{100 * row['zeros']:.1f}"
    assert f"({found['float32_bytes']:,} B)" in "\n".join(lines) and "  top1: 0.5" in lines
    assert max(map(len, lines)) < 160 and all(line == line.rstrip() for line in lines)


def test_the_picture_has_a_line_for_each_weight(found: Tree) -> None:
    sizes, zeros = plot_inspection(found).axes
    assert [bar.get_width() for bar in sizes.patches] == [size / 1e6 for size in found["bytes"].values()]
    assert len(zeros.lines) == 9
    text = {text.get_text() for text in zeros.get_legend().get_texts()}
    assert {"image fc1", "text qkv", "text token embedding"} < text


def test_a_model_of_floats_has_sizes_too(
    tmp_path: pathlib.Path, config: CLIPConfig, preprocess: Preprocess, latent: Tree
) -> None:
    params = pack_params(latent, ())
    write_artifact(tmp_path / "a", config=config, preprocess=preprocess, params=params, rules=(), rest_dtype="float32")
    found = inspect_artifact(tmp_path / "a")
    assert found["layers"] == [] and found["zeros"] == found["bits_per_trit"] == found["bytes"]["trits"] == 0
    assert found["compression_theoretical"] == 1
    text, (sizes,) = inspection_text(found), plot_inspection(found).axes
    assert "0.00%" in text and "trit" not in text + sizes.get_xlabel() and "zeros" not in text


@pytest.mark.parametrize("bits", [4, 8])
def test_a_model_of_integers_shows_no_figures_of_trits(
    tmp_path: pathlib.Path, config: CLIPConfig, preprocess: Preprocess, latent: Tree, bits: Any
) -> None:
    rules = ternary_rules("Q-ALL", Quantizer(kind="uniform", bits=bits))
    params = pack_params(latent, rules)
    write_artifact(tmp_path / "a", config=config, preprocess=preprocess, params=params, rules=rules)
    found = inspect_artifact(tmp_path / "a")
    assert json.loads(json.dumps(found))["compression_theoretical"] is None and found["uniform_share"] > 0.5
    text, (sizes,) = inspection_text(found), plot_inspection(found).axes
    assert "trit" not in text + sizes.get_xlabel() and "zeros" not in text and "formula" not in text


def test_the_runtime_names_the_kernel_of_each_weight(
    written: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native_cpu, "instruction_sets", lambda: ("", "avx2", "portable"))
    assert main(["inspect", str(written), "--runtime", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["instructions"], found["activations"]) == ("avx2", "A16")
    assert {row["implementation"] for row in found["weights"]} == {"native_cpu", "rows"}
    assert [row["implementation"] for row in found["attention"]] == ["native_cpu", "native_cpu"]
    monkeypatch.setattr(native_cpu, "instruction_sets", tuple)
    assert main(["inspect", str(written), "--runtime"]) == 0
    text = capsys.readouterr().out
    assert "A32, as they are" in text and "native kernel" not in text.partition("\n\n")[0]
    assert re.search(r"^text +6 +\d x \d+ +reference +no fused attention is for platform cpu$", text, re.MULTILINE)
    row = next(line for line in text.splitlines() if "fc1/kernel" in line)
    assert "reference" in row and "not native_cpu: the native library was not built" in row
    assert main(["inspect", str(written), "--runtime", "--plot", "x.png"]) == 2
    assert "--plot is of sizes and zeros" in capsys.readouterr().err
