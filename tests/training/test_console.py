from __future__ import annotations

import copy
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from worm_dist.engine.traffic import Traffic
from worm_dist.training.reporting.console import Console
from worm_dist.training.reporting.outcome import outcome
from worm_dist.training.reporting.quiet_console import QuietConsole
from worm_dist.verdict import Phase

RESULT: dict[str, Any] = {
    "status": "ticket",
    "preset": "worm-paper",
    "seed": 7,
    "world_size": 16,
    "backend": "nccl",
    "checks": 12,
    "elbow_epoch": 5.25,
    "ticket_epoch": 9,
    "live_fraction": 0.4,
    "accuracy": {"before_draw": 0.97222, "after_draw": 0.96944, "final": 0.98056},
    "parameters": {"dense": 25_557_032, "ticket": 8_612_345},
    "flops": {"dense": 8_178_000_000, "ticket": 2_044_500_000},
    "traffic": {
        "dense_bytes_per_step": 102_228_128,
        "truncated_bytes_per_step": 51_114_064,
        "ticket_bytes_per_step": 34_449_380,
        "total_bytes": 1_000_000_000,
    },
    "seconds": {"search": 12.346, "truncate": 4.5, "ticket": 8.0, "total": 24_846.0},
    "mask_digest": "00",
    "versions": {},
}


def test_a_quiet_console_has_one_line() -> None:
    file = io.StringIO()
    console = QuietConsole(file)
    _run(console)
    console.summary(RESULT, Path("runs/digits"))
    assert file.getvalue() == (
        "* runs/digits: ticket; accuracy: 98.06 % of the test split at the end; 97.22 % right "
        "before the draw, 96.94 % right after it; network: 8,612,345 of 25,557,032 parameters "
        "(33.7 %), 2,044,500,000 of 8,178,000,000 FLOPs a sample (25.0 %); traffic: 34,449,380 "
        "of 102,228,128 bytes a step (33.7 %)\n"
    )


def test_the_outcome_is_compared_with_a_dense_run() -> None:
    dense = copy.deepcopy(RESULT)
    dense["accuracy"] = {"before_draw": None, "after_draw": None, "final": 0.99}
    dense["traffic"]["total_bytes"] = 4_000_000_000
    accuracy, _, traffic = outcome(RESULT, dense)
    assert accuracy.startswith("accuracy: 98.06 % of the test split at the end (dense network")
    assert "trained as long: 99.00 %)" in accuracy
    assert traffic.endswith("bytes a step (33.7 %); in the whole run 25.0 % of the dense run's")


def test_the_outcome_invents_no_figure() -> None:
    said = outcome(_without(RESULT))
    assert not any(character.isdigit() for line in said for character in line)


def test_a_quiet_console_says_that_a_run_has_stopped_or_failed() -> None:
    file = io.StringIO()
    QuietConsole(file).ending("stopped after step 7", Phase.SEARCH)
    assert file.getvalue() == "* stopped after step 7\n"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Console, _Terminal]]:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    file = _Terminal()
    console = Console(file)
    yield console, file
    console.close()


def _without(result: dict[str, Any]) -> dict[str, Any]:
    """The same result of a run that has no figure at all."""
    bare = copy.deepcopy(result)
    for key, value in bare.items():
        if isinstance(value, dict):
            bare[key] = dict.fromkeys(value)
    bare["elbow_epoch"] = bare["ticket_epoch"] = None
    return bare


def _shown(text: str) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text)


def _run(console: Console) -> None:
    console.start(epochs=10, steps_per_epoch=4, batch_size=64, phase=Phase.SEARCH)
    for _ in range(4):
        console.step(2.0)
    console.epoch(1, Phase.SEARCH, 2.125, 0.5, 12345.6, Traffic(200, 200))
    console.event("elbow at epoch 2: truncation starts", Phase.TRUNCATE)
    for _ in range(4):
        console.step(1.0)
    console.epoch(10, Phase.TRUNCATE, 1.0, 0.9, 99999.0, Traffic(86, 200))


def test_a_log_has_a_plain_line_for_each_epoch_and_event() -> None:
    file = io.StringIO()
    _run(Console(file))
    assert file.getvalue().splitlines() == [
        "epoch  1/10  search    loss 2.125  acc 50.0 %  12,346 images/s  traffic 100 %",
        "* elbow at epoch 2: truncation starts",
        "epoch 10/10  truncate  loss 1.000  acc 90.0 %  99,999 images/s  traffic 43 %",
    ]


def test_a_log_stays_plain_where_colours_are_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.setenv(name, "1")
    file = io.StringIO()
    console = Console(file)
    _run(console)
    console.summary(RESULT, Path("runs/digits"))
    assert "\x1b" not in file.getvalue() and "\r" not in file.getvalue()


def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    file = _Terminal()
    _run(Console(file))
    assert len(file.getvalue().splitlines()) == 3 and "\x1b" not in file.getvalue()


def test_text_is_shown_as_it_is() -> None:
    file = io.StringIO()
    text = (
        "at the floor: [bold]layer1[/bold], " + ", ".join(f"layer{i}" for i in range(40)) + " :x:"
    )
    Console(file).event(text)
    assert file.getvalue() == f"* {text}\n"


def test_without_traffic_there_is_no_share_of_it() -> None:
    file = io.StringIO()
    Console(file).epoch(1, Phase.DENSE, 1.0, 0.5, 10.0, Traffic())
    assert file.getvalue().endswith("traffic -\n")


def test_the_bar_shows_phase_progress_rate_and_loss(terminal: tuple[Console, _Terminal]) -> None:
    console, file = terminal
    _run(console)
    console.close()
    last = _shown(file.getvalue()).splitlines()[-1]
    assert last.startswith("truncate") and " 20% " in last
    assert re.search(r"-?\d*:\d\d:\d\d|-:--:--", last) and "images/s" in last
    assert last.rstrip().endswith("loss 1.000") and len(last.rstrip()) <= 80


def test_lines_appear_above_the_bar(terminal: tuple[Console, _Terminal]) -> None:
    console, file = terminal
    _run(console)
    console.close()
    lines = _shown(file.getvalue()).splitlines()
    assert "* elbow at epoch 2: truncation starts" in [line.strip() for line in lines]


def test_the_cursor_comes_back(terminal: tuple[Console, _Terminal]) -> None:
    console, file = terminal
    _run(console)
    assert file.getvalue().rfind("\x1b[?25l") > file.getvalue().rfind("\x1b[?25h")
    console.close()
    console.close()
    assert file.getvalue().rfind("\x1b[?25h") > file.getvalue().rfind("\x1b[?25l")


def test_summary_says_all_and_fits_eighty_columns() -> None:
    file = io.StringIO()
    Console(file).summary(RESULT, Path("runs/digits"))
    text = file.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines()), text
    for words in (
        "ticket",
        "preset worm-paper, seed 7, world size 16 over nccl",
        "elbow at epoch 5.25, ticket at epoch 9",
        "before draw 97.22 %, after draw 96.94 %, final 98.06 %",
        "25,557,032",
        "8,612,345 (33.7 %)",
        "8,178,000,000",
        "2,044,500,000 (25.0 %)",
        "102,228,128",
        "51,114,064 (50.0 %)",
        "34,449,380 (33.7 %)",
        "search 12.346, truncate 4.5, ticket 8, total 24,846",
        "tensorboard --logdir runs/digits",
    ):
        assert words in text


def test_summary_invents_no_figure() -> None:
    file = io.StringIO()
    Console(file).summary(_without(RESULT), Path("runs/digits"))
    figures = [line for line in file.getvalue().splitlines() if not line.startswith("run")]
    assert not re.search(r"\d|None|nan", "\n".join(figures))
    assert "elbow at epoch -, ticket at epoch -" in file.getvalue()
    assert "before draw -, after draw -, final -" in file.getvalue()


def test_a_long_folder_is_shown_whole() -> None:
    folder = Path("/scratch") / ("a-rather-long-name" * 8)
    file = io.StringIO()
    Console(file).summary(RESULT, folder)
    assert str(folder) in "".join(line.strip() for line in file.getvalue().splitlines())


def test_summary_on_a_terminal_comes_after_the_bar(terminal: tuple[Console, _Terminal]) -> None:
    console, file = terminal
    _run(console)
    console.summary(RESULT, Path("runs/digits"))
    text = file.getvalue()
    assert text.rfind("\x1b[?25h") < text.rfind("FLOPs per sample")
    assert all(
        len(line.rstrip()) <= 80 for line in _shown(text[text.rfind("status") :]).splitlines()
    )
