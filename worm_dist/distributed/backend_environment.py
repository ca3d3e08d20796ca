"""Environment variables by which torch's backends and DeepSpeed are set up."""

from __future__ import annotations

from collections.abc import Mapping

import torch

__all__ = ["variables_of_backend"]

_ERROR_HANDLING = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")
"""The variable of torch, and its former name."""


def variables_of_backend(
    world_size: int, device: torch.device, environment: Mapping[str, str]
) -> dict[str, str]:
    """Environment variables that torch and DeepSpeed are to see.

    Args:
        world_size: number of ranks.
        device: the device of this rank.
        environment: the environment variables that are set.
    """
    variables = {}
    if device.type == "cuda":
        # DeepSpeed takes it for the index of the GPU, of which a process may see its own only.
        variables["LOCAL_RANK"] = str(device.index)
    # By default nccl's own watchdog ends the process within a second when another rank has died,
    # before the monitor can say which one, and with an exit code of its own.  With 0 it does
    # nothing: the collective does not return, and the watchdog of this run ends the process.  Nor
    # may it end the collective alone (2), because training would go on with what that has left in
    # the gradients.  A value that the user chose stays; 1 under torchrun is torchrun's own.
    chosen = [environment[name] for name in _ERROR_HANDLING if name in environment]
    is_default = not chosen or (chosen == ["1"] and "TORCHELASTIC_RUN_ID" in environment)
    if world_size > 1 and is_default:
        variables[_ERROR_HANDLING[0]] = "0"
    return variables
