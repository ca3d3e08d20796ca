"""ZeRO-3: a network in a DeepSpeed engine of stage 3, in which each rank holds a part of every
weight."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..comm_hooks.reducer import Reducer
from ..comm_hooks.zero3_parts import part_size
from ..comm_hooks.zero3_reduce import Zero3Reducer
from ..config import TruncationConfig
from ..groups.full_shape import full_numel
from .deepspeed import DeepSpeedBackend
from .optimizer_view import OptimizerView
from .zero3_optimizer import Zero3OptimizerView
from .zero3_weights import FullNetwork, gather, gathered

__all__ = ["Zero3Backend"]


class Zero3Backend(DeepSpeedBackend):
    """A network in a DeepSpeed engine of ZeRO stage 3; see ``Backend``.

    A draw happens within ``full_network``: the plain network is cut, and a new engine partitions
    it; until then the old engine and its parts of the weights are as they were.
    """

    shards_weights = True

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self._full: FullNetwork | None = None
        self._is_rewrapped = False

    def _view_of_wrapper(self) -> OptimizerView:
        return Zero3OptimizerView(self.wrapper)

    @property
    def step_bytes(self) -> int:
        """Bytes of all gradients in every backward pass, and of this rank's parts of the weights:
        of small ones after a step, of others in every forward and backward pass, although DeepSpeed
        keeps some of those from one to the other; see ``Backend``."""
        size = self.comm.size
        num_passes = self.model.gradient_accumulation_steps()
        padded = sum(part_size(full_numel(p), size) * size for p in self.averaged)
        gradients = padded * self.model.communication_data_type.itemsize * num_passes
        if size == 1:
            return int(gradients)
        weights = sum(
            p.ds_tensor.nbytes * (1 if p.ds_persist else 2 * num_passes)
            for p in self.wrapper.param_names
        )
        return int(gradients + weights)

    def make_reducer(self, truncation: TruncationConfig) -> Reducer:
        """Patch the optimizer's reduction; see ``Backend``."""
        return Zero3Reducer(self.wrapper)

    @contextmanager
    def full_network(self) -> Iterator[nn.Module]:
        """Gather all weights into plain parameters; see ``Backend``."""
        assert self._full is None, "the weights are full already"
        # What a step has gathered lacks what no output depends on.
        self.wrapper.parameter_offload.partition_all_parameters()
        with gathered(list(self.network.parameters())):
            self._full = FullNetwork(self.called, self._hook_ids)
            try:
                yield self.network
            finally:
                if not self._is_rewrapped:
                    self._full.undo()
                self._full = None

    def full_values(self, parameters: Sequence[Tensor]) -> list[Tensor]:
        """See ``Backend``."""
        with gathered(parameters):
            return [parameter.detach() for parameter in parameters]

    def make_available(self, parameters: Sequence[Tensor]) -> None:
        """Gather parameters that DeepSpeed has released since the forward pass; it releases them
        again after the backward pass."""
        gather(parameters)

    def release(self) -> None:
        """Do nothing: in ``full_network`` the network has none of the engine's hooks."""
        assert self._full is not None

    def rewrap(self) -> nn.Module:
        """See ``DeepSpeedBackend``."""
        model = super().rewrap()
        self._is_rewrapped = True
        return model

    def retire(self) -> None:
        """See ``DeepSpeedBackend``."""
        self.model.destroy()
        # DeepSpeed caches a function by its coordinator, which so never goes; its weights shall.
        self.wrapper.parameter_offload.get_param_coordinator()._clear_trace_structures()
        super().retire()

    def revive(self) -> nn.Module:
        """The same engine; ``full_network`` gives the network its hooks back."""
        self._is_rewrapped = False
        model: nn.Module = self.model
        return model

    def _averaged_now(self) -> Collection[Tensor]:
        assert self._full is not None
        full = self._full.parameters
        return {full[parameter] for parameter in self.averaged}

    @property
    def _hook_ids(self) -> frozenset[int]:
        """Ids of DeepSpeed's hooks on the modules; torch gives each hook another."""
        engine, offload = self.model, self.wrapper.parameter_offload
        handles = [
            engine.module_forward_pre_hook,
            engine.module_forward_post_hook,
            offload.fwd_pre_hook,
            *offload.forward_hooks,
            *offload.backward_hooks,
            *self.wrapper._leaf_module_hooks,
        ]
        return frozenset(handle.id for handle in handles)
