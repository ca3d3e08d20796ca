"""Retraining: from where, and for how long, the ticket is trained after the draw."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from math import ceil
from typing import Any

from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from ..engine.engine import Engine
from ..interval import Interval
from .optim import ScheduleStart
from .rank_state import Position
from .run_config import RunConfig

__all__ = ["Retraining"]

logger = logging.getLogger(__name__)


class Retraining:
    """What the settings of ``retraining`` do before and after the draw.

    Args:
        config: the run's settings.
        network: the network that is trained.
        rewound: a copy of it with its initial weights; None if weights are kept.
        schedule, start: the learning rate's schedule, and where it starts.
        steps_per_epoch: optimizer steps in an epoch.
    """

    def __init__(
        self,
        config: RunConfig,
        network: nn.Module,
        rewound: nn.Module | None,
        schedule: LRScheduler,
        start: ScheduleStart,
        steps_per_epoch: int,
    ) -> None:
        self._settings = config.retraining
        self._search_epochs = config.epochs
        self._network = network
        self._rewound = rewound
        self._schedule = schedule
        self._start = start
        self._steps_per_epoch = steps_per_epoch
        weights = self._settings.weights
        lengths = steps_per_epoch, config.epochs * steps_per_epoch
        self._rewind_step = weights.steps(*lengths) if isinstance(weights, Interval) else 0

    @property
    def copies(self) -> Sequence[nn.Module]:
        """The copies of the network that a draw is to prune too."""
        return () if self._rewound is None else (self._rewound,)

    def num_epochs(self, position: Position) -> int:
        """Epochs of the whole run, as far as is known: those of the search at most, or up to the
        end of the ticket's."""
        if position.ticket_step is None or self._settings.epochs is None:
            return self._search_epochs
        return ceil(position.ticket_step / self._steps_per_epoch) + self._settings.epochs

    def is_good_enough(self, position: Position, accuracy: float | None) -> bool:
        """Whether the ticket has reached the accuracy at which its training may end."""
        wanted = self._settings.until_accuracy
        if position.ticket_step is None or wanted is None or accuracy is None:
            return False
        return accuracy >= wanted

    def before_step(self, step: int) -> None:
        """Remember the weights, if this many steps have been taken when they are to be."""
        if self._rewound is not None and self._rewind_step and step == self._rewind_step:
            self._rewound.load_state_dict(self._network.state_dict())

    def begin(self, engine: Engine, position: Position) -> None:
        """Begin to train the ticket that has just been drawn and tested."""
        position.ticket_step = engine.step
        if self._rewound is not None:
            if engine.step < self._rewind_step:
                logger.warning(
                    "retraining.weights: the ticket was drawn at step %d, before step %d; it goes "
                    "on from its initial weights",
                    engine.step,
                    self._rewind_step,
                )
            self._network.load_state_dict(self._rewound.state_dict())
            self._rewound = None
            position.has_learnt = False
        if self._settings.optimizer == "fresh":
            engine.optimizer.state.clear()
        self._restart_schedule(position)
        for group, rate in zip(engine.optimizer.param_groups, self._schedule.get_last_lr()):
            group["lr"] = rate

    def _restart_schedule(self, position: Position) -> None:
        if self._settings.epochs is not None and position.ticket_step is not None:
            self._start.step, self._start.epochs = position.ticket_step, self._settings.epochs
            first = self._schedule.lr_lambdas[0](position.ticket_step)  # type: ignore[attr-defined]
            self._schedule._last_lr = [first * base for base in self._schedule.base_lrs]

    def state_dict(self) -> dict[str, Any] | None:
        """The remembered weights by name; None if there are none."""
        return None if self._rewound is None else self._rewound.state_dict()

    def load_state_dict(self, state: dict[str, Any] | None, position: Position) -> None:
        """Restore a state, after the engine has pruned ``copies`` and before the schedule's own
        state is loaded."""
        if state is None:
            self._rewound = None
        elif self._rewound is not None:
            self._rewound.load_state_dict(state)
        self._restart_schedule(position)
