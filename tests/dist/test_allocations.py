"""After the first pass of a generation the communication hook allocates nothing.

What it unpacks and sums in callbacks was in new tensors, on streams from a pool: on a GPU each of
these streams kept memory of its own for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import worm_dist
from tests.nets import random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import WormConfig
from worm_dist.comm_hooks import packing
from worm_dist.comm_hooks.allreduce import AllReduce
from worm_dist.comm_hooks.checksums import Checksums
from worm_dist.comm_hooks.ddp_hook import PackedReducer
from worm_dist.comm_hooks.packing import Packing

_WIDTH = 48


class _Wide(nn.Module):
    """Its middle layer is copied by rows and columns, in several chunks, its others by an index."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, _WIDTH, 3, bias=False)
        self.norm = nn.BatchNorm2d(_WIDTH)
        self.wide = nn.Conv2d(_WIDTH, _WIDTH, 3, bias=False)
        self.norm2 = nn.BatchNorm2d(_WIDTH)
        self.head = nn.Linear(_WIDTH, 4)

    def forward(self, images: Tensor) -> Tensor:
        images = self.norm(self.stem(images)).relu()
        images = self.norm2(self.wide(images)).relu()
        output: Tensor = self.head(images.mean(dim=(2, 3)))
        return output


class _NewMemory(TorchDispatchMode):
    """Collects the operations whose result is in memory that none of their arguments has."""

    def __init__(self, found: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._found = found

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if not _storages(result) <= _storages((args, kwargs)):
            self._found.append(str(func))
        return result


def _storages(tree: Any) -> set[int]:
    return {
        leaf.untyped_storage().data_ptr()
        for leaf in tree_leaves(tree)
        if isinstance(leaf, Tensor) and leaf.numel()
    }


def _watch(found: list[str]) -> None:
    """Watch all that the hook does in a pass: in the thread of the backward pass, and in those in
    which gloo calls back."""
    for kind, name in (
        (PackedReducer, "bucket_view"),
        (AllReduce, "start"),
        (Packing, "unpack"),
        (Checksums, "take"),
    ):

        def watched(method: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(method)
            def call(*arguments: Any, **keywords: Any) -> Any:
                with _NewMemory(found):
                    return method(*arguments, **keywords)

            return call

        setattr(kind, name, watched(getattr(kind, name)))


def _allocated(truncation: dict[str, Any]) -> list[list[str]]:
    """What is allocated in each pass of two generations; the first pass of each has to."""
    vars(packing)["LARGE"] = _WIDTH * _WIDTH * 9
    vars(packing)["_ROWS_AT_ONCE"] = 5 * _WIDTH * 9
    torch.manual_seed(0)
    model = DistributedDataParallel(_Wide(), bucket_cap_mb=0.01)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    config = WormConfig(truncation={"frozen_weights": "hold", "scope": "coupled", **truncation})
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    found: list[str] = []
    _watch(found)
    passes = []
    for dropped in ((0, 3, _WIDTH), (0, 5, 6, _WIDTH + 2)):
        engine.truncate(mask_dropping(engine.groups, *dropped))
        for _ in range(4):
            for micro in range(2):  # the second adds to the gradients of the first
                found.clear()
                engine.model(random_images(2, seed=micro)).square().mean().backward()
                passes.append(list(found))
            optimizer.step()
            optimizer.zero_grad()
    return passes


@pytest.mark.parametrize("compression", ["none", "bf16"])
@pytest.mark.parametrize("checksums", [False, True])
def test_later_passes_of_a_generation_allocate_nothing(
    ranks: Ranks, compression: str, checksums: bool
) -> None:
    for passes in ranks(2, _allocated, {"compression": compression, "checksums": checksums}):
        # Checksums are compared once a step, so the second pass of the first step has no sums to
        # use again.  DDP rebuilds its buckets after the first pass of all, in one more than before.
        first, again = passes[:8], passes[8:]
        assert all(any("empty" in name for name in found[0]) for found in (first, again))
        assert not any(first[4:]) and not any(again[2:])
