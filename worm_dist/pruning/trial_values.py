"""Trial values: weights and inputs with which every branch of a network affects its outputs.

A layer with zero weights hides errors in its inputs, zero inputs hide errors in the first layers,
and scales of one with shifts of zero hide errors behind a maximum over channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..groups.forward import norms_in_training
from ..groups.nested import mapped, tensors_in

__all__ = [
    "crop_large_images",
    "perturb_constant_inputs",
    "perturb_constant_weights",
    "randomize_weights",
]

_Norm = nn.modules.batchnorm._BatchNorm
_LARGE, _SMALL = 128, 96
"""Side lengths in pixels: larger images are cropped, and the size of the crop."""
_Layer = (nn.modules.conv._ConvNd, nn.Linear)


@torch.no_grad()
def perturb_constant_weights(network: nn.Module) -> None:
    """Add noise to parameters whose elements are all equal."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        if bool((parameter == parameter.flatten()[0]).all()):
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise.to(parameter.device, parameter.dtype))


@torch.no_grad()
def randomize_weights(network: nn.Module, run: Callable[[], Any]) -> None:
    """Set random weights, scales of both signs, shifts, and matching running statistics.

    About half of the outputs of every channel are then positive.

    Args:
        network: the network, in eval mode; modified in place.
        run: a function that runs it on example inputs.
    """
    perturb_constant_weights(network)
    generator = torch.Generator().manual_seed(1)

    def normal(parameter: Tensor, spread: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator).mul_(spread))

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
    if norms:
        _estimate_statistics(norms, run)


def _estimate_statistics(norms: list[Any], run: Callable[[], Any]) -> None:
    try:
        with norms_in_training(norms):
            run()
    except ValueError:  # a single value per channel has no variance
        for norm in norms:
            norm.reset_running_stats()


def crop_large_images(example_inputs: Any) -> Any:
    """Return the inputs with large images cropped; the same object if there are none."""
    large = [t for t in tensors_in(example_inputs) if t.dim() >= 4 and min(t.shape[-2:]) > _LARGE]
    if not large:
        return example_inputs
    return mapped(
        example_inputs,
        lambda t: t[..., :_SMALL, :_SMALL] if any(t is each for each in large) else t,
    )


def perturb_constant_inputs(example_inputs: Any) -> Any:
    """Return the inputs, with noise added to float tensors whose elements are all equal."""
    generator = torch.Generator().manual_seed(2)

    def noisy(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point() or not tensor.numel():
            return tensor
        if not bool((tensor == tensor.flatten()[0]).all()):
            return tensor
        noise = torch.randn(tensor.shape, generator=generator)
        return tensor + noise.to(tensor.device, tensor.dtype)

    return mapped(example_inputs, noisy)
