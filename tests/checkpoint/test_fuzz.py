"""Files that were changed at random: a CheckpointError comes out, or a state, and nothing else."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.checkpoint.states import difference, save, small_state
from tests.mutations import fuzzed, other_bytes, other_json, other_tensors
from worm_dist import CheckpointError
from worm_dist.checkpoint.manager import CheckpointManager

pytestmark = pytest.mark.slow("damages and reads hundreds of checkpoints")

_PLAIN: list[Any] = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, -(2**63), 10**400, 0.5, 1e308, ""),
    *("x", "..", "/", "F32", "F64", "BOOL", "float32", "bool", "weights", "7ff8000000000000"),
    *([], {}, [[]], {"dict": []}, {"tuple": []}, {"float": "fff0000000000000"}),
]
_KEYS = ["", "dict", "../run.json", "run.json"]


class _Checkpoint:
    def __init__(self, folder: Path) -> None:
        self.path = save(CheckpointManager(folder), 1)
        self.files = {path.name: path.read_bytes() for path in self.path.iterdir()}
        self._there = dict(self.files)

    def read(self, name: str, content: bytes, signed: bool) -> Any:
        """The state with one file changed; None if it is refused."""
        files = {**self.files, name: content}
        if signed:
            said = json.loads(files["manifest.json"])
            digest = hashlib.sha256(content).hexdigest()
            said["files"][name] = {"size": len(content), "sha256": digest}
            files["manifest.json"] = json.dumps(said).encode()
        for path in files:
            if files[path] != self._there[path]:
                (self.path / path).unlink()  # file systems wait for the disk if one is overwritten
                (self.path / path).write_bytes(files[path])
        self._there = files
        try:
            return CheckpointManager.open(self.path).read("run")
        except CheckpointError as error:
            text = str(error)
        assert str(self.path) in text
        assert len(text) < 1000
        return None


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> _Checkpoint:
    return _Checkpoint(tmp_path_factory.mktemp("fuzz"))


@settings(fuzzed, max_examples=400)
@given(data=st.data())
def test_other_manifests(checkpoint: _Checkpoint, data: st.DataObject) -> None:
    content = checkpoint.files["manifest.json"]
    other = data.draw(other_json(content, _PLAIN, _KEYS) | other_bytes(content))
    state = checkpoint.read("manifest.json", other, signed=False)
    # What it says of the step may change, but not the state.
    assert state is None or not difference(state, small_state(1))


@settings(fuzzed, max_examples=400)
@given(data=st.data())
def test_other_skeletons(checkpoint: _Checkpoint, data: st.DataObject) -> None:
    content = checkpoint.files["run.json"]
    other = data.draw(other_json(content, _PLAIN, _KEYS) | other_bytes(content))
    checkpoint.read("run.json", other, signed=True)
    assert other == content or checkpoint.read("run.json", other, signed=False) is None


@settings(fuzzed, max_examples=400)
@given(data=st.data())
def test_other_tensors(checkpoint: _Checkpoint, data: st.DataObject) -> None:
    content = checkpoint.files["run.safetensors"]
    other = data.draw(other_tensors(content, _PLAIN, _KEYS) | other_bytes(content))
    checkpoint.read("run.safetensors", other, signed=True)
    assert other == content or checkpoint.read("run.safetensors", other, signed=False) is None


@settings(fuzzed, max_examples=100)
@given(data=st.data())
def test_other_shelves(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever happened to newer ones, an older one is found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    template = save(CheckpointManager(folder), 1)
    for step in (2, 3):
        path = folder / f"step-{step}"
        shutil.copytree(template, path)
        name = data.draw(st.sampled_from(["manifest.json", "run.json", "run.safetensors"]))
        content = (path / name).read_bytes()
        (path / name).write_bytes(data.draw(other_bytes(content)))
    newest = CheckpointManager(folder).newest()
    assert newest is not None
    assert not difference(newest.read("run"), small_state(1))
