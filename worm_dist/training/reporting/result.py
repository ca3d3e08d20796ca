"""Result: what a run came to, as ``result.json`` says it."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

__all__ = ["Accuracy", "Count", "Flops", "Result", "Seconds", "TrafficResult", "versions"]


@dataclass
class Accuracy:
    """Fractions of the test split.  Before the draw it is the dense network's."""

    before_draw: float | None = None
    after_draw: float | None = None
    final: float | None = None


@dataclass
class Count:
    dense: int | None = None
    ticket: int | None = None


@dataclass
class Flops(Count):
    """Of one forward pass on one sample; ``mean`` is over all steps of the run."""

    mean: int | None = None


@dataclass
class TrafficResult:
    """Bytes that one rank hands to collectives; the total also counts scores and verdicts."""

    dense_bytes_per_step: int | None = None
    truncated_bytes_per_step: int | None = None
    ticket_bytes_per_step: int | None = None
    total_bytes: int | None = None


@dataclass
class Seconds:
    search: float | None = None
    truncate: float | None = None
    ticket: float | None = None
    total: float | None = None


def versions() -> dict[str, str]:
    """Of Python and of what computes."""
    packages = ("worm_dist", "torch", "torchvision", "torch-pruning", "numpy")
    installed = {package.replace("-", "_"): version(package) for package in packages}
    return {"python": platform.python_version(), **installed}


@dataclass
class Result:
    """A figure that a run does not have is None.

    Attributes:
        status: ``running``, then ``ticket``, ``not_found`` (searched, but found none) or ``dense``.
        reason: for ``not_found``; what the search lacked, and what to do.
        at_chance: the network ended no better than a constant answer.
        data: names the split.
        elbow_epoch, ticket_epoch: epochs trained when truncation started and the ticket was drawn.
        live_fraction: elements that were still averaged while truncated, of all that train.
        left_fraction: dropped channels that had left at the newest check, of all; None where
            channels do not leave one after another.
        flops: floating point operations; a multiply and an add are two.
        unwritten: files of the run that are missing or end early, because the disk refused.
    """

    preset: str
    seed: int
    world_size: int
    backend: str
    data: str
    status: str = "running"
    reason: str | None = None
    at_chance: bool | None = None
    checks: int = 0
    elbow_epoch: float | None = None
    ticket_epoch: float | None = None
    live_fraction: float | None = None
    left_fraction: float | None = None
    accuracy: Accuracy = field(default_factory=Accuracy)
    parameters: Count = field(default_factory=Count)
    flops: Flops = field(default_factory=Flops)
    traffic: TrafficResult = field(default_factory=TrafficResult)
    seconds: Seconds = field(default_factory=Seconds)
    mask_digest: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    unwritten: list[str] = field(default_factory=list)

    def go_on_from(self, saved: Mapping[str, Any]) -> None:
        """Take over what an earlier part of the run has found, from ``as_dict``."""
        for name in (
            "checks",
            "elbow_epoch",
            "ticket_epoch",
            "live_fraction",
            "left_fraction",
            "unwritten",
        ):
            setattr(self, name, saved[name])
        self.accuracy = Accuracy(**saved["accuracy"])
        self.parameters = Count(**saved["parameters"])
        self.flops = Flops(**saved["flops"])
        self.traffic = TrafficResult(**saved["traffic"])
        self.seconds = Seconds(**saved["seconds"])

    def why_not_found(self) -> str:
        """What the search of a run lacked that ended before its draw, and what to do."""
        if self.elbow_epoch is None:
            return (
                f"no ticket: no elbow in {self.checks} checks; train for more epochs, or set "
                "search.elbow.trigger"
            )
        lacked = "the mask had not settled"
        if self.left_fraction is not None:
            lacked = f"{self.left_fraction:.0%} of the dropped channels had left"
        return (
            f"no ticket: the elbow came at epoch {self.elbow_epoch:g}, and {lacked} when training "
            "ended; more epochs and --resume with its newest checkpoint go on"
        )

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
