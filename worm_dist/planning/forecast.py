"""Forecast of a run: the costs of the network in every stage, without training."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.gates import gated
from ..groups.mask import Mask
from ..pruning.exactness import find_drawable_groups
from ..pruning.predicted_cost import predicted_cost
from ..search.equal_shares import equal_shares
from ..search.ranking import Ranking
from ..training.fully_sharded import require_several
from ..training.weights import load_weights
from .costs import Costs, costs_of, truncated
from .hypothetical import drawn, mask_of_ticket
from .memory import Memory, TrainingState, memory_of_stages, training_state, whole
from .module_order import module_order
from .stage import Stage, freeze_plans
from .step_time import Link, StepTime
from .target import Target
from .timing import Measured, affordable_batch, measure
from .traffic import Traffic, left_out_in, traffic_of_stages, wrapped_in

__all__ = ["Estimate", "Forecast", "forecast", "members_of"]

logger = logging.getLogger(__name__)

_FEWEST_RANKS = 2


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
        world_size: number of ranks that bytes and memory are counted for.
        costs: the costs of every stage that the settings lead to, in order.
        traffic: what a rank hands to collectives in a step of these stages.
        others: modules with parameters that belong to no group, and such parameters outside any
            submodule.
        memory: the engine's memory on a rank in these stages.
        training: what training itself holds on a rank, of the dense network and of the ticket.
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
    world_size: int
    costs: Mapping[Stage, Costs]
    traffic: Mapping[Stage, Traffic]
    others: Sequence[str]
    memory: Mapping[Stage, Memory]
    training: Mapping[Stage, TrainingState]
    weight_bytes: int
    estimate: Estimate | None
    budget_reached: float | None = None

    @property
    def remarks(self) -> Sequence[str]:
        """Notes on what the figures do not include."""
        truncation = self.target.worm.truncation
        remarks: list[str] = []
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


def forecast(
    target: Target,
    ticket: Path | None,
    link: Link | None,
    num_samples: int | None,
    weights: Path | None = None,
    compute_seconds: float | None = None,
    world_size: int | None = None,
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
        world_size: number of ranks; None for that of ``link``, or 2.

    Raises:
        ConfigError: the network cannot be built or has no channel group, or the settings, the
            ticket, the batch or the number of ranks do not fit.
        CheckpointError: the ticket or the weights do not exist, are damaged, or do not fit.
    """
    if link is not None:
        world_size = link.world_size
    # Mistakes are reported before the network is traced, which takes long.
    num_samples = num_samples or target.samples_per_rank(world_size or 1)
    world_size = world_size or _FEWEST_RANKS
    if target.wrapper.kind == "fsdp":
        require_several(world_size)
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
    compression, uncompressed = target.worm.truncation.compression, "none"
    if target.wrapper.kind == "deepspeed" and target.wrapper.zero.gradients.itemsize == 2:
        compression = uncompressed = "bf16"
    keep_all = Mask({name: torch.ones_like(kept) for name, kept in mask.items()})
    dense = costs_of(network, groups, keep_all, sample, uncompressed)
    costs: dict[Stage, Costs] = {"dense": dense}
    plans = freeze_plans(target.worm.truncation, network, groups, mask)
    for stage, plan in plans.items():
        costs[stage] = truncated(dense, network, groups, plan, compression)
    costs["ticket"] = costs_of(ticket_network, ticket_groups, mask, sample, compression)
    left_out = left_out_in(target.worm.truncation, network, ticket_network, groups, mask, plans)
    wrapped = wrapped_in(target.wrapper, network, world_size)
    counted = {network: dense, ticket_network: costs["ticket"]}
    orders = (
        {} if wrapped is None else {n: module_order(n, sample, c.flops) for n, c in counted.items()}
    )
    traffic = traffic_of_stages(wrapped, left_out, costs, orders)
    parts, gathered = {}, {}
    for each in counted:
        parts[each] = whole if wrapped is None else wrapped.shards_of(each)
        gathered[each] = 0 if wrapped is None else wrapped.gathered_bytes(each, orders[each])
    packed = {} if wrapped is None else {s: wrapped.packing(each) for s, each in left_out.items()}
    memory = memory_of_stages(
        target, network, ticket_network, groups, mask, num_samples, parts[network], packed
    )
    dense_state, ticket_state = (
        training_state(target, each, parts[each], gathered[each]) for each in counted
    )
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
        link = replace(link, is_gloo=compute_seconds is None and not torch.cuda.is_available())
        steps = _steps(traffic, measured, num_samples, link)
        estimate = Estimate(link, num_samples, measured, steps)
    others = _others(ticket_network, ticket_groups)
    weight_bytes = sum(p.nbytes for p in network.parameters())
    return Forecast(
        target=target,
        ticket=ticket,
        weights=weights,
        groups=groups,
        mask=mask,
        world_size=world_size,
        costs=costs,
        traffic=traffic,
        others=others,
        memory=memory,
        training={"dense": dense_state, "ticket": ticket_state},
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


def _steps(
    traffic: Mapping[Stage, Traffic],
    measured: Measured,
    num_samples: int,
    link: Link,
) -> Mapping[Stage, StepTime]:
    """Step time of every stage; until the draw the dense network is computed.  The measured time
    is scaled to the number of samples.

    Args:
        traffic: the collectives of every stage.
        measured: compute times of the dense network and the ticket.
        num_samples: samples per rank and step.
        link: the network between the ranks.
    """
    scale = num_samples / measured.num_samples
    steps: dict[Stage, StepTime] = {}
    for stage, each in traffic.items():
        seconds = scale * measured.seconds[stage == "ticket"]
        steps[stage] = StepTime.of(seconds, each.collectives, link)
    return steps
