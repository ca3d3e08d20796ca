"""The architecture of a ticket, newly initialised."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torchvision.models import VisionTransformer

from ...config import SearchConfig
from ...groups.gates import remove_gates
from ...groups.mask import Mask
from ...models.conv import initialize
from ...pruning.exactness import find_drawable_groups
from ...pruning.surgery import cuts_of, remove_channels, shapes_of
from .subject import Subject

__all__ = ["ticket_from_scratch"]


def ticket_from_scratch(
    subject: Subject, search: SearchConfig, widths: Mapping[str, int], seed: int
) -> nn.Module:
    """Build the architecture of a ticket and initialise it as the dense network is initialised.

    Args:
        subject: builds the dense network.
        search: the search settings of the ticket.
        widths: the number of kept channels of each group.
        seed: seed of the weights.
    """
    network = subject.build(1.0)
    groups = find_drawable_groups(network, subject.samples().images[:1], search)
    # Any channels will do: all weights are initialised again.
    mask = Mask(
        {group.name: torch.arange(group.num_channels) < widths[group.name] for group in groups}
    )
    remove_channels(network, cuts_of(groups, mask, shapes_of(network)))
    remove_gates(network)
    torch.manual_seed(seed)
    _initialize(network)
    return network


def _initialize(network: nn.Module) -> None:
    """Draw all weights whose shape a cut may have changed, from the distribution for the new shape.

    Cut weights keep the spread of the dense network's, which is too small for fewer channels.
    """
    if isinstance(network, VisionTransformer):
        for block in network.encoder.layers:
            _initialize_attention(block.self_attention)
            _initialize_feed_forward(block.mlp)
        return
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            initialize(module)
        elif isinstance(module, nn.Linear):
            module.reset_parameters()


@torch.no_grad()
def _initialize_attention(attention: nn.MultiheadAttention) -> None:
    """As torch does, whose own function assumes that all heads are there."""
    nn.init.xavier_uniform_(attention.in_proj_weight)
    attention.in_proj_bias.zero_()
    attention.out_proj.reset_parameters()
    attention.out_proj.bias.zero_()


def _initialize_feed_forward(mlp: nn.Module) -> None:
    """As torchvision does in the constructor of its transformer's block."""
    for layer in mlp.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.normal_(layer.bias, std=1e-6)
