"""Stopwatch: seconds that a forward and backward pass takes on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .target import Shape

__all__ = ["Measured", "measure"]

_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 9
_SECONDS = 10.0
"""After these no further round begins, once there are a few."""


@dataclass(frozen=True)
class Measured:
    """Attributes:
    seconds: median of each network.
    rounds: how often each was measured.
    device: what on.
    """

    seconds: tuple[float, ...]
    rounds: int
    device: str


def measure(
    networks: Sequence[nn.Module], sample_shape: Shape, num_samples: int, precision: str
) -> Measured:
    """Time the networks in turn, so that what slows the machine down slows down all of them.

    Args:
        networks: are moved to the GPU, if there is one, and trained on noise; their statistics and
            gradients are no longer of use afterwards.
        sample_shape: of one input.
        num_samples: in a batch.
        precision: ``bf16`` for torch's autocast.

    Raises:
        ConfigError: a network does not train on such a batch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = torch.randn(num_samples, *sample_shape, device=device)
    rounds: list[list[float]] = []
    try:
        for network in networks:
            network.to(device).train()
            _seconds(network, inputs, precision)  # the first pass allocates and chooses kernels
        began = time.perf_counter()
        while len(rounds) < _FEWEST_ROUNDS or (
            len(rounds) < _MOST_ROUNDS and time.perf_counter() - began < _SECONDS
        ):
            rounds.append([_seconds(network, inputs, precision) for network in networks])
    except (RuntimeError, ValueError) as error:  # such as BatchNorm on a single value
        raise ConfigError(
            f"--batch: the network does not train on batches of {num_samples}: {error}"
        ) from error
    medians = tuple(statistics.median(seconds) for seconds in zip(*rounds))
    return Measured(medians, len(rounds), _described(device))


def _seconds(network: nn.Module, inputs: Tensor, precision: str) -> float:
    bf16 = precision == "bf16"
    network.zero_grad(set_to_none=True)
    _wait(inputs.device)
    began = time.perf_counter()
    with torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=bf16):
        logits = network(inputs)
        loss = nn.functional.cross_entropy(logits, logits.detach().argmax(dim=1))
    loss.backward()
    _wait(inputs.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _described(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} thread{'s' if num_threads > 1 else ''}"
