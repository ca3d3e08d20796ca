"""Use a ticket in a project that does not have worm_dist.

``torch.save`` of the whole network is not enough for that: the file only names the class, which the
reader has to import. There are two ways without it; the second one needs safetensors (``pip
install safetensors``). From a run of ``configs/digits.yaml``:

    python -m worm_dist ticket export runs/digits/ticket --torch-export small.pt2
    python -m worm_dist ticket show runs/digits/ticket    # prints the widths, such as these
    python examples/ticket_without_worm_dist.py small.pt2 \\
        runs/digits/ticket/ticket.safetensors --widths 16 16 32 32 64 64
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class SmallVgg(nn.Module):
    """The network ``vgg_small`` with the widths of a ticket; its layers have the same names."""

    def __init__(self, widths: Sequence[int], in_channels: int = 1, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for number, width in enumerate(widths):
            if number in (2, 4):
                layers.append(nn.MaxPool2d(2))
            layers.append(nn.Conv2d(in_channels, width, 3, padding=1, bias=False))
            layers.append(nn.BatchNorm2d(width))
            layers.append(nn.ReLU())
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(in_channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(self.features(images), 1)
        logits: Tensor = self.head(torch.flatten(pooled, 1))
        return logits


def from_program(path: str) -> nn.Module:
    """Load a file of ``ticket export --torch-export``: torch alone is needed, and no class.

    The program is that of eval mode and cannot be trained further.
    """
    program: nn.Module = torch.export.load(path).module()
    return program


def from_weights(path: str, widths: Sequence[int]) -> nn.Module:
    """Load ``ticket.safetensors`` into a class of one's own, which can be trained further."""
    network = SmallVgg(widths)
    network.load_state_dict(load_file(path))
    return network.eval()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("program", help="a file of `ticket export --torch-export`")
    parser.add_argument("weights", help="ticket.safetensors")
    parser.add_argument("--widths", type=int, nargs="+", required=True)
    options = parser.parse_args()
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = from_program(options.program)(images)
        own_logits = from_weights(options.weights, options.widths)(images)
    print(f"classes {logits.argmax(dim=1).tolist()}")
    print(f"largest difference {float((logits - own_logits).abs().max()):.2g}")


if __name__ == "__main__":
    main()
