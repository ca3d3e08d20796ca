"""A model of Hugging Face, its data, and settings with which a ticket is drawn at once."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification, TrainingArguments

import worm_dist

images = torch.randn(32, 3, 8, 8)
data = [{"pixel_values": image, "labels": 0} for image in images]
shape = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
model = ResNetForImageClassification(ResNetConfig(num_labels=3, **shape))
arguments = TrainingArguments("out", use_cpu=True, report_to="none", save_strategy="no")
config = worm_dist.WormConfig(
    search={"every": "1ba", "settled": 1.0, "elbow": {"min_masks": 2}},
    truncation={"removal": {"duration": "4ba", "fade_steps": 1}},
)
