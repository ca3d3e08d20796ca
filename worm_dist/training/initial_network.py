"""Initial network: the dense network of a run before any training of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..models import build_model
from .run_config import ModelConfig
from .weights import load_weights

__all__ = ["initial_network"]


def initial_network(config: ModelConfig, arguments: Mapping[str, Any]) -> nn.Module:
    """Build the network, with weights from torch's random state or from a file.

    Args:
        config: the settings of the model.
        arguments: keyword arguments of ``build_model``.

    Raises:
        ConfigError: the model does not exist, or rejects its arguments.
        CheckpointError: the weights cannot be read, or are of another network.
    """
    network = build_model(**arguments)
    if config.weights is not None:
        load_weights(network, Path(config.weights).expanduser(), "model.weights")
    if config.norm_scale is not None:
        for module in network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
                nn.init.constant_(module.weight, config.norm_scale)
    return network
