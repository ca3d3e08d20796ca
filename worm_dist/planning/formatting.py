"""Words: numbers and names in few characters, plain ones, as a job's log may be read anywhere."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["column", "fair", "listed", "seconds", "short", "shortened"]


def short(value: int) -> str:
    """Three digits and a power of a thousand: ``11.7M``."""
    if value < 1000:
        return str(value)
    number, units = float(value), ["", "k", "M", "G", "T", "P", "E"]
    while number >= 999.5:
        number, units = number / 1000, units[1:]
    return f"{number:#.3g}".rstrip(".") + units[0]


def seconds(value: float) -> str:
    """With its unit: ``1.78 s``, ``62.6 ms``, ``15 us``."""
    if value >= 1:
        return f"{value:,.2f} s"
    return f"{1e3 * value:.1f} ms" if value >= 1e-3 or value == 0 else f"{1e6 * value:.0f} us"


def shortened(name: str, width: int) -> str:
    """A module's name in so many characters: ``f.d4.denselayer16.conv1``.

    Its outer parts shrink first, to a letter and their number, so that names that differ still do.
    """
    for depth in range(1 + name.count(".")):
        short_name = _shrunk(name, depth)
        if len(short_name) <= width:
            return short_name
    return ".." + short_name[len(short_name) - max(1, width - 2) :]


def listed(names: Sequence[str], width: int) -> str:
    """The first name and how many there are besides: ``conv1 +2``; ``-`` for none."""
    if not names:
        return "-"
    return shortened(names[0], width - len(_more(names))) + _more(names)


def column(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """Every cell ``listed``, and all names shrunk by as many parts if they can be."""
    deepest = max((name.count(".") for names in cells for name in names), default=0)
    for depth in range(1 + deepest):
        texts = [_shrunk(names[0], depth) + _more(names) if names else "-" for names in cells]
        if all(len(text) <= width for text in texts):
            return texts
    return [listed(names, width) for names in cells]


def _shrunk(name: str, depth: int) -> str:
    """With so many outer parts shrunk."""
    *outer, last = name.split(".")
    stems = [part.rstrip("0123456789") for part in outer[:depth]]
    shrunk = [stem[:1] + part[len(stem) :] for stem, part in zip(stems, outer)]
    return ".".join([*shrunk, *outer[depth:], last])


def _more(names: Sequence[str]) -> str:
    return f" +{len(names) - 1}" if names[1:] else ""


def fair(needed: Sequence[int], room: int) -> list[int]:
    """Widths of columns: what each needs, or an equal share of what modest ones leave."""
    widths = [0] * len(needed)
    modest_first = sorted(range(len(needed)), key=lambda column: needed[column])
    for num_done, column in enumerate(modest_first):
        widths[column] = min(needed[column], room // (len(needed) - num_done))
        room -= widths[column]
    return widths
