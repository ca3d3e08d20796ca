"""Tables of estimated step times."""

from __future__ import annotations

from rich.table import Table

from .console import plain_table
from .forecast import Estimate
from .formatting import compared, seconds
from .step_time import FORMULAS
from .wrapper import WrapperSettings

__all__ = ["method", "setting", "times"]


def setting(estimate: Estimate) -> str:
    """The title of the table."""
    link = estimate.link
    ranks = "rank" if link.world_size == 1 else "ranks"
    return (
        f"A step's time, estimated: {link.world_size} {ranks} at {link.text}, "
        f"{estimate.num_samples} samples each"
    )


def times(estimate: Estimate, wrapper: WrapperSettings) -> Table:
    """Table of the step times of every stage."""
    sending = "all-reduce" if wrapper.kind == "ddp" else "collectives"
    table = plain_table()
    table.add_column("")
    for heading in ("computing", sending, "expected", "full overlap", "no overlap"):
        table.add_column(heading, justify="right")
    dense = estimate.steps["dense"]
    for stage, step in estimate.steps.items():
        table.add_row(
            stage,
            seconds(step.compute_seconds),
            seconds(step.communication_seconds),
            compared(
                seconds(step.expected_seconds), step.expected_seconds / dense.expected_seconds
            ),
            seconds(step.shortest_seconds),
            seconds(step.longest_seconds),
        )
    return table


def method(estimate: Estimate, wrapper: WrapperSettings) -> str:
    """How the times are estimated."""
    measured = estimate.measured
    computing = f"measured on this machine ({measured.device}; median of {measured.rounds})"
    if measured.rounds == 0:
        computing = "given for the dense network; the ticket's is in proportion to its FLOPs"
    elif measured.num_samples < estimate.num_samples:
        computing += f", on {measured.num_samples} samples and scaled to {estimate.num_samples}"
    if wrapper.kind == "ddp":
        sending = (
            "DistributedDataParallel's buckets are reduced one after the other, each as soon as "
            "its gradients are there"
        )
    elif estimate.link.is_gloo:
        sending = (
            "on CPUs collectives and computing wait for each other, and gloo's reduce-scatter is "
            "an all-reduce"
        )
    else:
        sending = (
            "collectives run one after the other, each as soon as it can start, and computing "
            "waits for the weights that it needs"
        )
    formulas = f"a ring's {FORMULAS['all-reduce']}."
    if wrapper.kind != "ddp":
        formulas += f" Reduce-scatter: half of that. All-gather: {FORMULAS['all-gather']}."
    return (
        f"Computing: forward and backward pass, {computing}. All-reduce: "
        f"{formulas} Expected: {sending}. Packing, optimizer and input are left out. An all-reduce "
        "often reaches less than the nominal rate, over gloo 450 to 650 Mbit/s of 1 Gbit/s: give "
        "what yours reaches as --bandwidth."
    )
