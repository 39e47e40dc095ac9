"""The log of every command: one format for people, and one for machines, also in worker processes."""

from __future__ import annotations

import argparse
import json
import logging
import pathlib
import re
import subprocess
import sys

import pytest

from tclip_jax.cli import COMMANDS, main
from tclip_jax.log import JsonFormatter, TextFormatter, with_metrics

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d (INFO   |WARNING|ERROR  ) \S.*")


def record(message: str, *args: object, **options: object) -> logging.LogRecord:
    made = logging.LogRecord("tclip_jax.x", logging.WARNING, "x.py", 1, message, args, None)
    vars(made).update(options)
    return made


def test_a_line_has_time_and_level_and_no_control_characters() -> None:
    line = TextFormatter().format(record("%s: bad", "a\x1b[31m.jpg"))
    assert LINE.fullmatch(line) and line.endswith(" WARNING a\\x1b[31m.jpg: bad")


def test_an_object_has_time_level_message_and_metrics() -> None:
    metrics = {"step": 3, "loss": float("nan"), "loss/task": 0.5}
    shown = json.loads(JsonFormatter().format(record("50%", created=0.25, **with_metrics(metrics))))
    assert shown == {
        "time": "1970-01-01T00:00:00.250+00:00",
        "level": "WARNING",
        "message": "50%",
        "step": 3,
        "loss": None,
        "loss/task": 0.5,
    }


def test_an_error_with_a_traceback_is_one_object() -> None:
    try:
        raise ValueError("why")
    except ValueError:
        made = record("failed", exc_info=sys.exc_info())
    line = JsonFormatter().format(made)
    assert "\n" not in line and json.loads(line)["traceback"].endswith("ValueError: why")


@pytest.fixture
def broken(tmp_path: pathlib.Path) -> str:
    """Twenty files of a folder, which are not images, and two which are."""
    from PIL import Image

    for i in range(22):
        path = tmp_path / "data" / "train" / "cat" / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not an image")
        if i > 19:
            Image.new("RGB", (20, 20)).save(path)
    return f"folder:{tmp_path}/data"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tclip_jax", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "json"])
def test_data_bench_logs_one_count_for_bad_samples(broken: str, form: str) -> None:
    bench = ["data", "bench", "--config", "quickstart:student", f"--config.data.source={broken}"]
    ran = run(*bench, "--config.data.batch_size=8", "--seconds", "0.2", "--json", "--log-format", form)
    assert ran.returncode == 0, ran.stderr
    (speed,) = json.loads(ran.stdout)
    assert speed["bad"].keys() == {"corrupt_image"} and 0.5 < speed["weightless"] < 1
    (line,) = ran.stderr.splitlines()
    message = (
        f"0 workers: bad samples: corrupt_image {speed['bad']['corrupt_image']:,}; `tclip data check` gives reasons"
    )
    if form == "text":
        assert LINE.fullmatch(line) and line.endswith(f"WARNING {message}")
    else:
        shown = json.loads(line)
        assert (shown["level"], shown["message"]) == ("WARNING", message)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "json"])
def test_every_record_of_a_run_is_a_line_of_the_format(broken: str, tmp_path: pathlib.Path, form: str) -> None:
    train = ["train", "--config", "quickstart:teacher,runlocal", "--workdir", str(tmp_path / "run")]
    changes = {"data.source": broken, "data.templates": "simple", "data.max_bad_share": 1, "log_every": 2}
    ran = run(*train, *(f"--config.{key}={value}" for key, value in changes.items()), "--log-format", form)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stderr.splitlines()
    if form == "text":
        assert all(LINE.fullmatch(line) for line in lines), ran.stderr
        steps = [line for line in lines if " step " in line]
        assert [re.split(" +", line)[4] for line in steps] == ["2/4", "4/4", "4/4"]
        assert "bad: corrupt_image " in steps[0]
        return
    shown = [json.loads(line) for line in lines]
    assert all({"time", "level", "message"} <= each.keys() for each in shown)
    steps = [each for each in shown if "step" in each]
    assert [each["step"] for each in steps] == [2, 4, 4] and "zero_shot_accuracy" in steps[-1]
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps[0]["loss"] == written[1]["loss"] and steps[0]["learning_rate"] == written[1]["learning_rate"]
    assert steps[0]["bad/corrupt_image"] == sum(line.get("bad/corrupt_image", 0) for line in written[:2])


def test_the_line_of_an_error_is_an_object_too(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(tmp_path / "none"), "--log-format", "json"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    shown = json.loads(line)
    assert shown["level"] == "ERROR" and shown["message"].startswith("tclip inspect: error: ")


def test_a_warning_of_python_is_one_line() -> None:
    code = "import warnings; from tclip_jax.log import start_logging; start_logging(form='json'); warnings.warn('old')"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900)
    (line,) = ran.stderr.splitlines()
    assert json.loads(line)["message"].endswith("UserWarning: old") and json.loads(line)["level"] == "WARNING"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_takes_the_format(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([*name.split(), "--help"])
    assert "--log-format {text,json}" in capsys.readouterr().out


@pytest.mark.parametrize("place", [1, 2, 4])
def test_the_format_may_stand_before_and_after_an_action(
    place: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parsed: list[argparse.Namespace] = []
    monkeypatch.setattr("tclip_jax.commands.compare.run", parsed.append)
    for options in (["--log-format", "json"], ["--log-format=json"]):
        arguments = ["compare", "weights", "a", "b"]
        assert main([*arguments[:place], *options, "--debug", *arguments[place:]]) == 0
    assert all((args.log_format, args.debug, args.a, args.b) == ("json", True, "a", "b") for args in parsed)
    assert len(parsed) == 2
    assert main_exit(["compare", "weights", "a", "b", "--log-format"]) == 2
    assert "argument --log-format: invalid choice: '' (choose from" in capsys.readouterr().err
    assert main(["compare", "weights", "a", "b", "--plugin", "none.py"]) == 2
    assert main(["compare", "weights", "a", "b", "--plugin"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "tclip compare: error: none.py: no such file"
    assert errors[1] == "tclip compare: error: --plugin has no value: name a Python file or a module"
    # Those after -- belong to another command.
    monkeypatch.setattr("tclip_jax.commands.launch.run", parsed.append)
    assert main(["launch", "local", "--", "train", "--log-format", "json"]) == 0
    assert parsed[-1].log_format == "text"


def main_exit(arguments: list[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_the_errors_of_readers_of_buckets_are_one_line() -> None:
    code = (
        "import logging; from tclip_jax.log import start_logging; start_logging({debug})\n"
        "try:\n  raise OSError('no host')\nexcept OSError as error:\n"
        "  logging.getLogger('gcsfs').exception('out of retries: %s', error)"
    )
    for debug in (False, True):
        run = [sys.executable, "-c", code.format(debug=debug)]
        lines = subprocess.run(run, capture_output=True, text=True, check=True).stderr.splitlines()
        assert lines[0].endswith(" ERROR   out of retries: no host") and (len(lines) > 1) == debug
