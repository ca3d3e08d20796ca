"""Trains one row of the ledger with the loop of the documentation."""

from __future__ import annotations

import copy
import time
from collections import deque

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from ... import Phase, Verdict
from ...errors import WormError
from ...groups.flops import count_flops
from ...groups.forward import in_eval
from ...groups.mask import Mask
from ...training.evaluation import count_parameters
from .loop import Loop
from .row import Row
from .spec import RunSpec
from .subject import SUBJECTS, Samples

__all__ = ["train"]

_EVALUATION_BATCH = 500
"""Samples in a forward pass of an evaluation."""
_STATISTICS_BATCHES = 8
"""Batches from which BatchNorm statistics are re-estimated for an evaluation."""


def train(spec: RunSpec, parent: Row | None = None) -> Row:
    """Train; on one rank gradients are packed as on many, so that traffic is counted.  Collective.

    Args:
        spec: what to train.
        parent: the row that the specification depends on, if any.

    Returns:
        The row; accuracies and losses are this rank's.
    """
    row = Row(spec.key)
    if parent is not None and parent.widths is None:
        row.error = f"no ticket: {parent.key.rule} has drawn none"
        return row
    start_time = time.perf_counter()
    run = _Run(spec, parent, row)
    try:
        run.train()
    except WormError as error:
        row.error = f"{type(error).__name__}: {error}"
    run.complete()
    row.seconds = round(time.perf_counter() - start_time, 1)
    return row


class _Run:
    def __init__(self, spec: RunSpec, parent: Row | None, row: Row) -> None:
        subject = SUBJECTS[spec.subject]
        self._spec = spec
        self._row = row
        self._samples: Samples = subject.samples()
        self._batch_size = subject.batch_size
        self._steps = len(self._samples.images) // subject.batch_size
        sample = self._samples.images[:1]
        dense = subject.build(1.0)
        self._dense = count_parameters(dense), count_flops(dense, sample)
        self._recipe = spec.rule.recipe(subject, spec.prune_ratio, spec.seed, parent)
        self._loop = Loop(subject, self._recipe, self._steps, spec.epochs * self._steps)
        self._network = self._loop.network
        self._engine = self._loop.engine
        self._network_flops = count_flops(self._network, sample)
        self._newest_batches = deque[Tensor](maxlen=_STATISTICS_BATCHES)
        self._num_steps = 0
        self._flops = 0

    def train(self) -> None:
        row = self._row
        if self._engine.is_due:
            self._record(self._loop.check())
        for epoch in range(self._spec.epochs):
            generator = torch.Generator().manual_seed(1000 * self._spec.seed + epoch)
            order = torch.randperm(len(self._samples.images), generator=generator)
            losses = [self._step(batch) for batch in order.split(self._batch_size)[: self._steps]]
            parameters, flops = self._dense
            row.losses.append(round(sum(losses) / len(losses), 4))
            row.accuracies.append(self._accuracy())
            row.estimated_accuracies.append(self._estimated_accuracy())
            row.computed.append(self._flops / (self._steps * flops))
            row.sent.append(self._loop.total_sent_bytes / (self._steps * 4 * parameters))
            row.training_seconds.append(round(self._loop.clock.reset(), 3))

    def _step(self, batch: Tensor) -> float:
        loss = self._loop.step(batch)
        self._count(batch)
        self._remove_at_random()
        verdict = self._loop.check()
        self._record(verdict)
        if self._engine.phase != "ticket" and (verdict.stage or verdict.ticket):
            self._draw(last=verdict.ticket)
        return loss

    def _count(self, batch: Tensor) -> None:
        self._num_steps += 1
        self._flops += self._network_flops
        self._newest_batches.append(self._loop.share(batch))

    def _remove_at_random(self) -> None:
        """Drop random channels at the step at which the search would drop others."""
        removal = self._recipe.random_removal
        if removal is None or self._num_steps != round(removal.epoch * self._steps):
            return
        mask = removal.mask(self._engine.groups)
        if removal.gradual:
            self._engine.truncate(mask)
        else:
            self._row.elbow_epoch = self._epochs
            self._draw(last=True, mask=mask)

    def _record(self, verdict: Verdict) -> None:
        row = self._row
        row.paused_steps += verdict.paused
        row.removed_fraction = max(row.removed_fraction, verdict.removed_fraction)
        is_elbow = verdict.elbow or verdict.phase is Phase.TRUNCATE
        if is_elbow and row.elbow_epoch is None:
            row.elbow_epoch = self._epochs
            if self._engine.config.truncation.removes:
                row.before_pruning = self._estimated_accuracy()
        if row.ticket_epoch is not None and self._num_steps == self._steps + round(
            row.ticket_epoch * self._steps
        ):
            row.after_one_epoch = self._estimated_accuracy()

    def _draw(self, last: bool, mask: Mask | None = None) -> None:
        engine, row = self._engine, self._row
        if row.before_pruning is None:
            row.before_pruning = self._estimated_accuracy()
        before = self._logits(self._samples.validation_images)
        self._loop.draw(mask)
        after = self._logits(self._samples.validation_images)
        row.change_at_draw = max(row.change_at_draw, float((before - after).abs().max()))
        self._network_flops = count_flops(self._network, self._samples.images[:1])
        if last:
            assert engine.mask is not None
            row.ticket_epoch = self._epochs
            row.widths = {name: int(kept.sum()) for name, kept in engine.mask.items()}
            classes = self._samples.validation_classes
            row.before_draw = _share_right(before, classes)
            row.after_draw = _share_right(after, classes)

    @property
    def _epochs(self) -> float:
        """Epochs trained so far."""
        return self._num_steps / self._steps

    def complete(self) -> None:
        """Fill in the figures of the final network."""
        row = self._row
        row.num_parameters, row.num_flops = count_parameters(self._network), self._network_flops
        parameters, flops = self._dense
        row.parameters, row.flops = row.num_parameters / parameters, row.num_flops / flops
        if not row.error:
            samples = self._samples
            row.test_accuracy = _share_right(
                self._logits(samples.test_images), samples.test_classes
            )

    def _estimated_accuracy(self) -> float:
        """Accuracy with BatchNorm statistics of the newest batches; the network is restored.

        The engine has already recorded these batches, so its recorded inputs do not change.
        """
        norms = [
            m for m in self._network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
        ]
        saved = [copy.deepcopy(norm.state_dict()) for norm in norms]
        update_bn([self._samples.images[batch] for batch in self._newest_batches], self._network)
        accuracy = self._accuracy()
        for norm, state in zip(norms, saved):
            norm.load_state_dict(state)
        return accuracy

    def _accuracy(self) -> float:
        logits = self._logits(self._samples.validation_images)
        return _share_right(logits, self._samples.validation_classes)

    @torch.no_grad()
    def _logits(self, images: Tensor) -> Tensor:
        with in_eval(self._network):
            return torch.cat([self._network(each) for each in images.split(_EVALUATION_BATCH)])


def _share_right(logits: Tensor, classes: Tensor) -> float:
    return round(float((logits.argmax(dim=1) == classes).float().mean()), 4)
