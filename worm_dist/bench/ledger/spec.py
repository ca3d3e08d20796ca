"""Specifications of runs, and all those that a ledger compares."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ...budget_argument import parse_budget
from ...errors import ConfigError
from .control import EQUAL_FLOPS, Control
from .row import Key
from .rule import DENSE, RULES, Rule, triggered_at
from .subject import SUBJECTS

__all__ = ["RunSpec", "Selection"]

_Option = tuple[str, dict[str, Any]]
"""Suffix of a rule's name, and changes to its settings."""


@dataclass(frozen=True)
class RunSpec:
    """Specification of a run; ``ranks`` is the number of ranks that share each batch."""

    subject: str
    rule: Rule | Control
    prune_ratio: float
    seed: int
    epochs: int
    ranks: int = 1

    @property
    def key(self) -> Key:
        return self._key(self.rule)

    @property
    def parent(self) -> Key | None:
        """The run that has to be complete before this one can begin."""
        return self._key(self.rule.of) if isinstance(self.rule, Control) else None

    def _key(self, rule: Rule | Control) -> Key:
        return Key(self.subject, rule.name, self.prune_ratio, self.seed, self.epochs, self.ranks)


@dataclass(frozen=True)
class Selection:
    """What a ledger compares.

    Attributes:
        subjects, ratios, seeds: all combinations of these.
        rules: names of rules.
        controls: kinds of controls; those at equal FLOPs for every rule that prunes.
        of: names of the rules that have the other controls too; with the suffix of a variant.
        triggers: percentages of the schedule at which the ``worm`` rules start to remove channels;
            empty for their elbow.
        durations: percentages of the schedule that gradual removal takes; empty for the preset's.
        importances, thresholds: values of these settings of the ``worm`` rules; empty for the
            preset's.
        budgets: budgets of the ``worm`` rules, such as ``flops=0.25``, instead of the ratios; empty
            for the ratios.
        epochs: number of epochs; None for the subject's.

    Raises:
        ConfigError: there is no subject, a number is out of range, or a setting of a variant does
            not exist or contradicts a ratio.
    """

    subjects: Sequence[str]
    rules: Sequence[str]
    ratios: Sequence[float]
    seeds: Sequence[int]
    controls: Sequence[str]
    of: Sequence[str]
    triggers: Sequence[float] = ()
    durations: Sequence[float] = ()
    importances: Sequence[str] = ()
    thresholds: Sequence[str] = ()
    budgets: Sequence[str] = ()
    epochs: int | None = None

    def __post_init__(self) -> None:
        if not self.subjects:
            raise ConfigError("bench: no subject is left; --quick takes those on the digits only")
        if self.epochs is not None and self.epochs < 1:
            raise ConfigError(f"bench: --epochs {self.epochs}; give at least 1")
        shares = (
            ("ratio", self.ratios, 1),
            ("trigger", self.triggers, 100),
            ("duration", self.durations, 100),
        )
        for name, values, most in shares:
            for value in values:
                if not 0 < value < most:
                    raise ConfigError(
                        f"bench: --{name} {value:g}; give more than 0 and less than {most}"
                    )
        for rule, ratio in self._with_ratios(self._pruning_rules):
            rule.config(ratio)

    @property
    def pruning_rules(self) -> list[str]:
        """Names of the rules that prune, with their variants."""
        return [rule.name for rule in self._pruning_rules]

    @property
    def _pruning_rules(self) -> list[Rule]:
        """With the epochs of the first subject."""
        epochs = self.epochs or SUBJECTS[self.subjects[0]].epochs
        return [rule for rule in self._rules(epochs) if rule.prunes]

    def specs(self) -> Iterator[RunSpec]:
        """The specifications, each after the one that it depends on, the first seed first."""
        for subject, seed in product(self.subjects, self.seeds):
            epochs = self.epochs or SUBJECTS[subject].epochs
            rules = self._rules(epochs)
            if DENSE in rules:
                yield RunSpec(subject, DENSE, 0.0, seed, epochs)
            pruning = list(self._with_ratios(rule for rule in rules if rule.prunes))
            for rule, ratio in pruning:
                yield RunSpec(subject, rule, ratio, seed, epochs)
            for (rule, ratio), kind in product(pruning, self.controls):
                if kind == EQUAL_FLOPS or rule.name in self.of:
                    yield RunSpec(subject, Control(kind, rule), ratio, seed, epochs)

    def _with_ratios(self, rules: Iterable[Rule]) -> Iterator[tuple[Rule, float]]:
        """The rules with every ratio, and last those with a budget."""
        rules = list(rules)
        for ratio, rule in product(self.ratios, rules):
            if not rule.has_budget:
                yield rule, ratio
        for rule in rules:
            if rule.has_budget:
                yield rule, 0.0

    def _rules(self, epochs: int) -> list[Rule]:
        return [variant for name in self.rules for variant in self._variants(RULES[name], epochs)]

    def _variants(self, rule: Rule, epochs: int) -> Iterator[Rule]:
        if rule.preset != "worm":
            yield rule
            return
        for variant in product(
            _options(self.triggers, lambda percent: _triggered(percent, epochs)),
            _options(
                self.durations if rule.is_gradual else (), lambda percent: _lasting(percent, epochs)
            ),
            _options(self.importances, lambda name: _searched(name, importance=name)),
            _options(self.thresholds, lambda name: _searched(f"{name} threshold", threshold=name)),
            _options(self.budgets, lambda text: _searched(text, budget=parse_budget(text))),
        ):
            changed = rule
            for suffix, changes in variant:
                name = f"{changed.name}, {suffix}" if suffix else changed.name
                changed = changed.changed(name, changes)
            yield changed


def _options(values: Sequence[Any], described: Any) -> list[_Option]:
    return [described(value) for value in values] or [("", {})]


def _triggered(percent: float, epochs: int) -> _Option:
    return f"trigger {percent:g} %", triggered_at(epochs * percent / 100)


def _lasting(percent: float, epochs: int) -> _Option:
    removal = {"duration": f"{epochs * percent / 100:.6f}ep"}
    return f"duration {percent:g} %", {"truncation": {"removal": removal}}


def _searched(suffix: str, **changes: Any) -> _Option:
    return suffix, {"search": changes}
