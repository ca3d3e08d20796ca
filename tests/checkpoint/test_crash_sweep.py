"""A save is ended at every call to the file system: what is found afterwards is whole."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from tests.checkpoint.crashes import Ending, ends_at
from tests.checkpoint.states import difference, info, save, small_state
from worm_dist.checkpoint.durable_io import write_json
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.staging import is_leftover

pytestmark = pytest.mark.slow("ends a save at every call to the file system")

REPORT = Path("runs") / "report" / "crash_sweep.json"
_found: dict[str, int] = {}


def _first(manager: CheckpointManager) -> None:
    """Into a folder that is not there yet."""


def _next(manager: CheckpointManager) -> None:
    """After it three are kept, the last two and the best, and two are removed."""
    for step, value in {1: 0.5, 2: 0.9, 3: None, 4: 0.7}.items():
        save(manager, step, value)


def _again(manager: CheckpointManager) -> None:
    """The step is there already, from before the run was resumed."""
    save(manager, 4)
    manager.save(info(5), {"run": small_state(50)})


SITUATIONS: dict[str, tuple[Callable[[CheckpointManager], None], set[int | None]]] = {
    "of the first": (_first, {None}),
    "of one more, and the oldest go": (_next, {4}),
    "of a step that is there": (_again, {50}),
}
"""What is in the folder before, and which states may be found if the save is not."""
NEW = 5


def _save_newest(folder: Path) -> None:
    save(CheckpointManager(folder), NEW)


def _state_found(folder: Path) -> int | None:
    """The seed of the state that a run would go on from."""
    newest = CheckpointManager(folder).newest()
    if newest is None:
        return None
    state = newest.read("run")
    assert newest.step == (NEW if state["step"] == 50 else state["step"])
    assert not difference(state, small_state(state["step"]))
    return int(state["step"])


@pytest.mark.parametrize("ending", Ending)
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.fault(5, "a kill at every call of the file system")
def test_what_is_found_is_the_checkpoint_before_or_this_one(
    tmp_path: Path,
    situation: str,
    ending: Ending,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
    record_property: Callable[[str, object], None],
) -> None:
    prepare, before = SITUATIONS[situation]
    template = tmp_path / "template"
    prepare(CheckpointManager(template, keep_last=4))
    point, over, found = 0, False, before
    while not over:
        folder = tmp_path / f"{point}"
        if template.exists():
            shutil.copytree(template, folder)
        over = ends_at(point, ending, partial(_save_newest, folder))
        state = _state_found(folder)
        assert state in found, (point, state)
        if state == NEW:
            found = {NEW}  # once it is there it stays there
        CheckpointManager(folder).sweep()
        assert not folder.exists() or not any(is_leftover(p.name) for p in folder.iterdir())
        assert _state_found(folder) == state, point
        _save_newest(folder)
        assert _state_found(folder) == NEW, point
        shutil.rmtree(folder)
        found, point = found | {NEW}, point + 1
    assert found == {NEW}
    assert not caplog.records, "nothing damaged was ever in sight"
    assert point > 20
    _found[f"{situation}, {ending.value}"] = point
    record_property("crash_sweep", (f"{situation}, {ending.value}", point))
    if len(_found) == len(SITUATIONS) * len(Ending):
        path = request.config.rootpath / REPORT
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"points at which a save was ended": _found})
