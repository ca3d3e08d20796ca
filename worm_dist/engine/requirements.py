"""Requirements on what users give beside the network: its optimizer, its copies, and masks that
leave something of every layer."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from ..backends.optimizer_view import OptimizerView
from ..config import SearchConfig
from ..errors import ConfigError
from ..groups.channel_groups import Groups
from ..groups.full_shape import full_shape
from ..pruning.agreement import problem_of_copies

__all__ = ["require_alike", "require_optimized", "warn_of_emptied"]

logger = logging.getLogger(__name__)


def warn_of_emptied(search: SearchConfig, kept: Sequence[str], step: int) -> None:
    """Warn that the ticket is not quite the mask's, because a network needs all of its layers.

    Args:
        search: the settings of the search.
        kept: names of the groups that keep channels which the mask drops.
        step: optimizer steps so far.
    """
    if kept and not search.min_keep_ratio:
        logger.warning(
            "check at step %d: the mask of the ticket drops all channels of %s; one channel of "
            "each is kept (search.min_keep_ratio keeps more)",
            step,
            ", ".join(kept),
        )


def require_optimized(view: OptimizerView, network: nn.Module, groups: Groups) -> None:
    """Require the optimizer to have all trained parameters of the groups: only those can be held,
    and their state pruned.

    Args:
        view: the optimizer's view.
        network: the bare network.
        groups: its channel groups.

    Raises:
        ConfigError: it lacks one, for example because there is a second optimizer.
    """
    stepped = view.parameters
    parameters = dict(network.named_parameters())
    for name in (name for g in groups for m in g.members for name, _ in m.parameters):
        if parameters[name].requires_grad and parameters[name] not in stepped:
            raise ConfigError(
                f"attach: the optimizer does not have {name}, which trains; give one optimizer "
                "all parameters, or set requires_grad to False on those that shall not train"
            )


def require_alike(network: nn.Module, copies: Sequence[nn.Module], where: str) -> None:
    """Require copies to have the network's parameters, by names and shapes.

    Args:
        network: the bare network.
        copies: the copies of the network.
        where: prefix of error messages.

    Raises:
        ConfigError: one does not.
    """
    problem = problem_of_copies(copies)
    if problem is not None:
        raise ConfigError(f"{where}: {problem}")
    shapes = {name: full_shape(p) for name, p in network.named_parameters()}
    for number, copy in enumerate(copies):
        theirs = {name: p.shape for name, p in copy.named_parameters()}
        if theirs != shapes:
            odd = next(name for name, _ in sorted(theirs.items() ^ shapes.items()))
            raise ConfigError(
                f"{where}: copies[{number}] is not a copy of the network: parameter {odd} differs"
            )
