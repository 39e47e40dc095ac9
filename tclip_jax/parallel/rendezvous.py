"""Processes wait for each other, so that one that does not come is named.

jax's own wait ends a process by a signal when it has lasted too long, without a word on who was missing.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Collection
from typing import Any

from tclip_jax.parallel.processes import Processes

_ANSWER = 5.0  # seconds in which who is there answers


class LostProcess(OSError):
    """Another process did not come, or is gone: worth another try."""

    exit_code = 69  # EX_UNAVAILABLE


def meet(processes: Processes, timeout: float, versions: str) -> None:
    """Returns when all processes are there; process 0 listens at its address meanwhile, and no longer.

    Args:
      timeout: seconds after which it is given up.
      versions: of software; all processes must have the same.

    Raises:
      LostProcess: not all came in time; one line with the address, who was there, and what to check.
      ValueError: another process has another count or other versions.
    """
    hello = {"tclip": versions, "count": processes.count, "index": processes.index}
    deadline = time.monotonic() + timeout
    state = (_listen if processes.index == 0 else _ask)(processes, hello, deadline)
    if state:
        raise LostProcess(
            f"process {processes.index} of {processes.count} ({processes.launcher}) waited {timeout:.0f} s at "
            f"{processes.coordinator}: {state}; TCLIP_START_TIMEOUT=SECONDS waits longer"
        )


def _listen(processes: Processes, hello: dict[str, Any], deadline: float) -> str:
    """Counts who comes until everyone has heard that all are there; what was wrong if the time is over before."""
    missing, unaware = set(range(1, processes.count)), set(range(1, processes.count))
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    port = int(processes.coordinator.rpartition(":")[2])
    with socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=1024) as server:
        while unaware:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                connection, _ = server.accept()
            except TimeoutError:
                there = f"{processes.count - len(missing)} of {processes.count} were there"
                return f"{there}, not {_named(missing or unaware)}: see their logs, and whether they reach this address"
            with connection:
                said = _receive(connection)
                if "tclip" not in said or not isinstance(said.get("index"), int):
                    continue  # a stranger
                wrong = _contradiction(said, hello)
                missing.discard(said["index"])
                try:
                    _send(connection, {"error": wrong} if wrong else {"missing": sorted(missing)})
                except OSError:
                    continue  # it is gone, or asks again
            if wrong:
                raise ValueError(wrong)
            if not missing:
                unaware.discard(said["index"])
    return ""


def _ask(processes: Processes, hello: dict[str, Any], deadline: float) -> str:
    """Asks process 0 until all are there; what was wrong if the time is over before."""
    host, _, port = processes.coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER) as connection:
                _send(connection, hello)
                answer = _receive(connection)
        except OSError as error:
            state = f"process 0 does not answer ({error}): see its log, and whether this host reaches that port"
        else:
            if "error" in answer:
                raise ValueError(answer["error"])
            if "missing" not in answer:
                state = "what answers is not process 0 of this run, or not yet: another program may have the port"
            elif answer["missing"]:
                state = f"process 0 was there, and missed {_named(answer['missing'])}: see their logs"
            else:
                return ""
        if time.monotonic() > deadline:
            return state
        time.sleep(0.2)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """A line of JSON; {} if none comes, or another thing."""
    try:
        connection.settimeout(_ANSWER)
        with connection.makefile("rb") as file:
            said = json.loads(file.readline(1 << 16))
    except (OSError, ValueError):
        return {}
    return said if isinstance(said, dict) else {}


def _contradiction(said: dict[str, Any], own: dict[str, Any]) -> str:
    """What two processes of one run cannot both say."""
    for key, what in (("count", "{} processes"), ("tclip", "{}")):
        if said.get(key) != own[key]:
            others, ours = what.format(said.get(key)), what.format(own[key])
            return f"process {said['index']} has {others}, process 0 has {ours}: it must be the same everywhere"
    return ""


def _named(indices: Collection[int]) -> str:
    """'processes 3, 7, 9, ...'"""
    first = ", ".join(map(str, sorted(indices)[:8]))
    return f"process{'es' if len(indices) > 1 else ''} {first}{', ...' if len(indices) > 8 else ''}"
