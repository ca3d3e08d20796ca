"""Forecast of a run: the costs of the network in every stage, without training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.freeze_plan import FreezePlan
from ..groups.gates import gated
from ..groups.mask import Mask
from ..pruning.exactness import find_drawable_groups
from ..pruning.predicted_cost import predicted_cost
from ..search.equal_shares import equal_shares
from ..search.ranking import Ranking
from ..search.rounding import ratio_reached
from ..training.weights import load_weights
from .buckets import buckets_of
from .costs import Costs, costs_of, truncated
from .hypothetical import drawn, mask_of_ticket
from .memory import Memory, memory_of_stages
from .step_time import FORMULA, Link, StepTime
from .target import Target
from .timing import Measured, affordable_batch, measure

__all__ = ["Estimate", "Forecast", "Stage", "forecast", "members_of"]

logger = logging.getLogger(__name__)

Stage = Literal["dense", "truncated", "faded", "ticket"]
"""``dense``: nothing is frozen.  ``truncated``: the all-reduce omits dropped channels.
``faded``: it also omits the columns that read them.  ``ticket``: dropped channels are removed."""


def members_of(group: ChannelGroup) -> dict[str, list[str]]:
    """Names of the modules that produce, normalise, gate and consume the channels of a group.

    A gate is listed by the name of the layer whose weight it scales.
    """
    names: dict[str, dict[str, None]] = {"producer": {}, "norm": {}, "gate": {}, "consumer": {}}
    for member in group.members:
        name = member.module.removesuffix(".parametrizations.weight.0")
        names[member.role][name] = (
            None  # a dict, as an attention produces heads with several members
        )
    return {f"{role}s": list(modules) for role, modules in names.items()}


@dataclass(frozen=True)
class Estimate:
    """Estimated step times.

    Attributes:
        link: the network between the ranks.
        num_samples: samples per rank and step.
        measured: compute times of the dense network and of the ticket, in this order.
        steps: the step time of every stage.
    """

    link: Link
    num_samples: int
    measured: Measured
    steps: Mapping[Stage, StepTime]


@dataclass(frozen=True)
class Forecast:
    """Forecast of a run.

    Attributes:
        target: the network and its settings.
        ticket: folder of the ticket that determines the dropped channels; None if the settings do.
        weights: weights of the trained network whose scores decide; None if there are no scores,
            and all groups lose about the same share.
        groups: the channel groups of the dense network.
        mask: the channels that are kept.
        costs: the costs of every stage that the settings lead to, in order.
        others: modules with parameters that belong to no group, and such parameters outside any
            submodule.
        memory: the engine's memory on a rank in these stages.
        weight_bytes: bytes of the dense network's parameters.
        estimate: estimated step times; None if not requested.
        budget_reached: what the ticket takes of the dense network of what the budget limits, 0 to
            1; None without a budget.
    """

    target: Target
    ticket: Path | None
    weights: Path | None
    groups: Groups
    mask: Mask
    costs: Mapping[Stage, Costs]
    others: Sequence[str]
    memory: Mapping[str, Memory]
    weight_bytes: int
    estimate: Estimate | None
    budget_reached: float | None = None

    @property
    def remarks(self) -> Sequence[str]:
        """Notes on what the figures do not include."""
        truncation, remarks = self.target.worm.truncation, list(self.target.remarks)
        by_norm = self.target.worm.search.grouping == "layer" and self.ticket is None
        if by_norm and any(len(group.norms) > 1 for group in self.groups):
            remarks.append(
                "where the norms of a group disagree in a run, fewer of its channels are dropped"
            )
        if truncation.compression in ("bf16", "fp16"):
            remarks.append(f"gradients are sent in {truncation.compression}; dense is uncompressed")
        if truncation.compression == "powersgd":
            remarks.append("bytes are those before PowerSGD's approximation, which sends far fewer")
        return remarks

    def as_dict(self) -> dict[str, Any]:
        """The complete forecast as JSON values."""
        target, estimate = self.target, self.estimate
        budget = target.worm.search.budget.chosen if self.ticket is None else None
        by_settings = self.ticket is None and self.weights is None
        return {
            "model": {
                "name": target.model,
                "arguments": dict(target.arguments),
                "sample_shape": list(target.sample_shape),
                "num_classes": target.num_classes,
            },
            "settings": target.worm.model_dump(mode="json"),
            "dropped": {
                "by": "settings" if by_settings else "scores" if self.weights else "ticket",
                "prune_ratio": None if self.ticket or budget else target.worm.search.prune_ratio,
                "ratio_reached": ratio_reached(self.mask),
                "budget": dict([budget]) if budget else None,
                "budget_reached": self.budget_reached,
                "ticket": None if self.ticket is None else str(self.ticket),
                "weights": None if self.weights is None else str(self.weights),
                "mask_digest": None if by_settings else self.mask.digest,
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
            "memory": {
                stage: {**asdict(each.truncation), "inputs": each.inputs, "total": each.total}
                for stage, each in self.memory.items()
            },
            "dense": dict(self.groups.dense),
            "estimate": None if estimate is None else _estimate_as_dict(estimate),
            "remarks": list(self.remarks),
        }

    @property
    def _costs(self) -> Sequence[tuple[Stage, Costs]]:
        return tuple(self.costs.items())


def forecast(
    target: Target,
    ticket: Path | None,
    link: Link | None,
    num_samples: int | None,
    weights: Path | None = None,
    compute_seconds: float | None = None,
) -> Forecast:
    """Build the network with the gates that a run would add, draw a copy, and count the costs.

    Args:
        target: the network and its settings.
        ticket: folder of a ticket; None to drop about the same share of every group.
        link: the network to estimate step times for; None for no estimate and no measurement.
        num_samples: samples per rank for the estimate; None for the value of the settings.
        weights: weights of the trained dense network, whose scores then decide; see
            ``weights.load_weights``.
        compute_seconds: time of a forward and backward pass of the dense network; None to measure
            it, and the ticket's.

    Raises:
        ConfigError: the network cannot be built or has no channel group, or the settings, the
            ticket or the batch do not fit.
        CheckpointError: the ticket or the weights do not exist, are damaged, or do not fit.
    """
    logger.info("plan: building %s", target.model)
    network = gated(target.build(), target.worm.search)
    sample = torch.zeros(1, *target.sample_shape)
    if weights is not None:
        load_weights(network, weights, "--weights")
    groups = find_drawable_groups(network, sample, target.worm.search)
    budget_reached = None
    if ticket is None:
        cost = predicted_cost(target.worm, network, groups, sample)
        ranking = Ranking(target.worm, network, groups, None, cost)
        mask = equal_shares(ranking, groups) if weights is None else _by_scores(ranking, groups)
        budget_reached = ranking.budget.share_of(mask) if ranking.budget else None
    else:
        mask = mask_of_ticket(ticket, groups)
    logger.info("plan: drawing the ticket on a copy")
    ticket_network, ticket_groups = drawn(network, groups, mask)

    logger.info("plan: counting parameters, FLOPs, bytes and memory")
    compression = target.worm.truncation.compression
    keep_all = Mask({name: torch.ones_like(kept) for name, kept in mask.items()})
    dense = costs_of(network, groups, keep_all, sample, "none")
    costs: dict[Stage, Costs] = {"dense": dense}
    for stage, plan in _plans(target, network, groups, mask).items():
        costs[stage] = truncated(dense, network, groups, plan, compression)
    costs["ticket"] = costs_of(ticket_network, ticket_groups, mask, sample, compression)
    num_samples = num_samples or target.samples_per_rank(1 if link is None else link.world_size)
    memory = memory_of_stages(target, network, ticket_network, groups, mask, num_samples)
    estimate = None
    if link is not None:
        shape, precision = target.sample_shape, target.precision
        if compute_seconds is None:
            batch = affordable_batch(network, shape, num_samples, precision)
            measured = measure((network, ticket_network), shape, batch, precision)
        else:
            share = costs["ticket"].total.flops / dense.total.flops
            seconds = (compute_seconds, share * compute_seconds)
            measured = Measured(seconds, num_samples, rounds=0, device="given")
        steps = _steps(costs, (network, ticket_network), measured, num_samples, link)
        estimate = Estimate(link, num_samples, measured, steps)
    others = _others(ticket_network, ticket_groups)
    weight_bytes = sum(p.nbytes for p in network.parameters())
    return Forecast(
        target=target,
        ticket=ticket,
        weights=weights,
        groups=groups,
        mask=mask,
        costs=costs,
        others=others,
        memory=memory,
        weight_bytes=weight_bytes,
        estimate=estimate,
        budget_reached=budget_reached,
    )


def _by_scores(ranking: Ranking, groups: Groups) -> Mask:
    none_removed = torch.zeros(groups.num_channels, dtype=torch.bool)
    _, mask, _ = ranking.select(ranking.scores(), none_removed)
    return mask


def _others(network: nn.Module, groups: Groups) -> Sequence[str]:
    members = [member for group in groups for member in group.members if member.role != "consumer"]
    owned = {name for member in members for name, _ in member.parameters}
    rest = [name for name, _ in network.named_parameters() if name not in owned]
    return tuple(dict.fromkeys(name.rpartition(".")[0] or name for name in rest))


def _plans(
    target: Target, network: nn.Module, groups: Groups, mask: Mask
) -> Mapping[Stage, FreezePlan]:
    """The live part of the network in the stages before the draw; only hard truncation has them."""
    truncation, frozen = target.worm.truncation, ~mask.keep
    if truncation.mode != "hard":
        return {}
    plans: dict[Stage, FreezePlan] = {
        "truncated": FreezePlan(network, groups, frozen, truncation.scope)
    }
    if truncation.removes:
        plans["faded"] = FreezePlan(network, groups, frozen, truncation.scope, frozen)
    return plans


def _steps(
    costs: Mapping[Stage, Costs],
    networks: tuple[nn.Module, nn.Module],
    measured: Measured,
    num_samples: int,
    link: Link,
) -> Mapping[Stage, StepTime]:
    """Step time of every stage; until the draw the dense network is computed.  The measured time
    is scaled to the number of samples.

    Args:
        costs: the costs of every stage.
        networks: the dense network and the ticket.
        measured: compute times of both.
        num_samples: samples per rank and step.
        link: the network between the ranks.
    """
    scale = num_samples / measured.num_samples
    steps: dict[Stage, StepTime] = {}
    for stage, each in costs.items():
        which = stage == "ticket"
        buckets = buckets_of(networks[which], each.payload_bytes, each.flops)
        steps[stage] = StepTime.of(scale * measured.seconds[which], buckets, link)
    return steps


def _estimate_as_dict(estimate: Estimate) -> dict[str, Any]:
    return {
        "world_size": estimate.link.world_size,
        "bandwidth_bits_per_second": estimate.link.bits_per_second,
        "latency_seconds": estimate.link.latency_seconds,
        "samples_per_rank": estimate.num_samples,
        "samples_measured": estimate.measured.num_samples,
        "device": estimate.measured.device,
        "rounds": estimate.measured.rounds,
        "formula": FORMULA,
        "steps": {
            stage: {
                "compute_seconds": step.compute_seconds,
                "all_reduce_seconds": step.all_reduce_seconds,
                "expected_seconds": step.expected_seconds,
                "shortest_seconds": step.shortest_seconds,
                "longest_seconds": step.longest_seconds,
            }
            for stage, step in estimate.steps.items()
        },
    }
