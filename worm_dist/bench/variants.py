"""Contenders: one training step of the same network, each with another way of sending gradients."""

# No postponed annotations here: torch reads the hook's, and wants classes, not strings.
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

from ..config import RemovalConfig, TruncationConfig, WormConfig
from ..engine.engine import attach
from ..groups.channel_groups import Groups
from ..groups.freeze_plan import FreezePlan
from ..interval import Interval
from ..search.mask import Mask

__all__ = [
    "DDP",
    "HALF",
    "REMARKS",
    "WARM_UP",
    "Batch",
    "Step",
    "Variant",
    "dense",
    "keeping",
    "training",
    "variants",
]

DDP = "DDP"
"""Name of the contender that all are compared with."""

LIVE_SHARES = (1.0, 0.75, 0.5, 0.25, 0.1)
"""Shares of the channels, the same in every group, that worm_dist lets live."""

HALF = 0.5
"""Of the channels, where they fade and where PowerSGD sends what lives."""

WARM_UP = 4
"""Steps before anything is measured: DDP rebuilds its buckets after the first, PowerSGD sends all
of the first two; a fade of one step is over after the first, and the columns that read faded
channels leave after the second."""

REMARKS = {
    "bf16 hook": "written anew; torch registers its own only where there is NCCL",
    "PowerSGD": "one bucket after the other; over gloo, two at a time abort",
    "worm, faded": "the columns that read faded channels are left out too, as after a draw",
}
"""What a reader of the figures should know."""

Batch = tuple[Tensor, Tensor]
"""Images and labels."""

Step = Callable[[], object]
"""Forward, backward, all-reduce, optimizer; collective."""


_AT_ONCE = RemovalConfig(duration=Interval(1, "ba"), fade_steps=1)


@dataclass(frozen=True)
class Variant:
    """One way to take a training step.

    Attributes:
        name: for the table.
        step: take it.
        sent_share: after a step, the share of the gradients' bytes that was handed to
            collectives; None where it is not known.
        ideal: the share that cannot be avoided: that of what lives, half of it if it is rounded to
            two bytes; None where something else is sent.
    """

    name: str
    step: Step
    sent_share: Callable[[], float | None]
    ideal: float | None


def training(build: Callable[[], nn.Module]) -> tuple[DistributedDataParallel, Optimizer]:
    """The same wrapped network and optimizer for every contender."""
    torch.manual_seed(0)
    model = DistributedDataParallel(build())
    return model, SGD(model.parameters(), lr=1e-3, momentum=0.9, weight_decay=5e-4)


def dense(model: nn.Module, optimizer: Optimizer, batch: Batch) -> Step:
    """The plain loop."""
    images, labels = batch

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def variants(build: Callable[[], nn.Module], batch: Batch) -> Iterator[Variant]:
    """All of them, plain DDP first."""
    model, optimizer = training(build)
    yield Variant(DDP, dense(model, optimizer, batch), lambda: 1.0, 1.0)

    model, optimizer = training(build)
    model.register_comm_hook(None, fp16_compress_hook)
    yield Variant("fp16 hook", dense(model, optimizer, batch), lambda: 0.5, 0.5)

    model, optimizer = training(build)
    model.register_comm_hook(None, _bf16_hook)
    yield Variant("bf16 hook", dense(model, optimizer, batch), lambda: 0.5, 0.5)

    for rank in (1, 4):
        model, optimizer = training(build)
        state = PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=2)
        model.register_comm_hook(state, _power_sgd_in_turn)
        name = f"PowerSGD rank {rank}"
        yield Variant(name, dense(model, optimizer, batch), lambda: None, None)

    for share in LIVE_SHARES:
        yield _worm(build, batch, share)
        yield _worm(build, batch, share, compression="bf16")
    yield _worm(build, batch, HALF, fades=True)
    yield _worm(build, batch, HALF, fades=True, compression="bf16")
    yield _worm(build, batch, HALF, compression="powersgd")


def _worm(
    build: Callable[[], nn.Module],
    batch: Batch,
    share: float,
    *,
    fades: bool = False,
    compression: Literal["none", "bf16", "powersgd"] = "none",
) -> Variant:
    """Our engine, with the given share of every group's channels live; the others are held, or have
    faded."""
    model, optimizer = training(build)
    truncation = (
        TruncationConfig(removal=_AT_ONCE, compression=compression)
        if fades
        else TruncationConfig(frozen_weights="hold", compression=compression)
    )
    engine = attach(
        model,
        optimizer,
        WormConfig(truncation=truncation),
        example_inputs=batch[0][:1],
        steps_per_epoch=1,
    )
    mask = keeping(engine.groups, share)
    engine.truncate(mask)
    # A faded channel's columns in the layers behind it need not be sent either.
    scope: Literal["coupled", "producer"] = "coupled" if fades else "producer"
    plan = FreezePlan(model.module, engine.groups, ~mask.keep, scope)
    live = plan.live_fraction(list(model.module.parameters()))
    ideal = {"none": live, "bf16": live / 2}.get(compression)
    suffix = {"none": "", "bf16": " bf16", "powersgd": " PowerSGD"}[compression]
    return Variant(
        f"worm {100 * share:.0f} %{' faded' if fades else ''}{suffix}",
        dense(engine.model, engine.optimizer, batch),
        lambda: engine.traffic.sent_bytes / engine.traffic.dense_bytes,
        ideal,
    )


def keeping(groups: Groups, share: float) -> Mask:
    """The mask that keeps the first channels of every group, at least one."""
    return Mask(
        {
            group.name: torch.arange(group.num_channels) < max(1, round(share * group.num_channels))
            for group in groups
        }
    )


def _bf16_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> torch.futures.Future[Tensor]:
    """torch's ``bf16_compress_hook``, which torch registers only where there is NCCL."""
    whole = bucket.buffer()
    half = whole.to(torch.bfloat16).div_(dist.get_world_size(process_group))
    work = dist.all_reduce(half, group=process_group, async_op=True)
    reduced: torch.futures.Future[list[Tensor]] = work.get_future()
    return reduced.then(lambda _: whole.copy_(half))


def _power_sgd_in_turn(state: PowerSGDState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """torch's PowerSGD, one bucket after the other.

    Its later collectives start from callbacks.  Over gloo these run in several threads, so that
    with two buckets in flight the ranks start them in different orders, and the process aborts.
    """
    reduced: torch.futures.Future[Tensor] = powerSGD_hook(state, bucket)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(reduced.wait())
    return done
