"""A network and its training, for FSDP2."""

import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")

net = nn.Sequential(
    nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU()),
    nn.Flatten(),
    nn.Linear(8 * 36, 10),
)  # fmt: skip
epochs = 1
criterion = nn.CrossEntropyLoss()
images, labels = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
loader = list(zip(images.split(8), labels.split(8), strict=True))
