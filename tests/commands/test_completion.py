"""Shell completion: words that each shell completes with the generated script."""

from __future__ import annotations

import pathlib
import shutil
import subprocess

import pytest

from tclip_jax.cli import COMMANDS, main, whole_parser


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path) -> pathlib.Path:
    assert main(["completion", "bash"]) == 0
    path = tmp_path / "tclip.bash"
    path.write_text(capsys.readouterr().out)
    return path


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["tclip", "ver"], {"verify"}),
        (["tclip", "teacher"], {"teacher-cache"}),
        (["tclip", "data", ""], {"prepare", "check", "show", "bench"}),
        (["tclip", "evaluate", "pro"], {"probe"}),
        (["tclip", "compare", "golden", "d"], {"dump"}),
        (["tclip", "train", "--w"], {"--workdir"}),
        (["tclip", "evaluate", "compare", "--res"], {"--resamples"}),
        (["tclip", "pack", "runs/a", "--rest", "float1"], {"float16"}),
        (["tclip", "inspect", "artif"], {"artifact"}),
    ],
)
def test_bash_completes(words: list[str], expected: set[str], script: pathlib.Path, tmp_path: pathlib.Path) -> None:
    (tmp_path / "artifact").mkdir()
    line = " ".join(f"'{word}'" for word in words)
    program = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; complete -p tclip >&2;"
        f' _shtab_tclip tclip "{words[-1]}" "{words[-2]}"; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    ran = subprocess.run(["bash", "-c", program], capture_output=True, text=True, cwd=tmp_path, timeout=900)
    assert "-F _shtab_tclip tclip" in ran.stderr
    assert expected <= set(ran.stdout.split()), ran
    assert not words[-1] or all(reply.startswith(words[-1]) for reply in ran.stdout.split())


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_know_every_command(
    shell: str, capsys: pytest.CaptureFixture[str], tmp_path: pathlib.Path
) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    assert all(word in text for name in COMMANDS for word in name.split())
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([shell, "-n", tmp_path / "script"], check=True, timeout=900)


def test_the_whole_parser_parses_each_command() -> None:
    args = whole_parser().parse_args(["data", "check", "--data", "digits", "--workers", "2", "--debug"])
    assert (args.data, args.workers, args.debug) == ("digits", 2, True)
