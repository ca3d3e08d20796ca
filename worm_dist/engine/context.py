"""Attachment: the training that an engine is attached to: wrapped network, optimizer, traffic."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..backends.ddp import Backend, DdpBackend, OwnHookState, backend_of
from ..backends.optimizer_state import OptimizerState
from ..backends.optimizer_view import OptimizerView, Owners
from ..comm_hooks.reducer import Reducer
from ..config import WormConfig
from ..errors import ConfigError
from ..groups.channel_groups import Groups
from ..interval import Interval
from ..pruning.bn_recalibration import recalibrate
from ..pruning.collapse import Liveness
from .recorded_inputs import RecordedCall, RecordedInputs
from .step_hooks import StepHooks, Traffic

__all__ = ["TrainingContext", "WrappedNetwork", "require_countable"]


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


class WrappedNetwork(NamedTuple):
    """A network in its wrapper, and how that is stepped."""

    model: nn.Module
    wrapping: Backend
    stepping: OptimizerView


class TrainingContext:
    """What is trained, how it is wrapped, and what is heard of it.

    Args:
        model: wrapped, or bare on a single process.
        optimizer: of its parameters; a DeepSpeed engine has its own.
        example_inputs: as for ``attach``.
        check_every: how often the engine checks.
        steps_per_epoch: None if it has to be counted between checks.

    Attributes:
        model: wrapped; another one after ``go_on_in`` and ``go_back``.
        example_inputs: the network can be run on them.
        network: not wrapped; always the same object.
        ranks: the processes that train together.
        trained: parameters of the network that train at some time.
        stepping: what the optimizer steps.
        reduction: how gradients are sent, where it is not left to the wrapper.
        traffic: bytes of the last step, and of all.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        example_inputs: Any,
        check_every: Interval,
        steps_per_epoch: int | None,
    ) -> None:
        self.model = model
        self.wrapping: Backend = backend_of(model)
        self.network = self.wrapping.network
        self.ranks = self.wrapping.ranks
        self.stepping: OptimizerView = self.wrapping.stepping_of(optimizer)
        # The user may step a wrapper of the optimizer that hooks are registered on.
        own = self.wrapping.optimizer_of(self.stepping) is not self.stepping.optimizer
        self._given = None if own else optimizer
        self.trained = self.wrapping.averaged
        self.example_inputs = example_inputs
        self.reduction: Reducer | None = None
        self.traffic = Traffic()
        self._check_every = check_every
        self._steps_per_epoch = steps_per_epoch
        self._is_told = steps_per_epoch is not None
        self._last_check = 0
        self._wrapped_at = 0
        self._went_on = False
        self._step_bytes = self.wrapping.step_bytes
        self._dense_bytes = self._step_bytes
        self._passes: RemovableHandle | None = None

    def listen(
        self,
        remembered: RecordedInputs,
        before_pass: Callable[[], None],
        before_step: Callable[[], None],
        hold: Callable[[int, Owners], None],
        after_step: Callable[[int], None],
    ) -> None:
        """Hear of every pass and step from now on, and remember the newest inputs.

        Args:
            before_pass: called before a forward pass of the wrapper that is to be learnt from.
        """

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
        self._observer = StepHooks(called, self.stepping, remembered, before_step, hold, stepped)
        self.recalibrates = remembered.is_on

        def passes(model: nn.Module, args: Any) -> None:
            if model.training and torch.is_grad_enabled():
                before_pass()

        self._before_pass = passes
        if self.wrapping.process_group is not None:
            self._passes = self.model.register_forward_pre_hook(passes)

    def _follow_passes(self) -> None:
        """Hear of those of another wrapper."""
        if self._passes is not None:
            self._passes.remove()
            self._passes = self.model.register_forward_pre_hook(self._before_pass)

    @property
    def optimizer(self) -> Optimizer:
        """What the user steps; under DeepSpeed its wrapper of the torch optimizer."""
        return self._given or self.wrapping.optimizer_of(self.stepping)

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

    @property
    def check_has_just_become_due(self) -> bool:
        """Whether the last step has made the next check due, as far as that is known."""
        if self._check_every.unit == "ep" and self._steps_per_epoch is None:
            return False
        return bool(self.step) and self.since_last_check == self.num_steps(self._check_every)

    @property
    def since_last_check(self) -> int:
        """Optimizer steps."""
        return self.step - self._last_check

    def begin_check(self) -> None:
        """Where nobody said how long an epoch is, the first steps between two checks do.

        Raises:
            ConfigError: that would be one step.
        """
        since_last_check = self.since_last_check
        if not self._is_told and self._check_every.unit == "ep" and since_last_check == 1:
            raise ConfigError(
                f"check: one step after the last one, and search.every is {self._check_every}. How "
                "many steps an epoch has is not known: give attach(steps_per_epoch=...), and check "
                "may be called after every step; or call it once an epoch"
            )
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

    def load_state_dict(self, state: Mapping[str, Any], calls: Sequence[RecordedCall]) -> None:
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
        if not (self._went_on and isinstance(self.wrapping, DdpBackend)):
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
        self.follow_optimizer()  # and DeepSpeed is told where moments are

    def follow_optimizer(self) -> None:
        """Hear of the steps of the optimizer as it is now."""
        self._observer.listen(self.stepping)

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """The newest inputs, oldest first."""
        return self._observer.calls

    @property
    def num_elements(self) -> int:
        """Of all parameters that train at some time."""
        return sum(parameter.numel() for parameter in self.trained)

    @property
    def num_hooks(self) -> int:
        """Communication hooks on the wrapper that are not ours."""
        hooks = getattr(self.model, "_comm_hooks", ())
        return sum(not isinstance(state, OwnHookState) for _, state in hooks)

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

    def drop_gradients(self) -> None:
        """Those that wait for a step are of the whole network."""
        self.optimizer.zero_grad(set_to_none=True)
        self.network.zero_grad(set_to_none=True)  # also what the optimizer does not know

    def wrapped_again(self) -> WrappedNetwork:
        """The network as it is now in a new wrapper with the old one's arguments and no hooks."""
        with self._observer.deaf():
            model = self.wrapping.wrapped_again()
        wrapping = backend_of(model)
        return WrappedNetwork(model, wrapping, wrapping.stepping_of(self.stepping.optimizer))

    def go_on_in(self, again: WrappedNetwork) -> None:
        """Train the network in its new wrapper; the old one is dead."""
        old = self.wrapping
        self.model, self.wrapping, self.stepping = again
        old.retire()
        self.reduction = None
        self.trained &= frozenset(self.network.parameters())  # gates may have gone
        self._step_bytes = self.wrapping.step_bytes
        self._wrapped_at, self._went_on = self.step, False
        self._follow_passes()

    def go_back(self) -> None:
        """The network is again as it was; so is its wrapper, or another takes its place with the
        same communication hooks."""
        self.model = self.wrapping.revive()
        self.wrapping = backend_of(self.model)
        self.stepping = self.wrapping.stepping_of(self.stepping.optimizer)
        self._wrapped_at, self._went_on = self.step, False
        self._follow_passes()

    def recalibrate_alive(self, groups: Groups, told: set[str]) -> None:
        """The same, of a network that must answer.  Collective.

        Args:
            groups: of the network as it is now.
            told: groups that have been warned of; those that are now are added.

        Raises:
            CollapseError: on every rank, if the network puts out the same whatever it is given.
        """
        where = f"check at step {self.step}"
        if self.recalibrates:
            with Liveness(self.network, groups) as liveness:
                recalibrate(self.network, self.calls, self.ranks, where, liveness.look)
            liveness.require(self.ranks, where, told)

    def forget_inputs(self) -> None:
        """Remember no inputs from now on."""
        self._observer.forget_inputs()

    def remove(self) -> None:
        """Hear nothing of the training, and leave its gradients alone, from now on."""
        self._observer.remove()
        if self._passes is not None:
            self._passes.remove()
        self._passes = None
        if self.reduction is not None:
            self.reduction.remove()  # after a draw it is another than truncation's
