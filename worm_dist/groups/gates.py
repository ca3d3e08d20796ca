"""Gates: a learnable factor for every attention head and every feed-forward neuron.

A gate scales the columns of the layer that reads the head or neuron: the effective weight is the
weight times the factor of each column's head or neuron.  Transformers have no BatchNorm, so gates
take the place of its scales (EarlyBERT, Chen et al. 2021, arXiv 2101.00063).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..config import SearchConfig
from ..errors import ConfigError
from .attention import find_attentions, weight_of
from .feed_forward import find_feed_forwards
from .parameter_storage import replace_data

__all__ = [
    "Gate",
    "absorb_gates",
    "add_gates",
    "column_factors",
    "fold_gates",
    "gated",
    "gates_of",
    "remove_gates",
]


class Gate(nn.Module):
    """A parametrization that scales equally sized blocks of adjacent columns of a weight.

    Args:
        num_factors: the number of blocks: heads or neurons.
        weight: the weight ``[outputs, inputs]``; gives dtype and device.

    Attributes:
        scale: the factors ``[heads]`` or ``[neurons]``, initially ones.
    """

    def __init__(self, num_factors: int, weight: Tensor) -> None:
        super().__init__()
        ones = torch.ones(num_factors, dtype=weight.dtype, device=weight.device)
        self.scale = nn.Parameter(ones)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight ``[outputs, inputs]`` with scaled columns."""
        by_factor = weight.unflatten(1, (len(self.scale), -1))
        scaled: Tensor = by_factor * self.scale.unsqueeze(1)
        return scaled.flatten(1)


def add_gates(network: nn.Module) -> nn.Module:
    """Add a gate with factor one to every supported head and neuron.

    The network's outputs are unchanged.  It gains the parameters
    ``<layer>.parametrizations.weight.0.scale``, to be trained like any other, best without weight
    decay.  The weight of a gated layer is renamed ``<layer>.parametrizations.weight.original``, so
    load pretrained weights before.  Gated networks can be copied, wrapped and compiled, but saved
    only as a ``state_dict``; ``fold_gates`` turns them into plain layers.

    Args:
        network: the unwrapped network; modified in place.

    Returns:
        The same network.

    Raises:
        ConfigError: the network already has gates, or no layer that could be gated.
    """
    if gates_of(network):
        raise ConfigError("model: it has gates already; add_gates is to be called once")
    attentions, dense = find_attentions(network)
    gated = {attention.reader: attention.num_heads for attention in attentions}
    for _, reader in find_feed_forwards(network):
        layer = network.get_submodule(reader)
        assert isinstance(layer, nn.Linear)
        gated[reader] = layer.in_features
    uses = Counter(p for _, p in network.named_parameters(remove_duplicate=False))
    layers = {reader: network.get_submodule(reader) for reader in gated}
    gateable = [
        reader
        for reader, layer in layers.items()
        # Folding a gate would change a weight that is shared with another layer.
        if not parametrize.is_parametrized(layer) and uses[layer.get_parameter("weight")] == 1
    ]
    if not gateable:
        because = "".join(f"\n  {name}: {reason}" for name, reason in dense.items())
        raise ConfigError(
            "model: it has no attention and no feed-forward layer that could be gated" + because
        )
    for reader in gateable:
        gate = Gate(gated[reader], layers[reader].get_parameter("weight"))
        parametrize.register_parametrization(layers[reader], "weight", gate)
    return network


def gated(network: nn.Module, search: SearchConfig) -> nn.Module:
    """Add gates to the heads and neurons of a network if ``search.importance`` uses gates.

    A network without heads and neurons stays unchanged.  Gates are added even if the search is
    disabled, so that the dense control run trains the same network as the others.

    Args:
        network: the network, changed in place.
        search: the search settings.

    Raises:
        ConfigError: ``add_gates`` does not support the network.
    """
    can_be_gated = bool(find_attentions(network)[0] or find_feed_forwards(network))
    wants_gates = search.importance in ("auto", "gate", "signed_gate")
    return add_gates(network) if can_be_gated and wants_gates else network


def column_factors(scale: Tensor, num_columns: int) -> Tensor:
    """The factor of every column ``[num_columns]`` of a gated weight.

    Args:
        scale: the gate's factors ``[heads]`` or ``[neurons]``.
        num_columns: number of columns.
    """
    return scale.repeat_interleave(num_columns // len(scale))


def gates_of(network: nn.Module) -> list[tuple[str, Gate]]:
    """Return (name of the gated layer, gate) for every gate, in network order."""
    suffix = ".parametrizations.weight.0"
    return [
        (name.removesuffix(suffix), module)
        for name, module in network.named_modules()
        if isinstance(module, Gate)
    ]


def fold_gates(network: nn.Module) -> None:
    """Turn gated layers into plain ones with bit-identical effective weights.

    Every weight stays the same parameter object, so optimizers keep working; separate master
    weights of an optimizer are not updated.

    Args:
        network: the unwrapped network; modified in place.

    Raises:
        ConfigError: a gated layer has another parametrization too.
    """
    absorb_gates(network)
    remove_gates(network)


@torch.no_grad()
def absorb_gates(network: nn.Module) -> None:
    """Multiply every gate into its weight, and reset its factors to one.

    Args:
        network: the unwrapped network; modified in place.

    Raises:
        ConfigError: a gated layer has another parametrization too.
    """
    _require_sole_parametrization(network)
    for reader, gate in gates_of(network):
        original = network.get_parameter(weight_of(network, reader))
        replace_data(original, gate(original))
        replace_data(gate.scale, torch.ones_like(gate.scale))


def remove_gates(network: nn.Module) -> None:
    """Remove the gates without applying their factors to the weights.

    Args:
        network: the unwrapped network; modified in place.

    Raises:
        ConfigError: a gated layer has another parametrization too.
    """
    _require_sole_parametrization(network)
    for reader, _ in gates_of(network):
        layer = network.get_submodule(reader)
        original = layer.get_parameter("parametrizations.weight.original")
        # torch's remove_parametrizations deletes a class attribute that copies of the layer share.
        layer.__class__ = parametrize.type_before_parametrizations(layer)
        del layer.parametrizations
        others = dict(layer._parameters)
        layer._parameters.clear()
        layer.register_parameter("weight", original)  # first, as in an ungated layer
        layer._parameters.update(others)


def _require_sole_parametrization(network: nn.Module) -> None:
    for reader, gate in gates_of(network):
        parametrizations = network.get_submodule(f"{reader}.parametrizations")
        ours = [parametrizations, parametrizations.weight, gate]
        if any(module not in ours for module in parametrizations.modules()):
            raise ConfigError(
                f"model: {reader} has another parametrization beside its gate; remove that first"
            )
