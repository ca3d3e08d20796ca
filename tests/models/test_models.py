from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from worm_dist.errors import ConfigError
from worm_dist.models import build_model


def _num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "in_channels", "num_parameters"),
    [
        ("vgg_small", 1, 288_170),
        ("vgg11_bn", 3, 9_228_362),
        ("resnet18", 3, 11_173_962),
        # The paper's 0.27 and 0.85 million, and the 1x1 convolutions of two shortcuts (2752).
        ("resnet20", 3, 269_722 + 2_752),
        ("resnet56", 3, 853_018 + 2_752),
        ("preresnet20", 3, 219_482),
        ("preresnet101", 3, 1_054_106),
        ("torchvision/resnet18", 3, 11_181_642),
        ("vit_small", 1, 114_778),
    ],
)
def test_sizes_are_the_published_ones(name: str, in_channels: int, num_parameters: int) -> None:
    assert _num_parameters(build_model(name, 10, in_channels)) == num_parameters


@pytest.mark.parametrize(
    ("name", "in_channels", "side"),
    [
        ("vgg_small", 1, 8),
        ("vgg_small", 1, 28),
        ("vgg11_bn", 3, 32),
        ("resnet18", 3, 32),
        ("resnet20", 3, 32),
        ("resnet56", 1, 28),
        ("preresnet20", 3, 32),
        ("mobilenet_v3_small", 3, 32),
        ("vit_small", 1, 8),
        ("vit_small", 3, 8),
    ],
)
def test_images_become_logits(name: str, in_channels: int, side: int) -> None:
    model = build_model(name, 7, in_channels)
    logits = model(torch.randn(2, in_channels, side, side))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "resnet20", "resnet56", "preresnet20"])
def test_residual_stem_keeps_the_image_and_later_stages_halve_it(name: str) -> None:
    model = build_model(name, 10, 3)
    sides: list[int] = []
    for stage in model.get_submodule("stages").children():
        stage.register_forward_hook(lambda _module, _inputs, output: sides.append(output.shape[-1]))
    model(torch.randn(1, 3, 32, 32))
    assert sides == [32 >> number for number in range(len(sides))]


def test_same_seed_builds_the_same_network() -> None:
    def first_weight(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return next(build_model("resnet20", 10, 3).parameters()).detach()

    assert torch.equal(first_weight(1), first_weight(1))
    assert not torch.equal(first_weight(1), first_weight(2))


def test_convolutions_start_kaiming_normal_and_norms_start_neutral() -> None:
    torch.manual_seed(0)
    for module in build_model("vgg11_bn", 10, 3).modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            expected = (2 / (module.out_channels * 9)) ** 0.5
            assert module.weight.std().item() == pytest.approx(expected, rel=0.1)
        elif isinstance(module, nn.BatchNorm2d):
            assert torch.all(module.weight == 1) and torch.all(module.bias == 0)


def test_widths_are_an_argument_of_vgg_small() -> None:
    model = build_model("vgg_small", 10, 1, {"widths": [4, "M", 8]})
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert [convolution.out_channels for convolution in convolutions] == [4, 8]


def test_sides_of_images_and_patches_are_arguments_of_vit_small() -> None:
    model = build_model("vit_small", 10, 1, {"image_size": 28, "patch_size": 4})
    tokens = model.get_parameter("encoder.pos_embedding")
    assert tokens.shape == (1, 7 * 7 + 1, 48)
    assert model(torch.randn(2, 1, 28, 28)).shape == (2, 10)


def test_prefix_reaches_the_torchvision_network_of_the_same_name() -> None:
    assert type(build_model("torchvision/resnet18", 10, 3)).__module__.startswith("torchvision")
    assert type(build_model("resnet18", 10, 3)).__module__.startswith("worm_dist")


@pytest.mark.parametrize(
    ("name", "in_channels", "arguments", "message"),
    [
        ("vgg_smal", 1, {}, r"^model\.name: there is no 'vgg_smal'; did you mean vgg_small\?$"),
        ("resnet51", 3, {}, r"^model\.name: .* did you mean resnet"),
        ("qqq", 3, {}, r"^model\.name: there is no 'qqq'; take one of vgg_small"),
        ("torchvision/resnet20", 3, {}, r"^model\.name: .* did you mean torchvision/resnet"),
        # A detection network of torchvision is no classifier.
        ("fasterrcnn_resnet50_fpn", 3, {}, r"^model\.name: there is no"),
        ("resnet50", 1, {}, r"^model\.name: .*takes images of 3 channels, the data has 1"),
        ("resnet20", 3, {"depth": 3}, r"^model\.arguments: .*unexpected keyword argument 'depth'"),
        ("resnet50", 3, {"depth": 3}, r"^model\.arguments: .*unexpected keyword argument 'depth'"),
        ("resnet50", 3, {"norm_layer": "bn"}, r"^model\.arguments: "),
        ("resnet50", 3, {"weights": "DEFAULT"}, r"^model\.arguments: remove weights"),
        ("vgg_small", 1, {"num_classes": 3}, r"^model\.arguments: remove num_classes"),
        ("inception_v3", 3, {"init_weights": False}, r"^model\.arguments: .*aux_logits: false"),
    ],
)
def test_mistakes_are_named(
    name: str, in_channels: int, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model(name, 10, in_channels, arguments)


@pytest.mark.parametrize("widths", [[], ["M"], [0], [32, "m"], [32, True], [32.0], "M", 32, None])
def test_widths_that_describe_no_network_are_refused(widths: Any) -> None:
    with pytest.raises(ConfigError, match=r"^model\.arguments\.widths: "):
        build_model("vgg_small", 10, 1, {"widths": widths})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"num_layers": 0},
            r"^model\.arguments\.num_layers: must be a whole number above 0, got 0",
        ),
        (
            {"mlp_dim": 1.5},
            r"^model\.arguments\.mlp_dim: must be a whole number above 0, got 1",
        ),
        ({"patch_size": 3}, r"^model\.arguments\.image_size: must be a multiple of patch_size 3"),
        ({"num_heads": 5}, r"^model\.arguments\.hidden_dim: must be a multiple of num_heads 5"),
        ({"dropout": 2}, r"^model\.arguments: 'vit_small' does not take .*dropout"),
    ],
)
def test_arguments_that_describe_no_transformer_are_refused(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build_model("vit_small", 10, 1, arguments)
