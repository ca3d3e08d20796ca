"""Interface of a run's report, with no-op methods."""

from __future__ import annotations

from torch import Tensor

from ...engine.engine import Engine
from ...schema import Count, Schema
from ...verdict import Verdict
from ..evaluation import EvalResult
from .result import Result

__all__ = ["Report", "ReportSchema"]


class ReportSchema(Schema):
    """Schema of ``Report.state_dict``."""

    step: Count
    journal: Count


class Report:
    """Receives the events of a run; this base class, used on all ranks but zero, ignores them."""

    def start(self, result: Result, epochs: int, steps_per_epoch: int, engine: Engine) -> None:
        """Training starts or resumes."""

    def step(self, engine: Engine, learning_rate: float, loss: Tensor) -> None:
        """An optimizer step is done; ``loss`` is this rank's, a scalar tensor on the device."""

    def trained(self, step: int, loss: float, images_per_second: float) -> None:
        """The last step of an epoch is done; ``loss`` is the mean over all ranks."""

    def epoch(self, epoch: int, engine: Engine, evaluation: EvalResult, flops: int) -> None:
        """An epoch is done, including its test; ``flops`` are those that a sample now takes, in a
        forward pass."""

    def check(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        """A check is done."""

    def phase(self, epoch: float, engine: Engine) -> None:
        """A phase starts."""

    def removal(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        """A check has measured the progress of the gradual removal."""

    def stage(self, epoch: float, engine: Engine, num_parameters: int) -> None:
        """A stage of the draw is done; ``num_parameters`` are left, and further stages follow."""

    def drawn(self, engine: Engine, result: Result) -> None:
        """The ticket has been drawn."""

    def stop(self, engine: Engine) -> None:
        """The run stops gracefully; it can be resumed from its newest checkpoint."""

    def state_dict(self, engine: Engine) -> dict[str, int]:
        """The number of steps and the size of the journal in bytes so far, to resume from."""
        return {"step": engine.step, "journal": 0}

    def finish(self, engine: Engine, result: Result) -> None:
        """The run is finished."""
