"""Trains one row of the ledger with the loop of the README."""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import update_bn

from ... import attach
from ...engine.engine import Engine
from ...errors import WormError
from ...groups.flops import count_flops
from ...groups.forward import in_eval
from ...training.evaluation import count_parameters
from .row import Key, Row
from .rule import Rule
from .subject import Samples, Subject

__all__ = ["train"]

_VALIDATION_BATCH = 500
"""Validation samples in a forward pass."""
_STATISTICS_BATCHES = 8
"""Batches from which BatchNorm statistics are re-estimated after an epoch."""


def train(subject: Subject, rule: Rule, prune_ratio: float, seed: int, epochs: int | None) -> Row:
    """Train on one rank; gradients are packed as on many ranks, so that traffic is counted.

    Args:
        subject: network, data and training recipe.
        rule: the settings.
        prune_ratio: share of the channels to drop.
        seed: seed of the weights and the order of the samples.
        epochs: number of epochs; None for the subject's.
    """
    row = Row(Key(subject.name, rule.name, prune_ratio, seed))
    start_time = time.perf_counter()
    run = _Run(subject, rule, prune_ratio, seed, epochs or subject.epochs, row)
    try:
        run.train()
    except WormError as error:
        row.error = f"{type(error).__name__}: {error}"
    run.complete()
    row.seconds = round(time.perf_counter() - start_time, 1)
    return row


class _Run:
    def __init__(
        self, subject: Subject, rule: Rule, prune_ratio: float, seed: int, epochs: int, row: Row
    ) -> None:
        self._row = row
        self._seed = seed
        self._epochs = epochs
        self._samples: Samples = subject.samples()
        self._batch_size = subject.batch_size
        torch.manual_seed(seed)
        dense = subject.build(1.0)
        sample = self._samples.images[:1]
        self._dense = count_parameters(dense), count_flops(dense, sample)
        torch.manual_seed(seed)
        self._network = subject.build(rule.width)
        self._network_flops = count_flops(self._network, sample)
        model = DistributedDataParallel(self._network)
        optimizer: Optimizer = (
            AdamW(model.parameters(), subject.learning_rate, weight_decay=0.05)
            if subject.adamw
            else SGD(model.parameters(), subject.learning_rate, momentum=0.9, weight_decay=5e-4)
        )
        self._steps = len(self._samples.images) // subject.batch_size
        self._schedule = CosineAnnealingLR(optimizer, epochs * self._steps)
        self._engine: Engine = attach(
            model,
            optimizer,
            rule.config(prune_ratio),
            example_inputs=sample,
            steps_per_epoch=self._steps,
        )
        self._num_steps = 0
        self._flops = 0

    def train(self) -> None:
        for epoch in range(self._epochs):
            generator = torch.Generator().manual_seed(1000 * self._seed + epoch)
            order = torch.randperm(len(self._samples.images), generator=generator)
            batches = order.split(self._batch_size)[: self._steps]
            losses = [self._step(batch) for batch in batches]
            self._row.losses.append(round(sum(losses) / len(losses), 4))
            self._row.accuracies.append(self._accuracy())
            self._row.estimated_accuracies.append(
                self._estimated_accuracy(batches[-_STATISTICS_BATCHES:])
            )

    def _step(self, batch: Tensor) -> float:
        engine, row = self._engine, self._row
        logits = engine.model(self._samples.images[batch])
        loss = nn.functional.cross_entropy(logits, self._samples.classes[batch])
        engine.watch(loss)
        (loss + engine.penalty()).backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        self._schedule.step()
        self._num_steps += 1
        self._flops += self._network_flops
        before = engine.phase
        verdict = engine.check()
        row.paused_steps += verdict.paused
        row.removed_fraction = max(row.removed_fraction, verdict.removed_fraction)
        if verdict.phase != before:
            row.elbow_epoch = engine.step / self._steps
        if engine.phase != "ticket" and (verdict.stage or verdict.ticket):
            self._draw(last=verdict.ticket)
        return float(loss.detach())

    def _draw(self, last: bool) -> None:
        engine, row = self._engine, self._row
        before = self._logits()
        engine.draw()
        after = self._logits()
        row.change_at_draw = max(row.change_at_draw, float((before - after).abs().max()))
        self._network_flops = count_flops(self._network, self._samples.images[:1])
        if last:
            row.ticket_epoch = engine.step / self._steps
            row.before_draw, row.after_draw = self._accuracy_of(before), self._accuracy_of(after)

    def complete(self) -> None:
        """Fill in the figures relative to a dense run."""
        row, traffic = self._row, self._engine.traffic
        parameters, flops = self._dense
        row.parameters = count_parameters(self._network) / parameters
        row.flops = self._network_flops / flops
        if self._num_steps:
            row.run_flops = self._flops / self._num_steps / flops
            row.run_bytes = traffic.total_sent_bytes / (self._num_steps * 4 * parameters)

    def _accuracy(self) -> float:
        return self._accuracy_of(self._logits())

    def _estimated_accuracy(self, batches: Sequence[Tensor]) -> float:
        """Accuracy with BatchNorm statistics of the newest batches; the network is restored.

        The engine has already recorded these batches, so its recorded inputs do not change.
        """
        norms = [
            m for m in self._network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        saved = [copy.deepcopy(norm.state_dict()) for norm in norms]
        update_bn([self._samples.images[batch] for batch in batches], self._network)
        accuracy = self._accuracy()
        for norm, state in zip(norms, saved):
            norm.load_state_dict(state)
        return accuracy

    def _accuracy_of(self, logits: Tensor) -> float:
        right = logits.argmax(dim=1) == self._samples.validation_classes
        return round(float(right.float().mean()), 4)

    @torch.no_grad()
    def _logits(self) -> Tensor:
        batches = self._samples.validation_images.split(_VALIDATION_BATCH)
        with in_eval(self._network):
            return torch.cat([self._network(images) for images in batches])
