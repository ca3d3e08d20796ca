"""Rules: the settings under which the subjects are trained and pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ...config import WormConfig, merge

__all__ = ["RULES", "Rule", "triggered_at"]


@dataclass(frozen=True)
class Rule:
    """Settings of a run.

    Attributes:
        name: name in rows and tables.
        preset: preset of the settings.
        changes: changes to the preset.
        width: width of the network relative to the dense one; other than 1 it is a thinner network,
            trained from scratch.
    """

    name: str
    preset: str = "worm"
    changes: Mapping[str, Any] = field(default_factory=dict)
    width: float = 1.0

    def config(self, prune_ratio: float) -> WormConfig:
        changes = merge({"search": {"prune_ratio": prune_ratio}}, self.changes)
        return WormConfig.preset(self.preset, **changes)

    def changed(self, name: str, changes: Mapping[str, Any]) -> Rule:
        """A copy with another name and further changes."""
        return Rule(name, self.preset, merge(self.changes, changes), self.width)


def triggered_at(epoch: float) -> dict[str, Any]:
    """Settings that start truncation after a number of epochs, whatever the masks are."""
    every = 0.5 if epoch < 2 else 1.0
    elbow = {"min_masks": round(epoch / every), "margin": 1.0}
    return {"search": {"every": f"{every:g}ep", "elbow": elbow}}


RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("dense", "dense"),
        Rule("uniform half", "dense", width=0.5),
        Rule("uniform .36", "dense", width=0.36),
        Rule("worm", changes=triggered_at(3)),
        Rule(
            "one shot",
            changes=merge(triggered_at(3), {"truncation": {"removal": {"schedule": "one_shot"}}}),
        ),
        Rule("worm, elbow"),
    )
}
"""``worm`` and ``one shot`` start truncation at the same epoch; ``worm, elbow`` at the elbow."""
