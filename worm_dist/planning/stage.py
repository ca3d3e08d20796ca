"""Stage: a part of a run in which every step computes and sends the same."""

from __future__ import annotations

from typing import Literal

from torch import nn

from ..config import TruncationConfig
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from ..groups.mask import Mask

__all__ = ["Stage", "freeze_plans"]

Stage = Literal["dense", "truncated", "faded", "ticket"]
"""``dense``: nothing is frozen.  ``truncated``: gradients of dropped channels are left out.
``faded``: so are those of the columns that read them, and weights that a pass gathers.  ``ticket``:
dropped channels are removed."""


def freeze_plans(
    truncation: TruncationConfig, network: nn.Module, groups: Groups, mask: Mask
) -> dict[Stage, FreezePlan]:
    """The live part of the dense network's gradients in the stages before the draw; only hard
    truncation has them.

    Args:
        truncation: the settings.
        network: the dense network.
        groups: its channel groups.
        mask: the channels that are kept.
    """
    if truncation.mode != "hard":
        return {}
    frozen, scope = ~mask.keep, truncation.scope
    plans: dict[Stage, FreezePlan] = {"truncated": FreezePlan(network, groups, frozen, scope)}
    if truncation.removes:
        plans["faded"] = FreezePlan(network, groups, frozen, scope, frozen)
    return plans
