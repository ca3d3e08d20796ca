"""State: save and restore an engine."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from ..distributed.collectives import Communicator
from ..errors import CheckpointError, ConfigError, DivergenceError
from ..groups.channel_groups import Groups
from ..groups.mask import Mask
from ..groups.remaining_channels import RemainingChannels
from ..pruning.recorded_inputs import RecordedCall, calls_from, plain_calls
from ..search.convergence import History
from ..truncation.loss_guard import LossGuard
from ..truncation.removal import Removal
from ..truncation.truncation import Truncation
from ..verdict import Phase, Verdict
from .context import TrainingContext
from .state_schema import FORMAT, digests_of, require_valid
from .step_hooks import Traffic

__all__ = ["Resumable"]


class Resumable(ABC):
    """The part of the engine that saves its state between two steps and restores it."""

    groups: Groups
    phase: Phase
    mask: Mask | None
    _training: TrainingContext
    _comm: Communicator
    _settings: dict[str, Any]
    _steps_per_epoch: int | None
    _truncation: Truncation
    _removal: Removal
    _guard: LossGuard
    _channels: RemainingChannels
    _history: History
    _checks_dropped: Tensor
    _verdict: Verdict

    @property
    @abstractmethod
    def step(self) -> int: ...

    @property
    @abstractmethod
    def traffic(self) -> Traffic: ...

    @abstractmethod
    def _shrink(
        self,
        mask: Mask,
        copies: Sequence[nn.Module],
        is_complete: bool,
        where: str,
        is_restored: bool = False,
    ) -> None: ...

    @abstractmethod
    def _forget_pass(self) -> None: ...

    @abstractmethod
    def _require_attached(self, what: str) -> None: ...

    @abstractmethod
    def _require_not_detached(self, what: str) -> None: ...

    def state_dict(self) -> dict[str, Any]:
        """The engine's state between two steps, without weights and the optimizer's state.
        Collective.

        Nested dicts, lists and tuples of tensors, numbers, strings, booleans and None, so that
        ``torch.load(..., weights_only=True)`` reads it.  It is equal on all ranks except for
        ``"history"``, which only rank zero has, ``"rank"``, and byte counts.  ``"rank"`` holds the
        per-rank state: the inputs from which statistics are estimated at the draw, and PowerSGD's
        error feedback.  So let every rank save its state.  Unless ``truncation.compression`` is
        ``powersgd``, rank zero's alone is enough; a draw right after a resume then estimates
        statistics from fewer batches, or from none.

        Raises:
            ConfigError: the engine has been detached.
        """
        self._require_not_detached("state_dict")
        traffic, comm, reducer = self.traffic, self._comm, self._training.reducer
        drawn = self.phase is Phase.TICKET
        state = {
            "format": FORMAT,
            "settings": dict(self._settings),
            "groups": {name: digest.hex() for name, digest in self.groups.digests.items()},
            "phase": str(self.phase),
            "mask": None if self.mask is None else self.mask.keep.clone(),
            "removed": self._channels.removed.clone(),
            "checks_dropped": self._checks_dropped.clone(),
            "removal": self._removal.state_dict(),
            "verdict": {**dataclasses.asdict(self._verdict), "phase": str(self._verdict.phase)},
            "training": self._training.state_dict(),
            "truncation": None if drawn else self._truncation.state_dict(self.step),
            "history": self._history.state_dict() if comm.rank == 0 else None,
            "rank": {
                "number": comm.rank,
                "world_size": comm.size,
                "inputs": plain_calls(self._training.calls),
                "reduction": reducer and reducer.state_dict(self._training.names),
                "losses": self._guard.losses_of_rank(),
            },
        }
        comm.sent_bytes = traffic.control_bytes  # the bytes of a checkpoint do not count
        return state

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
        comm, where = self._comm, "load_state_dict"
        try:
            self._require_new(where)
            require_valid(
                state, self._settings, self.groups, self._steps_per_epoch, comm.rank, comm.size
            )
            self._training.require_alike(copies)
        except (ConfigError, CheckpointError) as error:
            self._refuse(error, where)
        comm.assert_equal({"state": digests_of(state)}, where)
        rank_state = state["rank"]
        if rank_state is not None:
            saved_by = rank_state["number"], rank_state["world_size"]
            rank_state = rank_state if saved_by == (comm.rank, comm.size) else None
        lacks_inputs = rank_state is None or rank_state["inputs"] is None
        device = next(self._training.network.parameters()).device
        no_inputs = comm.any(torch.tensor([float(lacks_inputs)], device=device))
        calls = [] if no_inputs or rank_state is None else calls_from(rank_state["inputs"], device)
        self._restore(state, rank_state, calls, copies)
        comm.sent_bytes = state["training"]["traffic"]["control_bytes"]

    def restore_bucket_order(self, one_pass: Callable[[], Tensor]) -> None:
        """Let DistributedDataParallel rebuild its buckets as they were in the saved run.
        Collective; call it after ``load_state_dict``.

        DDP rebuilds its buckets after its first backward pass, and on more than two ranks the order
        in which gradients are added depends on their position in a bucket.  So one extra pass runs
        before the first step; gradients are dropped, and buffers and random states restored.  Where
        the buckets need no rebuilding, no pass runs.

        Args:
            one_pass: runs a forward pass of ``model`` in training mode; returns the loss.
        """
        self._require_not_detached("restore_bucket_order")
        self._training.restore_bucket_order(one_pass)
        self._forget_pass()

    def optimizer_state(self) -> dict[str, Any] | None:
        """The full (unsharded) state of the optimizer in plain values, on rank zero; None on other
        ranks.  Collective.

        It holds, by parameter name, moments and those master weights that differ from the weights;
        options of parameter groups such as learning rates; and DeepSpeed's counters.  Under ZeRO
        stages 1 and 2 it is gathered bit for bit, on the CPU; otherwise its tensors are not
        copied.  Learning rate schedules are not part of it.

        Raises:
            ConfigError: the engine has been detached.
        """
        self._require_not_detached("optimizer_state")
        sent_bytes = self._comm.sent_bytes
        state = self._training.optimizer_state.read()
        self._comm.sent_bytes = sent_bytes
        return state

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
        sent_bytes = self._comm.sent_bytes
        try:
            structure = self._training.optimizer_state.structure(state)
        except CheckpointError as error:
            self._refuse(error, where)
        self._comm.assert_equal({"state": {"optimizer": structure}}, where)
        self._comm.sent_bytes = sent_bytes
        self._training.write_optimizer_state(state)

    def _refuse(self, error: Exception, where: str) -> NoReturn:
        """Raise an error on this rank, after making the other ranks fail too instead of waiting."""
        with suppress(DivergenceError):  # raised on every rank; this rank's error says more
            self._comm.assert_equal({"state": {"(refused)": str(error).encode()}}, where)
        raise error

    def _restore(
        self,
        state: Mapping[str, Any],
        rank_state: Mapping[str, Any] | None,
        calls: Sequence[RecordedCall],
        copies: Sequence[nn.Module],
    ) -> None:
        training, keep = self._training, state["mask"]
        training.load_state_dict(state["training"], calls)
        mask = None if keep is None else Mask.from_vector(self.groups.sizes, keep)
        removed, is_complete = state["removed"].to("cpu"), state["truncation"] is None
        if is_complete or bool(removed.any()):
            left = Mask.from_vector(self.groups.sizes, ~removed)
            self._shrink(left, copies, is_complete, "load_state_dict", is_restored=True)
        if not is_complete:
            self._truncation.load_state_dict(state["truncation"])
            training.reducer = self._truncation.reducer
        self._removal.load_state_dict(state["removal"])
        training.load_bucket_state(state["training"])
        saved_reducer = None if rank_state is None else rank_state["reduction"]
        if training.reducer is not None and saved_reducer is not None:
            training.reducer.load_state_dict(saved_reducer, training.network)
        self.mask, self.phase = mask, Phase(state["phase"])
        self._checks_dropped = state["checks_dropped"].to("cpu", copy=True)
        if rank_state is not None:
            device = next(training.network.parameters()).device
            self._guard.load_losses(rank_state["losses"], device)
        self._verdict = Verdict(**{**state["verdict"], "phase": Phase(state["verdict"]["phase"])})
        if self._comm.rank == 0:
            self._history.load_state_dict(state["history"])

    def _require_new(self, what: str) -> None:
        self._require_attached(what)
        if self.step or self.mask is not None:
            raise ConfigError(
                f"{what}: this engine has already taken steps or checks; build the dense network "
                "anew and attach to it"
            )
