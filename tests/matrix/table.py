"""Table: the matrix as it was found to be, for the terminal and for the documents."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.matrix.combination import INVARIANTS
from tests.matrix.combinations import COMBINATIONS

__all__ = ["Table"]

_MARKS = {"passed": "ok", "failed": "F", "error": "F", "xfailed": "x", "xpassed": "F"}
_LEGEND = "ok: holds; F: does not; x: known not to hold; -: has no meaning here"


class Table:
    """Rows are combinations, columns are invariants.

    Args:
        stats: pytest's reports by outcome; those of cells have a property ``cell``.

    Attributes:
        is_whole: every cell that has a meaning was looked at.
    """

    def __init__(self, stats: Mapping[str, Iterable[Any]]) -> None:
        self._marks: dict[tuple[str, str], str] = {}
        self._reasons: dict[str, str] = {}
        for outcome, mark in _MARKS.items():
            for report in stats.get(outcome, ()):
                for key, value in getattr(report, "user_properties", ()):
                    if key == "cell":
                        row, column = value
                        self._marks[row, column] = mark
        expected = {
            (name, invariant)
            for name, row in COMBINATIONS.items()
            for invariant in INVARIANTS
            if row.why_not(invariant) is None
        }
        self.is_whole = expected <= self._marks.keys()
        rows = {row for row, _ in self._marks}
        self._rows = [
            [name, *(self._cell(name, invariant) for invariant in INVARIANTS)]
            for name in COMBINATIONS
            if name in rows
        ]

    def __bool__(self) -> bool:
        return bool(self._rows)

    def text(self) -> str:
        """For a terminal."""
        width = max(len(row[0]) for row in self._rows)
        lines = [[" " * width, *INVARIANTS], *self._rows]
        table = [
            f"{name:{width}}  "
            + " ".join(f"{mark:^{len(column)}}" for mark, column in zip(marks, INVARIANTS))
            for name, *marks in lines
        ]
        columns = [f"{name}: {meaning}" for name, meaning in INVARIANTS.items()]
        return "\n".join([*map(str.rstrip, table), "", _LEGEND, *columns, *self._footnotes()])

    def write(self, path: Path) -> None:
        """As Markdown; the folder is made if it is not there."""
        head = [["", *INVARIANTS], ["---"] * (1 + len(INVARIANTS))]
        table = [f"| {' | '.join(row)} |" for row in (*head, *self._rows)]
        columns = [f"- **{name}**: {meaning}" for name, meaning in INVARIANTS.items()]
        notes = [f"- {note}" for note in self._footnotes()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*table, "", f"{_LEGEND}.", "", *columns, "", *notes, ""]))

    def _cell(self, name: str, invariant: str) -> str:
        row = COMBINATIONS[name]
        reason = row.remark(invariant)
        mark = self._marks.get((name, invariant), "" if row.why_not(invariant) is None else "-")
        if reason is None or mark in ("", "F"):
            return mark
        letter = self._reasons.setdefault(reason, chr(ord("a") + len(self._reasons)))
        return f"{mark} {letter}"

    def _footnotes(self) -> list[str]:
        return [f"{letter}: {reason}" for reason, letter in self._reasons.items()]
