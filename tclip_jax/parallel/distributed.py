"""Several processes as one run: they wait for each other by name, and leave without waiting for who cannot come.

jax's own wait ends a process by a signal when it has lasted too long, without a word on who was missing.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
import pathlib
import re
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import jax

from tclip_jax.parallel.agreement import is_agreed
from tclip_jax.parallel.processes import Processes, find_processes

_ANSWER = 5.0  # seconds in which who is there answers


class LostProcess(OSError):
    """Another process did not come, or is gone: worth another try."""

    exit_code = 69  # EX_UNAVAILABLE


def meet(processes: Processes, timeout: float, versions: str) -> None:
    """Waits until all processes have connected to process 0, which listens only for that time.

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


_LOST = r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
_BY_WHAT = r"Gloo|NCCL|heartbeat|[Cc]oordination|[Pp]eer|Socket closed"

_logger = logging.getLogger(__name__)


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Connects this process with the others of its run for a block; does nothing where it is the only one.

    Must be entered before jax looks for devices. After an error in the block the program ends without waiting for the
    others, who may be waiting for this one: they are told by their connections. One that all raise is waited for.

    Raises:
      LostProcess: the others did not come in time, or one went away during the block.
      ValueError: the environment contradicts itself, or the processes have different versions.
    """
    processes = find_processes()
    if processes is None:
        yield
        return
    gpus = local_gpus(processes)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tclip-jax", "jax", "jaxlib"))
    if processes.index == 0:
        _logger.info("waiting for %d processes (%s) at %s", processes.count, processes.launcher, processes.coordinator)
    meet(processes, _start_timeout(), versions)
    # It would take SIGTERM, and with it end nothing that does not ask jax at every step.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        processes.coordinator,
        processes.count,
        processes.index,
        local_device_ids=gpus,
        cluster_detection_method="deactivate",
    )
    try:
        yield
    except SystemExit:
        jax.distributed.shutdown()  # decided together
        raise
    except BaseException as error:
        if is_agreed(error):
            jax.distributed.shutdown()
            raise
        lost = _lost(error)
        # jax's own way out waits for the others, and ends in a signal when they do not come.
        atexit.register(_leave, exit_code(lost or error))
        if lost:
            raise lost from error
        raise
    jax.distributed.shutdown()


def local_gpus(processes: Processes, environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """The GPUs of this process, as indices into those it sees; None for all of them.

    A launcher lets the processes of a host see either all its GPUs, and then each takes its share, or one GPU each.

    Raises:
      ValueError: the GPUs of the host do not divide over its processes.
    """
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    gpus = sum(1 for _ in pathlib.Path("/dev").glob("nvidia[0-9]*")) if visible is None else len(visible.split(","))
    if environ.get("JAX_PLATFORMS") == "cpu" or "JAX_LOCAL_DEVICE_IDS" in environ:
        return None
    if processes.local_count == 1 or gpus <= 1:
        return None
    if gpus % processes.local_count:
        raise ValueError(f"{gpus} GPUs are not divisible by the {processes.local_count} processes of this host")
    share = gpus // processes.local_count
    return list(range(processes.local_index * share, (processes.local_index + 1) * share))


def exit_code(error: BaseException) -> int:
    """Of a program that the error ends: its own, 130 after Ctrl-C, 2 for what is told in a line, else 1."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else 1)


def _lost(error: BaseException) -> LostProcess | None:
    """What a collective raises, as ValueError or RuntimeError, when a process that takes part in it is gone."""
    text = str(error)
    if isinstance(error, (ValueError, RuntimeError)) and re.match(_LOST, text) and re.search(_BY_WHAT, text):
        return LostProcess(f"another process is gone, see its log: {text.splitlines()[0][:300]}")
    return None


def _leave(code: int) -> None:
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_timeout() -> float:
    value = os.environ.get("TCLIP_START_TIMEOUT", "300")
    if not value.isdecimal():
        raise ValueError(f"TCLIP_START_TIMEOUT is {value!r}: it must be whole seconds")
    return float(value)
