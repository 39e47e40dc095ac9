"""How a process joins a run and leaves it. Threads stand for processes here; tests/launch starts two real ones."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

import jax
import pytest

from tclip_jax.cli import main
from tclip_jax.parallel import distributed as module
from tclip_jax.parallel.agreement import agreed
from tclip_jax.parallel.distributed import LostProcess, distributed, exit_code, local_gpus, meet
from tclip_jax.parallel.processes import Processes


def test_a_single_process_starts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: pytest.fail("initialize was called"))
    with distributed():
        assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("local_count", "local_index", "environ", "expected"),
    [
        (1, 0, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, None),  # one process per host has all its GPUs
        (4, 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, [3]),
        (2, 1, {"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, [2, 3]),
        (4, 3, {"CUDA_VISIBLE_DEVICES": "3"}, None),  # the launcher has bound one GPU to each process
        (4, 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
        (4, 3, {"CUDA_VISIBLE_DEVICES": "0,1,2,3", "JAX_PLATFORMS": "cpu"}, None),
    ],
)
def test_gpus_of_a_process(
    local_count: int, local_index: int, environ: dict[str, str], expected: list[int] | None
) -> None:
    processes = Processes("SLURM", "a:1", 8, local_index, local_count, local_index)
    assert local_gpus(processes, environ) == expected


def test_gpus_that_are_not_divisible() -> None:
    with pytest.raises(ValueError, match="3 GPUs are not divisible by the 2 processes of this host"):
        local_gpus(Processes("SLURM", "a:1", 2, 0, 2, 0), {"CUDA_VISIBLE_DEVICES": "0,1,2"})


def test_the_exit_code_is_69_when_other_processes_do_not_connect(
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
    assert "TCLIP_START_TIMEOUT is 'soon': it must be a whole number of seconds" in capsys.readouterr().err


@pytest.fixture
def one_of_two(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Makes this process 1 of 2; lists the calls of jax.distributed and the exit code registered with atexit."""
    calls: list[object] = []
    monkeypatch.setattr(module, "find_processes", lambda: Processes("TCLIP_*", "a:1", 2, 1))
    monkeypatch.setattr(module, "meet", lambda *_: calls.append("meet"))
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: calls.append("initialize"))
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: calls.append("shutdown"))
    monkeypatch.setattr(module.atexit, "register", lambda _, code: calls.append(code))
    yield calls
    jax.config.update("jax_enable_preemption_service", True)


@pytest.mark.parametrize(
    ("error", "raises", "ending"),
    [
        (None, None, "shutdown"),
        (SystemExit(75), SystemExit, "shutdown"),  # all processes exit together
        (agreed(ValueError("too many bad samples")), ValueError, "shutdown"),  # raised by all processes
        (ValueError("config has no 'stepz'"), ValueError, 2),
        (OSError("disk full"), OSError, 2),
        (KeyboardInterrupt(), KeyboardInterrupt, 130),
        (TypeError("a bug"), TypeError, 1),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer [127.0.0.1]:101"), LostProcess, 69),
        (RuntimeError("UNAVAILABLE: Task 1 heartbeat timeout"), LostProcess, 69),
        (RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate"), RuntimeError, 1),
    ],
)
def test_what_the_end_of_the_block_does(
    error: BaseException | None, raises: type[BaseException] | None, ending: object, one_of_two: list[object]
) -> None:
    if error is None:
        with distributed():
            pass
    else:
        with pytest.raises(raises or BaseException) as raised, distributed():
            raise error
        assert type(raised.value) is raises
        assert ending == "shutdown" or exit_code(raised.value) == ending
    assert one_of_two == ["meet", "initialize", ending]


@pytest.fixture
def address() -> str:
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def meet_all(
    address: str,
    indices: Sequence[int],
    *,
    count: int = 3,
    timeout: float = 20,
    delays: Sequence[float] = (),
    **versions: str,
) -> dict[int, BaseException | None]:
    """Starts `meet` in a thread per process; returns the error of each process, or None."""
    outcomes: dict[int, BaseException | None] = {}

    def run(index: int, delay: float) -> None:
        time.sleep(delay)
        try:
            version = versions.get(f"versions_{index}", "tclip-jax 1")
            meet(Processes("TCLIP_*", address, count, index), timeout, version)
            outcomes[index] = None
        except (ValueError, OSError) as error:
            outcomes[index] = error

    waits = [*delays, *[0.0] * len(indices)]
    threads = [threading.Thread(target=run, args=each) for each in zip(indices, waits, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("delays", [(0, 0, 0), (0.3, 0, 0), (0, 0, 0.3)])
def test_processes_meet_in_any_order_and_release_the_port(address: str, delays: Sequence[float]) -> None:
    assert meet_all(address, (0, 1, 2), delays=delays) == {0: None, 1: None, 2: None}
    assert meet_all(address, (0, 1, 2)) == {0: None, 1: None, 2: None}


def test_process_0_names_the_missing_one_and_all_give_up(address: str) -> None:
    outcomes = meet_all(address, (0, 1), timeout=1)
    assert isinstance(outcomes[0], LostProcess) and isinstance(outcomes[1], LostProcess)
    assert str(outcomes[0]) == (
        f"process 0 of 3 (TCLIP_*) waited 1 s at {address}: 2 of 3 processes connected, not process 2: check their "
        "logs, and whether they can reach this address; TCLIP_START_TIMEOUT=SECONDS waits longer"
    )
    assert "process 1 of 3 (TCLIP_*) waited 1 s" in str(outcomes[1])


def test_without_process_0_the_address_is_named(address: str) -> None:
    outcomes = meet_all(address, (1,), timeout=0)
    assert "process 0 does not answer ([Errno 111] Connection refused): check its log" in str(outcomes[1])
    outcomes = meet_all("no-such-host.invalid:1", (1,), timeout=0)
    assert "process 0 does not answer ([Errno -" in str(outcomes[1])


def test_different_versions_are_refused_by_both(address: str) -> None:
    outcomes = meet_all(address, (0, 1), count=2, versions_1="tclip-jax 2")
    expected = "process 1 has tclip-jax 2, process 0 has tclip-jax 1: all processes must have the same"
    assert [str(outcomes[i]) for i in (0, 1)] == [expected] * 2
    assert all(isinstance(error, ValueError) for error in outcomes.values())


def test_a_foreign_client_at_the_port_is_ignored(address: str) -> None:
    host, _, port = address.partition(":")

    def visit() -> None:
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"tclip": "x", "index": []}\n', b"\xff\n"):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(word)

    timer = threading.Timer(0.3, visit)
    timer.start()
    assert meet_all(address, (0, 1, 2), delays=(0, 0.6, 0.6)) == {0: None, 1: None, 2: None}
    timer.join()


def test_a_foreign_server_at_the_port_is_named() -> None:
    with socket.create_server(("localhost", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        threading.Thread(target=answer, daemon=True).start()
        outcomes = meet_all(f"localhost:{server.getsockname()[1]}", (1,), timeout=0)
    assert "the answer is not from process 0 of this run: another program may use the port" in str(outcomes[1])
