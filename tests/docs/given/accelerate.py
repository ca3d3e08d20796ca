"""An accelerator, a network and its data."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

accelerator = Accelerator(cpu=True)
images = torch.randn(16, 1, 8, 8)
loader = DataLoader(TensorDataset(images, torch.randint(10, (16,))), 8)
net = nn.Sequential(
    nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10)
)  # fmt: skip
optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
epochs = 1
criterion = nn.CrossEntropyLoss()
