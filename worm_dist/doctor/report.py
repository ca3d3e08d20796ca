"""The doctor's report: collected step by step, and printed by rank zero."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TextIO

from rich.table import Table

from ..terminal import console_of, print_json
from .finding import Finding, Level
from .ranks import Reach
from .start import Start

__all__ = ["Report"]

_STYLES: dict[Level, str] = {"note": "yellow", "problem": "bold red"}


@dataclass
class Report:
    """What was found so far.

    Attributes:
        findings: in the order in which they were found.
        reach: how the ranks reach one another; None if they have not met.
        start: the start of the run; None without settings, or if it fails.
        out: the stream to print to.
    """

    findings: list[Finding] = field(default_factory=list)
    reach: Reach | None = None
    start: Start | None = None
    out: TextIO = field(default_factory=lambda: sys.stdout)

    @property
    def num_problems(self) -> int:
        return sum(finding.level == "problem" for finding in self.findings)

    def add_other_ranks(self, theirs: Sequence[Sequence[Finding]]) -> None:
        """Add the notes and problems of the other ranks that this one has not.

        Args:
            theirs: the findings of every rank, by rank.
        """
        known = set(self.findings)
        for rank, findings in enumerate(theirs):
            for finding in findings:
                if finding.level != "ok" and finding not in known:
                    known.add(finding)
                    self.findings.append(
                        Finding(finding.topic, finding.level, f"rank {rank}: {finding.text}")
                    )

    def show(self, as_json: bool) -> None:
        """Print the report."""
        if as_json:
            print_json(self.as_dict(), self.out)
            return
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for finding in self.findings:
            style = _STYLES.get(finding.level)
            table.add_row(finding.level, finding.topic, finding.text, style=style)
        console = console_of(self.out)
        console.print(table)
        notes = sum(finding.level == "note" for finding in self.findings)
        console.print(f"{_counted(self.num_problems, 'problem')}, {_counted(notes, 'note')}")
        self.out.flush()

    def as_dict(self) -> dict[str, Any]:
        reach = self.reach
        return {
            "problems": self.num_problems,
            "findings": [asdict(finding) for finding in self.findings],
            "backend": None if reach is None else reach.backend,
            "ranks": [] if reach is None else [asdict(place) for place in reach.ranks],
            "all_reduce_seconds": {} if reach is None else reach.all_reduce_seconds,
            **({"groups": [], "dense": {}} if self.start is None else self.start.as_dict()),
        }


def _counted(number: int, what: str) -> str:
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
