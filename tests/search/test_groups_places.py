"""Where channels are behind what moves them: splits, shuffles, paddings, views."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.nets import random_images
from worm_dist import ConfigError
from worm_dist.groups.channel_groups import Groups
from worm_dist.pruning.exactness import find_drawable_groups


class _Net(nn.Module):
    """``first`` makes 12 channels, the test moves them, and ``second`` reads them."""

    def __init__(self, move: Callable[[_Net, Tensor], Tensor], second: nn.Module) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.second = second
        self._move = move

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.norm(self.first(images)))
        output: Tensor = self.second(self._move(self, features))
        return output


def _groups(network: nn.Module) -> Groups:
    return find_drawable_groups(network, random_images(2))


def _conv(inputs: int) -> nn.Module:
    return nn.Conv2d(inputs, 4, 1)


def _shuffled(features: Tensor, parts: int) -> Tensor:
    n, c, h, w = features.shape
    return features.view(n, parts, c // parts, h, w).transpose(1, 2).reshape(n, c, h, w)


ONE_BY_ONE = [[place] for place in range(12)]
HALVES = [[place, place + 6] for place in range(6)]
RUNS_OF_FOUR = [list(range(first, first + 4)) for first in (0, 4, 8)]


@pytest.mark.parametrize(
    ("move", "second", "made", "read"),
    [
        pytest.param(
            lambda net, x: torch.mul(*x.chunk(2, dim=1)),
            _conv(6),
            HALVES,
            [[place] for place in range(6)],
            id="halves that meet",
        ),
        pytest.param(
            lambda net, x: torch.cat(x.chunk(2, dim=-3)[::-1], dim=-3),
            _conv(12),
            HALVES,
            [[place, place + 6] for place in range(6)],
            id="halves that change places",
        ),
        pytest.param(
            lambda net, x: torch.cat([x[:, : x.shape[1] // 2] * x[:, x.shape[1] // 2 :]], dim=1),
            _conv(6),
            HALVES,
            [[place] for place in range(6)],
            id="halves by their indices",
        ),
        pytest.param(
            lambda net, x: _shuffled(x, 3),
            _conv(12),
            [[place, place + 4, place + 8] for place in range(4)],
            [[3 * place, 3 * place + 1, 3 * place + 2] for place in range(4)],
            id="a shuffle by views",
        ),
        pytest.param(
            lambda net, x: F.channel_shuffle(x, 3),
            _conv(12),
            [[place, place + 4, place + 8] for place in range(4)],
            [[3 * place, 3 * place + 1, 3 * place + 2] for place in range(4)],
            id="torch's shuffle",
        ),
        pytest.param(
            lambda net, x: F.pixel_shuffle(x, 2),
            _conv(3),
            RUNS_OF_FOUR,
            [[0], [1], [2]],
            id="channels that become pixels",
        ),
        pytest.param(
            lambda net, x: F.pixel_unshuffle(x, 2),
            _conv(48),
            ONE_BY_ONE,
            [list(range(first, first + 4)) for first in range(0, 48, 4)],
            id="pixels that become channels",
        ),
        pytest.param(
            lambda net, x: F.pad(x, (1, 1, 0, 0, 2, 3)),
            _conv(17),
            ONE_BY_ONE,
            [[place + 2] for place in range(12)],
            id="channels of zeros around",
        ),
        pytest.param(
            lambda net, x: torch.cat([x.new_ones(2, 3, 8, 8), x], dim=1),
            _conv(15),
            ONE_BY_ONE,
            [[place + 3] for place in range(12)],
            id="a constant in front",
        ),
        pytest.param(
            lambda net, x: F.adaptive_avg_pool2d(x, 2).permute(0, 2, 3, 1).flatten(1),
            nn.Linear(48, 4),
            ONE_BY_ONE,
            [[place, place + 12, place + 24, place + 36] for place in range(12)],
            id="channels last, then flat",
        ),
        pytest.param(
            lambda net, x: torch.cat([F.adaptive_avg_pool2d(x, 2).flatten(1), x.mean((2, 3))], 1),
            nn.Linear(60, 4),
            ONE_BY_ONE,
            [[4 * c, 4 * c + 1, 4 * c + 2, 4 * c + 3, 48 + c] for c in range(12)],
            id="flat, beside a mean",
        ),
    ],
)
def test_places_behind(
    move: Callable[[_Net, Tensor], Tensor],
    second: nn.Module,
    made: list[list[int]],
    read: list[list[int]],
) -> None:
    (group,) = _groups(_Net(move, second))
    places = {member.module: member.positions.tolist() for member in group.members}
    assert places["first"] == places["norm"] == made
    assert places["second"] == read


class _Pieces(nn.Module):
    """One convolution's channels for several readers."""

    def __init__(self, split: Callable[[Tensor], tuple[Tensor, ...]], *widths: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU())
        self.readers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 4, 1), nn.BatchNorm2d(4), nn.ReLU()) for width in widths
        )
        self.head = nn.Conv2d(4, 3, 1)
        self._split = split

    def forward(self, images: Tensor) -> Tensor:
        pieces = self._split(self.stem(images))
        read = [reader(piece) for reader, piece in zip(self.readers, pieces, strict=True)]
        output: Tensor = self.head(sum(read))
        return output


def test_equal_pieces_lose_the_same() -> None:
    """With chunk(2) the pieces stay halves: what one loses the other must lose too."""
    stem, _ = _groups(_Pieces(lambda x: x.chunk(2, dim=1), 6, 6))
    assert stem.num_channels == 6
    places = {member.module: member.positions.tolist() for member in stem.members}
    assert places["stem.0"] == HALVES
    assert places["readers.0.0"] == places["readers.1.0"] == [[place] for place in range(6)]


def test_a_piece_that_nothing_reads() -> None:
    stem, _ = _groups(_Pieces(lambda x: (x.chunk(2, dim=1)[1],), 6))
    places = {member.module: member.positions.tolist() for member in stem.members}
    assert places["stem.0"] == HALVES
    assert places["readers.0.0"] == [[place] for place in range(6)]


@pytest.mark.parametrize(
    ("split", "widths"),
    [
        (lambda x: x.split([6, 6], dim=1), (6, 6)),
        (lambda x: x.split([4, 8], dim=1), (4, 8)),
        (lambda x: (x[:, :4], x[:, 4:]), (4, 8)),
        (lambda x: (x[:, ::2], x[:, 1::2]), (6, 6)),
    ],
    ids=["sizes", "other sizes", "indices", "steps"],
)
def test_pieces_of_sizes_that_are_written_down_stay_dense(
    split: Callable[[Tensor], tuple[Tensor, ...]], widths: tuple[int, ...]
) -> None:
    groups = _groups(_Pieces(split, *widths))
    assert [group.name for group in groups] == ["readers.0.0"]
    assert groups.dense.keys() == {"stem.1"} and groups.dense["stem.1"]


class _Joined(nn.Module):
    """Two branches that come together in one way or another."""

    def __init__(self, join: Callable[[Tensor, Tensor], Tensor], inputs: int) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.other = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(inputs, 3, 1)
        self._join = join

    def forward(self, images: Tensor) -> Tensor:
        output: Tensor = self.head(self._join(self.one(images), self.other(images)))
        return output


def test_branches_that_are_shuffled_lose_the_same() -> None:
    """As in ShuffleNet v2: the shuffle takes two halves of equal size."""
    (group,) = _groups(_Joined(lambda one, other: _shuffled(torch.cat([one, other], 1), 2), 16))
    places = {member.module: member.positions.tolist() for member in group.members}
    assert places["one.0"] == places["other.0"] == [[place] for place in range(8)]
    assert places["head"] == [[2 * place, 2 * place + 1] for place in range(8)]


def test_branches_that_are_joined_lose_what_they_like() -> None:
    one, other = _groups(_Joined(lambda one, other: torch.cat([one, other], 1), 16))
    assert (one.name, other.name) == ("one.0", "other.0")


def _alike(one: Tensor, other: Tensor) -> Tensor:
    if one.shape != other.shape:
        raise ValueError("branches must be alike")
    return torch.cat([one, other], dim=1)


def test_what_must_only_stay_equally_wide_stays_dense() -> None:
    """When the trial dropped every other channel, both branches lost as many, and both were taken.
    A mask that dropped more of one than of the other then broke the network."""
    with pytest.raises(ConfigError, match=r"one\.1: .* branches must be alike(.|\n)*other\.1: "):
        _groups(_Joined(_alike, 16))


def test_what_is_mixed_until_all_depends_on_all_stays_dense() -> None:
    """A shuffle and halves, again and again, tie everything to everything."""

    def mixed(one: Tensor, other: Tensor) -> Tensor:
        both = torch.cat([one, other], 1)
        for _ in range(4):
            both = _shuffled(torch.cat(both.chunk(2, dim=1)[::-1], dim=1), 2)
        return both

    with pytest.raises(ConfigError, match="none of its channels can be dropped without all others"):
        _groups(_Joined(mixed, 16))
