from __future__ import annotations

import os

import pytest


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """To sync takes 10 ms a file; whether it is done is what the crash sweep looks at."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    points = [
        f"{value} points at which a save was ended, {name}"
        for report in terminalreporter.stats.get("passed", ())
        for key, (name, value) in getattr(report, "user_properties", ())
        if key == "crash_sweep"
    ]
    if points:
        terminalreporter.section("crash sweep of checkpoints")
        terminalreporter.write_line("\n".join(points))
