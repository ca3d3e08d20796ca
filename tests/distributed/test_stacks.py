"""What a rank tells of itself when ranks are missed."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from worm_dist.distributed import stacks
from worm_dist.distributed.connection import MAX_MESSAGE_BYTES
from worm_dist.distributed.stacks import flight_record, own_stacks, write_stacks


def test_all_threads_are_there_the_training_thread_first() -> None:
    let_go = threading.Event()
    thread = threading.Thread(target=let_go.wait, name="waits here", args=(10,))
    thread.start()
    text = own_stacks("rank 3 at step 7", threading.get_ident())
    let_go.set()
    thread.join()
    head, training, *others = text.split("\n\n")
    assert head.startswith("rank 3 at step 7; host ")
    assert f'File "{__file__}", line 20 in test_all_threads_are_there' in training
    assert any(other.startswith("Thread waits here") and "in wait" in other for other in others)


def _deep(depth: int) -> str:
    return _deep(depth - 1) if depth else own_stacks("", threading.get_ident())


def test_a_text_of_any_length_may_be_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The monitor would have closed the connection, and taken the rank for dead."""
    assert _deep(500).count("in _deep") == stacks._MAX_FRAMES - 1
    monkeypatch.setattr(stacks, "_MAX_FRAMES", 10_000)
    text = _deep(900)
    assert len(text) > stacks._MAX_CHARACTERS / 2
    longest = {"stacks": stacks._MAX_CHARACTERS * "\u00e9"}
    assert len(json.dumps(longest)) < MAX_MESSAGE_BYTES


def test_torchs_flight_recorder_is_left_alone_unless_it_is_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To read it asks the GPU.  It is not there on every torch."""
    monkeypatch.setattr(stacks, "_RECORDERS", ("_missing",))
    assert flight_record() == ""
    monkeypatch.setenv("TORCH_FR_BUFFER_SIZE", "100")
    assert flight_record() == ""


def test_files_are_written_or_not_but_nobody_waits(tmp_path: Path) -> None:
    folder = tmp_path / "stacks"
    assert write_stacks(folder, {1: "one"}, 5, removes_others=False)
    assert write_stacks(folder, {0: "zero"}, 5, removes_others=False)
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.txt", "rank-1.txt"]
    assert write_stacks(folder, {2: "two \udc80"}, 5, removes_others=True)
    assert [path.name for path in folder.iterdir()] == ["rank-2.txt"]
    assert not write_stacks(folder, {}, 5, removes_others=False)
    assert not write_stacks(tmp_path / "missing" / "stacks", {0: ""}, 5, removes_others=True)


def test_a_disk_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = threading.Event()
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: answers.wait(10))
    assert not write_stacks(tmp_path / "stacks", {0: "zero"}, 0.05, removes_others=False)
    answers.set()
