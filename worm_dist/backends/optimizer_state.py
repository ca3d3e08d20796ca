"""Optimizer state: by the parameters' names, whole, whichever optimizer and sharding it comes from.

Under ZeRO no rank has it all; it is put together on rank zero, and each rank takes its part again,
also in another stage, or under DistributedDataParallel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from ..distributed.collectives import Communicator
from ..engine.state_schema import digest_of
from ..errors import CheckpointError
from .full_state import FullParamState, gather, scatter_full_state
from .optimizer_view import OptimizerView

__all__ = ["OptimizerState"]

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
"""DeepSpeed's, that schedules and accumulation go by."""


class _Part(BaseModel):
    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True
    )


class _Parameter(_Part):
    value: Tensor | None
    moments: dict[str, Tensor]
    loose: dict[str, Any]


class _Group(_Part):
    parameters: list[str]
    options: dict[str, Any]


class _State(_Part):
    parameters: dict[str, _Parameter]
    groups: list[_Group]
    counters: dict[str, int]


class OptimizerState:
    """Reads and writes the state of one optimizer.

    Args:
        stepping: of the optimizer.
        network: not wrapped.
        model: wrapped.
        ranks: that step together.
    """

    def __init__(
        self, stepping: OptimizerView, network: nn.Module, model: nn.Module, ranks: Communicator
    ) -> None:
        self._stepping = stepping
        self._model = model
        self._ranks = ranks
        names: dict[Tensor, str] = {p: name for name, p in network.named_parameters()}
        self._parameters: dict[str, Tensor] = {}
        self._groups: list[list[str]] = []
        for number, group in enumerate(stepping.groups):
            # What a loss learns is stepped too, but is not in the network.
            here = {
                names.get(p, f"group {number}, parameter {place}"): p
                for place, p in enumerate(group)
            }
            self._parameters |= here
            self._groups.append(list(here))

    def read(self) -> dict[str, Any] | None:
        """On rank zero the whole state in plain values, elsewhere None.  Collective.

        A master weight is None where it is the weight itself, to the bit.
        """
        is_zero = self._ranks.rank == 0

        def take(parameter: Tensor, whole: Tensor) -> Tensor:
            if not self._stepping.shared:
                return whole
            # There may be no room for everything where the network is trained.
            return whole.cpu() if is_zero else whole.new_empty(0)

        found = gather(self._stepping, self._ranks, take)
        if not is_zero:
            return None
        options = self._stepping.optimizer.param_groups
        return {
            "parameters": {
                name: {
                    "value": None if _same_bits(found[p].value, p) else found[p].value,
                    "moments": dict(found[p].moments),
                    "loose": dict(found[p].loose),
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
        """A digest of what must be the same on all ranks, short of moments and weights.

        Raises:
            CheckpointError: it is not a state, or not of these parameters.
        """
        try:
            valid = _State.model_validate(state)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise CheckpointError(f"load_optimizer_state: {place}: {first['msg'][:200]}") from error
        for complaint in self._complaints(valid):
            raise CheckpointError(f"load_optimizer_state: {complaint}")
        options = [group.options for group in valid.groups]
        return digest_of([self._groups, options, valid.counters])

    def _complaints(self, state: _State) -> Iterator[str]:
        groups = [group.parameters for group in state.groups]
        odd = sorted(state.parameters.keys() ^ self._parameters.keys())
        if odd:
            yield (
                f"parameters: {', '.join(odd[:5])}{', ...' if odd[5:] else ''}: the optimizer "
                "steps other ones; load the engine's state first, and build network and "
                "optimizer as they were"
            )
        if groups != self._groups:
            yield "groups: the optimizer has other groups of parameters"
        for name, parameter in state.parameters.items():
            shape = self._parameters[name].shape
            tensors = {"value": parameter.value, **parameter.moments}
            for key, tensor in tensors.items():
                if tensor is not None and tensor.shape != shape:
                    yield (
                        f"parameters.{name}.{key}: wanted {list(shape)}, found "
                        f"{list(tensor.shape)}; load the engine's state first"
                    )

    def write(self, state: Mapping[str, Any]) -> None:
        """Give each rank its part of a state that ``structure`` has accepted; the weights must
        be loaded already."""
        optimizer = self._stepping.optimizer
        for group, saved in zip(optimizer.param_groups, state["groups"], strict=True):
            group.update(saved["options"])
        holdings = {}
        for name, saved in state["parameters"].items():
            parameter = self._parameters[name]
            self._forget_more_than(parameter, saved)
            value = parameter.detach() if saved["value"] is None else saved["value"]
            holdings[parameter] = FullParamState(value, saved["moments"], saved["loose"])
        scatter_full_state(self._stepping, holdings)
        for name, count in state["counters"].items():
            if hasattr(self._model, name):
                setattr(self._model, name, count)

    def _forget_more_than(self, parameter: Tensor, saved: Mapping[str, Any]) -> None:
        """A new optimizer may have begun with a state already."""
        state = self._stepping.optimizer.state.get(self._stepping.owner(parameter), {})
        for key in state.keys() - saved["moments"].keys() - saved["loose"].keys():
            del state[key]


def _same_bits(value: Tensor, parameter: Tensor) -> bool:
    return value.dtype == parameter.dtype and torch.equal(value, parameter.to(value.device))
