"""Digits in a loop with Accelerate:

torchrun --standalone --nproc-per-node 2 examples/accelerate_digits.py
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, TensorDataset

import worm_dist as worm
from worm_dist.integrations.accelerate import AcceleratedEngine
from worm_dist.models import build_model

accelerator = Accelerator(cpu=True)
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), 32, shuffle=True)
net = build_model("vgg_small", num_classes=10, in_channels=1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
model, optimizer, loader = accelerator.prepare(net, optimizer, loader)
config = worm.WormConfig(search={"prune_ratio": 0.5})
engine = AcceleratedEngine(
    accelerator, model, optimizer, config, example_inputs=images[:1], steps_per_epoch=len(loader)
)
for _ in range(8):
    for x, y in loader:
        with accelerator.accumulate(engine.model):
            engine.backward(torch.nn.functional.cross_entropy(engine.model(x), y))
            optimizer.step()
            optimizer.zero_grad()
            engine.step()
accelerator.print(engine.engine.phase, sum(p.numel() for p in engine.model.parameters()))
accelerator.end_training()
