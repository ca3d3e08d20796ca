"""Page of the benchmark: tables, picture, whole runs beside composed ones, and the command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..ledger.row import Row, read_rows
from ..ledger.subject import SUBJECTS
from ..ledger.table import header
from ..network import rate_text
from .methods import LABELS
from .plot import picture
from .step_times import read_step_times
from .table import Results, tables

__all__ = ["PAGE", "STEP_TIMES", "WHOLE_RUNS", "write"]

PAGE, STEP_TIMES, WHOLE_RUNS = "time-to-accuracy.md", "steps.jsonl", "whole-runs"
_TEXT = """\
# Time to accuracy

**How the seconds come about.**  The accuracies are those of whole runs, each trained once, on
{trained}.  The seconds are composed: the number of steps that a run has taken in each phase, times
the time of such a step over that network, plus its checks in the search, the stages of its draw,
and what the first steps after each take longer.  The learning curve does not depend on the link.
The times were measured on {measured}, which take a few steps of each method in turn, through a
removal of 96 steps in the same stages.  A step's time is the tenth percentile, because the machine
also had other load.  Bytes are those of the gradients.

{tables}
{whole}```sh
{command}
```

The command trains rows that are missing.  Where none is, it only rewrites this page and the
picture.

![Validation accuracy over seconds](time-to-accuracy.png)
"""
_WHOLE = """\
## Composed beside measured

Short runs that were trained over the link from beginning to end: the seconds of all steps, checks
and draws, without evaluations, beside those composed of the step times above (tenth percentiles),
and of the means of the same steps, which include what other load has delayed.

{table}

"""


def write(folder: Path, rows: Sequence[Row], command: str) -> str:
    """Write ``time-to-accuracy.md`` and its picture; equal rows give equal files.

    Args:
        folder: the folder, with the step times.
        rows: the rows to compare.
        command: the command line, which is on the page.

    Returns:
        The tables.
    """
    complete = [row for row in rows if not row.error]
    times = read_step_times(folder / STEP_TIMES)
    results = Results(complete, times)
    text = tables(results)
    page = _TEXT.format(
        trained=" or ".join(_ranks(number) for number in sorted({r.key.ranks for r in complete})),
        measured=" or ".join(_ranks(number) for number in sorted({t.ranks for t in times})),
        tables=text,
        whole=_whole_runs(folder, results),
        command=command,
    )
    (folder / PAGE).write_text(page, encoding="utf-8")
    picture(results).savefig(folder / "time-to-accuracy.png", dpi=110)
    return text


def _ranks(number: int) -> str:
    return "one rank" if number == 1 else f"{number} ranks"


def _whole_runs(folder: Path, results: Results) -> str:
    """A table of the whole runs over a link; empty without any."""
    titles = ["network", "run", "epochs", "of percentiles (s)", "measured (s)", "of means (s)"]
    lines = header(titles)
    for path in sorted(folder.glob(f"{WHOLE_RUNS}-*.jsonl")):
        network = path.stem.removeprefix(f"{WHOLE_RUNS}-")
        for row in read_rows(path):
            like = next(
                (
                    each
                    for each in results.step_times
                    if (each.rule, each.prune_ratio, each.network)
                    == (row.key.rule, row.key.prune_ratio, network)
                ),
                None,
            )
            if like is None or row.error:
                continue
            subject = SUBJECTS[row.key.subject]
            steps = len(subject.samples().images) // subject.batch_size
            undisturbed, means = (
                like.seconds_of(row, steps, disturbed=disturbed)[-1] for disturbed in (False, True)
            )
            lines.append(
                f"| {rate_text(network)} | {LABELS[row.key.rule]}, {row.key.subject} | "
                f"{row.key.epochs} | {undisturbed:.1f} | {sum(row.training_seconds):.1f} | "
                f"{means:.1f} |"
            )
    return _WHOLE.format(table="\n".join(lines)) if len(lines) > 2 else ""
