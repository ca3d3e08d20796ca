"""Attachment: the training that an engine is attached to: wrapped network, optimizer, traffic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .cluster.stepping import Owners, Stepping
from .cluster.wrap import DataParallel, Wrapping, wrapping_of
from .config import WormConfig
from .errors import ConfigError
from .gates import fold_gates, gates_of
from .interval import Interval
from .observer import Observer, Traffic
from .optimizer_state import OptimizerState
from .search.groups import Groups
from .ticket.carry import Cargo
from .ticket.collapse import Liveness
from .ticket.statistics import Call, recalibrate
from .ticket.surgery import Cut, remove_channels
from .ticket.transplant import forget, transplant
from .truncation.reduction import Reduction

__all__ = ["Attachment", "require_countable"]


def require_countable(config: WormConfig) -> None:
    """Without being told, an epoch's length can only be counted between checks that are epochs
    apart.

    Raises:
        ConfigError: it is needed and cannot be counted.
    """
    truncation, every = config.truncation, config.search.every
    gradual = truncation.removes and truncation.removal.schedule == "gradual"
    duration = truncation.removal.duration
    in_epochs = not isinstance(duration, Interval) or duration.unit == "ep"
    if gradual and in_epochs and every.unit == "ba":
        raise ConfigError(
            "attach: truncation.removal.duration is in epochs, but search.every is not; give "
            "steps_per_epoch"
        )


class Attachment:
    """What is trained, how it is wrapped, and what is heard of it.

    Args:
        model: wrapped, or bare on a single process.
        optimizer: of its parameters; a DeepSpeed engine has its own.
        check_every: how often the engine checks.
        steps_per_epoch: None if it has to be counted between checks.

    Attributes:
        model: wrapped; another one after ``shrink`` and ``wrap_again``.
        network: not wrapped; always the same object.
        ranks: the processes that train together.
        stepping: what the optimizer steps.
        reduction: how gradients are sent, where it is not left to the wrapper.
        traffic: bytes of the last step, and of all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        check_every: Interval,
        steps_per_epoch: int | None,
    ) -> None:
        self.model = model
        self.wrapping: Wrapping = wrapping_of(model)
        self.network = self.wrapping.network
        self.ranks = self.wrapping.ranks
        self.stepping: Stepping = self.wrapping.stepping_of(optimizer)
        self.reduction: Reduction | None = None
        self.traffic = Traffic()
        self._check_every = check_every
        self._steps_per_epoch = steps_per_epoch
        self._is_told = steps_per_epoch is not None
        self._last_check = 0
        self._wrapped_at = 0
        self._went_on = False
        self._recalibrates = True
        self._step_bytes = self.wrapping.step_bytes
        self._dense_bytes = self._step_bytes

    def listen(
        self,
        num_calls: int,
        before_step: Callable[[], None],
        hold: Callable[[int, Owners], None],
        after_step: Callable[[int], None],
    ) -> None:
        """Hear of every step from now on, and remember the newest ``num_calls`` inputs."""

        def stepped(step: int) -> None:
            after_step(step)
            if self.reduction is None:
                self.traffic.add_step(self._step_bytes, self._dense_bytes)
            else:
                sent_bytes, whole_bytes = self.reduction.take_bytes()
                dense_bytes = whole_bytes * self._dense_bytes // max(1, self._step_bytes)
                self.traffic.add_step(sent_bytes, dense_bytes)

        # Inputs are seen outside of what torch.compile compiles.
        called = self.wrapping.called
        self._observer = Observer(called, self.stepping, num_calls, before_step, hold, stepped)

    @property
    def optimizer(self) -> Optimizer:
        """What the user steps; under DeepSpeed its wrapper of the torch optimizer."""
        return self.wrapping.optimizer_of(self.stepping)

    @property
    def step(self) -> int:
        """Optimizer steps since the engine was attached."""
        return self._observer.step

    def num_steps(self, interval: Interval) -> int:
        """An interval in optimizer steps.

        Raises:
            ConfigError: the length of an epoch is not known.
        """
        if interval.unit == "ep" and self._steps_per_epoch is None:
            raise ConfigError(
                f"how many steps {interval} is, is not known; give attach(steps_per_epoch=...)"
            )
        return interval.steps(self._steps_per_epoch or 1)

    @property
    def check_is_due(self) -> bool:
        """Whether it is time for the next check.  Before the first step, and where the length of an
        epoch is needed and nobody said it, it is whenever it is asked for."""
        if not self.step or (self._check_every.unit == "ep" and not self._is_told):
            return True
        return self.step - self._last_check >= self.num_steps(self._check_every)

    def begin_check(self) -> None:
        """Where nobody said how long an epoch is, the first steps between two checks do."""
        since_last_check = self.step - self._last_check
        self._last_check = self.step
        if self._steps_per_epoch is None and self._check_every.unit == "ep" and since_last_check:
            self._steps_per_epoch = max(1, round(since_last_check / self._check_every.count))

    def state_dict(self) -> dict[str, Any]:
        """Steps and bytes so far, in plain values."""
        return {
            "step": self.step,
            "last_check": self._last_check,
            "steps_per_epoch": self._steps_per_epoch,
            "buckets_arranged": self._went_on or self.step > self._wrapped_at,
            "traffic": asdict(self.traffic),
        }

    def load_state_dict(self, state: Mapping[str, Any], calls: Sequence[Call]) -> None:
        """Go on from a state, with these newest inputs."""
        self._observer.go_on_from(state["step"], calls)
        self._last_check = state["last_check"]
        self._steps_per_epoch = state["steps_per_epoch"]
        self.traffic = Traffic(**state["traffic"])

    def take_over_buckets(self, state: Mapping[str, Any]) -> None:
        """The wrapper takes the place of the one that a state of the training is from."""
        self._wrapped_at, self._went_on = self.step, state["buckets_arranged"]

    def rehearse(self, one_pass: Callable[[], Tensor]) -> None:
        """One pass that leaves nothing but the arrangement of DDP's buckets, if that matters."""
        if not (self._went_on and isinstance(self.wrapping, DataParallel)):
            return
        calls = list(self.calls)
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        device = next(self.network.parameters()).device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            nullcontext() if self.reduction is None else self.reduction.at_rest(),
        ):
            one_pass().backward()
        self.network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self._observer.go_on_from(self.step, calls)

    @property
    def optimizer_state(self) -> OptimizerState:
        """Of the optimizer as it is now."""
        return OptimizerState(self.stepping, self.network, self.model, self.ranks)

    def write_optimizer_state(self, state: Mapping[str, Any]) -> None:
        self.optimizer_state.write(state)
        self._observer.listen(self.stepping)  # and DeepSpeed is told where moments are

    @property
    def calls(self) -> Sequence[Call]:
        """The newest inputs, oldest first."""
        return self._observer.calls

    @property
    def num_elements(self) -> int:
        """Of all parameters that train."""
        return sum(p.numel() for p in self.network.parameters() if p.requires_grad)

    @property
    def names(self) -> dict[Tensor, str]:
        """Of the parameters."""
        return {parameter: name for name, parameter in self.network.named_parameters()}

    def require_optimized(self, groups: Groups) -> None:
        """The optimizer must step every group: only what it steps can be held and transplanted.

        Raises:
            ConfigError: it does not; a second optimizer may.
        """
        stepped = self.stepping.parameters
        parameters = dict(self.network.named_parameters())
        for name in (name for g in groups for m in g.members for name, _ in m.parameters):
            if parameters[name].requires_grad and parameters[name] not in stepped:
                raise ConfigError(
                    f"attach: the optimizer does not have {name}, which trains; give one optimizer "
                    "all parameters, or set requires_grad to False where nothing shall train"
                )

    def require_alike(self, copies: Sequence[nn.Module]) -> None:
        """Copies must have the network's parameters, by names and shapes.

        Raises:
            ConfigError: one has not.
        """
        shapes = {name: p.shape for name, p in self.network.named_parameters()}
        for number, copy in enumerate(copies):
            theirs = {name: p.shape for name, p in copy.named_parameters()}
            if theirs != shapes:
                odd = next(name for name, _ in sorted(theirs.items() ^ shapes.items()))
                raise ConfigError(
                    f"draw: copies[{number}] is not a copy of the network: parameter {odd} differs"
                )

    def shrink(self, cuts: Sequence[Cut], copies: Sequence[nn.Module], is_complete: bool) -> None:
        """Remove channels; optimizer, statistics, copies and wrapper follow.  Collective.

        Args:
            cuts: of the network as it is now.
            copies: that are cut alike.
            is_complete: nothing more will be removed: gates are folded, and inputs forgotten.
        """
        before = dict(self.network.named_parameters())
        self.optimizer.zero_grad(set_to_none=True)
        self.network.zero_grad(set_to_none=True)  # also what the optimizer does not know
        cargo = Cargo(self.stepping, before, cuts, self.ranks) if self.stepping.copies else None
        self.wrapping.release()
        remove_channels(self.network, cuts)
        after = dict(self.network.named_parameters())
        if cargo is None:
            transplant(self.stepping.optimizer, before, after, cuts)
        for copy in copies:
            remove_channels(copy, cuts)
        if is_complete:
            self._fold_gates(cargo, copies)
            after = dict(self.network.named_parameters())
        if cargo is not None:
            cargo.replace_parameters(after)
        self.recalibrate(copies)
        if is_complete:
            self.forget_inputs()
        self.wrap_again()
        if cargo is not None:
            cargo.unload(self.stepping, after)
        self._observer.listen(self.stepping)

    def _fold_gates(self, cargo: Cargo | None, copies: Sequence[nn.Module]) -> None:
        if cargo is None:
            forget(self.stepping.optimizer, {gate.scale for _, gate in gates_of(self.network)})
        else:
            cargo.fold_gates(self.network)
        for network in (self.network, *copies):
            fold_gates(network)

    def recalibrate(self, copies: Sequence[nn.Module] = ()) -> None:
        """Estimate BatchNorm statistics anew from the newest inputs, if any are remembered.
        Collective."""
        if self._observer.calls and self._recalibrates:
            for network in (self.network, *copies):
                recalibrate(network, self._observer.calls, self.ranks)

    def recalibrate_alive(self, groups: Groups, told: set[str]) -> None:
        """The same, of a network that must answer.  Collective.

        Args:
            groups: of the network as it is now.
            told: groups that have been warned of; those that are now are added.

        Raises:
            CollapseError: on every rank, if the network puts out the same whatever it is given.
        """
        if self._observer.calls:
            with Liveness(self.network, groups) as liveness:
                recalibrate(self.network, self._observer.calls, self.ranks, liveness.look)
            liveness.require(self.ranks, f"check at step {self.step}", told)

    @contextmanager
    def without_recalibration(self) -> Iterator[None]:
        """Statistics stay as they are, also in a smaller network."""
        self._recalibrates = False
        try:
            yield
        finally:
            self._recalibrates = True

    def forget_inputs(self) -> None:
        """Remember no inputs from now on."""
        self._observer.forget_inputs()

    def wrap_again(self) -> None:
        """Put the network into a new wrapper with the old one's arguments and no hooks."""
        self.model = self.wrapping.wrapped_again()
        self.wrapping = wrapping_of(self.model)
        self.stepping = self.wrapping.stepping_of(self.stepping.optimizer)
        self.reduction = None
        self._wrapped_at, self._went_on = self.step, False
        self._step_bytes = self.wrapping.step_bytes

    def remove(self) -> None:
        """Hear nothing of the training, and leave its gradients alone, from now on."""
        self._observer.remove()
        if self.reduction is not None:
            self.reduction.remove()  # after a draw it is another than truncation's
