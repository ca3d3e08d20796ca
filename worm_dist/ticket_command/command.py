"""``python -m worm_dist ticket show|verify|diff|export``: what is in a ticket's folder."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, ConfigError
from ..extras import require_extras
from ..planning.image_shape import parse_image_shape
from ..terminal import only_json_on_stdout, print_json

__all__ = ["add_parser", "run"]

_DIFFERENT = 1
"""Exit code of ``diff`` for tickets that differ, as in diff(1); errors have codes above it."""
_SAMPLES = 32


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the ``ticket`` command.

    Args:
        commands: what argparse's ``add_subparsers()`` returned.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        "ticket",
        help="show, verify, compare or export the tickets that runs have written",
        allow_abbrev=False,
    )
    actions = parser.add_subparsers(dest="action", required=True)

    def add(name: str, does: str, description: str) -> argparse.ArgumentParser:
        action: argparse.ArgumentParser = actions.add_parser(
            name, help=does, description=description, allow_abbrev=False
        )
        return action

    show = add(
        "show",
        "kept channels, parameters, FLOPs, settings",
        "What a ticket holds: the kept channels of every group, and its parameters and FLOPs "
        "beside those of the dense network.",
    )
    _add_folder(show)
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.add_argument(
        "--speed",
        action="store_true",
        help="measure on this machine how many images a second the ticket and the dense network "
        "pass forward, in eval mode, without gradients",
    )
    show.add_argument(
        "--batch", type=int, help=f"images in a batch for --speed (default: {_SAMPLES})"
    )
    _add_input(show)

    verify = add(
        "verify",
        "check that a ticket is intact and can be loaded",
        "Checks the digests of both files, that the metadata does not contradict itself, that the "
        "kept channels fit the shapes of the weights, and that the weights load into the network "
        "that the ticket names. Exit code 0 if all is well, 3 if not.",
    )
    _add_folder(verify)
    verify.add_argument("--json", action="store_true", help="print one JSON object")

    diff = add(
        "diff",
        "compare the masks and weights of two tickets",
        "Compares the masks and the weights of two tickets. Exit code 0 if both are equal, 1 if "
        "they differ, 3 if a ticket cannot be read.",
    )
    diff.add_argument("first", type=Path, metavar="DIR", help="the folder of a ticket")
    diff.add_argument("second", type=Path, metavar="DIR", help="the folder of the other ticket")
    diff.add_argument("--json", action="store_true", help="print one JSON object")

    export = add(
        "export",
        "write the small network as ONNX or with torch.export",
        "Writes the small network for programs without worm_dist, for batches of any size. The "
        "file is written only if its outputs equal those of the network on random images.",
    )
    _add_folder(export)
    form = export.add_mutually_exclusive_group(required=True)
    form.add_argument("--onnx", type=Path, metavar="FILE", help="needs worm_dist[onnx]")
    form.add_argument("--torch-export", type=Path, metavar="FILE", help="such as ticket.pt2")
    _add_input(export)
    return parser


def _add_folder(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder of a ticket")


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input",
        metavar="CxHxW",
        help="shape of one image, such as 3x224x224 (default: the one that the ticket records)",
    )


def run(options: argparse.Namespace) -> int:
    """Run an action; return the exit code.

    Args:
        options: the parsed command line.

    Raises:
        ConfigError: an option is invalid, or an optional package is missing.
        CheckpointError: a ticket cannot be read or a file cannot be written.
    """
    actions: dict[str, Callable[[argparse.Namespace], int]] = {
        "show": _show,
        "verify": _verify,
        "diff": _diff,
        "export": _export,
    }
    return actions[options.action](options)


# torch takes seconds to import, so the functions below import late; mistakes are reported first.


def _show(options: argparse.Namespace) -> int:
    if options.batch is not None and not options.speed:
        raise ConfigError("--batch: only for the measurement; give --speed too")
    if options.batch is not None and options.batch < 1:
        raise ConfigError(f"--batch: {options.batch} is too small; give at least 1")
    shape = _input_shape(options)
    from .contents import read_contents
    from .contents_table import show

    num_samples = (options.batch or _SAMPLES) if options.speed else None
    with only_json_on_stdout(options.json):
        contents = read_contents(options.folder, shape, num_samples)
    _print(options, contents.as_dict, lambda: show(contents))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .verification import verify

    try:
        with only_json_on_stdout(options.json):
            verification = verify(options.folder)
    except CheckpointError as error:
        if not options.json:
            raise
        # That a ticket is damaged is an answer too.
        print_json({"folder": str(options.folder), "intact": False, "reason": str(error)})
        return error.exit_code
    _print(options, verification.as_dict, lambda: print(verification))
    return 0


def _diff(options: argparse.Namespace) -> int:
    from .comparison import compare
    from .comparison_table import show

    comparison = compare(options.first, options.second)
    _print(options, comparison.as_dict, lambda: show(comparison))
    return 0 if comparison.is_equal else _DIFFERENT


def _export(options: argparse.Namespace) -> int:
    shape = _input_shape(options)
    if options.onnx is not None:
        require_extras({"onnx": "--onnx"})
    from .export import export_onnx, export_torch

    if options.onnx is not None:
        print(export_onnx(options.folder, options.onnx, shape))
    else:
        print(export_torch(options.folder, options.torch_export, shape))
    return 0


def _input_shape(options: argparse.Namespace) -> tuple[int, int, int] | None:
    return None if options.input is None else parse_image_shape(options.input)


def _print(
    options: argparse.Namespace, as_dict: Callable[[], dict[str, Any]], show: Callable[[], None]
) -> None:
    """Print as JSON or as tables."""
    if options.json:
        print_json(as_dict())
    else:
        show()
