"""What hosts need of this machine, and what they cannot reach."""

from __future__ import annotations

import dataclasses
import pathlib
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tclip_jax import shipping
from tclip_jax.cli import main, parse_command
from tclip_jax.recipes import load_recipe, override
from tclip_jax.runs.config import EvalConfig, RunConfig

ROOT = pathlib.Path(__file__).resolve().parents[1]
TRAIN = ["train", "--config", "quickstart:teacher", "--workdir", "gs://b/run"]


def lines(command: list[str], mounted: tuple[str, ...] = ()) -> list[str]:
    """What hosts of a cloud cannot reach."""
    _, args = parse_command(command)
    config = override(load_recipe(args.config), args.overrides).to_dict() if hasattr(args, "config") else {}
    return list(shipping.out_of_reach(args, config, mounted))


@pytest.mark.parametrize(
    ("option", "named", "path"),
    [
        ("--config.data.source=folder:/data/cc12m", "config.data.source", "/data/cc12m"),
        ("--config.data.source=folder:pictures", "config.data.source", "pictures"),
        ("--config.data.source=wds:gs://b/a.tar::extra/*.tar", "config.data.source", "extra/*.tar"),
        ("--config.data.source=mixture:0.5*digits+0.5*csv:~/pairs.csv", "config.data.source", "~/pairs.csv"),
        ("--config.data.source=tfds:cc12m@/data/tfds", "config.data.source", "/data/tfds"),
        ("--config.data.source=tfds:cc12m", "config.data.source", "~/tensorflow_datasets"),
        ("--config.data.source=parquet:pairs.parquet?image=url", "config.data.source", "pairs.parquet?image=url"),
        ("--config.eval.source=folder:/data/imagenet", "config.eval.source", "/data/imagenet"),
        ("--config.evals=[{'name': 'a', 'source': 'exports'}]", "config.evals[0].source", "exports"),
        ("--config.teacher=runs/teacher@best", "config.teacher", "runs/teacher@best"),
        ("--config.init=/models/b16", "config.init", "/models/b16"),
        ("--config.inherit=big", "config.inherit", "big"),
        ("--config.data.teacher_cache=caches/a", "config.data.teacher_cache", "caches/a"),
        ("--workdir=runs/b16", "--workdir", "runs/b16"),
    ],
)
def test_a_path_of_this_machine_is_out_of_reach(option: str, named: str, path: str) -> None:
    (line,) = lines([*TRAIN, option])
    assert line.startswith(f"{named} is ") and f": hosts of a cloud do not have {path}; " in line and "gs://" in line


def test_other_commands_are_checked_too() -> None:
    names = [line.partition(" is ")[0] for line in lines(["evaluate", "runs/a", "--data", "folder:/d", "--out", "o"])]
    assert names == ["--data", "MODEL", "--out"]
    cache = ["teacher-cache", "--config", "quickstart:student", "--teacher", "t", "--out", "gs://b/cache"]
    assert [line.partition(" is ")[0] for line in lines(cache)] == ["--teacher"]


@pytest.mark.parametrize(
    "option",
    [
        "--config.data.source=wds:gs://b/cc12m/{000..999}.tar",
        "--config.data.source=mixture:0.5*digits+0.5*csv:s3://b/pairs.csv",
        "--config.teacher=hf-hub:laion/CLIP-ViT-L-14-laion2B-s32B-b82K",
        "--config.teacher=gs://b/teacher@best",
        "--config.evals=[{'name': 'a', 'source': 'gs://b/exports'}]",
        "--config.compile_cache=/tmp/cache",
    ],
)
def test_what_hosts_reach_or_have_is_no_problem(option: str) -> None:
    assert lines([*TRAIN, option]) == []


def test_a_mount_of_the_hosts_is_reached() -> None:
    command = [*TRAIN, "--config.data.source=arrayrecord:/mnt/data/*.array_record", "--workdir=/mnt/runs/a"]
    assert len(lines(command)) == 2 and lines(command, ("/mnt/data", "/mnt/runs")) == []
    assert len(lines(command, ("/mnt/dat", "/mnt/runs"))) == 1


@pytest.mark.parametrize("source", ["arrayrecord:gs://b/*.array_record", "tfds:cc12m@gs://b/tfds"])
def test_array_records_are_not_read_from_a_bucket(source: str) -> None:
    (line,) = lines([*TRAIN, f"--config.data.source={source}"])
    assert "ArrayRecord's reader opens only local paths; mount the bucket" in line


def test_every_key_that_is_a_string_is_known_to_name_files_or_not() -> None:
    """A new key of the configuration must be entered in shipping.py, or here."""

    def strings(section: Any, prefix: str = "") -> Iterator[str]:
        for field in dataclasses.fields(section):
            if dataclasses.is_dataclass(field.default):
                yield from strings(field.default, f"{prefix}{field.name}.")
            elif field.type in ("str", str):
                yield prefix + field.name

    known = {*shipping.SOURCES, *shipping.MODELS}
    no_files = {
        "data.split",
        "data.augment",
        "quantizer.kind",
        "eval.split",
        "eval.suite",
        "eval.name",
        "wandb_project",
        "checkpoint.best_metric",
    }
    own = {"compile_cache"}  # a folder that each host makes for itself
    found = set(strings(RunConfig))
    assert {"data.source", "teacher"} <= found and {field.name for field in dataclasses.fields(EvalConfig)} >= {
        "source"
    }
    assert found - known - no_files - own == set()


def test_a_recipe_goes_along(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "my own.py"
    shutil.copy(ROOT / "configs" / "quickstart.py", recipe)
    for words in (["--config", f"{recipe}:student"], [f"--config={recipe}:student"]):
        command = [
            "train",
            *words,
            "--config.teacher=s3://a/t",
            "--config.data.source=wds:gs://b/{0..9}.tar::gs://c/x.tar",
        ]
        call = ["launch", "check", "--hosts", "cloud", "--prefix", "there/", "--", *command, "--workdir", "gs://b/run"]
        assert main(call) == 0
        show = '; printf "%s|" "$recipe" "$wheel" "$extras" "${buckets[@]}" --- "${command[@]}"'
        shown = subprocess.check_output(["bash", "-c", capsys.readouterr().out.strip() + show], text=True).split("|")
        assert shown[:6] == [str(recipe), shipping.WHEEL, "gcs,s3", "gs://b", "gs://c", "s3://a"]
        there = shlex.join(words).replace(str(recipe), "there/my own.py")
        assert shown[7:-1] == ["train", *shlex.split(there), *command[-2:], "--workdir", "gs://b/run"]


def test_a_recipe_that_is_wrong_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    check = ["launch", "check", "--hosts", "cluster", "--"]
    assert main([*check, *TRAIN, "--config.stepz=3"]) == 2
    assert main([*check, *TRAIN, "--config.steps=0"]) == 2
    assert main([*check, "train", "--config", "none.py", "--workdir", "runs/a"]) == 2
    first, second, third = capsys.readouterr().err.splitlines()
    assert first == "tclip launch check: error: config has no 'stepz': the nearest is 'steps'"
    assert second.startswith("tclip launch check: error: config.steps is 0")
    assert third == "tclip launch check: error: none.py: no such recipe file"
    with pytest.raises(SystemExit):
        main([*check, *TRAIN, "--worrkdir=a"])
    assert "unrecognized arguments: --worrkdir=a" in capsys.readouterr().err


def absent_of(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return shlex.split(capsys.readouterr().out.rpartition("absent=(")[2].removesuffix(")\n"))


def test_a_cluster_needs_the_data_of_this_machine(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    check = ["launch", "check", "--hosts", "cluster"]
    train = ["train", "--config", "quickstart:teacher", "--workdir", "runs/a"]
    (tmp_path / "tars").mkdir()
    for path, absent in (("none/{0..9}.tar", "none"), ("none", "none"), ("tars/{0..9}.tar", "")):
        value = f"wds:{tmp_path}/{path}"
        assert main([*check, "--", *train, f"--config.data.source={value}"]) == 0
        line = f"config.data.source is {value!r}: there is no {tmp_path / absent}; give --mounted a folder"
        assert absent_of(capsys) == [f"{line} that only the hosts have"] * bool(absent)
        assert main([*check, "--mounted", str(tmp_path), "--", *train, f"--config.data.source={value}"]) == 0
        assert absent_of(capsys) == []
    assert main([*check, "--", "evaluate", "runs/none", "--data", "digits"]) == 0
    assert absent_of(capsys)[0].startswith("MODEL is 'runs/none': there is no runs/none")


def test_commands_without_work_for_hosts_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--config", "quickstart:teacher", "--topology", "h100:8"]
    assert main(["launch", "check", "--hosts", "cluster", "--", *command]) == 2
    assert capsys.readouterr().err == "tclip launch check: error: `tclip plan` needs no host: run it here\n"


def test_a_cluster_needs_the_readers_of_its_urls(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["launch", "check", "--hosts", "cluster", "--", *TRAIN]) == 2
    error = "gs://b: gcsfs is not installed: pip install 'tclip-jax[gcs]'"
    assert capsys.readouterr().err == f"tclip launch check: error: {error}\n"
    assert shipping.unread(["gcs", "s3"])[1] == "s3fs is not installed: pip install 'tclip-jax[s3]'"
