"""Every command and program of docs/inference.md runs, with a small model in place of the quick start's."""

from __future__ import annotations

import glob
import pathlib
import re
import shlex
import shutil

import pytest

from tclip_jax.cli import main

PAGE = (pathlib.Path(__file__).parents[2] / "docs" / "inference.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_every_command_of_the_page_runs(
    artifact: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("artifact", "student", "export"):
        shutil.copytree(artifact, tmp_path / "runs" / "quickstart" / name)
    exec(re.search(r"<<'END'\n(.*?)\nEND\n", PAGE, re.DOTALL)[1], {})
    assert len(list((tmp_path / "pictures").iterdir())) == 397
    pathlib.Path("captions.txt").write_text("a handwritten digit three.\na handwritten digit eight.\n")
    commands = re.findall(r"^(?:\$ )?(tclip .*|echo .*)$", PAGE, re.MULTILINE)
    assert len(commands) > 9
    codes = []
    for command in commands:
        if command.startswith("echo"):
            pathlib.Path("pictures/bad.png").write_text("no picture\n")
            continue
        words = [each for word in shlex.split(command)[1:] for each in (sorted(glob.glob(word)) or [word])]
        codes.append(main(words))
    assert codes == [0] * (len(codes) - 1) + [1]  # the last command reads a bad picture
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(code, {})
    assert {"artifact.png", "captions.parquet", "three.html"} < set(glob.glob("*"))
