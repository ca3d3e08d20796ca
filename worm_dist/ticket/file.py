"""The ticket on disk: ``ticket.json`` says what was cut, ``ticket.safetensors`` holds the weights.

Nothing in either is executed when they are read.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors.torch import load_model, save_model
from torch import nn

from ..errors import CheckpointError, ConfigError
from ..files import write_json
from ..gates import remove_gates
from ..models import build_model
from ..search.groups import Groups
from ..search.mask import Mask
from .surgery import Cut, remove_channels

__all__ = ["load_ticket", "save_ticket"]

_FORMAT_VERSION = 2


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _ModelPart(_Part):
    name: str
    num_classes: int
    in_channels: int
    arguments: dict[str, Any] = {}


class _GroupPart(_Part):
    name: str
    num_channels: int
    kept: list[int]


class _CutPart(_Part):
    module: str
    parameter: str
    dim: int
    size: int
    kept: list[int]


class _Ticket(_Part):
    format_version: int
    model: _ModelPart | None
    mask_digest: str
    groups: list[_GroupPart]
    cuts: list[_CutPart]
    sha256: str
    versions: dict[str, str]


def save_ticket(
    folder: Path,
    network: nn.Module,
    groups: Groups,
    mask: Mask,
    cuts: tuple[Cut, ...],
    model: Mapping[str, Any] | None,
) -> None:
    """Write a drawn network.

    Args:
        folder: made if it is not there.
        network: after the draw, not wrapped.
        groups, mask, cuts: of the dense network.
        model: arguments of ``worm_dist.models.build_model`` that build the dense network; None if
            only its owner can build it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "ticket.safetensors"
    # A copy: under ZeRO the parameters are views of one flat tensor, which safetensors refuses.
    save_model(copy.deepcopy(network), str(weights))
    ticket = _Ticket(
        format_version=_FORMAT_VERSION,
        model=None if model is None else _ModelPart(**model),
        mask_digest=mask.digest,
        groups=[
            _GroupPart(name=g.name, num_channels=g.num_channels, kept=_indices(mask[g.name]))
            for g in groups
        ],
        cuts=[
            _CutPart(
                module=cut.module,
                parameter=cut.parameter,
                dim=cut.dim,
                size=cut.kept.numel(),
                kept=_indices(cut.kept),
            )
            for cut in cuts
        ],
        sha256=hashlib.sha256(weights.read_bytes()).hexdigest(),
        versions={"torch": torch.__version__, "torch_pruning": torch_pruning.__version__},
    )
    write_json(folder / "ticket.json", ticket.model_dump())
    # safetensors makes files that only their owner may read.
    weights.chmod((folder / "ticket.json").stat().st_mode)


def load_ticket(path: str | Path, build: Callable[[], nn.Module] | None = None) -> nn.Module:
    """The drawn network, in a fresh process.

    Args:
        path: folder that holds ``ticket.json`` and ``ticket.safetensors``.
        build: returns the dense network that the ticket was drawn from, with any weights; not
            needed for tickets of the command line, which name a model of ``worm_dist.models``.

    Returns:
        The network with its weights, on the CPU, in training mode like any new module.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the network.
    """
    folder = Path(path)
    ticket = _read(folder)
    network = build() if build is not None else _build(ticket.model, folder)
    remove_gates(network)  # a ticket has none; its weights hold what they were
    cuts = [_cut(part, network, folder) for part in ticket.cuts]
    remove_channels(network, cuts)
    try:
        load_model(network, str(folder / "ticket.safetensors"))
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder / 'ticket.safetensors'}: its tensors do not fit the network: {error}"
        ) from error
    return network


def _read(folder: Path) -> _Ticket:
    try:
        content = json.loads((folder / "ticket.json").read_bytes())
        weights = (folder / "ticket.safetensors").read_bytes()
        ticket = _Ticket.model_validate(content)
    except OSError as error:
        raise CheckpointError(f"{error.filename}: {error.strerror}; is it a ticket?") from error
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError) as error:
        raise CheckpointError(f"{folder / 'ticket.json'}: not a ticket: {error}") from error
    if ticket.format_version != _FORMAT_VERSION:
        raise CheckpointError(
            f"{folder / 'ticket.json'}: format {ticket.format_version}, but this version of "
            f"worm_dist reads format {_FORMAT_VERSION}"
        )
    if hashlib.sha256(weights).hexdigest() != ticket.sha256:
        raise CheckpointError(
            f"{folder / 'ticket.safetensors'}: its sha256 is not the one in ticket.json; the file "
            "was damaged or replaced"
        )
    return ticket


def _build(model: _ModelPart | None, folder: Path) -> nn.Module:
    if model is None:
        raise CheckpointError(
            f"{folder / 'ticket.json'}: it does not say how to build the dense network; call "
            "load_ticket(path, build=...) with a function that returns it"
        )
    try:
        return build_model(**dict(model))
    except ConfigError as error:
        raise CheckpointError(f"{folder / 'ticket.json'}: {error}") from error


def _cut(part: _CutPart, network: nn.Module, folder: Path) -> Cut:
    modules, parameters = dict(network.named_modules()), dict(network.named_parameters())
    shape = parameters[part.parameter].shape if part.parameter in parameters else ()
    in_range = bool(part.kept) and all(0 <= place < part.size for place in part.kept)
    fits = part.module in modules and 0 <= part.dim < len(shape) and shape[part.dim] == part.size
    if not fits or not in_range:
        raise CheckpointError(
            f"{folder / 'ticket.json'}: its cut of {part.parameter!r} does not fit the network; "
            "does build return the network that the ticket was drawn from?"
        )
    kept = torch.zeros(part.size, dtype=torch.bool)
    kept[part.kept] = True
    return Cut(part.module, part.parameter, part.dim, kept)


def _indices(flags: torch.Tensor) -> list[int]:
    return [int(place) for place in flags.nonzero().flatten()]
