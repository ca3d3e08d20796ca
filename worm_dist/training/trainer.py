"""Trainer: the training loop around the engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..distributed.collectives import Communicator, ProcessGroupComm
from ..distributed.graceful_stop import StopCoordinator, Stopped
from ..distributed.init import RankInfo
from ..distributed.progress import Progress
from ..engine.attachment import context_of
from ..errors import CollapseError, NonFiniteError
from ..groups.flops import count_flops
from ..pruning.collapse import REMEDY
from ..verdict import Phase
from .build import build
from .checkpointer import Checkpointer
from .consistency import require_same_network
from .data.augmentation_rng import EpochSampler
from .evaluation import EvalResult, Speed, count_parameters, evaluate, total_over_ranks
from .nonfinite import FiniteCheck
from .parallelize import averaged_gradients, backward, num_passes, step
from .precision import autocast
from .rank_state import Position
from .reporting.not_found import why_not_found
from .reporting.reporter import Report
from .reporting.result import Result
from .run_config import RunConfig
from .training_state import TrainingState

__all__ = ["Trainer"]

_SHARE_OF_CHANCE = 0.95
"""Fraction of ``chance_loss`` above which the network counts as having learnt nothing."""
_HAS_NOT_LEARNT = "train for more epochs, or with another optimizer.lr or a lower search.l1"


class Trainer:
    """Trains one network by the settings; every rank creates a trainer and calls ``run``.

    Args:
        config: the run's settings.
        rank_info: rank, world size and local rank of this process.
        device: the device to train on.
        report: receives the events of the run; a no-op on all ranks but zero.
        progress: receives the progress of this rank, for the watchdog.
        stop: coordinates a graceful stop before the end.
        checkpointer: writes checkpoints; None if the run need not be resumable.

    Attributes:
        engine: the engine, attached to the wrapped model.
        result: the run's figures so far.
        stopped: True if ``run`` returned early because of a stop request.

    Raises:
        ConfigError: data or model do not fit the settings, or the ranks do not see the same data.
    """

    def __init__(
        self,
        config: RunConfig,
        rank_info: RankInfo,
        device: torch.device,
        report: Report,
        progress: Progress | None = None,
        stop: StopCoordinator | None = None,
        checkpointer: Checkpointer | None = None,
    ) -> None:
        self.stopped = False
        self._config = config
        self._device = device
        self._report = report
        self._progress = progress or Progress()
        self._stop = stop or StopCoordinator()
        self._checkpointer = checkpointer
        assert dist.group.WORLD is not None
        self._ranks: Communicator = ProcessGroupComm(dist.group.WORLD, device)
        self._parts = build(config, rank_info, device, self._ranks, self._progress)
        self.engine, self.result = self._parts.engine, self._parts.result
        self._measure_network()
        steps_per_epoch = len(self._parts.train_loader)
        lengths = steps_per_epoch, config.epochs * steps_per_epoch
        self._save_every = config.checkpoint.every.steps(*lengths)
        self._compare_every = config.divergence.check_every.steps(*lengths)
        self._finite_check = FiniteCheck(self._ranks)
        self._state = TrainingState(config, self._parts, device)

    @property
    def model_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``build_model`` that rebuild the dense network."""
        return self._parts.model_arguments

    @property
    def _position(self) -> Position:
        return self._state.position

    def run(self) -> Result:
        """Run all phases: search, truncate, draw, and train the ticket.  Collective.

        Raises:
            NonFiniteError: gradients are NaN or infinite; raised on every rank at the same step.
            DivergenceError: the ranks no longer hold the same network.
            CheckpointError: a checkpoint cannot be written.
        """
        self._report.start(
            self.result, self._config.epochs, len(self._parts.train_loader), self.engine
        )
        try:
            while self._position.epoch < self._num_epochs and not self._is_good_enough:
                self._train_epoch()
                self._end_epoch()
        except Stopped:
            self.stopped = True
            self._save()
        if self._checkpointer is not None:
            self._checkpointer.finish()
        if not self.stopped:
            self._complete()
        return self.result

    @property
    def _num_epochs(self) -> int:
        return self._parts.retraining.num_epochs(self._position)

    @property
    def _is_good_enough(self) -> bool:
        between_epochs = self._position.batch == 0
        accuracy = self.result.accuracy.final
        return between_epochs and self._parts.retraining.is_good_enough(self._position, accuracy)

    def _complete(self) -> None:
        self._state.phase_stats.complete(self.engine.phase, self.engine.traffic)
        self.result.status = self._status()
        if self.result.status == "not_found":
            self.result.reason = why_not_found(self.result, self._config, self.engine.history)
        self.result.at_chance = self._position.at_chance

    def _train_epoch(self) -> None:
        """Take the remaining steps of the epoch."""
        position, loader = self._position, self._parts.train_loader
        sampler, size = loader.sampler, loader.batch_size
        assert isinstance(sampler, EpochSampler) and size is not None
        sampler.start_at(position.epoch, position.batch * size)
        self._parts.network.train()
        if position.draws:
            self._draw()
        if self.engine.is_due and not self.engine.step:
            self._check()
        self._speed = Speed()
        self._reach("the next batch")
        for inputs, targets in self._parts.placement.batches(loader):
            loss = self._train_step(inputs, targets)
            self._progress.started()
            losses = self._state.losses
            losses += torch.stack([loss.double(), torch.ones_like(losses[0])])
            position.batch += 1
            self._state.phase_stats.count(self.engine.phase, self.engine.traffic, self._flops)
            self._speed.count(self._config.data.batch_size)
            self._report.step(self.engine, float(self._parts.schedule.get_last_lr()[0]), loss)
            if self.engine.step % self._compare_every == 0:
                self.require_consistent()
            if self.engine.is_due:
                self._check()
            self._reach("the next batch")
            self._parts.retraining.before_step(self.engine.step)
            self._stop.pass_boundary()
            if self.engine.step % self._save_every == 0 and position.batch < len(loader):
                self._save()
        self._finite_check.wait()

    def _end_epoch(self) -> None:
        """Evaluate after the last step of the epoch, report, and advance to the next epoch."""
        speed, position = self._speed.images_per_second, self._position
        loss_sum, count = total_over_ranks(self._state.losses.clone()).tolist()
        if not torch.isfinite(torch.tensor(loss_sum)):
            raise NonFiniteError(
                f"epoch {position.epoch + 1}, step {self.engine.step}: the training loss is "
                f"{loss_sum}; lower optimizer.lr, or train in fp32"
            )
        self._progress.reach(f"the test after epoch {position.epoch + 1}")
        evaluation = self._evaluate()
        wanted = self._config.retraining.until_accuracy
        self.result.tested(position.epoch + 1, evaluation.accuracy, wanted)
        self._require_better_than_chance(evaluation, loss_sum / count)
        position.epoch, position.batch = position.epoch + 1, 0
        self._state.losses.zero_()
        self._report.trained(self.engine.step, loss_sum / count, speed)
        self._report.epoch(position.epoch, self.engine, evaluation, self._flops)
        if self.engine.step % self._save_every == 0 or position.epoch == self._num_epochs:
            self._save(evaluation.accuracy)

    def _require_better_than_chance(self, evaluation: EvalResult, loss: float) -> None:
        """Raise if the network has fallen back to chance in training and test, or is still there
        after the last epoch, unless the test split is too small to tell.

        In the two epochs after a draw by the published rule that is allowed.

        Args:
            evaluation: the newest evaluation.
            loss: mean training loss of the epoch.

        Raises:
            CollapseError: the network has collapsed; raised on every rank.
        """
        position, drawn = self._position, self.result.ticket_epoch
        has_just_drawn = drawn is not None and position.epoch + 1 - drawn < 2
        looks_collapsed = evaluation.is_chance and loss > _SHARE_OF_CHANCE * evaluation.chance_loss
        is_last = position.epoch + 1 == self._num_epochs and evaluation.can_tell_chance
        has_collapsed = looks_collapsed and (position.has_learnt or is_last) and not has_just_drawn
        if not evaluation.output_varies or has_collapsed:
            raise CollapseError(
                f"epoch {position.epoch + 1}, step {self.engine.step}: the network is no better "
                f"than a constant answer: training loss {loss:.4g}, "
                f"test accuracy {evaluation.accuracy:.4f}"
                f"{'' if evaluation.output_varies else ', and all outputs are the same'}; "
                f"{_HAS_NOT_LEARNT if not position.has_learnt and is_last else REMEDY}"
            )
        position.has_learnt = position.has_learnt or not evaluation.is_chance
        position.at_chance = evaluation.is_chance

    def _train_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Take one optimizer step; return this rank's data loss, a detached scalar.

        Args:
            inputs, targets: a batch on the device.
        """
        self._reach("the gradients")
        passes = num_passes(self.engine)
        total = torch.zeros((), device=self._device)
        for part, labels in zip(inputs.chunk(passes), targets.chunk(passes), strict=True):
            with autocast(self._config.precision, self._parts.network):
                loss = nn.functional.cross_entropy(self.engine.model(part), labels)
            self.engine.watch(loss)
            backward(self.engine, loss + self.engine.penalty())
            total += loss.detach() / passes
            self._finite_check.check(self.engine.step + 1, total, averaged_gradients(self.engine))
            step(self.engine)
        self._parts.schedule.step()
        return total

    def require_consistent(self) -> None:
        """Raise unless the weights are finite and equal on all ranks.  Collective.

        Called before every save.

        Raises:
            NonFiniteError: the newest gradients were not finite.
            DivergenceError: the ranks no longer hold the same network; names tensors and ranks.
        """
        self._finite_check.wait()
        self._reach("comparing the ranks", ahead=0)
        require_same_network(
            self._parts.network,
            self._ranks,
            f"step {self.engine.step}",
            self.engine.num_nonzero_removed,
        )

    def _reach(self, what: str, ahead: int = 1) -> None:
        """Report this rank's progress.

        Args:
            what: the activity that begins.
            ahead: 1 if it belongs to the next step, 0 if to the newest one.
        """
        self._progress.reach(f"step {self.engine.step + ahead}, {what}")

    def _check(self) -> None:
        before = self.engine.phase
        self._finite_check.wait()
        self._progress.reach(f"the check at step {self.engine.step}")
        verdict = self.engine.check()
        epoch = self._epoch()
        if verdict.new_mask:
            self.result.checks += 1
            self._report.check(epoch, self.engine, verdict)
        if verdict.phase is not before:
            self._state.phase_stats.close(before)
            self.result.elbow_epoch = epoch
            self._report.phase(epoch, self.engine)
        if verdict.phase is Phase.TRUNCATE:
            self.result.live_fraction = verdict.live_fraction
            if self._config.truncation.removes:
                self.result.removed_fraction = verdict.removed_fraction
            self._report.removal(epoch, self.engine, verdict)
        if verdict.stage:
            self._progress.reach(f"a stage of the draw at step {self.engine.step}")
            self.engine.draw(copies=self._parts.retraining.copies)
            self._measure_network()
            self._report.stage(epoch, self.engine, count_parameters(self._parts.network))
        if verdict.ticket:
            self._position.draws = True
            self._draw()

    def _draw(self) -> None:
        """Test, draw and test again; a stop in either test is resumed at that test."""
        result, epoch = self.result, self._epoch()
        self._progress.reach(f"the draw at step {self.engine.step}")
        if self.engine.phase is not Phase.TICKET:
            result.accuracy.before_draw = self._evaluate().accuracy
            self._state.phase_stats.close(self.engine.phase)
            self.engine.draw(copies=self._parts.retraining.copies)
            result.ticket_epoch = epoch
            self._measure_network()
            result.parameters.ticket = count_parameters(self._parts.network)
            result.flops.ticket = self._flops
        result.accuracy.after_draw = self._evaluate().accuracy
        self._report.phase(epoch, self.engine)
        self._report.drawn(self.engine, result)
        self._parts.retraining.begin(self.engine, self._position)
        self._position.draws = False

    def _measure_network(self) -> None:
        """Count the FLOPs of the current network for one sample."""
        with context_of(self.engine).full_network() as network:
            self._flops = count_flops(network, self._parts.sample)

    def _evaluate(self) -> EvalResult:
        # The ranks may test different numbers of batches, so no weights are gathered meanwhile.
        with context_of(self.engine).full_network() as network:
            return evaluate(
                network,
                self._parts.placement.batches(self._parts.test_loader),
                self.model_arguments["num_classes"],
                self._device,
                self._stop,
                self._progress,
                self._config.precision,
            )

    # ---- checkpoints -----------------------------------------------------------------------------

    def _save(self, accuracy: float | None = None) -> None:
        if self._checkpointer is None:
            return
        self.require_consistent()
        self._reach("saving", ahead=0)
        state = self.state_dict(sharded=self._checkpointer.is_on_shared_disk)
        self._checkpointer.save(state, self.engine.step, str(self.engine.phase), accuracy)

    def state_dict(self, *, sharded: bool = False) -> dict[str, Any]:
        """See ``TrainingState.state_dict``.  Collective."""
        return self._state.state_dict(self._report.state_dict(self.engine), sharded=sharded)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """See ``TrainingState.load_state_dict``.  Collective."""
        self._state.load_state_dict(state)
        self._measure_network()

    # ---- figures ---------------------------------------------------------------------------------

    def _epoch(self) -> float:
        return round(self.engine.step / len(self._parts.train_loader), 4)

    def _status(self) -> str:
        self.result.mask_digest = self.engine.mask.digest if self.engine.mask else None
        ends: dict[Phase, str] = {Phase.DENSE: "dense", Phase.TICKET: "ticket"}
        return ends.get(self.engine.phase, "not_found")
