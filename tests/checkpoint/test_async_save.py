"""What is written while training goes on is the state of the step at which it was begun."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.states import difference, info, small_state, training_state
from worm_dist import CheckpointError
from worm_dist.checkpoint.async_save import AsyncSaver
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.state_file import Packed

SECONDS = 10


@pytest.fixture
def background() -> Iterator[AsyncSaver]:
    running = AsyncSaver()
    yield running
    running.finish()


def _addresses(parts: Mapping[str, Packed]) -> list[int]:
    return [memory.data_ptr() for _, memory in parts["run"].tensors.values()]


def test_training_goes_on_and_the_checkpoint_is_that_of_before(
    tmp_path: Path, background: AsyncSaver
) -> None:
    manager, go = CheckpointManager(tmp_path), threading.Event()
    state = training_state(channels_last=True)
    wanted = training_state(channels_last=True)
    for tensor, saved in zip(_tensors(state), _tensors(wanted), strict=True):
        saved.copy_(tensor)

    def write(parts: Mapping[str, Packed]) -> None:
        assert go.wait(SECONDS)
        manager.save(info(1), parts)

    background.save({"run": state}, write)
    with torch.no_grad():
        for tensor in _tensors(state):
            tensor.zero_()  # in place, as optimizers do
    assert manager.newest() is None
    go.set()
    background.finish()
    newest = manager.newest()
    assert newest is not None
    assert not difference(newest.read("run"), wanted)


def _tensors(state: Any) -> list[torch.Tensor]:
    if isinstance(state, torch.Tensor):
        return [state]
    if isinstance(state, dict):
        state = list(state.values())
    return (
        [t for value in state for t in _tensors(value)] if isinstance(state, (list, tuple)) else []
    )


def test_one_save_is_on_its_way_at_a_time(background: AsyncSaver) -> None:
    running, most = [], []
    before = threading.active_count()  # tests of the same process may have left others

    def write(parts: Mapping[str, Packed]) -> None:
        running.append(parts)
        most.append(len(running))
        running.remove(parts)

    for step in range(20):
        background.save({"run": small_state(step)}, write)
    background.finish()
    assert most == [1] * 20
    assert threading.active_count() == before


def test_an_error_comes_with_the_next_save_or_at_the_end_and_once(background: AsyncSaver) -> None:
    def fail(parts: Mapping[str, Packed]) -> None:
        raise CheckpointError("disk full")

    written: list[Any] = []
    background.save({"run": small_state(1)}, fail)
    with pytest.raises(CheckpointError, match="disk full"):
        background.save({"run": small_state(2)}, written.append)
    assert not written
    background.save({"run": small_state(3)}, fail)
    with pytest.raises(CheckpointError, match="disk full"):
        background.finish()
    background.finish()
    background.save({"run": small_state(4)}, written.append)
    background.finish()
    assert len(written) == 1


def test_a_state_that_cannot_be_saved_is_refused_at_once(background: AsyncSaver) -> None:
    with pytest.raises(CheckpointError, match="cannot be saved"):
        background.save({"run": object()}, lambda parts: None)
    background.finish()


def test_memory_is_used_again_and_let_go_of(background: AsyncSaver) -> None:
    seen: list[list[int]] = []
    states: list[Any] = [{"a": torch.ones(1000), "b": torch.ones(500)}] * 3
    states += [{"a": torch.ones(1000)}, {"a": torch.ones(10)}]  # a smaller network, a drawn one
    for state in states:
        background.save({"run": state}, lambda parts: seen.append(_addresses(parts)))
        background.finish()
    assert seen[0] == seen[1] == seen[2]
    assert seen[3] == seen[0][:1]
    assert [buffer.numel() for buffer in background._buffers.values()] == [40]
