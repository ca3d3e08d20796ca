"""Lines in plain words on the verdicts of a run: elbow, stages, ticket."""

from __future__ import annotations

from ...config import SearchConfig, TruncationConfig
from ...search.convergence import CheckRecord
from .outcome import compared
from .result import Result

__all__ = ["elbow_line", "stage_line", "ticket_line"]


def elbow_line(
    epoch: float, record: CheckRecord, search: SearchConfig, truncation: TruncationConfig
) -> str:
    """Say why truncation starts, elbow or latest start, and what happens then.

    Args:
        epoch: epochs trained.
        record: the check at which it starts.
        search, truncation: the settings.
    """
    mean, threshold = record.distance_mean, record.threshold
    what = "elbow" if record.elbow else "latest start (search.elbow.latest)"
    known = [f"rule {search.elbow.rule}"] if record.elbow else []
    if mean is not None:
        known.append(f"masks differ by {mean:.3f}")
        if threshold is not None:
            known.append(f"elbow below {threshold:.3g}")
    why = f" ({', '.join(known)})" if known else ""
    return f"{what} at epoch {epoch:g}{why}: truncation starts, {_effect(truncation)}"


def _effect(truncation: TruncationConfig) -> str:
    if truncation.mode == "soft":
        factor = "their distance" if truncation.ratio == "distance" else f"{truncation.ratio:g}"
        return f"gradients of the scales and shifts that the masks drop are multiplied by {factor}"
    leave = ", and the channels leave one after another" if truncation.removes else ""
    return f"dropped channels get no gradients any more{leave}"


def stage_line(epoch: float, num_parameters: int, dense: int | None) -> str:
    """Say how large the network is after a stage.

    Args:
        epoch: epochs trained.
        num_parameters: parameters that are left.
        dense: those of the dense network, if known.
    """
    return f"stage at epoch {epoch:g}: {compared(num_parameters, dense)} parameters are left so far"


def ticket_line(result: Result) -> str:
    """Say what the draw has left of the network, and of its accuracy.

    Args:
        result: the figures of the run, after the draw.
    """
    accuracy, parameters = result.accuracy, result.parameters
    return (
        f"ticket drawn at epoch {result.ticket_epoch:g}: {parameters.ticket:,} of "
        f"{parameters.dense:,} parameters, test accuracy "
        f"{accuracy.before_draw:.4f} -> {accuracy.after_draw:.4f}"
    )
