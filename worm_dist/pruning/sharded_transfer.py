"""Carry: master weights and moments of DeepSpeed's optimizers, from one engine to the next.

Each rank may have only its part of them.  They are put together bit for bit, the survivors are
taken, and the new optimizer is given its part of these, whichever part that is now.
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
from .optimizer_transfer import kept_places, select
from .surgery import Cut

__all__ = ["ShardedTransfer"]


class ShardedTransfer:
    """What survives of master weights and state.  Collective if the ranks share the stepping.

    Args:
        stepping: of the optimizer, which goes on as the same object in another engine.
        before: the parameters of the whole network, by name.
        cuts: that are about to be made.
        ranks: that step together.
    """

    @torch.no_grad()
    def __init__(
        self,
        stepping: OptimizerView,
        before: Mapping[str, nn.Parameter],
        cuts: Sequence[Cut],
        ranks: Communicator,
    ) -> None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in before.items()}
        kept = kept_places(cuts)
        found = gather(stepping, ranks, lambda p, whole: select(whole, kept.get(names[p], {})))
        self._optimizer = stepping.optimizer
        self._groups = [[names[p] for p in group] for group in stepping.groups]
        self._goods = {names[p]: holding for p, holding in found.items()}

    @torch.no_grad()
    def fold_gates(self, network: nn.Module) -> None:
        """Multiply the gates into the weights that they scale, and forget them.

        Args:
            network: the smaller one, its gates not yet folded.
        """
        for reader, gate in gates_of(network):
            scale = self._goods.pop(f"{reader}.parametrizations.weight.0.scale").value
            gated = self._goods.pop(weight_of(network, reader))
            weight = functional_call(gate, {"scale": scale}, (gated.value,))
            self._goods[f"{reader}.weight"] = dataclasses.replace(gated, value=weight)
        renamed = {
            weight_of(network, reader): f"{reader}.weight" for reader, _ in gates_of(network)
        }
        self._groups = [
            [renamed.get(name, name) for name in names if renamed.get(name, name) in self._goods]
            for names in self._groups
        ]

    def replace_parameters(self, after: Mapping[str, nn.Parameter]) -> None:
        """Hand the smaller network's parameters to the torch optimizer, for the new engine."""
        self._optimizer.state.clear()
        for group, names in zip(self._optimizer.param_groups, self._groups, strict=True):
            group["params"] = [after[name] for name in names]

    def unload(self, stepping: OptimizerView, after: Mapping[str, nn.Parameter]) -> None:
        """Give weights and state to the optimizer in the new engine.

        Args:
            stepping: of the optimizer there.
            after: the parameters of the smaller network, by name.
        """
        scatter_full_state(
            stepping, {after[name]: holding for name, holding in self._goods.items()}
        )
