"""Files of a ledger beside its rows: table, pictures, and how they came about."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

from ...training.reporting.result import versions
from ...training.reporting.run_description import machine
from .plot import course, trade_off
from .row import Row
from .table import markdown

__all__ = ["TABLE", "record", "write"]

TABLE = "ledger.md"
_JOURNAL = "journal.jsonl"
_PAGE = """\
# Ledger

{table}
```sh
{command}
```

The command trains rows that are missing.  Where none is, it only rewrites this page and the
pictures.

![Accuracy against the FLOPs of the run](trade-off.png)

![Accuracy, bytes and FLOPs over the epochs](course.png)
"""


def record(folder: Path, command: str, num_missing: int) -> None:
    """Append to ``journal.jsonl`` when, where and with which versions rows are trained.

    Args:
        folder: the folder, created if missing.
        command: the command line.
        num_missing: number of rows to train.
    """
    folder.mkdir(parents=True, exist_ok=True)
    entry = {
        "event": "training",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "rows": num_missing,
        "versions": versions(),
        "machine": machine(),
    }
    with (folder / _JOURNAL).open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def write(folder: Path, rows: Sequence[Row], command: str) -> str:
    """Write ``ledger.md``, ``trade-off.png`` and ``course.png``; equal rows give equal files.

    Args:
        folder: the folder.
        rows: the rows to compare.
        command: the command line, which is in the table's file.

    Returns:
        The table.
    """
    table = markdown(rows)
    text = _PAGE.format(table=table, command=command)
    (folder / TABLE).write_text(text, encoding="utf-8")
    for name, figure in (("trade-off", trade_off(rows)), ("course", course(rows))):
        figure.savefig(folder / f"{name}.png", dpi=110)
    return table
