"""Feed-forward: pairs of linear layers, the neurons of the first read by the second alone.

For ``first -> activation -> second`` a neuron is

    neuron n = row n of first with its bias, and column n of second

Only kinds are known in which nothing between the two mixes neurons.  Where they are multiplied by
a gate (SwiGLU and its kin), normalised or summed over, they are left dense.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torchvision.models.convnext import CNBlock
from torchvision.ops import MLP

__all__ = ["find_feed_forwards"]

_OF_EACH_NEURON = (
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
"""In modules that hold nothing else: timm's and Hugging Face's, DistilBERT's."""


def find_feed_forwards(network: nn.Module) -> list[tuple[str, str]]:
    """The names of the layers that make and that read neurons, pair by pair in network order.

    Understood are nn.TransformerEncoderLayer and DecoderLayer, torchvision's MLP (so also
    MLPBlock) and ConvNeXt block, timm's Mlp, and the feed-forward layers of Hugging Face's BERT,
    DistilBERT, ViT and CLIP.
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
    """Names within the module of what may be such a pair."""
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
    """Linear layers with nothing between them but what acts on each neuron alone."""
    first: str | None = None
    for name, module in sequence.named_children():
        if isinstance(module, nn.Linear):
            if first is not None:
                yield first, name
            first = name
        elif not isinstance(module, _OF_EACH_NEURON):
            first = None
