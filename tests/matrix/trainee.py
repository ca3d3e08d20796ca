"""Trainee: a network with everything that trains it, as a user would write it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tests.matrix.combination import Combination
from tests.nets import random_images, randomise

__all__ = ["Schedule", "Trainee", "images_like"]


class Trainee:
    """The same bits for every trainee of a combination, on every rank.

    Attributes:
        network: not wrapped.
        model: what is called.
        penalty: added to every loss; a function of which detour the pass took.
        schedule: None where there is none.
        num_steps: how often the optimizer was told to step.
    """

    def __init__(self, combination: Combination) -> None:
        torch.manual_seed(0)
        self.recipe = combination.recipe
        self.network = combination.network()
        randomise(self.network, seed=3)
        self.network.to(combination.dtype)
        self.network.to(memory_format=combination.memory_format)
        self.model: nn.Module = self.network
        if combination.compiled:
            compiled: Any = torch.compile(self.network, backend="aot_eager")
            self.model = compiled
        if combination.wrapper is not None:
            self.model = DistributedDataParallel(self.model, **combination.wrapper())
        self.optimizer = combination.optimizer(self.network)
        self.schedule: Schedule | None = None
        if combination.scheduler is not None:
            self.schedule = Schedule(combination.scheduler(self.optimizer), self.network)
        scale = self.recipe.loss_scale
        self.scaler = GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        self.penalty: Callable[[bool], Tensor] = lambda detour: torch.zeros(())
        self.num_steps = 0
        self.optimizer.register_step_post_hook(self._count)

    def backward(self, step: int) -> None:
        """Zero the gradients, then as many passes as the recipe says."""
        rank = dist.get_rank() if dist.is_initialized() else 0
        recipe = self.recipe
        detour = rank not in recipe.without_detour.get(step, ())
        self.optimizer.zero_grad()
        for number in range(recipe.passes):
            images = images_like(self.network, 8, seed=100 * step + 10 * number + rank)
            classes = torch.arange(8) % 10
            arguments = {"detour": detour} if recipe.detours else {}
            last = number == recipe.passes - 1
            with nullcontext() if last else self._no_sync():
                with torch.autocast("cpu", torch.bfloat16, enabled=recipe.autocast):
                    logits = self.model(images, **arguments)
                if logits.dtype == torch.bfloat16:
                    logits = logits.float()
                loss = nn.functional.cross_entropy(logits, classes) + self.penalty(detour)
                if step == recipe.overflow_at and rank == 1:
                    loss = loss * torch.inf
                self.scaler.scale(loss).backward()

    def _no_sync(self) -> AbstractContextManager[Any]:
        assert isinstance(self.model, DistributedDataParallel)
        return self.model.no_sync()

    def finish(self) -> None:
        """Clip, step, and whatever follows a step."""
        if self.recipe.clip is not None:
            self.scaler.unscale_(self.optimizer)
            self.recipe.clip(self.network.parameters())
        self.before_step()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.after_step()
        if self.schedule is not None:
            self.schedule.step(self.network)

    def before_step(self) -> None:
        """Nothing more is done to gradients."""

    def after_step(self) -> None:
        """Nothing more is done to weights."""

    @property
    def gradients(self) -> dict[str, Tensor]:
        """Of those that have one."""
        named = self.network.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    @property
    def values(self) -> dict[str, Tensor]:
        """Copies of parameters and buffers."""
        return {name: value.clone() for name, value in self.network.state_dict().items()}

    def state_of(self, name: str) -> dict[str, Tensor]:
        """Copies of those pieces of optimizer state that follow a parameter element by element."""
        parameter = self.network.get_parameter(name)
        state = self.optimizer.state.get(parameter, {})
        return {
            key: value.clone()
            for key, value in state.items()
            if isinstance(value, Tensor) and value.shape == parameter.shape
        }

    @property
    def state(self) -> dict[str, Tensor]:
        names = [name for name, _ in self.network.named_parameters()]
        return {
            f"{name} {key}": value for name in names for key, value in self.state_of(name).items()
        }

    @property
    def digest(self) -> str:
        """Over the bits of all parameters."""
        digest = hashlib.sha256()
        for parameter in self.network.parameters():
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def _count(self, *_: object) -> None:
        self.num_steps += 1


class Schedule:
    """What follows every step: the next learning rate, and a moving average of the weights."""

    def __init__(self, scheduler: LRScheduler, network: nn.Module) -> None:
        self.scheduler = scheduler
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.9))

    def step(self, network: nn.Module) -> None:
        self.scheduler.step()
        self.average.update_parameters(network)

    @property
    def rates(self) -> list[float]:
        return [float(rate) for rate in self.scheduler.get_last_lr()]


def images_like(network: nn.Module, batch: int, seed: int = 0) -> Tensor:
    """Images in a network's precision and memory format."""
    convolution = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    images = random_images(batch, side=5, seed=seed).to(convolution.weight.dtype)
    if not convolution.weight.is_contiguous():
        images = images.to(memory_format=torch.channels_last)
    return images
