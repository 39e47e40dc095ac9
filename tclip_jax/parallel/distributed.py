"""Several processes as one run: started only where there are several, and left without waiting for who cannot come."""

from __future__ import annotations

import atexit
import contextlib
import importlib.metadata
import logging
import multiprocessing
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping

import jax

from tclip_jax.parallel.failures import is_agreed
from tclip_jax.parallel.processes import Processes, find_processes
from tclip_jax.parallel.rendezvous import LostProcess, meet

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
