"""Sharded transfer: master weights and moments of DeepSpeed optimizers move to a new engine.

Each rank may hold only a shard.  Full (unsharded) tensors are gathered bit for bit, the surviving
elements are selected, and each rank of the new optimizer receives its new shard.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..backends.full_state import gather, scatter_full_state
from ..backends.optimizer_view import OptimizerView
from ..distributed.collectives import Communicator
from ..groups.attention import weight_of
from ..groups.gates import gates_of
from .optimizer_transfer import kept_indices, select
from .surgery import Cut

__all__ = ["ShardedTransfer"]


class ShardedTransfer:
    """The surviving master weights and optimizer state.  Collective if the optimizer is sharded.

    Args:
        optimizer_view: the view of the old engine's optimizer; the torch optimizer stays the same
            object in the new engine.
        before: the parameters of the network before the cuts, by name.
        cuts: the cuts that are going to be made.
        ranks: the communicator of the ranks that share the optimizer.
    """

    @torch.no_grad()
    def __init__(
        self,
        optimizer_view: OptimizerView,
        before: Mapping[str, nn.Parameter],
        cuts: Sequence[Cut],
        ranks: Communicator,
    ) -> None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in before.items()}
        kept = kept_indices(cuts)
        found = gather(optimizer_view, ranks, lambda p, full: select(full, kept.get(names[p], {})))
        self._optimizer = optimizer_view.optimizer
        self._groups = [[names[p] for p in group] for group in optimizer_view.groups]
        self._full_states = {names[p]: full_state for p, full_state in found.items()}

    @torch.no_grad()
    def fold_gates(self, network: nn.Module) -> None:
        """Multiply the gates into the transferred weights and remove the gates' own state.

        Args:
            network: the smaller network, whose gates are not folded yet.
        """
        for reader, gate in gates_of(network):
            scale = self._full_states.pop(f"{reader}.parametrizations.weight.0.scale").value
            gated = self._full_states.pop(weight_of(network, reader))
            weight = functional_call(gate, {"scale": scale}, (gated.value,))
            self._full_states[f"{reader}.weight"] = dataclasses.replace(gated, value=weight)
        renamed = {
            weight_of(network, reader): f"{reader}.weight" for reader, _ in gates_of(network)
        }
        self._groups = [
            [
                renamed.get(name, name)
                for name in names
                if renamed.get(name, name) in self._full_states
            ]
            for names in self._groups
        ]

    def replace_parameters(self, after: Mapping[str, nn.Parameter]) -> None:
        """Clear the torch optimizer's state and give it the parameters of the smaller network."""
        self._optimizer.state.clear()
        for group, names in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = [after[name] for name in names]

    def load_into(self, optimizer_view: OptimizerView, after: Mapping[str, nn.Parameter]) -> None:
        """Load the weights and state into the optimizer of the new engine.

        Args:
            optimizer_view: the view of the new engine's optimizer.
            after: the parameters of the smaller network, by name.
        """
        scatter_full_state(
            optimizer_view,
            {after[name]: full_state for name, full_state in self._full_states.items()},
        )
