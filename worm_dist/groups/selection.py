"""Selection: the groups that are searched, and the reasons why others stay dense."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from ..config import SearchConfig
from ..errors import ConfigError
from .channel_groups import ChannelGroup, Groups, Member

__all__ = ["importance_of", "select_groups"]


Importance: TypeAlias = Literal["scale", "norm_scale", "gate", "signed_gate", "weight_norm"]


def select_groups(groups: Groups, search: SearchConfig, any_group: bool = False) -> Groups:
    """Select the groups to search; the others stay dense with the reason.

    Args:
        groups: all channel groups of a network.
        search: the search settings; ``importance``, ``coupling`` and ``dense`` are used.
        any_group: whether a custom importance replaces ``search.importance``.

    Raises:
        ConfigError: a pattern of ``search.dense`` matches no module of any group.
    """
    reasons: dict[str, str] = {}
    for pattern in search.dense:
        matched = [group.name for group in groups if _matches(group, pattern)]
        if not matched:
            raise ConfigError(_unmatched_message(pattern, groups))
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
    """Return the importance that ranks these groups, with ``auto`` resolved."""
    if search.importance != "auto":
        return search.importance
    has_scales = any(group.norms or group.gates for group in groups)
    # Grouping by layer ranks the scales of the norms.
    return "scale" if has_scales or search.grouping == "layer" else "weight_norm"


def _why_unranked(group: ChannelGroup, importance: Importance) -> str | None:
    if importance == "norm_scale" and not group.norms:
        return "it has no norm, and search.importance is 'norm_scale'"
    if importance == "weight_norm" and not any(m.role == "producer" for m in group.members):
        return "a norm selects its channels, and search.importance 'weight_norm' ranks layers"
    if importance in ("gate", "signed_gate") and not group.gates:
        return f"it has no gate, and search.importance is {importance!r}"
    if importance == "scale" and not group.norms and not group.gates:
        return "it has neither a norm nor a gate; search.importance 'weight_norm' ranks it without"
    return None


def _matches(group: ChannelGroup, pattern: str) -> bool:
    return any(fnmatchcase(member.module, pattern) for member in _prunable_members(group))


def _prunable_members(group: ChannelGroup) -> list[Member]:
    return [member for member in group.members if member.role != "consumer"]


def _unmatched_message(pattern: str, groups: Groups) -> str:
    names = sorted({member.module for group in groups for member in _prunable_members(group)})
    near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"search.dense: {pattern!r} matches no module whose channels could be cut{hint}"
