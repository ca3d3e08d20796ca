"""FSDP sharding: how ``fully_shard`` has sharded a network, and the plain network underneath.

``fully_shard`` changes a network in place: it replaces the classes of its modules, registers hooks,
and replaces parameters by their shards (DTensors).  A plain network is needed to be traced, copied,
run on one rank alone, and cut.  So all of that is taken off for a while, and put on again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed._composable.contract import REGISTRY_KEY, STATE_KEY
from torch.distributed._composable_state import _module_state_mapping
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..distributed.flat_collectives import all_gather

__all__ = ["CARRIED", "PREFETCHED", "Sharding", "is_fully_sharded"]

CARRIED = (
    "reduce_grads",
    "all_reduce_grads",
    "reshard_after_backward",
    "reduce_scatter_max_input_buffers",
    "gradient_divide_factor",
    "reduce_scatter_unused_params",
    "force_sum_reduction_for_comms",
    "unshard_async_op",
    "unshard_in_backward",
)
"""Attributes of a parameter group that FSDPModule's methods set."""
PREFETCHED = ("_states_to_forward_prefetch", "_states_to_backward_prefetch")
"""Attributes of a state that hold other states, which FSDPModule's methods set."""


def is_fully_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` has been applied to a module itself."""
    return isinstance(model, FSDPModule) and _state_of(model) is not None


class Sharding:
    """The sharding of one network.

    Args:
        network: the network, to which ``fully_shard`` has been applied.

    Attributes:
        network: the argument.
        states: torch's state of each call of ``fully_shard``, inner modules before outer ones.
        is_plain: whether the sharding is taken off at the moment.
        full: the full parameters by the sharded ones; empty unless it is.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        states = (_state_of(m) for m in network.modules() if isinstance(m, FSDPModule))
        self.states: list[Any] = list(dict.fromkeys(states))[::-1]
        self.is_plain = False
        self.full: dict[Tensor, nn.Parameter] = {}
        self._hooks = _Hooks(())
        self._modules: list[tuple[nn.Module, type, dict[str, Any], Any]] = []
        self._gradients: list[Tensor | None] = []

    @property
    def groups(self) -> list[Any]:
        """torch's parameter groups, each of which is gathered and reduced at once."""
        return [group for state in self.states for group in state._fsdp_param_groups]

    @property
    def parameters(self) -> list[Any]:
        """torch's ``FSDPParam`` of every sharded parameter."""
        return [parameter for group in self.groups for parameter in group.fsdp_params]

    def reshard(self) -> None:
        """Let the modules have their sharded parameters.  After a pass without a backward pass
        those of the outermost module are full ones, which torch has gathered."""
        if not self.is_plain:
            for group in self.groups:
                group._to_sharded()

    def take_off(self) -> None:
        """Make the network plain, with full weights.  Collective; takes the memory of one copy of
        the weights, and for the moment of one group's more.  After an interrupt ``put_on`` restores
        what had been taken off."""
        assert not self.is_plain
        self.reshard()
        gathered = [weight for group in self.groups for weight in _full_weights(group)]
        full = {
            parameter.sharded_param: nn.Parameter(weight, parameter.sharded_param.requires_grad)
            for parameter, weight in zip(self.parameters, gathered, strict=True)
        }
        self._gradients = [parameter.sharded_param.grad for parameter in self.parameters]
        self._hooks = _Hooks(_handles(self.states))
        self._modules = [
            (module, type(module), _composable(module), state)
            for state in self.states
            for module in state._modules
        ]
        self.full, self.is_plain = full, True  # before the network changes; see above
        self._hooks.take_off()
        for module, kind, composable, state in self._modules:
            module.__class__ = kind.__mro__[getattr(kind, "_orig_cls_mro_index")]  # noqa: B009
            for key, entries in composable.items():
                others = {k: v for k, v in entries.items() if not _is_ours(k, v, state)}
                if others:
                    module.__dict__[key] = type(entries)(others)
                else:
                    del module.__dict__[key]
            _module_state_mapping.pop(module, None)
        for parameter in self.parameters:
            _register(parameter, full[parameter.sharded_param])

    def put_on(self) -> None:
        """Restore the sharding as it was, gradients included; what has been written to the full
        weights is lost."""
        if not self.is_plain:
            return
        for module, kind, composable, state in self._modules:
            module.__class__ = kind
            module.__dict__.update(composable)
            _module_state_mapping[module] = weakref.ref(state)
        for parameter, gradient in zip(self.parameters, self._gradients, strict=True):
            _register(parameter, parameter.sharded_param)
            parameter.sharded_param.grad = gradient
        self._gradients = []  # else they would outlive the next zero_grad
        self._hooks.put_on()
        self.full = {}
        self.is_plain = False

    def renew(self) -> None:
        """Shard the plain network as it is now, with the old arguments."""
        assert self.is_plain
        present = set(self.network.modules())  # gates may have been folded
        renewed = []
        for state in self.states:
            modules = [module for module in state._modules if module in present]
            if modules:
                fully_shard(modules if len(modules) > 1 else modules[0], **_arguments(state))
                renewed.append((state, _state_of(modules[0])))
        new_of = dict(renewed)
        for old, new in renewed:
            new._auto_reshard_after_forward = old._auto_reshard_after_forward
            for name in PREFETCHED:
                targets = [new_of[state] for state in getattr(old, name) if state in new_of]
                setattr(new, name, targets)
            for group, before in zip(new._fsdp_param_groups, old._fsdp_param_groups):
                for name in CARRIED:
                    setattr(group, name, getattr(before, name))
                separate = before.mesh_info.reduce_scatter_process_group
                group.mesh_info.reduce_scatter_process_group = separate
        self._hooks.move_to_front()
        self.full = {}


class _Hooks:
    """Hooks on modules that are taken off for a while; hooks keep their order.

    Args:
        handles: the handles of the hooks.
    """

    def __init__(self, handles: Sequence[Any]) -> None:
        self._handles = handles
        self._ids = {handle.id for handle in handles}
        tables = {
            id(table): table
            for handle in handles
            for reference in (handle.hooks_dict_ref, *handle.extra_dict_ref)
            if (table := reference()) is not None
        }
        self._tables = [(table, list(table.items())) for table in tables.values()]

    def take_off(self) -> None:
        for table, _ in self._tables:
            for key in self._ids & table.keys():
                del table[key]

    def put_on(self) -> None:
        for table, items in self._tables:
            before = [(key, v) for key, v in items if key in table or key in self._ids]
            known = {key for key, _ in items}
            later = [(key, value) for key, value in table.items() if key not in known]
            table.clear()
            table.update([*before, *later])

    def move_to_front(self) -> None:
        """Let hooks that came before those taken off come before new ones too: ``fully_shard``
        puts its own in front of all others."""
        for table, items in self._tables:
            ours = [number for number, (key, _) in enumerate(items) if key in self._ids]
            first = min(ours, default=0)
            for key, _ in reversed(items[:first]):
                if key in table and hasattr(table, "move_to_end"):
                    table.move_to_end(key, last=False)


def _state_of(module: nn.Module) -> Any:
    """torch's state of the call of ``fully_shard`` that a module was given to; None without one."""
    return fully_shard.state(module)  # type: ignore[attr-defined]


def _handles(states: Sequence[Any]) -> list[Any]:
    handles: list[Any] = []
    for state in states:
        for handle in {state._pre_forward_hook_handle, state._post_forward_hook_handle}:
            handles += getattr(handle, "handles", [handle])
        for group in state._fsdp_param_groups:
            handles += group._module_to_pre_save_state_dict_hook_handle.values()
            handles += group._module_to_pre_load_state_dict_hook_handle.values()
            handles += [parameter._post_load_hook_handle for parameter in group.fsdp_params]
    return handles


def _composable(module: nn.Module) -> dict[str, Any]:
    """The entries of torch's composable functions in a module's attributes."""
    attributes = module.__dict__
    return {key: attributes[key] for key in (STATE_KEY, REGISTRY_KEY) if key in attributes}


def _is_ours(key: object, value: object, state: object) -> bool:
    return value is state or key == fully_shard.__name__


def _register(parameter: Any, value: nn.Parameter) -> None:
    """Let the modules that have a parameter have this one instead."""
    for module, name in _places(parameter):
        module._parameters[name] = value


def _places(parameter: Any) -> Iterator[tuple[nn.Module, str]]:
    info = parameter._module_info
    yield info.module, info.param_name
    yield from zip(info.shared_modules, info.shared_param_names, strict=True)


@torch.no_grad()
def _full_weights(group: Any) -> list[Tensor]:
    """The full weights of a group's parameters, by one collective; in their own precision, unlike
    those that torch gathers for a pass."""
    process_group = group.mesh_info.shard_process_group
    num_ranks = group.mesh_info.shard_mesh_size
    sharded = [parameter.sharded_param.detach() for parameter in group.fsdp_params]
    pieces = [_padded(parameter, num_ranks) for parameter in sharded]
    # As bytes, because the parameters may be of several dtypes.
    own = torch.cat([piece.view(-1).view(torch.uint8) for piece in pieces])
    gathered = own.new_empty(num_ranks * own.numel())
    all_gather(gathered, own, process_group).wait()
    parts = gathered.view(num_ranks, -1).split([piece.nbytes for piece in pieces], dim=1)
    return [
        part.reshape(-1).view(piece.dtype).view(-1, *piece.shape[1:])[: len(parameter)]
        for part, piece, parameter in zip(parts, pieces, sharded, strict=True)
    ]


def _padded(sharded: Any, num_ranks: int) -> Tensor:
    """This rank's rows of a sharded parameter, and zeros up to the most that a rank has."""
    local: Tensor = sharded.to_local()
    padded = local.new_zeros(-(-len(sharded) // num_ranks), *local.shape[1:])
    padded[: len(local)] = local
    return padded


def _arguments(state: Any) -> dict[str, Any]:
    """The arguments of ``fully_shard`` that led to a state."""
    (group,) = state._fsdp_param_groups or (None,)
    if group is None:  # inner modules have all of its parameters
        return {"mp_policy": state._mp_policy}
    automatic = state._auto_reshard_after_forward
    return {
        "mesh": group.mesh_info.mesh,
        "reshard_after_forward": None if automatic else group.post_forward_mesh_info is not None,
        "mp_policy": group.mp_policy,
        "offload_policy": group.offload_policy,
    }
