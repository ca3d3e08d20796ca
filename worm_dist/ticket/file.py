"""Ticket files: ``ticket.json`` lists the cuts, ``ticket.safetensors`` holds the weights.

Reading them executes no code, and sizes are validated before memory is allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch_pruning
from pydantic import ValidationError
from torch import Tensor, nn

from ..checkpoint.durable_io import sync_folder, write_json, writing
from ..config import WormConfig
from ..distributed.agreed_failure import on_every_rank, refused_on_every_rank
from ..distributed.collectives import Communicator
from ..errors import CheckpointError, ConfigError
from ..groups.channel_groups import Groups
from ..groups.gates import remove_gates
from ..groups.mask import Mask
from ..groups.selective_norm import SelectiveBatchNorm2d
from ..models import build_model
from ..pruning.surgery import Cut, remove_channels
from ..schema import first_problem
from ..user_function import is_user_function
from .meta_init import build_on_meta
from .metadata import METADATA, CutRecord, GroupRecord, ModelRecord, Record, read_metadata
from .weights import open_weights, write_weights

__all__ = ["WEIGHTS", "dense_network_on_meta", "load_ticket", "save_ticket"]

WEIGHTS = "ticket.safetensors"


def save_ticket(
    folder: Path,
    network: nn.Module,
    groups: Groups,
    mask: Mask,
    cuts: tuple[Cut, ...],
    example_inputs: Any,
    settings: WormConfig,
    model: Mapping[str, Any] | None,
    comm: Communicator | None = None,
) -> None:
    """Write a drawn network.  Collective if a communicator is given: rank zero writes.

    Args:
        folder: the ticket's folder; created if missing.
        network: the unwrapped network after the draw.
        groups: the channel groups of the dense network.
        mask: the mask over these groups that was drawn.
        cuts: the cuts of the dense network that were made.
        example_inputs: inputs of the dense network, whose shape is recorded if they are one tensor.
        settings: the engine's settings.
        model: the arguments of ``worm_dist.models.build_model`` for the dense network; None if it
            is not one of these models.
        comm: the communicator of the ranks that call this together; None for one rank alone.

    Raises:
        CheckpointError: the disk is full or cannot be written; raised on all of these ranks.
        ConfigError: ``model`` is not such arguments; raised on all of these ranks.
    """
    with nullcontext() if comm is None else refused_on_every_rank(comm):
        built_from = None if model is None else _model_record(model)

    def unsaved(failures: str) -> CheckpointError:
        return CheckpointError(f"save_ticket: {failures}")

    with nullcontext() if comm is None else on_every_rank(comm, unsaved):
        if comm is not None and comm.rank > 0:
            return
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
        record = Record(
            model=built_from,
            input_shape=_sample_shape(example_inputs),
            settings=settings.model_dump(mode="json"),
            mask_digest=mask.digest,
            groups=[GroupRecord.of(group, mask[group.name]) for group in groups],
            cuts=[CutRecord.of(cut) for cut in cuts],
            weights=write_weights(folder / WEIGHTS, network),
            versions={"torch": torch.__version__, "torch_pruning": torch_pruning.__version__},
        )
        with writing(folder / METADATA):
            write_json(folder / METADATA, record.signed().model_dump())
        sync_folder(folder)


def _sample_shape(inputs: Any) -> list[int] | None:
    """The shape of one sample; None if the inputs are not one batch of floats."""
    if not isinstance(inputs, Tensor) or not inputs.is_floating_point() or inputs.dim() < 2:
        return None
    return list(inputs.shape[1:])


def _model_record(model: Mapping[str, Any]) -> ModelRecord:
    try:
        return ModelRecord.model_validate(model)
    except ValidationError as error:
        raise ConfigError(
            f"save_ticket: model: {first_problem(error)}; give the arguments of "
            "worm_dist.models.build_model"
        ) from error


def load_ticket(path: str | Path, build: Callable[[], nn.Module] | str | None = None) -> nn.Module:
    """Load a drawn network, such as in a fresh process.

    Args:
        path: the folder that holds ``ticket.json`` and ``ticket.safetensors``.
        build: a function that returns the dense network that the ticket was drawn from, with any
            weights; not needed for tickets of the command line, which name a model of
            ``worm_dist.models``.  If its network was built by a function of yours, give the name
            of that function, ``package.module:function``: it is called with the arguments that the
            ticket records.  A ticket alone never decides what code runs.

    Returns:
        The network with its weights, on the CPU, in training mode like any new module.

    Raises:
        CheckpointError: a file is missing or damaged, or does not fit the network; or weights are
            NaN or infinite.
        ConfigError: ``build`` is not a function that returns a network, or is the name of another
            one than the ticket's.
    """
    folder = Path(path)
    record = read_metadata(folder)
    if isinstance(build, str):
        build = _named(build, record.model, folder)
    built = None if build is None else _built(build)
    with open_weights(folder / WEIGHTS, record.weights) as weights:
        try:
            network = dense_network_on_meta(record.model, len(weights)) if built is None else built
            remove_gates(network)  # in a ticket, gates are folded into the weights
            remove_channels(network, [cut.cut(network) for cut in record.cuts])
        except ConfigError as error:
            raise CheckpointError(f"{folder / METADATA}: {error}") from error
        weights.check(network)
        selected = _selected(network)
        if built is None:
            network.to_empty(device="cpu")
        weights.fill(network)
        for name, indices in _selected(network).items():
            if not torch.equal(indices, selected[name]):
                raise CheckpointError(
                    f"{folder / WEIGHTS}: {name[:100]!r} are not the channels that {METADATA} "
                    "keeps; the file was changed"
                )
    return network


def _selected(network: nn.Module) -> dict[str, Tensor]:
    """Copies of the channels that selective norms read, by the buffers' names."""
    return {
        f"{name}.indices": module.indices.clone()
        for name, module in network.named_modules()
        if isinstance(module, SelectiveBatchNorm2d)
    }


def _named(name: str, model: ModelRecord | None, folder: Path) -> Callable[[], nn.Module]:
    """The function that builds the recorded network.

    Raises:
        ConfigError: the ticket records another one, or none.
    """
    if model is None or model.name != name:
        recorded = "no model" if model is None else f"the model {model.name[:100]!r}"
        raise ConfigError(
            f"load_ticket: build is {name[:100]!r}, but {folder / METADATA} records {recorded}; "
            "give a function that returns the dense network: load_ticket(path, build=lambda: "
            "Net(...))"
        )
    return partial(build_model, **dict(model))


def _built(build: Callable[[], object]) -> nn.Module:
    """The network of the user's function.

    Raises:
        ConfigError: it is not a function, or what it returns has no weights to fill.
    """
    if isinstance(build, nn.Module) or not callable(build):
        raise ConfigError(
            f"load_ticket: build is a {type(build).__name__}; give a function that returns the "
            "dense network: load_ticket(path, build=lambda: Net(...))"
        )
    network = build()
    if not isinstance(network, nn.Module):
        raise ConfigError(
            f"load_ticket: build returned a {type(network).__name__}; let it return the dense "
            "network"
        )
    if any(tensor.is_meta for tensor in (*network.parameters(), *network.buffers())):
        raise ConfigError(
            "load_ticket: build returned a network on the meta device; let it return one with "
            "memory for its weights"
        )
    return network


def dense_network_on_meta(model: ModelRecord | None, num_tensors: int) -> nn.Module:
    """Build the dense network on the meta device, without memory for its weights.

    Args:
        model: the record of its builder.
        num_tensors: the number of tensors of the ticket, which limits the size of the network.

    Raises:
        ConfigError: the ticket does not say how to build it, or it cannot be built in this way.
    """
    if model is None:
        raise ConfigError(
            "it does not say how to build the dense network; call load_ticket(path, build=...) "
            "with a function that returns it"
        )
    if is_user_function(model.name):
        raise ConfigError(
            f"its dense network is built by {model.name[:100]!r}, a function of the user's, and "
            "loading runs no code that only a file names; call load_ticket(path, build="
            f"{model.name[:100]!r}) where that function can be imported"
        )
    # Most layers have one or two tensors; activations and containers have none.
    network = build_on_meta(partial(build_model, **dict(model)), limit=10 * num_tensors + 100)
    unsaved = dict(network.named_buffers()).keys() - network.state_dict().keys()
    if unsaved:
        raise ConfigError(
            f"{model.name[:100]!r} computes {min(unsaved)} when it is built, which is not in a "
            "ticket; call load_ticket(path, build=...)"
        )
    return network
