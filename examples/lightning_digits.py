"""Digits with Lightning, on two processes of this machine: python examples/lightning_digits.py"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from worm_dist.integrations.lightning import WormCallback
from worm_dist.models import build_model


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = build_model("vgg_small", num_classes=10, in_channels=1)
        self.example_input_array = torch.zeros(1, 1, 8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.network(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return torch.nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
loader = DataLoader(TensorDataset(images, torch.tensor(digits.target)), 32, shuffle=True)
callback = WormCallback()
trainer = Trainer(max_epochs=8, accelerator="cpu", devices=2, strategy="ddp", callbacks=[callback])
trainer.fit(Digits(), loader)
if trainer.is_global_zero:
    print(callback.engine.phase, sum(p.numel() for p in callback.engine.model.parameters()))
