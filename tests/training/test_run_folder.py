"""The folder of a run: what may be one, what is put aside, and who is in it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.crashes import fork, in_a_fork
from tests.checkpoint.mounts import on_a_small_disk
from tests.checkpoint.states import info
from worm_dist.checkpoint import lock
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.errors import CheckpointError, ConfigError
from worm_dist.training import run_folder
from worm_dist.training.resume_config import fixed_settings
from worm_dist.training.run_config import RunConfig
from worm_dist.training.run_folder import SETTINGS, open_run_folder

CONFIG = RunConfig()
RESULT = json.dumps({"preset": "worm", "mask_digest": None})


def _finished_run(out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "result.json").write_text(RESULT)
    (out / "journal.jsonl").write_text("")


def _interrupted_run(out: Path) -> None:
    manager = CheckpointManager(out / "checkpoints")
    for step in (1, 2):
        manager.save(info(step), {"run": {}, SETTINGS: fixed_settings(CONFIG)})
    (out / "journal.jsonl").write_text("")


def _open(out: Path, resume: str = "auto") -> int | None:
    """The step to resume from."""
    with open_run_folder(out, resume, CONFIG, 1, {}) as folder:
        return None if folder.checkpoint is None else folder.checkpoint.step


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- folders that are no runs --------------------------------------------------------------------


def _sources(out: Path) -> None:
    out.mkdir()
    (out / "train.py").touch()


def _parent_of_runs(out: Path) -> None:
    _finished_run(out / "a")


def _other_program(out: Path) -> None:
    """It uses the same names."""
    (out / "checkpoints" / "step-500").mkdir(parents=True)
    (out / "result.json").write_text('{"accuracy": 0.9}')
    (out / "journal.jsonl").write_text("[1]")


@pytest.mark.fault(29, "sources, a parent of runs, a run of another program")
@pytest.mark.parametrize("fill", [_sources, _parent_of_runs, _other_program])
@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_folder_that_holds_no_run_is_refused(
    tmp_path: Path, fill: Callable[[Path], None], resume: str
) -> None:
    """It was renamed, without a word."""
    out = tmp_path / "out"
    fill(out)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match="is not empty and holds no run; name a folder"):
        _open(out, resume)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault(29, "what is put aside is said, with its new name")
def test_what_is_put_aside_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out = tmp_path / "out"
    _finished_run(out)
    (out / "notes.txt").touch()
    with caplog.at_level(logging.WARNING):
        assert _open(out) is None
    (aside,) = tmp_path.glob("out.*")
    assert _names(aside) == ["journal.jsonl", "notes.txt", "result.json"]
    assert _names(out) == ["journal.jsonl"], "the mark of the new run"
    told = f"{out}: the earlier run there (it has finished) is moved to {aside}"
    assert [record.getMessage() for record in caplog.records] == [told]
    _open(out, "never")
    assert len(list(tmp_path.glob("out.*"))) == 2, "a run that has saved nothing is a run"


@pytest.mark.fault(31, "in the folder of a run, at any depth, by way of a link")
def test_a_folder_in_that_of_another_run_is_refused(tmp_path: Path) -> None:
    """When the other run was put aside, the files of this one were in two folders."""
    _interrupted_run(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a" / "checkpoints")
    for out in ("a/b", "a/checkpoints/b/c", "link/b"):
        with pytest.raises(ConfigError, match=rf"in the folder of another run, {tmp_path / 'a'}; "):
            _open(tmp_path / out)
        assert not (tmp_path / out).exists()


# ---- folders that must stay ----------------------------------------------------------------------


@pytest.mark.fault(30, "an empty folder")
def test_an_empty_folder_is_used_in_place(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    inode = out.stat().st_ino
    assert _open(out) is None
    assert out.stat().st_ino == inode and _names(tmp_path) == ["out"]


@pytest.mark.fault(30, "a link to a folder")
def test_a_link_to_a_folder_stays(tmp_path: Path) -> None:
    """It was replaced by a folder, on another disk than what it led to."""
    real, out = tmp_path / "large-disk" / "real", tmp_path / "out"
    _finished_run(real)
    out.symlink_to(real)
    _open(out)
    assert out.is_symlink() and _names(tmp_path) == ["large-disk", "out"]
    (aside,) = real.parent.glob("real.*")
    assert (aside / "result.json").exists() and not (real / "result.json").exists()


@pytest.mark.fault(30, "a mount point, empty and with an earlier run")
def test_a_mount_point_is_used_in_place(tmp_path: Path) -> None:
    """It could not be renamed: a run could begin there once at most."""
    out = tmp_path / "out"
    out.mkdir()

    def inside(remount: Callable[[int], None]) -> None:
        (out / "lost+found").mkdir()  # as a new file system has it
        assert _open(out) is None
        for _ in range(2):
            _finished_run(out)
            assert _open(out) is None
            assert not (out / "result.json").exists()
        aside = sorted(out.glob("earlier.*"))
        assert len(aside) == 2 and all((path / "result.json").exists() for path in aside)
        assert _names(tmp_path) == ["out"]

    on_a_small_disk(out, inside)


@pytest.mark.parametrize("target", ["out", "nowhere"])
def test_a_link_to_no_folder_is_refused(tmp_path: Path, target: str) -> None:
    (tmp_path / "out").symlink_to(target)
    with pytest.raises(ConfigError, match=r"cannot create .*: File exists; name another folder"):
        _open(tmp_path / "out")


def test_a_refusal_leaves_no_new_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        _open(tmp_path / "out", str(tmp_path / "step-1"))
    assert not list(tmp_path.iterdir())


# ---- damage --------------------------------------------------------------------------------------


@pytest.mark.fault(45, "all checkpoints of a folder")
def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(tmp_path: Path) -> None:
    """After one line of warning it was trained from scratch."""
    out = tmp_path / "out"
    _interrupted_run(out)
    (out / "checkpoints" / "step-1" / "run.json").write_text("")
    assert _open(out) == 2
    (out / "checkpoints" / "step-2" / "manifest.json").unlink()
    before = sorted(tmp_path.rglob("*"))
    text = "all checkpoints are damaged: step-1, step-2; restore one of them, or start anew with"
    with pytest.raises(CheckpointError, match=text):
        _open(out)
    assert sorted(tmp_path.rglob("*")) == before
    assert _open(out, "never") is None
    (aside,) = tmp_path.glob("out.*")
    assert _names(aside / "checkpoints") == ["step-1", "step-2"]


@pytest.mark.fault(45, "none was ever complete")
def test_a_run_that_never_saved_begins_anew(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints" / "step-1.tmp-0").mkdir(parents=True)
    (tmp_path / "out" / "journal.jsonl").touch()
    assert _open(tmp_path / "out") is None


# ---- two starts ----------------------------------------------------------------------------------


def _two_starts(out: Path) -> str:
    """How two processes fare that open the folder at one moment: 0 is in, 2 is refused."""
    go, said, over = os.pipe(), os.pipe(), os.pipe()
    children = [_start(out, go[0], said[1], over[0]) for _ in range(2)]
    os.write(go[1], b"xx")
    fared = b"".join(os.read(said[0], 1) for _ in children)
    os.write(over[1], b"xx")
    for child in children:
        os.waitpid(child, 0)
    for end in (*go, *said, *over):
        os.close(end)
    return "".join(sorted(fared.decode()))


def _start(out: Path, go: int, said: int, over: int) -> int:
    child = fork()
    if child == 0:
        try:
            os.read(go, 1)
            with open_run_folder(out, "auto", CONFIG, 1, {}):
                os.write(said, b"0")
                os.read(over, 1)  # it stays in until the other one has fared
        except ConfigError:
            os.write(said, b"2")
        except BaseException:
            os.write(said, b"?")
        os._exit(0)
    return child


@pytest.mark.fault(33, "at one moment, five times")
def test_of_two_starts_at_one_moment_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both were in after 6 of 100 starts."""
    monkeypatch.setattr(lock, "_SECONDS", 0.05)  # neither is about to release it
    monkeypatch.setattr(logging.getLogger("worm_dist"), "disabled", True)
    for number in range(5):
        _finished_run(tmp_path / f"{number}")
        assert _two_starts(tmp_path / f"{number}") == "02"


@pytest.mark.fault(33, "a second start between any two steps of the first")
def test_a_second_start_in_the_middle_of_the_first_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one locked the folder, looked, let it go and renamed it; then the other was in."""
    out = tmp_path / "out"
    _finished_run(out)
    fared = []

    def second_start() -> None:
        with pytest.raises(ConfigError, match="another run holds this directory"):
            _open(out)

    def before(name: str) -> None:
        real = getattr(run_folder, name)

        def with_second_start(*args: Any) -> Any:
            fared.append(in_a_fork(second_start))
            return real(*args)

        monkeypatch.setattr(run_folder, name, with_second_start)

    monkeypatch.setattr(lock, "_SECONDS", 0.05)
    for name in ("_unfinished", "put_aside", "_begin"):
        before(name)
    with open_run_folder(out, "auto", CONFIG, 1, {}):
        second_start()
    assert fared == [0, 0, 0]
