"""States: training states for these tests, and whether two are the same to the bit."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam

from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.manifest import CheckpointInfo

__all__ = ["difference", "info", "save", "small_state", "training_state"]


def info(step: int, value: float | None = None) -> CheckpointInfo:
    return CheckpointInfo(step=step, world_size=2, phase="search", value=value)


def save(manager: CheckpointManager, step: int, value: float | None = None) -> Path:
    """A checkpoint whose state tells its step."""
    return manager.save(info(step, value), {"run": small_state(step)})


def small_state(seed: int) -> dict[str, Any]:
    """A little of everything."""
    random = torch.Generator().manual_seed(seed)
    return {
        "step": seed,
        "weights": torch.randn(3, 4, generator=random),
        "half": torch.randn(5, generator=random).bfloat16(),
        "state": {0: {"step": torch.tensor(float(seed))}, 1: (None, True, [1.5, "text"])},
    }


def training_state(channels_last: bool = False) -> dict[str, Any]:
    """Of a network and two optimizers after a step."""
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    if channels_last:
        network = network.to(memory_format=torch.channels_last)
    optimizers = [SGD(network.parameters(), lr=0.1, momentum=0.9), Adam(network.parameters())]
    network(torch.randn(2, 3, 8, 8)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    states = [optimizer.state_dict() for optimizer in optimizers]
    return {"model": dict(network.state_dict()), "optimizers": states}


def difference(one: Any, other: Any, place: str = "state") -> str:
    """Where two states differ in type, order, form or any bit; "" if nowhere."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        forms = [(t.dtype, t.shape, t.stride()) for t in (one, other)]
        if forms[0] != forms[1] or _bytes(one) != _bytes(other):
            return f"{place}: {forms[0]} {one} and {forms[1]} {other}"
        return ""
    if type(one) is not type(other):
        return f"{place}: {type(one)} and {type(other)}"
    if isinstance(one, dict):
        if list(one) != list(other) or [type(k) for k in one] != [type(k) for k in other]:
            return f"{place}: keys {list(one)} and {list(other)}"
        one, other = list(one.values()), list(other.values())
    if isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{place}: {len(one)} and {len(other)} values"
        found = (difference(a, b, f"{place}.{i}") for i, (a, b) in enumerate(zip(one, other)))
        return next((text for text in found if text), "")
    if isinstance(one, float):
        one, other = struct.pack(">d", one), struct.pack(">d", other)
    return "" if one == other else f"{place}: {one!r} and {other!r}"


def _bytes(tensor: Tensor) -> bytes:
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.view(-1).view(torch.uint8).numpy().tobytes()
