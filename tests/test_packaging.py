"""What a user gets from `pip install`: a wheel that works without the checkout."""

from __future__ import annotations

import base64
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

from tclip_jax.interop.torch_packed import package_files

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = {
    "tclip_jax/py.typed",
    "tclip_jax/configs/quickstart.py",
    "tclip_jax/launch/common.sh",
    "tclip_jax/launch/local",
    "tclip_jax/launch/tclip.Dockerfile",
    "tclip_jax/data/bpe_simple_vocab_16e6.txt.gz",
    "tclip_jax/data/LICENSE.bpe",
    *(f"tclip_jax/interop/demo/{path.name}" for path in (ROOT / "tclip_jax" / "interop" / "demo").iterdir()),
    "tclip_jax/ternary/native/plain.cc",
    "tclip_jax/tclip_torch/pyproject.toml",
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel of this checkout, unpacked as an installation would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, timeout=900)
    assert built.returncode == 0, built.stderr
    (wheel,) = folder.glob("tclip_jax-*-py3-none-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site-packages")
    return folder / "site-packages"


@pytest.mark.slow
def test_the_wheel_carries_data_recipes_and_licences_and_nothing_else(unpacked: pathlib.Path) -> None:
    files = {str(path.relative_to(unpacked)) for path in unpacked.rglob("*") if path.is_file()}
    assert files >= FILES
    (info,) = unpacked.glob("tclip_jax-*.dist-info")
    assert (info / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (info / "licenses" / "tclip_jax" / "data" / "LICENSE.bpe").is_file()
    assert "tclip = tclip_jax.cli:main" in (info / "entry_points.txt").read_text()
    assert {path.name for path in unpacked.iterdir()} == {"tclip_jax", info.name}
    python = {str(path.relative_to(ROOT)) for path in (ROOT / "tclip_jax").rglob("*.py")}
    beside = [ROOT / "hatch_build.py", *(ROOT / "tclip_torch").glob("*.py")]
    python |= {f"tclip_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    python |= {f"tclip_jax/tclip_torch/{path.name}" for path in beside}
    assert {name for name in files if name.endswith(".py")} == python
    assert not [name for name in files if name.endswith(".pyc")]


@pytest.mark.slow
def test_the_unpacked_wheel_finds_its_recipes_from_anywhere(unpacked: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = (
        "import tclip_jax, tclip_jax.recipes as r; print(tclip_jax.__file__); print(r.recipe_folder());"
        "print(r.load_recipe('quickstart:student').ternary); from tclip_jax.data.tokenizer import Tokenizer;"
        "print(Tokenizer(4)(['a'])[0].tolist());"
        "from tclip_jax.interop.torch_packed import package_files; print(*(name for _, name in package_files()))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    package = unpacked / "tclip_jax"
    expected = [str(package / "__init__.py"), str(package / "configs"), "Q-ALL", "[49406, 320, 49407, 0]"]
    expected.append(" ".join(name for _, name in package_files()))  # those of the checkout
    assert ran.stdout.splitlines() == expected, ran.stderr


@pytest.mark.slow
def test_the_wheel_that_launchers_send_is_the_same_without_the_kernel(
    unpacked: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """From the checkout, and packed again from an installed package, which has files that a wheel has not."""
    (info,) = unpacked.glob("tclip_jax-*.dist-info")
    record = (info / "RECORD").read_text()
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(f"{record}../../../bin/tclip,,\n{info.name}/INSTALLER,,\n")
    for source, name in ((unpacked, "packed"), (ROOT, "built")):
        ran = subprocess.run(
            [sys.executable, "-m", "tclip_jax", "launch", "wheel", "--out", str(tmp_path / name)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(source)},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert ran.returncode == 0 and ran.stdout == "", ran.stderr
    (info / "INSTALLER").unlink()
    (info / "RECORD").write_text(record)
    (packed,), (built,) = ((tmp_path / name).iterdir() for name in ("packed", "built"))
    assert packed.name == built.name and packed.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(packed) as one, zipfile.ZipFile(built) as other:
        assert one.testzip() is None
        files = {name: one.read(name) for name in one.namelist()}
        expected = {name: other.read(name) for name in other.namelist()}
    assert not [name for name in files if name.endswith(".so")] and "tclip_jax/launch/local" in files
    assert set(files) == set(expected)
    own = {f"{info.name}/RECORD", f"{info.name}/WHEEL"}
    assert {name for name in files if files[name] != expected[name]} <= own
    assert b"Root-Is-Purelib: true\nTag: py3-none-any\n" in files[f"{info.name}/WHEEL"]
    # pip checks the sums of RECORD.
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "to")]
    assert subprocess.run([*install, str(packed)], capture_output=True, timeout=900).returncode == 0
    assert (tmp_path / "to" / "tclip_jax" / "shipping.py").is_file()
    rows = dict(line.split(",", 1) for line in files[f"{info.name}/RECORD"].decode().splitlines())
    digest = base64.urlsafe_b64encode(hashlib.sha256(files["tclip_jax/cli.py"]).digest()).decode().rstrip("=")
    assert rows["tclip_jax/cli.py"] == f"sha256={digest},{len(files['tclip_jax/cli.py'])}" and set(rows) == set(files)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("project", "error"),
    [
        ('[build-system]\nrequires = []\nbuild-backend = "none"\n', "pip cannot build the wheel: "),
        (
            '[build-system]\nrequires = ["hatchling>=1.27"]\nbuild-backend = "hatchling.build"\n[project]\n'
            'name = "tclip-jax"\nversion = "99"\nrequires-python = ">=3.11"\n',
            "pip built tclip_jax-99-py3-none-any.whl, and tclip_jax-",
        ),
    ],
)
def test_a_checkout_without_its_wheel_is_one_line(project: str, error: str, tmp_path: pathlib.Path) -> None:
    shutil.copytree(ROOT / "tclip_jax", tmp_path / "tclip_jax", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    (tmp_path / "pyproject.toml").write_text(project)
    ran = subprocess.run(
        [sys.executable, "-m", "tclip_jax", "launch", "wheel", "--out", "dist"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ran.returncode == 2 and ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr.startswith(f"tclip launch wheel: error: {tmp_path}: {error}") and "no message" not in ran.stderr
