"""Start and end of a run of several processes: a rendezvous before jax's own, and exits that do not wait for others.

Hand-written, because jax's rendezvous ends a process with SIGABRT when it times out, and does not name who is missing.
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

_ANSWER_SECONDS = 5.0  # to wait for the answer of a peer that is connected
# The errors of collectives whose peer has ended: a status code, and the library that reports it.
_LOST_CODE = r"(UNKNOWN|UNAVAILABLE|INTERNAL|ABORTED|CANCELLED|DEADLINE_EXCEEDED|FAILED_PRECONDITION): "
_LOST_SOURCE = r"Gloo|NCCL|heartbeat|[Cc]oordination|[Pp]eer|Socket closed"

_logger = logging.getLogger(__name__)


class LostProcess(OSError):
    """Another process did not connect, or ended. A restart may help."""

    exit_code = 69  # EX_UNAVAILABLE of sysexits.h


@contextlib.contextmanager
def distributed() -> Iterator[None]:
    """Connect the processes of a run for a block; do nothing for a single process.

    Enter it before jax initializes its devices. If the block raises an error that all processes raise, they shut down
    together. After any other error the program exits without waiting, since the other processes may wait for this
    one; they notice by their broken connections.

    Raises:
      LostProcess: another process did not connect in time, or ended during the block.
      ValueError: environment variables contradict each other, or the processes have different versions.
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
    # The service would catch SIGTERM, and only programs that poll jax at every step would then stop.
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
        jax.distributed.shutdown()  # all processes exit together
        raise
    except BaseException as error:
        if is_agreed(error):
            jax.distributed.shutdown()
            raise
        lost = _lost(error)
        # At exit jax would wait for the other processes, and abort when they do not come.
        atexit.register(_leave, exit_code(lost or error))
        if lost:
            raise lost from error
        raise
    jax.distributed.shutdown()


def meet(processes: Processes, timeout: float, versions: str) -> None:
    """Wait until all processes have connected to process 0, which listens at the coordinator's port meanwhile.

    Args:
      processes: the run, as this process knows it.
      timeout: seconds to wait.
      versions: software versions, which must be equal on all processes.

    Raises:
      LostProcess: a process did not connect in time; the message has the address, the missing processes and what to
        check.
      ValueError: another process has a different process count or different versions.
    """
    hello = {"tclip": versions, "count": processes.count, "index": processes.index}
    deadline = time.monotonic() + timeout
    problem = (_listen if processes.index == 0 else _connect)(processes, hello, deadline)
    if problem:
        raise LostProcess(
            f"process {processes.index} of {processes.count} ({processes.launcher}) waited {timeout:.0f} s at "
            f"{processes.coordinator}: {problem}; TCLIP_START_TIMEOUT=SECONDS waits longer"
        )


def _listen(processes: Processes, hello: dict[str, Any], deadline: float) -> str:
    """Accept connections until every process knows that all have connected; return the problem at the deadline."""
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
                connected = f"{processes.count - len(missing)} of {processes.count} processes connected"
                return (
                    f"{connected}, not {_named(missing or unaware)}: check their logs, and whether they can reach "
                    "this address"
                )
            with connection:
                message = _receive(connection)
                if "tclip" not in message or not isinstance(message.get("index"), int):
                    continue  # not a process of tclip
                mismatch = _mismatch(message, hello)
                missing.discard(message["index"])
                try:
                    _send(connection, {"error": mismatch} if mismatch else {"missing": sorted(missing)})
                except OSError:
                    continue  # the peer connects again, or has ended
            if mismatch:
                raise ValueError(mismatch)
            if not missing:
                unaware.discard(message["index"])
    return ""


def _connect(processes: Processes, hello: dict[str, Any], deadline: float) -> str:
    """Ask process 0 repeatedly until all have connected; return the problem at the deadline."""
    host, _, port = processes.coordinator.rpartition(":")
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=_ANSWER_SECONDS) as connection:
                _send(connection, hello)
                answer = _receive(connection)
        except OSError as error:
            problem = f"process 0 does not answer ({error}): check its log, and whether this host can reach that port"
        else:
            if "error" in answer:
                raise ValueError(answer["error"])
            if "missing" not in answer:
                problem = "the answer is not from process 0 of this run: another program may use the port"
            elif answer["missing"]:
                problem = f"process 0 answers, but not {_named(answer['missing'])}: check their logs"
            else:
                return ""
        if time.monotonic() > deadline:
            return problem
        time.sleep(0.2)


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """Return a JSON object sent as one line; {} if the peer sends something else or nothing."""
    try:
        connection.settimeout(_ANSWER_SECONDS)
        with connection.makefile("rb") as file:
            message = json.loads(file.readline(1 << 16))
    except (OSError, ValueError):
        return {}
    return message if isinstance(message, dict) else {}


def _mismatch(message: dict[str, Any], hello: dict[str, Any]) -> str:
    """Return how a peer's message contradicts that of process 0; "" if both belong to one run."""
    for key, text in (("count", "{} processes"), ("tclip", "{}")):
        if message.get(key) != hello[key]:
            theirs, ours = text.format(message.get(key)), text.format(hello[key])
            return f"process {message['index']} has {theirs}, process 0 has {ours}: all processes must have the same"
    return ""


def _named(indices: Collection[int]) -> str:
    """Return 'processes 3, 7, 9, ...'."""
    first = ", ".join(map(str, sorted(indices)[:8]))
    return f"process{'es' if len(indices) > 1 else ''} {first}{', ...' if len(indices) > 8 else ''}"


def local_gpus(processes: Processes, environ: Mapping[str, str] = os.environ) -> list[int] | None:
    """Return the GPUs that this process uses, as indices into the visible ones; None for all of them.

    Launchers make either all GPUs of a host visible to each of its processes, which then divide them, or one GPU to
    each process.

    Raises:
      ValueError: the number of GPUs is not divisible by the number of processes of the host.
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
    """Return the exit code for an error: its `exit_code`, 130 after Ctrl-C, 2 for ValueError and OSError, else 1."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return getattr(error, "exit_code", 2 if isinstance(error, (ValueError, OSError)) else 1)


def _lost(error: BaseException) -> LostProcess | None:
    """Return `LostProcess` for the error of a collective whose peer has ended, otherwise None."""
    text = str(error)
    if isinstance(error, (ValueError, RuntimeError)) and re.match(_LOST_CODE, text) and re.search(_LOST_SOURCE, text):
        return LostProcess(f"another process has ended (see its log): {text.splitlines()[0][:300]}")
    return None


def _leave(code: int) -> None:
    """Exit at once; jax's exit handlers, registered before this one, do not run."""
    for child in multiprocessing.active_children():
        child.terminate()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _start_timeout() -> float:
    value = os.environ.get("TCLIP_START_TIMEOUT", "300")
    if not value.isdecimal():
        raise ValueError(f"TCLIP_START_TIMEOUT is {value!r}: it must be a whole number of seconds")
    return float(value)
