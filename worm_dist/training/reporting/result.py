"""Result of a run: the content of ``result.json``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

from .recovery import recovery

__all__ = [
    "Accuracy",
    "Count",
    "Flops",
    "Recovery",
    "Result",
    "Seconds",
    "TrafficResult",
    "versions",
]


@dataclass
class Accuracy:
    """Accuracies on the test split, 0 to 1; ``before_draw`` is the dense network's,
    ``after_one_epoch`` that of the first test an epoch or more after the draw."""

    before_draw: float | None = None
    after_draw: float | None = None
    after_one_epoch: float | None = None
    final: float | None = None


@dataclass
class Recovery:
    """The accuracy that the ticket is to reach, ``retraining.until_accuracy`` or else the one
    before the draw, and the epochs from the draw until a test reached it."""

    accuracy: float | None = None
    epochs: float | None = None


@dataclass
class Count:
    dense: int | None = None
    ticket: int | None = None


@dataclass
class Flops(Count):
    """FLOPs of one forward pass on one sample; ``mean`` is over all steps of the run."""

    mean: int | None = None


@dataclass
class TrafficResult:
    """Bytes that one rank passes to collectives; the total includes scores and verdicts."""

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
    """Versions of Python and of the numerical packages."""
    packages = ("worm_dist", "torch", "torchvision", "torch-pruning", "numpy")
    installed = {package.replace("-", "_"): version(package) for package in packages}
    return {"python": platform.python_version(), **installed}


@dataclass
class Result:
    """Figures of a run; a figure that the run does not have is None.

    Attributes:
        status: ``running``, then ``ticket``, ``not_found`` (the search found no ticket) or
            ``dense``.
        reason: explanation of ``not_found``, with a remedy.
        at_chance: True if the final network is no better than a constant answer.
        data: description of the data set and its split.
        checks: number of masks.  The first one may be taken before any training
            (``search.first``); so a ticket at the third of them may be of epoch 2.
        elbow_epoch, ticket_epoch: epochs trained when truncation started and the ticket was drawn.
        live_fraction: live elements during truncation, as a fraction of all trained elements.
        removed_fraction: removed channels at the newest check, as a fraction of the dropped ones;
            None without gradual removal.
        flops: floating point operations; a multiply and an add count as two.
        failed_writes: names of output files that are missing or truncated because of write errors.
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
    removed_fraction: float | None = None
    accuracy: Accuracy = field(default_factory=Accuracy)
    recovery: Recovery = field(default_factory=Recovery)
    parameters: Count = field(default_factory=Count)
    flops: Flops = field(default_factory=Flops)
    traffic: TrafficResult = field(default_factory=TrafficResult)
    seconds: Seconds = field(default_factory=Seconds)
    mask_digest: str | None = None
    versions: dict[str, str] = field(default_factory=versions)
    failed_writes: list[str] = field(default_factory=list)

    def tested(self, epoch: int, accuracy: float, wanted: float | None) -> None:
        """Record the test after an epoch.

        Args:
            epoch: epochs trained.
            accuracy: the accuracy on the test split.
            wanted: the accuracy that the ticket is to reach; None for the one before the draw.
        """
        figures, after_draw = self.accuracy, self.accuracy.after_draw
        figures.final = accuracy
        if self.ticket_epoch is None or after_draw is None:
            return
        if figures.after_one_epoch is None and epoch >= self.ticket_epoch + 1:
            figures.after_one_epoch = accuracy
        self.recovery.accuracy = figures.before_draw if wanted is None else wanted
        if self.recovery.epochs is None and self.recovery.accuracy is not None:
            tests = [(epoch, accuracy)]
            self.recovery.epochs = recovery(
                self.recovery.accuracy, self.ticket_epoch, after_draw, tests
            )

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Restore the figures of a saved run.

        Args:
            saved: what ``as_dict`` returned.
        """
        for name in (
            "checks",
            "elbow_epoch",
            "ticket_epoch",
            "live_fraction",
            "removed_fraction",
            "failed_writes",
        ):
            setattr(self, name, saved[name])
        self.accuracy = Accuracy(**saved["accuracy"])
        self.recovery = Recovery(**saved["recovery"])
        self.parameters = Count(**saved["parameters"])
        self.flops = Flops(**saved["flops"])
        self.traffic = TrafficResult(**saved["traffic"])
        self.seconds = Seconds(**saved["seconds"])

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)
