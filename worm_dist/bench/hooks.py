"""Compression hooks of plain DDP that run over gloo, and the bytes that they send."""

# No postponed annotations here: torch checks the hook's annotations, which must be classes.
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from ..comm_hooks.callbacks import then

__all__ = ["HOOKS", "POWER_SGD_RANK", "SentBytes", "bf16_hook", "power_sgd_hook"]

POWER_SGD_RANK = 4
"""Rank of the approximation in whole runs, of the hook and of the engine alike."""

_EXACT_STEPS = 2
"""Steps that are averaged exactly before the approximation begins, as in the engine."""


def bf16_hook(
    process_group: dist.ProcessGroup | None, bucket: GradBucket
) -> torch.futures.Future[Tensor]:
    """Reimplementation of torch's ``bf16_compress_hook``, which requires NCCL."""
    buffer = bucket.buffer()
    compressed = buffer.to(torch.bfloat16).div_(dist.get_world_size(process_group))
    work = dist.all_reduce(compressed, group=process_group, async_op=True)
    reduced: torch.futures.Future[list[Tensor]] = work.get_future()
    return then(reduced, lambda _: buffer.copy_(compressed), work=work)


def power_sgd_hook(state: PowerSGDState, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """torch's PowerSGD hook, waiting for each bucket.

    Its later collectives are started from callbacks.  Over gloo these run in several threads, so
    with two buckets in flight the ranks start them in different orders, and the process aborts.
    """
    reduced: torch.futures.Future[Tensor] = powerSGD_hook(state, bucket)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(reduced.wait())
    return done


@dataclass
class SentBytes:
    """Bytes that a counted hook has passed to collectives so far; the hook's state.

    Attributes:
        total: the bytes.
        power_sgd: the state of torch's own hook, for PowerSGD.
    """

    total: int = 0
    power_sgd: PowerSGDState = field(
        default_factory=lambda: PowerSGDState(
            None,
            matrix_approximation_rank=POWER_SGD_RANK,
            start_powerSGD_iter=_EXACT_STEPS,
        )
    )


def _counted_bf16(sent: SentBytes, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    sent.total += 2 * bucket.buffer().numel()
    return bf16_hook(None, bucket)


def _counted_power_sgd(sent: SentBytes, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    state, numel = sent.power_sgd, bucket.buffer().numel()
    is_exact = state.iter < state.start_powerSGD_iter
    before = state.total_numel_after_compression
    reduced = power_sgd_hook(state, bucket)
    # torch counts compressed steps only.
    sent.total += 4 * (numel if is_exact else state.total_numel_after_compression - before)
    return reduced


def _register(hook: Callable[..., object]) -> Callable[[DistributedDataParallel], SentBytes]:
    def register(model: DistributedDataParallel) -> SentBytes:
        sent = SentBytes()
        model.register_comm_hook(sent, hook)
        return sent

    return register


HOOKS: Mapping[str, Callable[[DistributedDataParallel], SentBytes]] = {
    "bf16": _register(_counted_bf16),
    "PowerSGD": _register(_counted_power_sgd),
}
"""Functions that register a hook with a model of float32 parameters, by name."""
