"""A network and its training, for DeepSpeed."""

import torch
import torch.distributed as dist
from torch import nn

dist.init_process_group("gloo")

from tests.zero.building import import_deepspeed, settings_of  # noqa: E402

import_deepspeed()
settings = {**settings_of(1), "train_micro_batch_size_per_gpu": 8}
net = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
)  # fmt: skip
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
epochs = 1
criterion = nn.CrossEntropyLoss()
images, labels = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
loader = list(zip(images.split(8), labels.split(8), strict=True))
