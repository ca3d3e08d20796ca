"""The commands ``bench ledger`` and ``bench grid``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError

__all__ = ["add_parsers", "run"]

_RATIO = 0.5
_SEEDS = (1, 2, 3)


def add_parsers(benchmarks: Any) -> None:
    """Add both commands.

    Args:
        benchmarks: what argparse's ``add_subparsers()`` returned.
    """
    ledger = benchmarks.add_parser(
        "ledger",
        help="accuracy, operations and bytes of whole runs under every rule",
        allow_abbrev=False,
    )
    ledger.add_argument("--rule", action="append", help="repeat it; default: all")
    ledger.add_argument("--seed", action="append", type=int, help="default: 1, 2 and 3")
    grid = benchmarks.add_parser(
        "grid",
        help="outcome of removals that start early or late, slow or extremely fast",
        allow_abbrev=False,
    )
    grid.add_argument(
        "--trigger", action="append", type=float, help="epoch of the elbow; default: 1, 3 and 6"
    )
    for parser, ratios in ((ledger, f"{_RATIO}"), (grid, "0.3, 0.5, 0.7 and 0.9")):
        parser.add_argument("--subject", action="append", help="repeat it; default: all")
        parser.add_argument(
            "--ratio", action="append", type=float, help=f"repeat it; default: {ratios}"
        )
        parser.add_argument("--quick", action="store_true", help="the digits and one seed, minutes")
        parser.add_argument("--workers", type=int, help="processes; default: one for each core")
        parser.add_argument(
            "--out", type=Path, help="default: runs/BENCHMARK, finished rows are kept"
        )


def run(options: argparse.Namespace) -> None:
    """Train the missing rows and print the table.

    Args:
        options: the parsed command line.

    Raises:
        ConfigError: a subject or rule does not exist.
    """
    from .grid import RATIOS, TRIGGERS, grid_specs, summary
    from .rule import RULES
    from .run import RunSpec
    from .run import run as train_rows
    from .subject import SUBJECTS
    from .table import markdown

    name = f"{options.benchmark}-quick" if options.quick else options.benchmark
    folder = options.out or Path("runs") / name
    num_workers = options.workers or os.cpu_count() or 1
    subjects = _known(options.subject, SUBJECTS, "subject")
    if options.quick:
        subjects = [subject for subject in subjects if "digits" in subject]
    if options.benchmark == "grid":
        triggers, ratios = ((3,), (0.5, 0.9)) if options.quick else (TRIGGERS, RATIOS)
        grid = grid_specs(subjects, options.trigger or triggers, options.ratio or ratios)
        print(summary(train_rows(grid, folder, num_workers)))
        return
    specs = [
        RunSpec(subject, RULES[rule], ratio, seed)
        for subject in subjects
        for ratio in options.ratio or (_RATIO,)
        for seed in options.seed or (_SEEDS[:1] if options.quick else _SEEDS)
        for rule in _known(options.rule, RULES, "rule")
    ]
    print(markdown(train_rows(specs, folder, num_workers)))


def _known(names: Sequence[str] | None, known: Any, what: str) -> list[str]:
    for name in names or ():
        if name not in known:
            raise ConfigError(f"bench: there is no {what} {name!r}; there are {', '.join(known)}")
    return list(names or known)
