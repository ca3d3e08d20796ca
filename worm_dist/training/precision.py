"""Precision of a run's forward passes."""

from __future__ import annotations

import torch
from torch import nn

__all__ = ["autocast"]


def autocast(precision: str, network: nn.Module) -> torch.autocast:
    """The context of a forward pass, in training and in tests.

    Args:
        precision: the run's setting; ``bf16`` computes in bfloat16, the others in the dtype of the
            weights.
        network: the network that runs.  If DeepSpeed has converted its weights to bfloat16, nothing
            is left to be cast.
    """
    weight = next(network.parameters())
    casts = precision == "bf16" and weight.dtype == torch.float32
    return torch.autocast(weight.device.type, dtype=torch.bfloat16, enabled=casts)
