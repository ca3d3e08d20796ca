"""``python -m worm_dist report RUN...``: one page that compares runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import CheckpointError, ConfigError
from ..extras import require_extras

if TYPE_CHECKING:
    from .run_files import RunFiles

__all__ = ["add_parser", "run"]


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the ``report`` command.

    Args:
        commands: what argparse's ``add_subparsers()`` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="one HTML page that compares runs: curves, masks, figures, settings that differ",
        description="Writes one file that opens offline. Runs need not have finished.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), help="default: report.html"
    )
    return parser


def run(options: argparse.Namespace) -> int:
    """Write a page; return the exit code, 0.

    A folder without a run, and a run with a damaged file, are named and left out.

    Args:
        options: the parsed command line.

    Raises:
        ConfigError: a folder does not exist, none holds a run, or the page cannot be written.
        CheckpointError: files of every run are damaged.
    """
    out: Path = options.out
    if out.suffix not in (".html", ".htm"):
        raise ConfigError(f"--out: {out} does not end in .html; name the page to write")
    for folder in options.runs:
        if not folder.is_dir():
            raise ConfigError(f"report: {folder} is no folder; give the folders of runs")
    require_extras({"train": "report"})
    # Imported late: matplotlib and TensorBoard take seconds; mistakes are reported first.
    from .page import page

    runs, notes = _read(list(dict.fromkeys(options.runs)))
    text = page(runs, notes)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--out: cannot write {out}: {error.strerror}") from error
    print(f"{out}: {len(runs)} {'run' if len(runs) == 1 else 'runs'}")
    return 0


def _read(folders: Sequence[Path]) -> tuple[list[RunFiles], list[str]]:
    """The runs, and a note on each that has not finished or is left out.

    Raises:
        ConfigError, CheckpointError: none is left.
    """
    from .run_files import is_run, read_run

    runs, notes = [], []
    damaged: list[str] = []
    for folder, name in zip(folders, _names(folders)):
        if not is_run(folder):
            notes.append(f"{name} is left out: it holds no run")
            continue
        try:
            found = read_run(folder, name)
        except CheckpointError as error:
            damaged.append(str(error))
            notes.append(f"{name} is left out: {error}")
            continue
        runs.append(found)
        if found.result is None:
            notes.append(f"{name} has not finished: it has no figures yet")
        elif found.result.get("reason"):
            notes.append(f"{name}: {found.result['reason']}")
        elif found.result.get("at_chance"):
            notes.append(f"{name}: its network is no better than a constant answer")
    if not runs:
        if damaged:
            raise CheckpointError("; ".join(damaged))
        raise ConfigError("report: none of the folders holds a run")
    for note in notes:
        sys.stderr.write(f"worm_dist: warning: {note}\n")
    return runs, notes


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, with as many of their parents as tells them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(path[-length:]) for path in parts]
        if len(set(names)) == len(names):
            break
    return names
