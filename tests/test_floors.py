"""Who may import whom, what nobody imports, and how long a file may be; CONTRIBUTING.md shows the floors."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "tclip_jax"
FILES = sorted(PACKAGE.rglob("*.py"))

# A folder imports only from lower floors. The files of floor 0 know nothing of the project; everything not named here
# (the commands, recipes.py, quickstart.py and the like) is the roof.
FLOORS = {
    "keys": 0,
    "storage": 0,
    "schema": 0,
    "registry": 0,
    "pages": 0,
    "log": 1,
    "ternary": 1,
    "data": 1,
    "losses": 1,
    "parallel": 1,
    "models": 2,
    "artifacts": 3,
    "interop": 4,
    "runs": 4,
    "inference": 5,
    "evaluation": 6,
    "numerics": 6,
    "training": 7,
    "planning": 8,
    "datasets": 8,
}
ROOF = 9
# What a folder must also do without: functions on arrays come first, and PyTorch is for tests alone.
FORBIDDEN = {"ternary": {"flax"}, "losses": {"flax"}, "": {"torch", "torchvision", "transformers", "open_clip"}}
ORBAX = ("runs/orbax_v0.py", "runs/orbax_v1.py")  # who may import it: a file for each of its APIs


def part_of(module: str) -> str:
    """'models' of 'tclip_jax.models.clip'; '' of the package itself."""
    return [*module.split("."), ""][1]


def home(path: pathlib.Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return "" if parts == ("__init__",) else parts[0]


def imports(tree: ast.AST) -> list[tuple[str, str | None, str]]:
    """(module, name taken from it or None, name it has in the file) of every import, also those within functions."""
    found: list[tuple[str, str | None, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, None, alias.asname or alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            found += [(str(node.module), alias.name, alias.asname or alias.name) for alias in node.names]
    return found


def wrong_imports(source: str, folder: str) -> list[str]:
    """What a file of `folder` imports from a floor not below its own, or of another folder's private names."""
    tree, wrong = ast.parse(source), []
    floor, foreign = FLOORS.get(folder, ROOF), set()
    for module, name, alias in imports(tree):
        if module.split(".")[0] != "tclip_jax":
            continue
        if module == "tclip_jax" and name:  # from tclip_jax import models
            module, name = f"tclip_jax.{name}", None
        other = part_of(module)
        if other == folder:
            continue
        if floor < ROOF and FLOORS.get(other, ROOF) >= floor:
            wrong.append(f"{module} is not below {folder}")
        private = [part for part in (*module.split("."), name or "") if part.startswith("_") and part != "__version__"]
        wrong += [f"{module}: {part} is private" for part in private]
        foreign.add(alias)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            value = ast.unparse(node.value)
            wrong += [f"{value}.{node.attr} is private"] if value in foreign else []
    return wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_only_public_names_of_floors_below(path: pathlib.Path) -> None:
    assert wrong_imports(path.read_text(), home(path)) == []


def test_every_folder_has_its_floor() -> None:
    folders = {home(path) for path in FILES if path.parent != PACKAGE}
    assert folders - set(FLOORS) == {"commands"}


@pytest.mark.parametrize(
    ("folder", "source", "wrong"),
    [
        ("losses", "from tclip_jax.parallel.mesh import make_mesh", ["tclip_jax.parallel.mesh is not below losses"]),
        ("models", "def f():\n    import tclip_jax.training.loop", ["tclip_jax.training.loop is not below models"]),
        ("interop", "from tclip_jax import evaluation", ["tclip_jax.evaluation is not below interop"]),
        ("storage", "from tclip_jax import schema", ["tclip_jax.schema is not below storage"]),
        ("data", "from tclip_jax.recipes import load_recipe", ["tclip_jax.recipes is not below data"]),
        ("models", "from tclip_jax.ternary.tensor import _f", ["tclip_jax.ternary.tensor: _f is private"]),
        ("cli", "from tclip_jax.data import images as i\ni._crop()", ["i._crop is private"]),
        ("models", "from tclip_jax.models.layers import _f\nfrom tclip_jax.schema import T", []),
        ("commands", "from tclip_jax.recipes import override", []),
    ],
)
def test_the_check_itself(folder: str, source: str, wrong: list[str]) -> None:
    assert wrong_imports(source, folder) == wrong


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_nothing_that_its_folder_does_without(path: pathlib.Path) -> None:
    without = FORBIDDEN[""] | FORBIDDEN.get(home(path), set())
    assert not {module.split(".")[0] for module, _, _ in imports(ast.parse(path.read_text()))} & without


def test_nobody_else_imports_orbax() -> None:
    """So that its next version, which has another API, is another such file and nothing else."""
    files = [*FILES, *(path for folder in ("tests", "benchmarks", "configs") for path in (ROOT / folder).rglob("*.py"))]
    users = [path for path in files if "orbax" in {m.split(".")[0] for m, _, _ in imports(ast.parse(path.read_text()))}]
    assert users == [PACKAGE / each for each in ORBAX]


def test_no_file_is_longer_than_400_lines() -> None:
    files = [
        path for folder in ("tclip_jax", "configs", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
    ]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {path: length for path, length in lengths.items() if length > 400} == {} and len(lengths) > len(FILES)
