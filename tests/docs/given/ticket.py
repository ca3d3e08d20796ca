"""A run that has ended: runs/digits/ticket."""

from typing import Any

import torch

import worm_dist
from tests.oracles import mask_dropping
from worm_dist.models import build_model

model: dict[str, Any] = {"name": "vgg_small", "num_classes": 10, "in_channels": 1}
network = build_model(**model)
engine = worm_dist.attach(
    network,
    torch.optim.SGD(network.parameters(), lr=0.1),
    example_inputs=torch.zeros(1, 1, 8, 8),
)
engine.draw(mask_dropping(engine.groups, 0, 1, 2))
engine.save_ticket("runs/digits/ticket", model)
