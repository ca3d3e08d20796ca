"""Forecast: what a run on a network would come to, without running it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..search.groups import ChannelGroup, Groups
from ..search.mask import Mask
from ..ticket.surgery import cuts_of, remove_channels
from ..ticket.trial import find_drawable_groups
from ..truncation.plan import Plan
from .costs import Costs, costs_of, truncated
from .dropping import equal_shares, mask_of_ticket
from .estimate import FORMULA, Link, StepTime, ring_seconds
from .stopwatch import Measured, measure
from .subject import Subject

__all__ = ["Estimate", "Forecast", "Stage", "forecast", "members_of"]

Stage = Literal["dense", "truncated", "faded", "ticket"]
"""``dense``: nothing is frozen.  ``truncated``: dropped channels have left the all-reduce.
``faded``: so have the columns that read them.  ``ticket``: dropped channels are gone."""


def members_of(group: ChannelGroup) -> dict[str, list[str]]:
    """The modules that make, rank and read the channels of a group, by name."""
    names: dict[str, list[str]] = {}
    for member in group.members:
        names.setdefault(member.role, []).append(member.module)
    return {
        "producers": names.get("producer", []),
        "scored_by": names.get("norm") or names.get("gate", []),
        "consumers": names.get("consumer", []),
    }


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
        ticket: the folder that says which channels are dropped; None if all groups lose the same
            share.
        groups: of the dense network.
        mask: the channels that are kept.
        costs: of every stage that the settings lead to, in order.
        others: modules whose parameters belong to no group.
        estimate: None if none was asked for.
    """

    subject: Subject
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
        if truncation.compression in ("bf16", "fp16"):
            remarks.append(f"gradients are sent in {truncation.compression}; dense is without that")
        if truncation.compression == "powersgd":
            remarks.append("bytes are those before PowerSGD's approximation, which sends far fewer")
        if "truncated" in self.costs and truncation.channels == "static":
            remarks.append("static channels: fewer may be frozen than the ticket drops")
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
            "dropped": {
                "by": "equal shares" if self.ticket is None else "ticket",
                "prune_ratio": subject.worm.search.prune_ratio if self.ticket is None else None,
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
                    **members_of(group),
                    "score": "mean |scale|",
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
    subject: Subject, ticket: Path | None, link: Link | None, num_samples: int | None
) -> Forecast:
    """Build the network, draw a copy of it, and count.

    Args:
        subject: what is planned for.
        ticket: folder of a ticket; None to take the same share from every group.
        link: what a step's time is estimated for; None for no estimate, and nothing is run.
        num_samples: of one rank, for the estimate; None for what the settings say.

    Raises:
        ConfigError: the network cannot be built or has no channel group; the ticket or the batch
            does not fit.
        CheckpointError: there is no such ticket.
    """
    network = subject.build()
    sample = torch.zeros(1, *subject.sample_shape)
    groups = find_drawable_groups(network, sample)
    if ticket is None:
        mask = equal_shares(groups.sizes, subject.worm.search.prune_ratio)
    else:
        mask = mask_of_ticket(ticket, groups)
    drawn = copy.deepcopy(network)
    remove_channels(drawn, cuts_of(groups, mask, drawn))

    compression = subject.worm.truncation.compression
    everything = Mask({name: torch.ones_like(kept) for name, kept in mask.items()})
    dense = costs_of(network, groups, everything, sample, "none")
    costs: dict[Stage, Costs] = {"dense": dense}
    for stage, plan in _plans(subject, network, groups, mask).items():
        costs[stage] = truncated(dense, network, groups, plan, compression)
    costs["ticket"] = costs_of(drawn, groups, mask, sample, compression)
    estimate = None
    if link is not None:
        num_samples = num_samples or subject.samples_per_rank(link.world_size)
        shape, precision = subject.sample_shape, subject.precision
        measured = measure((network, drawn), shape, num_samples, precision)
        estimate = Estimate(link, num_samples, measured, _steps(costs, measured, link))
    return Forecast(subject, ticket, groups, mask, costs, _others(network, groups), estimate)


def _others(network: nn.Module, groups: Groups) -> Sequence[str]:
    owned = {m.module for group in groups for m in group.members if m.role != "consumer"}
    return tuple(
        name or type(module).__name__
        for name, module in network.named_modules()
        if name not in owned and any(True for _ in module.parameters(recurse=False))
    )


def _plans(
    subject: Subject, network: nn.Module, groups: Groups, mask: Mask
) -> Mapping[Stage, Plan]:
    """What lives before the draw, once the mask's channels are frozen; only hard truncation
    freezes."""
    truncation, frozen = subject.worm.truncation, ~mask.keep
    if truncation.mode != "hard":
        return {}
    plans: dict[Stage, Plan] = {"truncated": Plan(network, groups, frozen, truncation.scope)}
    if truncation.motion == "fade":
        plans["faded"] = Plan(network, groups, frozen, truncation.scope, frozen)
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
