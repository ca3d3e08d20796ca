"""Vision transformers (arXiv 2010.11929) of torchvision, in sizes for small images."""

from __future__ import annotations

import reprlib

from torch import nn
from torchvision.models import VisionTransformer

from ..errors import ConfigError

__all__ = ["vit_small"]


def vit_small(
    num_classes: int,
    in_channels: int,
    image_size: int = 8,
    patch_size: int = 2,
    num_layers: int = 4,
    num_heads: int = 6,
    hidden_dim: int = 48,
    mlp_dim: int = 192,
    dropout: float = 0.0,
) -> VisionTransformer:
    """Build a vision transformer, by default with four layers of six heads and 192 neurons.

    The default has 114 778 parameters with one input channel and ten classes.

    Args:
        num_classes: the number of classes.
        in_channels: the number of image channels.
        image_size: the side of the images in pixels; a multiple of ``patch_size``.
        patch_size: the side of the square patches in pixels.
        num_layers: the number of encoder layers.
        num_heads: the number of attention heads of each layer.
        hidden_dim: the embedding width; a multiple of ``num_heads``.
        mlp_dim: the number of neurons of each feed-forward layer.
        dropout: the dropout probability of embeddings, attention outputs and feed-forward layers.

    Raises:
        ConfigError: a number is out of range, or not a multiple as required.
    """
    sizes = {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_layers": num_layers,
        "num_heads": num_heads,
        "hidden_dim": hidden_dim,
        "mlp_dim": mlp_dim,
    }
    for name, size in sizes.items():
        if type(size) is not int or size < 1:
            raise ConfigError(
                f"model.arguments.{name}: must be a whole number above 0, got {reprlib.repr(size)}"
            )
    for name, divisor in (("image_size", "patch_size"), ("hidden_dim", "num_heads")):
        if sizes[name] % sizes[divisor]:
            raise ConfigError(
                f"model.arguments.{name}: must be a multiple of {divisor} {sizes[divisor]}, got "
                f"{sizes[name]}"
            )
    network = VisionTransformer(**sizes, dropout=dropout, num_classes=num_classes)
    if in_channels != network.conv_proj.in_channels:  # torchvision supports three channels only
        network.conv_proj = nn.Conv2d(in_channels, hidden_dim, patch_size, stride=patch_size)
        nn.init.trunc_normal_(network.conv_proj.weight, std=(in_channels * patch_size**2) ** -0.5)
        nn.init.zeros_(network.conv_proj.bias)
    return network
