"""`tclip doctor` on this machine, and on simulated machines with missing or unfit packages."""

from __future__ import annotations

import importlib.metadata
import json

import jax
import pytest

from tclip_jax.cli import main
from tclip_jax.commands import doctor
from tclip_jax.commands.doctor import import_errors as real_import_errors
from tclip_jax.ternary.kernels import native_cpu


@pytest.fixture(autouse=True)
def imports(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The errors of imports by package, in place of imports, which take seconds."""
    errors: dict[str, str] = {}
    monkeypatch.setattr(doctor, "import_errors", lambda statements: errors)
    return errors


def findings() -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.examine()}


def test_a_complete_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not any(line.startswith("!") for line in lines)
    shown = {line.split()[0]: line.split()[1] for line in lines if line.split()[0] in doctor.PACKAGES}
    assert shown == {name: importlib.metadata.version(name) for name in doctor.PACKAGES}
    assert any(line.split()[:4] == ["devices", "8", "x", "cpu"] for line in lines)


def test_a_missing_package_is_reported_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    installed = {"jax": "0.11.1", "flax": "0.12.8", "tclip-jax": "0.1.0"}

    def version(package: str) -> str:
        if package not in installed:
            raise importlib.metadata.PackageNotFoundError(package)
        return installed[package]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert main(["doctor", "--json"]) == 1
    report = {finding["name"]: finding for finding in json.loads(capsys.readouterr().out)}
    assert report["grain"]["value"] == "missing" and not report["grain"]["optional"]
    assert report["torch"]["optional"] and report["torch"]["remedy"].endswith("pip install 'tclip-jax[torch]'")
    assert report["flax and jax"]["remedy"].endswith("pip install -U flax")


@pytest.mark.parametrize(("flax", "jax_version"), [("0.12.8", "0.10.2"), ("0.12.12", "0.12.0"), ("0.13.0", "0.13.1")])
def test_compatible_versions(flax: str, jax_version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", {"flax": flax, "jax": jax_version, "libtpu": "0.0.1"}.get)
    assert "flax and jax" not in findings()


def test_an_accelerator_that_jax_does_not_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.pathlib.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert findings()["devices"].remedy == "/dev/nvidia0 exists: unset JAX_PLATFORMS=cpu"
    monkeypatch.delenv("JAX_PLATFORMS")
    assert findings()["devices"].remedy == "/dev/nvidia0 exists: pip install 'tclip-jax[cuda]'"


def test_an_optional_package_that_cannot_be_imported_is_a_problem(
    imports: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: "3.3.0")
    imports |= {"open_clip_torch": "RuntimeError: operator torchvision::nms does not exist", "gguf": "ImportError: no"}
    assert main(["doctor"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("!")]
    assert [" ".join(line.split()) for line in lines] == [
        "! open_clip_torch 3.3.0, but it cannot be imported: RuntimeError: operator torchvision::nms does not exist; "
        "torch and torchvision are of different builds: install both from one index",
        "! gguf 3.3.0, but it cannot be imported: ImportError: no; pip install --force-reinstall 'tclip-jax[gguf]'",
    ]


def test_the_kernel_of_ternary_products_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_cpu, "instruction_sets", lambda: ("", "avx2", "portable"))
    assert findings()["ternary products"].value == "native kernel with avx2; activations A16 by default"
    monkeypatch.setattr(native_cpu, "instruction_sets", tuple)
    without = findings()["ternary products"]
    assert without.value.startswith("XLA: the native library was not built when this version")
    assert without.value.endswith("; activations A32 by default") and "C++17 compiler" in without.remedy
    assert without.optional and not without.broken


def test_the_matmul_precision_is_shown() -> None:
    assert findings()["matmul of float32"].value.startswith("bfloat16 on a TPU")
    with jax.default_matmul_precision("highest"):
        assert findings()["matmul of float32"].value == "highest"


def test_a_backend_that_cannot_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> str:
        raise RuntimeError("Unable to initialize backend 'tpu': no TPU\nand more")

    monkeypatch.setattr(jax, "default_backend", fail)
    assert findings()["devices"].remedy == "Unable to initialize backend 'tpu': no TPU"


def test_a_libtpu_that_jax_does_not_pin(monkeypatch: pytest.MonkeyPatch) -> None:
    pins = ['libtpu==0.0.42.*; extra == "tpu"', "numpy>=2.0"]
    monkeypatch.setattr(importlib.metadata, "requires", {"jax": pins}.get)
    versions = {"jax": "0.10.2", "flax": "0.12.8", "libtpu": "0.0.52"}
    monkeypatch.setattr(importlib.metadata, "version", versions.get)
    remedy = "libtpu is 0.0.52, but jax 0.10.2 needs ==0.0.42.*: pip install 'tclip-jax[plan]'"
    assert findings()["libtpu and jax"].remedy == remedy
    versions["libtpu"] = "0.0.42.1"
    assert "libtpu and jax" not in findings()


@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("import json", ""),
        ("import json.nothing", "ModuleNotFoundError: No module named 'json.nothing'"),
        ("raise RuntimeError('first\\nlast\\n')", "last"),
        ("import os; os._exit(3)", "exit code 3"),
        ("import sys; print('a warning', file=sys.stderr)", ""),
    ],
)
def test_a_statement_runs_in_its_own_process(statement: str, error: str) -> None:
    assert real_import_errors({"a package": statement}) == ({"a package": error} if error else {})
