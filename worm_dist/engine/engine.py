"""Engine: search, truncate, draw the ticket.

This is Early-Bird ticket search (arXiv 1909.11957) accelerated by WORM gradient truncation (PMLR
262:232-240), over many ranks: all agree on the scores and prove that they hold the same bits, rank
zero decides, all act alike.
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
from ..groups.nested import mapped
from ..groups.remaining_channels import RemainingChannels
from ..pruning.agreement import agreed_mask, require_live_survivors, require_reversible
from ..pruning.exactness import agreed_groups
from ..pruning.optimizer_transfer import kept_places, select
from ..pruning.surgery import cuts_of, shapes_of, ungated
from ..search.convergence import CheckRecord, History
from ..search.mask import Mask
from ..search.ranking import Ranking
from ..search.removal_order import removal_order
from ..search.unused_parameters import ParameterUsage
from ..ticket.file import save_ticket
from ..truncation.loss_guard import LossGuard
from ..truncation.removal import Removal
from ..truncation.truncation import Truncation, first_reduction, state_left
from ..verdict import Phase, Verdict
from .context import TrainingContext, require_countable
from .draw import draw
from .recorded_inputs import RecordedInputs
from .state import Resumable
from .state_schema import plain_settings
from .step_hooks import Traffic
from .usage_errors import UsageErrors, require_alone

__all__ = ["Engine", "attach"]
OwnScore = Callable[[nn.Module, ChannelGroup], Tensor]

# What is made in inference mode can never be trained; a loop may call the engine between its tests.
_normally = torch.inference_mode(False)


@_normally
def attach(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    config: WormConfig | None = None,
    *,
    example_inputs: Any,
    steps_per_epoch: int | None = None,
    score: OwnScore | None = None,
) -> Engine:
    """Attach an engine to a training.  Collective: every rank calls it.

    Args:
        model: ``DistributedDataParallel``, DeepSpeed's engine (ZeRO stages 0 to 2), or a bare
            module on a single process.
        optimizer: of the model's parameters.  A DeepSpeed engine has its own: leave it out, or give
            what ``deepspeed.initialize`` returned.
        config: default ``WormConfig()``.
        example_inputs: a small input on the model's device, with which the network is traced: a
            tensor for ``model(x)``, a tuple or list for ``model(x, y)``, a dict of keyword inputs
            for ``model(images=x)``.  They may be nested; one input that is itself a list or a dict,
            as detection networks take them, stands in a tuple: ``([image, image],)``.
        steps_per_epoch: optimizer steps in an epoch.  Not needed where ``search.every`` is in
            epochs: then it is counted between two checks.
        score: of your own, instead of ``search.importance``: called with the network and a group,
            it gives floats ``[num_channels]``, higher for what is to be kept.  It may look at this
            rank's data; the ranks average it.

    Raises:
        ConfigError: the network cannot be traced or has nothing to rank channels by; an epoch's
            length is needed but not known.
        BackendError: several processes but a bare module; a communication hook already registered.
        DivergenceError: the ranks trace different networks.
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
        phase: where the run is.
        mask: the newest mask over the dense network's channels, None before the first check.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        config: WormConfig,
        example_inputs: Any,
        steps_per_epoch: int | None,
        score: OwnScore | None,
    ) -> None:
        self.config = config
        self.mask: Mask | None = None
        self.phase = Phase.SEARCH if config.search.enabled else Phase.DENSE
        # A draw is rehearsed with them; by then a loop may have written others to the same place.
        remembered = mapped(example_inputs, lambda tensor: tensor.detach().clone())
        self._training = TrainingContext(
            model, optimizer, remembered, config.search.every, steps_per_epoch
        )
        require_alone(self._training.wrapping.called)
        self._training.wrapping.require_fit(config.truncation)
        self._ranks = self._training.ranks
        self._attendance = Attendance(self._training.wrapping.process_group)
        self._num_passes = 0
        self._offered_at = -1
        own = None if score is None else getattr(score, "__qualname__", type(score).__name__)
        self._settings = {**plain_settings(config), "score": own}
        self._steps_per_epoch = steps_per_epoch
        settings = {**self._settings, "steps_per_epoch": steps_per_epoch}
        self._ranks.require_equal(
            {"setting": {name: repr(value).encode() for name, value in settings.items()}}, "attach"
        )
        network, search = self._training.network, config.search
        may_draw = search.enabled or config.truncation.mode != "off"
        self.groups: Groups = agreed_groups(
            network,
            example_inputs,
            self._ranks,
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
            config.truncation.removal, self._ranks, self._guard, self._training.num_steps
        )
        self._follow_network()
        self._verdict = Verdict(self.phase)
        self._penalised = False
        self._attached = True
        self._has_checked = False
        self._told_dead: set[str] = set()
        num_calls = config.ticket.recalibrate_batches if may_draw else 0
        wants_penalty = (
            search.enabled and search.l1 > 0 and bool(self.groups) and bool(self._ranking.scales)
        )
        self._usage_errors = UsageErrors(self._training, wants_penalty)
        self._training.listen(
            RecordedInputs(num_calls, config.ticket.recalibrate_memory_mb << 20),
            self._before_pass,
            self._before_step,
            lambda step, owners: self._truncation.hold(step, owners),
            self._after_step,
        )

    # ---- the algorithm -------------------------------------------------------------------------

    @_normally
    def check(self) -> Verdict:
        """Score, cut, agree, decide, act.  Collective: every rank calls it, as often as the others:
        after every step, or less often.

        While the search goes on a mask is cut whenever ``search.every`` has passed; where its
        length in steps is not known, at every call.  That costs one all-reduce of the scores, one
        comparison of digests and one broadcast of a verdict of fixed size.  While channels leave no
        other mask is cut.  BatchNorm statistics lag behind then, and are estimated anew as for a
        draw, as often, so that a test after a check means something.  Other calls cost nothing.

        Raises:
            NonFiniteError: a score is NaN or infinite.
            DivergenceError: the ranks differ in scales or masks; names ranks and group.
            CollapseError: while channels leave, if the network has come to put out the same
                whatever it is given.
        """
        if not self._searching:
            return self._verdict
        self._usage_errors.require_heard()
        is_due = self._training.check_is_due
        cuts_mask = is_due and not self._removes
        with self._attendance.at(self._here("check"), is_due):
            if is_due:
                self._require_training()
                self._training.begin_check()
            if cuts_mask:
                self._verdict = self._next_mask()
            could_draw = self._verdict.stage or self._verdict.ticket
            self._verdict = self._completed(self._verdict, new_mask=cuts_mask)
            can_draw_now = not could_draw and (self._verdict.stage or self._verdict.ticket)
            if self._removes and (is_due or can_draw_now):
                self._training.recalibrate_alive(self._channels.groups, self._told_dead)
        if can_draw_now:
            self._offered_at = self.step
        return self._verdict

    def _next_mask(self) -> Verdict:
        scores = self._ranking.scores()
        shared = self._ranks.mean(torch.cat([scores, self._guard.levels(scores.device)]))
        average, losses = shared[: len(scores)], shared[len(scores) :]
        candidates, mask, floored = self._ranking.select(average, self._irreversible)
        checks_dropped = torch.where(mask.keep, 0, self._checks_dropped + 1)
        order = removal_order(
            ~mask.keep & ~self._irreversible, checks_dropped, self._ranking.importance(average)
        )
        in_force = {} if self.mask is None else {"mask in force": bits(self.mask)}
        self._ranks.require_equal(
            {
                "scale": bits(self._ranking.replicated(scores)),
                "mask": bits(mask),
                "order of removal": {"(all)": order.numpy().tobytes()},
                **in_force,
            },
            f"check at step {self.step}",
        )
        verdict = Verdict.decode(
            self._ranks.decided_by_rank_zero(
                lambda: self._judge(candidates, floored).encode(), Verdict.SIZE
            )
        )
        self._checks_dropped = checks_dropped
        self.mask, self.phase = mask, verdict.phase
        if self.phase is Phase.TRUNCATE:
            self._truncate(order, losses)
        return verdict

    def _judge(self, candidates: Mask, floored: tuple[str, ...]) -> Verdict:
        """Rank zero's decision: truncation starts at the elbow; where nothing leaves by itself, the
        ticket is drawn when the masks have settled, or at once."""
        finding = self._history.record(self.step, candidates, floored)
        truncation = self.config.truncation
        at_elbow = finding.elbow and self.phase is Phase.SEARCH
        one_shot = truncation.removes and truncation.removal.schedule == "one_shot"
        starts = at_elbow and truncation.mode != "off" and not one_shot
        return Verdict(
            phase=Phase.TRUNCATE if starts else self.phase,
            ticket=at_elbow if one_shot else finding.settled and not truncation.removes,
            elbow=at_elbow and truncation.mode != "off",
            settled=finding.settled,
            distance_mean=finding.distance_mean,
            distance_max=finding.distance_max,
        )

    @_normally
    def truncate(self, mask: Mask) -> None:
        """Freeze the channels that a mask from elsewhere drops, from the next step on; they leave
        as if the search had dropped them, in the order of what ``search.importance`` says.  Where
        frozen channels do not leave, the next ``check`` goes on from there.

        Collective, agreed by digest like any other mask.  Channels that have yet to leave may be
        exchanged by another mask.

        Raises:
            ConfigError: the mask is not of these groups or keeps a channel that has begun to leave,
                or the settings or the phase do not allow truncation.
            DivergenceError: the ranks bring different masks.
        """
        self._require_attached("truncate")
        self._usage_errors.require_unchanged("truncate")
        if self.config.truncation.mode == "off":
            raise ConfigError("truncate: truncation.mode is 'off'; choose 'hard' or 'soft'")
        where = f"truncate at step {self.step}"
        mask = agreed_mask(self._ranks, self.groups, mask, where)
        require_reversible(self.groups, mask, self._irreversible, where)
        scores = self._ranking.scores()
        shared = self._ranks.mean(torch.cat([scores, self._guard.levels(scores.device)]))
        importance = self._ranking.importance(shared[: len(scores)])
        order = removal_order(~mask.keep & ~self._irreversible, self._checks_dropped, importance)
        self._ranks.require_equal({"order of removal": {"(all)": order.numpy().tobytes()}}, where)
        self.mask, self.phase = mask, Phase.TRUNCATE
        self._truncate(order, shared[len(scores) :])
        verdict = dataclasses.replace(self._verdict, phase=self.phase)
        self._verdict = self._completed(verdict)

    @_normally
    def draw(self, mask: Mask | None = None, copies: Sequence[nn.Module] = ()) -> None:
        """Remove channels for good and go on with the smaller network.  Collective.

        After ``verdict.stage`` those go that have left so far, and the others go on leaving; after
        ``verdict.ticket`` the last ones go, and the ticket is drawn.

        ``model`` becomes the smaller network in a wrapper with the same arguments; the optimizer
        keeps the state of every surviving element; BatchNorm statistics are estimated anew from
        the last batches trained on (``ticket.recalibrate_batches``).  Gradients that wait for a
        step are dropped.

        Args:
            mask: from elsewhere: all that it drops goes, and the ticket is drawn.
            copies: networks like this one that must follow, such as the ``module`` of an
                ``AveragedModel``, as many on every rank; they are cut alike and their statistics
                estimated alike.

        Raises:
            ConfigError: no channel has left yet, the mask is not of these groups or keeps a channel
                that has been removed, a group would be left without a live channel, or a copy is
                not like the network.  Nothing has been changed then.
            DivergenceError: the ranks bring different masks.
            DrawError: a rehearsal on a copy put out something else, or something failed on one of
                the ranks.  Network, optimizer and statistics are as they were then, on all of them;
                go on with ``model``.
        """
        self._require_attached("draw")
        self._usage_errors.require_unchanged("draw")
        self._verdict = self._completed(self._verdict)
        is_complete = mask is not None or self._verdict.ticket
        where = f"draw at step {self.step}"
        mask = self._what_has_left() if mask is None else mask
        with self._attendance.at(self._here("draw")):
            mask = agreed_mask(self._ranks, self.groups, mask, where, copies)
        self._offered_at = -1
        require_reversible(self.groups, mask, self._channels.removed, where)
        frozen = self._channels.in_dense(self._truncation.frozen)
        require_live_survivors(self.groups, mask, frozen)
        self._training.require_alike(copies)
        self._shrink(mask, copies, is_complete, where)
        generation = self._verdict.generation
        self._verdict = (
            Verdict(Phase.TICKET, generation=generation)
            if is_complete
            else self._completed(self._verdict)
        )

    def penalty(self) -> Tensor:
        """``search.l1`` times the L1 norm of the scales, a scalar: add it to the loss.

        Zero without a search and after the draw.  Call it after the forward pass: with
        ``find_unused_parameters`` it leaves out norms that the pass has left out, as their
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
        """Tell the engine the loss of a forward pass, of this rank's data and without the penalty.

        If every rank does so in every step, channels wait while the loss says that it hurts
        (``truncation.removal.pause_above``).  Nothing waits for the device here.

        Args:
            loss: a scalar on any device.
        """
        if self._searching:
            self._guard.watch(loss)

    # ---- what has been seen, and leaving ---------------------------------------------------------

    @property
    def model(self) -> nn.Module:
        """Train this; after a draw it is the smaller network, wrapped as the first one was."""
        return self._training.model

    @property
    def optimizer(self) -> Optimizer:
        """Step this.  It stays the same object; under DeepSpeed it is new after a draw, around the
        same torch optimizer, and ``model.backward`` and ``model.step`` are what to call."""
        return self._training.optimizer

    @property
    def step(self) -> int:
        """Optimizer steps since ``attach``."""
        return self._training.step

    @property
    def is_due(self) -> bool:
        """Whether ``check`` has something to do or to say: a mask to cut, or that ``draw`` may be
        called."""
        if not self._searching:
            return False
        verdict = self._completed(self._verdict)
        return self._training.check_is_due or verdict.stage or verdict.ticket

    @property
    def traffic(self) -> Traffic:
        """Bytes sent, and bytes that dense steps would have sent."""
        self._training.traffic.control_bytes = self._ranks.sent_bytes
        return self._training.traffic

    @property
    def history(self) -> tuple[CheckRecord, ...]:
        """Every check so far, oldest first; on rank zero only, empty elsewhere."""
        return self._history.findings

    def save_ticket(self, folder: str | Path, model: Mapping[str, Any] | None = None) -> None:
        """Write the drawn network as ``ticket.json`` and ``ticket.safetensors``, on one rank.

        Args:
            folder: made if it is not there.
            model: arguments of ``worm_dist.models.build_model`` that build the dense network, if
                it is one of those; else the reader has to build it.

        Raises:
            ConfigError: nothing has been drawn.
        """
        if self.phase is not Phase.TICKET or self.mask is None:
            raise ConfigError("save_ticket: nothing has been drawn yet")
        cuts = ungated(cuts_of(self.groups, self.mask, self._dense_shapes))
        save_ticket(Path(folder), self._training.network, self.groups, self.mask, cuts, model)

    def detach(self) -> nn.Module:
        """Take every hook away.  Collective if a communication hook was needed: torch cannot
        unregister it, so the network is wrapped anew.

        Returns:
            The model to go on with, also in ``model``.
        """
        training = self._training
        hooked = training.reduction is not None and training.wrapping.keeps_hooks
        training.remove()
        self._let_go()
        if hooked:
            training.wrapping.release()
            training.go_on_in(training.wrapped_again())
        self._attached = False
        return self.model

    # ---- parts -----------------------------------------------------------------------------------

    @property
    def _searching(self) -> bool:
        searching = self.config.search.enabled and self.phase is not Phase.TICKET
        return searching and self._attached

    def _require_training(self) -> None:
        """The training must be the one that the engine was attached to."""
        errors, num_steps = self._usage_errors, self._training.since_last_check
        errors.require_step(num_steps, is_first=not self._has_checked)
        errors.require_unchanged(f"check at step {self.step}")
        errors.warn_of_no_penalty()
        errors.warn_of_scaled_penalty(self.config.search.l1)
        self._has_checked = True

    @property
    def _removes(self) -> bool:
        """Whether dropped channels are leaving."""
        return self.phase is Phase.TRUNCATE and self.config.truncation.removes

    @property
    def _irreversible(self) -> Tensor:
        """bool ``[num_channels]``: channels that have begun to leave, or are gone."""
        return self._channels.in_dense(self._truncation.irreversible)

    def _truncate(self, order: Tensor, losses: Tensor) -> None:
        """Adopt the mask.  Its bits are agreed on by now, so packed buffers will match."""
        self._freeze_dropped()
        if self._removes:
            self._removal.start(order, self.step, losses)
            self._let_leave()

    def _freeze_dropped(self) -> None:
        assert self.mask is not None
        self._truncation.freeze(self._channels.of(~self.mask.keep))
        self._training.reduction = self._truncation.reduction

    def _let_leave(self) -> None:
        """Channels whose turn it is begin to leave; where the loss has stopped that, the others
        stay."""
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
        """Cut the network to what a mask over the dense network's channels keeps."""
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
        self._let_go()
        self._channels.remove(mask)
        self._usage_errors.follow()
        if truncation is None:
            first = first_reduction(self.config.truncation, self._training.wrapping)
            self._training.reduction = first
            self.mask, self.phase = mask, Phase.TICKET
            return
        network = self._training.network
        self._ranking.follow(network, self._channels.groups, self._channels.removed)
        self._follow_network()
        kept = kept_places(cuts)
        self._truncation.load_state_dict(
            state_left(truncation, left.keep, lambda name, whole: select(whole, kept.get(name, {})))
        )
        self._training.reduction = self._truncation.reduction

    def _follow_network(self) -> None:
        """Truncate the network as it is now."""
        training, search = self._training, self.config.search
        self._share_left = training.num_elements / self._num_dense_elements
        self._truncation = Truncation(
            self.config.truncation,
            training.wrapping,
            training.stepping,
            self._channels.groups,
            training.trained,
        )
        training.reduction = self._truncation.reduction
        looks = search.enabled and training.wrapping.finds_unused
        self._usage = ParameterUsage(training.network, self._ranking.scales) if looks else None

    def _let_go(self) -> None:
        """Take the hooks away that a draw or the user ends."""
        self._truncation.remove()
        if self._usage is not None:
            self._usage.remove()

    def _completed(self, verdict: Verdict, new_mask: bool = False) -> Verdict:
        """A verdict with what each rank knows by itself; what was news once is so no more."""
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
            live_fraction=truncation.live_fraction * self._share_left,
            left_fraction=num_left / max(1, num_dropped) if self._removes else 0.0,
            paused=self._removes and self._removal.is_paused,
        )

    def _before_pass(self) -> None:
        """A rank that goes on although a call is due lets others wait in it for ever."""
        if self._searching and self._training.check_has_just_become_due:
            self._attendance.go_past(self._here("check"))
        if self._searching and self._offered_at == self.step:
            self._attendance.go_past(self._here("draw"))
        self._num_passes += 1

    def _here(self, call: str) -> str:
        """A call and its place in the training, the same on all ranks."""
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
            self._let_leave()

    def _what_has_left(self) -> Mask:
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
