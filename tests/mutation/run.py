"""Mutation testing: a seeded sample of cosmic-ray's mutants, each against the tests of the file that it changes.

    python tests/mutation/run.py FOLDER [--mutants 300] [--seed 0]

FOLDER gets a copy of the last commit, whose files are changed one at a time, and results.jsonl; the same command
resumes. Not mutated: annotations, f-strings, what is raised or logged, and lines of kernels that no test reaches on a
CPU. Mutants that change nothing are listed with the reason in equivalent.toml.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import hashlib
import importlib
import itertools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import traceback
import warnings
from collections.abc import Iterator
from typing import Any

import coverage
import pytest
from cosmic_ray.commands.init import _all_work_items
from cosmic_ray.mutating import mutate_code, use_mutation
from cosmic_ray.plugins import get_operator

# Files that are mutated and the tests that must notice, nearest first: the first failure ends a mutant's run.
TESTS = {
    "ternary/quantizers.py": "ternary/test_quantizers.py ternary/test_kinds.py",
    "ternary/straight_through.py": "ternary/test_quantizers.py ternary/test_kinds.py ternary/test_gathering.py",
    "ternary/sums.py": "ternary/test_sums.py ternary/test_quantizers.py ternary/test_kinds.py",
    "losses/contrastive.py": "losses/test_contrastive.py",
    "losses/distillation.py": "losses/test_distillation.py",
    "losses/features.py": "losses/test_features.py",
    "losses/grad_cache.py": "training/test_microbatches.py",
    "losses/exchange.py": "losses/test_exchange.py",
    "losses/registry.py": "training/test_objective.py",
    "losses/*.py": "losses/test_contrastive.py losses/test_distillation.py losses/test_exchange.py",
    "training/step.py": "training/test_step.py",
    "training/objective.py": "training/test_objective.py",
    "training/optimizer.py": "training/test_optimizer.py",
    "data/eval_batches.py": "data/test_eval_batches.py",
    "data/pipeline.py": "data/test_pipeline.py data/test_pipeline_position.py data/test_bad_samples.py",
    "ternary/columns.py": "ternary/test_columns.py",
    "ternary/gathering.py": "ternary/test_gathering.py",
    "ternary/matmul.py": "ternary/test_dispatch.py ternary/test_matmul.py",
    "ternary/tensor.py": "ternary/test_dispatch.py ternary/test_matmul.py",
    "ternary/packing.py": "ternary/test_packing.py ternary/test_packing_rows.py",
    "ternary/*.py": "ternary/test_quantizers.py ternary/test_matmul.py",
    "ternary/kernels/layout.py": "ternary/kernels/test_layout_word_order.py ternary/kernels/test_layout_k_axis.py"
    " ternary/kernels/test_layout_block_sizes.py",
    "ternary/kernels/xla_int2.py": "ternary/kernels/test_xla_int2.py ternary/test_dispatch.py",
    "ternary/kernels/native_cpu.py": "ternary/test_matmul.py ternary/test_dispatch.py",
    "ternary/kernels/xla_int8.py": "ternary/test_matmul.py ternary/test_dispatch.py",
    "ternary/kernels/reference.py": "ternary/test_matmul.py ternary/test_dispatch.py",
    "ternary/kernels/__init__.py": "ternary/test_dispatch.py",
    "ternary/kernels/tpu_dot.py": "ternary/kernels/test_mosaic_tpu.py",
    "ternary/kernels/mosaic_tpu*.py": "ternary/kernels/test_mosaic_tpu.py ternary/test_dispatch.py",
    "ternary/kernels/*.py": "ternary/kernels/test_mosaic_gpu.py ternary/test_dispatch.py",
}
ROOT = pathlib.Path(__file__).parents[2]
EQUIVALENT = pathlib.Path(__file__).with_name("equivalent.toml")
HEAVY = ("jax.experimental.pallas", "flax.linen", "optax", "torch", "grain", "hypothesis", "PIL.Image")


@dataclasses.dataclass(frozen=True)
class Mutant:
    """One change: an operator of cosmic-ray at the `place`-th of its places on lines like `line` of a file."""

    file: str
    operator: str
    line: str
    place: int
    occurrence: int
    row: int

    @property
    def key(self) -> tuple[str, str, str, int]:
        """Stays the same when code moves elsewhere in the file."""
        return self.file, self.operator, self.line, self.place

    def change(self) -> Any:
        """The operator, as cosmic-ray applies it."""
        return get_operator(f"core/{self.operator}")()


def mutants_of(file: str) -> list[Mutant]:
    """All changes of what a file does."""
    text = pathlib.Path("tclip_jax", file).read_text()
    lines, skipped, places = text.splitlines(), list(_without_effect(text)), collections.Counter[tuple[str, str]]()
    found = []
    for item in _all_work_items([pathlib.Path("tclip_jax", file)], {}):
        (change,) = item.mutations
        row, operator = change.start_pos[0], change.operator_name.removeprefix("core/")
        line = lines[row - 1].strip()
        if not any(start <= change.start_pos < end for start, end in skipped):
            found.append(Mutant(file, operator, line, places[operator, line], change.occurrence, row))
        places[operator, line] += 1
    return found


def is_python(mutant: Mutant) -> bool:
    """Whether the changed file compiles without a warning: cosmic-ray takes the `*` of a signature for a product."""
    text = pathlib.Path("tclip_jax", mutant.file).read_text()
    try:
        with warnings.catch_warnings(action="error"):
            compile(mutate_code(text, mutant.change(), mutant.occurrence), mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def _without_effect(text: str) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Start and end (line, column) of annotations, f-strings, and what is raised or logged."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        spans: list[ast.expr | None] = []
        match node:
            case ast.arg() | ast.AnnAssign():
                spans = [node.annotation]
            case ast.FunctionDef():
                spans = [node.returns]
            case ast.Raise():
                spans = [node.exc]
            case ast.JoinedStr() | ast.Call(func=ast.Attribute(value=ast.Name(id="_logger"))):
                spans = [node]
        for span in filter(None, spans):
            # ast counts the bytes of a line, cosmic-ray its characters.
            ends = (span.lineno, span.col_offset), (span.end_lineno or 0, span.end_col_offset or 0)
            start, end = ((row, len(lines[row - 1].encode()[:column].decode())) for row, column in ends)
            yield start, end


class Tests:
    """Files of tests, run once without any change: how long each test takes, and which lines it reaches."""

    def __init__(self, files: list[str]) -> None:
        self.seconds: dict[str, float] = {}
        self._covers: list[coverage.CoverageData] = []
        for file in files:
            durations, cover = (pathlib.Path("unchanged", file.replace("/", "-") + end) for end in (".json", ".cover"))
            if not durations.exists():
                outcome, seconds = run_tests([file], 3600, Watch(durations, cover))
                print(f"{file} {outcome} unchanged, {seconds:.0f} s", flush=True)
                if outcome != "passed":
                    sys.exit(pathlib.Path("pytest.log").read_text()[-2000:])
            self.seconds |= json.loads(durations.read_text())
            self._covers.append(coverage.CoverageData(str(cover)))
            self._covers[-1].read()

    def reaching(self, path: pathlib.Path) -> dict[int, set[str]]:
        """The tests that run each line of a file, or another of its statement; "" is its import."""
        found = collections.defaultdict[int, set[str]](set)
        for cover in self._covers:
            for row, names in cover.contexts_by_lineno(str(path.resolve())).items():
                found[row].update(names)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.stmt):
                body = getattr(node, "body", None)
                rows = range(node.lineno, body[0].lineno if body else (node.end_lineno or 0) + 1)
                names = set[str]().union(*(found[row] for row in rows))
                for row in rows:
                    found[row] = names
        return found


class Watch:
    """A plugin of pytest that writes the seconds of every test, and the lines that it reaches."""

    def __init__(self, durations: pathlib.Path, cover: pathlib.Path) -> None:
        self._seconds: dict[str, float] = {}
        self._durations = durations
        self._coverage = coverage.Coverage(str(cover), include=["tclip_jax/*"])

    def pytest_sessionstart(self) -> None:
        self._coverage.start()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._coverage.switch_context(nodeid)

    def pytest_runtest_logfinish(self) -> None:
        self._coverage.switch_context("")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.passed:
            self._seconds[report.nodeid] = self._seconds.get(report.nodeid, 0) + report.duration

    def pytest_sessionfinish(self) -> None:
        self._coverage.stop()
        self._coverage.save()
        self._durations.write_text(json.dumps(self._seconds))


class FewExamples:
    """A plugin of pytest: hypothesis draws few examples and the same every time."""

    def pytest_collection(self) -> None:
        import hypothesis

        options: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None, "max_examples": 20}
        hypothesis.settings.register_profile("mutation", **options)
        hypothesis.settings.load_profile("mutation")


def run_tests(tests: list[str], limit: float, watch: Watch | None = None) -> tuple[str, float]:
    """Runs pytest in a fork of this process, which has imported the libraries, and writes pytest.log.

    Args:
      tests: their names, in this order.
      limit: seconds.
      watch: where they run without a change.

    Returns:
      "passed", "failed" or "timeout", and seconds.
    """
    start = time.monotonic()
    if not (child := os.fork()):
        os.setsid()
        with open("pytest.log", "wb") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        # Without a watch no bytecode: a second change within a second would run the first one's.
        sys.dont_write_bytecode = watch is None
        plugins = [FewExamples(), *([watch] if watch else [])]
        options = ["-x", "-n", "0", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
        # The default suite and torch.
        chosen = "not slow and not faults and not tpu_compile and not benchmarks and not fuzz and not runtimes"
        code: int = 1
        try:
            code = pytest.main([*options, "-m", chosen, "--tb=line", *tests], plugins=plugins)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        if time.monotonic() - start > limit:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return "timeout", time.monotonic() - start
    return "failed" if ended[1] else "passed", time.monotonic() - start


def pattern_of(file: str) -> str:
    """The first key of TESTS that fits."""
    return next(pattern for pattern in TESTS if pathlib.PurePath(file).match(pattern))


def run(size: int, seed: int, only: set[Any] | None) -> None:
    """Draws about `size` mutants, of each file in proportion and three at least, and records what becomes of each."""
    files = {file for each in TESTS for file in pathlib.Path("tclip_jax").glob(each)}
    names = sorted(file.relative_to("tclip_jax").as_posix() for file in files)
    mutants = {name: found for name in names if (found := mutants_of(name))}
    total = sum(map(len, mutants.values()))
    known, done = {key_of(each) for each in equivalents()}, {key_of(each) for each in results()}
    for file in sorted(mutants, key=lambda name: list(TESTS).index(pattern_of(name))):
        path, tests = (
            pathlib.Path("tclip_jax", file),
            Tests([f"tests/{each}" for each in TESTS[pattern_of(file)].split()]),
        )
        reaching = tests.reaching(path)
        able = [each for each in mutants[file] if "kernels/" not in file or reaching[each.row]]
        # In an order that does not change with code elsewhere.
        able.sort(key=lambda each: hashlib.sha256(f"{seed}:{each.key}".encode()).digest())
        draw = filter(is_python, able)
        for mutant in itertools.islice(draw, max(3, round(size * len(mutants[file]) / total))):
            if mutant.key in done or (only is not None and mutant.key not in only):
                continue
            if mutant.key in known:
                record(mutant, "equivalent", 0)
                continue
            # The quickest first. A test runs no lines that one before it has compiled, so survivors get them all.
            near = reaching[mutant.row] & tests.seconds.keys() if only is None else set[str]()
            names = sorted(near or tests.seconds, key=tests.seconds.__getitem__)
            with use_mutation(path, mutant.change(), mutant.occurrence):
                record(mutant, *run_tests(names, 60 + 5 * sum(map(tests.seconds.__getitem__, names))))


def record(mutant: Mutant, outcome: str, seconds: float) -> None:
    """Appends to results.jsonl."""
    outcome = {"passed": "survived", "failed": "killed", "timeout": "killed"}.get(outcome, outcome)
    log = pathlib.Path("pytest.log").read_text(errors="replace").splitlines()
    by = next((line for line in log if line.startswith(("FAILED", "ERROR"))), "") if outcome == "killed" else ""
    each = dataclasses.asdict(mutant) | {"outcome": outcome, "seconds": round(seconds, 1), "by": by}
    with open("results.jsonl", "a") as file:
        file.write(json.dumps(each) + "\n")
    print(f"{outcome:10} {seconds:4.0f} s {mutant.file}:{mutant.row} {mutant.operator} {mutant.line}", flush=True)


def results(path: pathlib.Path = pathlib.Path("results.jsonl")) -> list[dict[str, Any]]:
    """What was recorded."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def equivalents() -> list[dict[str, Any]]:
    """The mutants that change nothing: those of `Mutant.key`, and why."""
    return tomllib.loads(EQUIVALENT.read_text())["mutant"]


def key_of(each: dict[str, Any]) -> tuple[str, str, str, int]:
    """`Mutant.key` of what was recorded or listed."""
    return each["file"], each["operator"], each["line"], each["place"]


def table() -> str:
    """Mutants by file and outcome."""
    outcomes = ("killed", "equivalent", "survived")
    counts = collections.Counter((each["file"], each["outcome"]) for each in results())
    files = sorted({file for file, _ in counts})
    rows = [(file, *(counts[file, outcome] for outcome in outcomes)) for file in files]
    rows.append(("all", *(sum(row[i] for row in rows) for i in (1, 2, 3))))  # type: ignore[arg-type]
    lines = [f"{file:32}{sum(row):>8}" + "".join(f"{each:>12}" for each in row) for file, *row in rows]
    return "\n".join([f"{'file':32}{'mutants':>8}" + "".join(f"{each:>12}" for each in outcomes), *lines])


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--mutants", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--again", type=pathlib.Path, help="results.jsonl of another run: only what survived there")
    args = parser.parse_args()
    only = None
    if args.again:
        only = {key_of(each) for each in results(args.again) if each["outcome"] == "survived"}
    folder = args.folder.resolve()
    (folder / "unchanged").mkdir(parents=True, exist_ok=True)
    if not (commit := folder / "commit").exists():
        commit.write_text(subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=ROOT, text=True))
    archive = subprocess.check_output(["git", "archive", commit.read_text().strip()], cwd=ROOT)
    subprocess.run(["tar", "-x"], cwd=folder, input=archive, check=True)
    for library in ROOT.glob("tclip_jax/ternary/native/*.so"):
        shutil.copy(library, folder / library.relative_to(ROOT))
    os.chdir(folder)
    # What a change leaves as it was is compiled once.
    os.environ |= {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    os.environ |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(folder)}
    sys.path.insert(0, str(folder))
    for module in HEAVY:
        importlib.import_module(module)
    run(args.mutants, args.seed, only)
    print(table())


if __name__ == "__main__":
    main()
