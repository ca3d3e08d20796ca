"""Inside: master weights and moments of a DeepSpeed engine, whole."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tests.zero.building import import_deepspeed
from tests.zero.layout import layout

__all__ = ["FIRST_MOMENTS", "Inside"]

FIRST_MOMENTS = ("momentum_buffer", "exp_avg")
_MASTER = "master"


class Inside:
    """Of one engine.

    Args:
        engine: DeepSpeed's.
        network: in it.
    """

    def __init__(self, engine: Any, network: nn.Module) -> None:
        self._engine = engine
        self._wrapper = engine.optimizer
        self._optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self._parameters = dict(network.named_parameters())
        stage = engine.zero_optimization_stage()
        self._is_cut, self._is_cut_one_by_one = stage > 0, stage == 3

    def everything(self) -> dict[str, Tensor]:
        """Copies, of the parameters' shapes: masters by name, moments by name and key.
        Collective.  A parameter that nothing steps is its own master."""
        found = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        if self._is_cut_one_by_one:
            for name, key, own in self._parts():
                parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, own.contiguous())
                shape = self._parameters[name].shape
                whole = torch.cat(parts)[: shape.numel()].view(shape)
                found[name if key == _MASTER else f"{name} {key}"] = whole
            return found
        rows: dict[int, Tensor] = {}
        for name, key, own, place in self._pieces():
            if self._is_cut and own.data_ptr() not in rows:
                parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
                dist.all_gather(parts, own)
                rows[own.data_ptr()] = torch.cat(parts)
            shape = self._parameters[name].shape
            row = rows.get(own.data_ptr(), own.flatten())
            whole = row[place : place + shape.numel()].view(shape).clone()
            found[name if key == _MASTER else f"{name} {key}"] = whole
        return found

    def told(self) -> dict[str, Tensor]:
        """What DeepSpeed's public functions tell of the same.  Collective.

        They know nothing of stage 0; with ``round_robin_gradients`` they look in the wrong places,
        and with several groups of parameters they find the first group's moments alone (0.19.8).
        """
        in_turns = self._engine.zero_round_robin_gradients()
        if not self._is_cut or in_turns or len(self._optimizer.param_groups) > 1:
            return {}
        utils, found = import_deepspeed().utils, {}
        pieces = self._parts() if self._is_cut_one_by_one else self._pieces()
        for name, key, *_ in pieces:
            parameter = self._parameters[name]
            if key == _MASTER:
                found[name] = utils.safe_get_full_fp32_param(parameter)
            else:
                found[f"{name} {key}"] = utils.safe_get_full_optimizer_state(parameter, key)
        return found

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """As ``everything`` gives them; also the weights themselves."""
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
        if self._is_cut_one_by_one:
            for name, key, own in self._parts():
                _write_part(own, values[name if key == _MASTER else f"{name} {key}"])
            for name, parameter in self._parameters.items():
                part: Tensor = parameter.ds_tensor  # type: ignore[attr-defined]
                _write_part(part, values[name])  # what the weights are gathered from
            return
        for name, key, own, place in self._pieces():
            value = values[name if key == _MASTER else f"{name} {key}"]
            if self._is_cut:
                begin = dist.get_rank() * own.numel()
                first = max(place, begin)
                last = max(first, min(place + value.numel(), begin + own.numel()))
                own[first - begin : last - begin] = value.flatten()[first - place : last - place]
            else:
                own.copy_(value)

    def _parts(self) -> Iterator[tuple[str, str, Tensor]]:
        """In stage 3: every parameter's name and key, and this rank's part of it, as long as every
        rank's: the last one's is padded."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        groups = zip(self._wrapper.fp32_partitioned_groups_flat, self._wrapper.fp16_groups)
        for owner, parameters in groups:
            tensors = {_MASTER: owner.detach()}
            for key, value in self._optimizer.state.get(owner, {}).items():
                if isinstance(value, Tensor) and value.shape == owner.shape:
                    tensors[key] = value
            place = 0
            for parameter in parameters:
                length = -(-parameter.ds_shape.numel() // dist.get_world_size())
                for key, value in tensors.items():
                    yield names[parameter], key, value[place : place + length]
                place += length
            assert place == owner.numel()

    def _pieces(self) -> Iterator[tuple[str, str, Tensor, int]]:
        """Every parameter's name and key, the tensor that this rank has it in, and its place in
        the row that the ranks' tensors are when put together."""
        names = {parameter: name for name, parameter in self._parameters.items()}
        for parameters, owners, places in self._groups():
            for parameter, owner, place in zip(parameters, owners, places, strict=True):
                yield names[parameter], _MASTER, owner.detach(), place
                for key, value in self._optimizer.state.get(owner, {}).items():
                    if isinstance(value, Tensor) and value.shape == owner.shape:
                        yield names[parameter], key, value, place

    def _groups(self) -> Iterator[tuple[list[Any], list[Tensor], list[int]]]:
        wrapper = self._wrapper
        if wrapper is self._optimizer:
            for group in wrapper.param_groups:
                trained = [p for p in group["params"] if p.requires_grad]
                yield trained, trained, [0] * len(trained)
        elif not self._is_cut:
            for parameters, copies in zip(wrapper.fp16_groups, wrapper.fp32_groups):
                yield parameters, copies, [0] * len(copies)
        else:
            in_turns = self._engine.zero_round_robin_gradients()
            for parameters, flat in zip(
                wrapper.bit16_groups, wrapper.single_partition_of_fp32_groups
            ):
                sizes = [p.numel() for p in parameters]
                aligned = self._engine.zero_parameter_alignment()
                unit = 16 // parameters[0].element_size() if aligned else 1
                places, length = layout(sizes, dist.get_world_size(), in_turns, unit)
                assert length == flat.numel() * dist.get_world_size()
                yield parameters, [flat] * len(parameters), places


def _write_part(own: Tensor, value: Tensor) -> None:
    """Write this rank's part of a value that is cut into equal parts, the last one padded."""
    flat = value.flatten()
    begin = min(dist.get_rank() * own.numel(), flat.numel())
    here = flat[begin : begin + own.numel()]
    own[: here.numel()] = here
