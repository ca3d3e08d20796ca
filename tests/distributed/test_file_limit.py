"""The limit on open files, in processes of their own."""

from __future__ import annotations

import resource

import pytest

from tests.ranks import NO_GROUP, Ranks
from worm_dist.distributed.file_limit import require_file_descriptors
from worm_dist.errors import BackendError

Limits = tuple[int, int]


def _limits_after(rank: int, world_size: int, before: Limits) -> Limits | str:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
    try:
        require_file_descriptors(rank, world_size)
    except BackendError as error:
        return str(error)
    return resource.getrlimit(resource.RLIMIT_NOFILE)


@pytest.mark.fault(36, "the limit is raised as far as needed, and not beyond the hard limit")
@pytest.mark.parametrize(
    ("rank", "world_size", "before", "after"),
    [
        (0, 1000, (256, 10_000), (3064 + 1024, 10_000)),
        (7, 1000, (256, 10_000), (1064 + 1024, 10_000)),
        (0, 1000, (256, 3064), (3064, 3064)),
        (0, 1000, (9000, 10_000), (9000, 10_000)),
        (0, 1, (40, 40), (40, 40)),
    ],
)
def test_the_soft_limit_is_raised(
    ranks: Ranks, rank: int, world_size: int, before: Limits, after: Limits
) -> None:
    assert ranks(NO_GROUP, _limits_after, rank, world_size, before) == [after]


@pytest.mark.fault(36, "a hard limit that is too low: the message says what is needed")
@pytest.mark.parametrize(("rank", "needed"), [(0, 1264), (1, 464)])
def test_a_hard_limit_that_is_too_low_is_refused(ranks: Ranks, rank: int, needed: int) -> None:
    (said,) = ranks(NO_GROUP, _limits_after, rank, 400, (256, needed - 1))
    assert f"rank {rank} of 400 needs {needed} file descriptors" in said
    assert f"its hard limit is {needed - 1}; raise it" in said
