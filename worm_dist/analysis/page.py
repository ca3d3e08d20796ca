"""Page of a report: one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from .run_figures import COLOURS, DASHES, comparisons, pictures_of
from .run_files import RunFiles
from .run_table import Section, differing_settings, environment, figures

__all__ = ["page"]

_TEMPLATE = "page.html"


def page(runs: Sequence[RunFiles], notes: Sequence[str]) -> str:
    """The page that compares runs.

    Args:
        runs: the runs, at least one.
        notes: sentences to show at the top.
    """
    templates = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    one = f"Run {runs[0].name}"
    return templates.get_template(_TEMPLATE).render(
        title=one if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        version=version("worm_dist"),
        date=datetime.now(timezone.utc).replace(microsecond=0),
        notes=notes,
        runs=[
            {
                "name": run.name,
                "status": run.status,
                "colour": f"var(--c-{COLOURS[number % len(COLOURS)][1:].lower()})",
                "dashes": DASHES[number // len(COLOURS) % len(DASHES)],
                "pictures": pictures_of(run, number),
            }
            for number, run in enumerate(runs)
        ],
        comparisons=comparisons(runs),
        figures=figures(runs),
        settings=[Section("", differing_settings(runs))],
        environment=[Section("", environment(runs))],
    )
