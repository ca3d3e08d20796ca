from __future__ import annotations

import os
import signal
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, here and in the ranks

import hypothesis
import pytest
import torch

from tests.faults.table import FAULTS
from tests.faults.table import Table as FaultTable
from tests.matrix.table import Table
from tests.ranks import Ranks

torch.set_num_threads(1)
# Ranks inherit what nohup or a shell's & ignores, and then rightly ignore it.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
# How long an example takes says something of the machine's other work, not of the code.
hypothesis.settings.register_profile("worm_dist", deadline=None)
hypothesis.settings.load_profile("worm_dist")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="leave out the tests marked slow")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fault(number, tried): the row of the table of faults")
    config.addinivalue_line("markers", "slow(reason): left out by --fast; the reason is the cost")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("slow"):
            assert len(mark.args) == 1, f"{item.nodeid}: slow needs its reason"
    if config.getoption("fast"):
        slow = [item for item in items if item.get_closest_marker("slow")]
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]
    if hasattr(config, "workerinput"):
        # Several processes take file after file.  The last ones are short, so all end together.
        slow_files = {item.path for item in items if item.get_closest_marker("slow")}
        items.sort(key=lambda item: item.path not in slow_files)
    for item in items:
        for mark in item.iter_markers("fault"):
            number, tried = mark.args
            assert number in FAULTS, f"{item.nodeid}: there is no fault {number}"
            item.user_properties.append(("fault", (number, tried)))


def pytest_report_header() -> str:
    return f"torch {torch.__version__}"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table = Table(terminalreporter.stats)
    if table:
        terminalreporter.section("truncation's invariants under everything that people train with")
        terminalreporter.write_line(table.text())
    if table.is_whole:
        table.write(terminalreporter.config.rootpath / "runs" / "report" / "matrix.md")
    faults = FaultTable(terminalreporter.stats)
    if faults:
        terminalreporter.section("faults")
        terminalreporter.write_line(faults.text())
    if faults.is_whole:
        faults.write(terminalreporter.config.rootpath / "runs" / "report" / "faults.md")
    if "LARGE_FAMILIES" in os.environ:
        _write_families(terminalreporter)


def _write_families(terminalreporter: pytest.TerminalReporter) -> None:
    from tests.families.table import Table  # only here: it imports whatever makes networks

    families = Table(terminalreporter.stats)
    if families.is_whole:
        families.write(terminalreporter.config.rootpath / "runs" / "report" / "families.md")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """``ranks(world_size, function, *args)``: what a function returns on every rank."""
    return Ranks(tmp_path)
