"""Presets: named settings of the engine, as what differs from the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["PRESETS", "merge"]

_PUBLISHED: Mapping[str, Mapping[str, Any]] = {
    "search": {
        "elbow": {"min_masks": "window", "latest": None},
        "threshold": "global",
        "grouping": "layer",
        "selection": "above",
        "min_keep_ratio": 0.0,
        "first": "before_training",
        "l1_until": "end",
    },
    "ticket": {"round_to": 1, "recalibrate_batches": 0},
}
"""What both papers have in common, so that presets of theirs differ in truncation and L1 alone."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "worm": {},
    "worm-paper": {
        "search": {**_PUBLISHED["search"], "l1": 0.0},
        "truncation": {"mode": "soft", "ratio": 0.003},
        "ticket": _PUBLISHED["ticket"],
    },
    "early-bird": {**_PUBLISHED, "truncation": {"mode": "off"}},
    "dense": {"search": {"enabled": False}, "truncation": {"mode": "off"}},
}
"""By name of each preset, the settings that differ from the defaults.

``worm``: hard truncation and gradual removal.  ``worm-paper``: the published rule (PMLR
262:232-240), soft truncation of each norm's scales by its own mask, once the window is full.
``early-bird``: the published rule (arXiv 1909.11957), search without truncation.  ``dense``: no
search at all.
"""


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` updated recursively with ``changes``, as a new dict."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = merge(old, value)
        merged[key] = value
    return merged
