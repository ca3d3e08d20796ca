"""Tickets to show, verify, compare and export, and changes of them that fit their digests."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD

import worm_dist
from tests.nets import randomise
from worm_dist import Engine, Mask, WormConfig

__all__ = ["NAMED", "change", "change_weights", "copied", "drawn"]

NAMED: dict[str, Any] = {
    "name": "vgg_small",
    "num_classes": 10,
    "in_channels": 3,
    "arguments": {"widths": [8, 12]},
}
"""The ticket keeps channels 0 to 3 of 8 and 0 to 5 of 12, unless another share is given."""


def drawn(
    network: nn.Module, share: float = 0.5, shape: tuple[int, int, int] = (3, 8, 8)
) -> Engine:
    """Keeps the first channels of every group."""
    randomise(network, seed=1)
    config = WormConfig(truncation={"mode": "off"}, search={"prune_ratio": 0.4})
    optimizer = SGD(network.parameters(), lr=0.05)
    engine = worm_dist.attach(network, optimizer, config, example_inputs=torch.zeros(1, *shape))
    sizes = engine.groups.sizes
    engine.draw(Mask({name: torch.arange(size) < share * size for name, size in sizes.items()}))
    return engine


def copied(ticket: Path, folder: Path) -> Path:
    shutil.copytree(ticket, folder)
    return folder


def change(ticket: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the metadata, and sign them."""
    content = json.loads((ticket / "ticket.json").read_text())
    change(content)
    unsigned = {key: value for key, value in content.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()
    (ticket / "ticket.json").write_text(json.dumps({**content, "digest": digest}))


def change_weights(ticket: Path, change_tensors: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the weights, and record their digest."""
    path = ticket / "ticket.safetensors"
    tensors = load_file(path)
    change_tensors(tensors)
    save_file(tensors, path)
    content = path.read_bytes()
    digest = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    change(ticket, lambda record: record.update(weights=digest))
