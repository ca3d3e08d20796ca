"""The commands ``bench ledger`` and ``bench grid``."""

from __future__ import annotations

import argparse
import os
import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from ...errors import ConfigError

__all__ = ["add_parsers", "run"]

_RATIO = 0.5
_SEEDS = (1, 2, 3)
_OF = "worm"
_QUICK_EPOCHS = 12


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
    _add_repeated(ledger, "--rule", help="repeat it; default: all")
    _add_repeated(ledger, "--control", help="kind of control; repeat it; default: all")
    _add_repeated(
        ledger,
        "--of",
        help="rule, or variant of a rule, whose ticket all controls are compared with; every other "
        f"one is compared with the uniform network at equal FLOPs only; default: {_OF}",
    )
    ledger.add_argument("--no-controls", action="store_true", help="the rules only, as in a sweep")
    _add_repeated(ledger, "--seed", type=int, help="default: 1, 2 and 3")
    _add_repeated(
        ledger,
        "--trigger",
        type=float,
        metavar="PERCENT",
        help="variants of the worm rules that start to remove channels at this percentage of the "
        "schedule, not at the elbow",
    )
    _add_repeated(
        ledger,
        "--duration",
        type=float,
        metavar="PERCENT",
        help="variants of the worm rules whose gradual removal takes this percentage",
    )
    _add_repeated(ledger, "--importance", help="variants with this search.importance")
    _add_repeated(ledger, "--threshold", help="variants with this search.threshold")
    _add_repeated(
        ledger,
        "--budget",
        metavar="WHAT=SHARE",
        help="variants with this search.budget instead of the ratio: flops=0.25",
    )
    ledger.add_argument("--epochs", type=int, help="default: the subject's")
    grid = benchmarks.add_parser(
        "grid",
        help="outcome of removals that start early or late, slow or extremely fast",
        allow_abbrev=False,
    )
    _add_repeated(grid, "--trigger", type=float, help="epoch of the elbow; default: 1, 3 and 6")
    for parser, ratios in ((ledger, f"{_RATIO}"), (grid, "0.3, 0.5, 0.7 and 0.9")):
        _add_repeated(parser, "--subject", help="repeat it; default: all")
        _add_repeated(parser, "--ratio", type=float, help=f"repeat it; default: {ratios}")
        parser.add_argument("--quick", action="store_true", help="the digits and one seed, minutes")
        parser.add_argument("--workers", type=int, help="processes; default: one for each core")
        parser.add_argument(
            "--out", type=Path, help="default: runs/BENCHMARK, finished rows are kept"
        )


def _add_repeated(parser: argparse.ArgumentParser, name: str, **keywords: Any) -> None:
    parser.add_argument(name, action="append", default=[], **keywords)


def run(options: argparse.Namespace) -> None:
    """Train the missing rows and print the table.

    Args:
        options: the parsed command line.

    Raises:
        ConfigError: a subject, rule, control or setting does not exist.
        CheckpointError: the folder has rows of another version.
    """
    from .grid import RATIOS, TRIGGERS, grid_specs, summary
    from .report import TABLE, record, write
    from .run import missing
    from .run import run as train_rows
    from .subject import SUBJECTS

    name = f"{options.benchmark}-quick" if options.quick else options.benchmark
    folder = options.out or Path("runs") / name
    num_workers = options.workers or os.cpu_count() or 1
    subjects = _known(options.subject, SUBJECTS, "subject")
    if options.quick:
        subjects = [subject for subject in subjects if "digits" in subject]
    if options.benchmark == "grid":
        triggers, ratios = ((3,), (0.5, 0.9)) if options.quick else (TRIGGERS, RATIOS)
        specs = grid_specs(subjects, options.trigger or triggers, options.ratio or ratios)
        table = summary(train_rows(specs, folder, num_workers))
        (folder / TABLE).write_text(table, encoding="utf-8")
        print(table)
        return
    specs = list(_selection(options, subjects).specs())
    command = _command(options, folder)
    if still_missing := missing(specs, folder):
        record(folder, command, len(still_missing))
    print(write(folder, train_rows(specs, folder, num_workers), command))
    print(f"files: {folder}, rewritten from its rows by\n{command}")


def _selection(options: argparse.Namespace, subjects: Sequence[str]) -> Any:
    from .control import CONTROLS
    from .rule import RULES
    from .spec import Selection

    selection = Selection(
        subjects=subjects,
        rules=_known(options.rule, RULES, "rule"),
        ratios=options.ratio or (_RATIO,),
        seeds=options.seed or (_SEEDS[:1] if options.quick else _SEEDS),
        controls=[] if options.no_controls else _known(options.control, CONTROLS, "control"),
        of=options.of or (_OF,),
        triggers=options.trigger,
        durations=options.duration,
        importances=options.importance,
        thresholds=options.threshold,
        budgets=options.budget,
        epochs=_QUICK_EPOCHS if options.quick and options.epochs is None else options.epochs,
    )
    _known(options.of, selection.pruning_rules, "pruning rule")
    return selection


def _command(options: argparse.Namespace, folder: Path) -> str:
    """The command line that compares the same rows."""
    words = ["python", "-m", "worm_dist", "bench", options.benchmark]
    for name, value in vars(options).items():
        if name in ("command", "benchmark", "out", "workers") or value in (None, False, []):
            continue
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [f"--{name}", f"{each}"]
    return shlex.join([*words, "--out", str(folder)])


def _known(names: Sequence[str], known: Collection[str], what: str) -> list[str]:
    for name in names:
        if name not in known:
            raise ConfigError(f"bench: there is no {what} {name!r}; there are {', '.join(known)}")
    return list(names or known)
