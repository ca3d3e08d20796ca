"""Finding: what was seen of one architecture, from attaching to its drawn network."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from worm_dist.groups.channel_groups import Groups

__all__ = ["Finding", "structure_of"]


@dataclass(frozen=True)
class Finding:
    """What was seen of one architecture.

    Attributes:
        score: what ranked its channels.
        num_parameters: elements of all parameters.
        num_groups, num_channels: searched.
        share: of all elements, those that go with some channel.
        dense: why modules are left dense, by module.
        seconds: that attaching took.
        structure: equal where the same groups were found.
        difference: largest between the outputs of the drawn and of the masked dense network, as a
            share of the largest output.
    """

    score: str
    num_parameters: int
    num_groups: int
    num_channels: int
    share: float
    dense: Mapping[str, str]
    seconds: float
    structure: str
    difference: float


def structure_of(groups: Groups) -> str:
    """Digest of all groups and of what is dense."""
    return hashlib.sha256(repr((groups.digests, groups.dense)).encode()).hexdigest()
