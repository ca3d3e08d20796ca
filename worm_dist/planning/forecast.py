"""Forecast: what a run on a network would come to, without running it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.freeze_plan import FreezePlan
from ..pruning.exactness import find_drawable_groups
from ..search.mask import Mask
from ..search.ranking import Ranking
from ..search.rounding import ratio_reached
from ..training.gating import gated
from .costs import Costs, costs_of, truncated
from .drawing import drawn
from .hypothetical import equal_shares, mask_of_ticket
from .step_time import FORMULA, Link, StepTime, ring_seconds
from .target import Target
from .timing import Measured, measure

__all__ = ["Estimate", "Forecast", "Stage", "forecast", "members_of"]

Stage = Literal["dense", "truncated", "faded", "ticket"]
"""``dense``: nothing is frozen.  ``truncated``: dropped channels have left the all-reduce.
``faded``: so have the columns that read them.  ``ticket``: dropped channels are gone."""


def members_of(group: ChannelGroup) -> dict[str, list[str]]:
    """The modules that make, normalise, scale and read the channels of a group, by name; a gate has
    that of the layer whose weight it scales."""
    names: dict[str, dict[str, None]] = {"producer": {}, "norm": {}, "gate": {}, "consumer": {}}
    for member in group.members:
        name = member.module.removesuffix(".parametrizations.weight.0")
        names[member.role][name] = None  # an attention makes heads with several parts
    return {f"{role}s": list(modules) for role, modules in names.items()}


@dataclass(frozen=True)
class Estimate:
    """How long a step would take.

    Attributes:
        link: what joins the ranks.
        num_samples: in one rank's share of a step.
        measured: the computation of the dense network, then that of the ticket.
        steps: of every stage.
    """

    link: Link
    num_samples: int
    measured: Measured
    steps: Mapping[Stage, StepTime]


@dataclass(frozen=True)
class Forecast:
    """What a run would come to.

    Attributes:
        subject: what it is about.
        ticket: the folder that says which channels are dropped; None if the settings do, and all
            groups lose about the same share.
        groups: of the dense network.
        mask: the channels that are kept.
        costs: of every stage that the settings lead to, in order.
        others: modules that hold parameters of no group, and such parameters that are in none.
        estimate: None if none was asked for.
    """

    subject: Target
    ticket: Path | None
    groups: Groups
    mask: Mask
    costs: Mapping[Stage, Costs]
    others: Sequence[str]
    estimate: Estimate | None

    @property
    def remarks(self) -> Sequence[str]:
        """What the figures leave out."""
        truncation, remarks = self.subject.worm.truncation, list(self.subject.remarks)
        by_norm = self.subject.worm.search.grouping == "layer" and self.ticket is None
        if by_norm and any(len(group.norms) > 1 for group in self.groups):
            remarks.append(
                "where the norms of a group do not agree in a run, fewer of its channels go"
            )
        if truncation.compression in ("bf16", "fp16"):
            remarks.append(f"gradients are sent in {truncation.compression}; dense is without that")
        if truncation.compression == "powersgd":
            remarks.append("bytes are those before PowerSGD's approximation, which sends far fewer")
        return remarks

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a JSON file."""
        subject, estimate = self.subject, self.estimate
        return {
            "model": {
                "name": subject.model,
                "arguments": dict(subject.arguments),
                "sample_shape": list(subject.sample_shape),
                "num_classes": subject.num_classes,
            },
            "settings": subject.worm.model_dump(mode="json"),
            "dropped": {
                "by": "settings" if self.ticket is None else "ticket",
                "prune_ratio": subject.worm.search.prune_ratio if self.ticket is None else None,
                "ratio_reached": ratio_reached(self.mask),
                "ticket": None if self.ticket is None else str(self.ticket),
                "mask_digest": None if self.ticket is None else self.mask.digest,
                "num_channels": self.mask.num_channels,
                "num_kept": self.mask.num_kept,
            },
            "groups": [
                {
                    "name": group.name,
                    "num_channels": group.num_channels,
                    "num_kept": int(self.mask[group.name].sum()),
                    "places_each": self.groups.widths[group.name],
                    **members_of(group),
                    "costs": {s: asdict(costs.groups[group.name]) for s, costs in self._costs},
                }
                for group in self.groups
            ],
            "others": {
                "modules": list(self.others),
                "costs": {stage: asdict(costs.rest) for stage, costs in self._costs},
            },
            "total": {stage: asdict(costs.total) for stage, costs in self._costs},
            "dense": dict(self.groups.dense),
            "estimate": None if estimate is None else _estimate_as_dict(estimate),
            "remarks": list(self.remarks),
        }

    @property
    def _costs(self) -> Sequence[tuple[Stage, Costs]]:
        return tuple(self.costs.items())


def forecast(
    subject: Target, ticket: Path | None, link: Link | None, num_samples: int | None
) -> Forecast:
    """Build the network, with gates where a run would add them, draw a copy of it, and count.

    Args:
        subject: what is planned for.
        ticket: folder of a ticket; None to take about the same share from every group.
        link: what a step's time is estimated for; None for no estimate, and nothing is run.
        num_samples: of one rank, for the estimate; None for what the settings say.

    Raises:
        ConfigError: the network cannot be built or has no channel group; the settings, the ticket
            or the batch do not fit.
        CheckpointError: there is no such ticket.
    """
    network = gated(subject.build(), subject.worm.search)
    sample = torch.zeros(1, *subject.sample_shape)
    groups = find_drawable_groups(network, sample, subject.worm.search)
    if ticket is None:
        mask = equal_shares(Ranking(subject.worm, network, groups, None), groups)
    else:
        mask = mask_of_ticket(ticket, groups)
    small, groups_of_small = drawn(network, groups, mask)

    compression = subject.worm.truncation.compression
    everything = Mask({name: torch.ones_like(kept) for name, kept in mask.items()})
    dense = costs_of(network, groups, everything, sample, "none")
    costs: dict[Stage, Costs] = {"dense": dense}
    for stage, plan in _plans(subject, network, groups, mask).items():
        costs[stage] = truncated(dense, network, groups, plan, compression)
    costs["ticket"] = costs_of(small, groups_of_small, mask, sample, compression)
    estimate = None
    if link is not None:
        num_samples = num_samples or subject.samples_per_rank(link.world_size)
        shape, precision = subject.sample_shape, subject.precision
        measured = measure((network, small), shape, num_samples, precision)
        estimate = Estimate(link, num_samples, measured, _steps(costs, measured, link))
    others = _others(small, groups_of_small)
    return Forecast(subject, ticket, groups, mask, costs, others, estimate)


def _others(network: nn.Module, groups: Groups) -> Sequence[str]:
    members = [member for group in groups for member in group.members if member.role != "consumer"]
    owned = {name for member in members for name, _ in member.parameters}
    rest = [name for name, _ in network.named_parameters() if name not in owned]
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in rest))


def _plans(
    subject: Target, network: nn.Module, groups: Groups, mask: Mask
) -> Mapping[Stage, FreezePlan]:
    """What lives before the draw, once the mask's channels are frozen; only hard truncation
    freezes."""
    truncation, frozen = subject.worm.truncation, ~mask.keep
    if truncation.mode != "hard":
        return {}
    plans: dict[Stage, FreezePlan] = {
        "truncated": FreezePlan(network, groups, frozen, truncation.scope)
    }
    if truncation.removes:
        plans["faded"] = FreezePlan(network, groups, frozen, truncation.scope, frozen)
    return plans


def _steps(
    costs: Mapping[Stage, Costs], measured: Measured, link: Link
) -> Mapping[Stage, StepTime]:
    """Until the draw the dense network is computed."""
    dense, drawn = measured.seconds
    return {
        stage: StepTime(
            drawn if stage == "ticket" else dense, ring_seconds(each.total.payload_bytes, link)
        )
        for stage, each in costs.items()
    }


def _estimate_as_dict(estimate: Estimate) -> dict[str, Any]:
    return {
        "world_size": estimate.link.world_size,
        "bandwidth_bits_per_second": estimate.link.bits_per_second,
        "samples_per_rank": estimate.num_samples,
        "device": estimate.measured.device,
        "rounds": estimate.measured.rounds,
        "formula": FORMULA,
        "steps": {
            stage: {
                "compute_seconds": step.compute_seconds,
                "all_reduce_seconds": step.all_reduce_seconds,
                "shortest_seconds": step.shortest_seconds,
                "longest_seconds": step.longest_seconds,
            }
            for stage, step in estimate.steps.items()
        },
    }
