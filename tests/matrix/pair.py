"""Pair: a network trained with an engine and its reference, side by side on the same data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import worm_dist
from tests.matrix.combination import Combination, Dropped
from tests.matrix.frozen import FIRST_MOMENTS, Frozen
from tests.matrix.reference import Reference
from tests.matrix.trainee import Trainee, images_like
from tests.oracles import mask_dropping, scaling_members
from tests.tables.findings import Findings
from worm_dist import WormConfig
from worm_dist.groups.channel_groups import Groups

__all__ = ["Norm", "Pair"]

Norm = nn.modules.batchnorm._BatchNorm


class Pair:
    """After every step both are compared.

    Attributes:
        where: for the findings: which run, which step.
    """

    def __init__(
        self,
        combination: Combination,
        truncation: Mapping[str, Any],
        findings: Findings,
        which: str,
    ) -> None:
        self.combination = combination
        self.findings = findings
        self.trainee = Trainee(combination)
        # Truncation begins where the script says, not where the masks settle.
        search = {"window": 50, "elbow": {"min_masks": 50}, **combination.search}
        config = WormConfig(search=search, truncation=truncation)
        self.engine = engine = worm_dist.attach(
            self.trainee.model,
            self.trainee.optimizer,
            config,
            example_inputs=images_like(self.trainee.network, 1),
            steps_per_epoch=1,
        )
        self.trainee.penalty = lambda detour: engine.penalty()
        self.reference = Reference(combination, engine.groups, config)
        self._frozen = Frozen(self.trainee, engine.groups, config.truncation)
        self.step = 0
        self._num_shakes = 0
        self._which = which
        self._off = config.truncation.mode == "off"
        self._moves_on = config.truncation.frozen_weights == "free"

    @property
    def where(self) -> str:
        return f"{self._which}step {self.step}"

    def freeze(self, dropped: Dropped) -> None:
        """A check, and where the script says so a mask from elsewhere."""
        engine, reference = self.engine, self.reference
        if dropped is None:
            self._num_shakes += 1
            for network in (self.trainee.network, reference.network):
                _shake(network, engine.groups, self._frozen.flags, self._num_shakes)
        if not (engine.phase == "truncate" and engine.config.truncation.removes):
            engine.check()
        assert engine.mask is not None
        self.findings.masks.append(engine.mask.digest)
        if dropped is not None:
            here = [channel for channel in dropped if channel < engine.groups.num_channels]
            engine.truncate(mask_dropping(engine.groups, *here))
        elif engine.phase != "truncate":
            engine.truncate(engine.mask)
        reference.frozen.freeze(engine.mask)
        self._frozen.freeze(engine.mask)

    def train(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.trainee.backward(self.step)
            self.reference.backward(self.step)
            self._same("gradients", self.trainee.gradients, self.reference.gradients)
            num_steps_before = self.trainee.num_steps
            self.trainee.finish()
            self.reference.finish()
            stepped = self.trainee.num_steps > num_steps_before
            self.findings.weights.append(self.trainee.digest)
            self._same("weights", self._live(self.trainee), self._live(self.reference))
            self._same("state", self.trainee.state, self.reference.state if stepped else None)
            if not self._off:
                self._look_at_frozen(stepped)
                self._look_at_schedule()
                if stepped and self.combination.why_not("bytes") is None:
                    self._look_at_bytes()
            self.step += 1

    # ---- one invariant each ----------------------------------------------------------------------

    def _same(
        self, what: str, actual: dict[str, Tensor], expected: dict[str, Tensor] | None
    ) -> None:
        if expected is not None:
            column = "off" if self._off else "live"
            where = f"{self.where}, {what}"
            tolerance = 0.0 if self._off else self.combination.tolerance
            self.findings.all_same(column, actual, expected, where, tolerance)

    def _look_at_frozen(self, stepped: bool) -> None:
        """Held slices, faded ones, and what a channel that thaws now would find."""
        if self._moves_on:
            return
        trainee, frozen, same = self.trainee, self._frozen, self.findings.same
        for name, values in frozen.values.items():
            still = ~values.isnan()
            parameter = trainee.network.get_parameter(name)
            same("held", parameter[still], values[still], f"{self.where}: {name}")
            for key, value in trainee.state_of(name).items() if stepped else ():
                rule = "zero" if key in FIRST_MOMENTS else "as before"
                what = f"{self.where}: {key} of {name} is not {rule}"
                same("state", value[still], frozen.moment(name, key)[still], what)

    def _look_at_bytes(self) -> None:
        sent, expected = self.engine.traffic.sent_bytes, self.reference.take_bytes()
        what = f"{self.where}: {sent} sent, not {expected}"
        self.findings.expect("bytes", sent == expected, what)

    def _look_at_schedule(self) -> None:
        mine, other = self.trainee.schedule, self.reference.schedule
        if mine is not None and other is not None:
            equal = mine.rates == other.rates
            self.findings.expect("schedule", equal, f"{self.where}: {mine.rates}, {other.rates}")
            averages = mine.average.state_dict(), other.average.state_dict()
            self.findings.all_same("schedule", *averages, f"{self.where}: average")

    def _live(self, trainee: Trainee) -> dict[str, Tensor]:
        """Live slices of parameters, and all buffers; if frozen slices move on, these too."""
        flags = {} if self._moves_on else self._frozen.flags
        values = trainee.values
        return {name: v[flags[name]] if name in flags else v for name, v in values.items()}


@torch.no_grad()
def _shake(network: nn.Module, groups: Groups, flags: dict[str, Tensor], num_times: int) -> None:
    """Give what is live of the scales, or of the filters where there are none, sizes by chance that
    are smaller than all that have been held so far, so that the next check drops others."""
    generator = torch.Generator().manual_seed(num_times)
    for group in groups:
        for member in scaling_members(group):
            name, dim = member.parameters[0]
            for place in member.positions.flatten().tolist():
                chance = torch.empty(()).uniform_(0.2, 0.6, generator=generator)
                here = network.get_parameter(name).select(dim, place)
                smaller = (here / here.norm() * chance * 0.3**num_times).to(here.dtype)
                here.copy_(torch.where(flags[name].select(dim, place), smaller, here))
