"""worm_dist: train a network on many GPUs and come out with a smaller one.

    engine = worm_dist.attach(model, optimizer, worm_dist.WormConfig(), example_inputs=x[:1])

See ``attach`` for the engine, ``WormConfig`` for its settings, ``load_ticket`` for its result.
"""

from .config import WormConfig
from .engine import Engine, attach
from .errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DivergenceError,
    NonFiniteError,
    WormError,
)
from .gates import add_gates
from .search.groups import ChannelGroup
from .search.mask import Mask
from .ticket.file import load_ticket
from .verdict import Phase, Verdict

__all__ = [
    "BackendError",
    "ChannelGroup",
    "CheckpointError",
    "ConfigError",
    "DivergenceError",
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
