"""Predicted cost: what a ticket costs of what a budget limits, as a function of its widths.

The prediction is compared with a network that is drawn from a copy, so it is exact or refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..config import Quantity, WormConfig
from ..errors import ConfigError
from ..groups.attention import find_attentions, weight_of
from ..groups.channel_groups import Groups
from ..groups.copying import copied
from ..groups.cost_model import CostModel
from ..groups.flops import Operation, count_flops, count_flops_by_operation
from ..groups.gates import fold_gates, gates_of
from ..groups.mask import Mask
from .surgery import cuts_of, remove_channels, shapes_of

__all__ = ["gradient_bytes", "predicted_cost"]

_COMPRESSED_BYTES = {"bf16": 2, "fp16": 2}


def gradient_bytes(parameters: Mapping[str, nn.Parameter], compression: str) -> dict[str, int]:
    """Return the bytes of one gradient element of each parameter; 0 if it is not trained.

    Args:
        parameters: the parameters by name.
        compression: the setting ``truncation.compression``.
    """
    return {
        name: min(p.element_size(), _COMPRESSED_BYTES.get(compression, p.element_size()))
        * p.requires_grad
        for name, p in parameters.items()
    }


def predicted_cost(
    config: WormConfig, network: nn.Module, groups: Groups, example_inputs: Any
) -> CostModel | None:
    """Build the cost model of what ``search.budget`` limits; None without a budget.

    Needs a copy of the network, a forward pass of it for FLOPs, and the same for a drawn one.

    Args:
        config: the engine's settings.
        network: the unwrapped dense network.
        groups: its searched groups.
        example_inputs: inputs as for ``forward.run``.

    Raises:
        ConfigError: the cost of a drawn network is not the predicted one.
    """
    if config.search.budget.chosen is None:
        return None
    quantity, _ = config.search.budget.chosen
    compression = config.truncation.compression
    try:
        model = _model(quantity, compression, network, groups, example_inputs)
        mask = _random_mask(groups)
        drawn = _cost_of_drawn(quantity, compression, network, groups, mask, example_inputs)
        predicted = model.of(mask.num_kept_by_group)
        if predicted != drawn:
            raise ConfigError(
                f"{predicted:,} were predicted of a drawn network, which has {drawn:,}"
            )
    except Exception as error:  # under torch's counter the network may raise anything
        text = str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"search.budget.{quantity}: cannot be predicted exactly for this network "
            f"({text.splitlines()[0]}); limit something else, or give search.prune_ratio"
        ) from error
    return model


def _model(
    quantity: Quantity, compression: str, network: nn.Module, groups: Groups, inputs: Any
) -> CostModel:
    shapes = shapes_of(network)
    if quantity == "channels":
        return CostModel.build(groups, groups.num_channels, shapes, {}, groups.sizes)
    if quantity == "flops":
        return _flops_model(network, groups, count_flops_by_operation(network, inputs))
    parameters = dict(network.named_parameters())
    dense = sum(_costs(quantity, "none", parameters).values())
    costs = _costs(quantity, compression, parameters)
    for layer, _ in gates_of(network):  # the ticket has none
        del costs[f"{layer}.parametrizations.weight.0.scale"]
    return CostModel.build(groups, dense, shapes, costs, {})


def _costs(
    quantity: Quantity, compression: str, parameters: Mapping[str, nn.Parameter]
) -> dict[str, int]:
    """Return the elements or the gradient bytes of each parameter."""
    each = dict.fromkeys(parameters, 1)
    if quantity == "bytes":
        each = gradient_bytes(parameters, compression)
    return {name: p.numel() * each[name] for name, p in parameters.items()}


def _flops_model(network: nn.Module, groups: Groups, counts: Mapping[Operation, int]) -> CostModel:
    """Operations belong to a weight, to the heads of an attention, or to no channel."""
    shapes = shapes_of(network)
    attentions = [attention.module for attention in find_attentions(network)[0]]
    of_weights, of_heads, constant = Counter[str](), Counter[str](), 0
    for (module, parameter), flops in counts.items():
        layer = module if parameter is None else parameter.rpartition(".")[0]
        weight = parameter if parameter in shapes else weight_of(network, layer)
        attention = next((name for name in attentions if _is_within(module, name)), None)
        if weight in shapes:
            of_weights[weight] += flops
        elif attention is not None and attention in groups.sizes:
            of_heads[attention] += flops
        else:
            constant += flops
    dense = sum(counts.values())
    return CostModel.build(groups, dense, shapes, of_weights, of_heads, constant)


def _is_within(module: str, outer: str) -> bool:
    return not outer or module == outer or module.startswith(f"{outer}.")


def _cost_of_drawn(
    quantity: Quantity,
    compression: str,
    network: nn.Module,
    groups: Groups,
    mask: Mask,
    inputs: Any,
) -> int:
    """Count what a network costs that is drawn with a mask."""
    if quantity == "channels":
        return mask.num_kept
    drawn = copied(network)
    remove_channels(drawn, cuts_of(groups, mask, shapes_of(drawn)))
    fold_gates(drawn)
    if quantity == "flops":
        return count_flops(drawn, inputs)
    return sum(_costs(quantity, compression, dict(drawn.named_parameters())).values())


def _random_mask(groups: Groups) -> Mask:
    """Drop a random number of channels of each group, so that no two errors cancel out."""
    generator = torch.Generator().manual_seed(0)
    keep = {}
    for name, size in groups.sizes.items():
        num_left = int(torch.randint(1, max(2, size), (), generator=generator))
        keep[name] = torch.arange(size) < num_left
    return Mask(keep)
