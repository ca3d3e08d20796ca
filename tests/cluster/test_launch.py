from __future__ import annotations

import pytest
import torch.distributed as dist

from tests.ranks import NO_GROUP, Ranks
from worm_dist.cluster.launch import Place, process_group
from worm_dist.errors import BackendError


def test_a_plain_process_is_a_world_of_one() -> None:
    assert Place.from_environment({}) == Place(rank=0, world_size=1, local_rank=0)


def test_torchrun_says_where_a_process_is() -> None:
    environment = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    place = Place(rank=5, world_size=8, local_rank=1, local_world_size=2)
    assert Place.from_environment(environment) == place
    environment["LOCAL_WORLD_SIZE"] = "4"
    assert Place.from_environment(environment).local_world_size == 4


@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"RANK": "0"}, "RANK set, but not WORLD_SIZE, LOCAL_RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK 2 is not below WORLD_SIZE 2"),
        ({"RANK": "x", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK='x'"),
    ],
)
def test_contradictory_launchers_are_named(environment: dict[str, str], says: str) -> None:
    with pytest.raises(BackendError, match=says):
        Place.from_environment(environment)


def test_all_processes_of_a_host_choose_the_same_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """With two processes and one GPU the first joined nccl, the second gloo."""
    environment = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
    place = Place.from_environment(environment)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    asked: list[str] = []

    def joined(backend: str, **_: object) -> None:
        asked.append(backend)
        raise RuntimeError("enough")

    monkeypatch.setattr(dist, "init_process_group", joined)
    with pytest.raises(BackendError, match="enough"), process_group(place, "auto", 5):
        pass
    assert asked == ["gloo"]


def _alone() -> tuple[str, int, str]:
    with process_group(Place(0, 1, 0), "auto", timeout_seconds=5) as device:
        return dist.get_backend(), dist.get_world_size(), device.type


def test_one_process_meets_itself_without_a_port(ranks: Ranks) -> None:
    assert ranks(NO_GROUP, _alone) == [("gloo", 1, "cpu")]


def test_nccl_without_a_gpu_is_refused() -> None:
    with (
        pytest.raises(BackendError, match="nccl needs a GPU for local rank 99"),
        process_group(Place(0, 1, 99), "nccl", timeout_seconds=5),
    ):
        pass
