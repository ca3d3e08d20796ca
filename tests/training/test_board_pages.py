"""What people see in TensorBoard: its pages of a real run, served and opened in a browser."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from tests.faults.courses import ALL_PHASES
from tests.faults.driver import CONFIG
from tests.programs import call
from tests.training.board_pages import CHROMIUM, Board, served
from worm_dist.training.reporting.dashboard import CHARTS, METRICS, SETTINGS
from worm_dist.training.reporting.tensorboard import TensorBoardLog

pytestmark = [
    pytest.mark.slow("trains a whole run, starts a server and a browser"),
]

RUN = "small"
ORANGE = "#ff7043"
"""The colour of the first run's lines."""
KEPT = "#0072B2"


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Board]:
    folder = tmp_path_factory.mktemp("runs")
    settings = [f"--{key}={value}" for key, value in ALL_PHASES.items()]
    words = ["-m", "worm_dist", "train", CONFIG, "--out", folder / RUN, *settings]
    (ended,) = call([*words, "--quiet"], folder)
    assert ended.exitcode == 0, ended.err
    assert len(ended.out.splitlines()) == 1, ended.out
    _resume(folder / "resumed")
    with served(folder) as board:
        board.wait_for(lambda: "whole_run/seconds" in board.data("plugin/scalars/tags")[RUN])
        yield board


def test_one_page_has_accuracy_bytes_live_share_and_distances_with_thresholds(board: Board) -> None:
    (section,) = board.data("plugin/custom_scalars/layout")["category"]
    charts = [chart["multiline"]["tag"] for chart in section["chart"]]
    assert [len(names) for names in charts] == [1, 2, 2, 4]
    for name in (name for names in charts for name in names):
        found = board.data("plugin/custom_scalars/scalars", run=RUN, tag=name)
        (points,) = found["tag_to_events"].values()
        assert points, name


def test_the_table_of_runs_has_ten_settings_and_every_figure(board: Board) -> None:
    asked = {"experimentName": ""}
    columns = board.data("plugin/hparams/experiment", asked)["hparamInfos"]
    assert {column["name"] for column in columns} == set(SETTINGS) and len(columns) == 10
    assert columns[0]["name"] == "model.name"
    wanted = {"allowedStatuses": ["STATUS_SUCCESS"], "startIndex": 0, "sliceSize": 9}
    (row,) = board.data("plugin/hparams/session_groups", asked | wanted)["sessionGroups"]
    values = {each["name"]["tag"]: each["value"] for each in row["metricValues"]}
    assert values.keys() == METRICS.keys()
    assert values["whole_run/elbow_epoch"] < values["whole_run/ticket_epoch"]
    assert row["hparams"]["preset"] == "worm" and row["hparams"]["epochs"] == 3


def test_the_cards_of_text_say_what_was_decided_and_what_came_out(board: Board) -> None:
    def texts(name: str) -> list[str]:
        found = board.data("plugin/text/text", run=RUN, tag=f"{name}/text_summary")
        return [each["text"] for each in found]

    elbow, *stages, ticket = texts("verdicts")
    assert "elbow at epoch 0.1818" in elbow and "truncation starts" in elbow
    assert stages and all("stage at epoch" in text for text in stages)
    assert "ticket drawn at epoch" in ticket
    (outcome,) = texts("outcome")
    assert all(f"<li>{what}: " in outcome for what in ("accuracy", "network", "traffic"))


def _resume(folder: Path) -> None:
    """Write what a run writes that is resumed after step 3."""
    first = TensorBoardLog(folder)
    first.charts(CHARTS)
    for step, text in ((3, "elbow"), (5, "stage"), (8, "ticket")):
        first.text(step, "verdicts", text)
    resumed = TensorBoardLog(folder, purge_step=4)
    resumed.charts(CHARTS)
    for step, text in ((5, "stage"), (8, "ticket")):
        resumed.text(step, "verdicts", text)


def test_a_resumed_run_repeats_no_verdict(board: Board) -> None:
    pytest.importorskip("tensorboard_data_server")  # TensorBoard's other reader repeats texts
    asked = {"run": "resumed", "tag": "verdicts/text_summary"}
    found = board.wait_for(lambda: board.data("plugin/text/text", **asked))
    assert [text["step"] for text in found] == [3, 5, 8]
    (section,) = board.data("plugin/custom_scalars/layout")["category"]
    assert len(section["chart"]) == 4


def test_pictures_are_those_of_a_card(board: Board) -> None:
    names = board.data("plugin/images/tags")[RUN]
    assert set(names) == {"search/masks", "search/distance_matrix", "search/distance_curve"}
    for name in names:
        *_, newest = board.data("plugin/images/images", run=RUN, tag=name, sample="0")
        png = board.data(f"plugin/images/individualImage?{newest['query']}&")
        assert Image.open(io.BytesIO(png)).width == 736


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
@pytest.mark.parametrize(("page", "colour"), [("glance", ORANGE), ("images", KEPT)])
def test_a_browser_shows_lines_and_pictures(
    board: Board, tmp_path: Path, page: str, colour: str
) -> None:
    board.picture(page, tmp_path / "page.png")
    shown = np.asarray(Image.open(tmp_path / "page.png").convert("RGB"), dtype=float)
    right = shown[120:, 380:]  # without the bar above and the list of runs
    near = (np.abs(right - 255 * np.array(to_rgb(colour))) < 8).all(axis=2)
    assert near.sum() > 300
