"""Rank zero's report: console, TensorBoard, and the files of the run's folder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ...engine.engine import Engine
from ...files import write_json
from ...verdict import Phase, Verdict
from ..evaluation import EvalResult
from ..run_config import RunConfig
from ..run_folder import JOURNAL, RESULT
from .console import Console
from .failed_writes import FailedWrites
from .journal import Journal
from .reporter import Report
from .result import Result
from .tensorboard import TensorBoardLog

__all__ = ["RankZeroReport"]

_CONSOLE = "console"
_STEPS_BETWEEN_LOSSES = 50
"""Reading a loss waits for the device, so it is not done every step."""


class RankZeroReport(Report):
    """Console, ``journal.jsonl``, TensorBoard, and at the end ``result.json``.

    Args:
        folder: of the run; it exists.
        config: of the run.
        unwritten: is told what the disk refuses.
        written: ``state_dict`` of the part of the run that this one goes on from.
    """

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        unwritten: FailedWrites,
        written: Mapping[str, int] | None = None,
    ) -> None:
        self._folder = folder
        self._config = config
        self._unwritten = unwritten
        self._console = Console()
        self._board = TensorBoardLog(folder, None if written is None else written["step"] + 1)
        size = 0 if written is None else written["journal"]
        self._journal = Journal(folder / JOURNAL, config.search.elbow.rule, size)
        self._loss = float("nan")
        self._images_per_second = 0.0

    def _say(self, write: Callable[..., None], *words: Any) -> None:
        """Where the job's log is on a full disk, the console is lost, and nothing else."""
        self._unwritten.spare(_CONSOLE, write, *words)

    def start(self, result: Result, epochs: int, steps_per_epoch: int, engine: Engine) -> None:
        self._say(
            self._console.event,
            f"preset {result.preset}, seed {result.seed}, world size {result.world_size} over "
            f"{result.backend}",
        )
        self._say(self._console.event, result.data)
        if engine.step:
            self._say(self._console.event, f"goes on from step {engine.step}")
        sizes = (epochs, steps_per_epoch, self._config.data.batch_size)
        self._say(self._console.start, *sizes, engine.phase, engine.step)

    def step(self, engine: Engine, learning_rate: float, loss: Tensor) -> None:
        if engine.step % _STEPS_BETWEEN_LOSSES == 1:
            self._loss = float(loss)
            values = {"train/loss": self._loss, "train/learning_rate": learning_rate}
            self._board.scalars(engine.step, values)
        self._say(self._console.step, self._loss)

    def trained(self, step: int, loss: float, images_per_second: float) -> None:
        self._loss, self._images_per_second = loss, images_per_second
        self._board.scalars(step, {"train/images_per_second": images_per_second})

    def epoch(self, epoch: int, engine: Engine, score: EvalResult) -> None:
        traffic = engine.traffic
        self._board.scalars(
            engine.step,
            {
                "test/accuracy": score.accuracy,
                "test/loss": score.loss,
                "traffic/sent_bytes_per_step": traffic.sent_bytes,
                "traffic/dense_bytes_per_step": traffic.dense_bytes,
            },
        )
        self._say(
            self._console.epoch,
            epoch,
            engine.phase,
            self._loss,
            score.accuracy,
            self._images_per_second,
            traffic,
        )

    def check(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        finding = engine.history[-1]
        words = (epoch, finding, engine.mask, verdict)
        self._unwritten.spare(JOURNAL, self._journal.check, *words)
        values = {
            "search/distance_mean": finding.distance_mean,
            "search/distance_max": finding.distance_max,
            "search/settled_threshold": self._config.search.settled,
            "search/elbow_threshold": finding.threshold,
            "search/live_fraction": verdict.live_fraction,
        }
        self._board.scalars(
            engine.step, {key: value for key, value in values.items() if value is not None}
        )
        num_checks = len(engine.history)
        if num_checks >= 8 and num_checks.bit_count() == 1:
            # Pictures of a long search come at checks 8, 16, 32, ... so that they never cost much.
            self._show(engine)
        if finding.floored:
            self._say(self._console.event, f"kept above their floor: {', '.join(finding.floored)}")

    def phase(self, epoch: float, engine: Engine) -> None:
        self._unwritten.spare(JOURNAL, self._journal.phase, epoch, engine.step, engine.phase)
        self._show(engine)
        if engine.phase is Phase.TRUNCATE:
            self._say(
                self._console.event, f"elbow at epoch {epoch:g}: truncation starts", engine.phase
            )

    def removal(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        words = (epoch, engine.step, verdict)
        self._unwritten.spare(JOURNAL, self._journal.removal, *words)
        values = {
            "search/live_fraction": verdict.live_fraction,
            "removal/left_fraction": verdict.left_fraction,
            "removal/paused": float(verdict.paused),
        }
        self._board.scalars(engine.step, values)

    def stage(self, epoch: float, engine: Engine, num_parameters: int) -> None:
        words = (epoch, engine.step, num_parameters)
        self._unwritten.spare(JOURNAL, self._journal.stage, *words)
        text = f"stage at epoch {epoch:g}: {num_parameters:,} parameters are left so far"
        self._say(self._console.event, text)

    def drawn(self, engine: Engine, result: Result) -> None:
        self._say(
            self._console.event,
            f"ticket drawn at epoch {result.ticket_epoch:g}: {result.parameters.ticket:,} of "
            f"{result.parameters.dense:,} parameters, test accuracy "
            f"{result.accuracy.before_draw:.4f} -> {result.accuracy.after_draw:.4f}",
            engine.phase,
        )

    def stop(self, engine: Engine) -> None:
        self._board.close()
        words = f"stopped after step {engine.step}; the same command goes on from there"
        self._say(self._console.event, words, engine.phase)
        self._say(self._console.close)

    def state_dict(self, engine: Engine) -> dict[str, int]:
        return {"step": engine.step, "journal": self._journal.size}

    def finish(self, engine: Engine, result: Result) -> None:
        if engine.history:
            self._show(engine)
        # Named to come last: TensorBoard draws a chart of one point for each.
        metrics = {
            f"whole_run/{name}": float(value)
            for name, value in {
                "accuracy": result.accuracy.final,
                "accuracy_after_draw": result.accuracy.after_draw,
                "parameters": result.parameters.ticket or result.parameters.dense,
                "seconds": result.seconds.total,
                "ticket_epoch": result.ticket_epoch,
                "total_bytes": result.traffic.total_bytes,
            }.items()
            if value is not None
        }
        self._board.hyperparameters(self._config.flat(), metrics)
        self._board.close()
        if self._board.lost:
            self._unwritten.note("TensorBoard", self._board.lost)
        result.unwritten = self._unwritten.names
        if result.at_chance:
            text = "the network is no better than a constant answer, and nothing has been won"
            self._say(self._console.event, text)
        if result.reason is not None:
            self._say(self._console.event, result.reason)
        content = result.as_dict()
        self._unwritten.spare(RESULT, self._write, content)
        self._say(self._console.summary, content, self._folder)

    def _write(self, content: Mapping[str, Any]) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)  # it may have been there when we began
        write_json(self._folder / RESULT, content)

    def _show(self, engine: Engine) -> None:
        self._board.figures(engine.step, engine.history, self._config.search.settled)
