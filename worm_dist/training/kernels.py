"""Kernels: the choices of a run about kernels on GPUs."""

from __future__ import annotations

import torch

from .run_config import RunConfig

__all__ = ["choose_kernels", "memory_format"]


def choose_kernels(config: RunConfig, device: torch.device) -> None:
    """Set torch's flags for this process by the settings; on CPUs nothing changes.

    Args:
        config: the run's settings: ``precision`` and ``cudnn_benchmark``.
        device: this rank's device.
    """
    if device.type != "cuda":
        return
    torch.backends.cudnn.benchmark = config.cudnn_benchmark
    _allow_tf32(config.precision != "fp32")


def memory_format(config: RunConfig, device: torch.device) -> torch.memory_format:
    """The memory format of weights and images of convolutions: that for channels innermost, or the
    contiguous one.

    Args:
        config: the run's settings: ``model.channels_last``.
        device: this rank's device.
    """
    pays = (
        device.type == "cuda"
        and config.precision != "fp32"
        and config.distributed.backend not in ("deepspeed", "fsdp")
    )
    choice = config.model.channels_last
    is_last = choice == "on" or (choice == "auto" and pays)
    return torch.channels_last if is_last else torch.contiguous_format


def _allow_tf32(allow: bool) -> None:
    """Both kinds alike: by default torch rounds in convolutions, but not in matrix products.

    The flags of torch 2.9 (``fp32_precision``) are set by these too, but not the other way round:
    with the newer ones alone torch raises an error where it reads the older ones, as Inductor and
    torch.export do.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allow
