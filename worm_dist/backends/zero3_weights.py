"""ZeRO-3 weights: full weights of a network that DeepSpeed's stage 3 has spread over the ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..groups.full_shape import full_numel

__all__ = ["FullNetwork", "gather", "gathered", "release", "zero3_part"]

_MODULE_ATTRIBUTES = frozenset(
    {
        "_original_parameters",
        "_external_params",
        "all_parameters",
        "ds_external_parameters",
        "ds_grads_remaining",
        "ds_id",
        "ds_inflight_param_registry",
        "ds_model_granularity",
        "ds_recompute_parameters",
        "applied_pre_backward_ref_cnt",
        "pre_bwd_fn",
        "post_bwd_fn",
    }
)
"""What DeepSpeed adds to modules.  Functions in it belong to one engine, and another one would take
them for its own."""


def zero3_part(parameter: Any) -> tuple[Tensor, int]:
    """This rank's part of a parameter, one-dimensional and without padding, and the index of its
    first element."""
    size = parameter.ds_tensor.ds_numel
    begin = min(parameter.ds_zero_partition_rank * size, full_numel(parameter))
    part: Tensor = parameter.ds_tensor.detach()[: min(size, full_numel(parameter) - begin)]
    return part, begin


def release(parameter: Any) -> None:
    """Let go of a gathered parameter, whose parts have been written to."""
    parameter.partition(param_list=[parameter])


def gather(parameters: Sequence[Any]) -> list[Any]:
    """Make these parameters full.  Collective.

    Returns:
        Those that were not.
    """
    missing = list({id(p): p for p in parameters if p.ds_status.name == "NOT_AVAILABLE"}.values())
    missing.sort(key=lambda parameter: parameter.ds_id)  # the same order on all ranks
    if missing:
        missing[0].all_gather(param_list=missing)
    return missing


@contextmanager
def gathered(parameters: Sequence[Any]) -> Iterator[None]:
    """Context in which these parameters are full.  Collective: the entry is, the exit is not."""
    missing = gather(parameters)
    try:
        yield
    finally:
        if missing:
            missing[0].partition(param_list=missing)


class FullNetwork:
    """A network as a plain module with full weights, in place of the one with ZeRO-3's parameters.

    Modules and buffers are the network's own; parameters are others, and DeepSpeed's hooks and
    attributes are gone.

    Args:
        network: the bare network.
        hook_ids: ids of DeepSpeed's hooks on its modules.

    Attributes:
        parameters: the plain parameters, by DeepSpeed's.
    """

    @torch.no_grad()
    def __init__(self, network: nn.Module, hook_ids: frozenset[int]) -> None:
        self.parameters: Mapping[Tensor, nn.Parameter] = {
            p: nn.Parameter(p.detach(), p.requires_grad) for p in network.parameters()
        }
        self._modules = list(network.modules())
        self._attributes: list[dict[str, Any]] = []
        self._hooks: list[list[tuple[dict[int, Any], dict[int, Any]]]] = []
        for module in self._modules:
            self._attributes.append(_taken_attributes(module))
            module.__dict__["_parameters"] = {
                name: None if p is None else self.parameters[p]
                for name, p in self._attributes[-1]["_parameters"].items()
            }
            tables = [table for table in _hook_tables(module) if not hook_ids.isdisjoint(table)]
            self._hooks.append([(table, dict(table)) for table in tables])
            for table in tables:
                for number in hook_ids.intersection(table):
                    del table[number]
        self._hook_ids = hook_ids

    def undo(self) -> None:
        """Give the network its ZeRO-3 parameters, hooks and attributes back."""
        for module, attributes, hooks in zip(self._modules, self._attributes, self._hooks):
            _taken_attributes(module)
            module.__dict__.update(attributes)
            for table, before in hooks:
                now = dict(table)
                left = {n: hook for n, hook in before.items() if n in now or n in self._hook_ids}
                table.clear()
                table.update(left | now)


def _taken_attributes(module: nn.Module) -> dict[str, Any]:
    """Take DeepSpeed's attributes, and the parameters, from a module."""
    taken = {
        name: value
        for name, value in vars(module).items()
        if name in _MODULE_ATTRIBUTES or name == "_parameters"
    }
    for name in taken:
        del module.__dict__[name]
    return taken


def _hook_tables(module: nn.Module) -> list[dict[int, Any]]:
    return [v for name, v in vars(module).items() if "_hooks" in name and isinstance(v, dict)]
