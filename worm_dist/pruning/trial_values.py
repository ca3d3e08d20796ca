"""Values: of weights and inputs, such that every branch of a network matters.

A head of zeros hides what reaches it, an input of zeros what is done with it, and scales that are
all one and shifts that are all zero what a maximum over channels would choose.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..groups.nested import mapped, tensors_in
from ..groups.training_mode import norms_in_training

__all__ = ["corners", "other_inputs", "take_other_values", "unsettle"]

_Norm = nn.modules.batchnorm._BatchNorm
_LARGE, _SMALL = 128, 96
"""Pixels along a side: of images that are large, and of the corner that is taken of them."""
_Layer = (nn.modules.conv._ConvNd, nn.Linear)


@torch.no_grad()
def unsettle(network: nn.Module) -> None:
    """Weights that are all equal get noise."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))


@torch.no_grad()
def take_other_values(network: nn.Module, run: Callable[[], Any]) -> None:
    """Weights of layers as at random, scales of both signs, shifts, and statistics to match, so
    that about half of what every channel puts out is positive.

    Args:
        network: in eval mode.
        run: runs it on example inputs.
    """
    unsettle(network)
    generator = torch.Generator().manual_seed(1)

    def normal(parameter: Tensor, spread: float) -> None:
        value = spread * torch.randn(parameter.shape, generator=generator)
        parameter.copy_(value.to(parameter.device, parameter.dtype))

    norms = [module for module in network.modules() if isinstance(module, _Norm)]
    for module in network.modules():
        if isinstance(module, _Layer) and isinstance(module.weight, nn.Parameter):
            normal(module.weight, (2 / max(1, module.weight[0].numel())) ** 0.5)
            if module.bias is not None:
                normal(module.bias, 0.1)
        elif isinstance(module, _Norm) and module.weight is not None:
            signs = torch.randint(0, 2, module.weight.shape, generator=generator) * 2.0 - 1
            sizes = 0.5 + torch.rand(module.weight.shape, generator=generator)
            module.weight.copy_((signs * sizes).to(module.weight.device, module.weight.dtype))
            normal(module.bias, 0.3)
    _estimate_statistics(norms, run)


def _estimate_statistics(norms: list[Any], run: Callable[[], Any]) -> None:
    try:
        with norms_in_training(norms):
            run()
    except ValueError:  # a batch that has one value for each channel has no variance
        for norm in norms:
            norm.reset_running_stats()


def corners(example_inputs: Any) -> Any:
    """The same inputs, or if there are large images among them, corners of these."""
    large = [t for t in tensors_in(example_inputs) if t.dim() >= 4 and min(t.shape[-2:]) > _LARGE]
    if not large:
        return example_inputs
    return mapped(
        example_inputs,
        lambda t: t[..., :_SMALL, :_SMALL] if any(t is each for each in large) else t,
    )


def other_inputs(example_inputs: Any) -> Any:
    """The example inputs; what is all the same in them gets noise."""
    generator = torch.Generator().manual_seed(2)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        if not bool((tensor == tensor.flatten()[0]).all()):
            return tensor
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + noise.to(tensor.device, tensor.dtype)

    return mapped(example_inputs, noisy)
