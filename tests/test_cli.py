"""The command line: help texts, error messages, overrides, and imports."""

from __future__ import annotations

import contextlib
import importlib
import json
import keyword
import os
import pathlib
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence

import pytest

from tclip_jax.cli import COMMANDS, EXIT_CODES, main

STUDENT = ("params", "--config", "quickstart:student")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=900)


def help_of(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--help"])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("module", ["tclip_jax", "tclip_jax.cli"])
def test_the_package_and_its_module_run_as_tclip(module: str) -> None:
    ran = python("-m", module, "plam")
    assert ran.returncode == 2 and "no command 'plam': the nearest is 'plan'" in ran.stderr


def test_every_command_module_is_in_the_table() -> None:
    folder = pathlib.Path(importlib.import_module("tclip_jax.commands").__path__[0])
    assert {name.replace(" ", "_").replace("-", "_") for name in COMMANDS} == {
        path.stem.removesuffix("_") for path in folder.glob("[!_]*.py")
    }


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    shown = " ".join(help_of([], capsys).split())
    assert all(f"{name} {purpose}" in shown for name, purpose in COMMANDS.items())
    assert " ".join(EXIT_CODES.split()) in shown
    assert main_exit([]) == 0 and capsys.readouterr().out.startswith("usage: tclip")


def main_exit(arguments: Sequence[str]) -> object:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    return stop.value.code


def test_the_name_of_a_group_lists_its_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exit(["data"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: tclip data [-h] COMMAND") and "\n    prepare " in shown and "\n    check " in shown
    assert "quickstart:" not in shown and "evaluate" not in shown
    assert help_of(["data"], capsys) == shown
    assert main_exit(["data", "chek"]) == 2
    assert "tclip data: error: argument COMMAND: invalid choice: 'chek'" in capsys.readouterr().err


def test_a_misspelt_command_suggests_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exit(["trian", "--config", "x"]) == 2
    assert "tclip: error: no command 'trian': the nearest is 'train'; tclip --help" in capsys.readouterr().err
    assert main_exit(["bfloat16"]) == 2
    assert "tclip: error: no command 'bfloat16': tclip --help lists all\n" in capsys.readouterr().err


def test_an_override_of_a_command_without_a_recipe_is_shown_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exit(["doctor", "--config.steps=3", "--bogus"]) == 2
    assert "tclip doctor: error: unrecognized arguments: --config.steps=3 --bogus\n" in capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_text_of_a_command_ends_with_examples_that_it_parses(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = help_of(name.split(), capsys)
    assert shown.startswith(f"usage: tclip {name}") and COMMANDS[name] in " ".join(shown.split())
    assert re.search(r"[Ee]xit code", shown) and "--debug" in shown
    _, after = re.split(r"^Examples?:$", shown, flags=re.MULTILINE)
    examples = re.findall(rf"^ *tclip ({name}\b.*)$", after, re.MULTILINE)
    parsed: list[object] = []
    monkeypatch.setattr(
        f"tclip_jax.commands.{name.replace(' ', '_').replace('-', '_')}{'_' * keyword.iskeyword(name)}.run",
        parsed.append,
    )
    for example in examples:
        assert main(shlex.split(example)) == 0, example
    assert len(parsed) == len(examples) > 0


@pytest.mark.parametrize(
    "call",
    [
        *("search index", "search query", "compare weights", "compare activations", "compare inputs"),
        *("compare golden", "compare golden dump", "compare golden check"),
    ],
)
def test_the_help_text_of_an_action_ends_with_an_example(
    call: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    example = " ".join(help_of(call.split(), capsys).partition("Example: tclip ")[2].split())
    assert example.startswith(call)
    parsed: list[object] = []
    monkeypatch.setattr(f"tclip_jax.commands.{call.split()[0]}.run", parsed.append)
    assert main(shlex.split(example)) == 0 and len(parsed) == 1


@pytest.mark.parametrize("arguments", [["qickstart"], ["--config", "quickstart"], ["--"], [*STUDENT, "--bogus"]])
def test_an_unknown_command_or_option_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main_exit(arguments) == 2
    assert "error: " in capsys.readouterr().err


def test_an_error_is_one_line_and_code_2(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = str(tmp_path / "nowhere")
    assert main(["evaluate", nowhere, "--data", "digits"]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith(f"tclip evaluate: error: {nowhere}: no such file or folder; expected the workdir")


def test_debug_shows_the_traceback() -> None:
    with pytest.raises(ValueError, match="config has no 'stepz'") as error:
        main([*STUDENT, "--config.stepz=3", "--debug"])
    assert error.traceback[-1].path.name == "schema.py"


@pytest.mark.parametrize(
    ("arguments", "alone", "together"),
    [
        (["--help"], {0, 141}, {0, 141}),  # argparse ignores a broken unbuffered pipe
        pytest.param(["evaluate", "--help"], {0, 141}, {0, 141}, marks=pytest.mark.slow),
        (STUDENT, {141}, {141}),
        pytest.param(["params", "--config", "x"], {2}, {141}, marks=pytest.mark.slow),  # an error, which goes to stderr
    ],
)
def test_a_closed_output_ends_a_command_without_an_error(
    arguments: Sequence[str], alone: set[int], together: set[int]
) -> None:
    """As in `tclip … | head`, with stderr on its own or in the same pipe."""
    for stderr, codes in ((subprocess.PIPE, alone), (None, together)):
        read, write = os.pipe()
        os.close(read)
        command = [sys.executable, "-m", "tclip_jax", *arguments]
        ran = subprocess.run(command, stdout=write, stderr=stderr or write, text=True, timeout=900)
        os.close(write)
        assert ran.returncode in codes
        assert not stderr or len(ran.stderr.splitlines()) == (codes == {2})


def test_another_broken_pipe_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    def fail(args: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("tclip_jax.commands.params.run", fail)
    assert main(STUDENT) == 2 and capfd.readouterr().err == "tclip params: error: [Errno 32] Broken pipe\n"


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (KeyboardInterrupt(), 130, r"tclip params: interrupted"),
        (
            KeyError("x"),
            1,
            r"tclip params: unexpected KeyError: 'x' \(.*test_cli.py:\d+\); --debug shows the traceback",
        ),
        (RuntimeError("one\ntwo"), 1, r"tclip params: unexpected RuntimeError: one \(.*"),
        (
            ModuleNotFoundError("No module named 'torch'"),
            1,
            r"tclip params: error: No module named 'torch': `tclip doc.*",
        ),
        (PermissionError(13, "Permission denied", "x"), 2, r"tclip params: error: x: Permission denied"),
    ],
)
def test_any_error_is_one_line(
    raised: BaseException, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: object) -> None:
        raise raised

    monkeypatch.setattr("tclip_jax.commands.params.run", fail)
    assert main(STUDENT) == code
    assert re.fullmatch(line + "\n", capsys.readouterr().err)
    with pytest.raises(type(raised)) if code != 130 else contextlib.nullcontext():
        main([*STUDENT, "--debug"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.stepz=3", "config has no 'stepz': the nearest is 'steps'"),
        ("--config.steps", "--config.steps has no value: write --config.steps=VALUE"),
        ("--config.data.batch_size=many", "config.data.batch_size is 'many': it must be int"),
        ("--config.mesh.fsdp=3", "mesh data=-1, fsdp=3, tensor=1 does not fit 8 devices"),
    ],
)
def test_a_wrong_override_is_one_line(override: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDENT, override]) == 2
    assert capsys.readouterr().err == f"tclip params: error: {message}\n"


def test_an_override_may_have_a_space_for_its_equals_sign(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ["config", "quickstart:teacher", "eval.source", "seed", "--json"]
    for words in (["--config.seed=3", "--config.eval.source="], ["--config.seed", "3", "--config.eval.source", ""]):
        assert main([*recipe, *words]) == 0
        assert json.loads(capsys.readouterr().out) == {"seed": 3, "eval.source": ""}
    assert main([*recipe, "--config.seed", "--config.eval.source="]) == 2
    assert capsys.readouterr().err == "tclip config: error: --config.seed has no value: write --config.seed=VALUE\n"
    assert main_exit(["config"]) == 2
    assert capsys.readouterr().err.endswith("the following arguments are required: RECIPE\n")


def test_params_as_json_needs_no_teacher(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDENT, "--json", "--config.mesh.fsdp=4", "--config.quantizer.group=32"]) == 0
    rows = {row["path"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["image/blocks/mlp/fc1/kernel"] == {
        "path": "image/blocks/mlp/fc1/kernel",
        "shape": [3, 64, 256],
        "size": 3 * 64 * 256,
        "dtype": "float32",
        "sharding": "(None, None, 'fsdp')",
        "quantizer": "k=2 group=32",
        "bits": 2,
    }
    assert rows["logit_scale"]["quantizer"] == "" and rows["logit_scale"]["shape"] == []


def test_params_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*STUDENT, "--config.ternary=Q-FFN"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["path", "shape", "size", "dtype", "sharding", "quantizer"]
    assert next(line for line in lines if line.startswith("text/blocks/mlp/fc2/kernel")).endswith("k=2 group=256")
    mlps, rest = 2 * 64 * 256 * (3 + 2), 49408 * 64
    assert re.fullmatch(rf"all parameters: [\d,]+, of which ternary {mlps:,} \(\d+\.\d\d%\)", lines[-2])
    assert int(lines[-2].split()[2].rstrip(",").replace(",", "")) - rest == int(
        lines[-1].split()[4].rstrip(",").replace(",", "")
    )


def test_python_m_runs_the_same_commands_and_help_imports_no_jax() -> None:
    shown = python("-X", "importtime", "-m", "tclip_jax", "train", "--help")
    assert shown.returncode == 0 and shown.stdout.startswith("usage: tclip train")
    imported = {line.split("|")[-1].strip() for line in shown.stderr.splitlines()}
    assert "tclip_jax.recipes" in imported and not imported & {"jax", "flax", "tensorflow_datasets"}
    failed = python("-m", "tclip_jax", "train", "--config", "absent.py", "--workdir", "runs/x")
    assert (failed.returncode, failed.stdout) == (2, "")
    assert failed.stderr == "tclip train: error: absent.py: no such recipe file\n"


def test_importing_the_package_and_its_cli_imports_neither_jax_nor_flax() -> None:
    code = "import sys, tclip_jax.cli; print(tclip_jax.__version__, {'jax', 'flax', 'torch'} & set(sys.modules))"
    assert re.fullmatch(r"\d+\.\d+\.\d+\S* set\(\)\n", python("-c", code).stdout)


ORBAX = """
import resource, sys
from tclip_jax.log import start_logging
start_logging(sys.argv[2] == "debug")
import jax.numpy as jnp
from absl import logging as absl
from tclip_jax.runs.checkpoints import Checkpoints
from tclip_jax.runs.checkpoints import CheckpointConfig
absl.warning("a file is missing")
try:
    raise OSError("why")
except OSError:
    absl.exception("a worker of Grain has ended")
with Checkpoints(sys.argv[1], CheckpointConfig()) as checkpoints:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    try:
        checkpoints.save(1, {"params": {"w": jnp.arange(60000.0)}}, {})
        checkpoints.wait()
    except ValueError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""


def test_each_error_of_orbax_and_grain_is_one_line(tmp_path: pathlib.Path) -> None:
    ran = python("-c", ORBAX, str(tmp_path / "c"), "")
    assert "checkpoint could not be written" in ran.stdout, ran.stderr
    first, second = ran.stderr.splitlines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ERROR   a worker of Grain has ended", first)
    assert second[20:].startswith("ERROR   ") and "Failed to write" in second and "File too large" in second
    ran = python("-c", ORBAX, str(tmp_path / "d"), "debug")
    assert "Traceback" in ran.stderr and "OSError: why" in ran.stderr and "Failed to write" in ran.stderr
    assert "a file is missing" not in ran.stderr


def test_control_characters_of_files_and_names_are_escaped(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "t.csv").write_text("a\x9b31m\u2028,b\n")
    name = "\x1b[31mred"
    for spec in (f"csv:{tmp_path}/t.csv", f"folder:{tmp_path}/{name}", f"csv:{tmp_path}/{name}"):
        assert main(["data", "check", "--data", spec, "--workers", "1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and error.rstrip("\n").isprintable()
        assert "\\x9b31m" in error or "\\x1b[31mred: " in error


def test_an_os_error_names_its_file_once(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", "--data", f"csv:{tmp_path}/none.csv"]) == 2
    assert capsys.readouterr().err == f"tclip data check: error: {tmp_path}/none.csv: No such file or directory\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["inspect", "gs://b/a"], "Please install gcsfs to access Google Storage: pip install 'tclip-jax[gcs]'"),
        (["inspect", "s3://b/a"], "Install s3fs to access S3: pip install 'tclip-jax[s3]'"),
        (
            ["data", "check", "--data", "wds:gs://b/0.tar"],
            "gs://b/0.tar: Please install gcsfs to access Google Storage: pip install 'tclip-jax[gcs]'",
        ),
    ],
)
def test_a_url_without_its_reader_names_the_extra(command: list[str], message: str) -> None:
    program = "import sys; sys.modules['gcsfs'] = sys.modules['s3fs'] = None\n"
    ran = python("-c", program + "from tclip_jax.cli import main; sys.exit(main(sys.argv[1:]))", *command)
    name = " ".join(command[: 2 if command[0] == "data" else 1])
    assert ran.returncode in (1, 2) and ran.stderr == f"tclip {name}: error: {message}\n"
