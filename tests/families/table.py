"""Table: what was found of every architecture, for the terminal and for the documents."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tests.families.families import FAMILIES
from tests.families.finding import Finding

__all__ = ["Table"]

_COLUMNS = (
    "architecture",
    "parameters",
    "ranked by",
    "groups",
    "channels",
    "share",
    "attach, s",
    "difference",
    "dense",
)
_LEGEND = (
    "Share: of all elements of parameters, those that go with some channel. Difference: the "
    "largest between the outputs of the drawn and of the masked dense network, as a share of the "
    "largest output; below 1e-12 where the network is in double precision. Dense: how many modules "
    "stay as they are, and why."
)


class Table:
    """Rows are architectures.

    Args:
        stats: pytest's reports by outcome; those of architectures have a property ``family``.

    Attributes:
        is_whole: every architecture was drawn as it should be.
    """

    def __init__(self, stats: Mapping[str, Iterable[Any]]) -> None:
        found: dict[str, Finding] = {}
        for report in stats.get("passed", ()):
            for key, value in getattr(report, "user_properties", ()):
                if key == "family":
                    name, finding = value
                    found[name] = Finding(**finding)
        self.is_whole = found.keys() == FAMILIES.keys()
        self._reasons: dict[str, str] = {}
        self._rows = [self._row(name, found[name]) for name in FAMILIES if name in found]

    def write(self, path: Path) -> None:
        """As Markdown; the folder is made if it is not there."""
        head = [_COLUMNS, ["---"] * len(_COLUMNS)]
        lines = [f"| {' | '.join(row)} |" for row in (*head, *self._rows)]
        notes = [f"- {letter}: {reason}" for reason, letter in self._reasons.items()]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([*lines, "", _LEGEND, "", *notes, ""]))

    def _row(self, name: str, finding: Finding) -> list[str]:
        reasons = Counter(map(_alike, finding.dense.values()))
        dense = [f"{count} {self._letter(reason)}" for reason, count in reasons.items()]
        return [
            name,
            f"{finding.num_parameters:,}",
            finding.score,
            str(finding.num_groups),
            f"{finding.num_channels:,}",
            f"{finding.share:.3f}",
            f"{finding.seconds:.1f}",
            f"{finding.difference:.0e}",
            ", ".join(dense) or "-",
        ]

    def _letter(self, reason: str) -> str:
        return self._reasons.setdefault(reason, chr(ord("a") + len(self._reasons)))


def _alike(reason: str) -> str:
    """A reason without the name of the layer that it begins with."""
    plain = re.sub(r"^\S+, (a grouped convolution),", r"\1", reason)
    return plain.replace("LayerNorm2d", "LayerNorm")
