"""Pretrained: a ticket in the folder that Hugging Face's ``save_pretrained`` writes.

The config of a drawn network notes which channels are left, so ``config.json`` tells it too.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from ..engine.attachment import dense_shapes_of
from ..engine.engine import Engine
from ..errors import CheckpointError, ConfigError
from ..pruning.surgery import cuts_of, remove_channels, ungated
from ..schema import first_problem
from ..ticket.metadata import CutRecord
from ..verdict import Phase

__all__ = ["CUTS", "note_ticket", "restore_ticket"]

CUTS = "worm_dist_cuts"
"""Attribute of a ticket's config: the cuts of the dense network."""


def note_ticket(engine: Engine, network: Any) -> None:
    """Note in the network's config which channels the ticket keeps, once it is drawn."""
    config = getattr(network, "config", None)
    if engine.phase is not Phase.TICKET or config is None or hasattr(config, CUTS):
        return
    assert engine.mask is not None
    cuts = ungated(cuts_of(engine.groups, engine.mask, dense_shapes_of(engine)))
    setattr(config, CUTS, [CutRecord.of(cut).model_dump() for cut in cuts])


def restore_ticket(network: Any, folder: str | Path) -> Any:
    """Read the ticket that ``save_pretrained`` has written::

        model = AutoModelForImageClassification.from_pretrained(out, ignore_mismatched_sizes=True)
        model = restore_ticket(model, out)

    Args:
        network: what ``from_pretrained`` returns for the folder: the dense network, in which the
            weights that have become smaller are initialised again.
        folder: the same folder, or its name on the hub.

    Returns:
        A network of the same class, smaller, with all of its weights.

    Raises:
        CheckpointError: the folder holds no ticket, or one of another network.
    """
    cuts = getattr(getattr(network, "config", None), CUTS, None)
    if cuts is None:
        raise CheckpointError(
            f"{folder}: config.json notes no removed channels; was it saved after the draw?"
        )
    kind = type(network)

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        kind.__init__(self, *args, **kwargs)
        with torch.device("cpu"):  # from_pretrained makes the network on the meta device
            records = [CutRecord.model_validate(cut) for cut in cuts]
            remove_channels(self, [record.cut(self) for record in records])

    # The weights' names in the files are not always those in the network, and from_pretrained
    # knows how to translate them; so it has to find a network of the right size.
    small = type(kind.__name__, (kind,), {"__init__": init, "__module__": kind.__module__})
    try:
        restored = small.from_pretrained(folder, dtype=network.dtype)  # type: ignore[attr-defined]
    except (ConfigError, ValidationError) as error:
        problem = first_problem(error) if isinstance(error, ValidationError) else error
        raise CheckpointError(f"{folder}: {problem}") from error
    restored.__class__ = kind
    return restored.to(network.device)
