"""Whatever is wrong with a file is told, before anything in it is used."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.states import save
from worm_dist import CheckpointError
from worm_dist.checkpoint import manifest, safetensors_file, state_file
from worm_dist.checkpoint.manager import CheckpointManager

FILES = ["manifest.json", "run.json", "run.safetensors"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return save(CheckpointManager(tmp_path), 1)


def _load(path: Path) -> Any:
    return CheckpointManager.open(path).read("run")


def _sign(path: Path, name: str) -> None:
    """Let the manifest say that the file is right."""
    content = (path / name).read_bytes()
    said = json.loads((path / "manifest.json").read_text())
    said["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(said))


def _edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    said = json.loads((path / "manifest.json").read_text())
    change(said)
    (path / "manifest.json").write_text(json.dumps(said))


@pytest.mark.parametrize("name", FILES[1:])
@pytest.mark.parametrize("place", [0.0, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("bit", [0, 7])
@pytest.mark.fault(8, "bit by bit, file by file")
def test_one_flipped_bit(path: Path, name: str, place: float, bit: int) -> None:
    """torch and safetensors would read it without a word."""
    content = bytearray((path / name).read_bytes())
    content[int(place * len(content))] ^= 1 << bit
    (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"step-1/{name}: wanted sha256 \w+, found \w+"):
        _load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("keep", [0, 10, -2])
@pytest.mark.fault(7, "truncated, file by file")
def test_a_file_cut_short(path: Path, name: str, keep: int) -> None:
    (path / name).write_bytes((path / name).read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"step-1/{name}"):
        _load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.fault(7, "missing, file by file")
def test_a_missing_file(path: Path, name: str) -> None:
    (path / name).unlink()
    with pytest.raises(CheckpointError, match=rf"step-1/{name}: wanted this file, found none"):
        _load(path)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "socket"])
@pytest.mark.fault(10, "links, folders, pipes and sockets in the place of files")
def test_something_that_is_no_plain_file(
    path: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A link could lead out of the folder; to read from a pipe would take for ever."""
    (path / name).rename(path / "aside")
    if kind == "link":
        (path / name).symlink_to("aside")
    elif kind == "folder":
        (path / name).mkdir()
    elif kind == "pipe":
        os.mkfifo(path / name)
    else:
        monkeypatch.chdir(path)  # names of sockets are short
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(name)
    with pytest.raises(CheckpointError, match=rf"step-1/{name}"):
        _load(path)


class _Payload:
    def __init__(self, victim: Path) -> None:
        self._victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self._victim),)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.fault(10, "a pickle in the place of every file")
def test_a_malicious_pickle_does_not_run(
    path: Path, name: str, signed: bool, tmp_path: Path
) -> None:
    victim = tmp_path / "victim"
    content = pickle.dumps(_Payload(victim))
    (path / name).write_bytes(content)
    if signed and name != "manifest.json":
        _sign(path, name)
    with pytest.raises(CheckpointError, match=name):
        _load(path)
    assert not victim.exists()
    pickle.loads(content)
    assert victim.exists(), "it would have"


@pytest.mark.parametrize(
    "name",
    [
        *("../victim.json", "/victim.json", "a/b.json", "..json", ".hidden.json", "run.pt", "run"),
        *("run.json/", "a\0.json", "a\n.json", "run.json\n", "", ".", "..", "x" * 300 + ".json"),
        *("manifest.json/../run.json", "\\victim.json", "C:victim.json", "é.json"),
    ],
)
@pytest.mark.fault(10, "names that lead out of the folder")
def test_no_name_leads_out_of_the_folder(path: Path, name: str) -> None:
    shutil.copy(path / "run.json", path.parent / "victim.json")
    _edit(path, lambda said: said["files"].update({name: said["files"]["run.json"]}))
    with pytest.raises(CheckpointError, match=r"manifest\.json: not the manifest of a checkpoint"):
        _load(path)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda said: said.update(format_version=1), "wanted format 2 or 3, found format 1"),
        (lambda said: said.update(format_version=4, new="key"), "found format 4"),
        (lambda said: said.update(format_version="1"), "format_version: Input should be a valid"),
        (lambda said: said.pop("format_version"), "format_version: Field required"),
        (lambda said: said.update(colour="red"), "colour: Extra inputs"),
        (lambda said: said.update(step=-1), "step: "),
        (lambda said: said.update(step=1.0), "step: "),
        (lambda said: said.update(step=True), "step: "),
        (lambda said: said.update(step=10**18), "step: "),
        (lambda said: said.update(step=2), "wanted step 1, found step 2"),
        (lambda said: said.update(world_size=0), "world_size: "),
        (lambda said: said.update(value="best"), "value: "),
        (lambda said: said["files"]["run.json"].update(size=-1), r"run\.json\.size"),
        (lambda said: said["files"]["run.json"].update(size=1), "wanted 1 bytes, found"),
        (lambda said: said["files"]["run.json"].update(sha256="0" * 63), "sha256"),
        (lambda said: said["files"]["run.json"].update(sha256="G" * 64), "sha256"),
        (lambda said: said["files"].pop("run.json"), "wanted this file, found"),
        (lambda said: said["files"].clear(), r"wanted part 'run', found \[\]"),
    ],
)
def test_a_manifest_that_is_not_right(
    path: Path, change: Callable[[dict[str, Any]], object], text: str
) -> None:
    _edit(path, change)
    with pytest.raises(CheckpointError, match=text):
        _load(path)


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"null", b"[]", b"{", b"\xff\xfe", b'{"format_version": NaN}', b"1" * 9999),
        *(b"[" * 100_000, b'{"a":' * 100_000),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_manifest_that_is_none(path: Path, content: bytes) -> None:
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not the manifest of a checkpoint") as caught:
        _load(path)
    assert len(str(caught.value)) < 500


def _tensor(**changes: Any) -> bytes:
    note = {"dtype": "float32", "shape": [3, 4], "tensor": "weights", **changes}
    return json.dumps({"dict": [["weights", note]]}).encode()


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "wanted a state in JSON"),
        (b"\xff", "wanted a state in JSON"),
        (b"[" * 100_000, "wanted a state in JSON"),
        (b"[" * 500 + b"]" * 500, "wanted at most 100 levels"),
        (b"9" * 5000, "wanted a state in JSON"),
        (b"[NaN]", "float that JSON can hold"),
        (b"[1e999]", "float that JSON can hold"),
        (b"{}", r"an object with \[\]"),
        (b'{"dict": {}}', "an object with"),
        (b'{"dict": [], "tuple": []}', "an object with"),
        (b'{"tuple": 3}', "an object with"),
        (b'{"dict": [["a"]]}', "wanted a key and a value"),
        (b'{"dict": [[1.0, 2]]}', "wanted a key and a value"),
        (b'{"dict": [[true, 2]]}', "wanted a key and a value"),
        (b'{"dict": [["a", 1], ["a", 2]]}', "wanted every key once, found a"),
        (b'{"float": "7ff8"}', "wanted 16 hexadecimal digits"),
        (b'{"float": "x"}', "wanted 16 hexadecimal digits"),
        (_tensor(tensor="biases"), "wanted tensor 'biases', found none"),
        (_tensor(tensor=3), "a tensor entry: tensor: "),
        (_tensor(dtype="float31"), "dtype 'float31' is not known"),
        (_tensor(dtype="float64"), r"wanted F64 \[3, 4\], found F32 \[3, 4\]"),
        (_tensor(shape=[4, 3]), r"wanted F32 \[4, 3\], found F32 \[3, 4\]"),
        (_tensor(shape=[-1]), "shape.0: "),
        (_tensor(shape=[2**63]), "shape.0: "),
        (_tensor(shape=[0] + [2**62] * 2), "wanted F32"),
        (_tensor(shape=[1] * 65), "shape: "),
        (_tensor(strides=[4, 1, 1]), "wanted F32"),
        (_tensor(colour="red"), "colour: "),
        (b"[]", "found '.*' as well"),
    ],
)
def test_a_structure_that_is_not_right(path: Path, content: bytes, text: str) -> None:
    (path / "run.json").write_bytes(content)
    _sign(path, "run.json")
    with pytest.raises(CheckpointError, match=text) as caught:
        _load(path)
    assert len(str(caught.value)) < 600


def _tensors(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def _entry(begin: int, end: int, dtype: str = "F32", shape: tuple[int, ...] = (1,)) -> Any:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"", "wanted a header of at most 0 bytes, found 0"),
        (b"\1\0\0", "wanted a header of at most 0 bytes"),
        (b"\xff" * 8, "wanted a header of at most 0 bytes, found 18446744073709551615"),
        (_tensors({})[:-1], "wanted a header of at most 1 bytes, found 2"),
        (_tensors(b"[]"), "not the header of a safetensors file"),
        (_tensors(b"[" * 100_000), "not the header of a safetensors file"),
        (_tensors({"a": 3}), "not the header of a safetensors file: a: "),
        (_tensors({}, b"left over"), "wanted 0 bytes of tensors, found 9"),
        (_tensors({"a": _entry(0, 4)}), "wanted 4 bytes of tensors, found 0"),
        (_tensors({"a": _entry(4, 8)}, bytes(8)), "wanted a tensor at byte 0"),
        (_tensors({"a": _entry(0, 4), "b": _entry(0, 4)}, bytes(4)), "wanted a tensor at byte 4"),
        (_tensors({"a": _entry(0, -4)}), "not the header"),
        (_tensors({"a": _entry(4, 0)}, bytes(4)), "wanted a tensor at byte 0"),
        (_tensors({"a": _entry(0, 2**62)}), "bytes of tensors, found 0"),
        (_tensors({"weights": _entry(0, 48, shape=(2**40,))}, bytes(48)), "wanted F32 .3, 4."),
        (_tensors({"weights": _entry(0, 4, shape=(3, 4))}, bytes(4)), "of 4 bytes"),
        (_tensors({"weights": _entry(0, 48, "F64", (3, 4))}, bytes(48)), "found F64"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_tensor_file_that_is_not_right(path: Path, content: bytes, text: str) -> None:
    (path / "run.json").write_bytes(_tensor())
    _sign(path, "run.json")
    (path / "run.safetensors").write_bytes(content)
    _sign(path, "run.safetensors")
    with pytest.raises(CheckpointError, match=text) as caught:
        _load(path)
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("shape", "strides"),
    [([3, 4], [4, 2]), ([3, 4], [0, 1]), ([3, 4], [1, 4]), ([12, 1], [1, 2**62]), ([0, 4], [4, 1])],
)
def test_strides_must_stay_within_the_tensor(
    path: Path, shape: list[int], strides: list[int]
) -> None:
    (path / "run.json").write_bytes(_tensor(shape=shape, strides=strides))
    _sign(path, "run.json")
    count = 12 if shape[0] else 0
    entry = _entry(0, 4 * count, shape=(count,))
    (path / "run.safetensors").write_bytes(_tensors({"weights": entry}, bytes(4 * count)))
    _sign(path, "run.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'weights': wanted"):
        _load(path)


def test_sizes_must_be_ones_that_torch_can_count(path: Path) -> None:
    shape = (0, 2**62, 2**62)
    (path / "run.json").write_bytes(_tensor(shape=shape))
    _sign(path, "run.json")
    (path / "run.safetensors").write_bytes(_tensors({"weights": _entry(0, 0, shape=shape)}))
    _sign(path, "run.safetensors")
    with pytest.raises(CheckpointError, match="tensor 'weights': wanted"):
        _load(path)


def test_entries_of_one_tensor_must_be_equal(path: Path) -> None:
    entry = json.loads(_tensor())["dict"][0][1]
    (path / "run.json").write_text(json.dumps([entry, {**entry, "shape": [12]}]))
    _sign(path, "run.json")
    with pytest.raises(CheckpointError, match="wanted equal entries of tensor"):
        _load(path)


def test_what_is_too_large_is_not_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "_MAX_BYTES", 100)
        with pytest.raises(CheckpointError, match=r"manifest\.json: wanted at most 100 bytes"):
            _load(path)
    with monkeypatch.context() as patch:
        patch.setattr(state_file, "_MAX_STRUCTURE_BYTES", 100)
        with pytest.raises(CheckpointError, match=r"run\.json: wanted at most 100 bytes"):
            _load(path)
        with pytest.raises(CheckpointError, match="make tensors of long lists"):
            state_file.pack([0] * 100)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors_file, "_MAX_HEADER_BYTES", 100)
        with pytest.raises(CheckpointError, match="wanted a header of at most 100 bytes"):
            _load(path)


def test_a_file_that_changes_after_it_was_verified_is_found_when_it_is_read(path: Path) -> None:
    checkpoint = CheckpointManager.open(path)
    content = (path / "run.safetensors").read_bytes()
    (path / "run.safetensors").write_bytes(content[:-1] + b"x")
    with pytest.raises(CheckpointError, match="wanted sha256"):
        checkpoint.read("run")
