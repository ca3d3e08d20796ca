"""Compared variants: training steps of the same network with different gradient reductions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    fp16_compress_hook,
)
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from ..config import RemovalConfig, TruncationConfig, WormConfig
from ..engine.attach import attach
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from ..groups.mask import Mask
from ..interval import Interval
from .hooks import bf16_hook, power_sgd_hook
from .whole_buckets import send_whole

__all__ = [
    "AT_ONCE",
    "DDP",
    "HALF",
    "REMARKS",
    "WARM_UP",
    "Batch",
    "Step",
    "Variant",
    "dense",
    "packed_and_whole",
    "scattered_mask",
    "training",
    "uniform_mask",
    "variants",
]

DDP = "DDP"
"""Name of the baseline."""

LIVE_SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Shares of live channels for the worm_dist variants, the same in every group."""

HALF = 0.5
"""Share of live channels for the faded and the PowerSGD variant."""

WARM_UP = 4
"""Steps before the measurement.  DDP rebuilds its buckets after the first step, PowerSGD starts
after two, a fade of one step ends after the first, and the columns that read faded channels are
left out after the second."""

REMARKS = {
    "bf16 hook": "reimplemented here; torch's own requires NCCL",
    "PowerSGD": "one bucket at a time; over gloo, two buckets in flight abort",
    "worm, faded": "the columns that read faded channels are left out too, as after a draw",
}
"""Remarks on the variants, for the readers of the figures."""

Batch = tuple[Tensor, Tensor]
"""Images ``[n, 3, height, width]`` and labels ``[n]``."""

Step = Callable[[], object]
"""Takes a training step: forward, backward, all-reduce, optimizer.  Collective."""


AT_ONCE = RemovalConfig(duration=Interval(1, "ba"), fade_steps=1)
"""Removal in which all frozen channels are zero after a step."""


@dataclass(frozen=True)
class Variant:
    """One variant of the training step.

    Attributes:
        name: name in tables and plots.
        step: function that takes a step.
        sent_share: function that returns the bytes passed to collectives in the newest step, as a
            fraction of the gradients' bytes; None if unknown.
        ideal: smallest possible fraction, that of the live elements, halved for two-byte formats;
            None if something other than gradients is sent.
    """

    name: str
    step: Step
    sent_share: Callable[[], float | None]
    ideal: float | None


def training(build: Callable[[], nn.Module]) -> tuple[DistributedDataParallel, Optimizer]:
    """Build the wrapped network and the optimizer, alike for all variants."""
    torch.manual_seed(0)
    model = DistributedDataParallel(build())
    return model, SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def dense(model: nn.Module, optimizer: Optimizer, batch: Batch) -> Step:
    """The step of a plain training loop."""
    images, labels = batch

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def variants(
    build: Callable[[], nn.Module], batch: Batch, wants: Callable[[str], bool] = lambda name: True
) -> Iterator[Variant]:
    """Yield the variants that are wanted, plain DDP first.

    Args:
        build: builds the network.
        batch: the batch of every step.
        wants: whether a variant of this name is to be built.
    """
    makers = {DDP: partial(_ddp, DDP, build, batch)}
    for hook in (fp16_compress_hook, bf16_hook):
        name = f"{hook.__name__[:4]} hook"
        makers[name] = partial(_hooked, name, build, batch, None, hook, 0.5)
    for rank in (1, 4):
        name = f"PowerSGD rank {rank}"
        state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        makers[name] = partial(_hooked, name, build, batch, state, power_sgd_hook, None)
    kinds = [Kind(share, compression=c) for share in LIVE_SHARES for c in ("none", "bf16")]
    kinds += [Kind(HALF, fades=True), Kind(HALF, fades=True, compression="bf16")]
    for kind in (*kinds, Kind(HALF, compression="powersgd")):
        makers[kind.name] = partial(_worm, build, batch, kind)
    yield from (make() for name, make in makers.items() if wants(name))


def packed_and_whole(
    build: Callable[[], nn.Module], batch: Batch, wants: Callable[[str], bool] = lambda name: True
) -> Iterator[Variant]:
    """Yield plain DDP, twice, and with a hook in Python that averages as DDP itself does; then
    buckets that are packed, and the same sent whole, with zeros in their frozen slices.  The
    arguments are those of ``variants``."""
    again, hook = f"{DDP} again", "hook in Python"
    makers = {name: partial(_ddp, name, build, batch) for name in (DDP, again)}
    makers[hook] = partial(_hooked, hook, build, batch, None, allreduce_hook, 1.0)
    for share, fades in ((0.75, False), (HALF, False), (HALF, True)):
        for whole in (False, True):
            kind = Kind(share, fades=fades, whole=whole)
            makers[kind.name] = partial(_worm, build, batch, kind)
    yield from (make() for name, make in makers.items() if wants(name))


def _ddp(name: str, build: Callable[[], nn.Module], batch: Batch) -> Variant:
    return Variant(name, dense(*training(build), batch), lambda: 1.0, 1.0)


def _hooked(
    name: str,
    build: Callable[[], nn.Module],
    batch: Batch,
    state: object,
    hook: Callable[..., object],
    share: float | None,
) -> Variant:
    model, optimizer = training(build)
    model.register_comm_hook(state, hook)
    return Variant(name, dense(model, optimizer, batch), lambda: share, share)


@dataclass(frozen=True)
class Kind:
    """What a variant of worm_dist's engine does.

    Attributes:
        share: share of every group's channels that is live, 0 to 1.
        fades: True if the frozen channels have faded, False if they are held.
        whole: True to send whole buckets, not packed ones.
        compression: the setting ``truncation.compression``.
    """

    share: float
    fades: bool = False
    whole: bool = False
    compression: Literal["none", "bf16", "powersgd"] = "none"

    @property
    def name(self) -> str:
        suffix = {"none": "", "bf16": " bf16", "powersgd": " PowerSGD"}[self.compression]
        faded = " faded" if self.fades else ""
        return f"worm {100 * self.share:.0f} %{faded}{suffix}{' whole' if self.whole else ''}"


def _worm(build: Callable[[], nn.Module], batch: Batch, kind: Kind) -> Variant:
    """Variant of worm_dist's engine.

    Args:
        build: builds the network.
        batch: the batch of every step.
        kind: what it does.
    """
    compression = kind.compression
    model, optimizer = training(build)
    truncation = (
        TruncationConfig(removal=AT_ONCE, compression=compression)
        if kind.fades
        else TruncationConfig(frozen_weights="hold", compression=compression)
    )
    engine = attach(
        model,
        optimizer,
        WormConfig(truncation=truncation),
        example_inputs=batch[0][:1],
        steps_per_epoch=1,
    )
    mask = uniform_mask(engine.groups, kind.share)
    engine.truncate(mask)
    # The columns that read a faded channel need not be sent either.
    scope: Literal["coupled", "producer"] = "coupled" if kind.fades else "producer"
    plan = FreezePlan(model.module, engine.groups, ~mask.keep, scope)
    live = plan.live_fraction(list(model.module.parameters()))
    ideal = {"none": live, "bf16": live / 2}.get(compression)
    if kind.whole:
        send_whole(engine)
        ideal = 1.0
    return Variant(
        kind.name,
        dense(engine.model, engine.optimizer, batch),
        lambda: engine.traffic.sent_bytes / engine.traffic.dense_bytes,
        ideal,
    )


def uniform_mask(groups: Groups, share: float) -> Mask:
    """Mask that keeps the same share of every group: the first channels, at least one."""
    return Mask(
        {
            group.name: torch.arange(group.num_channels) < max(1, round(share * group.num_channels))
            for group in groups
        }
    )


def scattered_mask(groups: Groups) -> Mask:
    """Mask that keeps half of every group, at random: where every parameter is cut into a part for
    each rank, the first channels of all would be on one rank."""
    generator = torch.Generator().manual_seed(0)
    return Mask(
        {
            group.name: torch.randperm(group.num_channels, generator=generator)
            < max(1, round(HALF * group.num_channels))
            for group in groups
        }
    )
