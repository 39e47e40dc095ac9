"""Detection of a run's processes from the environment variables of its launcher.

Hand-written, because jax detects them only inside `jax.distributed.initialize`, whose wait neither names a missing
process nor ends with an exit code that launchers restart. Moreover, jax (0.10) does not detect Open MPI 5, believes
SLURM_NTASKS where a single task runs, and does not read GKE's TPU_PROCESS_ADDRESSES_PATH (jax 0.12 does).
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import urllib.request
from collections.abc import Mapping

_TPU_PORT = 8482  # jax's port on TPU pods, which their firewalls allow
_METADATA = "computeMetadata/v1/instance/attributes"

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Processes:
    """The processes of a run, and this one among them.

    Attributes:
      launcher: the source of these values, for messages.
      coordinator: HOST:PORT of process 0.
      count: number of processes.
      index: of this process, from 0.
      local_count: number of processes on this host, which share its GPUs.
      local_index: of this process among them, from 0.
    """

    launcher: str
    coordinator: str
    count: int
    index: int
    local_count: int = 1
    local_index: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count:
            raise ValueError(f"{self.launcher}: process {self.index} of {self.count}: indices start at 0")
        if not re.fullmatch(r".+:\d+", self.coordinator):
            raise ValueError(f"{self.launcher}: the coordinator is {self.coordinator!r}: it must be HOST:PORT")


def find_processes(environ: Mapping[str, str] = os.environ) -> Processes | None:
    """Return the processes of this run; None for a single process.

    Import jax before the call: on a machine without a TPU, that import sets TPU_SKIP_MDS_QUERY.

    Raises:
      ValueError: variables are missing or contradict each other, or a TPU's metadata cannot be read.
    """
    for detect in (_explicit, _open_mpi, _slurm, _gke, _tpu_vm):
        processes = detect(environ)
        if processes is not None:
            return processes if processes.count > 1 else None
    if environ.get("TCLIP_COORDINATOR"):
        raise ValueError("TCLIP_COORDINATOR is set: set TCLIP_NUM_PROCESSES and TCLIP_PROCESS_ID too, or none of them")
    return None


def _explicit(environ: Mapping[str, str]) -> Processes | None:
    names = ("TCLIP_NUM_PROCESSES", "TCLIP_PROCESS_ID")
    if not any(environ.get(name) for name in names):
        return None
    if not all(environ.get(name) for name in ("TCLIP_COORDINATOR", *names)):
        raise ValueError("TCLIP_COORDINATOR, TCLIP_NUM_PROCESSES and TCLIP_PROCESS_ID: set all of them, or none")
    count, index = (_number(environ, name) for name in names)
    local = _number(environ, "TCLIP_PROCESSES_PER_HOST", "1")
    return Processes("TCLIP_*", environ["TCLIP_COORDINATOR"], count, index, local, index % local)


def _open_mpi(environ: Mapping[str, str]) -> Processes | None:
    if environ.get("OMPI_COMM_WORLD_SIZE", "1") == "1":
        return None
    count, index, local_count, local_index = (
        _number(environ, f"OMPI_COMM_WORLD_{name}") for name in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")
    )
    coordinator = environ.get("TCLIP_COORDINATOR")
    if not coordinator:
        # "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911": the job's number in the upper bits, mpirun's addresses.
        uri = re.match(r"(\d+)\..*?tcp6?://(?:\[([^,\]]+)|([^,:]+))", environ.get("OMPI_MCA_orte_hnp_uri", ""))
        if not uri:
            raise ValueError(
                "Open MPI 5 does not publish the address of process 0: use mpirun -x TCLIP_COORDINATOR=HOST:PORT"
            )
        coordinator = f"{uri[3] or f'[{uri[2]}]'}:{_port(int(uri[1]) >> 12)}"
    return Processes("Open MPI", coordinator, count, index, local_count, local_index)


def _slurm(environ: Mapping[str, str]) -> Processes | None:
    # SLURM_NTASKS counts the tasks of the job: in `salloc` and `sbatch` it is above 1 although one process runs.
    if environ.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        if "SLURM_STEP_NUM_TASKS" not in environ and environ.get("SLURM_NTASKS", "1") != "1":
            _logger.warning("SLURM has %s tasks, but runs one process: start it with srun", environ["SLURM_NTASKS"])
        return None
    first = re.match(r"([^,\[]+)(?:\[([^],-]+))?", environ["SLURM_STEP_NODELIST"])
    assert first is not None, environ["SLURM_STEP_NODELIST"]
    # Steps of one job can run at the same time on one host.
    port = _port(_number(environ, "SLURM_JOB_ID") + _number(environ, "SLURM_STEP_ID", "0"))
    return Processes(
        "SLURM",
        environ.get("TCLIP_COORDINATOR", f"{first[1]}{first[2] or ''}:{port}"),
        _number(environ, "SLURM_STEP_NUM_TASKS"),
        _number(environ, "SLURM_PROCID"),
        _tasks_of_nodes(environ["SLURM_STEP_TASKS_PER_NODE"])[_number(environ, "SLURM_NODEID")],
        _number(environ, "SLURM_LOCALID"),
    )


def _gke(environ: Mapping[str, str]) -> Processes | None:
    if not _wants_tpu(environ):
        return None
    path = environ.get("TPU_PROCESS_ADDRESSES_PATH")
    hosts = _addresses(path) if path else environ.get("TPU_PROCESS_ADDRESSES") or environ.get("TPU_WORKER_HOSTNAMES")
    if not hosts:
        return None
    return _tpu(environ, hosts.split(","), _number(environ, "TPU_WORKER_ID", "0"))


def _addresses(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as file:
            addresses = file.read(1 << 20).strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"TPU_PROCESS_ADDRESSES_PATH is {path}: {error}") from None
    if not addresses:
        raise ValueError(f"TPU_PROCESS_ADDRESSES_PATH is {path}: the file is empty, it must list the hosts")
    return addresses


def _tpu_vm(environ: Mapping[str, str]) -> Processes | None:
    if "TPU_SKIP_MDS_QUERY" in environ or not _wants_tpu(environ):
        return None
    # Older runtimes list name:id:address of each host, newer ones its address.
    hosts = [host.split(":")[-1] for host in _metadata(environ, "worker-network-endpoints").split(",")]
    # A line is, for example, MEGASCALE_NUM_SLICES: '2'.
    slices = dict(re.findall(r"^(MEGASCALE_\w+): *'?([^'\n]*)'?", _metadata(environ, "tpu-env"), re.MULTILINE))
    return _tpu(slices | dict(environ), hosts, int(_metadata(environ, "agent-worker-number")))


def _tpu(environ: Mapping[str, str], hosts: list[str], worker: int) -> Processes:
    slices, index = _number(environ, "MEGASCALE_NUM_SLICES", "1"), _number(environ, "MEGASCALE_SLICE_ID", "0")
    first = (environ.get("MEGASCALE_COORDINATOR_ADDRESS") or hosts[0]).split(":")[0]
    port = environ.get("JAX_COORDINATOR_PORT", _TPU_PORT)
    coordinator = environ.get("TCLIP_COORDINATOR", f"{first}:{port}")
    return Processes("TPU", coordinator, len(hosts) * slices, index * len(hosts) + worker)


def _wants_tpu(environ: Mapping[str, str]) -> bool:
    platforms = environ.get("JAX_PLATFORMS", "")
    return not platforms or "tpu" in platforms


def _metadata(environ: Mapping[str, str], name: str) -> str:
    host = environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(f"http://{host}/{_METADATA}/{name}", headers={"Metadata-Flavor": "Google"})
    try:
        with urllib.request.urlopen(request, timeout=10) as response:
            return response.read().decode()
    except OSError as error:
        raise ValueError(
            f"{host}: cannot read the TPU's {name} ({error}): for a single host set TPU_SKIP_MDS_QUERY=1, for several "
            "set TCLIP_COORDINATOR, TCLIP_NUM_PROCESSES and TCLIP_PROCESS_ID"
        ) from None


def _tasks_of_nodes(compact: str) -> list[int]:
    """Return the tasks of each node: [4, 4, 2] for "4(x2),2"."""
    pairs = re.findall(r"(\d+)(?:\(x(\d+)\))?", compact)
    return [int(tasks) for tasks, times in pairs for _ in range(int(times or 1))]


def _port(job: int) -> int:
    """Return jax's port for a job: one of the last 4,096, equal on all hosts, different for consecutive jobs."""
    return 2**16 - 2**12 + job % 2**12


def _number(environ: Mapping[str, str], name: str, default: str | None = None) -> int:
    value = environ.get(name, default)
    if value is None or not value.isdecimal():
        raise ValueError(f"{name} is {value!r}: it must be a whole number")
    return int(value)
