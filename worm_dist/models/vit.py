"""Vision transformers (arXiv 2010.11929) for small images: torchvision's, with small arguments."""

from __future__ import annotations

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
    """Four layers of six heads and 192 neurons; 114 778 parameters for one channel, ten classes.

    Args:
        image_size: side of the images; a multiple of ``patch_size``.
        patch_size: side of the squares that become tokens.
        hidden_dim: width of the residual stream; a multiple of ``num_heads``.
        mlp_dim: neurons of each feed-forward layer.
        dropout: share of the embeddings, and of what each part adds to the stream, that is left
            out in training.

    Raises:
        ConfigError: a number is out of range, or one that must be a multiple is not.
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
                f"model.arguments.{name}: must be a whole number above 0, got {size!r}"
            )
    for name, divisor in (("image_size", "patch_size"), ("hidden_dim", "num_heads")):
        if sizes[name] % sizes[divisor]:
            raise ConfigError(
                f"model.arguments.{name}: must be a multiple of {divisor} {sizes[divisor]}, got "
                f"{sizes[name]}"
            )
    network = VisionTransformer(**sizes, dropout=dropout, num_classes=num_classes)
    if in_channels != network.conv_proj.in_channels:  # torchvision's reads colour images only
        network.conv_proj = nn.Conv2d(in_channels, hidden_dim, patch_size, stride=patch_size)
        nn.init.trunc_normal_(network.conv_proj.weight, std=(in_channels * patch_size**2) ** -0.5)
        nn.init.zeros_(network.conv_proj.bias)
    return network
