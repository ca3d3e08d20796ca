"""Measure: accuracy over all ranks, parameters, floating point operations."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ..distributed.graceful_stop import StopCoordinator, Stopped
from ..groups.forward import undisturbed

__all__ = ["EvalResult", "Speed", "count_flops", "count_parameters", "evaluate", "total_over_ranks"]


@dataclass(frozen=True)
class EvalResult:
    """On the test split.

    Attributes:
        accuracy: share of the samples, 0 to 1.
        loss: mean over the samples.
        chance, chance_loss: accuracy and loss of the best constant answer.
        num_samples: of the split.
        answers: whether what the network puts out depends on what it is given.
    """

    accuracy: float
    loss: float
    chance: float
    chance_loss: float
    num_samples: int
    answers: bool

    @property
    def is_chance(self) -> bool:
        """No better than a constant answer, up to three standard deviations of luck."""
        deviation = math.sqrt(self.chance * (1 - self.chance) / self.num_samples)
        return not self.answers or self.accuracy <= self.chance + 3 * deviation


_TOLERANCE = 1e-6
"""Of the largest output: by how much outputs differ through rounding alone."""


class Speed:
    """Images per second, from the moment it is made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()
        self._num_images = 0

    def count(self, num_images: int) -> None:
        self._num_images += num_images

    @property
    def images_per_second(self) -> float:
        return self._num_images / (time.perf_counter() - self._began)


@torch.no_grad()
def evaluate(
    network: nn.Module,
    loader: DataLoader[Any],
    num_classes: int,
    device: torch.device,
    halt: StopCoordinator,
) -> EvalResult:
    """Score the network on the test split, each rank its share.  Collective.

    All ranks use rank zero's BatchNorm statistics, as DistributedDataParallel does at its next
    training step; between two steps the ranks' own differ.

    Raises:
        Stopped: on every rank, if one of them was asked to stop in the middle of it.
    """
    for buffer in network.buffers():
        dist.broadcast(buffer, src=0)
    training, dtype = network.training, next(network.parameters()).dtype
    network.eval()
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
    for inputs, targets in loader:
        if halt.wanted:
            totals[3] = 1  # the others may have as few batches as they like left
            break
        targets = targets.to(device, non_blocking=True)
        logits = network(inputs.to(device, dtype, non_blocking=True)).float()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(dim=1) == targets).sum()
        spread = (logits - logits[:1]).abs().max() > _TOLERANCE * logits.abs().max()
        totals[:3] += torch.stack([correct, loss, spread])
        counts += torch.bincount(targets, minlength=num_classes)
    network.train(training)
    everything = total_over_ranks(torch.cat([totals, counts])).tolist()
    correct_sum, loss_sum, num_spread, num_stopped, *per_class = everything
    if num_stopped:
        raise Stopped
    count = sum(per_class)
    return EvalResult(
        accuracy=correct_sum / count,
        loss=loss_sum / count,
        chance=max(per_class) / count,
        chance_loss=-sum(n / count * math.log(n / count) for n in per_class if n),
        num_samples=int(count),
        answers=num_spread > 0,
    )


def total_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over the ranks, on the CPU.  Collective."""
    dist.all_reduce(values)
    return values.cpu()


def count_parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


@torch.no_grad()
def count_flops(network: nn.Module, sample: Tensor) -> int:
    """Floating point operations of one forward pass; a multiply and an add are two.

    Args:
        network: counted in eval mode.
        sample: a batch of one.
    """
    counter = FlopCounterMode(display=False)
    # The counter takes fused attention for nothing, and torch's fast path for transformers too.
    with undisturbed(network), sdpa_kernel(SDPBackend.MATH), counter:
        network(sample)
    return int(counter.get_total_flops())
