"""Prints the comparison of two tickets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TextIO

from rich.table import Table

from ..planning.console import GAP, plain_table, print_table
from ..planning.formatting import column
from ..terminal import console_of
from .comparison import Comparison, TensorComparison

__all__ = ["show"]

_NAME_WIDTH = 36


def show(comparison: Comparison, file: TextIO | None = None) -> None:
    """Print a comparison; without colours if the output is not a terminal.

    Args:
        comparison: the comparison to print.
        file: the stream to write to; the default is the standard output.
    """
    console = console_of(file)
    console.print(*_head(comparison), sep="\n")
    if comparison.groups:
        print_table(console, "Channels of each group, kept by", _groups(comparison))
    if comparison.other_groups:
        console.print(f"Groups of one ticket only: {', '.join(comparison.other_groups)}.")
    different = [tensor for tensor in comparison.tensors if not tensor.is_equal]
    if different:
        print_table(console, "Weights that differ", _tensors(different))
    console.print()
    console.print(*_summary(comparison, len(different)), sep="\n")


def _head(comparison: Comparison) -> Iterator[str]:
    for folder, record in zip(comparison.folders, comparison.records, strict=True):
        kept = sum(len(group.kept) for group in record.groups)
        size = sum(group.num_channels for group in record.groups)
        yield f"{folder}: {kept:,} of {size:,} channels, mask {record.mask_digest}"
    model = comparison.records[0].model
    yield {
        True: f"Drawn from the same dense network: {model.name if model else ''}.",
        False: "Drawn from different dense networks.",
        None: "Same channel groups; a ticket does not say how its dense network is built.",
    }[comparison.same_dense_network]


def _groups(comparison: Comparison) -> Table:
    table = plain_table()
    table.add_column("group", no_wrap=True)
    for heading in ("both", "first only", "second only", "neither"):
        table.add_column(heading, justify="right")
    names = column([[group.name] for group in comparison.groups], _NAME_WIDTH)
    for name, group in zip(names, comparison.groups, strict=True):
        counts = (group.both, group.only_first, group.only_second, group.neither)
        table.add_row(name, *(f"{count:,}" for count in counts))
    return table


def _tensors(tensors: Sequence[TensorComparison]) -> Table:
    table = plain_table()
    table.add_column("tensor", no_wrap=True)
    table.add_column("first")
    table.add_column("second")
    table.add_column("largest difference", justify="right")
    names = column([[tensor.name] for tensor in tensors], _NAME_WIDTH + GAP)
    for name, tensor in zip(names, tensors, strict=True):
        table.add_row(name, _shape(tensor.first), _shape(tensor.second), _difference(tensor))
    return table


def _shape(shape: Sequence[int] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "scalar"


def _difference(tensor: TensorComparison) -> str:
    if tensor.first != tensor.second:
        return "-"
    return "not finite" if tensor.difference is None else f"{tensor.difference:.4g}"


def _summary(comparison: Comparison, num_different: int) -> Iterator[str]:
    if comparison.distance is None:
        yield "The masks have different groups, and so no distance."
    else:
        yield f"Distance of the masks: {comparison.distance:.4g}, of 0 to 1 (normalised Hamming)."
    num_equal = len(comparison.tensors) - num_different
    yield f"{num_equal} of {len(comparison.tensors)} tensors are equal, bit for bit."
    if num_different and comparison.largest_difference is not None:
        yield f"Largest difference where shapes are equal: {comparison.largest_difference:.4g}."
