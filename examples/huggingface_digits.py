"""Digits with the Trainer of Hugging Face:

torchrun --standalone --nproc-per-node 2 examples/huggingface_digits.py
"""

import torch
from sklearn.datasets import load_digits
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import worm_dist as worm
from worm_dist.integrations.huggingface import WormTrainerCallback, restore_ticket

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
rows = zip(images, digits.target.tolist(), strict=True)
shape = {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "layer_type": "basic"}
trainer = Trainer(
    ResNetForImageClassification(ResNetConfig(num_channels=1, num_labels=10, **shape)),
    TrainingArguments(
        "runs/huggingface",
        num_train_epochs=8,
        per_device_train_batch_size=32,
        learning_rate=1e-2,
        save_strategy="epoch",
        use_cpu=True,
        report_to="none",
    ),
    train_dataset=[{"pixel_values": image, "labels": label} for image, label in rows],
)
config = worm.WormConfig(search={"prune_ratio": 0.5})
callback = WormTrainerCallback(trainer, config, example_inputs={"pixel_values": images[:1]})
trainer.train()
trainer.save_model("runs/huggingface/small")
if trainer.is_world_process_zero():
    model = ResNetForImageClassification.from_pretrained(
        "runs/huggingface/small", ignore_mismatched_sizes=True
    )
    model = restore_ticket(model, "runs/huggingface/small")
    print(callback.engine.phase, model.num_parameters())
