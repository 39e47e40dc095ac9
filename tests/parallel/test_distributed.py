"""How a process joins a run and leaves it; two real processes are in tests/launch."""

from __future__ import annotations

import jax
import pytest

from tclip_jax.cli import main
from tclip_jax.parallel import distributed as module
from tclip_jax.parallel.agreement import agreed
from tclip_jax.parallel.distributed import LostProcess, distributed, exit_code, local_gpus
from tclip_jax.parallel.processes import Processes


def test_a_single_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("it was started"))
    with distributed():
        assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("local_count", "local_index", "environ", "expected"),
    [
        (1, 0, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # a process for each host has all its GPUs
        (4, 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [3]),
        (2, 1, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [2, 3]),
        (4, 3, {"CUDA_VISIBLE_DEVICES": "3"}, None),  # the launcher has bound one to each
        (4, 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
        (4, 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_gpus_of_a_process(
    local_count: int, local_index: int, environ: dict[str, str], expected: list[int] | None
) -> None:
    processes = Processes("SLURM", "a:1", 8, local_index, local_count, local_index)
    assert local_gpus(processes, environ) == expected


def test_gpus_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="3 GPUs are not divisible by the 2 processes of this host"):
        local_gpus(Processes("SLURM", "a:1", 2, 0, 2, 0), {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_a_run_whose_other_processes_do_not_come_ends_with_69(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in (("COORDINATOR", "localhost:9"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"TCLIP_{name}", value)
    monkeypatch.setenv("TCLIP_START_TIMEOUT", "0")
    assert main(["train", "--config", "quickstart:teacher,runlocal", "--workdir", "never"]) == 69
    error = capsys.readouterr().err
    assert error.startswith(
        "tclip train: error: process 1 of 2 (TCLIP_*) waited 0 s at localhost:9: process 0 does not"
    )
    assert error.count("\n") == 1
    monkeypatch.setenv("TCLIP_START_TIMEOUT", "soon")
    assert main(["train", "--config", "quickstart:teacher,runlocal", "--workdir", "never"]) == 2
    assert "TCLIP_START_TIMEOUT is 'soon': it must be whole seconds" in capsys.readouterr().err


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """As in a process that has met another; what is done to jax.distributed and at exit."""
    done: list[object] = []
    monkeypatch.setattr(module, "find_processes", lambda: Processes("TCLIP_*", "a:1", 2, 1))
    monkeypatch.setattr(module, "meet", lambda *_: done.append("meet"))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: done.append("initialize"))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: done.append("shutdown"))
    monkeypatch.setattr(module.atexit, "register", lambda _, code: done.append(code))
    yield done
    jax.config.update("jax_enable_preemption_service", True)


@pytest.mark.parametrize(
    ("error", "becomes", "left"),
    [
        (None, None, "shutdown"),
        (SystemExit(75), SystemExit, "shutdown"),  # all processes end so, and wait for each other
        (agreed(ValueError("too many bad samples")), ValueError, "shutdown"),  # as do those who raise together
        (ValueError("config has no 'stepz'"), ValueError, 2),
        (OSError("disk full"), OSError, 2),
        (KeyboardInterrupt(), KeyboardInterrupt, 130),
        (TypeError("a bug"), TypeError, 1),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:101"), LostProcess, 69),
        (RuntimeError("UNAVAILABLE: Task 1 heartbeat timeout"), LostProcess, 69),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), RuntimeError, 1),
    ],
)
def test_how_it_is_left(
    error: BaseException | None, becomes: type[BaseException] | None, left: object, one_of_two: list[object]
) -> None:
    if error is None:
        with distributed():
            pass
    else:
        with pytest.raises(becomes or BaseException) as raised, distributed():
            raise error
        assert type(raised.value) is becomes
        assert left == "shutdown" or exit_code(raised.value) == left
    assert one_of_two == ["meet", "initialize", left]
