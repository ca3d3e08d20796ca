"""Measures the time of a pass on this machine: forward, or forward and backward."""

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
"""Time limit: after it no further round starts, once there are ``_FEWEST_ROUNDS``."""


@dataclass(frozen=True)
class Measured:
    """Measured times.

    Attributes:
        seconds: median time of each network.
        rounds: number of measurements of each network.
        device: name of the device.
    """

    seconds: tuple[float, ...]
    rounds: int
    device: str


def measure(
    networks: Sequence[nn.Module],
    sample_shape: Shape,
    num_samples: int,
    precision: str,
    *,
    trains: bool = True,
) -> Measured:
    """Time the networks in turn, so that a busy machine slows all of them alike.

    Args:
        networks: the networks.  They are moved to the GPU, if there is one, and run on noise, which
            spoils their statistics and gradients.
        sample_shape: shape of one input.
        num_samples: samples in a batch.
        precision: ``bf16`` for torch's autocast; the others are float32.
        trains: True for forward and backward passes in training mode, False for forward passes in
            eval mode.

    Raises:
        ConfigError: a network does not accept such a batch.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    inputs = torch.randn(num_samples, *sample_shape, device=device)
    rounds: list[list[float]] = []
    try:
        for network in networks:
            network.to(device).train(trains)
            _seconds(
                network, inputs, precision, trains
            )  # the first pass allocates and chooses kernels
        began = time.perf_counter()
        while len(rounds) < _FEWEST_ROUNDS or (
            len(rounds) < _MOST_ROUNDS and time.perf_counter() - began < _SECONDS
        ):
            rounds.append([_seconds(network, inputs, precision, trains) for network in networks])
    except (RuntimeError, ValueError) as error:  # such as BatchNorm on a single value
        what = "be trained" if trains else "run"
        raise ConfigError(
            f"--batch: the network cannot {what} on batches of {num_samples}: {error}"
        ) from error
    medians = tuple(statistics.median(seconds) for seconds in zip(*rounds))
    return Measured(medians, len(rounds), _name_of(device))


def _seconds(network: nn.Module, inputs: Tensor, precision: str, trains: bool) -> float:
    bf16 = precision == "bf16"
    network.zero_grad(set_to_none=True)
    _wait(inputs.device)
    began = time.perf_counter()
    autocast = torch.autocast(inputs.device.type, dtype=torch.bfloat16, enabled=bf16)
    with autocast, torch.set_grad_enabled(trains):
        logits = network(inputs)
        if trains:
            loss = nn.functional.cross_entropy(logits, logits.detach().argmax(dim=1))
    if trains:
        loss.backward()
    _wait(inputs.device)
    return time.perf_counter() - began


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    num_threads = torch.get_num_threads()
    return f"CPU, {num_threads} thread{'s' if num_threads > 1 else ''}"
