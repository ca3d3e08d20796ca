"""Report of rank zero: console, TensorBoard and the files of the run's folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...checkpoint.durable_io import write_json
from ...checkpoint.lease import Lease
from ...engine.engine import Engine
from ...verdict import Phase, Verdict
from ..evaluation import EvalResult, count_parameters
from ..ineffective_settings import ineffective_settings
from ..put_aside import JOURNAL, RESULT, TICKET
from ..run_config import RunConfig
from .console import Console
from .dashboard import (
    CHARTS,
    METRICS,
    MOST_COMPARED,
    OUTCOME,
    VERDICTS,
    final_scalars,
    settings_that_matter,
)
from .failed_writes import FailedWrites
from .journal import Journal
from .outcome import outcome
from .reporter import Report
from .result import Result
from .run_description import DESCRIPTION, write_description
from .tensorboard import TensorBoardLog
from .verdict_lines import elbow_line, stage_line, ticket_line

__all__ = ["RankZeroReport"]

logger = logging.getLogger(__name__)

_CONSOLE = "console"
_STEPS_BETWEEN_LOSSES = 50
"""Interval in steps; reading a loss synchronizes with the device, so it is not done every step."""


class RankZeroReport(Report):
    """Writes the console, ``journal.jsonl``, TensorBoard events and, at the end, ``result.json``.

    Args:
        folder: the run's folder, which exists.
        config: the run's settings.
        console: prints for people.
        failed_writes: records outputs that cannot be written.
        lease: the folder's lock, which must be held to write there.
        saved: ``state_dict`` of the report at the checkpoint; None for a new run.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        console: Console,
        failed_writes: FailedWrites,
        lease: Lease,
        saved: Mapping[str, int] | None = None,
    ) -> None:
        self._folder = folder
        self._config = config
        self._failed_writes = failed_writes
        self._lease = lease
        self._console = console
        self._tensorboard = TensorBoardLog(folder, None if saved is None else saved["step"] + 1)
        size = 0 if saved is None else saved["journal"]
        self._journal = Journal(folder / JOURNAL, config.search.elbow.rule, size)
        self._loss = float("nan")
        self._images_per_second = 0.0
        self._dense_flops: int | None = None
        self._dense_parameters: int | None = None

    def _print(self, write: Callable[..., None], *args: Any) -> None:
        """Write to the console; a job's log on a full disk must not stop the run."""
        self._failed_writes.best_effort(_CONSOLE, write, *args)

    def start(self, result: Result, epochs: int, steps_per_epoch: int, engine: Engine) -> None:
        device = next(engine.model.parameters()).device
        described = (self._folder, self._config, device)
        self._failed_writes.best_effort(DESCRIPTION, write_description, *described)
        self._dense_flops, self._dense_parameters = result.flops.dense, result.parameters.dense
        self._print(
            self._console.event,
            f"preset {result.preset}, seed {result.seed}, world size {result.world_size} over "
            f"{result.backend}",
        )
        self._print(self._console.event, result.data)
        self._tensorboard.charts(CHARTS)
        if engine.step:
            self._print(self._console.event, f"goes on from step {engine.step}")
        for line in ineffective_settings(self._config, steps_per_epoch):
            logger.warning("worm_dist: warning: %s", line)
        sizes = (epochs, steps_per_epoch, self._config.data.batch_size)
        self._print(self._console.start, *sizes, engine.phase, engine.step)

    def step(self, engine: Engine, learning_rate: float, loss: Tensor) -> None:
        self._lease.require()
        if engine.step % _STEPS_BETWEEN_LOSSES == 1:
            self._loss = float(loss)
            values = {"train/loss": self._loss, "train/learning_rate": learning_rate}
            self._tensorboard.scalars(engine.step, values)
        self._print(self._console.step, self._loss)

    def trained(self, step: int, loss: float, images_per_second: float) -> None:
        self._loss, self._images_per_second = loss, images_per_second
        self._tensorboard.scalars(step, {"train/images_per_second": images_per_second})

    def epoch(self, epoch: int, engine: Engine, evaluation: EvalResult, flops: int) -> None:
        traffic = engine.traffic
        values = {
            "test/accuracy": evaluation.accuracy,
            "test/loss": evaluation.loss,
            "traffic/sent_bytes_per_step": traffic.sent_bytes,
            "traffic/dense_bytes_per_step": traffic.dense_bytes,
            "traffic/total_bytes": traffic.total_sent_bytes + traffic.control_bytes,
            "compute/flops_per_sample": flops,
            "compute/dense_flops_per_sample": self._dense_flops,
            "compute/parameters": count_parameters(engine.model),
        }
        self._tensorboard.scalars(engine.step, _present(values))
        self._print(
            self._console.epoch,
            epoch,
            engine.phase,
            self._loss,
            evaluation.accuracy,
            self._images_per_second,
            traffic,
        )

    def check(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        record, budget, mask = engine.history[-1], engine.budget, engine.mask
        reached = None if budget is None or mask is None else budget.share_of(mask)
        args = (epoch, record, mask, verdict, reached)
        self._failed_writes.best_effort(JOURNAL, self._journal.check, *args)
        values = {
            "search/distance_mean": record.distance_mean,
            "search/distance_max": record.distance_max,
            "search/settled_threshold": self._config.search.settled,
            "search/elbow_threshold": record.threshold,
            "search/live_fraction": verdict.live_fraction,
            "search/budget_reached": reached,
        }
        self._tensorboard.scalars(engine.step, _present(values))
        num_checks = len(engine.history)
        if num_checks >= 8 and num_checks.bit_count() == 1:
            # In a long search plots are drawn at checks 8, 16, 32, ..., which bounds their cost.
            self._plot(engine)
        if record.floored:
            floor = self._config.search.min_keep_ratio
            kept = (
                "kept above their floor"
                if floor
                else "one channel kept of layers that the mask drops"
            )
            self._print(self._console.event, f"{kept}: {', '.join(record.floored)}")

    def phase(self, epoch: float, engine: Engine) -> None:
        self._failed_writes.best_effort(
            JOURNAL, self._journal.phase, epoch, engine.step, engine.phase
        )
        self._plot(engine)
        if engine.phase is Phase.TRUNCATE:
            search, truncation = self._config.search, self._config.truncation
            line = elbow_line(epoch, engine.history[-1], search, truncation)
            self._verdict(engine.step, line, engine.phase)

    def removal(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        args = (epoch, engine.step, verdict)
        self._failed_writes.best_effort(JOURNAL, self._journal.removal, *args)
        values = {
            "search/live_fraction": verdict.live_fraction,
            "removal/removed_fraction": verdict.removed_fraction,
            "removal/paused": float(verdict.paused),
        }
        self._tensorboard.scalars(engine.step, values)

    def stage(self, epoch: float, engine: Engine, num_parameters: int) -> None:
        args = (epoch, engine.step, num_parameters)
        self._failed_writes.best_effort(JOURNAL, self._journal.stage, *args)
        self._verdict(engine.step, stage_line(epoch, num_parameters, self._dense_parameters))

    def drawn(self, engine: Engine, result: Result) -> None:
        self._verdict(engine.step, ticket_line(result), engine.phase)

    def _verdict(self, step: int, line: str, phase: Phase | None = None) -> None:
        self._print(self._console.event, line, phase)
        self._tensorboard.text(step, VERDICTS, line)

    def stop(self, engine: Engine) -> None:
        self._tensorboard.close()
        text = f"stopped after step {engine.step}; the same command goes on from there"
        self._print(self._console.ending, text, engine.phase)
        self._console.close()
        self._say_if_console_is_lost(text)

    def state_dict(self, engine: Engine) -> dict[str, int]:
        return {"step": engine.step, "journal": self._journal.size}

    def finish(self, engine: Engine, result: Result) -> None:
        if engine.history:
            self._plot(engine)
        said = [*outcome(result.as_dict()), *filter(None, [result.reason])]
        self._tensorboard.scalars(0, final_scalars(result))
        settings = settings_that_matter(self._config)
        self._tensorboard.hyperparameters(settings, METRICS, MOST_COMPARED)
        self._tensorboard.text(engine.step, OUTCOME, "\n".join(f"- {line}" for line in said))
        self._tensorboard.close()
        if self._tensorboard.write_error:
            self._failed_writes.record("TensorBoard", self._tensorboard.write_error)
        result.failed_writes = self._failed_writes.names
        if result.at_chance:
            text = "the network is no better than a constant answer; this run has no usable result"
            self._print(self._console.ending, text)
        if result.reason is not None:
            self._print(self._console.ending, result.reason)
        content = result.as_dict()
        if TICKET not in self._failed_writes:  # with a result the run would count as finished
            self._failed_writes.best_effort(RESULT, self._write, content)
        self._print(self._console.summary, content, self._folder)
        self._say_if_console_is_lost(f"the run has finished; its figures are in {self._folder}")

    def _say_if_console_is_lost(self, text: str) -> None:
        """The last words on the standard error, if the standard output does not take them."""
        if _CONSOLE in self._failed_writes:
            logger.warning("%s (the console was lost)", text)

    def _write(self, content: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)  # it may have been deleted during the run
        write_json(self._folder / RESULT, content)

    def _plot(self, engine: Engine) -> None:
        self._tensorboard.figures(engine.step, engine.history, self._config.search.settled)


def _present(values: Mapping[str, float | None]) -> dict[str, float]:
    return {name: value for name, value in values.items() if value is not None}
