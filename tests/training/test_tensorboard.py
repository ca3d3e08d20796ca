from __future__ import annotations

import io
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from worm_dist.config import SearchConfig
from worm_dist.groups.mask import Mask
from worm_dist.search.convergence import CheckRecord, History
from worm_dist.training.reporting.tensorboard import TensorBoardLog


def _findings() -> tuple[CheckRecord, ...]:
    history = History(SearchConfig())
    for step in (10, 20, 30):
        history.record(step, Mask({"a": torch.arange(8) < 4}), floored=())
    return history.records


def _read(folder: Path) -> EventAccumulator:
    """With the reader of TensorBoard itself."""
    events = EventAccumulator(str(folder), size_guidance={"images": 0, "scalars": 0})
    events.Reload()
    return events


def _points(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in _read(folder).Scalars(name)]


def test_everything_is_read_back_from_one_file(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "digits"
    board = TensorBoardLog(folder)
    board.scalars(1, {"loss/train": 2.5, "traffic/bytes": 1e6})
    board.scalars(2, {"loss/train": 1.25})
    board.figures(30, _findings(), settled=0.1)
    board.charts({"page": {"chart": ["^loss/train$", "^traffic/bytes$"]}})
    board.text(30, "verdicts", "elbow at epoch 3")
    board.hyperparameters({"optimizer.lr": 0.1, "preset": "worm"}, {"loss/train": "loss"})
    board.close()

    (file,) = [path for path in folder.rglob("*") if path.is_file()]
    assert file.name.startswith("events.out.tfevents.")
    assert _points(folder, "loss/train") == [(1, 2.5), (2, 1.25)]
    assert _points(folder, "traffic/bytes") == [(1, 1e6)]
    events = _read(folder)
    (elbow,) = events.Tensors("verdicts/text_summary")
    assert (elbow.step, elbow.tensor_proto.string_val[0]) == (30, b"elbow at epoch 3")
    (laid_out,) = events.Tensors("custom_scalars__config__")
    layout = Layout.FromString(laid_out.tensor_proto.string_val[0])
    assert layout.category[0].title == "page"
    assert list(layout.category[0].chart[0].multiline.tag) == ["^loss/train$", "^traffic/bytes$"]
    for name in ("search/masks", "search/distance_matrix", "search/distance_curve"):
        (picture,) = events.Images(name)
        assert picture.step == 30
        with Image.open(io.BytesIO(picture.encoded_image_string)) as decoded:
            assert decoded.size == (picture.width, picture.height)
            assert len(decoded.convert("RGB").getcolors(maxcolors=1 << 20)) > 10


def test_hyperparameters_of_every_kind(tmp_path: Path) -> None:
    TensorBoardLog(tmp_path).hyperparameters(
        {
            "seed": 3,
            "optimizer.lr": 0.1,
            "optimizer.nesterov": True,
            "schedule.milestones": [80, 120],
            "data.root": None,
        },
        {"test/accuracy": "accuracy"},
    )
    content = _read(tmp_path).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    written = HParamsPluginData.FromString(content).session_start_info.hparams
    assert {key: value.number_value or value.string_value for key, value in written.items()} == {
        "seed": 3,
        "optimizer.lr": 0.1,
        "optimizer.nesterov": "True",
        "schedule.milestones": "[80, 120]",
    }
    content = _read(tmp_path).summary_metadata["_hparams_/experiment"].plugin_data.content
    columns = HParamsPluginData.FromString(content).experiment
    assert [column.name for column in columns.hparam_infos] == [
        "seed",
        "optimizer.lr",
        "optimizer.nesterov",
        "schedule.milestones",
        "data.root",
    ]
    (metric,) = columns.metric_infos
    assert (metric.name.tag, metric.display_name) == ("test/accuracy", "accuracy")


def test_resumed_run_replaces_the_steps_that_it_trains_again(tmp_path: Path) -> None:
    first = TensorBoardLog(tmp_path)
    for step in range(1, 6):
        first.scalars(step, {"loss": 1.0})
    resumed = TensorBoardLog(tmp_path, purge_step=4)
    resumed.scalars(4, {"loss": 2.0})
    assert _points(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


def _delete(folder: Path) -> None:
    shutil.rmtree(folder)


def _replace_by_a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.touch()


def _delete_the_event_file(folder: Path) -> None:
    (file,) = folder.iterdir()
    file.unlink()


@pytest.mark.parametrize("harm", [_delete, _replace_by_a_file, _delete_the_event_file])
@pytest.mark.parametrize("first", ["scalars", "text", "figures", "hyperparameters", "close"])
@pytest.mark.fault(24, "TensorBoard's file or folder is lost")
def test_training_goes_on_with_one_warning_when_the_file_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, harm: Callable[[Path], None], first: str
) -> None:
    folder = tmp_path / "run"
    board = TensorBoardLog(folder)
    board.scalars(1, {"loss": 1.0})
    harm(folder)
    calls = {
        "scalars": lambda: board.scalars(2, {"loss": 1.0}),
        "text": lambda: board.text(2, "verdicts", "elbow"),
        "figures": lambda: board.figures(3, _findings(), 0.1),
        "hyperparameters": lambda: board.hyperparameters({"seed": 0}, {"loss": "loss"}),
        "close": board.close,
    }
    calls[first]()
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert str(folder) in caplog.text and "training goes on" in caplog.text
    for call in calls.values():
        call()
    assert len(caplog.records) == 1


FULL_DISK = """
import resource, sys
from pathlib import Path
from worm_dist.training.reporting.tensorboard import TensorBoardLog
board = TensorBoardLog(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(100):
    board.scalars(step, {"loss": 1.0})
board.close()
print("trained on")
"""


@pytest.mark.slow("a whole run, three seconds")
@pytest.mark.fault(24, "TensorBoard's disk is full")
def test_full_disk_costs_one_line_and_spares_what_was_written(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert (run.returncode, run.stdout) == (0, "trained on\n")
    (warning,) = run.stderr.splitlines()
    assert "File too large" in warning
    steps = [step for step, _ in _points(tmp_path, "loss")]
    assert len(steps) > 10 and steps == list(range(len(steps)))


def test_folder_that_cannot_be_made_is_said_before_the_run(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        TensorBoardLog(tmp_path / "file" / "run")
