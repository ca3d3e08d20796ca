"""Mask: the kept channels of every group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor

from ..digest import digest_of
from ..errors import ConfigError

__all__ = ["Mask"]


class Mask(Mapping[str, Tensor]):
    """An immutable keep-vector over all channels; a mapping ``{group name: bool[channels]}``.

    Args:
        keep: a bool tensor ``[channels]`` for every group, in the engine's order, True = kept.

    Attributes:
        keep: the keep flags of all groups, bool ``[num_channels]`` on the CPU.
        digest: 32 hexadecimal digits over names, sizes and bits.

    Raises:
        ConfigError: there is no group, a tensor is not one-dimensional bool, or a group is empty.
    """

    def __init__(self, keep: Mapping[str, Tensor]) -> None:
        if not keep:
            raise ConfigError("mask: it has no group; give {group name: bool[channels]}")
        for name, kept in keep.items():
            if not isinstance(kept, Tensor) or kept.dtype != torch.bool or kept.dim() != 1:
                raise ConfigError(f"mask: group {name!r} needs a one-dimensional bool tensor")
            if kept.numel() == 0:
                raise ConfigError(f"mask: group {name!r} has no channels")
        self._sizes = {name: kept.numel() for name, kept in keep.items()}
        self.keep = torch.cat([kept.detach().cpu() for kept in keep.values()])

    @classmethod
    def from_vector(cls, sizes: Mapping[str, int], keep: Tensor) -> Mask:
        """Build a mask from one bool vector ``[num_channels]`` and the groups' sizes."""
        return cls(dict(zip(sizes, keep.split(list(sizes.values())), strict=True)))

    @property
    def sizes(self) -> dict[str, int]:
        """The number of channels of each group."""
        return dict(self._sizes)

    @property
    def num_channels(self) -> int:
        return self.keep.numel()

    @property
    def num_kept(self) -> int:
        return int(self.keep.sum())

    @property
    def num_kept_by_group(self) -> Tensor:
        """The number of kept channels of each group, int64 ``[groups]``."""
        return torch.stack([kept.sum() for kept in self._split.values()])

    @cached_property
    def digest(self) -> str:
        return digest_of([list(self._sizes.items()), self.keep]).hex()

    def distance(self, other: Mask) -> float:
        """Return the normalised Hamming distance to another mask, 0 to 1.

        Raises:
            ConfigError: the masks are of different groups.
        """
        if list(other._sizes.items()) != list(self._sizes.items()):
            raise ConfigError("mask: two masks over different groups have no distance")
        return float((self.keep ^ other.keep).sum()) / self.num_channels

    def __getitem__(self, group: str) -> Tensor:
        return self._split[group].clone()

    @cached_property
    def _split(self) -> dict[str, Tensor]:
        parts = self.keep.split(list(self._sizes.values()))
        return dict(zip(self._sizes, parts, strict=True))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sizes)

    def __len__(self) -> int:
        return len(self._sizes)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Mask) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return (
            f"Mask({self.num_kept} of {self.num_channels} channels kept in "
            f"{len(self)} groups, {self.digest[:8]})"
        )
