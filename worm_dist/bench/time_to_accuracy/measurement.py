"""Measurement of step times: short runs through all phases, taking steps in turn."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from ...groups.mask import Mask
from ..ledger.control import Control
from ..ledger.loop import Loop
from ..ledger.row import Row
from ..ledger.rule import Rule
from ..ledger.spec import RunSpec
from ..ledger.subject import SUBJECTS
from ..network import Link, over_ranks
from .step_times import StepTimes

__all__ = ["measure_steps"]

_REMOVAL_STEPS = 96
"""Steps of a gradual removal; its stages are those of a run."""
_IN_A_ROW = 5
"""Steps of one run before those of the next, so that the processor's caches hold its network."""
_WARM_UP = 4
_SETTLING = 2
"""Steps after a change of the network that are not typical: DDP rebuilds its buckets in the first,
PowerSGD averages both exactly."""
_SHORT = {"truncation": {"removal": {"duration": f"{_REMOVAL_STEPS}ba", "pause_above": 1e6}}}
_UNENDING = 1_000_000
"""Steps of the learning rate's schedule, so that it stays as it is."""

Pair = tuple[RunSpec, Row]


def measure_steps(
    pairs: Sequence[Pair], parents: Sequence[Row | None], num_steps: int
) -> list[StepTimes]:
    """Measure the parts of runs, a few steps of each run after those of the one before, so that a
    busy machine slows all alike.  Collective.

    Args:
        pairs: specifications of runs, and their rows, which have the widths of the tickets.
        parents: the row that each specification depends on, if any.
        num_steps: steps of a phase whose network stays the same.
    """
    courses = [_Course(spec, row, parent, num_steps) for (spec, row), parent in zip(pairs, parents)]
    endings = [each for each in courses if each.ends]
    rounds = [iter(each.steps()) for each in courses]
    num_rounds = 0
    while num_rounds < _WARM_UP + num_steps or not all(each.is_over for each in endings):
        num_rounds += _IN_A_ROW
        for steps in rounds:
            for _ in range(_IN_A_ROW):
                next(steps, None)
    return [each.times() for each in courses]


class _Course:
    def __init__(self, spec: RunSpec, row: Row, parent: Row | None, num_steps: int) -> None:
        subject = SUBJECTS[spec.subject]
        rule = spec.rule
        if isinstance(rule, Rule) and rule.prunes and rule.is_gradual:
            rule = rule.changed(rule.name, _SHORT)
        recipe = rule.recipe(subject, spec.prune_ratio, spec.seed, parent)
        self._spec = spec
        self._widths = None if isinstance(rule, Control) else row.widths
        self._is_gradual = isinstance(rule, Rule) and rule.prunes and rule.is_gradual
        self._batch_size = subject.batch_size
        self._num_samples = len(subject.samples().images)
        self._loop = Loop(subject, recipe, _WARM_UP + num_steps, _UNENDING)
        self._num_steps = num_steps
        self._link = Link()
        self._seconds: dict[str, list[float]] = {}
        self._bytes: dict[str, list[float]] = {}
        self.is_over = False

    @property
    def ends(self) -> bool:
        """Whether this course has an end; others go on with the same step."""
        return self._widths is not None

    def steps(self) -> Iterator[None]:
        """Take one step after the other, through all phases."""
        loop, engine = self._loop, self._loop.engine
        yield from self._several(_WARM_UP, "warm-up ")
        if not self.ends:
            while True:
                yield from self._several(1)
        yield from self._several(self._num_steps)
        loop.check()
        mask = self._mask()
        if self._is_gradual:
            with loop.clock.running("start"):
                engine.truncate(mask)
            yield from self._several(_SETTLING, "settling ")
            while engine.phase != "ticket":
                yield from self._several(1)
                verdict = loop.check()
                if verdict.stage or verdict.ticket:
                    loop.draw(None)
                    yield from self._several(_SETTLING, "settling ")
        else:
            loop.draw(mask)
            yield from self._several(_SETTLING, "settling ")
        yield from self._several(self._num_steps)
        self.is_over = True

    def _several(self, number: int, prefix: str = "") -> Iterator[None]:
        for _ in range(number):
            batch = torch.randint(self._num_samples, (self._batch_size,))
            phase = self._loop.engine.phase.value
            dist.barrier()
            before = self._link.sent_bytes()
            self._loop.step(batch)
            sent = self._link.sent_bytes() - before
            self._seconds.setdefault(prefix + phase, []).append(self._loop.clock.seconds[phase][-1])
            self._bytes.setdefault(prefix + phase, []).append(sent)
            yield

    def _mask(self) -> Mask:
        """A mask with the widths of the ticket; which channels they are does not matter here."""
        assert self._widths is not None
        return Mask(
            {
                group.name: torch.arange(group.num_channels) < self._widths[group.name]
                for group in self._loop.engine.groups
            }
        )

    def times(self) -> StepTimes:
        """The times of the slower rank.  Collective."""
        clock = self._loop.clock.seconds
        seconds = {kind: _slower(values) for kind, values in self._seconds.items()}
        extra = {
            kind: _slower(values)
            for kind, values in clock.items()
            if kind in ("start", "draw") or kind.startswith("check in ")
        }
        phases = [kind for kind in seconds if " " not in kind]
        means = {phase: statistics.mean(seconds[phase]) for phase in phases}
        settling = sum(
            sum(values) - len(values) * means[kind.removeprefix("settling ")]
            for kind, values in seconds.items()
            if kind.startswith("settling ")
        )
        search_checks = extra.get("check in search", [0.0])
        removal = sum(sum(extra.get(kind, [])) for kind in ("start", "draw", "check in truncate"))
        spec, is_loopback = self._spec, self._link.is_loopback
        return StepTimes(
            subject=spec.subject,
            rule=spec.rule.name,
            prune_ratio=spec.prune_ratio,
            ranks=dist.get_world_size(),
            network=self._link.network,
            steps={phase: _tenth_percentile(seconds[phase]) for phase in phases},
            mean_steps=means,
            num_steps={phase: len(seconds[phase]) for phase in phases},
            wire_bytes={}
            if is_loopback
            else {phase: statistics.median(self._bytes[phase]) for phase in phases},
            check_seconds=statistics.median(search_checks),
            removal_seconds=max(0.0, removal + settling),
        )


def _slower(values: Sequence[float]) -> list[float]:
    (slower,) = over_ranks([list(values)], dist.ReduceOp.MAX)
    return slower


def _tenth_percentile(values: Sequence[float]) -> float:
    return statistics.quantiles(values, n=10, method="inclusive")[0]
