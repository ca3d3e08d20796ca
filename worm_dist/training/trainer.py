"""Trainer: the training loop around the engine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import worm_dist

from ..distributed.collectives import Communicator, ProcessGroupComm
from ..distributed.graceful_stop import StopCoordinator, Stopped
from ..distributed.init import RankInfo
from ..distributed.progress import Progress
from ..errors import CheckpointError, CollapseError, NonFiniteError
from ..models import build_model
from ..pruning.collapse import REMEDY
from ..verdict import Phase
from .checkpointer import Checkpointer
from .consistency import require_same_network
from .data import load_data, test_loader, train_loader
from .data.augmentation_rng import EpochSampler
from .data.likeness import require_same_data
from .evaluation import EvalResult, Speed, count_flops, count_parameters, evaluate, total_over_ranks
from .gating import gated
from .nonfinite import FiniteCheck
from .optim import build_optimizer, build_schedule
from .parallelize import averaged_gradients, backend_name, backward, num_passes, step, wrapped
from .position import Position
from .rank_state import (
    gathered_on_rank_zero,
    newest_inputs,
    own_of,
    own_state,
    restore_random,
    seed_all,
    with_own,
    without_own,
)
from .reporting.phase_stats import PhaseStats
from .reporting.reporter import Report
from .reporting.result import Result
from .run_config import RunConfig

__all__ = ["Trainer"]

FORMAT = 2

_SHARE_OF_CHANCE = 0.95
"""Of the loss of the best constant answer: above it, nothing worth speaking of is known."""


class Trainer:
    """Trains one network as the settings say; every rank makes one and calls ``run``.

    Args:
        config: of the run.
        place: of this process.
        device: to train on.
        report: is told what happens; silent on all ranks but zero.
        progress: is told how far this rank has come.
        halt: knows when to stop before the end.
        saving: writes checkpoints; None for a training that cannot be gone on with.

    Attributes:
        stopped: ``run`` has returned before the end, because a rank was asked to stop.

    Raises:
        ConfigError: data or model do not fit the settings, or the ranks do not see the same data.
    """

    def __init__(
        self,
        config: RunConfig,
        place: RankInfo,
        device: torch.device,
        report: Report,
        progress: Progress | None = None,
        halt: StopCoordinator | None = None,
        saving: Checkpointer | None = None,
    ) -> None:
        self.stopped = False
        self._config = config
        self._device = device
        self._report = report
        self._progress = progress or Progress()
        self._halt = halt or StopCoordinator()
        self._saving = saving
        assert dist.group.WORLD is not None
        self._ranks: Communicator = ProcessGroupComm(dist.group.WORLD, device)
        seed_all(config.seed)
        self._progress.reach("the start, loading the data")
        data = load_data(config.data)
        shares = (config.data, place.rank, place.world_size)
        self._train = train_loader(data, *shares, config.seed, device)
        self._test = test_loader(data, *shares, device)
        require_same_data(data, len(self._train), self._ranks)
        self._progress.reach("the start, building the network")
        self.model_arguments: dict[str, Any] = {
            "name": config.model.name,
            "num_classes": data.num_classes,
            "in_channels": data.sample_shape[0],
            "arguments": config.model.arguments,
        }
        network = build_model(**self.model_arguments)
        self._network = gated(network, config.search).to(device)
        optimizer = build_optimizer(config.optimizer, self._network)
        model = wrapped(self._network, optimizer, config, place.world_size, device)
        self._dtype = next(self._network.parameters()).dtype  # DeepSpeed may have changed it
        self._sample = torch.zeros(1, *data.sample_shape, device=device, dtype=self._dtype)
        steps_per_epoch = len(self._train)
        self._schedule = build_schedule(config.schedule, optimizer, config.epochs, steps_per_epoch)
        self._save_every = config.checkpoint.every.steps(steps_per_epoch)
        self._compare_every = config.divergence.check_every.steps(steps_per_epoch)
        self._finite = FiniteCheck(device, self._ranks)
        self.engine = worm_dist.attach(
            model,
            optimizer,
            config.worm,
            example_inputs=self._sample,
            steps_per_epoch=steps_per_epoch,
        )
        self.result = Result(
            preset=config.preset,
            seed=config.seed,
            world_size=place.world_size,
            backend=backend_name(model, device),
            data=data.description,
        )
        self.result.parameters.dense = count_parameters(self._network)
        self._measure_network()
        self.result.flops.dense = self._flops
        self._at = Position()
        self._losses = torch.zeros(2, dtype=torch.float64, device=device)
        self._tally = PhaseStats(self.result)

    def run(self) -> Result:
        """Train, search, truncate, draw, train on.  Collective.

        Raises:
            NonFiniteError: gradients are NaN or infinite, on every rank at the same step.
            DivergenceError: the ranks no longer hold the same network.
            CheckpointError: a checkpoint cannot be written.
        """
        self._report.start(self.result, self._config.epochs, len(self._train), self.engine)
        try:
            while self._at.epoch < self._config.epochs:
                self._train_epoch()
                self._end_epoch()
        except Stopped:
            self.stopped = True
            self._save()
        if self._saving is not None:
            self._saving.finish()
        if not self.stopped:
            self._complete()
        return self.result

    def _complete(self) -> None:
        self._tally.complete(self.engine.phase, self.engine.traffic)
        self.result.status = self._status()
        if self.result.status == "not_found":
            self.result.reason = self.result.why_not_found()
        self.result.at_chance = self._at.at_chance

    def _train_epoch(self) -> None:
        """What is left of the epoch's steps."""
        at, sampler, size = self._at, self._train.sampler, self._train.batch_size
        assert isinstance(sampler, EpochSampler) and size is not None
        sampler.start_at(at.epoch, at.batch * size)
        self._network.train()
        if at.draws:
            self._draw()
        self._speed = Speed()
        self._reach("the next batch")
        for inputs, targets in self._train:
            loss = self._train_step(inputs, targets)
            self._progress.started()
            self._losses += torch.stack([loss.double(), torch.ones_like(self._losses[0])])
            at.batch += 1
            self._tally.count(self.engine.phase, self.engine.traffic, self._flops)
            self._speed.count(self._config.data.batch_size)
            self._report.step(self.engine, float(self._schedule.get_last_lr()[0]), loss)
            if self.engine.step % self._compare_every == 0:
                self.require_sound()
            if self.engine.is_due:
                self._check()
            self._reach("the next batch")
            self._halt.pass_by()
            if self.engine.step % self._save_every == 0 and at.batch < len(self._train):
                self._save()
        self._finite.settle()

    def _end_epoch(self) -> None:
        """All steps of the epoch are done: test, and begin the next one."""
        speed, at = self._speed.images_per_second, self._at
        loss_sum, count = total_over_ranks(self._losses.clone()).tolist()
        if not torch.isfinite(torch.tensor(loss_sum)):
            raise NonFiniteError(
                f"epoch {at.epoch + 1}, step {self.engine.step}: the training loss is {loss_sum}; "
                "lower optimizer.lr, or train in fp32"
            )
        self._progress.reach(f"the test after epoch {at.epoch + 1}")
        score = self._score()
        self.result.accuracy.final = score.accuracy
        self._require_better_than_chance(score, loss_sum / count)
        at.epoch, at.batch = at.epoch + 1, 0
        self._losses.zero_()
        self._report.trained(self.engine.step, loss_sum / count, speed)
        self._report.epoch(at.epoch, self.engine, score)
        if self.engine.step % self._save_every == 0 or at.epoch == self._config.epochs:
            self._save(score.accuracy)

    def _require_better_than_chance(self, score: EvalResult, loss: float) -> None:
        """What has been learnt must not be lost for good, in training as in the test.  Right after
        a published draw it may be, for an epoch or two.

        Raises:
            CollapseError: on every rank.
        """
        at, drawn = self._at, self.result.ticket_epoch
        has_just_drawn = drawn is not None and at.epoch + 1 - drawn < 2
        is_lost = score.is_chance and loss > _SHARE_OF_CHANCE * score.chance_loss
        if not score.answers or (is_lost and at.has_learnt and not has_just_drawn):
            raise CollapseError(
                f"epoch {at.epoch + 1}, step {self.engine.step}: the network is no better than a "
                f"constant answer: training loss {loss:.4g}, test accuracy {score.accuracy:.4f}"
                f"{'' if score.answers else ', and all outputs are the same'}; {REMEDY}"
            )
        at.has_learnt = at.has_learnt or not score.is_chance
        at.at_chance = score.is_chance

    def _train_step(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """One optimizer step; returns the data loss of this rank, detached."""
        inputs = inputs.to(self._device, self._dtype, non_blocking=True)
        targets = targets.to(self._device, non_blocking=True)
        self._reach("the gradients")
        bf16 = self._config.precision == "bf16" and self._dtype == torch.float32
        passes = num_passes(self.engine)
        total = torch.zeros((), device=self._device)
        for part, wanted in zip(inputs.chunk(passes), targets.chunk(passes), strict=True):
            with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=bf16):
                loss = nn.functional.cross_entropy(self.engine.model(part), wanted)
            self.engine.watch(loss)
            backward(self.engine, loss + self.engine.penalty())
            total += loss.detach() / passes
            self._finite.look(self.engine.step + 1, total, averaged_gradients(self.engine))
            step(self.engine)
        self._schedule.step()
        return total

    def require_sound(self) -> None:
        """The weights are numbers, and the same on all ranks.  Collective; comes before anything
        that is to last is made of them.

        Raises:
            NonFiniteError: the newest gradients were not finite.
            DivergenceError: the ranks no longer hold the same network; names tensors and ranks.
        """
        self._finite.settle()
        self._reach("comparing the ranks", ahead=0)
        require_same_network(self._network, self._ranks, f"step {self.engine.step}")

    def _reach(self, what: str, ahead: int = 1) -> None:
        """Tell how far this rank is: before the next step, or after the newest."""
        self._progress.reach(f"step {self.engine.step + ahead}, {what}")

    def _check(self) -> None:
        before = self.engine.phase
        self._finite.settle()
        self._progress.reach(f"the check at step {self.engine.step}")
        verdict = self.engine.check()
        epoch = self._epoch()
        if verdict.new_mask:
            self.result.checks += 1
            self._report.check(epoch, self.engine, verdict)
        if verdict.phase is not before:
            self._tally.close(before)
            self.result.elbow_epoch = epoch
            self._report.phase(epoch, self.engine)
        if verdict.phase is Phase.TRUNCATE:
            self.result.live_fraction = verdict.live_fraction
            if self._config.truncation.removes:
                self.result.left_fraction = verdict.left_fraction
            self._report.removal(epoch, self.engine, verdict)
        if verdict.stage:
            self._progress.reach(f"a stage of the draw at step {self.engine.step}")
            self.engine.draw()
            self._measure_network()
            self._report.stage(epoch, self.engine, count_parameters(self._network))
        if verdict.ticket:
            self._at.draws = True
            self._draw()

    def _draw(self) -> None:
        """Test, draw and test again; it can be broken off in either test, and goes on there."""
        result, epoch = self.result, self._epoch()
        self._progress.reach(f"the draw at step {self.engine.step}")
        if self.engine.phase is not Phase.TICKET:
            result.accuracy.before_draw = self._score().accuracy
            self._tally.close(self.engine.phase)
            self.engine.draw()
            result.ticket_epoch = epoch
            self._measure_network()
            result.parameters.ticket = count_parameters(self._network)
            result.flops.ticket = self._flops
        result.accuracy.after_draw = self._score().accuracy
        self._report.phase(epoch, self.engine)
        self._report.drawn(self.engine, result)
        self._at.draws = False

    def _measure_network(self) -> None:
        """What one sample costs in the network as it is now."""
        self._flops = count_flops(self._network, self._sample)

    def _score(self) -> EvalResult:
        num_classes = self.model_arguments["num_classes"]
        return evaluate(self._network, self._test, num_classes, self._device, self._halt)

    # ---- checkpoints -----------------------------------------------------------------------------

    def _save(self, accuracy: float | None = None) -> None:
        if self._saving is None:
            return
        self.require_sound()
        self._reach("saving", ahead=0)
        state = self.state_dict()
        self._saving.save(state, self.engine.step, str(self.engine.phase), accuracy)

    def state_dict(self) -> dict[str, Any]:
        """All that ``load_state_dict`` needs to go on, on rank zero; less elsewhere.  Collective.

        The tensors are those that are trained on, and no copies.
        """
        engine = self.engine.state_dict()
        optimizer = self.engine.optimizer_state()
        everyone = gathered_on_rank_zero(own_state(self._losses, engine))
        return {
            "format": FORMAT,
            "at": asdict(self._at),
            "engine": without_own(engine),
            "network": self._network.state_dict(),
            "optimizer": optimizer,
            "schedule": self._schedule.state_dict(),
            "ranks": everyone,
            "result": self.result.as_dict(),
            "tally": self._tally.state_dict(),
            "report": self._report.state_dict(self.engine),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from there; this trainer has not trained yet.  Collective.

        Bit for bit on as many ranks.  On another number, each step has the same samples as it would
        have had, and sums of floats have another order.

        Args:
            state: of rank zero.

        Raises:
            CheckpointError, ConfigError: it is of another training.
        """
        if state.get("format") != FORMAT:
            raise CheckpointError(
                f"--resume: wanted a run of format {FORMAT}, found {state.get('format')}; another "
                "version of worm_dist wrote it"
            )
        self._at = Position(**state["at"])
        own, engine = own_of(state["ranks"]), state["engine"]
        self.engine.load_state_dict(with_own(engine, own, self._newest_inputs(engine)))
        self._measure_network()
        self._network.load_state_dict(state["network"])
        self.engine.load_optimizer_state(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._losses = torch.tensor(own["losses"], dtype=torch.float64, device=self._device)
        self.result.go_on_from(state["result"])
        self._tally.load_state_dict(state["tally"])
        restore_random(own["random"], self._config.seed, self.engine.step)
        if self.engine.step:
            self._network.train()
            self.engine.rehearse(self._one_pass)

    def _one_pass(self) -> Tensor:
        (inputs,) = newest_inputs(self._train, self._at.epoch, self._at.batch, 1)
        logits: Tensor = self.engine.model(inputs.to(self._device, self._dtype))
        return logits.float().mean() + self.engine.penalty()

    def _newest_inputs(self, engine: Mapping[str, Any]) -> list[Tensor]:
        """Of the newest passes, oldest first, as many as an engine remembered."""
        count, passes = len(engine["rank"]["inputs"] or ()), num_passes(self.engine)
        batches = newest_inputs(self._train, self._at.epoch, self._at.batch, -(-count // passes))
        parts = [part for batch in batches for part in batch.to(self._dtype).chunk(passes)]
        return parts[len(parts) - count :]

    # ---- figures ---------------------------------------------------------------------------------

    def _epoch(self) -> float:
        return round(self.engine.step / len(self._train), 4)

    def _status(self) -> str:
        self.result.mask_digest = self.engine.mask.digest if self.engine.mask else None
        ends: dict[Phase, str] = {Phase.DENSE: "dense", Phase.TICKET: "ticket"}
        return ends.get(self.engine.phase, "not_found")
