"""Engine: search, truncate, draw the ticket.

This is Early-Bird ticket search (arXiv 1909.11957) accelerated by WORM gradient truncation (PMLR
262:232-240), over many ranks: scores are averaged, masks compared by digest, rank zero decides, and
all ranks apply its verdict.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..config import WormConfig
from ..distributed.attendance import Attendance
from ..distributed.collectives import bits
from ..errors import ConfigError
from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.mask import Mask
from ..groups.nested import mapped
from ..groups.remaining_channels import RemainingChannels
from ..pruning.agreement import agreed_mask, require_live_survivors, require_reversible
from ..pruning.exactness import agreed_groups
from ..pruning.optimizer_transfer import kept_indices, select
from ..pruning.recorded_inputs import RecordedInputs
from ..pruning.surgery import cuts_of, shapes_of, ungated
from ..search.convergence import CheckRecord, History
from ..search.ranking import Ranking
from ..search.removal_order import removal_order
from ..search.unused_parameters import ParameterUsage
from ..ticket.file import save_ticket
from ..truncation.loss_guard import LossGuard
from ..truncation.removal import Removal
from ..truncation.truncation import Truncation, first_reducer, pruned_state
from ..verdict import Phase, Verdict
from .context import TrainingContext, require_countable
from .draw import draw
from .state import Resumable
from .state_schema import plain_settings
from .step_hooks import Traffic
from .usage_errors import UsageErrors, require_alone

__all__ = ["Engine", "attach"]

ScoreFunction = Callable[[nn.Module, ChannelGroup], Tensor]

# The engine may be called within a test loop, but tensors made in inference mode cannot be trained.
_normally = torch.inference_mode(False)


@_normally
def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    config: WormConfig | None = None,
    *,
    example_inputs: Any,
    steps_per_epoch: int | None = None,
    score: ScoreFunction | None = None,
) -> Engine:
    """Attach an engine to a training.  Collective: every rank calls it.

    Args:
        model: a ``DistributedDataParallel``, a DeepSpeed engine (ZeRO stages 0 to 2), or a bare
            module on a single process.
        optimizer: the optimizer of the model's parameters.  For a DeepSpeed engine leave it out, or
            give the one that ``deepspeed.initialize`` returned.
        config: the settings; default ``WormConfig()``.
        example_inputs: small inputs on the model's device to trace the network with: a tensor for
            ``model(x)``, a tuple or list for ``model(x, y)``, a dict of keyword inputs for
            ``model(images=x)``.  They may be nested; a single input that is itself a list or a
            dict, as in detection networks, is put in a tuple: ``([image, image],)``.
        steps_per_epoch: optimizer steps in an epoch.  Not needed where ``search.every`` is in
            epochs: then it is counted between two checks.
        score: a custom importance instead of ``search.importance``: called with the network and a
            group, it returns floats ``[num_channels]``, higher for channels to keep.  It may depend
            on this rank's data; the ranks average it.

    Raises:
        ConfigError: the network cannot be traced, or has nothing to rank channels by; or an epoch's
            length is needed but not known.
        BackendError: several processes but a bare module; a communication hook already registered.
        DivergenceError: the ranks trace different networks, or have different settings.
    """
    config = config or WormConfig()
    if steps_per_epoch is None:
        require_countable(config)
    return Engine(model, optimizer, config, example_inputs, steps_per_epoch, score)


class Engine(Resumable):
    """Searches, truncates and draws; made by ``attach``.

    Attributes:
        config: the settings.
        groups: the channel groups of the dense network, each with name, num_channels, members.
        phase: the current phase.
        mask: the newest mask over the dense network's channels; None before the first check.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        config: WormConfig,
        example_inputs: Any,
        steps_per_epoch: int | None,
        score: ScoreFunction | None,
    ) -> None:
        self.config = config
        self.mask: Mask | None = None
        self.phase = Phase.SEARCH if config.search.enabled else Phase.DENSE
        # Copied, because a loop may reuse their memory before a draw is rehearsed with them.
        inputs, every = mapped(example_inputs, lambda t: t.detach().clone()), config.search.every
        self._training = TrainingContext(model, optimizer, inputs, every, steps_per_epoch)
        require_alone(self._training.backend.called)
        self._training.backend.require_fit(config.truncation)
        self._comm = self._training.comm
        self._attendance = Attendance(self._training.backend.process_group)
        self._num_passes = 0
        self._draw_offered_at = -1
        score_name = None if score is None else getattr(score, "__qualname__", type(score).__name__)
        self._settings = {**plain_settings(config), "score": score_name}
        self._steps_per_epoch = steps_per_epoch
        settings = {**self._settings, "steps_per_epoch": steps_per_epoch}
        self._comm.assert_equal(
            {"setting": {name: repr(value).encode() for name, value in settings.items()}}, "attach"
        )
        network, search = self._training.network, config.search
        may_draw = search.enabled or config.truncation.mode != "off"
        self.groups: Groups = agreed_groups(
            network,
            example_inputs,
            self._comm,
            search,
            any_group=score is not None,
            optional=not may_draw,
        )
        self._training.require_optimized(self.groups)
        if self.groups:
            self._ranking = Ranking(config, network, self.groups, score)
        self._history = History(config.search)
        self._checks_dropped = torch.zeros(self.groups.num_channels, dtype=torch.int64)
        self._channels = RemainingChannels(self.groups)
        self._dense_shapes = shapes_of(network)
        self._num_dense_elements = self._training.num_elements
        self._guard = LossGuard(config.truncation.removal.pause_above)
        self._removal = Removal(
            config.truncation.removal, self._comm, self._guard, self._training.num_steps
        )
        self._follow_network()
        self._verdict = Verdict(self.phase)
        self._penalised = False
        self._attached = True
        self._has_checked = False
        self._warned_groups: set[str] = set()
        num_calls = config.ticket.recalibrate_batches if may_draw else 0
        wants_penalty = (
            search.enabled and search.l1 > 0 and bool(self.groups) and bool(self._ranking.scales)
        )
        self._usage_errors = UsageErrors(self._training, wants_penalty)
        self._training.register_hooks(
            RecordedInputs(num_calls, config.ticket.recalibrate_memory_mb << 20),
            self._before_pass,
            self._before_step,
            lambda step, owners: self._truncation.hold(step, owners),
            self._after_step,
        )

    # ---- the algorithm -------------------------------------------------------------------------

    @_normally
    def check(self) -> Verdict:
        """Score channels, compute and agree on a mask, decide, and apply the verdict.  Collective:
        every rank calls it equally often, after every step or less often.

        During the search a mask is computed whenever ``search.every`` has passed, or at every call
        if its length in steps is not known.  That costs one all-reduce of the scores, one
        comparison of digests and one broadcast of a verdict of fixed size.  While channels are
        being removed the mask stays the same; instead BatchNorm statistics, which lag behind, are
        estimated anew as for a draw, so that an evaluation after the check is meaningful.  Other
        calls cost nothing.

        Raises:
            ConfigError: the training does not fit the engine any more: a new optimizer, say.
            NonFiniteError: a score is NaN or infinite.
            DivergenceError: the ranks differ in scales or masks; names ranks and group.
            CollapseError: while channels are being removed, if the network's output no longer
                depends on its input.
        """
        if not self._searching:
            return self._verdict
        self._usage_errors.require_steps_seen()
        is_due = self._training.check_is_due
        cuts_mask = is_due and not self._removes
        with self._attendance.at(self._call_site("check"), is_due):
            if is_due:
                self._require_training()
                self._training.begin_check()
            if cuts_mask:
                self._verdict = self._next_mask()
            could_draw = self._verdict.stage or self._verdict.ticket
            self._verdict = self._with_local_state(self._verdict, new_mask=cuts_mask)
            can_draw_now = not could_draw and (self._verdict.stage or self._verdict.ticket)
            if self._removes and (is_due or can_draw_now):
                self._training.recalibrate_statistics(self._channels.groups, self._warned_groups)
        if can_draw_now:
            self._draw_offered_at = self.step
        return self._verdict

    def _next_mask(self) -> Verdict:
        scores = self._ranking.scores()
        shared = self._comm.mean(torch.cat([scores, self._guard.levels(scores.device)]))
        average, losses = shared[: len(scores)], shared[len(scores) :]
        candidates, mask, floored = self._ranking.select(average, self._irreversible)
        checks_dropped = torch.where(mask.keep, 0, self._checks_dropped + 1)
        order = removal_order(
            ~mask.keep & ~self._irreversible, checks_dropped, self._ranking.importance(average)
        )
        in_force = {} if self.mask is None else {"mask in force": bits(self.mask)}
        self._comm.assert_equal(
            {
                "scale": bits(self._ranking.replicated(scores)),
                "mask": bits(mask),
                "order of removal": {"(all)": order.numpy().tobytes()},
                **in_force,
            },
            f"check at step {self.step}",
        )
        verdict = Verdict.decode(
            self._comm.broadcast_from_rank0(
                lambda: self._judge(candidates, floored).encode(), Verdict.SIZE
            )
        )
        self._checks_dropped = checks_dropped
        self.mask, self.phase = mask, verdict.phase
        if self.phase is Phase.TRUNCATE:
            self._truncate(order, losses)
        return verdict

    def _judge(self, candidates: Mask, floored: tuple[str, ...]) -> Verdict:
        """Rank zero's decision: truncation starts at the elbow; without gradual removal, the ticket
        is drawn when the masks have settled, or at the elbow if removal is one-shot."""
        record = self._history.record(self.step, candidates, floored)
        truncation = self.config.truncation
        at_elbow = record.elbow and self.phase is Phase.SEARCH
        one_shot = truncation.removes and truncation.removal.schedule == "one_shot"
        starts = at_elbow and truncation.mode != "off" and not one_shot
        return Verdict(
            phase=Phase.TRUNCATE if starts else self.phase,
            ticket=at_elbow if one_shot else record.settled and not truncation.removes,
            elbow=at_elbow and truncation.mode != "off",
            settled=record.settled,
            distance_mean=record.distance_mean,
            distance_max=record.distance_max,
        )

    @_normally
    def truncate(self, mask: Mask) -> None:
        """Freeze the channels that a given mask drops, from the next step on.  Collective: the
        ranks compare the mask by digest.

        The channels are removed as if the search had dropped them, in the order of
        ``search.importance``.  With other ``truncation.frozen_weights`` the search goes on at the
        next ``check``.  A later call may exchange channels whose fade has not begun.

        Args:
            mask: a mask over ``groups``.

        Raises:
            ConfigError: the mask is not of these groups, or keeps a channel whose fade has begun;
                or settings or phase do not allow truncation.
            DivergenceError: the ranks have different masks.
        """
        self._require_attached("truncate")
        self._usage_errors.require_unchanged("truncate")
        if self.config.truncation.mode == "off":
            raise ConfigError("truncate: truncation.mode is 'off'; choose 'hard' or 'soft'")
        where = f"truncate at step {self.step}"
        mask = agreed_mask(self._comm, self.groups, mask, where)
        require_reversible(self.groups, mask, self._irreversible, where)
        scores = self._ranking.scores()
        shared = self._comm.mean(torch.cat([scores, self._guard.levels(scores.device)]))
        importance = self._ranking.importance(shared[: len(scores)])
        order = removal_order(~mask.keep & ~self._irreversible, self._checks_dropped, importance)
        self._comm.assert_equal({"order of removal": {"(all)": order.numpy().tobytes()}}, where)
        self.mask, self.phase = mask, Phase.TRUNCATE
        self._truncate(order, shared[len(scores) :])
        verdict = dataclasses.replace(self._verdict, phase=self.phase)
        self._verdict = self._with_local_state(verdict)

    @_normally
    def draw(self, mask: Mask | None = None, copies: Sequence[nn.Module] = ()) -> None:
        """Remove channels physically and continue with the smaller network.  Collective.

        After ``verdict.stage`` the channels that are zero so far are removed, and the others go on
        fading; after ``verdict.ticket`` the last ones are removed, and the ticket is drawn.

        ``model`` becomes the smaller network in a wrapper with the same arguments; the optimizer
        keeps the state of every surviving element; BatchNorm statistics are estimated anew from
        the last training batches (``ticket.recalibrate_batches``).  Accumulated gradients are
        dropped.

        Args:
            mask: a mask over ``groups``: all channels that it drops are removed, and the ticket is
                drawn.
            copies: copies of the network, such as the ``module`` of an ``AveragedModel``, equally
                many on every rank; they are pruned and their statistics estimated in the same way.

        Raises:
            ConfigError: no channel can be removed yet, the mask is not of these groups or keeps a
                removed channel, a group would have no live channel, or a copy does not match the
                network.  Nothing has been changed then.
            DivergenceError: the ranks have different masks.
            DrawError: a rehearsal on a copy had different outputs, or a step failed on some rank.
                Network, optimizer and statistics have been rolled back on all ranks; continue with
                ``model``.
        """
        self._require_attached("draw")
        self._usage_errors.require_unchanged("draw")
        self._verdict = self._with_local_state(self._verdict)
        is_complete = mask is not None or self._verdict.ticket
        where = f"draw at step {self.step}"
        mask = self._zero_channels_dropped() if mask is None else mask
        with self._attendance.at(self._call_site("draw")):
            mask = agreed_mask(self._comm, self.groups, mask, where, copies)
        self._draw_offered_at = -1
        require_reversible(self.groups, mask, self._channels.removed, where)
        frozen = self._channels.in_dense(self._truncation.frozen)
        require_live_survivors(self.groups, mask, frozen)
        self._training.require_alike(copies)
        self._shrink(mask, copies, is_complete, where)
        generation = self._verdict.generation
        self._verdict = (
            Verdict(Phase.TICKET, generation=generation)
            if is_complete
            else self._with_local_state(self._verdict)
        )

    def penalty(self) -> Tensor:
        """``search.l1`` times the L1 norm of the scales, a scalar to add to the loss.

        Zero without a search and after the draw.  Call it after the forward pass: with
        ``find_unused_parameters`` it leaves out norms that the pass has not used, because their
        gradients are not averaged.
        """
        if not self._searching:
            return torch.zeros((), device=next(self.model.parameters()).device)
        self._penalised = True
        used = None if self._usage is None else self._usage.take()
        penalty = self.config.search.l1 * self._ranking.penalty(used)
        self._usage_errors.follow_penalty(penalty)
        return penalty

    def watch(self, loss: Tensor) -> None:
        """Report the loss of a forward pass, on this rank's data and without the penalty.

        If every rank reports it in every step, the removal of channels pauses while the loss is too
        high (``truncation.removal.pause_above``).  Does not synchronise with the device.

        Args:
            loss: a scalar on any device.
        """
        if self._searching:
            self._guard.watch(loss)

    # ---- properties, saving the ticket, detaching ------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """The model to train; after a draw, the smaller network in a wrapper of the same kind."""
        return self._training.model

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer to step, always the same object.  Under DeepSpeed call ``model.backward``
        and ``model.step`` instead; after a draw it is a new wrapper of the same torch optimizer."""
        return self._training.optimizer

    @property
    def step(self) -> int:
        """Optimizer steps since ``attach``."""
        return self._training.step

    @property
    def is_due(self) -> bool:
        """Whether ``check`` would compute a mask or find that ``draw`` may be called."""
        if not self._searching:
            return False
        verdict = self._with_local_state(self._verdict)
        return self._training.check_is_due or verdict.stage or verdict.ticket

    @property
    def traffic(self) -> Traffic:
        """Bytes sent, and bytes that steps of the dense network would have sent."""
        self._training.traffic.control_bytes = self._comm.sent_bytes
        return self._training.traffic

    @property
    def history(self) -> tuple[CheckRecord, ...]:
        """The records of all checks so far, oldest first; empty on ranks other than zero."""
        return self._history.records

    def save_ticket(self, folder: str | Path, model: Mapping[str, Any] | None = None) -> None:
        """Write the drawn network as ``ticket.json`` and ``ticket.safetensors``, on one rank.

        Args:
            folder: the folder to write to, created if missing.
            model: arguments of ``worm_dist.models.build_model`` for the dense network; None if the
                reader has to build it.

        Raises:
            ConfigError: no ticket has been drawn.
        """
        if self.phase is not Phase.TICKET or self.mask is None:
            raise ConfigError("save_ticket: no ticket has been drawn yet")
        cuts = ungated(cuts_of(self.groups, self.mask, self._dense_shapes))
        save_ticket(Path(folder), self._training.network, self.groups, self.mask, cuts, model)

    def detach(self) -> nn.Module:
        """Remove all hooks.  Collective if a communication hook was registered: torch cannot
        unregister it, so the network is wrapped anew.

        Returns:
            The model to continue with; ``model`` is the same object.
        """
        training = self._training
        hooked = training.reducer is not None and training.backend.keeps_hooks
        training.remove()
        self._remove_hooks()
        if hooked:
            training.backend.release()
            training.switch_to(training.rewrap())
        self._attached = False
        return self.model

    # ---- helpers ---------------------------------------------------------------------------------

    @property
    def _searching(self) -> bool:
        searching = self.config.search.enabled and self.phase is not Phase.TICKET
        return searching and self._attached

    def _require_training(self) -> None:
        """Check for usage errors since the last check."""
        errors, num_steps = self._usage_errors, self._training.since_last_check
        errors.require_step(num_steps, is_first=not self._has_checked)
        errors.require_unchanged(f"check at step {self.step}")
        errors.warn_of_no_penalty()
        errors.warn_of_scaled_penalty(self.config.search.l1)
        self._has_checked = True

    @property
    def _removes(self) -> bool:
        """Whether dropped channels are being removed."""
        return self.phase is Phase.TRUNCATE and self.config.truncation.removes

    @property
    def _irreversible(self) -> Tensor:
        """bool ``[num_channels]``: the dense network's channels that fade or are removed."""
        return self._channels.in_dense(self._truncation.irreversible)

    def _truncate(self, order: Tensor, losses: Tensor) -> None:
        """Freeze what the mask drops.  The ranks have agreed on it, so packed buffers match."""
        self._freeze_dropped()
        if self._removes:
            self._removal.start(order, self.step, losses)
            self._begin_due_channels()

    def _freeze_dropped(self) -> None:
        assert self.mask is not None
        self._truncation.freeze(self._channels.of(~self.mask.keep))
        self._training.reducer = self._truncation.reducer

    def _begin_due_channels(self) -> None:
        """Begin to fade the channels that are due; at the end the mask keeps all others."""
        device = next(self._training.network.parameters()).device
        begin = self._removal.begin(self.step, device)
        if begin.numel():
            self._truncation.begin(self._channels.numbers(begin), self.step)
        if not self._removal.num_waiting:
            self.mask = Mask.from_vector(self.groups.sizes, ~self._irreversible)
            self._freeze_dropped()

    def _shrink(
        self,
        mask: Mask,
        copies: Sequence[nn.Module],
        is_complete: bool,
        where: str,
        is_restored: bool = False,
    ) -> None:
        """Prune the network to the channels that a mask over the dense network's channels keeps."""
        left = self._channels.mask_of(mask)
        cuts = cuts_of(self._channels.groups, left, shapes_of(self._training.network))
        truncation = None if is_complete else self._truncation.state_dict(self.step)
        draw(
            self._training,
            self._channels.groups,
            left,
            copies,
            where,
            is_complete=is_complete,
            is_restored=is_restored,
        )
        self._remove_hooks()
        self._channels.remove(mask)
        self._usage_errors.follow()
        if truncation is None:
            first = first_reducer(self.config.truncation, self._training.backend)
            self._training.reducer = first
            self.mask, self.phase = mask, Phase.TICKET
            return
        network = self._training.network
        self._ranking.follow(network, self._channels.groups, self._channels.removed)
        self._follow_network()
        kept = kept_indices(cuts)
        self._truncation.load_state_dict(
            pruned_state(truncation, left.keep, lambda name, full: select(full, kept.get(name, {})))
        )
        self._training.reducer = self._truncation.reducer

    def _follow_network(self) -> None:
        """Set up truncation and usage tracking for the network as it is now."""
        training, search = self._training, self.config.search
        self._share_of_dense = training.num_elements / self._num_dense_elements
        self._truncation = Truncation(
            self.config.truncation,
            training.backend,
            training.optimizer_view,
            self._channels.groups,
            training.trained,
        )
        training.reducer = self._truncation.reducer
        tracks = search.enabled and training.backend.finds_unused
        self._usage = ParameterUsage(training.network, self._ranking.scales) if tracks else None

    def _remove_hooks(self) -> None:
        """Remove the hooks of truncation and usage tracking."""
        self._truncation.remove()
        if self._usage is not None:
            self._usage.remove()

    def _with_local_state(self, verdict: Verdict, new_mask: bool = False) -> Verdict:
        """The verdict with the fields that each rank computes itself, without communication."""
        truncation = self._truncation
        zero = truncation.zero(self.step)
        num_dropped = 0 if self.mask is None else self.mask.num_channels - self.mask.num_kept
        num_zero = int(zero.sum())
        num_left = self._channels.num_removed + num_zero
        is_over = self._removes and num_left == num_dropped
        share = self.config.truncation.removal.stage
        return dataclasses.replace(
            verdict,
            new_mask=new_mask,
            elbow=new_mask and verdict.elbow,
            ticket=is_over if self._removes else verdict.ticket,
            stage=self._removes and not is_over and num_zero >= max(1.0, share * num_dropped),
            generation=truncation.generation,
            live_fraction=truncation.live_fraction * self._share_of_dense,
            left_fraction=num_left / max(1, num_dropped) if self._removes else 0.0,
            paused=self._removes and self._removal.is_paused,
        )

    def _before_pass(self) -> None:
        """Mark a due call as skipped if this rank trains on, so that ranks waiting in it fail."""
        if self._searching and self._training.check_has_just_become_due:
            self._attendance.mark_skipped(self._call_site("check"))
        if self._searching and self._draw_offered_at == self.step:
            self._attendance.mark_skipped(self._call_site("draw"))
        self._num_passes += 1

    def _call_site(self, call: str) -> str:
        """A description of a call and its position in the training, the same on all ranks."""
        passes = f", {self._num_passes} passes later" if self._num_passes else ""
        return f"{call} at step {self.step}{passes}"

    def _forget_pass(self) -> None:
        self._penalised = False
        if self._usage is not None:
            self._usage.take()

    def _before_step(self) -> None:
        self._usage_errors.note_step(self._penalised)
        self._truncation.before_step(self.config.search.l1 if self._penalised else 0.0)
        self._penalised = False

    def _after_step(self, step: int) -> None:
        self._num_passes = 0
        self._truncation.after_step(step)
        self._guard.after_step()
        if self.phase is Phase.TRUNCATE and self._removal.num_waiting:
            self._begin_due_channels()

    def _zero_channels_dropped(self) -> Mask:
        if not (self._verdict.stage or self._verdict.ticket) or self.mask is None:
            raise ConfigError(
                "draw: no check has found the ticket yet; wait for verdict.stage or "
                "verdict.ticket, or give the mask to draw: engine.draw(mask)"
            )
        if self._verdict.ticket:
            return self.mask
        zero = self._channels.in_dense(self._truncation.zero(self.step))
        return Mask.from_vector(self.groups.sizes, ~zero)

    def _require_not_detached(self, what: str) -> None:
        if not self._attached:
            raise ConfigError(f"{what}: the engine has been detached")

    def _require_attached(self, what: str) -> None:
        self._require_not_detached(what)
        if self.phase is Phase.TICKET:
            raise ConfigError(f"{what}: the ticket has been drawn already")
