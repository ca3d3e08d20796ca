"""Measure: accuracy over all ranks, parameters, floating point operations."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ..cluster.halt import Halt, Stopped
from ..search.forward import undisturbed

__all__ = ["Score", "Speed", "count_flops", "count_parameters", "evaluate", "total_over_ranks"]


@dataclass(frozen=True)
class Score:
    """On the test split: ``accuracy`` and mean ``loss``."""

    accuracy: float
    loss: float


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
    network: nn.Module, loader: DataLoader[Any], device: torch.device, halt: Halt
) -> Score:
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
    for inputs, targets in loader:
        if halt.wanted:
            totals[3] = 1  # the others may have as few batches as they like left
            break
        targets = targets.to(device, non_blocking=True)
        logits = network(inputs.to(device, dtype, non_blocking=True)).float()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(dim=1) == targets).sum()
        totals[:3] += torch.stack([correct, loss, torch.tensor(len(targets), device=device)])
    network.train(training)
    correct_sum, loss_sum, count, num_stopped = total_over_ranks(totals).tolist()
    if num_stopped:
        raise Stopped
    return Score(correct_sum / count, loss_sum / count)


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
