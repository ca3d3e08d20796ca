"""TensorBoard log of a run, in one event file in the run's folder.

torch's SummaryWriter is not used: it writes in a thread, so that a full disk is reported by a later
call or never, the thread prints its own traceback, and ``add_hparams`` opens a second file.  The
summaries are built by torch, the records by TensorBoard.
"""

from __future__ import annotations

import io
import logging
import os
import socket
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tensorboard.compat.proto.event_pb2 import (
    Event,
    SessionLog,
)
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.hparams.api_pb2 import (
    Experiment,
    HParamInfo,
    MetricInfo,
    MetricName,
)
from tensorboard.plugins.hparams.metadata import EXPERIMENT_TAG, PLUGIN_DATA_VERSION, PLUGIN_NAME
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import custom_scalars, hparams, scalar, text

from ...search.convergence import CheckRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["TensorBoardLog"]

logger = logging.getLogger(__name__)


class TensorBoardLog:
    """Writes scalars, charts, texts, figures and hyperparameters of a run for TensorBoard.

    A write error must not stop the run: the first one is logged as a warning, and all later calls
    do nothing.

    Args:
        folder: the run's folder; created if it is missing.
        purge_step: the first step that a resumed run trains again.  TensorBoard discards the data
            of older event files from that step on.

    Attributes:
        write_error: reason why writing has ended; empty if there was no error.

    Raises:
        OSError: the folder or the file cannot be created.
    """

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._path = folder / name
        self._path.touch(exist_ok=False)
        self.write_error = ""
        events = [Event(file_version="brain.Event:2")]
        if purge_step is not None:
            restart = SessionLog(status=SessionLog.START)
            events.append(Event(step=purge_step, session_log=restart))
        _append(self._path, events)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Add one point to the curve of each name; a slash in a name groups curves."""
        self._write(step, [scalar(name, value) for name, value in values.items()])

    def figures(self, step: int, records: Sequence[CheckRecord], settled: float) -> None:
        """Plot the masks, the matrix of their distances and the distance curve.

        Takes about a second of one core.

        Args:
            step: optimizer steps so far.
            records: the records of all checks, oldest first; at least one.
            settled: the distance, 0 to 1, below which masks count as settled.
        """
        if self.write_error:
            return
        # Imported late: matplotlib takes half a second, and nothing is drawn before the elbow.
        from .plots import distance_curve, distance_matrix, mask_picture

        figures = {
            "search/masks": mask_picture(records),
            "search/distance_matrix": distance_matrix(records),
            "search/distance_curve": distance_curve(records, settled),
        }
        self._write(step, [_picture(name, figure) for name, figure in figures.items()])

    def charts(self, sections: Mapping[str, Mapping[str, Sequence[str]]]) -> None:
        """Lay out the page of custom charts, each with several curves; once, at the start.

        Args:
            sections: by title of the section and title of the chart, regular expressions of the
                names of its curves.
        """
        layout = {
            section: {chart: ["Multiline", list(names)] for chart, names in charts.items()}
            for section, charts in sections.items()
        }
        self._write(0, [custom_scalars(layout)])

    def text(self, step: int, name: str, markdown: str) -> None:
        """Add a text to the card of this name, which shows the newest ten."""
        self._write(step, [text(name, markdown)])

    def hyperparameters(
        self, settings: Mapping[str, Any], metrics: Mapping[str, str], shown: Collection[str] = ()
    ) -> None:
        """Write this run's row of the table that compares runs; once, at the end of a run.

        Args:
            settings: settings by dotted key, the same keys in every run.  Numbers stay numbers,
                None leaves the cell empty, other values are written as text.
            metrics: headings by the name of the curve whose last value is the figure.
            shown: the settings that come first, of which TensorBoard shows five unasked; the order
                is otherwise that of the names.
        """
        values = {key: _plain(value) for key, value in settings.items()}
        # Of the columns that TensorBoard finds in several runs it shows those of one of them.
        columns = Experiment(
            hparam_infos=[_column(key, key in shown) for key in settings],
            metric_infos=[
                MetricInfo(name=MetricName(tag=curve), display_name=heading)
                for curve, heading in metrics.items()
            ],
        )
        content = HParamsPluginData(experiment=columns, version=PLUGIN_DATA_VERSION)
        _, *row = hparams(values, {})
        self._write(0, [_metadata(EXPERIMENT_TAG, PLUGIN_NAME, content), *row])

    def close(self) -> None:
        """Flush the file to disk; a network file system may report write errors only now."""
        if not self.write_error:
            with self._warning_once(), self._path.open("r+b") as file:
                os.fsync(file.fileno())

    def _write(self, step: int, summaries: Iterable[Summary]) -> None:
        if not self.write_error:
            with self._warning_once():
                _append(self._path, [Event(step=step, summary=summary) for summary in summaries])

    @contextmanager
    def _warning_once(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.write_error = error.strerror or str(error)
            logger.warning(
                "TensorBoard's file %s cannot be written (%s); training goes on, "
                "its curves and figures end here",
                self._path,
                self.write_error,
            )


def _append(path: Path, events: Iterable[Event]) -> None:
    """Append events; the file is opened each time, to notice that it was deleted."""
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


def _column(name: str, comes_first: bool) -> HParamInfo:
    column = HParamInfo(name=name)
    if hasattr(column, "differs"):  # not in older versions of TensorBoard, which sort by name only
        column.differs = comes_first
    return column


def _metadata(tag: str, plugin: str, content: HParamsPluginData) -> Summary:
    data = SummaryMetadata.PluginData(plugin_name=plugin, content=content.SerializeToString())
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=data))])


def _plain(value: Any) -> float | str | None:
    if value is None or (isinstance(value, (int, float)) and not isinstance(value, bool)):
        return value
    return str(value)
