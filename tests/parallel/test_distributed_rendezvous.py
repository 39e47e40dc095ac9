"""Processes, which are threads here, that wait for each other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence

import pytest

from tclip_jax.parallel.distributed import LostProcess, meet
from tclip_jax.parallel.processes import Processes


@pytest.fixture
def address() -> str:
    with socket.create_server(("localhost", 0)) as server:
        return f"localhost:{server.getsockname()[1]}"


def together(
    address: str,
    indices: Sequence[int],
    *,
    count: int = 3,
    timeout: float = 20,
    delays: Sequence[float] = (),
    **of: str,
) -> dict[int, BaseException | None]:
    """What came of each process: the error, or None."""
    outcomes: dict[int, BaseException | None] = {}

    def go(index: int, delay: float) -> None:
        time.sleep(delay)
        try:
            versions = of.get(f"versions_{index}", "tclip-jax 1")
            meet(Processes("TCLIP_*", address, count, index), timeout, versions)
            outcomes[index] = None
        except (ValueError, OSError) as error:
            outcomes[index] = error

    waits = [*delays, *[0.0] * len(indices)]
    threads = [threading.Thread(target=go, args=each) for each in zip(indices, waits, strict=False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


@pytest.mark.parametrize("delays", [(0, 0, 0), (0.3, 0, 0), (0, 0, 0.3)])
def test_all_come_in_any_order_and_the_port_is_free_again(address: str, delays: Sequence[float]) -> None:
    assert together(address, (0, 1, 2), delays=delays) == {0: None, 1: None, 2: None}
    assert together(address, (0, 1, 2)) == {0: None, 1: None, 2: None}


def test_process_0_names_who_is_missing_and_so_do_the_others(address: str) -> None:
    outcomes = together(address, (0, 1), timeout=1)
    assert isinstance(outcomes[0], LostProcess) and isinstance(outcomes[1], LostProcess)
    assert str(outcomes[0]) == (
        f"process 0 of 3 (TCLIP_*) waited 1 s at {address}: 2 of 3 were there, not process 2: see their logs, and "
        "whether they reach this address; TCLIP_START_TIMEOUT=SECONDS waits longer"
    )
    assert "process 1 of 3 (TCLIP_*) waited 1 s" in str(outcomes[1])


def test_without_process_0_the_address_is_named(address: str) -> None:
    outcomes = together(address, (1,), timeout=0)
    assert "process 0 does not answer ([Errno 111] Connection refused): see its log" in str(outcomes[1])
    outcomes = together("no-such-host.invalid:1", (1,), timeout=0)
    assert "process 0 does not answer ([Errno -" in str(outcomes[1])


def test_other_counts_and_versions_are_contradictions(address: str) -> None:
    outcomes = together(address, (0, 1), count=2, versions_1="tclip-jax 2")
    expected = "process 1 has tclip-jax 2, process 0 has tclip-jax 1: it must be the same everywhere"
    assert [str(outcomes[i]) for i in (0, 1)] == [expected] * 2
    assert all(isinstance(error, ValueError) for error in outcomes.values())


def test_a_stranger_at_the_port_disturbs_nobody(address: str) -> None:
    host, _, port = address.partition(":")

    def visit() -> None:
        for word in (b"GET / HTTP/1.1\r\n\r\n", b"[]\n", b'{"tclip": "x", "index": []}\n', b"\xff\n"):
            with socket.create_connection((host, int(port)), timeout=5) as connection:
                connection.sendall(word)

    timer = threading.Timer(0.3, visit)
    timer.start()
    assert together(address, (0, 1, 2), delays=(0, 0.6, 0.6)) == {0: None, 1: None, 2: None}
    timer.join()


def test_another_program_at_the_port_is_told_from_process_0() -> None:
    with socket.create_server(("localhost", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n")

        threading.Thread(target=answer, daemon=True).start()
        outcomes = together(f"localhost:{server.getsockname()[1]}", (1,), timeout=0)
    assert "what answers is not process 0 of this run" in str(outcomes[1])
