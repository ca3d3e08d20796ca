"""Loop: network, optimizer and engine of a run, and its training step."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from ... import Verdict, attach
from ...engine.engine import Engine
from ...groups.mask import Mask
from ..hooks import HOOKS
from .clock import Clock
from .recipe import Recipe
from .subject import Subject

__all__ = ["Loop"]


class Loop:
    """The loop of the documentation, whose parts are timed.  Collective: every rank takes the same
    steps, each with its share of the batches.

    Args:
        subject: data and training recipe.
        recipe: what to train.
        steps_per_epoch: steps between two checks.
        total_steps: steps of the whole training.

    Attributes:
        network: the network, which is trained in place.
        engine: the engine.
        clock: the time of the steps, by phase, of the checks that are due, and of the draws.
    """

    def __init__(
        self, subject: Subject, recipe: Recipe, steps_per_epoch: int, total_steps: int
    ) -> None:
        self._samples = subject.samples()
        self.network: nn.Module = recipe.network
        if not any(map(_is_strided, self.network.modules())):
            self.network.to(memory_format=torch.channels_last)  # a quarter faster on a CPU
        model = DistributedDataParallel(self.network)
        optimizer: Optimizer = (
            AdamW(model.parameters(), subject.learning_rate, weight_decay=0.05)
            if subject.adamw
            else SGD(model.parameters(), subject.learning_rate, momentum=0.9, weight_decay=5e-4)
        )
        self._schedule = CosineAnnealingLR(optimizer, total_steps)
        self.engine: Engine = attach(
            model,
            optimizer,
            recipe.config,
            example_inputs=self._samples.images[:1],
            steps_per_epoch=steps_per_epoch,
            total_steps=total_steps,
        )
        self._hook = None if recipe.hook is None else HOOKS[recipe.hook](model)
        self.clock = Clock()

    @property
    def total_sent_bytes(self) -> int:
        """Bytes of gradients that this rank has passed to collectives so far."""
        return self.engine.traffic.total_sent_bytes if self._hook is None else self._hook.total

    def share(self, batch: Tensor) -> Tensor:
        """This rank's share of a batch, every n-th sample."""
        return batch[dist.get_rank() :: dist.get_world_size()]

    def step(self, batch: Tensor) -> float:
        """Take a training step.

        Args:
            batch: the samples of all ranks, int64 ``[n]``.

        Returns:
            The loss on this rank's share, without the penalty.
        """
        engine, own = self.engine, self.share(batch)
        with self.clock.running(engine.phase.value):
            logits = engine.model(self._samples.images[own])
            loss = nn.functional.cross_entropy(logits, self._samples.classes[own])
            engine.watch(loss)
            (loss + engine.penalty()).backward()
            engine.optimizer.step()
            engine.optimizer.zero_grad()
        self._schedule.step()
        return float(loss.detach())

    def check(self) -> Verdict:
        """Check, which takes no time unless a check is due."""
        if not self.engine.is_due:
            return self.engine.check()
        with self.clock.running(f"check in {self.engine.phase.value}"):
            return self.engine.check()

    def draw(self, mask: Mask | None) -> None:
        """Draw a stage, or all that a mask drops."""
        with self.clock.running("draw"):
            self.engine.draw(mask)


def _is_strided(module: nn.Module) -> bool:
    """Whether a module is a convolution that oneDNN (3.12, AVX2) differentiates wrongly in
    ``channels_last``: of size 1 with a stride, and with fewer than eight input channels, as after a
    draw.  It writes beyond its memory, and the process ends later, or results differ."""
    return isinstance(module, nn.Conv2d) and module.stride != (1, 1)
