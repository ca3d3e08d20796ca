"""The commands ``bench run``, ``bench run-steps`` and ``bench run-whole``."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import ConfigError

if TYPE_CHECKING:
    from ..ledger.row import Row
    from ..ledger.spec import RunSpec

__all__ = ["NAMES", "add_parsers", "run"]

NAMES = ("run", "run-steps", "run-whole")
_HELP = {
    "run": "time, bytes and operations to an accuracy, of whole runs beside DDP and its hooks",
    "run-steps": "on each rank: step times of what bench run has trained, over the present network",
    "run-whole": "two ranks: whole runs over the present network, to verify composed times",
}
_SUBJECT, _QUICK_SUBJECT = "vgg, fashion 50k", "vgg, digits"
_RATIO = 0.5
_SEEDS = (1, 2, 3)
_RANKS = 2
_QUICK_EPOCHS = 3
_STEPS, _QUICK_STEPS = 100, 10


def add_parsers(benchmarks: Any) -> None:
    """Add the commands.

    Args:
        benchmarks: what argparse's ``add_subparsers()`` returned.
    """
    for name in NAMES:
        parser = benchmarks.add_parser(name, help=_HELP[name], allow_abbrev=False)
        for option, kind, default in (
            ("--subject", str, _SUBJECT),
            ("--rule", str, "all"),
            ("--ratio", float, _RATIO),
            ("--seed", int, "1, 2 and 3"),
        ):
            help = f"repeat it; default: {default}"
            parser.add_argument(option, type=kind, action="append", default=[], help=help)
        parser.add_argument("--epochs", type=int, help="default: the subject's")
        parser.add_argument(
            "--ranks",
            type=int,
            default=_RANKS,
            help=f"ranks that share the batches of a trained run; default: {_RANKS}",
        )
        if name == "run":
            parser.add_argument("--workers", type=int, help="runs at a time; default: 1")
        if name != "run-whole":
            parser.add_argument(
                "--steps",
                type=int,
                default=_STEPS,
                help=f"measured steps of each phase; default: {_STEPS}",
            )
        parser.add_argument("--quick", action="store_true", help="the digits, one seed: minutes")
        parser.add_argument("--out", type=Path, help="default: runs/run, or runs/run-quick")


def run(options: argparse.Namespace) -> None:
    """Train what is missing and write the page; or measure over the present network.

    Args:
        options: the parsed command line.

    Raises:
        ConfigError: a subject or rule does not exist, a number is out of range, or what is to be
            measured has not been trained.
        BackendError: a measurement was not started on several ranks, or whole runs not on two.
        CheckpointError: the folder has files of another version.
    """
    folder = options.out or Path("runs") / ("run-quick" if options.quick else "run")
    specs = _specs(options)
    if options.benchmark == "run-steps":
        _measure_steps(specs, folder, _QUICK_STEPS if options.quick else options.steps)
    elif options.benchmark == "run-whole":
        _train_whole(specs, folder)
    else:
        _train(specs, folder, options)


def _train(specs: list[RunSpec], folder: Path, options: argparse.Namespace) -> None:
    from ..ledger.report import record
    from ..ledger.run import missing
    from ..ledger.run import run as train_rows
    from ..local_ranks import on_ranks
    from .page import STEP_TIMES, write

    command = _command(options, folder)
    if still_missing := missing(specs, folder):
        record(folder, command, len(still_missing))
    rows = train_rows(specs, folder, options.workers or 1)
    if not (folder / STEP_TIMES).exists():
        print("bench: no step times in the folder; measuring over the loopback interface")
        num_steps = _QUICK_STEPS if options.quick else options.steps
        on_ranks(_RANKS, _append_step_times, specs, folder, num_steps)
    print(write(folder, rows, command))
    print(f"files: {folder}, rewritten from its rows by\n{command}")


def _measure_steps(specs: list[RunSpec], folder: Path, num_steps: int) -> None:
    from ..network import several_ranks

    with several_ranks():
        _append_step_times(specs, folder, num_steps)


def _append_step_times(specs: list[RunSpec], folder: Path, num_steps: int) -> None:
    """Measure, and append lines of JSON on rank zero.  Collective."""
    import torch.distributed as dist

    from ..json_lines import append
    from ..ledger.row import read_rows
    from ..ledger.run import ROWS
    from .measurement import measure_steps
    from .page import STEP_TIMES

    rows = {row.key: row for row in read_rows(folder / ROWS) if not row.error}
    # The first seed of each method: its widths are those of the others, or nearly so.
    chosen: dict[tuple[str, str, float], RunSpec] = {}
    for spec in specs:
        if spec.key in rows:
            chosen.setdefault((spec.subject, spec.rule.name, spec.prune_ratio), spec)
    if not chosen:
        raise ConfigError(f"bench run-steps: {folder} has none of these runs; first bench run")
    for subject in dict.fromkeys(spec.subject for spec in chosen.values()):
        here = [spec for spec in chosen.values() if spec.subject == subject]
        parents = [None if spec.parent is None else rows[spec.parent] for spec in here]
        pairs = [(spec, rows[spec.key]) for spec in here]
        for times in measure_steps(pairs, parents, num_steps):
            if dist.get_rank() == 0:
                append(folder / STEP_TIMES, times)


def _train_whole(specs: list[RunSpec], folder: Path) -> None:
    """Train on the two ranks that this process is one of; append rows on rank zero."""
    from ..json_lines import append
    from ..ledger.row import read_rows
    from ..ledger.training import train
    from ..network import Link, two_ranks
    from .page import WHOLE_RUNS

    path = folder / f"{WHOLE_RUNS}-{Link().network}.jsonl"
    existing: dict[Any, Row] = {row.key: row for row in read_rows(path)}
    with two_ranks() as rank:
        for spec in specs:
            if spec.key in existing:
                continue
            parent = None if spec.parent is None else existing[spec.parent]
            existing[spec.key] = row = train(spec, parent)
            if rank == 0:
                append(path, row)
                seconds = sum(row.training_seconds)
                print(f"{row.key.rule}: {row.error or f'{seconds:.1f} s'}", flush=True)


def _specs(options: argparse.Namespace) -> list[RunSpec]:
    from ..ledger.subject import SUBJECTS
    from .methods import LABELS, specs

    subjects = options.subject or [_QUICK_SUBJECT if options.quick else _SUBJECT]
    for names, known, what in ((subjects, SUBJECTS, "subject"), (options.rule, LABELS, "rule")):
        for name in names:
            if name not in known:
                raise ConfigError(
                    f"bench: there is no {what} {name!r}; there are {'; '.join(known)}"
                )
    for name, values, least, most in (
        ("ratio", options.ratio, 0.01, 0.99),
        ("epochs", [] if options.epochs is None else [options.epochs], 1, 10_000),
        ("ranks", [options.ranks], 1, 64),
        ("steps", [getattr(options, "steps", _STEPS)], 2, 10_000),
    ):
        for value in values:
            if not least <= value <= most:
                raise ConfigError(f"bench: --{name} {value:g}; give {least:g} to {most:g}")
    chosen = list(options.rule)
    if "worm: uniform at equal FLOPs" in chosen and "worm" not in chosen:
        chosen.append("worm")
    epochs = _QUICK_EPOCHS if options.quick and options.epochs is None else options.epochs
    return [
        spec
        for subject in subjects
        for spec in specs(
            subject,
            options.ratio or [_RATIO],
            options.seed or (_SEEDS[:1] if options.quick else _SEEDS),
            epochs or SUBJECTS[subject].epochs,
            options.ranks,
            chosen,
        )
    ]


def _command(options: argparse.Namespace, folder: Path) -> str:
    """The command line that compares the same rows."""
    words = ["python", "-m", "worm_dist", "bench", "run"]
    for name in ("subject", "rule", "ratio", "seed"):
        for value in getattr(options, name):
            words += [f"--{name}", f"{value}"]
    if options.epochs is not None:
        words += ["--epochs", f"{options.epochs}"]
    if options.ranks != _RANKS:
        words += ["--ranks", f"{options.ranks}"]
    if options.quick:
        words.append("--quick")
    return shlex.join([*words, "--out", os.fspath(folder)])
