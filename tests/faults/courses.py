"""Courses: whole runs that go through all phases, and what differs between two of them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.faults.driver import CONFIG
from tests.resuming import differences
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.sharded_tensor import with_stored_tensors_read

__all__ = [
    "ALL_PHASES",
    "curves_of",
    "differences_of_runs",
    "journal_of",
    "last_state",
    "under_zero",
]

ALL_PHASES: dict[str, Any] = {
    "preset": "worm",
    "epochs": 3,
    "search.every": "2ba",
    "search.window": 3,
    "search.settled": 0.35,
    "search.elbow.min_masks": 2,
    "search.elbow.margin": 0.3,
    "search.elbow.latest": "null",
    "search.l1": 0.01,
    "truncation.removal.duration": "8ba",
    "truncation.removal.fade_steps": 2,
    "truncation.removal.stage": 0.5,
    "ticket.round_to": 1,
    "model.arguments": "{widths: [8, M, 16]}",
}
"""Eight steps an epoch: truncation starts at step 4, what has left by step 6 is a stage, and the
ticket is drawn at step 10."""


def under_zero(stage: int) -> dict[str, Any]:
    """The same under DeepSpeed."""
    return {
        **ALL_PHASES,
        "distributed.backend": "deepspeed",
        "distributed.deepspeed": str(CONFIG.parent / "deepspeed" / f"zero{stage}.json"),
    }


def last_state(run: Path) -> Any:
    """What a run has saved at its end, less what clocks have measured."""
    newest = CheckpointManager(run / "checkpoints").newest()
    assert newest is not None
    state = with_stored_tensors_read(newest.read("run"))
    del state["phase_stats"]["run_seconds"], state["phase_stats"]["phase_seconds"]
    del state["result"]["seconds"]
    return state


def journal_of(run: Path) -> list[str]:
    return (run / "journal.jsonl").read_text().splitlines()


def differences_of_runs(one: Path, other: Path) -> Iterator[str]:
    """Between two finished runs: weights, optimizer, masks and all else that a checkpoint has, to
    the bit; lines and figures."""
    yield from differences(last_state(one), last_state(other), "the last checkpoint")
    yield from differences(journal_of(one), journal_of(other), "journal.jsonl")
    yield from differences(_result(one), _result(other), "result.json")


def _result(run: Path) -> Any:
    result = json.loads((run / "result.json").read_text())
    del result["seconds"]
    return result


def curves_of(run: Path) -> dict[str, list[tuple[int, float]]]:
    """Every point of every curve, as TensorBoard shows them."""
    board = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    measured = {"train/images_per_second", "whole_run/seconds"}
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
        if tag not in measured
    }
