"""Controls: runs that a rule's ticket is compared with.  They are matched to that ticket, so it has
to be drawn first, in the same subject, ratio and seed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from ...groups.flops import count_flops
from ...groups.gates import remove_gates
from ...training.evaluation import count_parameters
from .recipe import RandomRemoval, Recipe
from .row import Row
from .rule import DENSE, Rule
from .scratch import ticket_from_scratch
from .subject import Subject

__all__ = ["CONTROLS", "EQUAL_FLOPS", "Control", "control_name", "thinner", "width_of"]

_WIDTHS = [step / 256 for step in range(16, 257)]
"""Widths that are tried; layers of up to 128 channels have no others above a sixteenth."""


@dataclass(frozen=True)
class Control:
    """A control of a rule.

    Attributes:
        kind: one of ``CONTROLS``.
        of: the rule.
    """

    kind: str
    of: Rule

    @property
    def name(self) -> str:
        """Name in rows and tables."""
        return control_name(self.kind, self.of.name)

    def recipe(
        self, subject: Subject, prune_ratio: float, seed: int, parent: Row | None = None
    ) -> Recipe:
        """What to train.

        Args:
            subject: network, data and training recipe.
            prune_ratio: share of the channels to drop.
            seed: seed of the weights.
            parent: the row of the rule, with a ticket.
        """
        assert parent is not None and parent.widths is not None, self.name
        torch.manual_seed(seed)
        return CONTROLS[self.kind](_Ticket(subject, self.of, prune_ratio, seed, parent))


def control_name(kind: str, rule: str) -> str:
    """Name of a rule's control."""
    return f"{rule}: {kind}"


def thinner(subject: Subject, width: float) -> nn.Module:
    """The subject's network with a width relative to the dense one's, without gates as a ticket."""
    network = subject.build(width)
    remove_gates(network)
    return network


def width_of(subject: Subject, size: Callable[[nn.Module], int], wanted: int) -> float:
    """The width of the thinner network that comes nearest to a size.

    Args:
        subject: builds the networks.
        size: counts what is to be equal; grows with the width.
        wanted: the size of the ticket.
    """

    def size_at(width: float) -> int:
        return size(thinner(subject, width))

    above = bisect_left(_WIDTHS, wanted, key=size_at)
    near = _WIDTHS[max(0, above - 1) : above + 1]
    return min(near, key=lambda width: abs(size_at(width) - wanted))


@dataclass(frozen=True)
class _Ticket:
    subject: Subject
    rule: Rule
    prune_ratio: float
    seed: int
    row: Row

    @property
    def widths(self) -> Mapping[str, int]:
        assert self.row.widths is not None
        return self.row.widths


def _uniform(ticket: _Ticket, size: Callable[[nn.Module], int], wanted: int) -> Recipe:
    width = width_of(ticket.subject, size, wanted)
    torch.manual_seed(ticket.seed)
    return Recipe(thinner(ticket.subject, width), DENSE.config(0))


def _equal_flops(ticket: _Ticket) -> Recipe:
    sample = ticket.subject.samples().images[:1]
    return _uniform(ticket, lambda network: count_flops(network, sample), ticket.row.num_flops)


def _equal_parameters(ticket: _Ticket) -> Recipe:
    return _uniform(ticket, count_parameters, ticket.row.num_parameters)


def _from_scratch(ticket: _Ticket) -> Recipe:
    search = ticket.rule.config(ticket.prune_ratio).search
    network = ticket_from_scratch(ticket.subject, search, ticket.widths, ticket.seed)
    return Recipe(network, DENSE.config(0))


def _random_channels(ticket: _Ticket) -> Recipe:
    rule, row = ticket.rule, ticket.row
    epoch = row.elbow_epoch if rule.is_gradual else row.ticket_epoch
    assert epoch is not None
    removal = RandomRemoval(epoch, ticket.widths, ticket.seed, rule.is_gradual)
    return Recipe(ticket.subject.build(1.0), rule.config(ticket.prune_ratio), removal)


EQUAL_FLOPS = "uniform at equal FLOPs"
CONTROLS: Mapping[str, Callable[[_Ticket], Recipe]] = {
    EQUAL_FLOPS: _equal_flops,
    "uniform at equal parameters": _equal_parameters,
    "ticket from scratch": _from_scratch,
    "random channels": _random_channels,
}
"""The first two are uniformly thinner networks, trained from scratch, whose width is chosen to
match the ticket.  The third is the ticket's own architecture, newly initialised and trained for all
epochs.  The fourth is the same run, from the same weights, until channels leave; then others leave,
drawn at random: as many of each group, at the same step and in the same way."""
