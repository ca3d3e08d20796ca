"""Trainee: a network in DeepSpeed's engine, as a user would train it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.nets import random_images, randomise
from tests.oracles import folded_name, is_gate
from tests.zero.building import engine_around, whole
from tests.zero.inside import Inside
from tests.zero.row import Row

__all__ = ["Parallel", "Trainee", "network_of"]


def network_of(row: Row) -> nn.Module:
    """The same bits every time, on every rank."""
    torch.manual_seed(0)
    network = row.network()
    randomise(network, seed=3)
    return network


class Trainee:
    """The same bits for every trainee of a row, on every rank.

    Attributes:
        network: not wrapped.
        model: what is called.
        groups: names of the parameters that train, as the optimizer has them in its groups.
        num_steps: those that were not skipped.
    """

    def __init__(self, row: Row) -> None:
        self._row = row
        self.network = network_of(row)
        optimizer = None if row.optimizer is None else row.optimizer(self.network)
        trained = {p: name for name, p in self.network.named_parameters() if p.requires_grad}
        groups = [] if optimizer is None else [g["params"] for g in optimizer.param_groups]
        self.groups = [[trained[p] for p in group if p in trained] for group in groups] or [
            list(trained.values())
        ]
        self.model: Any = self._wrapped(optimizer)
        self.num_steps = 0
        self._is_full = False

    def _wrapped(self, optimizer: Any) -> Any:
        return engine_around(self.network, optimizer, self._row.all_settings)

    def step(self, number: int) -> None:
        """All passes of a step, in the row's style.

        ``engine``: ``model.backward`` and ``model.step`` in every pass.  ``torch``:
        ``loss.backward`` instead.  ``coalesced``: one reduction for all passes.  ``unmanaged``: the
        caller steps when it likes.
        """
        row, style = self._row, self._row.style
        with self.model.coalesce_grad_reduction() if style == "coalesced" else nullcontext():
            for micro in range(row.passes):
                loss = self.loss(number, micro)
                if style == "torch":
                    loss.backward()
                else:
                    self.model.backward(loss)
                if style in ("engine", "torch"):
                    self.model.step()
        if style in ("coalesced", "unmanaged"):
            self.model.step()
        self.num_steps += self.model.was_step_applied()

    def forget_gates(self) -> None:
        """They have been folded into what they scale."""
        self.groups = [[folded_name(n) for n in group if not is_gate(n)] for group in self.groups]

    def loss(self, number: int, micro: int) -> Tensor:
        rank = dist.get_rank()
        torch.manual_seed(number)  # for dropout
        images = random_images(4, seed=100 * number + 10 * micro + rank).to(self._row.dtype)
        logits = self.model(images)
        loss = nn.functional.cross_entropy(logits.float(), torch.arange(4) + micro)
        if number == self._row.overflow_at and rank == dist.get_world_size() - 1:
            loss = loss * torch.inf
        return loss

    @contextmanager
    def full(self) -> Iterator[None]:
        """In stage 3 the network's parameters are whole meanwhile.  Collective; may be nested."""
        if self._is_full:
            yield
            return
        with whole(self.model, self.network):
            self._is_full = True
            yield
            self._is_full = False

    @property
    def inside(self) -> Inside:
        return Inside(self.model, self.network)

    @property
    def values(self) -> dict[str, Tensor]:
        """Copies of parameters and buffers."""
        with self.full():
            return {name: value.clone() for name, value in self.network.state_dict().items()}

    @property
    def weights(self) -> dict[str, Tensor]:
        """Copies of parameters alone; statistics are each rank's own under DeepSpeed."""
        with self.full():
            return {name: p.detach().clone() for name, p in self.network.named_parameters()}

    @property
    def digest(self) -> str:
        """Over the bits of all parameters."""
        digest = hashlib.sha256()
        for weight in self.weights.values():
            digest.update(weight.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Parallel(Trainee):
    """The same network under DistributedDataParallel."""

    def _wrapped(self, optimizer: Any) -> Any:
        self.optimizer = optimizer
        return DistributedDataParallel(self.network)

    def step(self, number: int) -> None:
        passes = self._row.passes
        for micro in range(passes):
            last = micro == passes - 1
            with nullcontext() if last else self.model.no_sync():
                (self.loss(number, micro) / passes).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.num_steps += 1
