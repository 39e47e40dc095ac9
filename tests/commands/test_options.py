"""Options that would have no effect are refused, in one line and before any file is read."""

from __future__ import annotations

import pathlib
import shlex

import pytest

from tclip_jax.cli import main


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("evaluate m --data x --download", "--download is for exports: it needs --suite"),
        ("evaluate m --data x --tfds x", "--tfds is for exports: it needs --suite"),
        ("evaluate m --data x --suite mnist --split test", "--split is for sources"),
        ("evaluate m --data x --suite mnist --templates none", "--templates is for sources"),
        ("evaluate m --data x --html p.html", "--html needs --out DIR"),
        ("evaluate m --data csv:x.csv --split val", "csv:x.csv: has no splits, so there is no 'val'"),
        ("evaluate m --data parquet:x --split val", "parquet:x: has no splits, so there is no 'val'"),
        ("evaluate m --data 'wds:x/{0..3}.tar' --split val", "wds:x/{0..3}.tar: has no splits, so there is no 'val'"),
        ("evaluate m --data wds:pictures/cat --split val", "wds:pictures/cat: has no splits, so there is no 'val'"),
        ("evaluate m --data folder:pictures --split test", "folder:pictures: no split 'test': no folder of that name"),
        ("evaluate compare a b --data exports", "--data is for the images of the page: it needs --html FILE"),
        ("evaluate probe m --data x --out o --download", "--download is for exports: it needs --suite"),
        ("evaluate probe m --data x --out o --shots --seeds 3", "--seeds is for few-shot probes: it needs --shots K"),
        ("plan --config ternaryclip --topology v5e:2x2 --out o", "--out is the folder of a sweep: it needs --sweep"),
        (
            "export m --out o --to gguf-tq1_0 --dtype float16",
            "--dtype is for open_clip, hf, big_vision, onnx, and --to is gguf-tq1_0",
        ),
        ("data prepare --data csv:x --name n --out o --beam= --workers 2", "--workers is for this machine"),
        ("data prepare --data 'wds:*.tar' --name n --out o --file-samples 5", "--file-samples is for other sources"),
        ("data check --data arrayrecord:x --split val", "arrayrecord:x: has no splits, so there is no 'val'"),
        (
            "evaluate m --data 'mixture:1*csv:x.csv+2*digits' --split val",
            "csv:x.csv: has no splits, so there is no 'val'",
        ),
        ("compare inputs m --preset ViT-B-16", "--preset and --model-cfg are for a file that does not state its model"),
        ("compare golden dump m f --via torch --dtype bfloat16", "--dtype and --precision apply to JAX"),
    ],
)
def test_an_option_without_effect_is_refused(
    call: str,
    message: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures" / "cat").mkdir(parents=True)
    (tmp_path / "pictures" / "cat" / "0.tar").touch()
    assert main(shlex.split(call)) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert captured.out == "" and line.partition(": error: ")[2].startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["pictures"]
