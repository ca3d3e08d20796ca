"""Building: DeepSpeed's engine around a network, in a rank of a test, on the CPU."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

__all__ = ["engine_around", "import_deepspeed", "settings_of", "whole"]


def import_deepspeed() -> Any:
    """DeepSpeed, told where it runs; quiet, and without compiling anything."""
    os.environ.update(
        DS_ACCELERATOR="cpu",
        RANK=str(dist.get_rank()),
        LOCAL_RANK=str(dist.get_rank()),
        WORLD_SIZE=str(dist.get_world_size()),
        MASTER_ADDR="localhost",
        MASTER_PORT="0",
    )
    import deepspeed  # the ranks' fork server has imported it

    # Shared memory for inference: half a minute of compiling for nothing.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    logging.getLogger("DeepSpeed").setLevel("ERROR")
    for renamed in ("all_gather_into_tensor", "reduce_scatter_tensor"):
        warnings.filterwarnings("ignore", message=f".*{renamed}. is deprecated")
    return deepspeed


def settings_of(stage: int, **settings: Any) -> dict[str, Any]:
    """DeepSpeed's settings; ``zero_optimization`` and the rest are merged into these."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        **settings,
        "zero_optimization": {"stage": stage, **settings.get("zero_optimization", {})},
    }


def engine_around(
    network: nn.Module,
    optimizer: Optimizer | None,
    settings: Mapping[str, Any],
    **arguments: Any,
) -> Any:
    """What ``deepspeed.initialize`` returns first."""
    engine, *_ = import_deepspeed().initialize(
        model=network,
        optimizer=optimizer,
        config=dict(settings),
        dist_init_required=False,
        **arguments,
    )
    return engine


@contextmanager
def whole(model: Any, network: nn.Module, written_by: int | None = None) -> Iterator[None]:
    """In stage 3 the parameters of a network are whole meanwhile.  Collective.

    Args:
        model: what is called.
        network: in it.
        written_by: the rank that writes to them; what others write is lost.
    """
    if getattr(model, "zero_optimization_stage", int)() < 3:
        yield
        return
    # What a step has gathered may lack channels that nobody hears.  The engine's own function would
    # also collect garbage, which takes longer than all the rest.
    model.optimizer.empty_partition_cache()
    gathered = import_deepspeed().zero.GatheredParameters
    with gathered(list(network.parameters()), modifier_rank=written_by):
        yield
