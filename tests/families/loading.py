"""Loading: tickets in a process that has not seen how they were drawn."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import worm_dist
from tests.families.drawing import outputs_of
from tests.families.families import FAMILIES, OWN
from tests.families.finding import structure_of
from worm_dist.config import SearchConfig
from worm_dist.pruning.exactness import find_drawable_groups

__all__ = ["load_all"]


def load_all(tickets: str) -> None:
    """Print, as JSON by family, what is wrong with its ticket, "" if nothing is; and for networks
    of our own the structure of their groups."""
    torch.set_num_threads(1)
    names = sorted(folder.name for folder in Path(tickets).iterdir())
    wrong = {name: _wrong(Path(tickets) / name) for name in names}
    print(json.dumps({"wrong": wrong, "structures": {n: _structure(n) for n in names if n in OWN}}))


def _wrong(folder: Path) -> str:
    family = FAMILIES[folder.name]
    try:
        network = worm_dist.load_ticket(folder, build=family.built)
    except Exception as error:  # one that cannot be loaded says nothing about the others
        return f"{type(error).__name__}: {error}"
    outputs = outputs_of(network, family.inputs(9))
    expected = torch.load(folder / "outputs.pt", weights_only=True)
    same = len(outputs) == len(expected) and all(map(torch.equal, outputs, expected))
    return "" if same else "other outputs"


def _structure(name: str) -> str:
    family = FAMILIES[name]
    search = SearchConfig(importance=family.score)
    return structure_of(find_drawable_groups(family.built(), family.inputs(0), search))
