"""Report: what a run tells people as it goes."""

from __future__ import annotations

from torch import Tensor

from ...engine.engine import Engine
from ...verdict import Verdict
from ..evaluation import EvalResult
from .result import Result

__all__ = ["Report"]


class Report:
    """What all ranks but zero report: nothing."""

    def start(self, result: Result, epochs: int, steps_per_epoch: int, engine: Engine) -> None:
        """Training begins, or goes on."""

    def step(self, engine: Engine, learning_rate: float, loss: Tensor) -> None:
        """An optimizer step is done; ``loss`` is this rank's, a scalar on the device."""

    def trained(self, step: int, loss: float, images_per_second: float) -> None:
        """The training part of an epoch is done; ``loss`` is the mean over all ranks."""

    def epoch(self, epoch: int, engine: Engine, score: EvalResult) -> None:
        """An epoch is done, and tested."""

    def check(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        """A check has been decided."""

    def phase(self, epoch: float, engine: Engine) -> None:
        """Another phase has begun."""

    def removal(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        """A check has looked how far the dropped channels have left."""

    def stage(self, epoch: float, engine: Engine, num_parameters: int) -> None:
        """The network has become smaller, and has so many parameters; others will follow."""

    def drawn(self, engine: Engine, result: Result) -> None:
        """The ticket has been drawn."""

    def stop(self, engine: Engine) -> None:
        """The run has been stopped, and can go on from its newest checkpoint."""

    def state_dict(self, engine: Engine) -> dict[str, int]:
        """How far the files have been written."""
        return {}

    def finish(self, engine: Engine, result: Result) -> None:
        """The run is over."""
