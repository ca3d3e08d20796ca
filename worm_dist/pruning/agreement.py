"""Agreement: checks on masks from the user before they are truncated or drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from torch import Tensor, nn

from ..distributed.collectives import Communicator, bits
from ..errors import ConfigError, DivergenceError
from ..groups.channel_groups import Groups
from ..groups.mask import Mask

__all__ = ["agreed_mask", "problem_of_copies", "require_live_survivors", "require_reversible"]


def agreed_mask(
    ranks: Communicator, groups: Groups, mask: Mask, when: str, copies: Sequence[nn.Module] = ()
) -> Mask:
    """Compare the mask across ranks and return it with its groups in network order.  Collective.

    Masks are compared before they are validated, so that an invalid mask raises on all ranks.

    Args:
        ranks: the communicator of the ranks that must pass the same mask.
        groups: the network's channel groups.
        mask: the mask; its groups may be in any order.
        when: the operation, as a prefix of error messages.
        copies: further networks to which the mask is applied; equal in structure on all ranks.

    Raises:
        DivergenceError: the masks or copies differ between ranks, or one rank's are no masks.
        ConfigError: mask or copies are of another type, or the mask's groups are not those of this
            network.
    """
    problem = _problem_of_mask(mask) or problem_of_copies(copies)
    if problem is not None:
        with suppress(DivergenceError):  # raised on every rank; this rank's error says more
            ranks.assert_equal({"mask": {"(refused)": problem.encode()}, "copies": {}}, when)
        raise ConfigError(f"{when}: {problem}")
    ranks.assert_equal({"mask": bits(mask), "copies": _shapes(copies)}, when)
    odd = mask.sizes.items() ^ groups.sizes.items()
    if odd:
        names = ", ".join(sorted({name for name, _ in odd}))
        raise ConfigError(f"{when}: the mask is not of this network's groups: {names}")
    return Mask({group.name: mask[group.name] for group in groups})


def _problem_of_mask(mask: object) -> str | None:
    if isinstance(mask, Mask):
        return None
    how = "worm_dist.Mask(mask)" if isinstance(mask, Mapping) else "worm_dist.Mask"
    return (
        f"the mask is a {type(mask).__name__}; give {how}, of bool[channels] for every name of "
        "engine.groups"
    )


def problem_of_copies(copies: object) -> str | None:
    """What is wrong with the argument ``copies`` by its type; None if nothing."""
    if not isinstance(copies, (list, tuple)):
        return f"copies is a {type(copies).__name__}; give a list, such as copies=[average.module]"
    for number, copy in enumerate(copies):
        if not isinstance(copy, nn.Module):
            return f"copies[{number}] is a {type(copy).__name__}, not a module"
    return None


def require_live_survivors(groups: Groups, mask: Mask, frozen: Tensor) -> None:
    """Check that every group keeps at least one channel that trains.

    Args:
        groups: the network's channel groups.
        mask: the mask to draw.
        frozen: bool ``[num_channels]``, the channels that are currently frozen.

    Raises:
        ConfigError: a group has no channel that is both kept and not frozen.
    """
    for name, live in groups.split(mask.keep & ~frozen).items():
        if not bool(live.any()):
            raise ConfigError(
                f"draw: group {name}: no channel that the mask keeps is live; a network without "
                "this layer cannot train on. Raise search.min_keep_ratio or give another mask"
            )


def require_reversible(groups: Groups, mask: Mask, irreversible: Tensor, when: str) -> None:
    """Check that the mask keeps no channel whose removal has begun.

    Args:
        groups: the channel groups of the mask.
        mask: the mask to truncate or draw.
        irreversible: bool ``[num_channels]``, the channels whose removal has begun or is complete.
        when: the operation, as a prefix of error messages.

    Raises:
        ConfigError: the mask keeps one of these channels.
    """
    for name, back in groups.split(irreversible & mask.keep).items():
        if bool(back.any()):
            raise ConfigError(
                f"{when}: group {name}: the mask keeps a channel that has begun to leave, or has "
                "left; removal cannot be undone"
            )


def _shapes(networks: Sequence[nn.Module]) -> dict[str, bytes]:
    """Return the parameter names and shapes of each network, encoded for comparison."""
    shapes = ([(n, tuple(p.shape)) for n, p in network.named_parameters()] for network in networks)
    return {str(number): repr(each).encode() for number, each in enumerate(shapes)}
