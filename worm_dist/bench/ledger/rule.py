"""Rules: the settings under which the subjects are trained and pruned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ...config import WormConfig
from ...presets import merge
from .recipe import Recipe
from .row import Row
from .subject import Subject

__all__ = ["DENSE", "RULES", "Rule", "triggered_at"]


@dataclass(frozen=True)
class Rule:
    """Settings of a run.

    Attributes:
        name: name in rows and tables.
        preset: preset of the settings.
        changes: changes to the preset.
        hook: name of plain DDP's compression hook, one of ``HOOKS``; only without truncation.
    """

    name: str
    preset: str = "worm"
    changes: Mapping[str, Any] = field(default_factory=dict)
    hook: str | None = None

    @property
    def prunes(self) -> bool:
        """Whether the rule searches a ticket."""
        return self.preset != "dense"

    @property
    def is_gradual(self) -> bool:
        """Whether dropped channels are removed one after another."""
        truncation = self.config(0.5).truncation
        return truncation.removes and truncation.removal.schedule == "gradual"

    @property
    def has_budget(self) -> bool:
        """Whether a budget determines how many channels are dropped, and not a ratio."""
        return "budget" in self.changes.get("search", {})

    def config(self, prune_ratio: float) -> WormConfig:
        """The settings with a share of the channels to drop; 0 with a budget, and for dense."""
        ratio = {} if self.has_budget else {"search": {"prune_ratio": prune_ratio}}
        return WormConfig.preset(self.preset, **merge(ratio, self.changes))

    def changed(self, name: str, changes: Mapping[str, Any]) -> Rule:
        """A copy with another name and further changes."""
        return Rule(name, self.preset, merge(self.changes, changes), self.hook)

    def recipe(
        self, subject: Subject, prune_ratio: float, seed: int, parent: Row | None = None
    ) -> Recipe:
        """What to train: the dense network, under the settings."""
        torch.manual_seed(seed)
        return Recipe(subject.build(1.0), self.config(prune_ratio), hook=self.hook)


def triggered_at(epoch: float) -> dict[str, Any]:
    """Settings that start truncation after a number of epochs, whatever the masks are.

    The masks before are about an epoch apart; there are at least two, which the elbow needs.
    """
    num_masks = max(2, round(epoch))
    every = f"{epoch / num_masks:.6f}ep"
    elbow = {"min_masks": num_masks, "margin": 1.0, "latest": None}
    return {"search": {"every": every, "elbow": elbow}}


_AT_ONCE = {"truncation": {"removal": {"schedule": "one_shot"}}}

DENSE = Rule("dense", "dense")
RULES: Mapping[str, Rule] = {
    rule.name: rule
    for rule in (
        DENSE,
        Rule("early-bird", "early-bird"),
        Rule(
            "early-bird, elbow",
            "early-bird",
            # Draws at the elbow; until then nothing is truncated.
            merge(
                {"truncation": {"mode": "hard", "scope": "producer", "frozen_weights": "remove"}},
                _AT_ONCE,
            ),
        ),
        Rule("worm-paper", "worm-paper"),
        Rule("worm"),
        Rule("worm, at once", changes=_AT_ONCE),
    )
}
"""``early-bird`` draws when the masks have settled, ``early-bird, elbow`` at the elbow.  ``worm, at
once`` removes all dropped channels at the elbow, ``worm`` one after another from there on: with one
seed both are the same run until then."""
