"""Combination: one way to train, a row of the matrix; and the invariants, its columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from tests.nets import Residual
from tests.ranks import NO_GROUP

__all__ = ["INVARIANTS", "Combination", "Dropped", "Recipe"]

INVARIANTS: Mapping[str, str] = {
    "agree": "after every check all ranks hold the same mask, after every step the same weights",
    "live": "gradients, weights and statistics are those of plain DDP with frozen gradients zeroed",
    "held": "frozen slices stay bit for bit; faded ones are start × (N−a)/N, then exact zero",
    "state": "a thawed channel finds zero momentum and the second moment it was frozen with",
    "bytes": "what is sent is the live elements, to the element",
    "draw": "the drawn network puts out what the masked one did (to a relative 1e-6 in float32), "
    "its optimizer state is carried over bit for bit, and it trains on",
    "schedule": "schedulers and averaged copies go on through freeze, thaw and draw",
    "off": "with truncation off nothing differs from the plain loop",
}

Dropped = tuple[int, ...] | None
"""Channels to freeze, counted over all groups; None for those that the check itself drops."""

_SCRIPT: Mapping[str, tuple[Dropped, ...]] = {
    "hold": ((0, 3, 9), (3, 4, 10, 12), None),  # channels 0 and 9 thaw again
    "remove": ((0, 3, 9), (0, 3, 4, 9, 12)),  # while channels leave, checks cut no other mask
    "free": ((0, 3, 9), (3, 4, 10, 12), None),
}


@dataclass(frozen=True)
class Recipe:
    """How one training step is made.

    Attributes:
        autocast: the forward pass runs in bfloat16.
        passes: forward and backward passes a step, all but the last within ``no_sync``.
        clip: what is done to the averaged gradients before the step.
        loss_scale: initial scale of a ``GradScaler``; None for none.
        overflow_at: the step in which rank 1's loss is infinite.
        probes_again: steps more until faded channels' columns leave, since it was heard.
        detours: whether ``forward`` takes the argument ``detour``.
        without_detour: for some steps, the ranks whose forward pass leaves a layer out.
    """

    autocast: bool = False
    passes: int = 1
    clip: Callable[[Iterable[nn.Parameter]], object] | None = None
    loss_scale: float | None = None
    overflow_at: int | None = None
    probes_again: int = 0
    detours: bool = False
    without_detour: Mapping[int, tuple[int, ...]] = field(default_factory=dict)


def _sgd(network: nn.Module) -> Optimizer:
    return SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)


@dataclass(frozen=True)
class Combination:
    """A row.

    Attributes:
        name: short, for the table.
        network: makes the network.
        optimizer: of a network's parameters.
        scheduler: of that optimizer; an averaged copy of the network is then kept too.
        wrapper: makes the wrapper's arguments; None leaves the network bare.
        world_size: number of ranks, ``NO_GROUP`` for one process without a process group.
        dtype, memory_format: of weights and inputs.
        compiled: the network is compiled inside its wrapper.
        recipe: how a step is made.
        search, truncation: settings; ``rule`` is not among them.
        rules: each is one run, from the search to the ticket; "free" also stands for soft mode.
        script: for each rule, what is frozen one generation after the other.
        search_steps: before the first generation.
        tolerance: relative, of live slices; 0 where the sums are exact.
        absent: invariants that make no sense here, with the reason.
        wrong: invariants that are known not to hold, with the reason.
    """

    name: str
    network: Callable[[], nn.Module] = Residual
    optimizer: Callable[[nn.Module], Optimizer] = _sgd
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    wrapper: Callable[[], dict[str, Any]] | None = dict
    world_size: int = 2
    dtype: torch.dtype = torch.float32
    memory_format: torch.memory_format = torch.contiguous_format
    compiled: bool = False
    recipe: Recipe = Recipe()
    search: Mapping[str, Any] = field(default_factory=lambda: {"prune_ratio": 0.4})
    truncation: Mapping[str, Any] = field(default_factory=dict)
    rules: tuple[str, ...] = ("hold", "remove")
    script: Mapping[str, tuple[Dropped, ...]] = field(default_factory=dict)
    search_steps: int = 2
    tolerance: float = 0.0
    absent: Mapping[str, str] = field(default_factory=dict)
    wrong: Mapping[str, str] = field(default_factory=dict)

    def generations(self, rule: str) -> tuple[Dropped, ...]:
        return self.script.get(rule, _SCRIPT[rule])

    def remark(self, invariant: str) -> str | None:
        """What has to be said of a cell besides whether it holds."""
        if invariant == "live" and self.tolerance:
            return f"to a relative {self.tolerance:.0e}: a longer ring adds in another order"
        return self.why_not(invariant) or self.wrong.get(invariant)

    def why_not(self, invariant: str) -> str | None:
        """Why an invariant has no meaning for this way to train; None if it has."""
        if invariant in self.absent:
            return self.absent[invariant]
        if invariant == "agree" and self.world_size in (NO_GROUP, 1):
            return "one process has nobody to agree with"
        if invariant == "bytes" and self.wrapper is None:
            return "nothing is sent"
        if invariant in ("held", "state") and self.rules == ("free",):
            return "frozen slices move on, as they are told to"
        if invariant == "schedule" and self.scheduler is None:
            return "shown in two rows: schedulers do not see what else differs"
        if invariant == "off" and (self.truncation or self.script or not self.search_steps):
            return "truncation off has no such setting"
        return None
