"""Choice: which of the groups found are searched, and why the others are left dense."""

from __future__ import annotations

import difflib
from fnmatch import fnmatchcase

from ..config import SearchConfig
from ..errors import ConfigError
from .groups import ChannelGroup, Groups, Member

__all__ = ["chosen"]


def chosen(groups: Groups, search: SearchConfig, any_group: bool = False) -> Groups:
    """The groups that the settings let the search have, the others left dense with the reason.

    Args:
        groups: all of a network.
        search: ``score``, ``coupling`` and ``dense`` choose.
        any_group: whether a score of the user's own takes the place of ``score``.

    Raises:
        ConfigError: a pattern of ``search.dense`` matches no module of any group.
    """
    reasons: dict[str, str] = {}
    for pattern in search.dense:
        matched = [group.name for group in groups if _matches(group, pattern)]
        if not matched:
            raise ConfigError(_without_effect(pattern, groups))
        reasons |= dict.fromkeys(matched, f"search.dense has {pattern!r}")
    for group in groups:
        if group.tied and search.coupling == "skip":
            tied = "a sum ties it to other layers, and search.coupling is 'skip'"
            reasons.setdefault(group.name, tied)
        unranked = None if any_group else _why_unranked(group, search)
        if unranked:
            reasons.setdefault(group.name, unranked)
    return groups.without(reasons)


def _why_unranked(group: ChannelGroup, search: SearchConfig) -> str | None:
    if search.score == "norm_scale" and not group.norms:
        return "it has no norm, and search.score is 'norm_scale'"
    if search.score == "gate" and not group.gates:
        return "it has no gate, and search.score is 'gate'"
    if search.score == "scale" and not group.norms and not group.gates:
        return "it has neither a norm nor a gate; search.score 'weight_norm' ranks it without"
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
