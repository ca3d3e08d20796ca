"""Figures as SVG within a page: in its colours, light or dark, and with its fonts."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.figure import Figure

__all__ = ["inline_svg"]

_NEUTRAL: Mapping[str, str] = {
    "#000000": "currentColor",
    "#666666": "var(--muted)",
    "#e6e6e6": "var(--line)",
    "#ffffff": "var(--page)",
}
_LINES = ("#0072b2", "#56b4e9", "#009e73", "#d55e00", "#cc79a7", "#e69f00")
"""Colours of lines and their labels, which the page makes darker or lighter: ``--c-0072b2``."""


def inline_svg(figure: Figure, number: int, alt: str, has_image: bool = False) -> Markup:
    """The SVG of a figure.

    Args:
        figure: the figure.
        number: distinguishes the figures of a page.
        alt: the text for those who do not see it.
        has_image: whether the figure has a raster image, whose colours cannot follow the page's.
    """
    file = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "worm_dist"}):
        figure.savefig(
            file,
            format="svg",
            transparent=True,
            metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
        )
    text = file.getvalue()
    text = text[text.index("<svg") :]
    head, _, body = text.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None
    colours = {**_NEUTRAL, **({} if has_image else {c: f"var(--c-{c[1:]})" for c in _LINES})}
    for colour, replacement in colours.items():
        body = body.replace(colour, replacement)
    # Identifiers are unique within a figure only.
    body = re.sub(r'\b(id=")', rf"\g<1>f{number}-", body)
    body = re.sub(r'(url\(#|href="#)', rf"\g<1>f{number}-", body)
    title = f'<title id="f{number}-title">{escape(alt)}</title>'
    return Markup(f'<svg role="img" aria-labelledby="f{number}-title" {box[0]}>{title}{body}')
