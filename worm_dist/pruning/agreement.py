"""Admission: which masks from outside the search may be truncated or drawn."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..distributed.collectives import Communicator, bits
from ..errors import ConfigError
from ..groups.channel_groups import Groups
from ..search.mask import Mask

__all__ = ["agreed_mask", "require_live_survivors", "require_reversible"]


def agreed_mask(
    ranks: Communicator, groups: Groups, mask: Mask, when: str, copies: Sequence[nn.Module] = ()
) -> Mask:
    """The mask with its groups in the network's order.  Collective.

    Agreed before it is judged: a mask that one rank alone would refuse must stop them all.

    Args:
        ranks: that must bring the same mask.
        groups: of the network.
        mask: its groups may come in any order.
        when: for the message of a difference.
        copies: networks that go with the mask; they must be alike on all ranks.

    Raises:
        DivergenceError: the ranks bring different masks or copies.
        ConfigError: the mask is not of this network's groups.
    """
    ranks.require_equal({"mask": bits(mask), "copies": _shapes(copies)}, when)
    odd = mask.sizes.items() ^ groups.sizes.items()
    if odd:
        names = ", ".join(sorted({name for name, _ in odd}))
        raise ConfigError(f"{when}: the mask is not of this network's groups: {names}")
    return Mask({group.name: mask[group.name] for group in groups})


def require_live_survivors(groups: Groups, mask: Mask, frozen: Tensor) -> None:
    """A layer may have come to live on channels that are about to go or no longer train.

    Args:
        frozen: bool ``[num_channels]``, the channels that do not train now.

    Raises:
        ConfigError: in a group the mask keeps no channel that is not frozen.
    """
    for name, live in groups.split(mask.keep & ~frozen).items():
        if not bool(live.any()):
            raise ConfigError(
                f"draw: group {name}: no channel that the mask keeps is live; a network without "
                "this layer cannot train on. Raise search.floor or give another mask"
            )


def require_reversible(groups: Groups, mask: Mask, irreversible: Tensor, when: str) -> None:
    """What has begun to leave does not come back.

    Args:
        irreversible: bool ``[num_channels]``, the channels that the mask must drop.

    Raises:
        ConfigError: it keeps one of them.
    """
    for name, back in groups.split(irreversible & mask.keep).items():
        if bool(back.any()):
            raise ConfigError(
                f"{when}: group {name}: the mask keeps a channel that has begun to leave, or has "
                "left; such channels do not come back"
            )


def _shapes(networks: Sequence[nn.Module]) -> dict[str, bytes]:
    """The parameters of each network by names and shapes."""
    shapes = ([(n, tuple(p.shape)) for n, p in network.named_parameters()] for network in networks)
    return {str(number): repr(each).encode() for number, each in enumerate(shapes)}
