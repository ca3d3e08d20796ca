"""Saved names: a network's weights under the names that ``save_pretrained`` gives them.

Those are the names of the first published weights of its kind, for some networks not its own.
``from_pretrained`` translates them back, but the trainer, which resumes by ``load_state_dict``,
leaves such weights as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers.core_model_loading import revert_weight_conversion

__all__ = ["translated"]


@contextmanager
def translated(network: Any) -> Iterator[None]:
    """Context in which ``network.load_state_dict`` takes saved names too.

    Weights that are saved in other shapes, such as several in one, are left out.

    Args:
        network: a network of transformers.
    """
    own_names = _own_names(network)

    def rename(module: Any, state: dict[str, Any], *unused: Any) -> None:
        renamed = {own_names.get(name, name): value for name, value in state.items()}
        state.clear()
        state.update(renamed)

    handle = network.register_load_state_dict_pre_hook(rename)
    try:
        yield
    finally:
        handle.remove()


def _own_names(network: Any) -> dict[str, str]:
    """The network's name of every weight that is only renamed, by the name in the file."""
    # An element of memory for each, by which it is recognised.
    marks = {
        name: torch.empty((), dtype=value.dtype).expand(value.shape)
        for name, value in network.state_dict().items()
    }
    names = {mark.data_ptr(): name for name, mark in marks.items()}
    return {
        saved: names[value.data_ptr()]
        for saved, value in revert_weight_conversion(network, marks).items()
        if value.data_ptr() in names and value.shape == marks[names[value.data_ptr()]].shape
    }
