"""Detection of processes from the variables of launchers, compared with jax's own detection where it exists."""

from __future__ import annotations

import http.server
import pathlib
import threading
from collections.abc import Iterator

import jax
import pytest

from tclip_jax.parallel.processes import Processes, find_processes

SLURM = {
    "SLURM_JOB_ID": "4100",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],big1",
    "SLURM_STEP_NUM_TASKS": "17",
    "SLURM_NTASKS": "17",
    "SLURM_STEP_TASKS_PER_NODE": "4(x4),1",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "8",
    "OMPI_COMM_WORLD_RANK": "5",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
}
GKE = {"TPU_WORKER_HOSTNAMES": "host-a,host-b", "TPU_WORKER_ID": "1", "TPU_SKIP_MDS_QUERY": "true"}
SLICES = {"MEGASCALE_NUM_SLICES": "4", "MEGASCALE_SLICE_ID": "2", "MEGASCALE_COORDINATOR_ADDRESS": "first-host:8080"}
# jax sets this on a machine without a TPU.
NO_TPU = {"TPU_SKIP_MDS_QUERY": "1"}
EXPLICIT = {"TCLIP_COORDINATOR": "a:1", "TCLIP_NUM_PROCESSES": "4", "TCLIP_PROCESS_ID": "3"}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (EXPLICIT, Processes("TCLIP_*", "a:1", 4, 3)),
        (EXPLICIT | {"TCLIP_PROCESSES_PER_HOST": "2"} | SLURM, Processes("TCLIP_*", "a:1", 4, 3, 2, 1)),
        (SLURM | NO_TPU, Processes("SLURM", "gpu07:61444", 17, 6, 4, 2)),
        (SLURM | {"SLURM_STEP_ID": "3", "SLURM_STEP_NODELIST": "n1,n2"}, Processes("SLURM", "n1:61447", 17, 6, 4, 2)),
        (SLURM | {"TCLIP_COORDINATOR": "b:2"}, Processes("SLURM", "b:2", 17, 6, 4, 2)),
        # mpirun in a SLURM job: its processes inherit the variables of a step with one task per node.
        (OPEN_MPI | SLURM | NO_TPU, Processes("Open MPI", "10.96.0.1:62624", 8, 5, 4, 1)),
        (GKE, Processes("TPU", "host-a:8482", 2, 1)),
        (GKE | SLICES, Processes("TPU", "first-host:8482", 8, 5)),
        (GKE | {"TPU_PROCESS_ADDRESSES": "p:8471,q:8471,r:8471"}, Processes("TPU", "p:8482", 3, 1)),
    ],
)
def test_several_processes(environ: dict[str, str], expected: Processes) -> None:
    assert find_processes(environ) == expected


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"TCLIP_COORDINATOR": "a:1", "TCLIP_NUM_PROCESSES": "1", "TCLIP_PROCESS_ID": "0"},
        {"TCLIP_PROCESSES_PER_HOST": "4"},
        {"SLURM_JOB_ID": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"},  # srun -n 1, or an interactive step
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},  # sbatch without srun
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"},
        GKE | {"JAX_PLATFORMS": "cpu"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_one_process(environ: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    assert find_processes(environ | NO_TPU) is None
    assert ("SLURM has 8 tasks, but runs one process: start it with srun" in caplog.text) == (
        environ.get("SLURM_NTASKS") == "8"
    )


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"TCLIP_COORDINATOR": "a:1"}, "TCLIP_COORDINATOR is set: set TCLIP_NUM_PROCESSES and TCLIP_PROCESS_ID too"),
        ({"TCLIP_PROCESS_ID": "0"}, "TCLIP_COORDINATOR, TCLIP_NUM_PROCESSES and TCLIP_PROCESS_ID: set all of them"),
        (EXPLICIT | {"TCLIP_PROCESS_ID": "4"}, r"TCLIP_\*: process 4 of 4: indices start at 0"),
        (EXPLICIT | {"TCLIP_NUM_PROCESSES": "two"}, "TCLIP_NUM_PROCESSES is 'two': it must be a whole number"),
        (EXPLICIT | {"TCLIP_COORDINATOR": "a"}, "the coordinator is 'a': it must be HOST:PORT"),
        (
            OPEN_MPI | {"OMPI_MCA_orte_hnp_uri": ""},
            "Open MPI 5 does not publish the address of process 0: use mpirun -x TCLIP_COORD",
        ),
    ],
)
def test_invalid_variables_are_named(environ: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_processes(environ | NO_TPU)


@pytest.fixture
def metadata() -> Iterator[dict[str, str]]:
    """The answers of a TPU VM's metadata server, by name; "address" is its address."""
    values: dict[str, str] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            value = values.get(self.path.rpartition("/")[2])
            known = value is not None and self.headers["Metadata-Flavor"] == "Google"
            self.send_response(200 if known else 404)
            self.end_headers()
            self.wfile.write((value or "").encode())

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        values["address"] = f"127.0.0.1:{server.server_address[1]}"
        yield values
        server.shutdown()


@pytest.mark.parametrize(
    ("attributes", "expected"),
    [
        ({"worker-network-endpoints": "10.0.0.2"}, None),
        ({"worker-network-endpoints": "10.0.0.2,10.0.0.3,10.0.0.4,10.0.0.5"}, ("10.0.0.2:8482", 4, 3)),
        ({"worker-network-endpoints": "a:0:10.0.0.2,b:1:10.0.0.3,c:2:10.0.0.4,d:3:10.0.0.5"}, ("10.0.0.2:8482", 4, 3)),
        (
            {
                "worker-network-endpoints": "10.0.0.6,10.0.0.7,10.0.0.8,10.0.0.9",
                "tpu-env": "ZONE: 'z'\nMEGASCALE_COORDINATOR_ADDRESS: '10.0.0.2:8080'\nMEGASCALE_NUM_SLICES: '2'\n"
                "MEGASCALE_SLICE_ID: '1'\n",
            },
            ("10.0.0.2:8482", 8, 7),
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:'maxsplit' is passed as positional argument")  # by jax itself
def test_tpu_vm(
    attributes: dict[str, str],
    expected: tuple[str, int, int] | None,
    metadata: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    worker = "0" if expected is None else "3"
    metadata |= {"agent-worker-number": worker, "tpu-env": "ACCELERATOR_TYPE: 'v5litepod-16'\n"} | attributes
    processes = find_processes({"GCE_METADATA_IP": metadata["address"]})
    assert processes == (None if expected is None else Processes("TPU", *expected))
    if expected:
        clusters = pytest.importorskip("jax._src.clusters")
        monkeypatch.setenv("GCE_METADATA_IP", metadata["address"])
        assert oracle(clusters.GceTpuCluster, monkeypatch) == expected


def test_gke_with_a_file_of_hosts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "addresses"
    path.write_text("10.0.0.2,10.0.0.3\n")
    environ = {"TPU_PROCESS_ADDRESSES_PATH": str(path), "TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "not,these,ones"}
    assert find_processes(environ) == Processes("TPU", "10.0.0.2:8482", 2, 1)
    clusters = pytest.importorskip("jax._src.clusters")
    if jax.__version_info__ >= (0, 12):
        megascale = {"NUM_SLICES": "1", "SLICE_ID": "0", "COORDINATOR_ADDRESS": "10.0.0.2"}
        for name, value in (environ | {f"MEGASCALE_{key}": value for key, value in megascale.items()}).items():
            monkeypatch.setenv(name, value)
        assert oracle(clusters.GkeTpuCluster, monkeypatch) == ("10.0.0.2:8482", 2, 1)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"addresses: the file is empty, it must list the hosts"):
        find_processes(environ)
    with pytest.raises(ValueError, match=r"TPU_PROCESS_ADDRESSES_PATH is .*nowhere: .*No such file"):
        find_processes(environ | {"TPU_PROCESS_ADDRESSES_PATH": str(tmp_path / "nowhere")})


def test_tpu_vm_with_unreadable_metadata(metadata: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"cannot read the TPU's worker-network-endpoints \(HTTP Error 404.*SKIP_MDS"):
        find_processes({"GCE_METADATA_IP": metadata["address"]})


def oracle(cluster: object, monkeypatch: pytest.MonkeyPatch) -> tuple[str, int, int]:
    """Returns what jax detects: coordinator, process count and index."""
    monkeypatch.setattr("socket.gethostbyname", lambda host: host)
    address = cluster.get_coordinator_address(timeout_secs=1, override_coordinator_port=None)  # type: ignore[attr-defined]
    return address, cluster.get_process_count(), cluster.get_process_id()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("name", "environ"),
    [("SlurmCluster", SLURM), ("OmpiCluster", OPEN_MPI), ("GkeTpuCluster", GKE), ("GkeTpuCluster", GKE | SLICES)],
)
def test_jax_detects_the_same(name: str, environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    clusters = pytest.importorskip("jax._src.clusters")
    processes = find_processes(environ)
    assert processes is not None
    for variable, value in ({"MEGASCALE_NUM_SLICES": "1", "MEGASCALE_SLICE_ID": "0"} | environ).items():
        monkeypatch.setenv(variable, value)
    if "MEGASCALE_NUM_SLICES" not in environ:
        monkeypatch.setenv("MEGASCALE_COORDINATOR_ADDRESS", environ.get("TPU_WORKER_HOSTNAMES", "").split(",")[0])
    assert oracle(getattr(clusters, name), monkeypatch) == (processes.coordinator, processes.count, processes.index)
