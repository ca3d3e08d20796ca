"""Truncation: the generation in force, and what it does to gradients, traffic and weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..cluster.stepping import Owners, Stepping
from ..cluster.wrap import Bare, DataParallel, Wrapping
from ..cluster.zero import Zero
from ..config import TruncationConfig
from ..search.groups import Groups
from ..search.mask import Mask
from .averaging import AllReduce, Averaging
from .ddp import PackedReduction, packed_allreduce
from .gradients import GradientHooks
from .low_rank import LowRank
from .motion import Fade, Free, Hold, Motion
from .plan import Plan
from .reduction import Reduction
from .zero import ZeroReduction

__all__ = ["Truncation", "first_reduction"]

logger = logging.getLogger(__name__)


_TIMES_LISTENED = 3
"""How often what should be silent is heard before it is believed."""

_WIRE_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Truncation:
    """Frozen channels and everything that follows from them; none before the first ``adopt``.

    Attributes:
        generation: how many sets of slices have been left out of the all-reduce.
        frozen: bool ``[num_channels]``, the channels frozen now.
        reduction: how gradients are sent, None while that is left to the wrapper.
    """

    def __init__(
        self,
        config: TruncationConfig,
        wrapping: Wrapping,
        stepping: Stepping,
        groups: Groups,
    ) -> None:
        self._config = config
        self._wrapping: Wrapping = wrapping
        self._network = wrapping.network
        self._ranks = wrapping.ranks
        self._groups = groups
        self._motion = _motion(config, wrapping.network, stepping, groups)
        self.generation = 0
        self.frozen = torch.zeros(groups.num_channels, dtype=torch.bool)
        self.reduction = first_reduction(config, wrapping)
        self._hooks = GradientHooks(0 if config.mode == "hard" else config.ratio)
        self._live_fraction = 1.0
        self._fades_end = math.inf
        self._times_heard = 0
        self._silent = torch.zeros_like(self.frozen)

    @property
    def lost(self) -> Tensor:
        """bool ``[num_channels]``: channels that cannot be kept any more."""
        return self._motion.lost

    @property
    def live_fraction(self) -> float:
        """Live elements of all that train.  Soft truncation freezes nothing."""
        return self._live_fraction

    def adopt(self, frozen: Tensor, step: int, fade_steps: int) -> None:
        """Freeze these channels and those that fade already; others thaw.

        The ranks must have agreed on the bits of ``frozen``: buffers are packed by them.

        Args:
            frozen: bool ``[num_channels]``.
            step: optimizer steps so far.
            fade_steps: how long a fade that begins now takes.
        """
        frozen = frozen | self.lost
        if torch.equal(frozen, self.frozen):
            return
        self.generation += 1
        plan = self._truncate(frozen)
        self._motion.freeze(frozen, plan, step, fade_steps)
        # Columns that had left come back for a moment if others begin to fade.
        self._fades_end = step + fade_steps if self._config.motion == "fade" else math.inf
        self._times_heard = 0

    def _truncate(self, frozen: Tensor) -> Plan:
        self.frozen = frozen
        self._silent = torch.zeros_like(frozen)
        plan = Plan(self._network, self._groups, frozen, self._config.scope)
        if self._config.mode == "hard":
            self._live_fraction = plan.live_fraction
        self._truncate_gradients(plan, self._motion.moving(frozen))
        return plan

    def state_dict(self, step: int) -> dict[str, Any]:
        """The generation in force after this step, in plain values, the same on all ranks.
        Collective if the ranks share the stepping.

        What is held is not in it: that is in the weights and in the optimizer's state.
        """
        return {
            "generation": self.generation,
            "frozen": self.frozen.clone(),
            "silent": self._silent.clone(),
            "fades": self._motion.fades(step, self._ranks),
            "fades_end": None if math.isinf(self._fades_end) else int(self._fades_end),
            "listens": self.reduction is not None and self.reduction.heard is not None,
            "times_heard": self._times_heard,
        }

    def load_state_dict(self, state: Mapping[str, Any], step: int) -> None:
        """Go on from a state.  Weights and the optimizer's state may be loaded later, but before
        the next step."""
        self.generation = state["generation"]
        if self.generation == 0:
            return
        plan = self._truncate(state["frozen"].to("cpu", copy=True))
        self._motion.resume(self.frozen, plan, state["fades"])
        if self.reduction is not None and bool(state["silent"].any()):
            self._leave_out(self.reduction, state["silent"].to("cpu", copy=True))
        self._fades_end = math.inf if state["fades_end"] is None else state["fades_end"]
        self._times_heard = state["times_heard"]
        if self.reduction is not None and state["listens"]:
            self._listen(self.reduction, self._motion.silent(step))

    def before_step(self, penalty: float) -> None:
        """Just before an optimizer step; ``penalty`` is the weight of the L1 on the scales."""
        self._motion.before_step(penalty)

    def hold(self, step: int, owners: Owners) -> None:
        """The ``step``-th optimizer step has just moved these tensors, or all."""
        self._motion.hold(step, owners)

    def after_step(self, step: int) -> None:
        """Just after the ``step``-th optimizer step."""
        if self.reduction is not None and self._fades_end <= step:
            self._silence(self.reduction, step)

    def _silence(self, reduction: Reduction, step: int) -> None:
        """Leave out what a faded channel's consumers would send, once it is seen to be nothing.

        The step after a fade's end all ranks listen to these columns; then they agree on what was
        heard, by one number, and the columns leave.  A faded channel puts out exact zeros, so the
        gradients of the columns that read it are exact zeros, and nothing changes but the payload:
        it is the ticket's own size before the ticket is drawn.
        """
        silent = self._motion.silent(step)
        if reduction.heard is None:
            self._listen(reduction, silent)
        elif reduction.num_buckets_heard and not self._ranks.any(reduction.heard):
            self._fades_end = math.inf
            self.generation += 1
            self._leave_out(reduction, silent)
        elif reduction.num_buckets_heard:
            # Once may be an overflow, for which a loss scaler skips a step.
            self._times_heard += 1
            self._listen(reduction, silent)
            if self._times_heard == _TIMES_LISTENED:
                self._fades_end = math.inf
                logger.warning(
                    "step %d: faded channels still reach the layers behind them, whose columns "
                    "stay in the gradient all-reduce",
                    step,
                )

    def _leave_out(self, reduction: Reduction, silent: Tensor) -> None:
        self._silent = silent
        plan = Plan(self._network, self._groups, self.frozen, self._config.scope, silent)
        self._live_fraction = plan.live_fraction
        reduction.silence(plan)

    def _listen(self, reduction: Reduction, silent: Tensor) -> None:
        nothing = torch.zeros_like(silent)
        columns = Plan(self._network, self._groups, nothing, self._config.scope, silent)
        reduction.listen(columns, next(self._network.parameters()).device)

    def still_since(self, mask: Mask) -> float:
        """The step since which no channel that the mask drops has moved: -inf if dropped channels
        do not fade, inf if one has yet to begin."""
        return self._motion.still_since(~mask.keep)

    def remove(self) -> None:
        """Leave gradients and weights alone from now on."""
        self._hooks.remove()
        if self.reduction is not None:
            self.reduction.remove()
        self._motion = Motion(self._groups.num_channels)
        # The wrapper holds buckets as large as the dense network; let go of it.
        self._wrapping = Bare(self._network)

    def _truncate_gradients(self, plan: Plan, moving: Collection[Tensor]) -> None:
        if self._config.mode == "soft" or isinstance(self._wrapping, Bare):
            self._hooks.adopt(plan)
            return
        if self.reduction is None:
            # Not before it is needed: while nothing is frozen, DDP averages by itself.
            self.reduction = _register_reduction(self._config, self._wrapping)
        self.reduction.adopt(plan, moving)


def first_reduction(config: TruncationConfig, wrapping: Wrapping) -> Reduction | None:
    """How gradients are sent while nothing is frozen; None where that is left to the wrapper."""
    if isinstance(wrapping, Bare) or config.mode != "hard":
        return None
    if isinstance(wrapping, DataParallel) and config.compression == "none":
        return None
    return _register_reduction(config, wrapping)


def _register_reduction(config: TruncationConfig, wrapping: DataParallel | Zero) -> Reduction:
    """Take the place, or the places, where gradients are averaged."""
    if isinstance(wrapping, Zero):
        return ZeroReduction(wrapping)
    averaging: Averaging
    if config.compression == "powersgd":
        averaging = LowRank(wrapping.process_group, config.compression_rank)
    else:
        averaging = AllReduce(wrapping.process_group, _WIRE_DTYPES.get(config.compression))
    reduction = PackedReduction(averaging)
    wrapping.model.register_comm_hook(reduction, packed_allreduce)
    return reduction


def _motion(
    config: TruncationConfig, network: nn.Module, stepping: Stepping, groups: Groups
) -> Motion:
    if config.mode != "hard":
        return Motion(groups.num_channels)
    if config.motion == "fade":
        return Fade(stepping, network, groups)
    if config.motion == "hold":
        return Hold(stepping, groups.num_channels)
    return Free(stepping, network, groups)
