"""Feed-forward pairs: two linear layers, where only the second reads the neurons of the first.

For ``first -> activation -> second`` a neuron is

    neuron n = row n of first with its bias, and column n of second

Only pairs with elementwise operations between the two layers are supported.  Where neurons are
multiplied by a learned gate (SwiGLU and variants), normalised or summed over, they stay dense.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.ops import MLP

__all__ = ["find_feed_forwards"]

_ELEMENTWISE = (
    nn.Dropout,
    nn.ELU,
    nn.GELU,
    nn.Hardswish,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SiLU,
    nn.Sigmoid,
    nn.Tanh,
)
_PAIRS = (("fc1", "fc2"), ("lin1", "lin2"))
"""Layer names in modules without other parameters: timm and Hugging Face; DistilBERT."""


def find_feed_forwards(network: nn.Module) -> list[tuple[str, str]]:
    """Find the names of (producing layer, reading layer) pairs, in network order.

    Supported are nn.TransformerEncoderLayer and DecoderLayer, torchvision's MLP (so also MLPBlock)
    and ConvNeXt block, timm's Mlp, and the feed-forward layers of BERT, DistilBERT, ViT and CLIP of
    Hugging Face.
    """
    found = []
    for name, module in network.named_modules():
        for first, second in _pairs(module):
            names = (f"{name}.{first}" if name else first, f"{name}.{second}" if name else second)
            makes, reads = (network.get_submodule(layer) for layer in names)
            linear = isinstance(makes, nn.Linear) and isinstance(reads, nn.Linear)
            if linear and "weight" in makes._parameters and makes.out_features == reads.in_features:
                found.append(names)
    return found


def _pairs(module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield the names, relative to the module, of candidate pairs."""
    if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)):
        yield "linear1", "linear2"
    elif isinstance(module, MLP):
        yield from _neighbours(module)
    elif isinstance(module, CNBlock):
        yield from (
            (f"block.{first}", f"block.{second}") for first, second in _neighbours(module.block)
        )
    children = dict(module.named_children())
    kind = type(module).__name__.lower()
    if kind.endswith(("mlp", "ffn")):
        holding = {
            name for name, child in children.items() if any(True for _ in child.parameters())
        }
        yield from (pair for pair in _PAIRS if holding == set(pair))
    parts = [children.get(part) for part in ("intermediate", "output")]
    if all(isinstance(getattr(part, "dense", None), nn.Linear) for part in parts):
        yield "intermediate.dense", "output.dense"


def _neighbours(sequence: nn.Sequential) -> Iterator[tuple[str, str]]:
    """Yield consecutive linear layers with only elementwise modules between them."""
    first: str | None = None
    for name, module in sequence.named_children():
        if isinstance(module, nn.Linear):
            if first is not None:
                yield first, name
            first = name
        elif not isinstance(module, _ELEMENTWISE):
            first = None
