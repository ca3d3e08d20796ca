"""GPUs or CPUs, by what every rank sees of its host."""

from __future__ import annotations

import pytest

from worm_dist.distributed.device_choice import Backend, Place, trains_on_gpus
from worm_dist.errors import BackendError


def _host(name: str, ranks: int, gpus: int) -> list[Place]:
    """Every rank sees all GPUs of the host."""
    seen = tuple(f"{name}.{index}" for index in range(gpus))
    return [Place(name, rank, ranks, seen) for rank in range(ranks)]


def _bound(name: str, ranks: int) -> list[Place]:
    """The launcher shows every rank its own GPU only."""
    return [Place(name, rank, ranks, (f"{name}.{rank}",)) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("places", "on_gpus"),
    [
        (_host("a", 2, 0), False),
        (_host("a", 2, 2), True),
        (_host("a", 2, 4), True),
        (_host("a", 1, 1) + _host("b", 4, 4), True),
        (_bound("a", 4) + _bound("b", 2), True),
        (_bound("a", 2) + _host("b", 2, 2), True),
        # Two ranks on one GPU: nccl refuses that.
        (_host("a", 2, 1), False),
        (_host("a", 3, 2), False),
        # A launcher that does not say how many ranks a host has: at least as many as came so far.
        ([Place("a", rank, rank + 1, ("a.0",)) for rank in range(2)], False),
    ],
)
def test_gpus_are_used_if_every_rank_has_its_own(places: list[Place], on_gpus: bool) -> None:
    assert trains_on_gpus("auto", places) == on_gpus
    assert not trains_on_gpus("gloo", places)


def test_a_rank_that_sees_one_gpu_takes_that() -> None:
    """Every process had one visible GPU, took it for too few, and all trained on CPUs."""
    assert [place.gpu_index for place in _bound("a", 3)] == [0, 0, 0]
    assert [place.gpu_index for place in _host("a", 3, 3)] == [0, 1, 2]
    assert [place.gpu_index for place in _host("a", 3, 2)] == [None] * 3


@pytest.mark.parametrize(
    ("backend", "places", "says"),
    [
        (
            "auto",
            _host("a", 4, 4) + _host("b", 4, 0),
            "others have not: b has 0 GPUs for 4 ranks, but a has 4 GPUs for 4 ranks; start as",
        ),
        (
            "auto",
            _host("a", 1, 1) + _host("b", 2, 1),
            "b has 1 GPU for 2 ranks, but a has 1 GPU for 1 rank",
        ),
        (
            "nccl",
            _host("a", 2, 2) + _host("b", 2, 1),
            "for each rank, but b has 1 GPU for 2 ranks;",
        ),
        ("nccl", _bound("a", 2) + _host("b", 1, 0), "for each rank, but b has 0 GPUs for 1 rank;"),
    ],
)
def test_hosts_that_differ_are_named(backend: Backend, places: list[Place], says: str) -> None:
    with pytest.raises(BackendError, match=r"^distributed\.backend: ") as caught:
        trains_on_gpus(backend, places)
    assert says in str(caught.value)


def test_of_many_hosts_some_are_named() -> None:
    places = [place for number in range(200) for place in _host(f"node{number}", 8, 0)]
    with pytest.raises(BackendError, match="node7 has 0 GPUs for 8 ranks, 192 more hosts likewise"):
        trains_on_gpus("nccl", places)


def test_a_place_is_told_to_other_ranks() -> None:
    place = Place("node7", 1, 4, ("GPU-1", "GPU-2"))
    assert Place.from_text(place.text) == place
