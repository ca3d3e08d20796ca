"""A nested state comes back as it was, to the bit, and other programs can read its tensors."""

from __future__ import annotations

import json
import math
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.checkpoint.states import difference, training_state
from worm_dist import CheckpointError
from worm_dist.checkpoint.state_file import pack as packed
from worm_dist.checkpoint.state_file import read_part, write_part
from worm_dist.checkpoint.tensor_meta import _CODES, _DTYPES

DTYPES = list(_DTYPES.values())


def _returned(folder: Path, state: Any) -> Any:
    """The state, written and read."""
    return read_part(folder, "run", write_part(folder, "run", packed(state)))


def _random(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Any bits at all, NaN of every kind included."""
    count = math.prod(shape) * dtype.itemsize
    memory = torch.randint(2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return memory.view(dtype).view(shape)


def test_every_dtype_that_is_read_by_the_library_has_its_name_there() -> None:
    from safetensors.torch import _TYPES

    assert all(_TYPES[code] is _DTYPES[name] for name, code in _CODES.items() if code)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 3), (2, 3, 4, 5)], ids=str)
def test_every_dtype_and_shape(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    state = {"tensor": _random(dtype, shape)}
    assert not difference(_returned(tmp_path, state), state)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "view",
    [
        lambda t: t.permute(3, 1, 0, 2),
        lambda t: t.transpose(0, 1),
        lambda t: t.permute(0, 3, 1, 2),
        lambda t: t[:, 0],
        lambda t: t[1:, :, :, :1],
    ],
)
def test_any_order_in_memory(tmp_path: Path, dtype: torch.dtype, view: Any) -> None:
    tensor = view(_random(dtype, (2, 3, 4, 5)))
    returned = _returned(tmp_path, tensor)
    assert not difference(returned.contiguous(), tensor.contiguous())
    gaps = tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()
    assert gaps or returned.stride() == tensor.stride()


@pytest.mark.parametrize("shape", [(4, 3, 5, 5), (4, 3, 1, 1), (1, 3, 5, 5), (4, 1, 5, 5)])
def test_channels_last_is_kept(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Also where a size of one leaves the order open: torch asks the strides which it is."""
    tensor = torch.randn(shape).to(memory_format=torch.channels_last)
    returned = _returned(tmp_path, [tensor, torch.randn(2, 3, 4, 4, 4)])[0]
    assert returned.stride() == tensor.stride()
    assert not difference(returned, tensor)


def test_views_with_gaps_are_kept_without_them(tmp_path: Path) -> None:
    base = torch.arange(24).reshape(4, 6)
    views = [base[:, ::2], base[1:3, 1:4], torch.ones(1).expand(3, 2), base.t()[1]]
    for view, returned in zip(views, _returned(tmp_path, views), strict=True):
        assert torch.equal(view, returned)
        assert returned.is_contiguous()
        assert returned.untyped_storage().nbytes() == view.numel() * view.element_size()


def test_conjugates_and_negatives_are_not_taken_for_what_they_are_views_of(tmp_path: Path) -> None:
    number = torch.tensor([1 + 2j, 3 - 4j])
    state = [number, number.conj(), number.conj().imag, number.imag]
    returned = _returned(tmp_path, state)
    assert returned[1].tolist() == [1 - 2j, 3 + 4j]
    assert returned[2].tolist() == [-2, 4]
    assert returned[3].tolist() == [2, -4]


def test_a_tensor_that_is_there_twice_is_written_once_and_is_one_again(tmp_path: Path) -> None:
    weight = nn.Parameter(torch.randn(50, 50))
    state = {"embedding": weight, "head": weight.detach(), "rows": weight[:10]}
    returned = _returned(tmp_path, state)
    assert returned["embedding"] is returned["head"]
    assert (tmp_path / "run.safetensors").stat().st_size < 2500 * 4 + 500 * 4 + 500
    returned["embedding"].zero_()
    assert torch.equal(returned["rows"], weight[:10])


def test_every_tensor_has_memory_of_its_own(tmp_path: Path) -> None:
    """So one can be let go of, and a file that is removed takes nothing along."""
    flat = torch.randn(100)
    returned = _returned(tmp_path, list(flat.split(10)))
    assert {t.untyped_storage().nbytes() for t in returned} == {40}
    assert len({t.untyped_storage().data_ptr() for t in returned}) == 10


@pytest.mark.parametrize("channels_last", [False, True])
def test_networks_and_optimizers(tmp_path: Path, channels_last: bool) -> None:
    state = training_state(channels_last)
    returned = _returned(tmp_path, state)
    assert not difference(returned, state)
    assert all(type(key) is int for key in returned["optimizers"][0]["state"])


def test_other_programs_read_the_tensors(tmp_path: Path) -> None:
    tensors = {
        str(dtype): _random(dtype, (3, 5)) for name, dtype in _DTYPES.items() if _CODES[name]
    }
    _returned(tmp_path, tensors)
    loaded = load_file(tmp_path / "run.safetensors")
    assert not difference({name: loaded[name] for name in tensors}, tensors)


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, False, 0, 1, -1, 2**63 - 1, -(2**63), 2**127, "", "\0\ud800", "naïve"),
        *(0.0, -0.0, 0.1, 1.0, 5e-324, 1.7976931348623157e308, math.inf, -math.inf, math.nan),
        *([], (), {}, [[]], ((),), {"dict": []}, {"tensor": "no tensor"}, {"float": "0"}),
        *({1: 0, "1": 0}, {-1: 0}, {"b": 1, "a": 2}, (1, [2, (3,)])),
        *({"a.b": 1, "a": {"b": 2}}, {"": 1}, {"__metadata__": 1}),
    ],
    ids=repr,
)
def test_plain_values(tmp_path: Path, value: Any) -> None:
    assert not difference(_returned(tmp_path, value), value)


def test_the_bits_of_a_nan(tmp_path: Path) -> None:
    (value,) = struct.unpack(">d", bytes.fromhex("fff8000000abcdef"))
    assert struct.pack(">d", _returned(tmp_path, [value])[0]).hex() == "fff8000000abcdef"


def test_keys_that_make_the_same_place(tmp_path: Path) -> None:
    tensors = [torch.tensor(i) for i in range(6)]
    state = {
        "a.b": tensors[0],
        "a": {"b": tensors[1], "b'": tensors[2]},
        "__metadata__": tensors[3],
        0: tensors[4],
        "0": tensors[5],
    }
    assert not difference(_returned(tmp_path, state), state)
    assert len(load_file(tmp_path / "run.safetensors")) == 6


def test_an_ordered_dict_comes_back_as_a_plain_one(tmp_path: Path) -> None:
    assert not difference(_returned(tmp_path, OrderedDict(b=1, a=2)), {"b": 1, "a": 2})


def _endless() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"a": [object()]}, r"state\.a\.0: a builtins\.object cannot be saved"),
        ({"lr": np.float64(0.1)}, r"state\.lr: a numpy\.float64"),
        ({"a": np.zeros(2)}, r"state\.a: a numpy\.ndarray"),
        ({"a": {1}}, r"state\.a: a builtins\.set"),
        ({1.5: 0}, "keys may be strings and integers"),
        ({True: 0}, "keys may be strings and integers"),
        ({(1, 2): 0}, "keys may be strings and integers"),
        ({"a": torch.zeros(2).to_sparse()}, r"state\.a: .*sparse.*cannot be saved"),
        ({"a": torch.zeros(2, device="meta")}, r"state\.a: .*meta cannot be saved"),
        ({"a": nn.UninitializedParameter()}, "Uninitialized"),
        (_endless(), "nested at most 100 deep"),
    ],
)
def test_what_cannot_be_saved_is_named(state: Any, text: str) -> None:
    with pytest.raises(CheckpointError, match=text):
        packed(state)


def test_tensors_of_a_part_and_nothing_else_are_in_its_file(tmp_path: Path) -> None:
    write_part(tmp_path, "run", packed({"epoch": 3, "weight": torch.zeros(2)}))
    content = json.loads((tmp_path / "run.json").read_text())
    note = {"dtype": "float32", "shape": [2], "tensor": "weight"}
    assert content == {"dict": [["epoch", 3], ["weight", note]]}
    assert set(load_file(tmp_path / "run.safetensors")) == {"weight"}


def test_what_lies_in_the_file_begins_at_a_multiple_of_its_size(tmp_path: Path) -> None:
    """So that programs that map the file can use it in place."""
    state = {str(d): _random(d, (3,)) for d in (torch.int8, torch.float64, torch.bfloat16)}
    write_part(tmp_path, "run", packed(state))
    content = (tmp_path / "run.safetensors").read_bytes()
    length = int.from_bytes(content[:8], "little")
    begins = {k: e["data_offsets"][0] for k, e in json.loads(content[8 : 8 + length]).items()}
    assert all((8 + length + begins[k]) % state[k].element_size() == 0 for k in state)


@st.composite
def _tensors(draw: st.DrawFn) -> Tensor:
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=5)))
    torch.manual_seed(draw(st.integers(0, 99)))
    tensor = _random(draw(st.sampled_from(DTYPES)), shape)
    return tensor.permute(draw(st.permutations(range(len(shape)))))


_STATES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(st.characters(codec=None, exclude_categories=()))
    | _tensors(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, database=None)
@given(state=_STATES)
def test_any_state(tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
    folder = tmp_path_factory.mktemp("state")
    returned = _returned(folder, state)
    # An empty tensor has no order in memory.
    assert not difference(_in_rows(returned), _in_rows(state))


def _in_rows(state: Any) -> Any:
    if isinstance(state, Tensor):
        return (
            state
            if state.numel()
            else state.contiguous().clone(memory_format=torch.contiguous_format)
        )
    if isinstance(state, dict):
        return {key: _in_rows(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_in_rows(value) for value in state)
    return state
