"""Prints what came out of a run in three lines; with a second run, in comparison with it."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from worm_dist.training.reporting.outcome import outcome


def main(run: str, dense: str | None = None) -> None:
    """Print the outcome of a run.

    Args:
        run: its folder.
        dense: folder of a run of the same length without a search.
    """
    results = [
        json.loads((Path(folder) / "result.json").read_text()) for folder in (run, dense) if folder
    ]
    for line in outcome(*results):
        print(f"  {line}")


if __name__ == "__main__":
    main(*sys.argv[1:])
