"""Carry: master weights and moments of DeepSpeed's optimizers, from one engine to the next.

Each rank may have only its part of them.  They are put together bit for bit, the survivors are
taken, and the new optimizer is given its part of these, whichever part that is now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..cluster.agree import Ranks
from ..cluster.stepping import Stepping
from ..gates import gates_of
from ..search.attention import weight_of
from .surgery import Cut
from .transplant import kept_places, select

__all__ = ["Cargo"]

_VALUE = "the weights themselves"
"""Key of the master weights; moments have the keys that the optimizer gave them."""


@dataclass(frozen=True, eq=False)
class _Goods:
    """What an optimizer knew of one parameter, as far as it survives.

    Attributes:
        tensors: of the shape of the smaller parameter: master weights and moments.
        loose: state that belongs to no element, such as a count of steps.
    """

    tensors: Mapping[str, Tensor]
    loose: Mapping[str, object]


class Cargo:
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
        stepping: Stepping,
        before: Mapping[str, nn.Parameter],
        cuts: Sequence[Cut],
        ranks: Ranks,
    ) -> None:
        names: dict[Tensor, str] = {parameter: name for name, parameter in before.items()}
        self._optimizer = stepping.optimizer
        self._groups = [[names[p] for p in group] for group in stepping.groups]
        stepped = [p for group in stepping.groups for p in group]
        states = {p: stepping.optimizer.state.get(stepping.owner(p), {}) for p in stepped}
        keys = {
            p: [key for key, value in states[p].items() if _is_of(value, stepping, p)]
            for p in stepped
        }
        kept = kept_places(cuts)
        survivors: dict[Tensor, dict[str, Tensor]] = {p: {} for p in stepped}
        # Groups may differ in what they keep: without momentum there is none.
        for key in (_VALUE, *sorted({key for p in stepped for key in keys[p]})):
            having = [p for p in stepped if key in (_VALUE, *keys[p])]
            for p, whole in zip(having, _whole(stepping, having, key, ranks), strict=True):
                survivors[p][key] = select(whole, kept.get(names[p], {}))
        self._goods = {
            names[p]: _Goods(
                survivors[p], {key: value for key, value in states[p].items() if key not in keys[p]}
            )
            for p in stepped
        }

    @torch.no_grad()
    def fold_gates(self, network: nn.Module) -> None:
        """Multiply the gates into the weights that they scale, and forget them.

        Args:
            network: the smaller one, its gates not yet folded.
        """
        for reader, gate in gates_of(network):
            scale = self._goods.pop(f"{reader}.parametrizations.weight.0.scale").tensors[_VALUE]
            gated = self._goods.pop(weight_of(network, reader))
            weight = functional_call(gate, {"scale": scale}, (gated.tensors[_VALUE],))
            plain = f"{reader}.weight"
            self._goods[plain] = _Goods({**gated.tensors, _VALUE: weight}, gated.loose)
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

    @torch.no_grad()
    def unload(self, stepping: Stepping, after: Mapping[str, nn.Parameter]) -> None:
        """Give weights and state to the optimizer in the new engine.

        Args:
            stepping: of the optimizer there.
            after: the parameters of the smaller network, by name.
        """
        for name, goods in self._goods.items():
            owner = stepping.owner(after[name])
            moments = goods.tensors.keys() - {_VALUE}
            if moments or goods.loose:
                state = stepping.optimizer.state[owner]
                state.update(goods.loose)
                state.update({key: torch.zeros_like(owner) for key in moments - state.keys()})
            for shard in stepping.shards(after[name]):
                mine = {_VALUE: shard.value, **stepping.moments(shard)}
                for key, tensor in goods.tensors.items():
                    part = tensor.flatten()[shard.begin :][: shard.value.numel()]
                    mine[key].copy_(part.view(shard.value.shape))


def _whole(
    stepping: Stepping, parameters: Sequence[Tensor], key: str, ranks: Ranks
) -> list[Tensor]:
    """Whole tensors of the parameters' shapes, from every rank's shards."""
    sizes = [p.numel() for p in parameters]
    row = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, place in zip(parameters, row.split(sizes), strict=True):
        for shard in stepping.shards(parameter):
            mine = shard.value if key == _VALUE else stepping.moments(shard)[key]
            assert mine.dtype == torch.float32
            place[shard.begin :][: mine.numel()] = mine.flatten()
    if stepping.shared:
        row = ranks.joined(row)
    return [place.view(p.shape) for p, place in zip(parameters, row.split(sizes), strict=True)]


def _is_of(value: object, stepping: Stepping, parameter: Tensor) -> bool:
    """Whether a piece of state belongs to elements one by one."""
    return isinstance(value, Tensor) and value.shape == stepping.owner(parameter).shape
