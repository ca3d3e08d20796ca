"""``python -m worm_dist plan MODEL``: forecast of a run, without training or process group."""

from __future__ import annotations

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..budget_argument import parse_budget
from ..errors import ConfigError
from ..terminal import only_json_on_stdout, print_json
from .image_shape import parse_image_shape
from .wrapper_names import WRAPPERS

if TYPE_CHECKING:
    from .forecast import Forecast

__all__ = ["add_parser", "run"]

_LATENCY = "50us"

logger = logging.getLogger(__name__)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the ``plan`` command.

    Args:
        commands: what argparse's ``add_subparsers()`` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "plan",
        help="what a run would drop, compute and send, and how long a step would take",
        description="The channel groups of a network, what a run would drop of them, and what "
        "that saves in parameters, operations and bytes, counted on a copy that is drawn. With "
        "--world and --bandwidth also an estimate of a step's time, from passes measured here.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "model", metavar="MODEL", help="a YAML file of a run, or a model's name, such as resnet18"
    )
    parser.add_argument("--input", metavar="CxHxW", help="shape of one image, such as 3x224x224")
    parser.add_argument("--classes", type=int, help="number of classes")
    parser.add_argument("--ratio", type=float, help="share of all channels to drop")
    parser.add_argument(
        "--budget",
        metavar="WHAT=SHARE",
        help="drop until the ticket takes this share of the dense network's flops, parameters, "
        "bytes or channels: flops=0.25",
    )
    parser.add_argument("--ticket", type=Path, metavar="DIR", help="drop what this ticket dropped")
    parser.add_argument(
        "--weights",
        type=Path,
        metavar="PATH",
        help="drop what has the lowest scores in this trained dense network: a checkpoint's "
        "folder, a .safetensors file, or a state dict of torch.save",
    )
    parser.add_argument(
        "--backend",
        choices=WRAPPERS,
        help="what the ranks train with: DistributedDataParallel, torch's fully_shard, or a stage "
        "of DeepSpeed's ZeRO; default: that of the YAML file, or ddp",
    )
    parser.add_argument(
        "--world",
        type=int,
        help="ranks to count bytes and memory for, and to estimate a step's time for; default: 2",
    )
    parser.add_argument(
        "--bandwidth",
        help="what an all-reduce reaches over a rank's connection: 10Gbit/s, 1.25GB/s; often less "
        "than the nominal rate, so measure it: bench scale does",
    )
    parser.add_argument(
        "--latency",
        help=f"latency of a message: 5us, 0.1ms; default: {_LATENCY}, as of TCP over Ethernet",
    )
    parser.add_argument(
        "--compute",
        metavar="TIME",
        help="time of a forward and backward pass of the dense network elsewhere, such as 100ms on "
        "a GPU, instead of a measurement here; the ticket's is in proportion to its operations",
    )
    parser.add_argument("--batch", type=int, help="samples in one rank's share of a step")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def run(options: argparse.Namespace) -> int:
    """Print a forecast; return the exit code, 0.

    Args:
        options: the parsed command line.

    Raises:
        ConfigError: an option, the settings or the model is invalid.
        CheckpointError: the ticket or the weights cannot be read, or do not fit.
    """
    _check(options)
    changes = _search_changes(options.ratio, options.budget)
    shape = None if options.input is None else parse_image_shape(options.input)
    from ..training.reporting.activity import shown_activity

    with shown_activity(), only_json_on_stdout(options.json):
        result = _forecast(options, (shape, options.classes, changes))
    if options.json:
        from .forecast_json import as_dict

        print_json(as_dict(result))
    else:
        from .table import show

        show(result)
    return 0


def _forecast(
    options: argparse.Namespace,
    overrides: tuple[tuple[int, int, int] | None, int | None, dict[str, Any]],
) -> Forecast:
    """The forecast of the model, with these input shape, number of classes and search settings."""
    logger.info("plan: loading torch")
    # Imported late: torchvision and torch-pruning take seconds; mistakes are reported first.
    from .forecast import forecast
    from .step_time import Link, parse_seconds
    from .target import target_of, target_of_config

    link = None
    if options.bandwidth is not None:
        link = Link.parse(options.world, options.bandwidth, options.latency or _LATENCY)
    compute = None
    if options.compute is not None:
        compute = parse_seconds("--compute", options.compute)
    path = Path(options.model)
    if path.suffix in (".yaml", ".yml") or path.is_file():
        target = target_of_config(path, *overrides)
    else:
        target = target_of(options.model, *overrides)
    if options.backend is not None:
        target = replace(target, wrapper=target.wrapper.named(options.backend))
    return forecast(
        target, options.ticket, link, options.batch, options.weights, compute, options.world
    )


def _check(options: argparse.Namespace) -> None:
    if options.bandwidth is not None and options.world is None:
        raise ConfigError(
            "plan: the time of a step needs both --world and --bandwidth, such as --world 8 "
            "--bandwidth 10Gbit/s"
        )
    if options.world is not None and options.world < 1:
        raise ConfigError(f"--world: {options.world} ranks; give at least 1")
    for name in ("batch", "latency", "compute"):
        if getattr(options, name) is not None and options.bandwidth is None:
            raise ConfigError(
                f"--{name}: only for the time of a step; give --world and --bandwidth too"
            )
    if options.ticket is not None and options.weights is not None:
        raise ConfigError("--weights: --ticket determines the dropped channels; give only one")
    determining = [
        name for name in ("ratio", "budget", "ticket") if getattr(options, name) is not None
    ]
    if len(determining) > 1:
        first, *others = (f"--{name}" for name in determining)
        raise ConfigError(
            f"{first}: {' and '.join(others)} determines the dropped channels too; give only one"
        )
    for name in ("classes", "batch"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ConfigError(f"--{name}: {getattr(options, name)} is too small; give at least 1")


def _search_changes(ratio: float | None, budget: str | None) -> dict[str, Any]:
    """The settings of the search that the options replace."""
    if budget is not None:
        return {"budget": parse_budget(budget)}
    return {} if ratio is None else {"prune_ratio": ratio}
