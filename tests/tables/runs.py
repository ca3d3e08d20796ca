"""Runs: those of a table's rows on real ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Generic, Protocol, TypeVar

from tests.ranks import Outcome, Ranks
from tests.tables.findings import Findings

__all__ = ["Runs"]


class _Row(Protocol):
    @property
    def world_size(self) -> int: ...


R = TypeVar("R", bound=_Row)


class Runs(Generic[R]):
    """A row runs once, in one call of all its ranks, and is looked at from all sides.

    Args:
        ranks: that are called.
        run: all that a rank sees of these rows, by name.
        rows: by name.
        most: rows that share a call.
        alike: they share it if this is the same for them, and the number of ranks is.
    """

    def __init__(
        self,
        ranks: Ranks,
        run: Callable[[tuple[str, ...]], dict[str, Findings]],
        rows: Mapping[str, R],
        most: int = 1,
        alike: Callable[[R], object] = type,
    ) -> None:
        self._ranks, self._run, self._rows = ranks, run, rows
        self._ended: dict[tuple[str, ...], list[Outcome] | BaseException] = {}
        self._call_of: dict[str, tuple[str, ...]] = {}
        sharing: dict[Any, list[str]] = {}
        for name, row in rows.items():
            sharing.setdefault((row.world_size, alike(row)), []).append(name)
        for names in sharing.values():
            for first in range(0, len(names), most):
                call = tuple(names[first : first + most])
                self._call_of |= dict.fromkeys(call, call)

    def findings(self, name: str) -> list[Findings]:
        """What every rank has found of a row."""
        call = self._call_of[name]
        if call not in self._ended:
            try:
                size = self._rows[name].world_size
                self._ended[call] = self._ranks.outcomes(size, self._run, call)
            except BaseException as error:  # such as pytest's timeout: once is enough
                self._ended[call] = error
        outcomes = self._ended[call]
        if isinstance(outcomes, BaseException):
            raise outcomes
        for outcome in outcomes:
            assert outcome.exitcode == 0, str(outcome)
        return [outcome.value[name] for outcome in outcomes]

    def look(self, name: str, column: str) -> None:
        """Every rank has compared something in this column, and nothing was wrong; in the column
        ``agree`` the ranks are compared with each other."""
        first, *others = everyone = self.findings(name)
        for rank, findings in enumerate(everyone):
            wrong = findings.wrong.get(column, [])
            assert not wrong, f"{len(wrong)} on rank {rank}:\n" + "\n".join(wrong[:5])
            if column != "agree":
                assert findings.num_comparisons[column], f"nothing was compared on rank {rank}"
        if column == "agree":
            assert first.weights, "no weights were kept"
            for other in others:
                assert other.weights == first.weights, "the ranks' weights differ"
                assert other.masks == first.masks, "the ranks' masks differ"
