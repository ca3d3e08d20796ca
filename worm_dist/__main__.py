"""Command line: ``python -m worm_dist train CONFIG [--key.subkey value ...]``, ``init``, ``plan``,
``doctor``, ``ticket``, ``replay``, ``report`` and ``bench``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from .analysis import replay_command, report_command
from .bench.ledger.command import add_parsers as add_ledger_parsers
from .bench.ledger.command import run as run_ledger
from .bench.time_to_accuracy.command import NAMES as TIME_TO_ACCURACY
from .bench.time_to_accuracy.command import add_parsers as add_time_to_accuracy_parsers
from .bench.time_to_accuracy.command import run as run_time_to_accuracy
from .distributed.error_report import AlreadyReported, hard_exit, print_error
from .distributed.launchers import started_by
from .doctor.command import add_parser as add_doctor_parser
from .doctor.command import run as diagnose
from .errors import ConfigError, WormError
from .extras import require_extras
from .mistakes import shortened
from .planning import command as plan_command
from .ticket_command import command as ticket_command
from .training.config_file import read_run_config
from .training.reporting.standard_streams import secure_standard_streams
from .training.required_packages import require_packages
from .training.settings_template import settings_template
from .training.user_functions import require_user_functions

_TWO_RANKS = (
    "wire",
    "step",
    "packing",
    "overhead",
    "hiccup",
    "zero",
    "fsdp",
    "checkpoint",
    "compute",
)
"""Benchmarks of two ranks."""

_PRINTING: Mapping[str, Any] = {
    "plan": plan_command,
    "ticket": ticket_command,
    "replay": replay_command,
    "report": report_command,
}
"""Commands that start no training."""
_REPORT_SECONDS = 5
"""Time for the first rank of a host to print an error of the settings."""
_INTERRUPTED = 128 + signal.SIGINT
"""Where Ctrl-C does not stop a training gracefully."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code, 0 or that of the error."""
    secure_standard_streams()
    try:
        options, replaced = _parse(arguments)
        if options.command == "init":
            return _until_closed(lambda: _print_template(options.preset))
        if options.command == "doctor":
            return _until_closed(lambda: diagnose(options, replaced))
        if options.command in _PRINTING:
            return _until_closed(lambda: _PRINTING[options.command].run(options))
        return _bench(options) if options.command == "bench" else _train(options, replaced)
    except AlreadyReported as error:
        return error.exit_code
    except KeyboardInterrupt:
        return _INTERRUPTED
    except WormError as error:
        launcher = started_by(os.environ)
        local_rank = os.environ.get(launcher.local_rank, "0") if launcher else "0"
        if isinstance(error, ConfigError) and local_rank != "0":
            # Every rank reads the same settings and fails in the same way; one report per host is
            # enough.  The launcher stops all ranks when the first one exits, so the others wait.  A
            # rank that is still running afterwards failed alone, and reports too.
            time.sleep(_REPORT_SECONDS)
        print_error(error, os.environ.get(launcher.rank) if launcher else None)
        return error.exit_code


def _parse(
    arguments: Sequence[str] | None,
) -> tuple[argparse.Namespace, list[tuple[str, str]]]:
    parser = argparse.ArgumentParser(
        prog="python -m worm_dist",
        description="Train a network on many GPUs and come out with a smaller one.",
        allow_abbrev=False,
    )
    # deepspeed, and torch.distributed.launch before torchrun, insert it before our arguments.  They
    # also set LOCAL_RANK, which is what is used.
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train, search, truncate, draw the ticket, train it on",
        epilog="Any setting can be replaced by its dotted name: --search.prune_ratio 0.3",
        allow_abbrev=False,
    )
    train.add_argument("config", type=Path, help="a YAML file, such as configs/digits.yaml")
    train.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    train.add_argument(
        "--resume",
        default="auto",
        help="auto (default): resume an unfinished run in the folder; never: move it aside and "
        "start a new run; or the path of a checkpoint, or of a run's folder for its newest one",
    )
    train.add_argument("--preset", help="worm, worm-paper, early-bird or dense")
    train.add_argument("--backend", help="auto, gloo, nccl, fsdp or deepspeed")
    train.add_argument("--seed", help="the seed of weights, shuffling and augmentation")
    train.add_argument(
        "--quiet", action="store_true", help="print warnings and one line at the end, nothing else"
    )
    train.add_argument(
        "--check",
        action="store_true",
        help="only check the settings; exit code 0 if they are valid, else 2",
    )
    train.add_argument(
        "--explain",
        action="store_true",
        help="only print the settings in which the presets differ, under this file: what another "
        "--preset would change",
    )
    template = commands.add_parser(
        "init",
        help="print a settings file to fill in",
        description="A settings file with every setting, its default and what it means, to the "
        "standard output. As it is, it trains on the digits.",
        allow_abbrev=False,
    )
    template.add_argument(
        "--preset", default="worm", help="worm (default), worm-paper, early-bird or dense"
    )
    add_doctor_parser(commands)
    strict = {name: module.add_parser(commands) for name, module in _PRINTING.items()}
    strict["init"] = template
    strict["bench"] = bench = commands.add_parser(
        "bench",
        help="measure side by side with plain DDP on two ranks, or whole runs",
        allow_abbrev=False,
    )
    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    for name in _TWO_RANKS:
        two_ranks = benchmarks.add_parser(name, allow_abbrev=False)
        two_ranks.add_argument(
            "--quick", action="store_true", help="a small network and few rounds"
        )
        two_ranks.add_argument("--model", help="the network that is trained; default: resnet18")
        two_ranks.add_argument("--images", type=int, help="images of a rank in a step; default: 2")
        two_ranks.add_argument("--side", type=int, help="pixels of an image's side; default: 32")
        two_ranks.add_argument("--rounds", type=int, help="rounds of measurements at most")
        if name == "wire":
            two_ranks.add_argument(
                "--backend",
                choices=("ddp", "fsdp", "deepspeed"),
                default="ddp",
                help="ddp (default); fsdp and deepspeed are bench fsdp and bench zero",
            )
        if name in ("step", "packing"):
            two_ranks.add_argument(
                "--only", metavar="NAMES", help="variants beside DDP, with commas in between"
            )
        two_ranks.add_argument("--out", type=Path, help="default: runs/bench, or runs/bench-quick")
    scale = benchmarks.add_parser(
        "scale",
        help="several ranks: bytes, messages and step times beside what plan estimates",
        allow_abbrev=False,
    )
    scale.add_argument("--model", help="a model for 32x32 images; default: resnet20")
    scale.add_argument("--backend", choices=("ddp", "fsdp"), default="ddp")
    scale.add_argument("--quick", action="store_true", help="few rounds")
    scale.add_argument("--out", type=Path, help="default: runs/scale")
    memory = benchmarks.add_parser(
        "memory",
        help="several ranks: what attach, check, save and draw take under ZeRO",
        allow_abbrev=False,
    )
    memory.add_argument("--model", default="resnet18", help="a model for 32x32 images")
    memory.add_argument("--out", type=Path, help="default: runs/memory")
    add_ledger_parsers(benchmarks)
    add_time_to_accuracy_parsers(benchmarks)
    options, rest = parser.parse_known_args(arguments)
    if options.command in strict:
        if rest:
            strict[options.command].error(f"unrecognized arguments: {' '.join(rest)}")
        return options, []
    replaced = _pairs(rest)
    shorthands = {"preset": "preset", "seed": "seed", "backend": "distributed.backend"}
    for name, key in shorthands.items():
        if getattr(options, name) is not None:
            replaced.append((key, getattr(options, name)))
    return options, replaced


def _pairs(rest: Sequence[str]) -> list[tuple[str, str]]:
    """``--a.b value`` and ``--a.b=value`` as pairs.

    Raises:
        ConfigError: something is neither.
    """
    pairs: list[tuple[str, str]] = []
    words = list(rest)
    while words:
        word = words.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not key:
            raise ConfigError(f"{shortened(repr(word), 100)}: expected --key.subkey value")
        if not equals and not words:
            raise ConfigError(f"{shortened(word, 100)}: its value is missing")
        pairs.append((key, value if equals else words.pop(0)))
    return pairs


def _train(options: argparse.Namespace, replaced: Sequence[tuple[str, str]]) -> int:
    if options.explain:
        from .training.explanation import explain

        return _until_closed(lambda: explain(options.config, replaced))
    config = read_run_config(options.config, replaced)
    require_packages(config)
    require_user_functions(config)
    if options.check:
        # Late: the schedule of checks needs torch, which takes seconds to import.
        from .training.ineffective_settings import ineffective_settings

        for line in ineffective_settings(config):
            sys.stderr.write(f"worm_dist: warning: {line}\n")
        print(f"{options.config}: the settings are valid")
        return 0
    out = options.out or Path("runs") / config.name
    if out.name in ("", ".."):
        raise ConfigError(f"--out: {out} may hold more than this run; give a folder for it alone")
    # Data sets, TensorBoard and plots take seconds to import; report a wrong setting before.
    from .training.run import run

    return run(config, out, options.resume, options.quiet)


def _print_template(preset: str) -> int:
    print(settings_template(preset), end="", flush=True)
    return 0


def _until_closed(command: Callable[[], int]) -> int:
    try:
        return command()
    except (BrokenPipeError, SystemExit):  # the latter by rich
        return 0  # the reader has seen enough, as in plan ... | head


def _bench(options: argparse.Namespace) -> int:
    require_extras({"train": "bench"})
    if options.benchmark in ("ledger", "grid"):
        run_ledger(options)
        return 0
    if options.benchmark in TIME_TO_ACCURACY:
        run_time_to_accuracy(options)
        return 0
    if options.benchmark == "scale":
        from .bench.scaling.run import run as run_scale

        folder = options.out or Path("runs") / "scale"
        run_scale(options.model, options.backend, options.quick, folder)
        return 0
    if options.benchmark == "memory":
        from .bench.memory import run as run_memory

        run_memory(options.model, options.out or Path("runs") / "memory")
        return 0
    from .bench.run import run

    default = Path("runs") / ("bench-quick" if options.quick else "bench")
    given = {name: getattr(options, name) for name in ("model", "images", "side", "rounds")}
    changes = {name: value for name, value in given.items() if value is not None}
    for name, value in changes.items():
        if name != "model" and value < 2:
            raise ConfigError(f"--{name}: {value} is too small; give at least 2")
    if getattr(options, "only", None):
        changes["only"] = tuple(options.only.split(","))
    benchmark = options.benchmark
    if benchmark == "wire":
        benchmark = {"ddp": "wire", "fsdp": "fsdp", "deepspeed": "zero"}[options.backend]
    run(benchmark, options.quick, changes, options.out or default)
    return 0


if __name__ == "__main__":
    hard_exit(main())
