"""Small networks with attention, one of each kind, and heads cut out of them by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import (
    PatchMergingV2,
    SwinTransformerBlockV2,
)

from worm_dist.groups.attention import find_attentions, weight_of
from worm_dist.pruning.attention_heads import keep_heads

__all__ = ["KINDS", "built", "inputs_of", "without_heads"]

_Inputs = tuple[Any, ...]


class Attending(nn.Module):
    """One attention, with whatever options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(*args, **options)

    def forward(self, *inputs: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
        output: tuple[Tensor, Tensor | None] = self.attention(*inputs, **options)
        return output


def _encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0, batch_first=True)
    return nn.TransformerEncoder(layer, 2)


def _transformer() -> nn.Module:
    return nn.Transformer(16, 4, 1, 2, 24, dropout=0, batch_first=True)


def _torchvision_vit() -> nn.Module:
    network: nn.Module = VisionTransformer(8, 4, 2, 4, 16, 24, num_classes=5)
    return network


def _swin(**options: Any) -> nn.Module:
    network: nn.Module = SwinTransformer(
        [2, 2], 12, [2, 2], [3, 6], [3, 2], stochastic_depth_prob=0, num_classes=5, **options
    )
    return network


def _swin_v2() -> nn.Module:
    return _swin(block=SwinTransformerBlockV2, downsample_layer=PatchMergingV2)


def _timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm.models.vision_transformer")
    network: nn.Module = timm.VisionTransformer(
        8, 4, embed_dim=16, depth=2, num_heads=4, num_classes=5, qk_norm=True
    )
    return network


def _timm_swin() -> nn.Module:
    timm = pytest.importorskip("timm.models.swin_transformer")
    network: nn.Module = timm.SwinTransformer(
        16, 2, embed_dim=12, depths=(2, 2), num_heads=(3, 6), window_size=2, num_classes=5,
        drop_path_rate=0,
    )  # fmt: skip
    return network


_SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def _bert() -> nn.Module:
    bert = pytest.importorskip("transformers.models.bert")
    network: nn.Module = bert.BertModel(bert.BertConfig(vocab_size=30, **_SIZES))
    return network


def _hugging_face_vit() -> nn.Module:
    vit = pytest.importorskip("transformers.models.vit")
    network: nn.Module = vit.ViTModel(vit.ViTConfig(image_size=8, patch_size=4, **_SIZES))
    return network


def _clip() -> nn.Module:
    clip = pytest.importorskip("transformers.models.clip")
    config = clip.CLIPVisionConfig(image_size=8, patch_size=4, **_SIZES)
    network: nn.Module = clip.CLIPVisionModel(config)
    return network


def _distilbert() -> nn.Module:
    distilbert = pytest.importorskip("transformers.models.distilbert")
    config = distilbert.DistilBertConfig(
        vocab_size=30, dim=16, n_layers=2, n_heads=4, hidden_dim=24, dropout=0, attention_dropout=0
    )
    network: nn.Module = distilbert.DistilBertModel(config)
    return network


KINDS: Mapping[str, tuple[Callable[[], nn.Module], Callable[[], _Inputs]]] = {
    "attention": (lambda: Attending(12, 3), lambda: (_tokens(5, 2, 12),) * 3),
    "attention of three": (
        lambda: Attending(12, 3, bias=False, batch_first=True, kdim=7, vdim=5),
        lambda: (_tokens(2, 4, 12), _tokens(2, 6, 7), _tokens(2, 6, 5)),
    ),
    "attention with more keys": (
        lambda: Attending(12, 3, add_bias_kv=True, add_zero_attn=True, kdim=7),
        lambda: (_tokens(4, 2, 12), _tokens(6, 2, 7), _tokens(6, 2, 12)),
    ),
    "encoder": (_encoder, lambda: (_tokens(2, 5, 16),)),
    "transformer": (_transformer, lambda: (_tokens(2, 5, 16), _tokens(2, 4, 16))),
    "torchvision ViT": (_torchvision_vit, lambda: (_tokens(2, 3, 8, 8),)),
    "Swin": (_swin, lambda: (_tokens(2, 3, 14, 10),)),
    "Swin v2": (_swin_v2, lambda: (_tokens(2, 3, 14, 10),)),
    "timm ViT": (_timm_vit, lambda: (_tokens(2, 3, 8, 8),)),
    "timm Swin": (_timm_swin, lambda: (_tokens(2, 3, 16, 16),)),
    "BERT": (_bert, lambda: (_words(2, 6),)),
    "DistilBERT": (_distilbert, lambda: (_words(2, 6),)),
    "Hugging Face ViT": (_hugging_face_vit, lambda: (_tokens(2, 3, 8, 8),)),
    "CLIP": (_clip, lambda: (_tokens(2, 3, 8, 8),)),
}
"""By name: a network, and positional inputs for it."""


def built(kind: str) -> nn.Module:
    """In double precision, and no two of its parameters are alike."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = KINDS[kind][0]().double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in network.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.mul_(0.5).add_(noise, alpha=0.3)
    return network


def inputs_of(kind: str) -> _Inputs:
    return KINDS[kind][1]()


@torch.no_grad()
def without_heads(
    network: nn.Module, kept: Mapping[str, Tensor]
) -> tuple[nn.Module, dict[str, dict[int, Tensor]]]:
    """A copy without the heads that ``kept``, bool ``[heads]`` by attention, does not keep.

    Returns:
        The copy; and for every parameter cut, which places are left along which dimension.
    """
    cut = copy.deepcopy(network)
    places: dict[str, dict[int, Tensor]] = {}
    for attention in find_attentions(network)[0]:
        keep = kept[attention.module]
        for _, positions, parameters in attention.producers:
            for name, dim in parameters:
                places.setdefault(name, {})[dim] = positions[keep].flatten().sort().values
        weight = weight_of(network, attention.reader)
        places[weight] = {1: attention.columns[keep].flatten()}
        if weight.endswith("original"):
            gate = f"{attention.reader}.parametrizations.weight.0.scale"
            places[gate] = {0: keep.nonzero().flatten()}
    for name, left in places.items():
        parent, _, attribute = name.rpartition(".")
        tensor: Tensor = cut.get_parameter(name)
        for dim, at in left.items():
            tensor = tensor.index_select(dim, at)
        setattr(cut.get_submodule(parent), attribute, nn.Parameter(tensor))
    for name, keep in kept.items():
        keep_heads(cut, name, int(keep.sum()))
    return cut, places


def _tokens(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _words(*shape: int) -> Tensor:
    return torch.randint(30, shape, generator=torch.Generator().manual_seed(2))
