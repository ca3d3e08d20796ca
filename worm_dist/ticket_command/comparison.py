"""Comparison of two tickets: dense networks, masks, weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ..groups.mask import Mask
from ..ticket.file import WEIGHTS
from ..ticket.metadata import Record, read_metadata
from ..ticket.weights import Weights, open_weights
from .contents import mask_of

__all__ = ["Comparison", "GroupComparison", "TensorComparison", "compare"]


@dataclass(frozen=True)
class GroupComparison:
    """The channels of a group: how many are kept by both tickets, by one of them, by neither."""

    name: str
    both: int
    only_first: int
    only_second: int
    neither: int


@dataclass(frozen=True)
class TensorComparison:
    """A tensor in both tickets.

    Attributes:
        name: its name in the state dict.
        first, second: its shape in each ticket; None if it is not there.
        is_equal: whether dtype, shape and bits are equal.
        difference: the largest absolute difference of two elements; None if the shapes differ, or
            if it is not finite.
        counts: whether it holds whole numbers, such as the batches that a BatchNorm has seen.
    """

    name: str
    first: Sequence[int] | None
    second: Sequence[int] | None
    is_equal: bool
    difference: float | None
    counts: bool = False


@dataclass(frozen=True)
class Comparison:
    """Comparison of two tickets.

    Attributes:
        folders: the tickets' folders.
        records: their metadata.
        same_dense_network: whether both were drawn from the same dense network; None if their
            channel groups are the same, but one does not say how its network is built.
        distance: normalised Hamming distance of the masks, 0 to 1; None if their groups differ.
        groups: the groups that both tickets have with as many channels.
        other_groups: the names of the groups that they do not.
        tensors: all tensors of both, by name.
    """

    folders: tuple[Path, Path]
    records: tuple[Record, Record]
    same_dense_network: bool | None
    distance: float | None
    groups: Sequence[GroupComparison]
    other_groups: Sequence[str]
    tensors: Sequence[TensorComparison]

    @property
    def is_equal(self) -> bool:
        """Whether dense networks, masks and weights are equal, as far as the tickets say."""
        networks_differ = self.same_dense_network is False
        return not networks_differ and self.distance == 0 and all(t.is_equal for t in self.tensors)

    @property
    def largest_difference(self) -> float | None:
        """The largest difference of weights whose shapes are equal; None if there is none.

        Counters are left out: after another number of steps theirs would hide that of the weights.
        """
        weights = (each for each in self.tensors if not each.counts)
        return max((t.difference for t in weights if t.difference is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "tickets": [
                {"folder": str(folder), "mask_digest": record.mask_digest}
                for folder, record in zip(self.folders, self.records, strict=True)
            ],
            "equal": self.is_equal,
            "same_dense_network": self.same_dense_network,
            "distance": self.distance,
            "groups": [asdict(group) for group in self.groups],
            "other_groups": list(self.other_groups),
            "largest_difference": self.largest_difference,
            "tensors": [asdict(tensor) for tensor in self.tensors],
        }


def compare(first: Path, second: Path) -> Comparison:
    """Compare two tickets; neither network is built.

    Args:
        first, second: the tickets' folders.

    Raises:
        CheckpointError: a ticket is missing or damaged.
    """
    records = read_metadata(first), read_metadata(second)
    masks = mask_of(records[0]), mask_of(records[1])
    have_same_groups = list(masks[0].sizes.items()) == list(masks[1].sizes.items())
    common = masks[0].sizes.items() & masks[1].sizes.items()
    shared = [name for name, size in masks[0].sizes.items() if (name, size) in common]
    others = [name for name in (masks[0].sizes | masks[1].sizes) if name not in shared]
    with (
        open_weights(first / WEIGHTS, records[0].weights) as weights,
        open_weights(second / WEIGHTS, records[1].weights) as other_weights,
    ):
        names = sorted(weights.metadata.keys() | other_weights.metadata.keys(), key=_by_numbers)
        tensors = [_compare_tensors(name, weights, other_weights) for name in names]
    return Comparison(
        folders=(first, second),
        records=records,
        same_dense_network=_have_same_dense_network(*records) if have_same_groups else False,
        distance=masks[0].distance(masks[1]) if have_same_groups else None,
        groups=[_compare_groups(name, *masks) for name in shared],
        other_groups=others,
        tensors=tensors,
    )


def _by_numbers(name: str) -> list[tuple[int, str]]:
    """A key that sorts ``layer.9`` before ``layer.10``."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in name.split(".")]


def _have_same_dense_network(first: Record, second: Record) -> bool | None:
    if first.model is None or second.model is None:
        return None
    return first.model == second.model


def _compare_groups(name: str, first: Mask, second: Mask) -> GroupComparison:
    kept, other_kept = first[name], second[name]
    return GroupComparison(
        name,
        int((kept & other_kept).sum()),
        int((kept & ~other_kept).sum()),
        int((~kept & other_kept).sum()),
        int((~kept & ~other_kept).sum()),
    )


def _compare_tensors(name: str, first: Weights, second: Weights) -> TensorComparison:
    here, there = first.metadata.get(name), second.metadata.get(name)
    if here is None or there is None or here.shape != there.shape:
        shape, other_shape = (None if each is None else each.shape for each in (here, there))
        return TensorComparison(name, shape, other_shape, is_equal=False, difference=None)
    one, other = first.read(name), second.read(name)
    is_equal = here == there and torch.equal(here.memory_of(one), there.memory_of(other))
    difference = 0.0
    if not is_equal and one.numel():
        dtype = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
        difference = float((one.to(dtype) - other.to(dtype)).abs().max())
    return TensorComparison(
        name,
        here.shape,
        there.shape,
        is_equal,
        difference if math.isfinite(difference) else None,
        counts=not (one.is_floating_point() or one.is_complex()),
    )
