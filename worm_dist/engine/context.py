"""Training context: the wrapped network, optimizer, hooks and traffic an engine is attached to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..backends.backend import Backend
from ..backends.optimizer_state import OptimizerState
from ..backends.optimizer_view import OptimizerView, Owners
from ..backends.recognition import backend_of
from ..comm_hooks.reducer import Reducer
from ..config import WormConfig
from ..errors import ConfigError
from ..groups.channel_groups import Groups
from ..interval import Interval
from ..pruning.bn_recalibration import recalibrate
from ..pruning.collapse import Liveness
from ..pruning.recorded_inputs import RecordedCall, RecordedInputs
from .step_hooks import StepHooks, Traffic

__all__ = ["TrainingContext", "WrappedNetwork", "require_countable"]


def require_countable(config: WormConfig) -> None:
    """Refuse settings for which ``steps_per_epoch`` must be given: it can only be counted between
    checks that are epochs apart.

    Raises:
        ConfigError: the length of an epoch is needed and cannot be counted.
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
    """A wrapped network with its backend and optimizer view."""

    model: nn.Module
    backend: Backend
    optimizer_view: OptimizerView


class TrainingContext:
    """The network in its wrapper, its optimizer, and the hooks on both.

    Args:
        model: the wrapped network, or a bare one on a single process.
        optimizer: the optimizer of its parameters; None for a DeepSpeed engine's own.
        example_inputs: small inputs; see ``attach``.
        check_every: the interval between checks.
        steps_per_epoch: optimizer steps per epoch; None if they are counted between checks.

    Attributes:
        model: the wrapped network; a new object after ``switch_to`` and ``roll_back``.
        backend: the model's backend.
        example_inputs: small inputs that the network accepts.
        network: the bare network, always the same object.
        comm: the communicator of the data-parallel ranks.
        trained: the network's parameters that train at any time.
        optimizer_view: the optimizer's view.
        reducer: the gradient reducer; None while the wrapper reduces by itself.
        recalibrates: whether inputs are recorded to estimate BatchNorm statistics from.
        traffic: bytes sent in the last step and in total.
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
        self.backend: Backend = backend_of(model)
        self.network = self.backend.network
        self.comm = self.backend.comm
        self.optimizer_view: OptimizerView = self.backend.optimizer_view(optimizer)
        # DeepSpeed wraps the optimizer; else the user may step a wrapper of the one that has hooks.
        is_wrapped = (
            self.backend.user_optimizer(self.optimizer_view) is not self.optimizer_view.optimizer
        )
        self._user_optimizer = None if is_wrapped else optimizer
        self.trained = self.backend.averaged
        self.example_inputs = example_inputs
        self.reducer: Reducer | None = None
        self.traffic = Traffic()
        self._check_every = check_every
        self._steps_per_epoch = steps_per_epoch
        self._epoch_length_given = steps_per_epoch is not None
        self._last_check = 0
        self._wrapped_at = 0
        self._buckets_were_rebuilt = False
        self._step_bytes = self.backend.step_bytes
        self._dense_bytes = self._step_bytes
        self._pass_hook: RemovableHandle | None = None

    def register_hooks(
        self,
        recorded: RecordedInputs,
        before_pass: Callable[[], None],
        before_step: Callable[[], None],
        hold: Callable[[int, Owners], None],
        after_step: Callable[[int], None],
    ) -> None:
        """Register hooks on network, wrapper and optimizer.

        Args:
            recorded: the recorder of inputs, registered as a forward pre-hook.
            before_pass: called before every forward pass of the wrapper in training mode.
            before_step, hold, after_step: called around every optimizer step; see ``StepHooks``.
        """

        def stepped(step: int) -> None:
            after_step(step)
            if self.reducer is None:
                self.traffic.add_step(self._step_bytes, self._dense_bytes)
            else:
                sent_bytes, unfrozen_bytes = self.reducer.take_bytes()
                # After stages the network is smaller than the dense one.
                dense_bytes = unfrozen_bytes * self._dense_bytes // max(1, self._step_bytes)
                self.traffic.add_step(sent_bytes, dense_bytes)

        # On the outermost module, so that inputs are recorded outside of torch.compile's graph.
        called = self.backend.called
        self._step_hooks = StepHooks(
            called, self.optimizer_view, recorded, before_step, hold, stepped
        )
        self.recalibrates = recorded.is_on

        def before_forward(model: nn.Module, args: Any) -> None:
            if model.training and torch.is_grad_enabled():
                before_pass()

        self._before_pass = before_forward
        if self.backend.process_group is not None:
            self._pass_hook = self.model.register_forward_pre_hook(before_forward)

    def _register_pass_hook(self) -> None:
        """Move the forward pre-hook to the present wrapper."""
        if self._pass_hook is not None:
            self._pass_hook.remove()
            self._pass_hook = self.model.register_forward_pre_hook(self._before_pass)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the user steps; under DeepSpeed its wrapper of the torch optimizer."""
        return self._user_optimizer or self.backend.user_optimizer(self.optimizer_view)

    @property
    def step(self) -> int:
        """Optimizer steps since the engine was attached."""
        return self._step_hooks.step

    def num_steps(self, interval: Interval) -> int:
        """Convert an interval to optimizer steps.

        Raises:
            ConfigError: it is in epochs, whose length is not known.
        """
        if interval.unit == "ep" and self._steps_per_epoch is None:
            raise ConfigError(
                f"the number of steps in {interval} is not known; give attach(steps_per_epoch=...)"
            )
        return interval.steps(self._steps_per_epoch or 1)

    @property
    def check_is_due(self) -> bool:
        """Whether the next check is due.  Always true before the first step, and where checks are
        epochs apart and ``steps_per_epoch`` was not given."""
        if not self.step or (self._check_every.unit == "ep" and not self._epoch_length_given):
            return True
        return self.step - self._last_check >= self.num_steps(self._check_every)

    @property
    def check_has_just_become_due(self) -> bool:
        """Whether the last step has made the next check due; False if an epoch's length is not
        known."""
        if self._check_every.unit == "ep" and self._steps_per_epoch is None:
            return False
        return bool(self.step) and self.since_last_check == self.num_steps(self._check_every)

    @property
    def since_last_check(self) -> int:
        """Optimizer steps since the last check."""
        return self.step - self._last_check

    def begin_check(self) -> None:
        """Record a check.  If ``steps_per_epoch`` was not given, it is inferred from the steps
        between the first two checks.

        Raises:
            ConfigError: there was only one step between them.
        """
        since_last_check = self.since_last_check
        in_epochs = self._check_every.unit == "ep"
        if in_epochs and not self._epoch_length_given and since_last_check == 1:
            raise ConfigError(
                f"check: one step after the last one, and search.every is {self._check_every}. How "
                "many steps an epoch has is not known: give attach(steps_per_epoch=...), and check "
                "may be called after every step; or call it once an epoch"
            )
        self._last_check = self.step
        if in_epochs and self._steps_per_epoch is None and since_last_check:
            self._steps_per_epoch = max(1, round(since_last_check / self._check_every.count))

    def state_dict(self) -> dict[str, Any]:
        """Step counts and traffic in plain values."""
        return {
            "step": self.step,
            "last_check": self._last_check,
            "steps_per_epoch": self._steps_per_epoch,
            "buckets_arranged": self._buckets_were_rebuilt or self.step > self._wrapped_at,
            "traffic": asdict(self.traffic),
        }

    def load_state_dict(self, state: Mapping[str, Any], calls: Sequence[RecordedCall]) -> None:
        """Restore a state, with these as the newest inputs."""
        self._step_hooks.restore(state["step"], calls)
        self._last_check = state["last_check"]
        self._steps_per_epoch = state["steps_per_epoch"]
        self.traffic = Traffic(**state["traffic"])

    def load_bucket_state(self, state: Mapping[str, Any]) -> None:
        """Restore from a state whether DDP had rebuilt its buckets."""
        self._wrapped_at, self._buckets_were_rebuilt = self.step, state["buckets_arranged"]

    def restore_bucket_order(self, one_pass: Callable[[], Tensor]) -> None:
        """Run one pass whose only effect is that DDP rebuilds its buckets, if the saved run's were
        rebuilt; see ``Engine.restore_bucket_order``."""
        if not (self._buckets_were_rebuilt and self.backend.rebuilds_buckets):
            return
        calls = list(self.calls)
        buffers = [(buffer, buffer.clone()) for buffer in self.network.buffers()]
        device = next(self.network.parameters()).device
        with (
            torch.random.fork_rng([device] if device.type == "cuda" else []),
            nullcontext() if self.reducer is None else self.reducer.pause(),
        ):
            one_pass().backward()
        self.network.zero_grad(set_to_none=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        self._step_hooks.restore(self.step, calls)

    @property
    def optimizer_state(self) -> OptimizerState:
        """Reader and writer of the present optimizer's state."""
        return OptimizerState(self.optimizer_view, self.network, self.model, self.comm)

    def write_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load an optimizer state; see ``OptimizerState.write``."""
        self.optimizer_state.write(state)
        self.register_step_hooks()  # which also links moments under DeepSpeed

    def register_step_hooks(self) -> None:
        """Register the step hooks on the present optimizer."""
        self._step_hooks.register(self.optimizer_view)

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """The newest inputs, oldest first."""
        return self._step_hooks.calls

    @property
    def num_elements(self) -> int:
        """Number of elements of ``trained``."""
        return sum(parameter.numel() for parameter in self.trained)

    @property
    def num_hooks(self) -> int:
        """Number of the user's communication hooks on the wrapper."""
        hooks = getattr(self.model, "_comm_hooks", ())
        return sum(not isinstance(state, Reducer) for _, state in hooks)

    @property
    def names(self) -> dict[Tensor, str]:
        """The names of the network's parameters."""
        return {parameter: name for name, parameter in self.network.named_parameters()}

    def require_optimized(self, groups: Groups) -> None:
        """Require the optimizer to have all trained parameters of the groups: only those can be
        held, and their state pruned.

        Raises:
            ConfigError: it lacks one, for example because there is a second optimizer.
        """
        stepped = self.optimizer_view.parameters
        parameters = dict(self.network.named_parameters())
        for name in (name for g in groups for m in g.members for name, _ in m.parameters):
            if parameters[name].requires_grad and parameters[name] not in stepped:
                raise ConfigError(
                    f"attach: the optimizer does not have {name}, which trains; give one optimizer "
                    "all parameters, or set requires_grad to False on those that shall not train"
                )

    def require_alike(self, copies: Sequence[nn.Module]) -> None:
        """Require copies to have the network's parameters, by names and shapes.

        Raises:
            ConfigError: one does not.
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
        """Discard accumulated gradients, whose shapes will not fit the pruned network."""
        self.optimizer.zero_grad(set_to_none=True)
        self.network.zero_grad(set_to_none=True)  # also parameters that the optimizer lacks

    def rewrap(self) -> WrappedNetwork:
        """Wrap the network as it is now in a new wrapper with the old one's arguments, without our
        communication hook."""
        with self._step_hooks.suspended():
            model = self.backend.rewrap()
        backend = backend_of(model)
        return WrappedNetwork(model, backend, backend.optimizer_view(self.optimizer_view.optimizer))

    def switch_to(self, rewrapped: WrappedNetwork) -> None:
        """Continue with a new wrapper, and retire the old one."""
        old = self.backend
        self.model, self.backend, self.optimizer_view = rewrapped
        old.retire()
        self.reducer = None
        self.trained &= frozenset(self.network.parameters())  # gates may have been folded
        self._step_bytes = self.backend.step_bytes
        self._wrapped_at, self._buckets_were_rebuilt = self.step, False
        self._register_pass_hook()

    def roll_back(self) -> None:
        """Continue with the restored network after a failed draw, in its old wrapper or a new one
        with the same communication hooks."""
        self.model = self.backend.revive()
        self.backend = backend_of(self.model)
        self.optimizer_view = self.backend.optimizer_view(self.optimizer_view.optimizer)
        self._wrapped_at, self._buckets_were_rebuilt = self.step, False
        self._register_pass_hook()

    def recalibrate_statistics(self, groups: Groups, warned: set[str]) -> None:
        """Estimate BatchNorm statistics from the recorded inputs, and check the network for
        collapse.  Collective.

        Args:
            groups: the channel groups of the network as it is now.
            warned: names of groups that a warning was given for; new ones are added.

        Raises:
            CollapseError: on every rank, if the network's output does not depend on its input.
        """
        where = f"check at step {self.step}"
        if self.recalibrates:
            with Liveness(self.network, groups) as liveness:
                recalibrate(self.network, self.calls, self.comm, where, liveness.observe)
            liveness.require(self.comm, where, warned)

    def stop_recording(self) -> None:
        """Record no inputs from now on."""
        self._step_hooks.stop_recording()

    def remove(self) -> None:
        """Remove all hooks, and stop truncating gradients."""
        self._step_hooks.remove()
        if self._pass_hook is not None:
            self._pass_hook.remove()
        self._pass_hook = None
        if self.reducer is not None:
            self.reducer.remove()  # after a draw it is not truncation's reducer
