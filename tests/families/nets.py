"""Networks of their own making: what users write that is in no library."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import SqueezeExcitation

__all__ = [
    "DictOutputs",
    "Grouped",
    "ListOfLayers",
    "Multiplied",
    "Normless",
    "OneDimensional",
    "Parametric",
    "PreActivated",
    "Recurring",
    "Shuffling",
    "Splitting",
    "Squeezing",
    "SubPixel",
    "ThreeDimensional",
    "TwoInputs",
    "UNet",
]


def _conv(inputs: int, outputs: int, kernel: int = 3, **options: Any) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False, **options),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def _pooled(images: Tensor) -> Tensor:
    return images.mean(dim=(2, 3))


class Grouped(nn.Module):
    """Convolutions of four groups and of two, one after the other, and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 16)
        self.four = _conv(16, 24, groups=4)
        self.two = _conv(24, 12, groups=2)
        self.depthwise = _conv(12, 12, groups=12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        grouped = self.two(self.four(self.stem(images)))
        logits: Tensor = self.head(_pooled(self.depthwise(grouped)))
        return logits


class Multiplied(nn.Module):
    """A depthwise convolution that makes two channels of each."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.inner = _conv(8, 8)
        self.twice = _conv(8, 16, groups=8)
        self.head = nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(_pooled(self.twice(self.inner(self.stem(images)))))
        return logits


class Shuffling(nn.Module):
    """ShuffleNet's first version: what one grouped convolution put out is dealt to all groups of
    the next."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 12)
        self.squeeze = _conv(12, 18, 1, groups=3)
        self.shuffle = nn.ChannelShuffle(3)
        self.depthwise = _conv(18, 18, groups=18)
        self.expand = _conv(18, 12, 1, groups=3)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        inner = self.depthwise(self.shuffle(self.squeeze(features)))
        logits: Tensor = self.head(_pooled(features + self.expand(inner)))
        return logits


class Splitting(nn.Module):
    """Half of the channels take another way."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 12)
        self.left = _conv(6, 6)
        self.right = _conv(6, 8)
        self.last = _conv(14, 10)
        self.head = nn.Linear(10, 5)

    def forward(self, images: Tensor) -> Tensor:
        left, right = self.stem(images).chunk(2, dim=1)
        both = torch.cat([self.left(left), self.right(right)], dim=1)
        logits: Tensor = self.head(_pooled(self.last(both)))
        return logits


class Squeezing(nn.Module):
    """Squeeze-and-excitation: a factor for every channel, made of all channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 12)
        self.excite = SqueezeExcitation(12, 6)
        self.inner = _conv(12, 12)
        self.down = nn.Linear(12, 5)
        self.up = nn.Linear(5, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.excite(self.stem(images))
        inner = self.inner(features)
        factors = torch.sigmoid(self.up(torch.relu(self.down(_pooled(inner)))))
        logits: Tensor = self.head(_pooled(features + inner * factors[:, :, None, None]))
        return logits


class TwoInputs(nn.Module):
    """Images and a vector go in by keyword; logits and an image come out."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 10)
        self.embed = nn.Sequential(nn.Linear(6, 10, bias=False), nn.BatchNorm1d(10), nn.ReLU())
        self.joint = _conv(10, 8)
        self.head = nn.Linear(18, 5)
        self.paint = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor, facts: Tensor) -> tuple[Tensor, Tensor]:
        known = self.embed(facts)
        joint = self.joint(self.stem(images) * known[:, :, None, None])
        return self.head(torch.cat([_pooled(joint), known], dim=1)), self.paint(joint)


class DictOutputs(nn.Module):
    """Nested outputs, some of which are no tensors, and features that nothing else reads."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 10)
        self.inner = _conv(10, 8)
        self.shown = _conv(8, 6)
        self.head = nn.Linear(8, 5)

    def forward(self, images: Tensor) -> dict[str, object]:
        inner = self.inner(self.stem(images))
        logits = self.head(_pooled(inner))
        return {
            "logits": logits,
            "best": logits.argmax(dim=1),
            "more": {"features": [self.shown(inner)], "side": images.shape[-1]},
        }


class OneDimensional(nn.Module):
    """Sound: convolutions along time, and a linear head behind a flatten."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(2, 8, 5, stride=2),
            nn.BatchNorm1d(8),
            nn.ReLU(),
            nn.Conv1d(8, 12, 3, groups=4),
            nn.BatchNorm1d(12),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(4),
            nn.Flatten(),
            nn.Linear(48, 10),
            nn.BatchNorm1d(10),
            nn.ReLU(),
            nn.Linear(10, 5),
        )

    def forward(self, sound: Tensor) -> Tensor:
        logits: Tensor = self.layers(sound)
        return logits


class ThreeDimensional(nn.Module):
    """Video, with a residual sum and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv3d(1, 8, 3, padding=1)
        self.norm1 = nn.BatchNorm3d(8)
        self.inner = nn.Conv3d(8, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm3d(8)
        self.up = nn.ConvTranspose3d(8, 6, 2, stride=2)
        self.norm3 = nn.BatchNorm3d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, video: Tensor) -> Tensor:
        features = torch.relu(self.norm1(self.stem(video)))
        features = torch.relu(features + self.norm2(self.inner(features)))
        large = torch.relu(self.norm3(self.up(features)))
        logits: Tensor = self.head(large.mean(dim=(2, 3, 4)))
        return logits


class ListOfLayers(nn.Module):
    """A ModuleList of blocks and a ModuleDict of heads, of which one is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 10)
        self.blocks = nn.ModuleList(_conv(10, 10) for _ in range(3))
        self.heads = nn.ModuleDict({name: nn.Linear(10, 5) for name in ("fine", "coarse")})
        self.heads["idle"] = nn.Linear(12, 5)  # as wide as nothing else

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = self.stem(images)
        for block in self.blocks:
            features = features + block(features)
        return tuple(self.heads[name](_pooled(features)) for name in ("fine", "coarse"))


class Recurring(nn.Module):
    """One convolution used twice, with a norm for each time."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.shared = nn.Conv2d(8, 8, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8), nn.BatchNorm2d(8)])
        self.last = _conv(8, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for norm in self.norms:
            features = torch.relu(norm(self.shared(features)))
        logits: Tensor = self.head(_pooled(self.last(features)))
        return logits


class Parametric(nn.Module):
    """PReLU with a slope for each channel, and one with a slope for all."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.PReLU(8),
            nn.Conv2d(8, 10, 3, padding=1),
            nn.BatchNorm2d(10),
            nn.PReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(10, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class Normless(nn.Module):
    """Convolutions and linear layers without a single norm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 10, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(40, 12),
            nn.ReLU(),
            nn.Linear(12, 5),
        )

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.layers(images)
        return logits


class PreActivated(nn.Module):
    """Norms in front of the convolutions: several norms read one residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 10, 3, padding=1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(10) for _ in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(10, 10, 3, padding=1) for _ in range(2))
        self.head = nn.Linear(10, 5)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for norm, conv in zip(self.norms, self.convs):
            features = features + conv(torch.relu(norm(features)))
        logits: Tensor = self.head(_pooled(torch.relu(self.norms[-1](features))))
        return logits


class UNet(nn.Module):
    """Down and up again; features of the way down are joined by concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.down1 = _conv(3, 8)
        self.down2 = _conv(8, 12)
        self.bottom = _conv(12, 16)
        self.up2 = nn.ConvTranspose2d(16, 12, 2, stride=2)
        self.join2 = _conv(24, 12)
        self.join1 = _conv(20, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.down1(images)
        second = self.down2(nn.functional.max_pool2d(first, 2))
        bottom = self.bottom(nn.functional.max_pool2d(second, 2))
        joined = self.join2(torch.cat([self.up2(bottom), second], dim=1))
        large = nn.functional.interpolate(joined, scale_factor=2)
        painted: Tensor = self.head(self.join1(torch.cat([first, large], dim=1)))
        return painted


class SubPixel(nn.Module):
    """Channels become pixels; the image goes by beside the features, in front of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _conv(3, 8)
        self.deep = _conv(8, 24)
        self.shuffle = nn.PixelShuffle(2)
        self.last = _conv(9, 8)
        self.head = nn.Conv2d(8, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        large = self.shuffle(self.deep(self.stem(images)))
        beside = nn.functional.interpolate(images, scale_factor=2)
        painted: Tensor = self.head(self.last(torch.cat([beside, large], dim=1)))
        return painted
