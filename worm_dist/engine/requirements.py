"""Requirements on what users give beside the network: its optimizer and its copies."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..backends.optimizer_view import OptimizerView
from ..errors import ConfigError
from ..groups.channel_groups import Groups
from ..pruning.agreement import problem_of_copies

__all__ = ["require_alike", "require_optimized"]


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
    shapes = {name: p.shape for name, p in network.named_parameters()}
    for number, copy in enumerate(copies):
        theirs = {name: p.shape for name, p in copy.named_parameters()}
        if theirs != shapes:
            odd = next(name for name, _ in sorted(theirs.items() ^ shapes.items()))
            raise ConfigError(
                f"{where}: copies[{number}] is not a copy of the network: parameter {odd} differs"
            )
