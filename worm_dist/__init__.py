"""worm_dist: train a network on many GPUs and come out with a smaller one.

    engine = worm_dist.attach(model, optimizer, worm_dist.WormConfig(), example_inputs=x[:1])

See ``attach`` for the engine, ``WormConfig`` for its settings, ``load_ticket`` for its result.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import WormConfig
    from .engine.attach import attach
    from .engine.engine import Engine
    from .errors import (
        BackendError,
        CheckpointError,
        CollapseError,
        ConfigError,
        DivergenceError,
        DrawError,
        NonFiniteError,
        WormError,
    )
    from .groups.channel_groups import ChannelGroup
    from .groups.gates import add_gates
    from .groups.mask import Mask
    from .ticket.file import load_ticket
    from .verdict import Phase, Verdict

__all__ = [
    "BackendError",
    "ChannelGroup",
    "CheckpointError",
    "CollapseError",
    "ConfigError",
    "DivergenceError",
    "DrawError",
    "Engine",
    "Mask",
    "NonFiniteError",
    "Phase",
    "Verdict",
    "WormConfig",
    "WormError",
    "add_gates",
    "attach",
    "load_ticket",
]
__version__ = "0.1.0"

_HOMES = {
    "ChannelGroup": ".groups.channel_groups",
    "Engine": ".engine.engine",
    "Mask": ".groups.mask",
    "Phase": ".verdict",
    "Verdict": ".verdict",
    "WormConfig": ".config",
    "add_gates": ".groups.gates",
    "attach": ".engine.attach",
    "load_ticket": ".ticket.file",
}
"""Modules of public names; all others are in ``errors``.  Names are imported lazily: importing
torch takes seconds, and the command line reports a wrong setting without it."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES.get(name, ".errors"), __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
