"""Digits in a plain training loop:

torchrun --standalone --nproc-per-node 2 examples/loop_digits.py
"""

import os
from typing import Any

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import worm_dist as worm

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
if device.type == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
torch.manual_seed(0)

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32, device=device).unsqueeze(1) / 16
data = TensorDataset(images, torch.tensor(digits.target, device=device))
sampler: DistributedSampler[Any] = DistributedSampler(data)
loader = DataLoader(data, batch_size=32, sampler=sampler)


def block(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()


def dense_network() -> nn.Module:
    return nn.Sequential(
        *block(1, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 10),
    )


model = DistributedDataParallel(dense_network().to(device))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)
criterion = nn.CrossEntropyLoss()
config = worm.WormConfig(search={"prune_ratio": 0.5})
engine = worm.attach(
    model,
    optimizer,
    config,
    example_inputs=images[:1],
    steps_per_epoch=len(loader),
    total_steps=10 * len(loader),
)

for epoch in range(10):
    sampler.set_epoch(epoch)
    for x, y in loader:
        loss = criterion(engine.model(x), y)
        engine.watch(loss)  # the removal of channels pauses while the loss is too high
        (loss + engine.penalty()).backward()  # the penalty is the L1 on the scales
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        verdict = engine.check()  # collective: every rank calls it
        if verdict.stage or verdict.ticket:
            engine.draw()  # engine.model is a smaller model now; engine.optimizer stays the same
    if dist.get_rank() == 0:
        sent, dense = engine.traffic.sent_bytes, engine.traffic.dense_bytes
        print(f"epoch {epoch + 1} {engine.phase}: {sent:,} of {dense:,} bytes a step")

if dist.get_rank() == 0:
    engine.save_ticket("ticket")
    small = worm.load_ticket("ticket", build=dense_network)
    print(f"{sum(p.numel() for p in small.parameters()):,} parameters are left")
dist.destroy_process_group()
