"""Failing: something that raises where it was called, on one rank."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from worm_dist import Engine
from worm_dist.engine import context, draw

__all__ = ["BROKEN", "PLACES", "broken", "everything"]

BROKEN = "broken on purpose"

PLACES: dict[str, tuple[Any, str, bool]] = {
    "before the rehearsal": (draw, "require_cuttable", False),
    "in the rehearsal": (draw, "Rehearsal", False),
    "after the rehearsal": (draw, "_rehearse", True),
    "before the wrapper is released": (context.TrainingContext, "drop_gradients", False),
    "before the optimizer is cut": (draw, "transfer_state", False),
    "after the optimizer was cut": (draw, "transfer_state", True),
    "before the network is cut": (draw, "remove_channels", False),
    "after the network was cut": (draw, "remove_channels", True),
    "before gates are folded": (draw, "_fold_gates", False),
    "after gates were folded": (draw, "_fold_gates", True),
    "before the statistics": (draw, "Statistics", False),
    "after the statistics": (draw, "Statistics", True),
    "before the new wrapper": (context.TrainingContext, "rewrap", False),
    "after the new wrapper": (context.TrainingContext, "rewrap", True),
}
"""Of a draw: object, name of what is called, and whether it has been done when it raises."""


@contextmanager
def broken(place: str, rank: int | None) -> Iterator[None]:
    """What is called at a place raises on this rank; on all if None."""
    target, name, is_done = PLACES[place]
    whole = getattr(target, name)

    def breaking(*arguments: Any, **keywords: Any) -> Any:
        if dist.is_initialized() and rank not in (None, dist.get_rank()):
            return whole(*arguments, **keywords)
        if is_done:
            whole(*arguments, **keywords)
        raise RuntimeError(BROKEN)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(target, name, breaking)
        yield


def everything(engine: Engine, network: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """All that a failed draw must leave as it was, to the bit, and by the same objects."""
    return {
        "phase": engine.phase.value,
        "mask": engine.mask,
        "step": engine.step,
        "names": [name for name, _ in network.named_modules()],
        "modules": {
            name: (
                id(module),
                type(module),
                module.training,
                {key: value for key, value in vars(module).items() if _is_plain(value)},
                len(module._forward_hooks),
                len(module._forward_pre_hooks),
            )
            for name, module in network.named_modules()
        },
        "parameters": {
            name: (id(p), p.requires_grad, p.detach().clone(), None if p.grad is None else +p.grad)
            for name, p in network.named_parameters()
        },
        "buffers": {name: (id(b), b.clone()) for name, b in network.named_buffers()},
        "optimizer": [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": [id(parameter) for parameter in group["params"]]}
            for group in optimizer.param_groups
        ],
        "state": {
            id(owner): {
                key: value.clone() if isinstance(value, Tensor) else value
                for key, value in state.items()
            }
            for owner, state in optimizer.state.items()
        },
    }


def _is_plain(value: object) -> bool:
    return isinstance(value, (bool, int, float, str, tuple))
