"""What people write after --resume."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import call
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.manifest import CheckpointInfo
from worm_dist.errors import CheckpointError
from worm_dist.training.resume_argument import resume_argument

CONFIG = Path(__file__).parents[2] / "configs" / "digits.yaml"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder in the working directory, with checkpoints of steps 8 and 16."""
    manager = CheckpointManager(tmp_path / "run" / "checkpoints")
    for step in (8, 16):
        info = CheckpointInfo(step=step, phase="search", world_size=1, value=None)
        manager.save(info, {"run": {"step": step}})
    (tmp_path / "run" / "checkpoints" / "step-24.tmp-1").mkdir()
    (tmp_path / "run" / "result.json").touch()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "run"


@pytest.mark.fault(41, "a run, its checkpoints, a file of a checkpoint, words in any case")
@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("Auto", "auto"),
        ("NEVER", "never"),
        ("run", "run/checkpoints/step-16"),
        ("run/", "run/checkpoints/step-16"),
        ("run/result.json", "run/checkpoints/step-16"),
        ("run/checkpoints", "run/checkpoints/step-16"),
        ("run/checkpoints/step-8", "run/checkpoints/step-8"),
        ("run/checkpoints/step-8/", "run/checkpoints/step-8"),
        ("run/checkpoints/step-8/manifest.json", "run/checkpoints/step-8"),
        ("run/checkpoints/step-8/run.json", "run/checkpoints/step-8"),
    ],
)
def test_a_checkpoint_is_found_from_where_people_point(run: Path, text: str, means: str) -> None:
    """The error wanted a manifest in the folder of the manifest."""
    assert resume_argument(text) == means


@pytest.mark.fault(41, "a folder without a checkpoint")
def test_a_folder_without_a_checkpoint_is_told_what_to_name(run: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        resume_argument(str(run.parent))
    assert "no checkpoint is there; name a run's folder" in str(caught.value)
    assert resume_argument("nowhere") == "nowhere", "a restarted run does not need it"


def test_a_checkpoint_without_a_manifest_is_taken_for_one(run: Path) -> None:
    """It was said that no checkpoint was there, not what it lacks."""
    (run / "checkpoints" / "step-8" / "manifest.json").unlink()
    named = str(run / "checkpoints" / "step-8")
    assert resume_argument(named) == named


@pytest.mark.fault(41, "the command line")
def test_the_command_line_reads_it(run: Path, tmp_path: Path) -> None:
    """The checkpoint here is not that of a training, which is found out once it was found."""
    (ended,) = call(["-m", "worm_dist", "train", CONFIG, "--resume", "run"], tmp_path)
    assert ended.exitcode == 3
    assert "run/checkpoints/step-16: wanted part 'settings'" in ended.err
