"""Small networks, one for each way in which channels hang together."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from worm_dist.groups.gates import Gate, add_gates

__all__ = [
    "Attentive",
    "Concatenating",
    "Flattening",
    "Grouped",
    "Normless",
    "Plain",
    "Residual",
    "Separable",
    "Stacking",
    "Upsampling",
    "gated",
    "random_images",
    "randomise",
]


def random_images(batch: int, channels: int = 3, side: int = 8, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, side, side, generator=generator)


def randomise(network: nn.Module, seed: int) -> None:
    """Give norms scales, shifts and statistics, and gates factors, as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                if module.affine:
                    module.weight.uniform_(0.2, 2, generator=generator)
                    module.bias.uniform_(-0.5, 0.5, generator=generator)
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.uniform_(-0.5, 0.5, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
        elif isinstance(module, Gate):
            with torch.no_grad():
                module.scale.uniform_(0.3, 2, generator=generator)


class Plain(nn.Module):
    """conv - norm - relu, twice, and a linear head behind a global pool."""

    def __init__(self, first: int = 6, second: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, first, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(first)
        self.conv2 = nn.Conv2d(first, second, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(second)
        self.head = nn.Linear(second, 10)

    def forward(self, images: Tensor) -> Tensor:
        inner = torch.relu(self.bn1(self.conv1(images)))
        outer = torch.relu(self.bn2(self.conv2(inner)))
        logits: Tensor = self.head(outer.mean(dim=(2, 3)))
        return logits


class Residual(nn.Module):
    """A stem whose channels a residual sum ties to those of the block's second convolution."""

    def __init__(self, width: int = 8, inner: int = 6) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, inner, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.head = nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.bn0(self.stem(images)))
        inner = torch.relu(self.bn1(self.conv1(features)))
        outer = torch.relu(features + self.bn2(self.conv2(inner)))
        logits: Tensor = self.head(outer.mean(dim=(2, 3)))
        return logits


class Flattening(nn.Module):
    """Every channel becomes ``side * side`` inputs of the linear layer."""

    def __init__(self, width: int = 6, side: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.bn = nn.BatchNorm2d(width)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.hidden = nn.Linear(width * side * side, 12)
        self.bn_hidden = nn.BatchNorm1d(12)
        self.dropout = nn.Dropout(0.5)
        self.head = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = self.pool(torch.relu(self.bn(self.conv(images))))
        hidden = torch.relu(self.bn_hidden(self.hidden(torch.flatten(features, 1))))
        logits: Tensor = self.head(self.dropout(hidden))
        return logits


class Separable(nn.Module):
    """A depthwise convolution between two pointwise ones, as in MobileNet."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.expand = nn.Conv2d(3, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.project = nn.Conv2d(width, 6, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        wide = torch.relu(self.bn1(self.expand(images)))
        wide = torch.relu(self.bn2(self.depthwise(wide)))
        logits: Tensor = self.head(torch.relu(self.bn3(self.project(wide))).mean(dim=(2, 3)))
        return logits


class Concatenating(nn.Module):
    """The second layer's channels lie behind the first one's, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(6)
        self.conv3 = nn.Conv2d(10, 5, 3, padding=1)
        self.bn3 = nn.BatchNorm2d(5)
        self.head = nn.Linear(5, 10)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.bn1(self.conv1(images)))
        second = torch.relu(self.bn2(self.conv2(first)))
        both = torch.cat([first, second], dim=1)
        logits: Tensor = self.head(torch.relu(self.bn3(self.conv3(both))).mean(dim=(2, 3)))
        return logits


class Upsampling(nn.Module):
    """A transposed convolution: its weight has the inputs first."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(6)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.bn2 = nn.BatchNorm2d(4)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, images: Tensor) -> Tensor:
        small = torch.relu(self.bn1(self.down(images)))
        image: Tensor = self.head(torch.relu(self.bn2(self.up(small))))
        return image


class Stacking(nn.Module):
    """Every norm is behind a concatenation, as in DenseNet: the first layer has scales in three."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 5, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(5)
        self.conv2 = nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(9)
        self.conv3 = nn.Conv2d(9, 5, 3, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(14)
        self.head = nn.Linear(14, 10)

    def forward(self, images: Tensor) -> Tensor:
        one = self.conv1(images)
        two = torch.cat([one, self.conv2(torch.relu(self.bn1(one)))], dim=1)
        three = torch.cat([two, self.conv3(torch.relu(self.bn2(two)))], dim=1)
        logits: Tensor = self.head(torch.relu(self.bn3(three)).mean(dim=(2, 3)))
        return logits


class Grouped(nn.Module):
    """A residual block around a convolution in two groups, as in ResNeXt."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn0 = nn.BatchNorm2d(6)
        self.conv1 = nn.Conv2d(6, 8, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(12)
        self.conv3 = nn.Conv2d(12, 6, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.bn0(self.stem(images)))
        inner = torch.relu(self.bn1(self.conv1(features)))
        inner = torch.relu(self.bn2(self.conv2(inner)))
        outer = torch.relu(features + self.bn3(self.conv3(inner)))
        logits: Tensor = self.head(outer.mean(dim=(2, 3)))
        return logits


class Normless(nn.Module):
    """Convolutions, one of them transposed, and a hidden layer, without any norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 5, 2, stride=2)
        self.conv = nn.Conv2d(5, 4, 3, padding=1, bias=False)
        self.hidden = nn.Linear(4, 7)
        self.head = nn.Linear(7, 10)

    def forward(self, images: Tensor) -> Tensor:
        features = torch.relu(self.up(torch.relu(self.down(images))))
        features = torch.relu(self.conv(features))
        logits: Tensor = self.head(torch.relu(self.hidden(features.mean(dim=(2, 3)))))
        return logits


class Attentive(nn.Module):
    """A layer of a transformer behind a stem with a norm: four heads, twelve neurons."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.patches = nn.Conv2d(6, 8, 2, stride=2)
        self.encoder = nn.TransformerEncoderLayer(8, 4, 12, dropout=0, batch_first=True)
        self.head = nn.Linear(8, 10)

    def forward(self, images: Tensor) -> Tensor:
        patches = self.patches(torch.relu(self.bn(self.stem(images))))
        tokens = self.encoder(patches.flatten(2).transpose(1, 2))
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


def gated() -> nn.Module:
    return add_gates(Attentive())
