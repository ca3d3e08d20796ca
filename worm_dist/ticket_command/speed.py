"""Speed of a ticket and of its dense network on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigError
from ..models import build_model
from ..planning.timing import measure
from ..ticket.metadata import Record

__all__ = ["Speed", "measure_speed"]


@dataclass(frozen=True)
class Speed:
    """Measured speed of forward passes in eval mode, without gradients, in float32.

    Attributes:
        dense, ticket: images per second, by the median time of a batch.
        num_samples: images in a batch.
        rounds: number of batches that were measured of each network, in turn.
        device: name of the device.
    """

    dense: float
    ticket: float
    num_samples: int
    rounds: int
    device: str


def measure_speed(
    record: Record, network: nn.Module, input_shape: Sequence[int], num_samples: int
) -> Speed:
    """Measure both networks.

    Args:
        record: the ticket's metadata, which names the dense network's model.
        network: the ticket's network; moved to the GPU if there is one.
        input_shape: shape of one image: channels, height, width.
        num_samples: images in a batch.

    Raises:
        ConfigError: the networks do not take images, or not such a batch.
    """
    assert record.model is not None
    if len(input_shape) != 3:
        raise ConfigError(
            f"--speed: the network's input is of shape {list(input_shape)}, not of an image"
        )
    channels, height, width = input_shape
    dense = build_model(**dict(record.model))
    measured = measure(
        (dense, network), (channels, height, width), num_samples, "fp32", trains=False
    )
    dense_speed, ticket_speed = (num_samples / seconds for seconds in measured.seconds)
    return Speed(dense_speed, ticket_speed, num_samples, measured.rounds, measured.device)
