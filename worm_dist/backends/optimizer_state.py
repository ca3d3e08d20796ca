"""Optimizer state: the full (unsharded) state by parameter name, for any optimizer and sharding.

Under ZeRO no rank has all of it: rank zero gathers it, and on loading each rank takes its part,
also in another ZeRO stage or under DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationError
from torch import Tensor, nn

from ..checkpoint.sharded_tensor import SavedTensor, StoredTensor
from ..digest import digest_of
from ..distributed.collectives import Communicator
from ..errors import CheckpointError
from ..groups.full_shape import full_shape
from ..schema import Count, Schema, first_problem
from .full_state import FullParamState, gather, local_shards, scatter_full_state
from .optimizer_view import OptimizerView

__all__ = ["OptimizerState", "OptimizerStateSchema"]

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""DeepSpeed's counters, which schedules and gradient accumulation depend on."""


_FORMAT = 2


def _require_finite(value: Any) -> Tensor | StoredTensor | None:
    if value is None:
        return None
    if not isinstance(value, (Tensor, StoredTensor)):
        raise ValueError("must be a tensor")
    tensor = value
    if not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
        raise ValueError(f"must be floating point, not {tensor.dtype}")
    if isinstance(tensor, Tensor) and not bool(tensor.isfinite().all()):
        raise ValueError("has NaN or infinite elements")
    return tensor


class _ParameterSchema(Schema):
    """A tensor in the files of a checkpoint is looked at in detail when it is read."""

    value: Annotated[Any, AfterValidator(_require_finite)]
    moments: dict[str, SavedTensor]
    per_param: dict[str, Any]


class _GroupSchema(Schema):
    parameters: list[str]
    options: dict[str, Any]


class OptimizerStateSchema(Schema):
    """Schema of ``OptimizerState.read``."""

    format: Count
    parameters: dict[str, _ParameterSchema]
    groups: list[_GroupSchema]
    counters: dict[str, int]


class OptimizerState:
    """Reads and writes the state of one optimizer.

    Args:
        view: the optimizer's view.
        network: the bare network.
        model: the wrapped network.
        comm: the communicator of the ranks that share the optimizer.
    """

    def __init__(
        self, view: OptimizerView, network: nn.Module, model: nn.Module, comm: Communicator
    ) -> None:
        self._view = view
        self._model = model
        self._comm = comm
        names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
        self._parameters: dict[str, Tensor] = {}
        self._groups: list[list[str]] = []
        for number, group in enumerate(view.groups):
            # Parameters of the loss are stepped too, but have no name in the network.
            named = {
                names.get(p, f"group {number}, parameter {index}"): p
                for index, p in enumerate(group)
            }
            self._parameters |= named
            self._groups.append(list(named))

    def read(self, *, sharded: bool = False) -> dict[str, Any] | None:
        """Read the full state.  Collective.

        Args:
            sharded: whether every rank is to get its shards of a sharded state, ``LocalShards``;
                else it is gathered on rank zero.

        Returns:
            On rank zero the full state in plain values, elsewhere None; but a sharded one on every
            rank.  ``"value"`` is None where the stepped value equals the parameter bit for bit.
        """
        is_local = sharded and self._view.shared
        found = (local_shards if is_local else gather)(self._view, self._comm)
        if found is None:
            return None
        options = self._view.optimizer.param_groups
        return {
            "format": _FORMAT,
            "parameters": {
                name: {
                    "value": found[p].value,
                    "moments": dict(found[p].moments),
                    "per_param": dict(found[p].per_param),
                }
                for name, p in self._parameters.items()
            },
            "groups": [
                {
                    "parameters": names,
                    "options": {key: value for key, value in group.items() if key != "params"},
                }
                for names, group in zip(self._groups, options, strict=True)
            ],
            "counters": {
                name: getattr(self._model, name) for name in _COUNTERS if hasattr(self._model, name)
            },
        }

    def structure(self, state: Any) -> bytes:
        """Validate a state and digest what must be equal on all ranks, except moments and weights.

        Raises:
            CheckpointError: it is not an optimizer state, or has other parameters.
        """
        found = state.get("format") if isinstance(state, Mapping) else None
        if found != _FORMAT:
            raise CheckpointError(
                f"load_optimizer_state: format: wanted {_FORMAT}, found {found}; is it what "
                "engine.optimizer_state() gave, in this version of worm_dist?"
            )
        try:
            valid = OptimizerStateSchema.model_validate(dict(state))
        except ValidationError as error:
            raise CheckpointError(f"load_optimizer_state: {first_problem(error)}") from error
        for complaint in self._complaints(valid):
            raise CheckpointError(f"load_optimizer_state: {complaint}")
        options = [group.options for group in valid.groups]
        return digest_of([self._groups, options, valid.counters])

    def _complaints(self, state: OptimizerStateSchema) -> Iterator[str]:
        groups = [group.parameters for group in state.groups]
        odd = sorted(state.parameters.keys() ^ self._parameters.keys())
        if odd:
            yield (
                f"parameters: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}: the optimizer "
                "steps different ones; load the engine's state first, and build network and "
                "optimizer as they were when the state was saved"
            )
        if groups != self._groups:
            yield "groups: the optimizer's parameter groups differ from the saved ones"
        for name, parameter in state.parameters.items():
            shape = full_shape(self._parameters[name])
            tensors = {"value": parameter.value, **parameter.moments}
            for key, tensor in tensors.items():
                if tensor is not None and tensor.shape != shape:
                    yield (
                        f"parameters.{name}.{key}: wanted {list(shape)}, found "
                        f"{list(tensor.shape)}; load the engine's state first"
                    )
            for key, value in {**tensors, **parameter.per_param}.items():
                if isinstance(value, Tensor) and not bool(value.isfinite().all()):
                    yield f"parameters.{name}.{key}: has NaN or infinite elements"

    def write(self, state: Mapping[str, Any]) -> None:
        """Load this rank's part of a state that ``structure`` has accepted.  The weights must be
        loaded before.

        Raises:
            CheckpointError: the files of a checkpoint cannot be read, or have NaN or infinite
                elements.
        """
        optimizer = self._view.optimizer
        for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update(saved["options"])
        full_states = {}
        for name, saved in state["parameters"].items():
            parameter = self._parameters[name]
            self._drop_other_keys(parameter, saved)
            full_states[parameter] = FullParamState(**saved)
        scatter_full_state(self._view, full_states)
        for name, count in state["counters"].items():
            if hasattr(self._model, name):
                setattr(self._model, name, count)

    def _drop_other_keys(self, parameter: Tensor, saved: Mapping[str, Any]) -> None:
        """Delete keys that the saved state lacks: a new optimizer may already have some state."""
        state = self._view.optimizer.state.get(self._view.owner(parameter), {})
        for key in state.keys() - saved["moments"].keys() - saved["per_param"].keys():
            del state[key]
