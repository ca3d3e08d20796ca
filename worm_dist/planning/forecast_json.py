"""Forecast as JSON values."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from ..search.rounding import ratio_reached
from .forecast import Estimate, Forecast, members_of
from .step_time import FORMULAS

__all__ = ["as_dict"]


def as_dict(forecast: Forecast) -> dict[str, Any]:
    """The complete forecast as JSON values."""
    target, estimate = forecast.target, forecast.estimate
    costs = forecast.costs.items()
    budget = target.worm.search.budget.chosen if forecast.ticket is None else None
    by_settings = forecast.ticket is None and forecast.weights is None
    return {
        "model": {
            "name": target.model,
            "arguments": dict(target.arguments),
            "sample_shape": list(target.sample_shape),
            "num_classes": target.num_classes,
        },
        "settings": target.worm.model_dump(mode="json"),
        "dropped": {
            "by": "settings" if by_settings else "scores" if forecast.weights else "ticket",
            "prune_ratio": None if forecast.ticket or budget else target.worm.search.prune_ratio,
            "ratio_reached": ratio_reached(forecast.mask),
            "budget": dict([budget]) if budget else None,
            "budget_reached": forecast.budget_reached,
            "ticket": None if forecast.ticket is None else str(forecast.ticket),
            "weights": None if forecast.weights is None else str(forecast.weights),
            "mask_digest": None if by_settings else forecast.mask.digest,
            "num_channels": forecast.mask.num_channels,
            "num_kept": forecast.mask.num_kept,
        },
        "groups": [
            {
                "name": group.name,
                "num_channels": group.num_channels,
                "num_kept": int(forecast.mask[group.name].sum()),
                "places_each": forecast.groups.widths[group.name],
                **members_of(group),
                "costs": {s: asdict(each.groups[group.name]) for s, each in costs},
            }
            for group in forecast.groups
        ],
        "others": {
            "modules": list(forecast.others),
            "costs": {stage: asdict(each.rest) for stage, each in costs},
        },
        "total": {stage: asdict(each.total) for stage, each in costs},
        "backend": {"name": target.wrapper.name, "world_size": forecast.world_size},
        "traffic": {
            stage: {
                "gradient_bytes": each.gradient_bytes,
                "weight_bytes": each.weight_bytes,
                "total_bytes": each.total_bytes,
            }
            for stage, each in forecast.traffic.items()
        },
        "memory": {
            stage: {**asdict(each.truncation), "inputs": each.inputs, "total": each.total}
            for stage, each in forecast.memory.items()
        },
        "training_memory": {
            stage: {**asdict(each), "total": each.total}
            for stage, each in forecast.training.items()
        },
        "dense": dict(forecast.groups.dense),
        "estimate": None if estimate is None else _estimate_as_dict(estimate),
        "remarks": list(forecast.remarks),
    }


def _estimate_as_dict(estimate: Estimate) -> dict[str, Any]:
    return {
        "world_size": estimate.link.world_size,
        "bandwidth_bits_per_second": estimate.link.bits_per_second,
        "latency_seconds": estimate.link.latency_seconds,
        "samples_per_rank": estimate.num_samples,
        "samples_measured": estimate.measured.num_samples,
        "device": estimate.measured.device,
        "rounds": estimate.measured.rounds,
        "formulas": dict(FORMULAS),
        "steps": {
            stage: {
                "compute_seconds": step.compute_seconds,
                "communication_seconds": step.communication_seconds,
                "expected_seconds": step.expected_seconds,
                "shortest_seconds": step.shortest_seconds,
                "longest_seconds": step.longest_seconds,
            }
            for stage, step in estimate.steps.items()
        },
    }
