from __future__ import annotations

import os
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from tests.programs import variables_of_ranks
from tests.ranks import NO_GROUP, Ranks
from worm_dist.distributed import launchers
from worm_dist.distributed.device_choice import Backend
from worm_dist.distributed.init import RankInfo, process_group
from worm_dist.distributed.slurm import first_host
from worm_dist.errors import BackendError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
MEETING = {"MASTER_ADDR": "node7", "MASTER_PORT": "29400"}
SRUN = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_STEP_NODELIST": "rack[07-08,11]n3,node12",
    "SLURM_JOB_ID": "1000",
    "SLURM_STEP_ID": "2",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
HYDRA = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}
FORGOTTEN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}


def test_a_plain_process_is_a_world_of_one() -> None:
    assert RankInfo.from_environment({}) == RankInfo(rank=0, world_size=1, local_rank=0)


def test_torchrun_says_where_a_process_is() -> None:
    rank_info = RankInfo(5, 8, 1, local_world_size=2, address="node7", port=29400)
    assert RankInfo.from_environment(TORCHRUN | MEETING) == rank_info
    more = {"LOCAL_WORLD_SIZE": "4"}
    assert RankInfo.from_environment(TORCHRUN | MEETING | more).local_world_size == 4


def test_deepspeed_counts_the_ranks_of_a_host_by_another_name() -> None:
    rank_info = RankInfo.from_environment(TORCHRUN | MEETING | {"LOCAL_SIZE": "4"})
    assert rank_info.local_world_size == 4


def test_srun_says_where_a_task_is() -> None:
    """Rank zero is on the first host of the step.  ``SLURM_LAUNCH_NODE_IPADDR`` is where srun was
    called, which may be a login node that runs no task."""
    environment = SRUN | {"SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1"}
    rank_info = RankInfo(
        5, 7, 1, local_world_size=3, address="rack07n3", port=20000 + 16002 % 12000
    )
    assert RankInfo.from_environment(environment) == rank_info
    assert RankInfo.from_environment(environment | MEETING).address == "node7"
    assert RankInfo.from_environment(environment | MEETING).port == 29400


def test_steps_and_jobs_side_by_side_meet_at_different_ports() -> None:
    neighbours = [
        SRUN | {"SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)}
        for job in range(700)
        for step in range(16)
    ]
    ports = {RankInfo.from_environment(environment).port for environment in neighbours}
    assert len(ports) == len(neighbours)
    assert min(ports) >= 20000 and max(ports) < 32000


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[003-007,12]", "node003"),
        ("a[1,3]b[08-10]-ib,c", "a1b08-ib"),
        ("gpu-a.cluster.org,gpu-b.cluster.org", "gpu-a.cluster.org"),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_shell_of_a_batch_script_is_no_task() -> None:
    """sbatch and salloc describe the allocation in their shells too; only srun starts tasks."""
    shell = {key: value for key, value in SRUN.items() if "STEP" not in key}
    assert RankInfo.from_environment(shell | {"SLURM_NTASKS": "7"}) == RankInfo(0, 1, 0)


@pytest.mark.parametrize(
    ("environment", "launcher"),
    [
        ({}, None),
        (SRUN, launchers.SRUN),
        (OPEN_MPI, launchers.OPEN_MPI),
        (HYDRA, launchers.HYDRA),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, launchers.HYDRA),
        (SRUN | {"PMI_RANK": "5", "PMI_SIZE": "7"}, launchers.SRUN),  # srun --mpi=pmi2
        (SRUN | HYDRA, launchers.HYDRA),  # its helpers were started by srun
        (SRUN | OPEN_MPI, launchers.OPEN_MPI),
        (SRUN | OPEN_MPI | TORCHRUN, launchers.TORCHRUN),
    ],
)
def test_the_innermost_launcher_counts(
    environment: dict[str, str], launcher: launchers.Launcher | None
) -> None:
    assert launchers.started_by(environment) == launcher


@pytest.mark.parametrize("around", [SRUN, OPEN_MPI, HYDRA])
def test_torchrun_and_deepspeed_may_run_below_another_launcher(around: dict[str, str]) -> None:
    """They run once on each host, so their ranks are not those around them."""
    for sign in ({"TORCHELASTIC_RUN_ID": "x"}, {"CROSS_SIZE": "4", "LOCAL_SIZE": "2"}):
        assert RankInfo.from_environment(around | TORCHRUN | MEETING | sign).rank == 5


@pytest.mark.parametrize("around", [SRUN, OPEN_MPI, HYDRA])
def test_one_process_of_another_launcher_may_start_ranks(around: dict[str, str]) -> None:
    """A shell that ``srun --pty`` started, in which somebody calls launch/netlab."""
    alone = {key: "1" if key.endswith(("SIZE", "NUM_TASKS")) else "0" for key in around}
    assert RankInfo.from_environment(around | alone | TORCHRUN | MEETING).rank == 5


@pytest.mark.parametrize("around", [SRUN, OPEN_MPI, HYDRA])
@pytest.mark.fault(21, "a forgotten export below mpirun or srun")
def test_a_forgotten_export_is_not_believed(around: dict[str, str]) -> None:
    """Every process would have been rank zero of a world of one, each writing the same files."""
    with pytest.raises(BackendError, match=r"RANK=0, WORLD_SIZE=1, but .* says .*unset RANK"):
        RankInfo.from_environment(around | FORGOTTEN)


def test_a_wrapper_may_say_what_srun_says() -> None:
    agreeing = {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1"}
    assert RankInfo.from_environment(SRUN | agreeing | MEETING).rank == 5


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "RANK set, but not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        (TORCHRUN, "LOCAL_RANK set, but not MASTER_ADDR, MASTER_PORT; start with torchrun"),
        (TORCHRUN | MEETING | {"RANK": "8"}, "RANK 8 is not below WORLD_SIZE 8"),
        (TORCHRUN | MEETING | {"RANK": "-1"}, "RANK -1 is not below"),
        (TORCHRUN | MEETING | {"LOCAL_WORLD_SIZE": "1"}, "LOCAL_RANK 1 is not below LOCAL_WORLD"),
        (TORCHRUN | MEETING | {"RANK": "x"}, "RANK='x': expected a whole number"),
        (TORCHRUN | MEETING | {"MASTER_PORT": "http"}, "MASTER_PORT='http': expected a whole"),
        (TORCHRUN | MEETING | {"MASTER_PORT": "70000"}, "MASTER_PORT 70000 is no port"),
        ({key: SRUN[key] for key in SRUN if key != "SLURM_LOCALID"}, "without SLURM_LOCALID;"),
        (SRUN | {"SLURM_JOB_ID": "x"}, "SLURM_JOB_ID='x': expected a whole number"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2"}, "PER_NODE='2' does not say .* node 2 has"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "many"}, "PER_NODE='many' does not say"),
    ],
)
@pytest.mark.fault(21, "numbers that are missing, wrong or contradict")
def test_contradictory_launchers_are_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        RankInfo.from_environment(environment)


def test_mpirun_without_mpi4py_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    for environment in (OPEN_MPI, HYDRA):
        with pytest.raises(BackendError, match=r"install the extra worm_dist\[mpi\]"):
            RankInfo.from_environment(environment)


def test_the_mpi_of_another_mpirun_is_named() -> None:
    """MPICH would have aborted the process; Open MPI would have made each rank a world of one."""
    pytest.importorskip("mpi4py")
    said = []
    for mpirun in (OPEN_MPI, HYDRA):
        with pytest.raises(BackendError, match="set MPI4PY_LIBMPI") as caught:
            RankInfo.from_environment({**os.environ, **mpirun})
        said.append(str(caught.value))
    # One of them is foreign to the library; the other one is not really there.
    assert sum("mpi4py has loaded" in text for text in said) == 1
    assert not any("\n" in text for text in said)


def test_an_mpi_that_does_not_load_is_one_line() -> None:
    pytest.importorskip("mpi4py")
    environment = {**os.environ, **HYDRA, "MPI4PY_LIBMPI": "/nowhere/libmpi.so"}
    with pytest.raises(BackendError, match=r"/nowhere/libmpi.so.*; set MPI4PY_LIBMPI") as caught:
        RankInfo.from_environment(environment)
    assert "\n" not in str(caught.value)


@pytest.mark.fault(21, "a port that another program has")
def test_a_port_in_use_is_named_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        rank_info = RankInfo(0, 2, 0, address="127.0.0.1", port=port)
        says = rf"127\.0\.0\.1:{port}, the port is in use; set MASTER_PORT"
        with pytest.raises(BackendError, match=says), process_group(rank_info, "gloo", 5):
            pass


def _told_by_the_group() -> dict[str, str]:
    with process_group(RankInfo(0, 1, 0), "auto", timeout_seconds=5):
        told = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    assert "RANK" not in os.environ
    return told


def test_in_a_group_the_environment_speaks_as_torchrun_does(ranks: Ranks) -> None:
    """DeepSpeed reads LOCAL_RANK there, whoever started the process."""
    assert ranks(NO_GROUP, _told_by_the_group) == [FORGOTTEN]


def _alone() -> tuple[str, int, str]:
    with process_group(RankInfo(0, 1, 0), "auto", timeout_seconds=5) as device:
        return dist.get_backend(), dist.get_world_size(), device.type


def test_one_process_meets_itself_without_a_port(ranks: Ranks) -> None:
    assert ranks(NO_GROUP, _alone) == [("gloo", 1, "cpu")]


def test_nccl_without_a_gpu_is_refused() -> None:
    if torch.cuda.device_count():
        pytest.skip("there is one")
    with (
        pytest.raises(BackendError, match=r"nccl needs a GPU for each rank, but .* has 0 GPU"),
        process_group(RankInfo(0, 1, 0), "nccl", timeout_seconds=5),
    ):
        pass


def _meet(rank_info: RankInfo, backend: Backend = "auto") -> tuple[str, str, float]:
    """What a rank comes to: its error, or the device and the handling of errors by nccl."""
    began = time.monotonic()
    try:
        with process_group(rank_info, backend, timeout_seconds=20) as device:
            handling = os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]
            return device.type, handling, time.monotonic() - began
    except BackendError as error:
        return str(error), "", time.monotonic() - began


def _meet_with_gpus(port: int, rank: int, gpus: int) -> tuple[str, str, float]:
    vars(torch.cuda)["device_count"] = lambda: gpus
    vars(torch.cuda)["get_device_properties"] = lambda index: SimpleNamespace(
        uuid=f"{rank}.{index}"
    )
    vars(socket)["gethostname"] = lambda: f"node{rank}"
    return _meet(RankInfo(rank, 2, 0, 1, "127.0.0.1", port))


def _on_two_hosts(ranks: Ranks, *gpus: int) -> list[tuple[str, str, float]]:
    port = int(variables_of_ranks(2)[0]["MASTER_PORT"])
    with ThreadPoolExecutor(2) as pool:
        calls = [
            pool.submit(ranks, NO_GROUP, _meet_with_gpus, port, rank, number)
            for rank, number in enumerate(gpus)
        ]
        return [call.result()[0] for call in calls]


@pytest.mark.fault(22, "hosts with and without GPUs")
def test_hosts_with_and_without_gpus_are_told_at_once(ranks: Ranks) -> None:
    """One waited in nccl for the other, which waited in gloo, for a quarter of an hour."""
    for said, _, seconds in _on_two_hosts(ranks, 4, 0):
        assert "others have not: node1 has 0 GPUs for 1 rank, but node0 has 4 GPUs for 1" in said
        assert seconds < 15


def test_the_monitor_is_faster_than_nccl(ranks: Ranks) -> None:
    """nccl's own watchdog ended a process before the monitor had said which other one was gone."""
    assert [met[:2] for met in _on_two_hosts(ranks, 0, 0)] == [("cpu", "0")] * 2
