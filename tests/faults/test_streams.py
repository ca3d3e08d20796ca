"""A standard output or a standard error that takes nothing, or not every character."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import threading
from typing import Any

import pytest

from tests.faults.driver import CONFIG, ROOT, Act, Driver, Ended, Fault, Run

pytestmark = pytest.mark.slow("whole runs, six seconds")

SECURE = "worm_dist.__main__:secure_standard_streams"
"""Called first of all."""


def _end_the_reader(real: Act, *args: Any) -> Any:
    """Of the standard output, as ``| head -1`` does."""
    reader, writer = os.pipe()
    os.dup2(writer, 1)
    os.close(reader)
    return real(*args)


def _end_both_readers(real: Act, *args: Any) -> Any:
    os.dup2(1, 2)
    return _end_the_reader(lambda *same: (os.dup2(1, 2), real(*same))[1], *args)


def _close_both(real: Act) -> Any:
    """As Python finds them after ``>&- 2>&-``."""
    for number in (1, 2):
        os.close(number)
    sys.stdout = sys.stderr = None
    return real()


def _close_stdout(real: Act) -> Any:
    os.close(1)
    sys.stdout = None
    return real()


def _write_ascii(real: Act) -> Any:
    """As Python does with ``PYTHONIOENCODING=ascii``."""
    sys.stdout = open(1, "w", encoding="ascii", closefd=False)  # noqa: SIM115
    return real()


def _open_a_terminal(real: Act) -> Any:
    """One that is closed when the training is at its sixth step."""
    ours, theirs = pty.openpty()
    os.dup2(theirs, 1)
    os.environ["TERM"] = "xterm"
    os.close(theirs)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115

    def read() -> None:
        while not _closing.is_set():
            if select.select([ours], [], [], 0.01)[0]:
                os.read(ours, 2**16)
        os.close(ours)
        _closed.set()

    threading.Thread(target=read, daemon=True).start()
    return real()


_closing, _closed = threading.Event(), threading.Event()


def _close_the_terminal(real: Act, *args: Any) -> Any:
    _closing.set()
    assert _closed.wait(10)
    return real(*args)


def _lost(driver: Driver) -> list[str]:
    written: list[str] = json.loads((driver.out / "result.json").read_text())["failed_writes"]
    return written


def _assert_goes_on(driver: Driver, ends: list[Ended], why: str) -> None:
    assert [end.exitcode for end in ends] == [0, 0], ends
    assert ends[1].said == "", "the other rank has nothing to say"
    assert "Traceback" not in ends[0].said
    assert ends[0].said.count(f"console cannot be written ({why}); training goes on") == 1
    last = f"the run has finished; its figures are in {driver.out} (the console was lost)"
    assert ends[0].said.splitlines()[-1] == last
    assert _lost(driver) == ["console"]


@pytest.mark.fault(26, "the reader ends in the middle of a run")
def test_a_reader_that_ends_does_not_end_the_run(driver: Driver) -> None:
    """rich ended rank zero with exit code 1 and no word; the other rank asked whether memory was
    out."""
    ends = driver(2, Run((Fault.do(_end_the_reader, rank=0, step=6),)))
    _assert_goes_on(driver, ends, "Broken pipe")


@pytest.mark.fault(26, "standard output is closed at the start")
def test_a_closed_standard_output_does_not_end_the_run(driver: Driver) -> None:
    """It was an AttributeError of None."""
    ends = driver(2, Run((Fault.do(_close_stdout, rank=None, step=1).at(SECURE),)))
    _assert_goes_on(driver, ends, "Bad file descriptor")


@pytest.mark.fault(26, "the terminal is closed under the progress bar")
def test_a_terminal_that_is_closed_does_not_end_the_run(driver: Driver) -> None:
    """The thread that draws the bar would print a traceback."""
    opens = Fault.do(_open_a_terminal, rank=0, step=1).at(SECURE)
    ends = driver(2, Run((opens, Fault.do(_close_the_terminal, rank=0, step=6))))
    _assert_goes_on(driver, ends, "Input/output error")


@pytest.mark.fault(26, "nobody reads errors either")
@pytest.mark.parametrize(
    "fault",
    [
        Fault.do(_end_both_readers, rank=0, step=6),
        Fault.do(_close_both, rank=None, step=1).at(SECURE),
    ],
    ids=["broken", "closed"],
)
def test_without_any_stream_the_results_say_so(driver: Driver, fault: Fault) -> None:
    ends = driver(2, Run((fault,)))
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    assert _lost(driver) == ["console"]


@pytest.mark.fault(26, "an error when nobody reads errors")
def test_an_error_that_nobody_reads_has_its_exit_code(driver: Driver) -> None:
    faults = Fault.do(_close_both, rank=None, step=1).at(SECURE), Fault.raise_(1, step=3)
    ends = driver(2, Run(faults))
    assert [(end.exitcode, end.said) for end in ends] == [(1, "")] * 2


@pytest.mark.fault(27, "a run's name in ASCII")
def test_a_name_that_cannot_be_encoded_is_escaped(driver: Driver) -> None:
    """It was a UnicodeEncodeError when the run was over."""
    driver.out = driver.out.with_name("naïve-运行")
    ends = driver(2, Run((Fault.do(_write_ascii, rank=0, step=1).at(SECURE),)))
    assert [(end.exitcode, end.said) for end in ends] == [(0, "")] * 2
    assert r"na\xefve-\u8fd0\u884c" in ends[0].printed.replace("\n", "").replace(" ", "")
    assert _lost(driver) == []


@pytest.mark.slow("a process of its own")
@pytest.mark.fault(26, "train | head -1")
@pytest.mark.fault(27, "PYTHONIOENCODING=latin-1")
def test_a_shell_that_reads_one_line_gets_a_whole_run(driver: Driver) -> None:
    settings = "--epochs 1 --preset dense"
    out = driver.out.with_name("运行")
    train = f"{sys.executable} -m worm_dist train {CONFIG} --out {out} {settings}"
    done = subprocess.run(
        ["bash", "-c", f"{train} | head -1; exit ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        env={**os.environ, "PYTHONIOENCODING": "latin-1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("* preset dense") and done.stdout.count("\n") == 1
    assert json.loads((out / "result.json").read_text())["status"] == "dense"
    assert "the console was lost" in done.stderr and "Traceback" not in done.stderr
