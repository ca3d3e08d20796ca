"""Measures the time of a pass on this machine: forward, or forward and backward."""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from .target import Shape

__all__ = ["Measured", "affordable_batch", "measure"]

logger = logging.getLogger(__name__)

_ENOUGH_SECONDS = 0.25
"""Time of a pass from which on a larger batch would not make it more exact."""
_SMALLEST_BATCH = 2
"""BatchNorm cannot be trained on a single value."""
_FEWEST_ROUNDS, _MOST_ROUNDS = 3, 9
_SECONDS = 10.0
"""Time limit: after it no further round starts, once there are ``_FEWEST_ROUNDS``."""


@dataclass(frozen=True)
class Measured:
    """Measured times.

    Attributes:
        seconds: median time of each network.
        num_samples: samples in a batch.
        rounds: number of measurements of each network; 0 if the times were given.
        device: name of the device.
    """

    seconds: tuple[float, ...]
    num_samples: int
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
    device = _device()
    inputs = torch.randn(num_samples, *sample_shape, device=device)
    rounds: list[list[float]] = []
    with _refused(num_samples, trains):
        for network in networks:
            network.to(device).train(trains)
            _seconds(
                network, inputs, precision, trains
            )  # the first pass allocates and chooses kernels
        began = time.perf_counter()
        while len(rounds) < _FEWEST_ROUNDS or (
            len(rounds) < _MOST_ROUNDS and time.perf_counter() - began < _SECONDS
        ):
            logger.info(
                "plan: measuring passes on batches of %d, round %d", num_samples, len(rounds) + 1
            )
            rounds.append([_seconds(network, inputs, precision, trains) for network in networks])
    medians = tuple(statistics.median(seconds) for seconds in zip(*rounds))
    return Measured(medians, num_samples, len(rounds), _name_of(device))


def affordable_batch(
    network: nn.Module, sample_shape: Shape, num_samples: int, precision: str
) -> int:
    """The number of samples, at most ``num_samples``, on which to measure forward and backward
    passes.

    On a GPU that is all of them.  A CPU takes a time in proportion to their number, and minutes for
    a batch of large images, so there the batch is doubled only until a pass takes a quarter of a
    second.

    Raises:
        ConfigError: the network does not accept such a batch.
    """
    device = _device()
    if device.type == "cuda":
        return num_samples
    batch = min(_SMALLEST_BATCH, num_samples)
    network.to(device).train()
    while True:
        logger.info("plan: choosing the batch for a measurement: %d", batch)
        with _refused(batch, trains=True):
            inputs = torch.randn(batch, *sample_shape)
            took = min(_seconds(network, inputs, precision, trains=True) for _ in range(2))
        if batch == num_samples or took >= _ENOUGH_SECONDS:
            return batch
        batch = min(2 * batch, num_samples)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def _refused(num_samples: int, trains: bool) -> Iterator[None]:
    """Report a batch that a network does not accept."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # such as BatchNorm on a single value
        what = "be trained" if trains else "run"
        raise ConfigError(
            f"--batch: the network cannot {what} on batches of {num_samples}: {error}"
        ) from error


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
