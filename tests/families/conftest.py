from __future__ import annotations

import pytest

from tests.families.table import Table


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    table = Table(terminalreporter.stats)
    if table.is_whole:
        table.write(terminalreporter.config.rootpath / "runs" / "report" / "families.md")
