"""Table: the faults, what must come of each, and what did."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

__all__ = ["FAULTS", "Fault", "Table"]


class Fault(NamedTuple):
    """A row.

    Attributes:
        what: goes wrong.
        must: happen.
    """

    what: str
    must: str


FAULTS = {
    1: Fault("a rank is killed, with restarts", "the run goes on to the same end"),
    2: Fault("an exception on one rank", "all stop within seconds, with its code and words"),
    3: Fault("a rank is killed or hangs, no restarts", "all stop in bounded time, naming it"),
    4: Fault("SIGTERM to one or all ranks", "all stop at the same step; resume is exact"),
    5: Fault("a kill at any point of a save", "the old checkpoint or the new one, whole"),
    6: Fault("leftovers of a save", "the right step is found, leftovers go"),
    7: Fault("the newest checkpoint is incomplete", "an older one is taken; by name it is refused"),
    8: Fault("one bit of a checkpoint flipped", "refused"),
    9: Fault("the disk is full while saving", "older checkpoints stay, nothing partial is left"),
    10: Fault("a malicious checkpoint", "refused, nothing of it is executed"),
    11: Fault("resume on another number of ranks", "exact, or refused"),
    12: Fault("resume with other settings", "refused, unless they may change"),
    13: Fault("a mistake in the settings", "all mistakes told before anything starts"),
    14: Fault("a NaN on one rank", "all stop at the same step, no weight is changed"),
    15: Fault("masks differ, as many channels", "refused before anything is packed"),
    16: Fault("masks differ, other counts", "refused before anything is packed"),
    17: Fault("weights drift apart", "found within the interval, tensor and ranks are named"),
    18: Fault("buckets or masks change", "bit-equal to the masked reference"),
    19: Fault("frozen channels are pulled at", "they do not move"),
    20: Fault("data that cannot be trained on", "refused; a sample is named by place and index"),
    21: Fault("launchers that contradict themselves", "refused at once"),
    22: Fault("ranks that are not started alike", "refused, with the values of each"),
    23: Fault("two runs in one folder", "the second is refused"),
    24: Fault("logs cannot be written", "it trains on, warns once and says so at the end"),
    25: Fault("no ticket, or an empty layer", "said so; every layer keeps a channel"),
    26: Fault("a reader of stdout ends, stdout is closed", "the run goes on; said at the end"),
    27: Fault("stdout cannot encode a name", "it is escaped"),
    28: Fault(
        "the ticket cannot be written at the end",
        "the same command writes it from the last checkpoint",
    ),
    29: Fault("--out is a folder that is no run", "refused; what is put aside is always said"),
    30: Fault("--out is empty, a mount point or a link", "used in place"),
    31: Fault("a run inside another run's folder", "refused"),
    32: Fault("two containers with the same host name", "the second is refused"),
    33: Fault("two starts at one moment", "one of them is refused"),
    34: Fault(
        "a hard kill, then a restart on another host",
        "taken over by the same job, or when the lease ran out",
    ),
    35: Fault("a stranger talks to the monitor", "cut off; training is untouched"),
    36: Fault("few file descriptors on rank zero", "the limit is raised, or refused at the start"),
    37: Fault("the network collapses", "said, with its own exit code; why there is no ticket"),
    38: Fault("YAML 1.1: off, 010, 1:30", "as written"),
    39: Fault("dotted keys, patterns with dots, dicts to replace", "they work as documented"),
    40: Fault("settings that can never act", "a warning at the start, and by --check"),
    41: Fault(
        "--resume names a run's folder or a manifest", "understood, or the right path is named"
    ),
    42: Fault("launch/* called from another folder", "relative paths are those of the caller"),
    43: Fault("/dev/shm is too small for loaders", "named, with the remedy"),
    44: Fault("SIGINT or SIGHUP to one rank, Ctrl-C on torchrun", "like SIGTERM"),
    45: Fault("the only checkpoint is damaged", "refused unless --resume never"),
    46: Fault(
        "a resealed state lacks a key, has another type or NaN",
        "refused; the key or tensor is named",
    ),
    47: Fault("a ticket with other values, dtypes or channels", "refused"),
    48: Fault("the disk is full at the end", "nothing partial stays"),
    49: Fault("misuse of attach and draw", "one clear line"),
    50: Fault("one rank alone in a check or a step", "bounded and named"),
}

_MARKS = {"passed": "ok", "failed": "F", "error": "F", "xfailed": "x", "xpassed": "F"}


class Table:
    """Rows are faults; each names what was tried and how often that held.

    A test belongs to a row by ``@pytest.mark.fault(number, "what is tried")``, wherever it is.

    Args:
        stats: pytest's reports by outcome; those of faults have a property ``fault``.

    Attributes:
        is_whole: every fault was tried that a test is marked with.
    """

    def __init__(self, stats: Mapping[str, Iterable[Any]]) -> None:
        self._tried: dict[int, dict[str, Counter[str]]] = {number: {} for number in FAULTS}
        for outcome, mark in _MARKS.items():
            for report in stats.get(outcome, ()):
                for key, value in getattr(report, "user_properties", ()):
                    if key == "fault":
                        number, what = value
                        self._tried[number].setdefault(what, Counter())[mark] += 1

    def __bool__(self) -> bool:
        return any(self._tried.values())

    @property
    def is_whole(self) -> bool:
        return all(self._tried.values())

    def text(self) -> str:
        """For a terminal, only what was tried."""
        lines = []
        for number, tried in self._tried.items():
            if tried:
                lines.append(f"{number:2} {FAULTS[number].what}: {FAULTS[number].must}")
                lines += [f"     {_marks(marks):6} {what}" for what, marks in tried.items()]
        return "\n".join(lines)

    def write(self, path: Path) -> None:
        """As Markdown; the folder is made if it is not there."""
        rows = [["", "fault", "what must happen", "what was tried, and how often it held"]]
        rows.append(["---"] * len(rows[0]))
        for number, (what, must) in FAULTS.items():
            tried = (f"{case}: {_marks(marks)}" for case, marks in self._tried[number].items())
            rows.append([str(number), what, must, "<br>".join(tried) or "not tried"])
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([f"| {' | '.join(row)} |" for row in rows] + [""]))


def _marks(marks: Counter[str]) -> str:
    return ", ".join(f"{mark} {count}" for mark, count in marks.items())
