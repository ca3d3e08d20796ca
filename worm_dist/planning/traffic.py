"""Traffic plan: what a rank hands to collectives in a step of every stage of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from ..config import TruncationConfig
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from ..groups.mask import Mask
from ..truncation.frozen_weights import fading_params
from .buckets import buckets_of
from .costs import Costs
from .fully_shard import FullyShard
from .module_order import Event
from .stage import Stage
from .step_time import Collective
from .wrapped import LeftOut, Wrapped
from .wrapper import WrapperSettings
from .zero3_gathers import ZeroThree
from .zero_partitions import ZeroPartitions

__all__ = ["Traffic", "left_out_in", "traffic_of_stages", "wrapped_in"]


@dataclass(frozen=True)
class Traffic:
    """What a rank hands to collectives in a step, as ``Engine.traffic`` counts it.

    Attributes:
        collectives: the collectives in the order in which they start.
    """

    collectives: Sequence[Collective]

    @property
    def gradient_bytes(self) -> int:
        return sum(c.payload_bytes for c in self.collectives if not c.sends_weights)

    @property
    def weight_bytes(self) -> int:
        return sum(c.payload_bytes for c in self.collectives if c.sends_weights)

    @property
    def total_bytes(self) -> int:
        return self.gradient_bytes + self.weight_bytes


def traffic_of_stages(
    wrapped: Wrapped | None,
    left_out: Mapping[Stage, LeftOut],
    costs: Mapping[Stage, Costs],
    orders: Mapping[nn.Module, Sequence[Event]],
) -> Mapping[Stage, Traffic]:
    """The traffic of a step in every stage.

    Args:
        wrapped: the network in its wrapper; None for DistributedDataParallel.
        left_out: what is left out in every stage.
        costs: the costs of every stage.
        orders: the calls of the modules of the dense network and of the ticket.
    """
    if wrapped is None:
        return {
            stage: Traffic(buckets_of(here.network, costs[stage].payload_bytes, costs[stage].flops))
            for stage, here in left_out.items()
        }
    return {
        stage: Traffic(wrapped.collectives(here, orders[here.network]))
        for stage, here in left_out.items()
    }


def wrapped_in(settings: WrapperSettings, network: nn.Module, world_size: int) -> Wrapped | None:
    """The network in its wrapper; None for DistributedDataParallel.

    Args:
        settings: the wrapper's.
        network: the dense network, with its gates.
        world_size: number of ranks.
    """
    if settings.kind == "ddp":
        return None
    if settings.kind == "fsdp":
        return FullyShard(network, int(settings.unit_mb * 2**20), world_size)
    if settings.zero.stage == 3:
        return ZeroThree(settings.zero, world_size)
    return ZeroPartitions(settings.zero, world_size)


def left_out_in(
    truncation: TruncationConfig,
    network: nn.Module,
    ticket: nn.Module,
    groups: Groups,
    mask: Mask,
    plans: Mapping[Stage, FreezePlan],
) -> dict[Stage, LeftOut]:
    """What is left out in every stage.

    Args:
        truncation: the settings.
        network, ticket: the dense network, and the one that is drawn.
        groups: the channel groups of the dense network.
        mask: the channels that are kept.
        plans: the result of ``freeze_plans``.
    """
    found: dict[Stage, LeftOut] = {"dense": LeftOut(network)}
    frozen, removes = ~mask.keep, truncation.removes
    for stage, plan in plans.items():
        # Fading parameters are gathered after a step until they are zero, and vectors always.
        fading = fading_params(network, groups, frozen) if removes and stage != "faded" else set()
        unchanged = {
            parameter: block
            for parameter, block in plans["truncated"].blocks.items()
            if parameter.dim() > 1 and parameter not in fading
        }
        unread = FreezePlan(network, groups, frozen, "coupled").blocks if stage == "faded" else {}
        found[stage] = LeftOut(network, plan.blocks, unchanged, unread)
    found["ticket"] = LeftOut(ticket)
    return found
