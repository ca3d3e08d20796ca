"""``python -m worm_dist doctor [CONFIG]``: is this environment fit for the run?"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BackendError, ConfigError
from ..terminal import only_json_on_stdout
from ..training.config_file import read_run_config
from ..training.required_packages import require_packages
from ..training.run_config import RunConfig

if TYPE_CHECKING:
    import torch

    from ..distributed.init import RankInfo
    from .report import Report

__all__ = ["add_parser", "run"]

_PROBLEM = 1
"""The exit code if there is a problem."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the ``doctor`` command.

    Args:
        commands: what argparse's ``add_subparsers()`` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "doctor",
        help="is this environment fit for a run, before a long job is queued",
        description="Looks at software, devices and launcher; started by a launcher, also at "
        "whether all ranks reach one another; with a settings file, also at everything up to the "
        "first step. Exit code 0 unless there is a problem.",
        epilog="Any setting can be replaced by its dotted name: --search.prune_ratio 0.3",
        allow_abbrev=False,
    )
    parser.add_argument("config", type=Path, nargs="?", help="a YAML file of a run")
    parser.add_argument("--out", type=Path, help="the run's folder (default: runs/NAME)")
    parser.add_argument("--preset", help="worm, worm-paper, early-bird or dense")
    parser.add_argument("--backend", help="auto, gloo, nccl or deepspeed")
    parser.add_argument("--seed", help=argparse.SUPPRESS)  # so that train's words can be copied
    parser.add_argument(
        "--timeout", type=float, default=60, help="seconds to wait for the other ranks (60)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(options: argparse.Namespace, overrides: Sequence[tuple[str, str]]) -> int:
    """Print what was found, on rank zero; return the exit code, 0 unless there is a problem.

    Args:
        options: the parsed command line.
        overrides: pairs of a dotted key and its new value; see ``read_run_config``.

    Raises:
        ConfigError: a setting is given without a settings file.
        BackendError: the ranks do not meet; raised on ranks other than zero, which has it in its
            report.
    """
    if options.config is None and overrides:
        raise ConfigError(f"doctor: --{overrides[0][0]} is a setting; give the settings file too")
    # Imported late: torch takes seconds.
    from ..distributed.log_lines import rank_named
    from .finding import problems
    from .launch import launch
    from .machine import devices, open_files, software
    from .report import Report

    rank_info, launched = launch(os.environ)
    report = Report([software(), *launched])
    config = None
    if options.config is not None:
        try:
            found = read_run_config(options.config, overrides)
            require_packages(found)
            config = found
        except ConfigError as error:
            report.findings += problems("settings", error)
    if rank_info is not None:
        report.findings += devices(rank_info.local_world_size)
        report.findings.append(open_files(rank_info.rank, rank_info.world_size))
        try:
            with rank_named(rank_info.rank), only_json_on_stdout(options.json):
                _together(report, config, rank_info, options)
        except BackendError as error:
            if rank_info.rank != 0:
                raise
            report.findings += problems("backend", error)
    if rank_info is None or rank_info.rank == 0:
        report.show(options.json)
    return _PROBLEM if report.num_problems else 0


def _together(
    report: Report, config: RunConfig | None, rank_info: RankInfo, options: argparse.Namespace
) -> None:
    """What the ranks find together, in a process group.  Collective.

    Raises:
        BackendError: not all ranks join in time, or the backend does not work here.
    """
    from ..distributed.init import process_group
    from ..distributed.timeouts import set_group_timeout
    from .deadline import deadline
    from .ranks import reach

    transport = "auto" if config is None else config.distributed.transport

    def expired(seconds: float, where: str) -> Any:
        return lambda: _give_up(report, rank_info, seconds, where, options.json)

    with process_group(rank_info, transport, options.timeout) as device:
        with deadline(options.timeout, expired(options.timeout, "an all-reduce")):
            report.reach = reach(device)
        report.findings += report.reach.findings
        patience = options.timeout
        if config is not None:
            patience = config.distributed.startup_timeout_seconds
            set_group_timeout(patience)
        with deadline(patience, expired(patience, "the start of the run")):
            _start(report, config, rank_info, device, options)


def _start(
    report: Report,
    config: RunConfig | None,
    rank_info: RankInfo,
    device: torch.device,
    options: argparse.Namespace,
) -> None:
    """The start of the run, if no rank has a problem before; then the findings of all ranks.
    Collective."""
    import torch.distributed as dist

    from .start import own_data, start
    from .storage import checkpoint_bytes, storage

    def gathered() -> list[Any]:
        theirs: list[Any] = [None] * rank_info.world_size
        dist.all_gather_object(theirs, report.findings)
        return theirs

    if config is not None:
        report.findings += own_data(config)
    first = gathered()
    if config is not None and not any(each.level == "problem" for own in first for each in own):
        report.start, found = start(config, rank_info, device)
        report.findings += found
        if report.start is not None and rank_info.rank == 0:
            parts = report.start.parts
            batch = parts.sample.nbytes * (config.data.batch_size // rank_info.world_size)
            size = checkpoint_bytes(config, parts.network, batch, rank_info.world_size)
            report.findings.append(storage(options.out or Path("runs") / config.name, config, size))
    report.add_other_ranks(gathered())


def _give_up(
    report: Report, rank_info: RankInfo, seconds: float, where: str, as_json: bool
) -> None:
    """End this process, whose collective does not return."""
    from ..distributed.error_report import hard_exit, print_error
    from .finding import problems

    error = BackendError(
        f"{where} has not returned within {seconds:g} seconds; look for a rank that was ended, a "
        "firewall between the hosts, or the wrong network interface (GLOO_SOCKET_IFNAME, "
        "NCCL_SOCKET_IFNAME)"
    )
    if rank_info.rank == 0:
        report.findings += problems("backend", error)
        report.show(as_json)
    else:
        print_error(error, rank_info.rank)
    hard_exit(_PROBLEM)
