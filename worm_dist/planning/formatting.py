"""Formats numbers and module names in few ASCII characters, for terminals and log files."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "column",
    "column_widths",
    "compared",
    "listed",
    "mebibytes",
    "seconds",
    "short",
    "shortened",
]


def short(value: int) -> str:
    """Format a number with three digits and an SI prefix: ``11.7M``."""
    if value < 1000:
        return str(value)
    number, units = float(value), ["", "k", "M", "G", "T", "P", "E"]
    while number >= 999.5:
        number, units = number / 1000, units[1:]
    return f"{number:#.3g}".rstrip(".") + units[0]


def mebibytes(value: int) -> str:
    """Format bytes as MiB without the unit: ``0.55``, ``1,024.00``."""
    return f"{value / 2**20:,.2f}"


def seconds(value: float) -> str:
    """Format a time in seconds with its unit: ``1.78 s``, ``62.6 ms``, ``15 us``."""
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 or value == 0 else f"{1e6 * value:.0f} us"


def compared(value: str, ratio: float) -> str:
    """Format a value with its ratio to another one: ``72,666  25.2 %``."""
    return f"{value} {100 * ratio:5.1f} %"


def shortened(name: str, width: int) -> str:
    """Shorten a module's name to at most ``width`` characters: ``f.d4.denselayer16.conv1``.

    The outer parts are abbreviated first, to a letter and their number, which keeps names distinct.
    """
    for depth in range(1 + name.count(".")):
        short_name = _abbreviated(name, depth)
        if len(short_name) <= width:
            return short_name
    return ".." + short_name[len(short_name) - max(1, width - 2) :]


def listed(names: Sequence[str], width: int) -> str:
    """Format a list by its first name and the number of others: ``conv1 +2``; ``-`` if empty."""
    if not names:
        return "-"
    return shortened(names[0], width - len(_more(names))) + _more(names)


def column(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """Format the cells of a column as ``listed``, abbreviated to the same depth if possible."""
    deepest = max((name.count(".") for names in cells for name in names), default=0)
    for depth in range(1 + deepest):
        texts = [_abbreviated(names[0], depth) + _more(names) if names else "-" for names in cells]
        if all(len(text) <= width for text in texts):
            return texts
    return [listed(names, width) for names in cells]


def _abbreviated(name: str, depth: int) -> str:
    """Abbreviate the first ``depth`` parts of a dotted name."""
    *outer, last = name.split(".")
    stems = [part.rstrip("0123456789") for part in outer[:depth]]
    shrunk = [stem[:1] + part[len(stem) :] for stem, part in zip(stems, outer)]
    return ".".join([*shrunk, *outer[depth:], last])


def _more(names: Sequence[str]) -> str:
    return f" +{len(names) - 1}" if names[1:] else ""


def column_widths(needed: Sequence[int], room: int) -> list[int]:
    """Distribute the available width over columns (max-min fairness).

    Args:
        needed: width that each column needs.
        room: total width.
    """
    widths = [0] * len(needed)
    narrowest_first = sorted(range(len(needed)), key=lambda column: needed[column])
    for num_done, column in enumerate(narrowest_first):
        widths[column] = min(needed[column], room // (len(needed) - num_done))
        room -= widths[column]
    return widths
