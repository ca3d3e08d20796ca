"""Tables of memory on a rank."""

from __future__ import annotations

from rich.table import Table

from .console import plain_table
from .forecast import Forecast
from .formatting import compared, mebibytes

__all__ = ["engine_memory", "training_memory"]


def engine_memory(forecast: Forecast) -> Table:
    """Table of what the engine holds in every stage, also as a share of the dense weights."""
    table = plain_table()
    table.add_column("")
    for heading in ("held weights", "held state", "packing", "indices", "inputs", "all"):
        table.add_column(heading, justify="right")
    for stage, memory in forecast.memory.items():
        parts = memory.truncation
        cells = (parts.weights, parts.moments, parts.buffers, parts.indices, memory.inputs)
        share = memory.total / forecast.weight_bytes
        table.add_row(stage, *map(mebibytes, cells), compared(mebibytes(memory.total), share))
    return table


def training_memory(forecast: Forecast) -> Table:
    """Table of what training holds of the dense network and of the ticket."""
    states = forecast.training
    is_gathered = any(state.gathered for state in states.values())
    table = plain_table()
    table.add_column("")
    headings = ("weights", *["gathered"] * is_gathered, "gradients", "optimizer", "all")
    for heading in headings:
        table.add_column(heading, justify="right")
    for stage, state in states.items():
        gathered = [mebibytes(state.gathered)] * is_gathered
        cells = (*gathered, mebibytes(state.gradients), mebibytes(state.optimizer))
        share = state.total / states["dense"].total
        all_of_it = compared(mebibytes(state.total), share)
        table.add_row(stage, mebibytes(state.weights), *cells, all_of_it)
    return table
