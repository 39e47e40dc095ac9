"""`tclip evaluate`: single sources, suites, exit codes, and its documentation."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import types

import jax
import numpy as np
import pytest

from tclip_jax.artifacts import write_artifact
from tclip_jax.cli import main
from tclip_jax.data.images import Preprocess
from tclip_jax.data.prompts import TEMPLATES
from tclip_jax.evaluation import suite
from tclip_jax.interop.export import export_model
from tclip_jax.models.clip import param_shapes
from tclip_jax.models.config import CLIPConfig, TextConfig, VisionConfig

CONFIG = CLIPConfig(
    8,
    VisionConfig((16, 16), patch_size=8, width=16, layers=1, head_width=8),
    TextConfig(context_length=16, width=8, heads=1, layers=1),
)
PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "evaluate.md"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), param_shapes(CONFIG))
    folder = tmp_path_factory.mktemp("models")
    preprocess = Preprocess(16)
    write_artifact(
        folder / "artifact", config=CONFIG, preprocess=preprocess, params=params, rules=(), rest_dtype="float32"
    )
    export_model(folder / "export", config=CONFIG, preprocess=preprocess, params=params)
    return folder / "artifact"


def test_one_source_and_every_kind_of_model(artifact: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--data", "digits", "--split", "test", "--templates", "digits"]
    assert main(["evaluate", str(artifact), *command]) == 0
    header, row, *_ = capsys.readouterr().out.splitlines()
    assert header.split()[:4] == ["data", "set", "images", "acc1"] and row.split()[:2] == ["digits", "397"]
    reports = []
    for model in (artifact, artifact.parent / "export"):
        assert main(["evaluate", str(model), *command, "--json"]) == 0
        reports.append(json.loads(capsys.readouterr().out))
    assert f"{100 * reports[0]['metrics']['acc1']:.2f}" in row
    assert reports[0]["datasets"] == reports[1]["datasets"] and reports[0]["model"] == str(artifact)
    assert main(["evaluate", str(artifact), "--data", "digits", "--templates", "digitz"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.splitlines()[-1].startswith("tclip evaluate: error: templates 'digitz'")


def test_templates_and_options_that_do_not_apply(
    artifact: pathlib.Path,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(*options: str) -> tuple[int, str, str]:
        code = main(["evaluate", str(artifact), "--data", "digits", *options, "--json"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.splitlines()[-1] if captured.err else ""

    default, named, listed = (
        json.loads(run(*options)[1])["datasets"]
        for options in ([], ["--templates", "digits"], ["--templates", *TEMPLATES["digits"]])
    )
    assert default == named == listed, "the templates of the data, by name, and written out"
    assert run("--templates", "number {c}, {c}!")[0] == 0
    assert caplog.messages[-1] == "digits: 1 templates (from the arguments): 'number {c}, {c}!'"
    assert run("--templates", "a {c}", "digits")[::2] == (
        2,
        "tclip evaluate: error: template 'digits' has no {c} for the class name",
    )
    exports = str(tmp_path)
    for options, message in (
        (["--download"], "--download is for exports: it needs --suite"),
        (["--tfds", exports], "--tfds is for exports: it needs --suite"),
        (["--suite", "mnist", "--split", "test"], "--split is for sources: with --suite, the exports define splits"),
        (
            ["--suite", "mnist", "--templates", "none"],
            "--templates is for sources: with --suite, the exports define",
        ),
        (["--html", "x.html"], "--html needs --out DIR"),
    ):
        code, out, error = run(*options)
        assert (code, out) == (2, "") and error.startswith(f"tclip evaluate: error: {message}")


def test_several_sources_have_names(
    artifact: pathlib.Path, tmp_path: pathlib.Path, exports: types.SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("birds/test", "more birds"):
        for label in ("wren", "owl"):
            (tmp_path / folder / label).mkdir(parents=True)
            (tmp_path / folder / label / "0.png").write_bytes(exports.picture(len(folder + label)))
    out, birds, more = tmp_path / "out", f"folder:{tmp_path}/birds", f"folder:{tmp_path}/more birds"
    command = ["evaluate", str(artifact), "--out", str(out), "--html", str(tmp_path / "page.html")]
    assert main([*command, "--data", birds, "--data", f"mine={more}", "--data", "digits"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:4]] == ["birds", "mine", "digits"]
    assert {path.name for path in out.glob("*.json")} == {"birds.json", "mine.json", "digits.json", "summary.json"}
    stored = json.loads((out / "mine.json").read_text())
    assert stored["dataset"] == "mine" and stored["source"] == more
    assert main(["evaluate", "compare", str(out), str(out), "--html", str(tmp_path / "compare.html")]) == 0
    capsys.readouterr()
    assert main([*command, "--data", birds, "--data", f"birds={more}"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "tclip evaluate: error: two data sets are named 'birds': write NAME=SOURCE for one of them"
    )
    assert main([*command, "--data", "a", "--data", "b", "--suite", "mnist"]) == 2
    assert "error: --suite takes one folder of exports, but --data is a and b" in capsys.readouterr().err
    # One of several sources that fails does not stop the others.
    assert main([*command, "--data", "x=folder:nowhere", "--data", "digits"]) == 1
    assert "FAILED   x: nowhere: no such folder" in capsys.readouterr().out
    assert main([*command, "--data", "x=folder:nowhere"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("tclip evaluate: error: nowhere: no such folder")


def test_results_of_another_split_or_other_templates_are_refused(
    artifact: pathlib.Path, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shared = ["evaluate", str(artifact), "--data", "digits", "--out", str(tmp_path)]
    assert main(shared) == 0
    first = capsys.readouterr().out
    assert main([*shared, "--batch-size", "64"]) == 0 and capsys.readouterr().out == first
    for options, message in (
        (["--split", "train"], "data.split: 'test', not 'train'"),
        (["--templates", "none"], "task.templates: "),
    ):
        assert main([*shared, *options]) == 2
        captured = capsys.readouterr()
        assert captured.out == "" and message in captured.err.splitlines()[-1]


def test_a_suite_and_its_exit_codes(
    artifact: pathlib.Path,
    exports: types.SimpleNamespace,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("mnist", "stl10"):
        monkeypatch.setitem(suite.DATASETS, name, dataclasses.replace(suite.DATASETS[name], samples=12))
        exports.write(tmp_path / "data" / f"wds_{name}", [i % 10 for i in range(12)], [f"c{i}" for i in range(10)])

    def run(names: str, out: str, *more: str) -> int:
        suite_options = ["--data", str(tmp_path / "data"), "--suite", names, "--out", str(tmp_path / out)]
        return main(["evaluate", str(artifact), *suite_options, "--batch-size", "8", *more])

    assert run("mnist,stl10", "whole", "--name", "tiny") == 0
    whole = capsys.readouterr().out
    assert "mean of acc1 over 2 sets (CLIP_benchmark): " in whole and "PARTIAL" not in whole
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["model"] == "tiny" and re.fullmatch("[0-9a-f]{32}", summary["pretrained"])
    assert run("mnist,stl10", "whole", "--name", "tiny") == 0 and capsys.readouterr().out == whole
    assert run("mnist,flickr8k", "one") == 1
    assert "FAILED   flickr8k: " in capsys.readouterr().out
    exports.write(tmp_path / "data" / "wds_mnist", [0] * 12, [f"c{i}" for i in range(10)], images={5: b"no image"})
    assert run("mnist,stl10", "two") == 3
    assert "PARTIAL  mnist: 1 x unreadable image" in capsys.readouterr().out
    assert run("mnist,stl10", "two", "--dtype", "bfloat16") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "two/mnist.json: made with different inputs (model.dtype: 'float32', not 'bfloat16'); choose another" in line
    exports.write(tmp_path / "data" / "wds_renderedsst2", [0, 1], ["bad", "good"])
    capsys.readouterr()
    assert run("renderedsst2", "four", "--json") == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["datasets"]["renderedsst2"]["acc5"] is None
    assert run("minst", "three") == 2 and not (tmp_path / "three").exists()


def test_the_documentation_lists_every_data_set() -> None:
    text = PAGE.read_text()
    rows = re.findall(r"^\| (\d+) \| (\S+) \| ([\d,]+) \| (\S+) \| (.*) \|$", text, re.MULTILINE)
    of_kind = {
        "classification": "acc1, acc5, mean_per_class_recall",
        "multilabel": "mean_average_precision",
        "retrieval": "image and text R@1, 5, 10",
    }
    expected = []
    for number, row in enumerate(suite.DATASETS.values(), 1):
        scored = of_kind[row.kind]
        if row.averaged != row.main_metric:
            scored += "; OpenAI: per class"
        if 0 < row.classes < 5:
            scored = scored.replace("acc5, ", "")
        expected.append((str(number), row.name, f"{row.samples:,}", str(row.classes or "–"), scored))
    assert rows == expected
