"""Progress: what every integration does after an optimizer step, and what it logs."""

from __future__ import annotations

from ..engine.engine import Engine
from ..verdict import Verdict

__all__ = ["Progress"]


class Progress:
    """Checks after every optimizer step, and draws what the verdict offers.

    Args:
        engine: the engine of the training.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._step = engine.step

    def before_training(self) -> None:
        """Take the first mask, if ``search.first`` is ``before_training`` and no step has been
        taken.  Collective."""
        if self._engine.is_due and not self._engine.step:
            self._engine.check()

    def after_pass(self) -> dict[str, float] | None:
        """Check and draw if an optimizer step has been taken since the last call; passes that only
        accumulate gradients, and steps that a loss scaler skips, are passed over.  Collective.

        Returns:
            The figures to log, the same on all ranks; None if there are no new ones.

        Raises:
            See ``Engine.check`` and ``Engine.draw``.
        """
        engine = self._engine
        if engine.step == self._step:
            return None
        self._step = engine.step
        was_due = engine.is_due
        verdict = engine.check()
        if verdict.stage or verdict.ticket:
            engine.draw()
        return _figures(engine, verdict) if was_due else None


def _figures(engine: Engine, verdict: Verdict) -> dict[str, float]:
    figures = {
        "distance_mean": verdict.distance_mean,
        "distance_max": verdict.distance_max,
        "generation": verdict.generation,
        "live_fraction": verdict.live_fraction,
        "removed_fraction": verdict.removed_fraction,
        "sent_bytes": engine.traffic.sent_bytes,
        "parameters": sum(parameter.numel() for parameter in engine.model.parameters()),
    }
    return {f"worm/{name}": float(value) for name, value in figures.items() if value is not None}
