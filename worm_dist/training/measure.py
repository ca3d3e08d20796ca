"""Measure: accuracy over all ranks, parameters, floating point operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from ..search.forward import undisturbed

__all__ = ["Score", "count_flops", "count_parameters", "evaluate", "total_over_ranks"]


@dataclass(frozen=True)
class Score:
    """On the test split: ``accuracy`` and mean ``loss``."""

    accuracy: float
    loss: float


@torch.no_grad()
def evaluate(network: nn.Module, loader: DataLoader[Any], device: torch.device) -> Score:
    """Score the network on the test split, each rank its share.  Collective.

    All ranks use rank zero's BatchNorm statistics, as DistributedDataParallel does at its next
    training step; between two steps the ranks' own differ.
    """
    for buffer in network.buffers():
        dist.broadcast(buffer, src=0)
    training, dtype = network.training, next(network.parameters()).dtype
    network.eval()
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for inputs, targets in loader:
        targets = targets.to(device, non_blocking=True)
        logits = network(inputs.to(device, dtype, non_blocking=True)).float()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        correct = (logits.argmax(dim=1) == targets).sum()
        totals += torch.stack([correct, loss, torch.tensor(len(targets), device=device)])
    network.train(training)
    correct_sum, loss_sum, count = total_over_ranks(totals).tolist()
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
