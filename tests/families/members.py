"""Members: small networks of torchvision's families, of the same code as the large ones."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torchvision.models import (
    VGG,
    ConvNeXt,
    DenseNet,
    EfficientNet,
    GoogLeNet,
    Inception3,
    RegNet,
    ResNet,
)
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.detection.backbone_utils import BackboneWithFPN, resnet_fpn_backbone
from torchvision.models.efficientnet import FusedMBConvConfig, MBConvConfig
from torchvision.models.regnet import BlockParams
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.models.vgg import make_layers

__all__ = [
    "convnext",
    "deeplab",
    "densenet",
    "efficientnet",
    "efficientnet_v2",
    "fcn",
    "fpn",
    "fpn_of_resnet18",
    "googlenet",
    "inception",
    "regnet",
    "resnext",
    "vgg",
    "wide_resnet",
]


def resnext() -> nn.Module:
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=32, width_per_group=4)


def wide_resnet() -> nn.Module:
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, width_per_group=96)


def vgg(batch_norm: bool = False) -> nn.Module:
    features = make_layers([8, "M", 12, 12, "M", 16, "M"], batch_norm=batch_norm)
    network = VGG(features, num_classes=5, init_weights=False)
    # Without this it has a hundred million weights, however few channels its features have.
    network.classifier = nn.Sequential(
        nn.Linear(16 * 7 * 7, 24),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(24, 20),
        nn.ReLU(True),
        nn.Dropout(),
        nn.Linear(20, 5),
    )
    return network


def densenet() -> nn.Module:
    return DenseNet(8, (2, 3, 2), 16, num_classes=5)


def efficientnet() -> nn.Module:
    block = partial(MBConvConfig, width_mult=0.5, depth_mult=1.0)
    blocks = [block(1, 3, 1, 32, 16, 1), block(6, 3, 2, 16, 24, 2), block(6, 5, 2, 24, 40, 2)]
    return EfficientNet(blocks, dropout=0.2, num_classes=5)


def efficientnet_v2() -> nn.Module:
    blocks = [
        FusedMBConvConfig(1, 3, 1, 16, 16, 2),
        FusedMBConvConfig(4, 3, 2, 16, 24, 2),
        MBConvConfig(4, 3, 2, 24, 32, 2),
    ]
    return EfficientNet(blocks, dropout=0.2, num_classes=5, last_channel=64)


def regnet(se_ratio: float | None = None) -> nn.Module:
    params = BlockParams.from_init_params(
        depth=6, w_0=16, w_a=16.0, w_m=2.0, group_width=8, se_ratio=se_ratio
    )
    return RegNet(params, num_classes=5, stem_width=16)


def googlenet() -> nn.Module:
    return GoogLeNet(num_classes=5, aux_logits=True, init_weights=False)


def inception() -> nn.Module:
    return Inception3(num_classes=5, aux_logits=True, init_weights=False)


def convnext() -> nn.Module:
    blocks = [CNBlockConfig(16, 24, 2), CNBlockConfig(24, None, 2)]
    # With the usual 1e-6 nothing that a block does could be seen in the output.
    return ConvNeXt(blocks, layer_scale=0.5, num_classes=5)


def _features(layers: dict[str, str]) -> tuple[nn.Module, int]:
    """A ResNet's features, and how many channels the last have."""
    network = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    return IntermediateLayerGetter(network, return_layers=layers), 512


def fcn() -> nn.Module:
    backbone, width = _features({"layer4": "out", "layer3": "aux"})
    return FCN(backbone, FCNHead(width, 5), FCNHead(width // 2, 5))


def deeplab() -> nn.Module:
    backbone, width = _features({"layer4": "out"})
    return DeepLabV3(backbone, DeepLabHead(width, 5, (1, 2, 3)))


def fpn() -> nn.Module:
    widths = {"layer1": 64, "layer2": 128, "layer3": 256}
    network: Any = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)
    layers = {layer: str(number) for number, layer in enumerate(widths)}
    return BackboneWithFPN(network, layers, list(widths.values()), 32)


def fpn_of_resnet18() -> nn.Module:
    network: nn.Module = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, norm_layer=nn.BatchNorm2d, trainable_layers=5
    )
    return network
