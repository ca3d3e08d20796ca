"""Contents of a ticket, with what its network and the dense network cost."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..checkpoint.durable_io import read_small
from ..config import WormConfig
from ..errors import CheckpointError, ConfigError
from ..groups.flops import count_flops
from ..groups.mask import Mask
from ..ticket.file import WEIGHTS, dense_network_on_meta, load_ticket
from ..ticket.metadata import METADATA, Record, read_metadata
from ..ticket.weights import open_weights
from ..training.evaluation import count_parameters
from ..training.put_aside import RESULT
from .speed import Speed, measure_speed

__all__ = ["Contents", "Counts", "mask_of", "read_contents"]

_MAX_RESULT_BYTES = 1 << 20
_FIGURES = ("preset", "seed", "world_size", "backend", "data", "ticket_epoch", "accuracy")


@dataclass(frozen=True)
class Counts:
    """A figure of the dense network and of the ticket."""

    dense: int
    ticket: int


@dataclass(frozen=True)
class Contents:
    """Contents of a ticket.

    Attributes:
        folder: the ticket's folder.
        record: its metadata.
        mask: the mask that it was drawn with.
        written: the date of ``ticket.json``, which a copy of the file may have changed.
        run: figures of the run that wrote the ticket; None if the ticket is in no run's folder.
        input_shape: shape of one input; None if not known.
        parameters: numbers of parameters; None if the network cannot be built from the record.
        flops: FLOPs of one forward pass on one sample; None if that or the input is not known.
        unknown: the reason if there are no parameters or no FLOPs.
        speed: measured images per second; None if not requested.
    """

    folder: Path
    record: Record
    mask: Mask
    written: datetime
    run: Mapping[str, Any] | None
    input_shape: Sequence[int] | None
    parameters: Counts | None
    flops: Counts | None
    unknown: str | None
    speed: Speed | None

    @property
    def changed_settings(self) -> dict[str, Any]:
        """The recorded settings that differ from the defaults, by dotted key."""
        defaults = _flat(WormConfig().model_dump(mode="json"))
        settings = _flat(self.record.settings or {})
        return {key: value for key, value in settings.items() if defaults.get(key) != value}

    def as_dict(self) -> dict[str, Any]:
        """The contents as JSON values."""
        record = self.record
        return {
            "folder": str(self.folder),
            "format_version": record.format_version,
            "written": self.written.isoformat(timespec="seconds"),
            "model": None if record.model is None else record.model.model_dump(),
            "input_shape": None if self.input_shape is None else list(self.input_shape),
            "mask_digest": record.mask_digest,
            "num_channels": self.mask.num_channels,
            "num_kept": self.mask.num_kept,
            "groups": [
                {**group.model_dump(), "num_kept": len(group.kept)} for group in record.groups
            ],
            "parameters": None if self.parameters is None else asdict(self.parameters),
            "flops": None if self.flops is None else asdict(self.flops),
            "unknown": self.unknown,
            "speed": None if self.speed is None else asdict(self.speed),
            "weights": record.weights.model_dump(),
            "run": self.run,
            "settings": record.settings,
            "versions": record.versions,
        }


def mask_of(record: Record) -> Mask:
    """The mask that a ticket was drawn with."""
    return Mask({group.name: group.keep for group in record.groups})


def read_contents(
    folder: Path, input_shape: Sequence[int] | None, num_samples: int | None
) -> Contents:
    """Read a ticket, build its networks and count their costs.

    Args:
        folder: the ticket's folder.
        input_shape: shape of one input; None for the one that the ticket records.
        num_samples: images in a batch of the measurement of speed; None for no measurement.

    Raises:
        CheckpointError: the ticket is missing or damaged.
        ConfigError: the input does not fit, or the speed cannot be measured.
    """
    record = read_metadata(folder)
    shape = input_shape or record.input_shape
    with open_weights(folder / WEIGHTS, record.weights) as weights:
        num_tensors = len(weights)
    parameters, flops, speed, unknown = None, None, None, None
    try:
        dense = dense_network_on_meta(record.model, num_tensors)
    except ConfigError as error:
        unknown = f"parameters and FLOPs are not known: {error}"
    else:
        network = load_ticket(folder)
        parameters = Counts(count_parameters(dense), count_parameters(network))
        if shape is None:
            unknown = "FLOPs are not known: the ticket does not record its input; give --input"
        else:
            flops = _flops(dense, network, shape)
            if num_samples is not None:
                speed = measure_speed(record, network, shape, num_samples)
    if num_samples is not None and speed is None:
        raise ConfigError(f"--speed: {unknown}")
    return Contents(
        folder=folder,
        record=record,
        mask=mask_of(record),
        written=datetime.fromtimestamp((folder / METADATA).stat().st_mtime).astimezone(),
        run=_run_beside(folder, record),
        input_shape=shape,
        parameters=parameters,
        flops=flops,
        unknown=unknown,
        speed=speed,
    )


def _flops(dense: nn.Module, network: nn.Module, shape: Sequence[int]) -> Counts:
    sample = torch.zeros(1, *shape)
    try:
        ticket = count_flops(network, sample)
        # Operators are counted without being computed.
        return Counts(count_flops(dense.to("meta"), sample.to("meta")), ticket)
    except (RuntimeError, ValueError, AssertionError) as error:  # of torch, or of the network
        first = str(error).partition("\n")[0]
        raise ConfigError(
            f"--input: the network does not run on {'x'.join(map(str, shape))}: {first}"
        ) from error


def _run_beside(folder: Path, record: Record) -> dict[str, Any] | None:
    """Figures of the run in whose folder the ticket is, if that run drew the same mask."""
    result: Any = None
    with suppress(CheckpointError, ValueError):
        result = json.loads(read_small(folder.resolve().parent / RESULT, _MAX_RESULT_BYTES))
    if not isinstance(result, dict) or result.get("mask_digest") != record.mask_digest:
        return None
    return {name: result.get(name) for name in _FIGURES}


def _flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        below = _flat(value, f"{prefix}{name}.") if isinstance(value, dict) and value else None
        flat |= {f"{prefix}{name}": value} if below is None else below
    return flat
