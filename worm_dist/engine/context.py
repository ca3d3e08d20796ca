"""Training context: the wrapped network, optimizer, hooks and traffic an engine is attached to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..backends.backend import Backend
from ..backends.gradient_reduction import GradientReduction
from ..backends.optimizer_state import OptimizerState
from ..backends.optimizer_view import OptimizerView, StepListener
from ..backends.recognition import backend_of
from ..comm_hooks.reducer import Reducer, ReducerSchema
from ..config import WormConfig
from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import uncounted
from ..errors import DivergenceError
from ..groups.channel_groups import Groups
from ..groups.full_shape import full_numel
from ..pruning.recorded_inputs import CallSchema
from ..schema import Count, Schema
from .bucket_order import BucketOrder
from .input_record import InputRecord
from .step_hooks import StepHooks
from .traffic import Traffic, TrafficSchema

__all__ = ["ContextRankSchema", "ContextSchema", "TrainingContext", "WrappedNetwork"]


class ContextSchema(Schema):
    """Schema of ``TrainingContext.state_dict``."""

    step: Count
    buckets_rebuilt: bool


class ContextRankSchema(Schema):
    """Schema of ``TrainingContext.rank_state``."""

    inputs: list[CallSchema] | None
    statistics_estimated: bool
    reducer: ReducerSchema | None
    traffic: TrafficSchema


class WrappedNetwork(NamedTuple):
    """A wrapped network with its backend and optimizer view."""

    model: nn.Module
    backend: Backend
    optimizer_view: OptimizerView


class TrainingContext(StepListener):
    """The network in its wrapper, its optimizer, and the hooks on both.

    Args:
        model: the wrapped network, or a bare one on a single process.
        optimizer: the optimizer of its parameters; None for a DeepSpeed engine's own.
        example_inputs: small inputs; see ``attach``.
        config: the engine's settings.
        may_draw: whether channels may be removed; otherwise no inputs are recorded.

    Attributes:
        model: the wrapped network; a new object after ``switch_to`` and ``roll_back``.
        backend: the model's backend.
        example_inputs: small inputs that the network accepts.
        comm: the communicator of the data-parallel ranks.
        trained: the network's parameters that train at any time.
        optimizer_view: the optimizer's view.
        reduction: owner of the gradient reducer.
        inputs: record of the network's newest inputs.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        example_inputs: Any,
        config: WormConfig,
        may_draw: bool,
    ) -> None:
        self.model = model
        self.backend: Backend = backend_of(model)
        self.comm = self.backend.comm
        self.optimizer_view: OptimizerView = self.backend.optimizer_view(optimizer)
        # DeepSpeed wraps the optimizer; else the user may step a wrapper of the one that has hooks.
        is_wrapped = (
            self.backend.user_optimizer(self.optimizer_view) is not self.optimizer_view.optimizer
        )
        self._user_optimizer = None if is_wrapped else optimizer
        self.trained = self.backend.averaged
        self.example_inputs = example_inputs
        self._config = config
        self._traffic = Traffic()
        self._bucket_order = BucketOrder()
        self._step_bytes = self.backend.step_bytes
        self._dense_bytes = self._step_bytes
        self.inputs = InputRecord(config.ticket, may_draw)
        self._before_pass: Callable[[], None] | None = None
        self._pass_handle: RemovableHandle | None = None

    def register_hooks(self, before_pass: Callable[[], None]) -> None:
        """Register hooks on network, wrapper and optimizer.

        Args:
            before_pass: called before every forward pass of the wrapper in training mode.
        """
        self.reduction = GradientReduction(self.backend, self._config.truncation)
        self._step_hooks = StepHooks(self.optimizer_view)
        self.inputs.register(self.backend.called)
        self._before_pass = before_pass
        self._register_pass_hook()

    def set_step_listeners(self, listeners: Sequence[StepListener]) -> None:
        """Call these around every optimizer step, in this order, and then count its bytes."""
        self._step_hooks.listen((*listeners, self))

    def before_step(self) -> None:
        """Refuse to step with gradients that were averaged wrongly; see ``Checksums``.

        Raises:
            DivergenceError: on the ranks on which something else has arrived than was sent.
        """
        reducer = self.reduction.reducer
        if reducer is None or reducer.checksums is None:
            return
        wrong = reducer.checksums.wrong()
        if wrong is not None:
            names = [self.names[parameter] for parameter in wrong]
            raise DivergenceError(
                f"step {self.step + 1}: rank {self.comm.rank} received an average of the gradients "
                f"of {' to '.join(dict.fromkeys((names[0], names[-1])))} that is not the average "
                "of what the ranks have sent; memory, a network card or a link is faulty: resume "
                "from the last checkpoint, without this host"
            )

    def after_step(self, step: int) -> None:
        """Count the step's bytes."""
        if self.reduction.reducer is None:
            self._traffic.add_step(self._step_bytes, self._dense_bytes)
        else:
            sent_bytes, unfrozen_bytes = self.reduction.reducer.take_bytes()
            # After stages the network is smaller than the dense one.
            dense_bytes = unfrozen_bytes * self._dense_bytes // max(1, self._step_bytes)
            self._traffic.add_step(sent_bytes, dense_bytes)

    def _register_pass_hook(self) -> None:
        """Register the forward pre-hook on the present wrapper, instead of the one before."""
        before_pass = self._before_pass
        if before_pass is None or self.backend.process_group is None:
            return

        def before_forward(model: nn.Module, args: Any) -> None:
            if model.training and torch.is_grad_enabled():
                before_pass()

        if self._pass_handle is not None:
            self._pass_handle.remove()
        untraced = torch.compiler.disable(before_forward)
        self._pass_handle = self.model.register_forward_pre_hook(untraced)

    @property
    def network(self) -> nn.Module:
        """The bare network, always the same object, with the parameters that the optimizer has."""
        return self.backend.network

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that the user steps; under DeepSpeed its wrapper of the torch optimizer."""
        return self._user_optimizer or self.backend.user_optimizer(self.optimizer_view)

    @property
    def step(self) -> int:
        """Optimizer steps since the engine was attached."""
        return self._step_hooks.step

    @property
    def traffic(self) -> Traffic:
        """Bytes sent in the last step and in total."""
        self._traffic.control_bytes = self.comm.sent_bytes
        return self._traffic

    def state_dict(self) -> dict[str, Any]:
        """The state in plain values, the same on all ranks."""
        self.before_step()  # on a GPU the newest gradients have not been looked at yet
        return {"step": self.step, "buckets_rebuilt": self._bucket_order.is_rebuilt(self.step)}

    def rank_state(self) -> dict[str, Any]:
        """This rank's state in plain values."""
        reducer = self.reduction.reducer
        return {
            "inputs": self.inputs.rank_state(),
            "statistics_estimated": self.inputs.is_estimated_here(self.step),
            "reducer": None if reducer is None else reducer.state_dict(self.names),
            "traffic": asdict(self.traffic),
        }

    def load_state_dict(
        self,
        state: Mapping[str, Any],
        traffic: Mapping[str, int],
        inputs: Sequence[dict[str, Any]],
        statistics_estimated: bool,
    ) -> None:
        """Restore step, byte counts and recorded inputs, and whether the BatchNorm statistics are
        those that the check at this step has estimated from them."""
        device = next(self.network.parameters()).device
        self._step_hooks.step = state["step"]
        self.inputs.load_rank_state(inputs, device, state["step"] if statistics_estimated else None)
        self._traffic = Traffic(**traffic)
        self.comm.sent_bytes = self._traffic.control_bytes

    def load_wrapper_state(
        self, state: Mapping[str, Any], reducer_state: Mapping[str, Any] | None
    ) -> None:
        """Restore the state of wrapper and reducer; channels must be removed and frozen before.
        Collective.

        Raises:
            CheckpointError: on every rank, if the reducer's state of one of them does not fit.
        """
        self._bucket_order.load(self.step, state["buckets_rebuilt"])
        reducer = self.reduction.reducer
        if reducer is None:
            return
        with uncounted(self.comm), refused_on_every_rank(self.comm):
            if reducer_state is not None:
                averaged = {name: p for p, name in self.names.items() if p in self.trained}
                reducer.load_state_dict(reducer_state, averaged)

    def restore_bucket_order(self, one_pass: Callable[[], Tensor]) -> None:
        """See ``Engine.restore_bucket_order``."""
        reducer = self.reduction.reducer
        unreduced = nullcontext() if reducer is None else reducer.pause()
        if self.backend.rebuilds_buckets:
            with self.inputs.unrecorded():
                self._bucket_order.restore(self.network, one_pass, unreduced)

    def read_optimizer_state(self, *, sharded: bool) -> dict[str, Any] | None:
        """See ``Engine.optimizer_state``."""
        with uncounted(self.comm):
            return self.optimizer_state.read(sharded=sharded)

    def write_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Load an optimizer state; see ``OptimizerState.write``.  Collective.

        Raises:
            CheckpointError: on every rank, if one of them cannot read its part.
        """
        with uncounted(self.comm), refused_on_every_rank(self.comm):
            self.optimizer_state.write(state)
        self.register_step_hooks()  # which also links moments under DeepSpeed

    @property
    def optimizer_state(self) -> OptimizerState:
        """Reader and writer of the present optimizer's state."""
        return OptimizerState(self.optimizer_view, self.network, self.model, self.comm)

    def register_step_hooks(self) -> None:
        """Register the step hooks on the present optimizer."""
        self._step_hooks.register(self.optimizer_view)

    def steps_ignored(self) -> AbstractContextManager[None]:
        """Context in which optimizer steps are not those of the training."""
        return self._step_hooks.suspended()

    def full_network(self) -> AbstractContextManager[nn.Module]:
        """Context in which the network has full weights; see ``Backend.full_network``."""
        return self.backend.full_network()

    def full_values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """The full values of parameters; see ``Backend.full_values``."""
        return self.backend.full_values(parameters)

    def make_available(self, parameters: Sequence[Tensor]) -> None:
        """See ``Backend.make_available``."""
        self.backend.make_available(parameters)

    @property
    def num_elements(self) -> int:
        """Number of elements of ``trained``."""
        return sum(map(full_numel, self.trained))

    @property
    def num_hooks(self) -> int:
        """Number of the user's communication hooks on the wrapper."""
        hooks = getattr(self.model, "_comm_hooks", ())
        return sum(not isinstance(state, Reducer) for _, state in hooks)

    @property
    def names(self) -> dict[Tensor, str]:
        """The names of the network's parameters."""
        return {parameter: name for name, parameter in self.network.named_parameters()}

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
        self.reduction.follow(self.backend)
        self.trained = self.backend.averaged  # without gates that have been folded
        self._step_bytes = self.backend.step_bytes
        self._bucket_order.wrapped(self.step)
        self._register_pass_hook()

    def roll_back(self) -> None:
        """Continue with the restored network after a failed draw, in its old wrapper or a new one
        with the same communication hooks."""
        self.model = self.backend.revive()
        self.backend = backend_of(self.model)
        self.optimizer_view = self.backend.optimizer_view(self.optimizer_view.optimizer)
        self.reduction.revive(self.backend)
        self._bucket_order.wrapped(self.step)
        self._register_pass_hook()

    def recalibrate_statistics(self, groups: Groups, warned: set[str]) -> None:
        """Estimate BatchNorm statistics at a check; see ``InputRecord.recalibrate``."""
        if self.inputs.is_on:
            with self.full_network() as network:
                self.inputs.recalibrate(network, groups, self.comm, self.step, warned)

    def remove(self) -> None:
        """Remove all hooks, and stop truncating gradients."""
        self._step_hooks.remove()
        self.inputs.stop()
        if self._pass_handle is not None:
            self._pass_handle.remove()
        self._before_pass = self._pass_handle = None
        self.reduction.remove()
