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
from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import uncounted
from ..errors import ConfigError
from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.mask import Mask
from ..groups.nested import mapped
from ..pruning.agreement import agreed_mask, require_live_survivors, require_reversible
from ..pruning.exactness import agreed_groups
from ..pruning.surgery import cuts_of, shapes_of, ungated
from ..search.convergence import CheckRecord
from ..ticket.file import save_ticket
from ..verdict import Phase, Verdict
from .agreed_ranking import agreed_ranking
from .agreed_search import AgreedSearch
from .check_schedule import CheckSchedule
from .collective_calls import CollectiveCalls
from .context import TrainingContext
from .dropped_channels import DroppedChannels
from .penalty import Penalty
from .requirements import require_alike, require_optimized
from .saved_state import SavedState
from .state import DenseNetwork, agreed_settings
from .traffic import Traffic
from .usage_errors import UsageErrors, require_alone

__all__ = ["Engine", "ScoreFunction"]

ScoreFunction = Callable[[nn.Module, ChannelGroup], Tensor]

# The engine may be called within a test loop, but tensors made in inference mode cannot be trained.
_normally = torch.inference_mode(False)


class Engine:
    """Searches, truncates and draws; made by ``attach``.

    Attributes:
        config: the settings.
        groups: the channel groups of the dense network, each with name, num_channels, members.
        budget: the limit that masks meet; None unless ``search.budget`` is given.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        config: WormConfig,
        example_inputs: Any,
        steps_per_epoch: int | None,
        total_steps: int | None,
        score: ScoreFunction | None,
    ) -> None:
        self.config = config
        search, truncation = config.search, config.truncation
        may_draw = search.enabled or truncation.mode != "off"
        # Copied, because a loop may reuse their memory before a draw is rehearsed with them.
        inputs = mapped(example_inputs, lambda tensor: tensor.detach().clone())
        training = TrainingContext(model, optimizer, inputs, config, may_draw)
        self._training, self._comm = training, training.comm
        require_alone(training.backend.called)
        training.backend.require_fit(truncation)
        self._calls = CollectiveCalls(training.backend.process_group)
        lengths = {"steps_per_epoch": steps_per_epoch, "total_steps": total_steps}
        settings = agreed_settings(self._comm, config, score, lengths)
        with training.full_network() as full:
            groups: Groups = agreed_groups(
                full, example_inputs, self._comm, search, score is not None, optional=not may_draw
            )
        self.groups = groups
        require_optimized(training.optimizer_view, training.network, groups)
        ranking = agreed_ranking(config, training, groups, score, inputs) if groups else None
        self._ranking = ranking
        self.budget = None if ranking is None else ranking.budget
        self._penalty = Penalty(search, training, ranking)
        candidates = {} if ranking is None else ranking.sizes
        self._dense = DenseNetwork(groups, shapes_of(training.network), candidates)
        self._schedule = CheckSchedule(search.every, steps_per_epoch, total_steps)
        self._search = AgreedSearch(config, training, groups, ranking, self._schedule)
        self._verdict = Verdict(Phase.SEARCH if search.enabled else Phase.DENSE)
        self._usage_errors = UsageErrors(training, groups if may_draw else ())
        self._warned_groups: set[str] = set()
        self._attached = True
        training.register_hooks(self._before_pass)
        parts = training, groups, self._schedule, self._penalty
        self._dropped = DroppedChannels(truncation, *parts)
        saved = training, self._schedule, self._search, self._dropped
        self._saved = SavedState(self._comm, settings, steps_per_epoch, self._dense, *saved)
        self._follow_network()

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
        is_due = self._schedule.is_due(self.step)
        cuts_mask = is_due and not self._removes
        with self._calls.at("check", is_due):
            if is_due:
                num_steps = self._schedule.since_last(self.step)
                self._usage_errors.require_training(num_steps, f"check at step {self.step}")
                self._penalty.warn_of_misuse()
                self._schedule.begin(self.step)
            if cuts_mask:
                self._next_mask()
            could_draw = self._verdict.stage or self._verdict.ticket
            verdict = self._dropped.described(self._verdict)
            self._verdict = dataclasses.replace(
                verdict, new_mask=cuts_mask, elbow=cuts_mask and verdict.elbow
            )
            can_draw_now = not could_draw and (verdict.stage or verdict.ticket)
            # No statistics lag behind when the removal begins.
            if self._removes and not cuts_mask and (is_due or can_draw_now):
                groups = self._dropped.channels.groups
                self._training.recalibrate_statistics(groups, self._warned_groups)
        if can_draw_now:
            self._calls.offer_draw(True)
        return self._verdict

    def _next_mask(self) -> None:
        dropped = self._dropped
        found = self._search.next_mask(self.phase, dropped.mask, dropped.irreversible)
        self._verdict = found.verdict
        if self.phase is Phase.TRUNCATE:
            distance = found.verdict.distance_mean
            dropped.freeze(found.mask, found.order, found.scales, distance)
        else:
            dropped.mask = found.mask

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
        irreversible = self._dropped.irreversible
        require_reversible(self.groups, mask, irreversible, where)
        self._dropped.freeze(mask, self._search.order_of_removal(mask, irreversible, where))
        verdict = dataclasses.replace(self._verdict, phase=Phase.TRUNCATE)
        self._verdict = self._dropped.described(verdict)

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
        dropped, where = self._dropped, f"draw at step {self.step}"
        self._verdict = dropped.described(self._verdict)
        is_complete = mask is not None or self._verdict.ticket
        mask = dropped.offered(self._verdict) if mask is None else mask
        with self._calls.at("draw"):
            mask = agreed_mask(self._comm, self.groups, mask, where, copies)
        self._calls.offer_draw(False)
        require_reversible(self.groups, mask, dropped.channels.removed, where)
        require_live_survivors(self.groups, mask, dropped.frozen)
        require_alike(self._training.network, copies, "draw")
        dropped.shrink(mask, copies, is_complete, where)
        self._verdict = (
            Verdict(Phase.TICKET, generation=self._verdict.generation)
            if is_complete
            else dropped.described(self._verdict)
        )
        self._follow_network()

    def penalty(self) -> Tensor:
        """``search.l1`` times the L1 norm of the scales, a scalar to add to the loss.

        Zero without a search, and after the draw unless ``search.l1_until`` is ``end``.  Call it
        after the forward pass: with ``find_unused_parameters`` it leaves out norms that the pass
        has not used, because their gradients are not averaged.
        """
        if not (self.config.search.enabled and self._penalty.is_on and self._attached):
            return torch.zeros((), device=next(self.model.parameters()).device)
        return self._penalty.term()

    def watch(self, loss: Tensor) -> None:
        """Report the loss of a forward pass, on this rank's data and without the penalty.

        If every rank reports it in every step, the removal of channels pauses while the loss is too
        high (``truncation.removal.pause_above``).  Does not synchronise with the device.

        Args:
            loss: a scalar on any device.
        """
        if self._searching:
            self._dropped.guard.watch(loss)

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
    def phase(self) -> Phase:
        """The current phase."""
        return self._verdict.phase

    @property
    def mask(self) -> Mask | None:
        """The newest mask over the dense network's channels; None before the first check."""
        return self._dropped.mask

    @property
    def step(self) -> int:
        """Optimizer steps since ``attach``."""
        return self._training.step

    @property
    def num_nonzero_removed(self) -> int:
        """Scales and shifts of removed channels that are not exactly zero on this rank; 0 unless
        something else writes to the weights.  Synchronises with the device."""
        return self._dropped.num_nonzero_removed

    @property
    def is_due(self) -> bool:
        """Whether ``check`` would compute a mask or find that ``draw`` may be called; before the
        first step only if ``search.first`` says so."""
        if not self._searching:
            return False
        if not self.step:
            return self.config.search.first == "before_training" and self.mask is None
        verdict = self._dropped.described(self._verdict)
        return self._schedule.is_due(self.step) or verdict.stage or verdict.ticket

    @property
    def traffic(self) -> Traffic:
        """Bytes sent, and bytes that steps of the dense network would have sent."""
        return self._training.traffic

    @property
    def history(self) -> tuple[CheckRecord, ...]:
        """The records of all checks so far, oldest first; empty on ranks other than zero."""
        return self._search.history.records

    def save_ticket(self, folder: str | Path, model: Mapping[str, Any] | None = None) -> None:
        """Write the drawn network as ``ticket.json`` and ``ticket.safetensors``, on one rank.
        Collective if weights are sharded: then every rank calls it, and rank zero writes.

        Args:
            folder: the folder to write to, created if missing.
            model: arguments of ``worm_dist.models.build_model`` for the dense network; None if the
                reader has to build it.

        Raises:
            ConfigError: no ticket has been drawn, or ``model`` is not such arguments.
            CheckpointError: it cannot be written.
            If weights are sharded, an error of one rank is raised on every rank.
        """
        if self.phase is not Phase.TICKET or self.mask is None:
            raise ConfigError(
                f"save_ticket: no ticket has been drawn in {self.step} steps, the phase is "
                f"{self.phase}; train for longer, or give attach the length of the training, "
                "total_steps, so that the draw falls into it"
            )
        cuts = ungated(cuts_of(self.groups, self.mask, self._dense.shapes))
        parts = self.groups, self.mask, cuts, self._training.example_inputs, self.config
        is_sharded = self._training.backend.shards_weights
        with self._calls.at("save_ticket", is_sharded), self._training.full_network() as network:
            save_ticket(Path(folder), network, *parts, model, self._comm if is_sharded else None)

    def detach(self) -> nn.Module:
        """Remove all hooks.  Collective if a communication hook was registered: torch cannot
        unregister it, so the network is wrapped anew.

        Returns:
            The model to continue with; ``model`` is the same object.
        """
        training = self._training
        hooked = training.reduction.reducer is not None and training.backend.keeps_hooks
        training.remove()
        self._dropped.remove()
        if hooked:
            training.backend.release()
            training.switch_to(training.rewrap())
        self._attached = False
        return self.model

    # ---- state -----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The engine's state between two steps, without weights and the optimizer's state.
        Collective.

        Nested dicts, lists and tuples of tensors, numbers, strings, booleans and None, so that
        ``torch.load(..., weights_only=True)`` reads it.  ``"shared"`` is equal on all ranks;
        ``"history"`` is None except on rank zero; ``"rank"`` is the per-rank state: the inputs from
        which statistics are estimated at the draw, PowerSGD's error feedback, and byte counts.  So
        let every rank save its state.  Unless ``truncation.compression`` is ``powersgd``, rank
        zero's alone is enough; a draw right after a resume then estimates statistics from fewer
        batches, or from none.

        Raises:
            ConfigError: the engine has been detached.
        """
        self._require_not_detached("state_dict")
        return self._saved.as_dict(self._verdict)

    def load_state_dict(self, state: Mapping[str, Any], copies: Sequence[nn.Module] = ()) -> None:
        """Restore a state of ``state_dict``, to continue bit for bit.  Collective.

        The engine must be new, attached to the dense network, also if the state is from after the
        draw: its network then becomes the drawn one, in a new wrapper.  So load the state first,
        and then the weights and the optimizer into the resulting ``model`` and ``optimizer``,
        before the next step::

            engine = worm_dist.attach(DistributedDataParallel(dense), optimizer, config, ...)
            engine.load_state_dict(saved["engine"])
            engine.model.load_state_dict(saved["model"])
            engine.optimizer.load_state_dict(saved["optimizer"])

        Under DeepSpeed call ``engine.load_optimizer_state`` instead of the last line.  On more than
        two ranks under DistributedDataParallel, ``engine.restore_bucket_order`` makes the next
        step's sums equal to the last bit.

        Args:
            state: the result of ``state_dict`` on this rank, or on rank zero (see there).
            copies: copies of the dense network, pruned in the same way; as for ``draw``.

        Raises:
            ConfigError: the engine is not new, or its settings differ; only
                ``ticket.recalibrate_batches`` and ``ticket.recalibrate_memory_mb`` may have
                changed.
            CheckpointError: the state is malformed, of another network, or lacks this rank's part.
                Nothing has been changed then.
            DivergenceError: the ranks have different states.
        """
        where = "load_state_dict"
        with refused_on_every_rank(self._comm):
            self._require_new(where)
        self._verdict = self._saved.restore(state, copies, where)
        self._calls.after_step(self.step)
        self._follow_network()

    def restore_bucket_order(self, one_pass: Callable[[], Tensor]) -> None:
        """Let DistributedDataParallel rebuild its buckets as they were in the saved run.
        Collective; call it after ``load_state_dict``.

        If they were rebuilt by then, one pass runs before the first step: on more than two ranks
        the order in which gradients are added depends on their position in a bucket.  Its gradients
        are dropped; buffers and random states are restored.

        Args:
            one_pass: runs a forward pass of ``model`` in training mode; returns the loss.
        """
        self._require_not_detached("restore_bucket_order")
        self._training.restore_bucket_order(one_pass)
        self._penalty.forget_pass()

    def optimizer_state(self, *, sharded: bool = False) -> dict[str, Any] | None:
        """The full (unsharded) state of the optimizer in plain values, on rank zero; None on other
        ranks.  Collective.

        It holds, by parameter name, moments and those master weights that differ from the weights;
        options of parameter groups such as learning rates; and DeepSpeed's counters.  If it is
        sharded, it is gathered bit for bit, on the CPU; otherwise its tensors are not copied.
        Learning rate schedules are not part of it.

        Args:
            sharded: if the state is sharded, do not gather it: every rank gets its shards as
                ``LocalShards``, to be written to the same checkpoint.

        Raises:
            ConfigError: the engine has been detached.
        """
        self._require_not_detached("optimizer_state")
        return self._training.read_optimizer_state(sharded=sharded)

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state of ``optimizer_state``: bit for bit under the same wrapper, and also in
        another ZeRO stage or under DistributedDataParallel.  Collective.

        The engine's state and the weights must be loaded before.

        Args:
            state: rank zero's result of ``optimizer_state``, the same on every rank.

        Raises:
            ConfigError: the engine has been detached.
            CheckpointError: the state is malformed, or of other parameters or parameter groups.
                Nothing has been changed then.
            DivergenceError: the ranks have different states.
        """
        where = "load_optimizer_state"
        self._require_not_detached(where)
        with uncounted(self._comm):
            with refused_on_every_rank(self._comm):
                structure = self._training.optimizer_state.structure(state)
            self._comm.assert_equal({"state": {"optimizer": structure}}, where)
        self._training.write_optimizer_state(state)

    # ---- helpers ---------------------------------------------------------------------------------

    @property
    def _searching(self) -> bool:
        searching = self.config.search.enabled and self.phase is not Phase.TICKET
        return searching and self._attached

    @property
    def _removes(self) -> bool:
        """Whether dropped channels are being removed."""
        return self.phase is Phase.TRUNCATE and self.config.truncation.removes

    def _follow_network(self) -> None:
        """Go on with the network as it is now: dense, smaller, or the ticket."""
        dropped, network = self._dropped, self._training.network
        self._usage_errors.follow()
        if self.phase is Phase.TICKET:
            self._penalty.follow_ticket(network, self.groups.norm_scales)
        elif self._ranking is not None:
            self._ranking.follow(network, dropped.channels.groups, dropped.channels.removed)
            self._penalty.follow(network)
        self._training.set_step_listeners([self._calls, *dropped.step_listeners])

    def _before_pass(self) -> None:
        self._calls.before_pass(self._searching and self._schedule.has_just_become_due(self.step))

    def _require_not_detached(self, what: str) -> None:
        if not self._attached:
            raise ConfigError(f"{what}: the engine has been detached")

    def _require_attached(self, what: str) -> None:
        self._require_not_detached(what)
        if self.phase is Phase.TICKET:
            raise ConfigError(f"{what}: the ticket has been drawn already")

    def _require_new(self, what: str) -> None:
        self._require_attached(what)
        if self.step or self.mask is not None:
            raise ConfigError(
                f"{what}: this engine has already taken steps or checks; build the dense network "
                "anew and attach to it"
            )
