"""Checkpoints side by side: found, kept, removed; and written by several ranks."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint.states import difference, info, save, small_state
from tests.ranks import Ranks
from worm_dist import CheckpointError, ConfigError
from worm_dist.checkpoint.checkpoint import Checkpoint
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.staging import Staged


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def manager(tmp_path: Path) -> CheckpointManager:
    return CheckpointManager(tmp_path / "checkpoints")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


def test_nothing_is_found_where_nothing_is(manager: CheckpointManager, folder: Path) -> None:
    assert manager.newest() is None
    manager.sweep()
    manager.rewind(0)
    assert not folder.exists()


def test_a_checkpoint_says_what_it_is(manager: CheckpointManager) -> None:
    path = save(manager, 7, value=0.5)
    assert path.name == "step-7"
    found = manager.newest()
    assert found is not None and found.path == path
    assert (found.step, found.parts, found.manifest.value) == (7, ["run"], 0.5)
    assert found.manifest.model_dump(include=set(info(7).model_dump())) == info(7, 0.5).model_dump()
    assert found.manifest.versions.keys() == {"python", "torch", "worm_dist"}
    assert not difference(found.read("run"), small_state(7))


def test_the_newest_is_that_of_the_highest_step(manager: CheckpointManager) -> None:
    for step in (9, 100, 20):
        save(manager, step)
    newest = manager.newest()
    assert newest is not None and newest.step == 100


@pytest.mark.parametrize(
    "name", ["latest", "step-", "step-9.tmp-1", "step-9x", "astep-9", "step-٩"]
)
def test_what_is_not_called_a_checkpoint_is_not_looked_at(
    manager: CheckpointManager, folder: Path, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    save(manager, 3).rename(folder / name)
    save(manager, 2)
    (folder / "latest.txt").write_text("step-9")
    newest = manager.newest()
    assert newest is not None and newest.step == 2
    assert not caplog.records


@pytest.mark.fault(7, "damaged ones are passed over")
def test_damaged_ones_are_passed_over_with_a_warning(
    manager: CheckpointManager, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (1, 2):
        save(manager, step)
    (folder / "step-2" / "run.json").unlink()
    (folder / "step-3").mkdir()
    (folder / "step-4").write_text("not a folder")
    (folder / "step-5").symlink_to("nowhere")
    newest = manager.newest()
    assert newest is not None and newest.step == 1
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(": ")[0] for text in said] == [
        f"checkpoint step-{step} is skipped" for step in (5, 4, 3, 2)
    ]
    assert "step-2/run.json: wanted this file, found none" in said[-1]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_if_all_are_damaged_there_is_none(manager: CheckpointManager, folder: Path) -> None:
    save(manager, 1)
    (folder / "step-1" / "manifest.json").write_text("{}")
    assert manager.newest() is None


@pytest.mark.fault(7, "one that is named is refused")
def test_one_that_is_named_is_opened_or_refused(
    manager: CheckpointManager, folder: Path, tmp_path: Path
) -> None:
    path = save(manager, 1)
    path.rename(tmp_path / "kept under another name")
    assert CheckpointManager.open(tmp_path / "kept under another name").step == 1
    with pytest.raises(
        CheckpointError, match=r"step-1/manifest\.json: wanted this file, found none"
    ):
        CheckpointManager.open(path)
    save(manager, 1).rename(folder / "step-2")
    with pytest.raises(CheckpointError, match="step-2: wanted step 2, found step 1"):
        CheckpointManager.open(folder / "step-2")


def test_a_part_that_is_not_there_is_named(manager: CheckpointManager) -> None:
    with pytest.raises(CheckpointError, match=r"step-1: wanted part 'rank-1', found \['run'\]"):
        Checkpoint(save(manager, 1)).read("rank-1")


def test_the_last_ones_and_the_best_are_kept(manager: CheckpointManager, folder: Path) -> None:
    values = [0.1, 0.9, None, float("nan"), 0.9, 0.2, float("inf"), 0.3]
    kept = []
    for step, value in enumerate(values):
        save(manager, step, value)
        kept.append([int(name.removeprefix("step-")) for name in _names(folder)])
    assert kept == [[0], [0, 1], [1, 2], [1, 2, 3], [3, 4], [4, 5], [4, 5, 6], [4, 6, 7]]


def test_as_many_are_kept_as_one_says(folder: Path) -> None:
    for step in range(5):
        save(CheckpointManager(folder, keep_last=3), step)
    assert _names(folder) == ["step-2", "step-3", "step-4"]


@pytest.mark.parametrize("keep_last", [1, 0, -1])
def test_at_least_two_are_kept(folder: Path, keep_last: int) -> None:
    with pytest.raises(ConfigError, match="keep at least 2"):
        CheckpointManager(folder, keep_last)


def test_damaged_ones_do_not_count_among_those_that_are_kept(
    manager: CheckpointManager, folder: Path
) -> None:
    for step in (1, 2):
        save(manager, step)
    weights = folder / "step-2" / "run.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")  # the same size
    newest = manager.newest()
    assert newest is not None and newest.step == 1
    (folder / "step-3").mkdir()
    save(manager, 4)
    assert _names(folder) == ["step-1", "step-2", "step-3", "step-4"]
    save(manager, 2)  # the run comes by again
    save(manager, 5)
    assert _names(folder) == ["step-3", "step-4", "step-5"]


def test_those_after_the_step_that_is_saved_are_left_alone(
    manager: CheckpointManager, folder: Path
) -> None:
    for step in (10, 20, 30):
        save(CheckpointManager(folder, 3), step)
    save(manager, 15)
    assert _names(folder) == ["step-10", "step-15", "step-20", "step-30"]


def test_a_run_that_goes_on_from_an_earlier_step_forgets_the_later_ones(
    manager: CheckpointManager, folder: Path
) -> None:
    for step in (10, 20, 30):
        save(CheckpointManager(folder, 3), step)
    (folder / "step-40").mkdir()
    manager.rewind(10)
    assert _names(folder) == ["step-10"]


def test_a_step_may_be_saved_again(manager: CheckpointManager, folder: Path) -> None:
    save(manager, 4)
    save(manager, 5)
    for seed in (50, 51):
        manager.save(info(5), {"run": small_state(seed)})
        newest = manager.newest()
        assert newest is not None and newest.step == 5
        assert not difference(newest.read("run"), small_state(seed))
        assert _names(folder) == ["step-4", "step-5"]


@pytest.mark.parametrize("kind", ["file", "link", "empty", "full"])
def test_whatever_has_the_name_of_the_step_gives_way(
    manager: CheckpointManager, folder: Path, tmp_path: Path, kind: str
) -> None:
    save(manager, 4)
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "file").touch()
    if kind == "file":
        (folder / "step-5").write_text("")
    elif kind == "link":
        (folder / "step-5").symlink_to(victim)
    else:
        (folder / "step-5").mkdir()
        if kind == "full":
            (folder / "step-5" / "folder").mkdir()
            (folder / "step-5" / "folder" / "file").touch()
    save(manager, 5)
    assert _names(folder) == ["step-4", "step-5"]
    assert (victim / "file").exists()
    assert CheckpointManager.open(folder / "step-5").step == 5


def test_of_two_of_one_step_the_replaced_one_is_second(
    manager: CheckpointManager, folder: Path
) -> None:
    """A save that replaced one was ended before it could remove it."""
    save(manager, 5).rename(folder / "step-05")
    newest = manager.newest()
    assert newest is not None and newest.path.name == "step-05"
    manager.save(info(5), {"run": small_state(50)})
    assert _names(folder) == ["step-5"]
    newest = manager.newest()
    assert newest is not None and newest.path.name == "step-5"


@pytest.mark.fault(6, "what is unfinished is swept")
def test_what_is_unfinished_is_swept_and_nothing_else(
    manager: CheckpointManager, folder: Path
) -> None:
    save(manager, 1)
    left = manager.stage(2)
    left.write("run", small_state(2))
    (folder / "step-3.tmp-file").touch()
    (folder / "step-3.tmp-link").symlink_to(folder / "step-1")
    (folder / "notes.tmp-1").touch()
    manager.sweep()
    assert _names(folder) == ["notes.tmp-1", "step-1"]
    assert CheckpointManager.open(folder / "step-1").step == 1


def test_a_state_that_cannot_be_saved_leaves_nothing(
    manager: CheckpointManager, folder: Path
) -> None:
    save(manager, 1)
    with pytest.raises(CheckpointError, match="cannot be saved"):
        manager.save(info(2), {"run": small_state(2), "rest": object()})
    assert _names(folder) == ["step-1"]


def test_an_unlisted_file_is_found_at_commit(manager: CheckpointManager) -> None:
    staged = manager.stage(1)
    files = staged.write("rank-0", {})
    staged.write("rank-1", {})
    with pytest.raises(CheckpointError, match=r"wanted the files .*rank-0.* found .*rank-1"):
        manager.commit(staged, info(1), files)


def test_a_file_that_is_on_another_hosts_disk_is_missed(
    manager: CheckpointManager, folder: Path, tmp_path: Path
) -> None:
    staged = manager.stage(1)
    files = staged.write("rank-0", {})
    elsewhere = Staged(tmp_path / "elsewhere")
    elsewhere.path.mkdir()
    files |= elsewhere.write("rank-1", {})
    with pytest.raises(CheckpointError, match="do all ranks write to the same disk"):
        staged.commit(info(1), files)
    (staged.path / "rank-1.json").touch()
    (staged.path / "rank-1.safetensors").touch()
    with pytest.raises(CheckpointError, match=r"rank-1.* wanted \d+ bytes, found 0"):
        manager.commit(staged, info(1), files)
    assert not _names(folder)


def test_a_rank_that_has_no_such_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"rank-1\.safetensors: cannot be written: No such"):
        Staged(tmp_path / "step-1.tmp-1").write("rank-1", {})


def _save_on_every_rank(folder: str) -> dict[str, Any]:
    """As a trainer would do it."""
    rank, manager = dist.get_rank(), CheckpointManager(folder)
    state = {"rank": rank, "mine": torch.arange(5) * rank}
    told: list[Any] = [str(manager.stage(3).path) if rank == 0 else None]
    dist.broadcast_object_list(told)
    staged = Staged(told[0])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, staged.write(f"rank-{rank}", state))
    if rank == 0:
        files = {name: seal for files in gathered for name, seal in files.items()}
        told = [str(manager.commit(staged, info(3), files))]
    dist.broadcast_object_list(told)
    read: dict[str, Any] = Checkpoint(told[0]).read(f"rank-{rank}")
    return read


@pytest.mark.slow("two processes that import torch, ten seconds")
def test_ranks_write_parts_of_their_own(ranks: Ranks, folder: Path) -> None:
    for rank, state in enumerate(ranks(2, _save_on_every_rank, str(folder))):
        assert not difference(state, {"rank": rank, "mine": torch.arange(5) * rank})
    assert CheckpointManager.open(folder / "step-3").parts == ["rank-0", "rank-1"]
    assert len(_names(folder)) == 1


def test_a_rank_reads_its_own_part_although_another_one_is_damaged(
    manager: CheckpointManager,
) -> None:
    path = manager.save(info(1), {f"rank-{rank}": small_state(rank) for rank in range(2)})
    weights = path / "rank-1.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    checkpoint = Checkpoint(path)
    assert not difference(checkpoint.read("rank-0"), small_state(0))
    for refuse in (lambda: checkpoint.read("rank-1"), lambda: CheckpointManager.open(path)):
        with pytest.raises(CheckpointError, match=r"rank-1\.safetensors: wanted sha256"):
            refuse()
