"""Board: what TensorBoard shows of a run, in one event file of the run's folder.

torch's SummaryWriter is not used: it writes on a thread, so that a full disk shows only at a later
call or never, the thread prints a traceback of its own, and its ``add_hparams`` opens a second
file.  The summaries are torch's, the records TensorBoard's.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.event_pb2 import (
    Event,
    SessionLog,
)
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar

from ...search.convergence import CheckRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TensorBoardLog"]

logger = logging.getLogger(__name__)


class TensorBoardLog:
    """Numbers, pictures and settings of a run for TensorBoard.

    A run is worth more than its pictures: when the folder cannot be written any more, the board
    warns once and from then on does nothing.

    Args:
        folder: of the run; made if it is missing.
        purge_step: of a resumed run, the first step that is trained again.  TensorBoard forgets
            what older event files say of that step and later ones.

    Attributes:
        lost: why nothing is written any more; empty while all is well.

    Raises:
        OSError: the folder or the file cannot be made; a run has not begun then.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._path.touch(exist_ok=False)
        self.lost = ""
        events = [Event(file_version="brain.Event:2")]
        if purge_step is not None:
            restart = SessionLog(status=SessionLog.START)
            events.append(Event(step=purge_step, session_log=restart))
        _append(self._path, events)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One point in the curve of each name; a slash in a name makes a group of curves."""
        self._write(step, [scalar(name, value) for name, value in values.items()])

    def figures(self, step: int, findings: Sequence[CheckRecord], settled: float) -> None:
        """The masks, their distances to each other and the curve that decides.

        Takes about a second of one core.

        Args:
            step: optimizer steps so far.
            findings: of all checks, oldest first; at least one.
            settled: the distance, 0 to 1, below which masks count as settled.
        """
        if self.lost:
            return
        # Only here: matplotlib takes half a second, and nothing is drawn before the elbow.
        from .plots import distance_curve, distance_matrix, mask_picture

        figures = {
            "search/masks": mask_picture(findings),
            "search/distance_matrix": distance_matrix(findings),
            "search/distance_curve": distance_curve(findings, settled),
        }
        self._write(step, [_picture(name, figure) for name, figure in figures.items()])

    def hyperparameters(self, config: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """What TensorBoard compares runs by; once, at the end of a run.

        Args:
            config: dotted key -> value.  Numbers stay numbers, None is left out, anything else
                is shown as text.
            metrics: name -> result, written as scalars of step 0 too, where TensorBoard looks for
                them: give them names that no curve has.
        """
        described = hparams({key: _plain(value) for key, value in config.items()}, dict(metrics))
        self._write(0, [*described, *(scalar(name, value) for name, value in metrics.items())])

    def close(self) -> None:
        """Ask the disk for all that was written: a network file system may refuse only now."""
        if not self.lost:
            with self._warning_once(), self._path.open("r+b") as file:
                os.fsync(file.fileno())

    def _write(self, step: int, summaries: Iterable[Summary]) -> None:
        if not self.lost:
            with self._warning_once():
                _append(self._path, [Event(step=step, summary=summary) for summary in summaries])

    @contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.lost = error.strerror or str(error)
            logger.warning(
                "TensorBoard's file %s cannot be written (%s); training goes on, "
                "its curves and pictures end here",
                self._path,
                self.lost,
            )


def _append(path: Path, events: Iterable[Event]) -> None:
    """Not into a file held open: a folder that was deleted would never show."""
    with path.open("r+b") as file:
        file.seek(0, os.SEEK_END)
        records = RecordWriter(file)
        for event in events:
            event.wall_time = time.time()
            records.write(event.SerializeToString())


def _picture(name: str, figure: Figure) -> Summary:
    png = io.BytesIO()
    figure.savefig(png, format="png")
    width, height = figure.canvas.get_width_height()
    image = Summary.Image(
        encoded_image_string=png.getvalue(), width=width, height=height, colorspace=4
    )
    return Summary(value=[Summary.Value(tag=name, image=image)])


def _plain(value: Any) -> float | str | None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    return str(value)
