"""Evaluation: accuracy and loss over all ranks, throughput, and parameter counts."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.graceful_stop import StopCoordinator, Stopped
from ..distributed.progress import Progress
from ..groups.forward import in_eval
from ..groups.full_shape import full_numel
from .precision import autocast

__all__ = [
    "EvalResult",
    "Speed",
    "broadcast_buffers",
    "count_parameters",
    "evaluate",
    "total_over_ranks",
]


@dataclass(frozen=True)
class EvalResult:
    """Result on the test split.

    Attributes:
        accuracy: correct samples as a fraction, 0 to 1.
        loss: mean cross-entropy over the samples.
        chance, chance_loss: accuracy and loss of the best constant prediction.
        num_samples: number of samples in the split.
        output_varies: True if the network's outputs depend on its inputs.
    """

    accuracy: float
    loss: float
    chance: float
    chance_loss: float
    num_samples: int
    output_varies: bool

    @property
    def is_chance(self) -> bool:
        """True if the accuracy is within three standard deviations of a constant prediction's."""
        return not self.output_varies or self.accuracy <= self.chance + 3 * self._deviation

    @property
    def can_tell_chance(self) -> bool:
        """True if there are enough samples to tell chance from twice that accuracy."""
        return 3 * self._deviation <= self.chance

    @property
    def _deviation(self) -> float:
        """Standard deviation of a constant prediction's accuracy, as if samples were drawn."""
        return math.sqrt(self.chance * (1 - self.chance) / self.num_samples)


_TOLERANCE = 1e-6
"""Rounding error of an output, relative to the largest one."""


class Speed:
    """Throughput in images per second, measured from construction."""

    def __init__(self) -> None:
        self._start_time = time.perf_counter()
        self._num_images = 0

    def count(self, num_images: int) -> None:
        self._num_images += num_images

    @property
    def images_per_second(self) -> float:
        return self._num_images / (time.perf_counter() - self._start_time)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    stop: StopCoordinator,
    progress: Progress,
    precision: str,
) -> EvalResult:
    """Evaluate the network on the test split, each rank on its share.  Collective.

    All ranks use rank zero's BatchNorm statistics, which are those that are saved; in training the
    statistics differ from rank to rank.

    Args:
        network: the network without its wrapper.
        batches: inputs and classes of this rank's share of the test split, on the device.
        num_classes: number of classes.
        device: the device to compute on.
        stop: checked after every batch.
        progress: told after every batch that this rank is at work.
        precision: the run's; what is tested is what trains.

    Raises:
        Stopped: a rank received a stop request during the evaluation; raised on every rank.
    """
    broadcast_buffers(network)
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
    with in_eval(network):
        for inputs, targets in batches:
            if stop.requested:
                totals[3] = 1  # the other ranks learn of it in the all-reduce below
                break
            progress.at_work()
            with autocast(precision, network):
                logits = network(inputs)
            logits = logits.float()
            loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
            correct = (logits.argmax(dim=1) == targets).sum()
            varies = (logits - logits[:1]).abs().max() > _TOLERANCE * logits.abs().max()
            totals[:3] += torch.stack([correct, loss, varies])
            counts += torch.bincount(targets, minlength=num_classes)
    sums = total_over_ranks(torch.cat([totals, counts])).tolist()
    correct_sum, loss_sum, num_varying, num_stopped, *per_class = sums
    if num_stopped:
        raise Stopped
    count = sum(per_class)
    return EvalResult(
        accuracy=correct_sum / count,
        loss=loss_sum / count,
        chance=max(per_class) / count,
        chance_loss=-sum(n / count * math.log(n / count) for n in per_class if n),
        num_samples=int(count),
        output_varies=num_varying > 0,
    )


@torch.no_grad()
def broadcast_buffers(network: nn.Module) -> None:
    """Give all ranks rank zero's buffers, by one broadcast for each dtype.  Collective."""
    buffers: dict[torch.dtype, list[Tensor]] = {}
    for buffer in network.buffers():
        buffers.setdefault(buffer.dtype, []).append(buffer)
    for alike in buffers.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in alike])
        dist.broadcast(flat, src=0)
        if dist.get_rank() != 0:
            parts = flat.split([buffer.numel() for buffer in alike])
            for buffer, part in zip(alike, parts, strict=True):
                buffer.copy_(part.view_as(buffer))


def total_over_ranks(values: Tensor) -> Tensor:
    """Sum a tensor over the ranks, in place; return it on the CPU.  Collective."""
    dist.all_reduce(values)
    return values.cpu()


def count_parameters(network: nn.Module) -> int:
    return sum(map(full_numel, network.parameters()))
