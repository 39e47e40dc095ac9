"""What a user gets from `pip install`: a wheel that works without the checkout."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
FILES = {
    "tclip_jax/py.typed",
    "tclip_jax/configs/quickstart.py",
    "tclip_jax/launch/common.sh",
    "tclip_jax/launch/local",
    "tclip_jax/data/bpe_simple_vocab_16e6.txt.gz",
    "tclip_jax/data/LICENSE.bpe",
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The wheel of this checkout, unpacked as an installation would."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(folder), str(ROOT)]
    built = subprocess.run(build, capture_output=True, text=True, timeout=300)
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
    python |= {f"tclip_jax/{path.relative_to(ROOT)}" for path in (ROOT / "configs").rglob("*.py")}
    assert {name for name in files if name.endswith(".py")} == python
    assert not [name for name in files if name.endswith(".pyc")]


@pytest.mark.slow
def test_the_unpacked_wheel_finds_its_recipes_from_anywhere(unpacked: pathlib.Path, tmp_path: pathlib.Path) -> None:
    code = (
        "import tclip_jax, tclip_jax.recipes as r; print(tclip_jax.__file__); print(r.recipe_folder());"
        "print(r.load_recipe('quickstart:student').ternary); from tclip_jax.data.tokenizer import Tokenizer;"
        "print(Tokenizer(4)(['a'])[0].tolist())"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    package = unpacked / "tclip_jax"
    expected = [str(package / "__init__.py"), str(package / "configs"), "Q-ALL", "[49406, 320, 49407, 0]"]
    assert ran.stdout.splitlines() == expected, ran.stderr
