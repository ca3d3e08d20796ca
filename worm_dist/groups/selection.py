"""Choice: which of the groups found are searched, and why the others are left dense."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from ..config import SearchConfig
from ..errors import ConfigError
from .channel_groups import ChannelGroup, Groups, Member

__all__ = ["chosen", "importance_of"]


Importance: TypeAlias = Literal["scale", "norm_scale", "gate", "weight_norm"]


def chosen(groups: Groups, search: SearchConfig, any_group: bool = False) -> Groups:
    """The groups that the settings let the search have, the others left dense with the reason.

    Args:
        groups: all of a network.
        search: ``importance``, ``coupling`` and ``dense`` choose.
        any_group: whether a score of the user's own takes the place of ``importance``.

    Raises:
        ConfigError: a pattern of ``search.dense`` matches no module of any group.
    """
    reasons: dict[str, str] = {}
    for pattern in search.dense:
        matched = [group.name for group in groups if _matches(group, pattern)]
        if not matched:
            raise ConfigError(_without_effect(pattern, groups))
        reasons |= dict.fromkeys(matched, f"search.dense has {pattern!r}")
    importance = importance_of(search, groups)
    for group in groups:
        if group.tied and search.coupling == "skip":
            tied = "a sum ties it to other layers, and search.coupling is 'skip'"
            reasons.setdefault(group.name, tied)
        unranked = None if any_group else _why_unranked(group, importance)
        if unranked:
            reasons.setdefault(group.name, unranked)
    return groups.without(reasons)


def importance_of(search: SearchConfig, groups: Sequence[ChannelGroup]) -> Importance:
    """What ranks the channels of these groups; ``auto`` is settled by what they have."""
    if search.importance != "auto":
        return search.importance
    has_scales = any(group.norms or group.gates for group in groups)
    # Ranked layer by layer, it is the layers' scales that count.
    return "scale" if has_scales or search.grouping == "layer" else "weight_norm"


def _why_unranked(group: ChannelGroup, importance: Importance) -> str | None:
    if importance == "norm_scale" and not group.norms:
        return "it has no norm, and search.importance is 'norm_scale'"
    if importance == "gate" and not group.gates:
        return "it has no gate, and search.importance is 'gate'"
    if importance == "scale" and not group.norms and not group.gates:
        return "it has neither a norm nor a gate; search.importance 'weight_norm' ranks it without"
    return None


def _matches(group: ChannelGroup, pattern: str) -> bool:
    return any(fnmatchcase(member.module, pattern) for member in _cut(group))


def _cut(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if member.role != "consumer"]


def _without_effect(pattern: str, groups: Groups) -> str:
    names = sorted({member.module for group in groups for member in _cut(group)})
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"search.dense: {pattern!r} matches no module whose channels could be cut{hint}"
