"""Families: every architecture that is searched, and what has to stay dense of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchvision import models

from tests import attending
from tests.families import members, nets
from tests.nets import Concatenating, Flattening
from worm_dist import add_gates

__all__ = ["FAMILIES", "Family"]

Inputs = tuple[Any, ...] | dict[str, Any]

_UNNORMED = "it has neither a norm nor a gate; search.importance 'weight_norm' ranks it without"
_LAYER_NORM = r"LayerNorm(2d)?: of all norms only BatchNorm's channels are dropped"
_IS_OUTPUT = "its channels are outputs of the network"
_UNCALLED = "it is never called, or not as a module"
_ALL_OR_NONE = "none of its channels can be dropped without all others"


@dataclass(frozen=True)
class Family:
    """One architecture.

    Attributes:
        make: the network, freshly initialised.
        draw_inputs: a batch for it, from a generator.
        score: what ranks its channels.
        dense: patterns of modules that stay dense, each with a regular expression for the reason.
        large: looked at only when asked for; a smaller one of its kind is there.
    """

    make: Callable[[], nn.Module]
    draw_inputs: Callable[[torch.Generator], Inputs]
    score: Literal["auto", "weight_norm"] = "auto"
    dense: Mapping[str, str] = field(default_factory=dict)
    large: bool = False

    def built(self) -> nn.Module:
        """In double precision, unless it is large."""
        torch.manual_seed(0)
        return self.make().to(self.dtype)

    def inputs(self, seed: int) -> Inputs:
        drawn = self.draw_inputs(torch.Generator().manual_seed(seed))
        if isinstance(drawn, dict):
            return {name: self._cast(each) for name, each in drawn.items()}
        return tuple(map(self._cast, drawn))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.large else torch.float64

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _random(*shape: int) -> Callable[[torch.Generator], Inputs]:
    return lambda generator: (torch.randn(shape, generator=generator),)


def _images(side: int) -> Callable[[torch.Generator], Inputs]:
    return _random(2, 3, side, side)


def _named(name: str, side: int, large: bool = True, **options: Any) -> Family:
    """One of torchvision's, by its name."""
    given = {key: options.pop(key) for key in ("score", "dense") if key in options}
    make = partial(models.get_model, name, weights=None, num_classes=5, **options)
    return Family(make, _images(side), large=large, **given)


def _facts(generator: torch.Generator) -> Inputs:
    images = torch.randn(2, 3, 8, 8, generator=generator)
    return {"images": images, "facts": torch.randn(2, 6, generator=generator)}


def _gated(make: Callable[[], nn.Module], inputs: Any, large: bool = False) -> Family:
    return Family(lambda: add_gates(make()), inputs, dense={"*": _LAYER_NORM}, large=large)


def _attending(kind: str) -> Family:
    return _gated(partial(attending.built, kind), lambda _: attending.inputs_of(kind))


OWN: Mapping[str, Family] = {
    "a flatten": Family(Flattening, _images(8)),
    "concatenation": Family(Concatenating, _images(8)),
    "grouped and depthwise": Family(nets.Grouped, _images(8)),
    "a multiplied depthwise": Family(
        nets.Multiplied, _images(8), dense={"inner.1": r".* has one channel in each group"}
    ),
    "channel shuffle": Family(nets.Shuffling, _images(8)),
    "channel split": Family(nets.Splitting, _images(8)),
    "squeeze-and-excitation": Family(nets.Squeezing, _images(8), score="weight_norm"),
    "two inputs": Family(nets.TwoInputs, _facts),
    "nested outputs": Family(nets.DictOutputs, _images(8), dense={"shown.1": _IS_OUTPUT}),
    "1-d": Family(nets.OneDimensional, _random(2, 2, 32)),
    "3-d": Family(nets.ThreeDimensional, _random(2, 1, 4, 4, 4)),
    "a ModuleList": Family(nets.ListOfLayers, _images(8), dense={"heads.idle": _UNCALLED}),
    "a convolution used twice": Family(nets.Recurring, _images(8)),
    "PReLU": Family(nets.Parametric, _images(8)),
    "PReLU without norms": Family(nets.Parametric, _images(8), score="weight_norm"),
    "no norms": Family(nets.Normless, _images(8), score="weight_norm"),
    "pre-activation": Family(nets.PreActivated, _images(8)),
    "U-Net": Family(nets.UNet, _images(8), dense={"up2": _UNNORMED}),
    "sub-pixel upsampling": Family(nets.SubPixel, _images(8)),
}

_SE = {"*.fc1": _UNNORMED}
_CLASSIFIER = {"classifier.?": _UNNORMED}
_SE_BN = _SE | _CLASSIFIER
_LATERAL = {"fpn.inner_blocks.?.0": _UNNORMED}
_SHUFFLED = {"stage?.*": _ALL_OR_NONE}

SMALL: Mapping[str, Family] = {
    "resnet18": _named("resnet18", 32, large=False),
    "resnext, small": Family(members.resnext, _images(32)),
    "wide_resnet, small": Family(members.wide_resnet, _images(32)),
    "vgg, small": Family(members.vgg, _images(16), score="weight_norm"),
    "vgg with BN, small": Family(partial(members.vgg, True), _images(16), dense=_CLASSIFIER),
    "densenet, small": Family(members.densenet, _images(32)),
    "mobilenet_v2": _named("mobilenet_v2", 32, large=False, width_mult=0.5),
    "mobilenet_v3_small": _named(
        "mobilenet_v3_small", 32, large=False, width_mult=0.5, dense=_SE_BN
    ),
    "efficientnet, small": Family(members.efficientnet, _images(32), score="weight_norm"),
    "efficientnet_v2, small": Family(members.efficientnet_v2, _images(32), dense=_SE),
    "regnet_x, small": Family(members.regnet, _images(32)),
    "regnet_y, small": Family(partial(members.regnet, 0.25), _images(32), score="weight_norm"),
    "shufflenet_v2_x0_5": _named("shufflenet_v2_x0_5", 32, large=False, dense=_SHUFFLED),
    "googlenet": Family(members.googlenet, _images(64), dense={"aux?.fc1": _UNNORMED}),
    "mnasnet0_5": _named("mnasnet0_5", 32, large=False),
    "squeezenet1_1": _named("squeezenet1_1", 32, large=False, score="weight_norm"),
    "convnext, small": _gated(members.convnext, _images(32)),
    "ViT, small": _attending("torchvision ViT"),
    "Swin, small": _attending("Swin"),
    "Swin v2, small": _attending("Swin v2"),
    "FCN, small": Family(members.fcn, _images(32)),
    "DeepLab v3, small": Family(members.deeplab, _images(32)),
    "FPN, small": Family(members.fpn, _images(32), dense=_LATERAL),
    "nn.TransformerEncoder": _attending("encoder"),
    "nn.Transformer": _attending("transformer"),
    "timm ViT": _attending("timm ViT"),
    "timm Swin": _attending("timm Swin"),
    "Hugging Face BERT": _attending("BERT"),
    "Hugging Face DistilBERT": _attending("DistilBERT"),
    "Hugging Face ViT": _attending("Hugging Face ViT"),
    "Hugging Face CLIP": _attending("CLIP"),
    "heads by their weights": Family(
        partial(attending.built, "encoder"),
        lambda _: attending.inputs_of("encoder"),
        score="weight_norm",
        dense={"*": _LAYER_NORM},
    ),
}

LARGE: Mapping[str, Family] = {
    **{
        name: _named(name, 64)
        for name in (
            "resnet34",
            "resnet50",
            "resnet101",
            "resnet152",
            "wide_resnet50_2",
            "resnext50_32x4d",
            "resnext101_32x8d",
        )
    },
    "vgg11": _named("vgg11", 64, score="weight_norm"),
    "vgg16": _named("vgg16", 64, score="weight_norm"),
    "vgg16_bn": _named("vgg16_bn", 64, dense=_CLASSIFIER),
    "vgg19_bn": _named("vgg19_bn", 64, dense=_CLASSIFIER),
    "densenet121": _named("densenet121", 64),
    "densenet201": _named("densenet201", 64),
    "mobilenet_v3_large": _named("mobilenet_v3_large", 64, score="weight_norm"),
    "efficientnet_b0": _named("efficientnet_b0", 64, dense=_SE),
    "efficientnet_v2_s": _named("efficientnet_v2_s", 64, score="weight_norm"),
    "regnet_x_400mf": _named("regnet_x_400mf", 64),
    "regnet_y_400mf": _named("regnet_y_400mf", 64, dense=_SE),
    "shufflenet_v2_x1_0": _named("shufflenet_v2_x1_0", 64, dense=_SHUFFLED),
    "inception_v3": Family(members.inception, _images(299), large=True),
    "mnasnet1_0": _named("mnasnet1_0", 64),
    "convnext_tiny": _gated(
        partial(models.convnext_tiny, num_classes=5, layer_scale=0.5), _images(64), large=True
    ),
    "vit_b_16": _gated(partial(models.vit_b_16, num_classes=5), _images(224), large=True),
    "swin_t": _gated(partial(models.swin_t, num_classes=5), _images(64), large=True),
    "swin_v2_t": _gated(partial(models.swin_v2_t, num_classes=5), _images(64), large=True),
    "fcn_resnet50": Family(
        partial(
            models.segmentation.fcn_resnet50, weights_backbone=None, num_classes=5, aux_loss=True
        ),
        _images(64),
        large=True,
    ),
    "deeplabv3_resnet50": Family(
        partial(models.segmentation.deeplabv3_resnet50, weights_backbone=None, num_classes=5),
        _images(64),
        large=True,
    ),
    "resnet_fpn_backbone": Family(members.fpn_of_resnet18, _images(64), dense=_LATERAL, large=True),
}

FAMILIES: Mapping[str, Family] = {**SMALL, **LARGE, **OWN}
