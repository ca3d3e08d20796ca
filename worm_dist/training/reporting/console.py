"""Console output of a run, for a terminal or a job's log file."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO, cast

import rich.console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column, Table
from rich.text import Text

from ...engine.traffic import Traffic
from ...terminal import console_of
from ...verdict import Phase
from .outcome import compared, count, percent

__all__ = ["Console"]

_WIDTH_OF_A_LOG = 80


class _LosableFile:
    """A text file whose write errors are kept instead of raised.

    rich must not see them: it ends the process without a word when the reader of a pipe is gone,
    and its thread, which draws the progress bar, would print a traceback.

    Args:
        file: the file to write to.

    Attributes:
        error: the first error; from then on nothing is written.
    """

    def __init__(self, file: TextIO) -> None:
        self.error: OSError | None = None
        self._file = file

    def write(self, text: str) -> None:
        self._unless_lost(self._file.write, text)

    def flush(self) -> None:
        self._unless_lost(self._file.flush)

    def _unless_lost(self, write: Callable[..., object], *args: str) -> None:
        if self.error is None:
            try:
                write(*args)
            except OSError as error:
                self.error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


class Console:
    """Prints one line for every epoch and event; on a terminal also a progress bar below them.

    In other files, such as a job's log, the lines are plain: no colours, no control characters.

    Args:
        file: the stream to write to; the default is the standard output.

    Methods that print raise ``OSError`` when the stream is lost, such as a pipe without a reader.
    """

    def __init__(self, file: TextIO | None = None) -> None:
        self._file = _LosableFile(file or sys.stdout)
        self._console = console_of(cast(TextIO, self._file), _WIDTH_OF_A_LOG)
        self._progress = _progress(self._console)
        self._task: TaskID | None = None
        self._epochs = 0

    def start(
        self,
        epochs: int,
        steps_per_epoch: int,
        batch_size: int,
        phase: Phase,
        steps_done: int = 0,
    ) -> None:
        """Start the progress bar.

        Args:
            epochs: number of epochs of the whole run.
            steps_per_epoch: optimizer steps in an epoch.
            batch_size: images in an optimizer step, over all ranks.
            phase: the current phase.
            steps_done: optimizer steps taken before the run was resumed.
        """
        self._epochs = epochs
        if self._console.is_terminal:
            self._task = self._progress.add_task(
                "training",
                total=epochs * steps_per_epoch,
                completed=steps_done,
                phase=phase,
                loss=float("nan"),
                batch_size=batch_size,
            )
            self._progress.start()
            # The bar hides the cursor, and an error may end the run at any point.
            atexit.register(self.close)

    def step(self, loss: float) -> None:
        """Advance the progress bar by one step.

        Args:
            loss: the newest known training loss.
        """
        if self._task is not None:
            self._progress.update(self._task, advance=1, loss=loss)
            self._raise_if_lost()

    def event(self, text: str, phase: Phase | None = None) -> None:
        """Print an event.

        Args:
            text: the line to print.
            phase: the phase that begins with the event, if any.
        """
        if self._task is not None and phase is not None:
            self._progress.update(self._task, phase=phase)
        self._line(f"* {text}", style="bold")

    def ending(self, text: str, phase: Phase | None = None) -> None:
        """Print how the run ends, before its summary or instead of it; see ``event``."""
        self.event(text, phase)

    def epoch(
        self,
        epoch: int,
        phase: Phase,
        loss: float,
        accuracy: float,
        images_per_second: float,
        traffic: Traffic,
    ) -> None:
        """Print the summary of an epoch.

        Args:
            epoch: the epoch's number, counted from 1.
            phase: the phase at its end.
            loss: mean training loss.
            accuracy: accuracy on the test split, 0 to 1.
            images_per_second: throughput over all ranks.
            traffic: the traffic of the last step, shown as a percentage of a dense step's.
        """
        sent = percent(traffic.sent_bytes, traffic.dense_bytes, digits=0) or "-"
        digits = len(str(self._epochs))
        self._line(
            f"epoch {epoch:{digits}}/{self._epochs}  {phase:<8}  loss {loss:.3f}  "
            f"acc {100 * accuracy:.1f} %  {images_per_second:,.0f} images/s  traffic {sent}"
        )

    def summary(self, result: Mapping[str, Any], folder: Path) -> None:
        """Print the figures of the finished run, "-" for missing ones.

        Args:
            result: the content of ``result.json``.
            folder: the run's folder.
        """
        self.close()
        self._console.print()
        self._console.print(_facts(result, folder))
        self._console.print()
        self._console.print(_comparison(result))
        self._raise_if_lost()

    def close(self) -> None:
        """Stop the progress bar and restore the terminal; idempotent."""
        self._progress.stop()
        atexit.unregister(self.close)

    def _line(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, soft_wrap=True)
        self._raise_if_lost()

    def _raise_if_lost(self) -> None:
        if self._file.error is not None:
            self.close()  # it has redirected the standard error to itself
            raise self._file.error


# ---- progress bar ------------------------------------------------------------------------


class _ImagesPerSecond(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        if speed is None:
            return Text("- images/s")
        return Text(f"{speed * task.fields['batch_size']:,.0f} images/s")


def _progress(console: rich.console.Console) -> Progress:
    return Progress(
        TextColumn("{task.fields[phase]}", style="bold"),
        BarColumn(bar_width=None, table_column=Column(ratio=1)),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        _ImagesPerSecond(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        console=console,
        expand=True,
        redirect_stderr=sys.stderr.isatty(),
    )


# ---- final tables ------------------------------------------------------------------


def _facts(result: Mapping[str, Any], folder: Path) -> Table:
    accuracy, seconds = result["accuracy"], result["seconds"]
    table = Table.grid(Column(style="bold", no_wrap=True), Column(overflow="fold"), padding=(0, 2))
    for name, value in {
        "status": result["status"],
        "run": f"preset {result['preset']}, seed {result['seed']}, "
        f"world size {result['world_size']} over {result['backend']}",
        "search": f"elbow at epoch {_number(result['elbow_epoch'])}, "
        f"ticket at epoch {_number(result['ticket_epoch'])}",
        "accuracy": f"before draw {percent(accuracy['before_draw'], 1) or '-'}, "
        f"after draw {percent(accuracy['after_draw'], 1) or '-'}, "
        f"final {percent(accuracy['final'], 1) or '-'}",
        "seconds": ", ".join(f"{phase} {_number(spent)}" for phase, spent in seconds.items()),
        "files": str(folder),
        "curves": f"tensorboard --logdir {folder}",
    }.items():
        table.add_row(name, value)
    return table


def _comparison(result: Mapping[str, Any]) -> Table:
    """Table of the dense network, the truncated run and the ticket, absolute and in percent."""
    parameters, flops, traffic = result["parameters"], result["flops"], result["traffic"]
    table = Table("", box=None, pad_edge=False)
    for name in ("dense", "truncated", "ticket"):
        table.add_column(name, justify="right", overflow="fold")
    for name, dense, truncated, ticket in (
        ("parameters", parameters["dense"], None, parameters["ticket"]),
        ("FLOPs per sample", flops["dense"], None, flops["ticket"]),
        (
            "bytes per step",
            traffic["dense_bytes_per_step"],
            traffic["truncated_bytes_per_step"],
            traffic["ticket_bytes_per_step"],
        ),
    ):
        table.add_row(name, count(dense), compared(truncated, dense), compared(ticket, dense))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:,.5g}"
