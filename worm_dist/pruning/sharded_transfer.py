"""Sharded transfer: master weights and moments of DeepSpeed and FSDP move to a new wrapper.

Each rank may hold only a shard, before and after; see ``resharding``.  The old wrapper's tensors
are only read, so that a failed draw can return to them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backends.full_state import VALUE, allocate_state, split_state
from ..backends.optimizer_view import OptimizerView, Shard
from ..distributed.collectives import Communicator
from ..groups.attention import weight_of
from ..groups.full_shape import full_shape
from ..groups.gates import column_factors, gates_of
from .optimizer_transfer import kept_indices, select
from .resharding import Move, Part, Survivors, buffer_for, reshard
from .surgery import Cut

__all__ = ["ShardedTransfer"]


class _Old(NamedTuple):
    """What the old optimizer has of one parameter.

    Attributes:
        shape: the parameter's shape.
        kept: its kept indices by dimension.
        dtypes: dtype of the stepped values and of each moment, by key.
        others: state that is not per element.
        shards: this rank's shards, and the stepped values and moments of each, by key.
    """

    shape: torch.Size
    kept: Mapping[int, Tensor]
    dtypes: Mapping[str, torch.dtype]
    others: Mapping[str, object]
    shards: Sequence[tuple[Shard, Mapping[str, Tensor]]]

    def sources(self, key: str) -> list[Part]:
        return [Part(shard.begin, tensors[key].reshape(-1)) for shard, tensors in self.shards]


class ShardedTransfer:
    """The surviving master weights and optimizer state, on their way to the new engine.

    Args:
        optimizer_view: the view of the old engine's optimizer; the torch optimizer stays the same
            object in the new engine.
        before: the parameters of the network before the cuts, by name.
        cuts: the cuts that are going to be made.
    """

    @torch.no_grad()
    def __init__(
        self,
        optimizer_view: OptimizerView,
        before: Mapping[str, nn.Parameter],
        cuts: Sequence[Cut],
    ) -> None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in before.items()}
        kept = kept_indices(cuts)
        self._optimizer = optimizer_view.optimizer
        self._shared = optimizer_view.shared
        self._groups = [[names[p] for p in group] for group in optimizer_view.groups]
        self._old: dict[str, _Old] = {}
        for parameter in (p for group in optimizer_view.groups for p in group):
            dtypes, others = split_state(optimizer_view, parameter)
            name, value_dtype = names[parameter], optimizer_view.owner(parameter).dtype
            self._old[name] = _Old(
                full_shape(parameter),
                kept.get(name, {}),
                {VALUE: value_dtype, **dtypes},
                others,
                [
                    (shard, {VALUE: shard.value, **optimizer_view.moments(shard)})
                    for shard in optimizer_view.shards(parameter)
                ],
            )
        self._gates: dict[str, _Old] = {}

    def fold_gates(self, network: nn.Module) -> None:
        """Multiply the gates into the transferred weights when they are loaded, and drop the gates'
        own state.

        Args:
            network: the smaller network, whose gates are not folded yet.
        """
        for reader, _ in gates_of(network):
            gated, plain = weight_of(network, reader), f"{reader}.weight"
            self._gates[plain] = self._old.pop(f"{reader}.parametrizations.weight.0.scale")
            self._old[plain] = self._old.pop(gated)
            self._groups = [
                [plain if name == gated else name for name in names] for names in self._groups
            ]
        self._groups = [[name for name in names if name in self._old] for names in self._groups]

    def replace_parameters(self, after: Mapping[str, nn.Parameter]) -> None:
        """Clear the torch optimizer's state and give it the parameters of the smaller network."""
        self._optimizer.state.clear()
        for group, names in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = [after[name] for name in names]

    @torch.no_grad()
    def prepare(self, optimizer_view: OptimizerView, after: Mapping[str, nn.Parameter]) -> None:
        """Allocate the new state, and memory to move it through.

        Args:
            optimizer_view: the view of the new engine's optimizer.
            after: the parameters of the smaller network, by name.
        """
        self._view, self._after = optimizer_view, after
        device = next(iter(after.values())).device
        for name, old in self._old.items():
            moments = {key: dtype for key, dtype in old.dtypes.items() if key != VALUE}
            allocate_state(optimizer_view, after[name], moments, old.others)
        self._scales: dict[str, Tensor] = {}
        self._moves: list[Move] = []
        for name, gate in self._gates.items():
            survivors, dtype = Survivors(gate.shape, gate.kept), gate.dtypes[VALUE]
            scale = torch.empty(survivors.count, dtype=dtype, device=device)
            self._scales[name] = scale
            self._moves.append(Move(survivors, dtype, gate.sources(VALUE), [Part(0, scale)]))
        for name, old in self._old.items():
            survivors = Survivors(old.shape, old.kept)
            new = self._new(name)
            self._moves += [
                Move(
                    survivors,
                    dtype,
                    old.sources(key),
                    [Part(shard.begin, tensors[key].view(-1)) for shard, tensors in new],
                )
                for key, dtype in old.dtypes.items()
                if self._shared
            ]
        self._buffer = buffer_for(self._moves, device)

    @torch.no_grad()
    def load(self, comm: Communicator) -> None:
        """Load the weights and state into the prepared optimizer.  Collective if it is sharded: all
        collectives are issued even if this rank fails.

        Args:
            comm: the communicator of the ranks that share the optimizer.
        """
        if self._shared:
            reshard(self._moves, comm, self._buffer)
        else:
            self._select()
        for name, scale in self._scales.items():
            factors = column_factors(scale, full_shape(self._after[name])[1])
            for shard, _ in self._new(name):
                _scale_columns(shard, factors)

    def _select(self) -> None:
        """Load from full tensors."""
        for name, old in self._old.items():
            for (_, found), (_, new) in zip(old.shards, self._new(name), strict=True):
                for key in old.dtypes:
                    new[key].copy_(select(found[key], old.kept))
        for name, scale in self._scales.items():
            gate = self._gates[name]
            ((_, found),) = gate.shards
            scale.copy_(select(found[VALUE], gate.kept))

    def _new(self, name: str) -> list[tuple[Shard, dict[str, Tensor]]]:
        """This rank's new shards of a parameter, and the tensors of each by key."""
        return [
            (shard, {VALUE: shard.value, **self._view.moments(shard)})
            for shard in self._view.shards(self._after[name])
        ]


def _scale_columns(shard: Shard, factors: Tensor) -> None:
    """Multiply the columns of a shard of a matrix, in place.

    Args:
        shard: the shard.
        factors: the factor of every column.
    """
    width = len(factors)
    if shard.value.dim() == 2:
        shard.value.mul_(factors)
        return
    first = shard.begin % width
    head = min(-shard.begin % width, shard.value.numel())
    shard.value[:head].mul_(factors[first : first + head])
    rest = shard.value[head:]
    rows = rest.numel() // width
    rest[: rows * width].view(rows, width).mul_(factors)
    rest[rows * width :].mul_(factors[: rest.numel() - rows * width])
