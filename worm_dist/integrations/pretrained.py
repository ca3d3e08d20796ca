"""Pretrained: a ticket in the folder that Hugging Face's ``save_pretrained`` writes.

The config of a drawn network notes which channels are left, so ``config.json`` tells it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import nn

from ..engine.engine import Engine
from ..errors import CheckpointError, ConfigError
from ..groups.gates import remove_gates
from ..pruning.surgery import cuts_of, remove_channels, ungated
from ..schema import first_problem
from ..ticket.metadata import CutRecord
from ..verdict import Phase

__all__ = ["note_ticket", "restore_ticket"]

_KEY = "worm_dist_cuts"


def note_ticket(engine: Engine, network: Any) -> None:
    """Note in the network's config which channels the ticket keeps, once it is drawn."""
    config = getattr(network, "config", None)
    if engine.phase is not Phase.TICKET or config is None or hasattr(config, _KEY):
        return
    assert engine.mask is not None
    cuts = ungated(cuts_of(engine.groups, engine.mask, engine._dense.shapes))
    setattr(config, _KEY, [CutRecord.of(cut).model_dump() for cut in cuts])


def restore_ticket(network: nn.Module, folder: str | Path) -> nn.Module:
    """Make a network the ticket that ``save_pretrained`` has written::

        model = AutoModelForImageClassification.from_pretrained(out, ignore_mismatched_sizes=True)
        restore_ticket(model, out)

    Args:
        network: what ``from_pretrained`` returns for the folder: the dense network, in which the
            weights that have become smaller are initialised again.
        folder: the local folder, with weights in safetensors files.

    Returns:
        The same network, smaller, with all of its weights.

    Raises:
        CheckpointError: the folder holds no ticket, or one of another network.
    """
    cuts = getattr(getattr(network, "config", None), _KEY, None)
    if cuts is None:
        raise CheckpointError(
            f"{folder}: config.json notes no removed channels; was it saved after the draw?"
        )
    files = sorted(Path(folder).glob("model*.safetensors"))
    weights = {name: value for file in files for name, value in load_file(file).items()}
    try:
        records = [CutRecord.model_validate(cut) for cut in cuts]
        remove_gates(network)  # in a ticket, gates are folded into the weights
        remove_channels(network, [record.cut(network) for record in records])
    except (ConfigError, ValidationError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{folder}: {problem}") from error
    state = network.state_dict()
    known = {state[name].data_ptr() for name in weights if name in state}
    missing = [name for name, value in state.items() if value.data_ptr() not in known]
    unfit = [
        name
        for name, value in weights.items()
        if name not in state or state[name].shape != value.shape
    ]
    for name in (*missing, *unfit):
        raise CheckpointError(
            f"{folder}: its weights do not fit the network: {name[:100]!r} is missing on one side "
            "or of another size"
        )
    network.load_state_dict(weights, strict=False)
    return network
