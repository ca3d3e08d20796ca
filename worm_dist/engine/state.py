"""Resumable: the part of the engine that is about checkpoints."""

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
from ..groups.remaining_channels import RemainingChannels
from ..search.convergence import History
from ..search.mask import Mask
from ..truncation.loss_guard import LossGuard
from ..truncation.removal import Removal
from ..truncation.truncation import Truncation
from ..verdict import Phase, Verdict
from .context import TrainingContext
from .recorded_inputs import RecordedCall, calls_from, plain_calls
from .state_schema import FORMAT, digests_of, require_valid
from .step_hooks import Traffic

__all__ = ["Resumable"]


class Resumable(ABC):
    """Can be saved between two steps, and a new one can go on from there."""

    groups: Groups
    phase: Phase
    mask: Mask | None
    _training: TrainingContext
    _ranks: Communicator
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
        """All that the engine knows between two steps, besides weights and the optimizer's state.
        Collective.

        Nested dicts, lists and tuples of tensors, numbers, strings, booleans and None, so that
        ``torch.load(..., weights_only=True)`` reads it.  It is the same on all ranks but for
        ``"history"``, which rank zero has, ``"rank"`` and counted bytes.  Under ``"rank"`` is what
        every rank has of its own: the inputs from which statistics are estimated at the draw, and
        what PowerSGD left out.  So let every rank save its state; or rank zero alone, unless
        ``truncation.compression`` is ``powersgd``: then a draw that comes right after a resume
        estimates statistics from fewer batches, or from none.

        Raises:
            ConfigError: the engine has been detached.
        """
        self._require_not_detached("state_dict")
        traffic, ranks, reduction = self.traffic, self._ranks, self._training.reduction
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
            "history": self._history.state_dict() if ranks.rank == 0 else None,
            "rank": {
                "number": ranks.rank,
                "world_size": ranks.size,
                "inputs": plain_calls(self._training.calls),
                "reduction": reduction and reduction.state_dict(self._training.names),
                "losses": self._guard.losses_of_rank(),
            },
        }
        ranks.sent_bytes = traffic.control_bytes  # a checkpoint is no check
        return state

    def load_state_dict(self, state: Mapping[str, Any], copies: Sequence[nn.Module] = ()) -> None:
        """Go on, bit for bit, where an engine was that gave this state.  Collective.

        The engine is a new one, attached to the dense network, also after the draw: its network
        then becomes the drawn one, in a new wrapper.  So load the state first, and then weights
        and optimizer into what ``model`` and ``optimizer`` are now, before the next step::

            engine = worm_dist.attach(DistributedDataParallel(dense), optimizer, config, ...)
            engine.load_state_dict(saved["engine"])
            engine.model.load_state_dict(saved["model"])
            engine.optimizer.load_state_dict(saved["optimizer"])

        Under DeepSpeed ``engine.load_optimizer_state`` takes the place of the last line.  On more
        than two ranks under DistributedDataParallel ``engine.rehearse`` makes the next step's sums
        the same to the last bit.

        Args:
            state: what ``state_dict`` gave on this rank, or on rank zero (see there).
            copies: networks like the dense one that are cut like it; as for ``draw``.

        Raises:
            ConfigError: the engine is not a new one, or has other settings; only
                ``ticket.recalibrate_batches`` and ``ticket.recalibrate_memory_mb`` may have
                changed.
            CheckpointError: the state is not one, is of another network, or lacks what this rank
                needs.  Nothing has been changed then.
            DivergenceError: the ranks bring different states.
        """
        ranks, where = self._ranks, "load_state_dict"
        try:
            self._require_new(where)
            require_valid(
                state, self._settings, self.groups, self._steps_per_epoch, ranks.rank, ranks.size
            )
            self._training.require_alike(copies)
        except (ConfigError, CheckpointError) as error:
            self._refuse(error, where)
        ranks.require_equal({"state": digests_of(state)}, where)
        own = state["rank"]
        if own is not None and (own["number"], own["world_size"]) != (ranks.rank, ranks.size):
            own = None
        lacks_inputs = own is None or own["inputs"] is None
        device = next(self._training.network.parameters()).device
        no_inputs = ranks.any(torch.tensor([float(lacks_inputs)], device=device))
        calls = [] if no_inputs or own is None else calls_from(own["inputs"], device)
        self._go_on(state, own, calls, copies)
        ranks.sent_bytes = state["training"]["traffic"]["control_bytes"]

    def rehearse(self, one_pass: Callable[[], Tensor]) -> None:
        """Let DistributedDataParallel arrange its buckets as they were before the run was broken
        off.  Collective; after ``load_state_dict``.

        It arranges them anew after its first backward pass, and on more than two ranks the order
        in which gradients are added depends on where in a bucket they lie.  So there is a pass
        ahead of the first step, of which nothing else is left: gradients are dropped, and buffers
        and random generators put back.  Where it would change nothing there is none.

        Args:
            one_pass: a forward pass of ``model`` as in training; returns the loss.
        """
        self._require_not_detached("rehearse")
        self._training.rehearse(one_pass)
        self._forget_pass()

    def optimizer_state(self) -> dict[str, Any] | None:
        """The state of the optimizer, whichever it is, in plain values: on rank zero, elsewhere
        None.  Collective.

        Moments, master weights where they are not the weights themselves, options of groups such
        as learning rates, and DeepSpeed's counters, by the parameters' names.  Under ZeRO stages 1
        and 2 it is put together bit for bit, on the CPU; otherwise its tensors are the optimizer's
        own and no copies.  Schedules are the caller's to save.

        Raises:
            ConfigError: the engine has been detached.
        """
        self._require_not_detached("optimizer_state")
        sent_bytes = self._ranks.sent_bytes
        state = self._training.optimizer_state.read()
        self._ranks.sent_bytes = sent_bytes
        return state

    def load_optimizer_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that ``optimizer_state`` gave on rank zero: under the same wrapper
        bit for bit, and also in another ZeRO stage or under DistributedDataParallel.  Collective.

        The engine's state and the weights have to be loaded before.

        Args:
            state: the same on every rank.

        Raises:
            ConfigError: the engine has been detached.
            CheckpointError: it is not such a state, or is of other parameters or groups.  Nothing
                has been changed then.
            DivergenceError: the ranks bring different states.
        """
        where = "load_optimizer_state"
        self._require_not_detached(where)
        sent_bytes = self._ranks.sent_bytes
        try:
            structure = self._training.optimizer_state.structure(state)
        except CheckpointError as error:
            self._refuse(error, where)
        self._ranks.require_equal({"state": {"optimizer": structure}}, where)
        self._ranks.sent_bytes = sent_bytes
        self._training.write_optimizer_state(state)

    def _refuse(self, error: Exception, where: str) -> NoReturn:
        """Raise it, but let the other ranks, which may have nothing to complain of, not wait."""
        with suppress(DivergenceError):  # the others are told; this rank knows more
            self._ranks.require_equal({"state": {"(refused)": str(error).encode()}}, where)
        raise error

    def _go_on(
        self,
        state: Mapping[str, Any],
        own: Mapping[str, Any] | None,
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
            training.reduction = self._truncation.reduction
        self._removal.load_state_dict(state["removal"])
        training.take_over_buckets(state["training"])
        sending = None if own is None else own["reduction"]
        if training.reduction is not None and sending is not None:
            training.reduction.load_state_dict(sending, training.network)
        self.mask, self.phase = mask, Phase(state["phase"])
        self._checks_dropped = state["checks_dropped"].to("cpu", copy=True)
        if own is not None:
            device = next(training.network.parameters()).device
            self._guard.load_losses(own["losses"], device)
        self._verdict = Verdict(**{**state["verdict"], "phase": Phase(state["verdict"]["phase"])})
        if self._ranks.rank == 0:
            self._history.load_state_dict(state["history"])

    def _require_new(self, what: str) -> None:
        self._require_attached(what)
        if self.step or self.mask is not None:
            raise ConfigError(
                f"{what}: this engine has been trained with; build the dense network anew and "
                "attach to it"
            )
