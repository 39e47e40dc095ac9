"""The workflows of GitHub and the steps of docs/release.md, as far as they can be checked without the service."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[1]
WORKFLOWS = {path.stem: path.read_text() for path in sorted((ROOT / ".github" / "workflows").glob("*.yml"))}
# yaml reads the key `on` as True.
PARSED: dict[str, dict[Any, Any]] = {name: yaml.safe_load(text) for name, text in WORKFLOWS.items()}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PAGE = (ROOT / "docs" / "release.md").read_text()
# All else may only read the repository.
WRITES = {
    ("docs", "publish"): {"pages": "write", "id-token": "write"},
    ("release", "publish"): {"id-token": "write"},
}


def jobs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for workflow, parsed in PARSED.items():
        for name, job in parsed["jobs"].items():
            yield workflow, name, job


def steps() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for workflow, name, job in jobs():
        for step in job.get("steps", ()):
            yield workflow, name, step


def test_every_job_may_only_read_unless_it_publishes() -> None:
    assert {workflow for workflow, *_ in jobs()} == {"docs", "release", "tests", "wheels"}
    assert all(parsed["permissions"] == {"contents": "read"} for parsed in PARSED.values())
    assert {(workflow, name): job["permissions"] for workflow, name, job in jobs() if "permissions" in job} == WRITES
    assert not [
        name
        for name, text in WORKFLOWS.items()
        if re.search(r"secrets\.|password|token:", text.replace("id-token:", ""))
    ]
    kept = [step for *_, step in steps() if "actions/checkout@" in step.get("uses", "")]
    assert kept and all(step["with"]["persist-credentials"] is False for step in kept)


def test_every_action_is_pinned_to_one_commit() -> None:
    pins: dict[str, set[str]] = {}
    for workflow, text in WORKFLOWS.items():
        for line in re.findall(r"uses: (.*)", text):
            if line.startswith("./"):
                assert (ROOT / line).is_file(), (workflow, line)
                continue
            match = re.fullmatch(r"([\w-]+/[\w-]+)@([0-9a-f]{40}) # v\d+\.\d+\.\d+", line)
            assert match, (workflow, line)
            pins.setdefault(match[1], set()).add(match[2])
    assert len(pins) == 7 and all(len(commits) == 1 for commits in pins.values())


def test_every_shell_step_is_one_that_bash_reads(tmp_path: pathlib.Path) -> None:
    scripts = [(workflow, job, step["run"]) for workflow, job, step in steps() if "run" in step]
    assert len(scripts) > 8
    for workflow, job, script in scripts:
        assert "${{" not in script, (workflow, job)  # the value of an expression would be shell code
        ran = subprocess.run(["bash", "-n"], input=script, capture_output=True, text=True, timeout=900)
        assert ran.returncode == 0, (workflow, job, ran.stderr)
        for program in re.findall(r"(?<![\w/])\.ci/[\w-]+", script):
            assert (ROOT / program).stat().st_mode & 0o100, program
        for package in re.findall(r"pip install (?!-e)(.*)", script):
            assert all(re.fullmatch(r"[\w-]+==[\d.]+", each) for each in package.split()), package


def test_every_job_ends_and_has_a_fixed_runner() -> None:
    for workflow, name, job in jobs():
        if "uses" not in job:
            runners = job.get("strategy", {}).get("matrix", {}).get("runner", [job["runs-on"]])
            assert all(re.fullmatch(r"ubuntu-\d\d\.\d\d(-arm)?", runner) for runner in runners), (workflow, name)
            assert 0 < job["timeout-minutes"] <= 180, (workflow, name)


def test_the_default_tests_run_on_every_python_that_is_declared() -> None:
    declared = {line.split(" :: ")[-1] for line in PROJECT["classifiers"] if re.search(r":: 3\.\d+$", line)}
    matrix = PARSED["tests"]["jobs"]["tests"]["strategy"]["matrix"]["include"]
    assert {row["python"] for row in matrix} == declared == {"3.11", "3.12", "3.13"}
    assert {row["extra"] for row in matrix} <= set(PROJECT["optional-dependencies"])
    assert PROJECT["requires-python"] == ">=3.11"


def test_both_platforms_get_a_wheel_that_is_tested() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["cibuildwheel"]
    assert settings["build"].split() == ["cp311-manylinux_x86_64", "cp311-manylinux_aarch64"]
    assert PARSED["wheels"]["jobs"]["wheel"]["strategy"]["matrix"]["runner"] == ["ubuntu-24.04", "ubuntu-24.04-arm"]
    assert settings["test-command"] == ["tclip doctor", "python {project}/.ci/kernel-check"]
    for path in PARSED["wheels"][True]["pull_request"]["paths"]:
        assert list(ROOT.glob(path)), path


def test_only_a_checked_tag_is_published() -> None:
    release = PARSED["release"]
    assert release[True] == {"push": {"tags": ["v*"]}}
    assert release["jobs"]["check"]["steps"][-1] == {"run": '.ci/release-check "$GITHUB_REF_NAME"'}
    assert (release["jobs"]["wheels"]["needs"], release["jobs"]["publish"]["needs"]) == ("check", "wheels")
    assert release["jobs"]["publish"]["environment"]["name"] == "pypi"
    assert "workflow_call" in PARSED["wheels"][True]
    publishing = [workflow for workflow, text in WORKFLOWS.items() if "gh-action-pypi-publish" in text]
    assert publishing == ["release"]
    names = {step["with"]["name"] for *_, step in steps() if "upload-artifact@" in step.get("uses", "")}
    assert all(name.startswith("dist-") for name in names)  # what the job that publishes downloads


@pytest.mark.parametrize(
    ("tag", "heading", "error"),
    [
        ("v1.2.3", "## 1.2.3 — 2026-12-01", ""),
        ("v1.2.3", "## 1.2.3", ""),
        ("1.2.3", "## 1.2.3", "the tag is 1.2.3, and pyproject.toml has version 1.2.3: tag v1.2.3, or change"),
        ("v1.2.4", "## 1.2.4", "the tag is v1.2.4, and pyproject.toml has version 1.2.3: tag v1.2.3, or change"),
        ("v1.2.3", "## 1.2.30", "CHANGELOG.md has no heading '## 1.2.3': rename 'Unreleased' and add the date"),
        ("v1.2.3", "## 1x2.3", "CHANGELOG.md has no heading '## 1.2.3': rename 'Unreleased' and add the date"),
        ("v1.2.3", "## Unreleased", "CHANGELOG.md has no heading '## 1.2.3': rename 'Unreleased' and add the date"),
    ],
)
def test_the_check_of_a_tag(tag: str, heading: str, error: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / ".ci").mkdir()
    script = shutil.copy(ROOT / ".ci" / "release-check", tmp_path / ".ci")
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "a"\nversion = "1.2.3"\n[tool.b]\nversion = 4\n')
    (tmp_path / "CHANGELOG.md").write_text(f"# Changelog\n\n{heading}\n\n- a change of 1.2.3\n")
    ran = subprocess.run([script, tag], capture_output=True, text=True, timeout=900)
    if error:
        assert (ran.returncode, ran.stdout) == (1, "") and ran.stderr.startswith(error), ran.stderr
    else:
        assert (ran.returncode, ran.stdout) == (0, f"{tag} may be published\n"), ran.stderr


def test_the_page_names_the_steps_that_exist() -> None:
    blocks = [line.strip() for text in re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL) for line in text.splitlines()]
    assert [line for line in blocks if line] == [".ci/run --all", ".ci/install-check dist", ".ci/release-check v0.1.0"]
    assert set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE)) == set(WORKFLOWS)
    run = (ROOT / ".ci" / "run").read_text()
    assert "\n.ci/install-check\n" in run and '[ "${1:-}" != --all ]' in run
    version = PROJECT["version"]
    assert f".ci/release-check v{version}" in PAGE and f"tclip-jax=={version}" in PAGE  # the next release


def test_the_scripts_of_ci_pass_shellcheck() -> None:
    beside = pathlib.Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install -e '.[test]')")
    scripts = [path for path in sorted((ROOT / ".ci").iterdir()) if path.read_text().startswith("#!/usr/bin/env bash")]
    assert len(scripts) == 6
    checked = subprocess.run([program, *scripts], capture_output=True, text=True, timeout=900)
    assert checked.returncode == 0, checked.stdout
