"""Masked: torch's own reduction of everything, and zeros in what is frozen: what packing must be.

The gradients of a shard are complete when torch's hooks after their accumulation run.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from worm_dist.backends.fsdp import FsdpBackend
from worm_dist.comm_hooks.reducer import Reducer
from worm_dist.groups.freeze_plan import FreezePlan

__all__ = ["masked"]


class _Masked(Reducer):
    def __init__(self) -> None:
        super().__init__()
        self._hooks: list[Any] = []

    def _follow(self, plan: FreezePlan, held: FreezePlan, fading: Collection[Tensor]) -> None:
        self.remove_hooks()
        for parameter, block in plan.blocks.items():
            assert isinstance(parameter, DTensor)
            is_live = torch.ones(block.shape)
            for dim, frozen in block.frozen.items():
                is_live.index_fill_(dim, frozen, 0)
            here = distribute_tensor(is_live, parameter.device_mesh, parameter.placements)
            if parameter.requires_grad:
                hook = _Zeroing(here.to_local().bool())
                self._hooks.append(parameter.register_post_accumulate_grad_hook(hook))

    def probe(self, plan: FreezePlan, device: torch.device) -> None:
        super().probe(plan, device)
        self.num_buckets_probed = 1  # they are zero: the other side looks

    def remove(self) -> None:
        super().remove()
        self.remove_hooks()

    def remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()


class _Zeroing:
    def __init__(self, is_live: Tensor) -> None:
        self._is_live = is_live

    def __call__(self, parameter: Any) -> None:
        parameter.grad.to_local()[~self._is_live] = 0


@contextmanager
def masked() -> Iterator[None]:
    """Engines that are attached, step or draw within reduce everything, and mask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FsdpBackend, "make_reducer", lambda *_: _Masked())
        yield
