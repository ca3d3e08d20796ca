from __future__ import annotations

import hashlib
import json
import math
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD

import worm_dist
from tests.nets import Concatenating, Flattening, Residual, Separable, random_images, randomise
from worm_dist import CheckpointError, ConfigError, Engine, WormConfig, load_ticket
from worm_dist.models import build_model
from worm_dist.search.importance import ChannelScales
from worm_dist.search.select import select_channels

NAMED: dict[str, Any] = {
    "name": "vgg_small",
    "num_classes": 10,
    "in_channels": 3,
    "arguments": {"widths": [8, 12]},
}

_Change = Callable[[dict[str, Any]], object]


def _drawn(network: nn.Module) -> Engine:
    randomise(network, seed=1)
    config = WormConfig(truncation={"mode": "off"})
    optimizer = SGD(network.parameters(), lr=0.05)
    engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
    scores = ChannelScales(network, engine.groups)()
    engine.draw(select_channels(scores, engine.groups.sizes, 0.5, 0.1)[0])
    return engine


def _outputs(network: nn.Module) -> Tensor:
    network.eval()
    with torch.no_grad():
        logits: Tensor = network(random_images(4, seed=7))
    return logits


@pytest.mark.slow("a process that imports torch, six seconds")
def test_tickets_are_loaded_in_a_fresh_process(tmp_path: Path) -> None:
    """One names its model; the other is of a network of one's own."""
    named, own = tmp_path / "named", tmp_path / "own"
    drawn = {named: _drawn(build_model(**NAMED)), own: _drawn(Residual())}
    drawn[named].save_ticket(named, model=NAMED)
    drawn[own].save_ticket(own)
    program = (
        "import sys, torch, worm_dist, tests.nets\n"
        "named, own = sys.argv[1:]\n"
        "networks = {\n"
        "    named: worm_dist.load_ticket(named),\n"
        "    own: worm_dist.load_ticket(own, build=tests.nets.Residual),\n"
        "}\n"
        "images = tests.nets.random_images(4, seed=7)\n"
        "for folder, network in networks.items():\n"
        "    torch.save(network.eval()(images).detach(), f'{folder}/outputs.pt')\n"
    )
    subprocess.run([sys.executable, "-c", program, named, own], check=True)
    for folder, engine in drawn.items():
        assert torch.equal(torch.load(folder / "outputs.pt"), _outputs(engine.model))


@pytest.mark.parametrize("build", [Concatenating, Flattening, Separable])
def test_every_kind_of_network_comes_back(tmp_path: Path, build: type[nn.Module]) -> None:
    engine = _drawn(build())
    engine.save_ticket(tmp_path / "new" / "folder")
    loaded = load_ticket(tmp_path / "new" / "folder", build)
    assert loaded.training
    state = engine.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(_outputs(loaded), _outputs(engine.model))


def test_nothing_drawn_is_nothing_to_save(tmp_path: Path) -> None:
    network = Residual()
    optimizer = SGD(network.parameters(), lr=0.05)
    engine = worm_dist.attach(network, optimizer, example_inputs=random_images(1))
    with pytest.raises(ConfigError, match="no ticket has been drawn"):
        engine.save_ticket(tmp_path / "ticket")
    assert not (tmp_path / "ticket").exists()


@pytest.fixture
def ticket(tmp_path: Path) -> Path:
    _drawn(Residual()).save_ticket(tmp_path)
    return tmp_path


def _change(ticket: Path, change: _Change) -> None:
    content = json.loads((ticket / "ticket.json").read_text())
    change(content)
    _sign(ticket, content)


def _sign(ticket: Path, content: dict[str, Any]) -> None:
    """As somebody would who wants it to be loaded."""
    unsigned = {key: value for key, value in content.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(unsigned, sort_keys=True).encode()).hexdigest()
    (ticket / "ticket.json").write_text(json.dumps({**content, "digest": digest}))


def test_without_build_the_ticket_must_name_its_model(ticket: Path) -> None:
    with pytest.raises(CheckpointError, match="build="):
        load_ticket(ticket)


@pytest.mark.parametrize("name", ["ticket.json", "ticket.safetensors"])
def test_a_missing_file_is_named(ticket: Path, name: str) -> None:
    (ticket / name).unlink()
    with pytest.raises(CheckpointError, match=name):
        load_ticket(ticket, Residual)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        load_ticket(tmp_path / "nowhere", Residual)


@pytest.mark.fault(8, "in a ticket")
def test_one_flipped_bit_is_found(ticket: Path) -> None:
    """torch and safetensors would load it without a word."""
    weights = bytearray((ticket / "ticket.safetensors").read_bytes())
    weights[-5] ^= 1
    (ticket / "ticket.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="sha256"):
        load_ticket(ticket, Residual)


@pytest.mark.parametrize("keep", [0, 10, -1])
@pytest.mark.parametrize("name", ["ticket.json", "ticket.safetensors"])
def test_a_file_cut_short_is_refused(ticket: Path, name: str, keep: int) -> None:
    (ticket / name).write_bytes((ticket / name).read_bytes().rstrip()[:keep])
    with pytest.raises(CheckpointError, match=name):
        load_ticket(ticket, Residual)


@pytest.mark.parametrize(
    "content", [b"[]", b"null", b'{"format_version": 4}', b"\xff\xfe", b"\x80\x04pickle"]
)
def test_something_else_is_no_ticket(ticket: Path, content: bytes) -> None:
    (ticket / "ticket.json").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a ticket"):
        load_ticket(ticket, Residual)


def test_a_later_format_is_refused(ticket: Path) -> None:
    _change(ticket, lambda content: content.update(format_version=6))
    with pytest.raises(CheckpointError, match="format 6"):
        load_ticket(ticket, Residual)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["cuts"][0].update(module="stern"),
        lambda content: content["cuts"][0].update(parameter="stern.weight"),
        lambda content: content["cuts"][0].update(dim=4),
        lambda content: content["cuts"][0].update(size=99),
        lambda content: content["cuts"][0]["kept"].pop(),
        lambda content: content["cuts"].pop(),
    ],
)
def test_cuts_that_do_not_fit_are_refused(ticket: Path, change: _Change) -> None:
    _change(ticket, change)
    with pytest.raises(CheckpointError, match=r"fit the network|other channels than the group"):
        load_ticket(ticket, Residual)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content["cuts"][0].update(kept=[]),
        lambda content: content["cuts"][0].update(kept=[99]),
        lambda content: content["cuts"][0].update(kept=[-1]),
        lambda content: content["cuts"][0].update(kept=[1, 1]),
        lambda content: content["cuts"].append(content["cuts"][0]),
    ],
)
def test_cuts_that_are_none_are_refused(ticket: Path, change: _Change) -> None:
    _change(ticket, change)
    with pytest.raises(CheckpointError, match="not a ticket"):
        load_ticket(ticket, Residual)


def test_a_changed_digit_is_found(ticket: Path) -> None:
    """Of a place that is kept, say: it would fit, but be another mask's."""
    content = json.loads((ticket / "ticket.json").read_text())
    content["mask_digest"] = content["mask_digest"][::-1]
    (ticket / "ticket.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="damaged"):
        load_ticket(ticket, Residual)


def test_other_programs_read_the_weights(tmp_path: Path) -> None:
    engine = _drawn(Residual().to(memory_format=torch.channels_last))
    engine.save_ticket(tmp_path)
    state = engine.model.state_dict()
    found = load_file(tmp_path / "ticket.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in found.items())


@pytest.mark.parametrize(
    "arguments",
    [
        {"widths": [10**9, 12]},
        {"widths": [8] * 5000},
        {"widths": [10**30]},
    ],
)
@pytest.mark.fault(10, "a ticket of a network that would not fit in memory")
def test_no_memory_is_taken_for_what_does_not_fit(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    _drawn(build_model(**NAMED)).save_ticket(tmp_path, model=NAMED)
    _change(tmp_path, lambda content: content["model"].update(arguments=arguments))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(CheckpointError):
        load_ticket(tmp_path)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 100_000  # of kilobytes; the first would take 36 of gigabytes


@pytest.mark.parametrize("build", [Separable, lambda: Residual(width=9), lambda: Residual(8, 7)])
def test_another_network_is_refused(ticket: Path, build: Callable[[], nn.Module]) -> None:
    with pytest.raises(CheckpointError, match="fit the network"):
        load_ticket(ticket, build)


def test_arguments_of_a_named_model_may_be_left_out(tmp_path: Path) -> None:
    model: dict[str, Any] = {"name": "vgg_small", "num_classes": 10, "in_channels": 3}
    engine = _drawn(build_model(**model))
    engine.save_ticket(tmp_path, model=model)
    load_ticket(tmp_path)


@pytest.mark.parametrize("key", ["name", "arguments"])
def test_a_model_that_is_not_known_here_is_refused(tmp_path: Path, key: str) -> None:
    _drawn(build_model(**NAMED)).save_ticket(tmp_path, model=NAMED)
    content = json.loads((tmp_path / "ticket.json").read_text())
    content["model"][key] = "vgg_tiny" if key == "name" else {"depth": 3}
    _sign(tmp_path, content)
    with pytest.raises(CheckpointError, match="model"):
        load_ticket(tmp_path)


# ---- what has been written again, so that all hashes fit -----------------------------------------


def _reseal(ticket: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = ticket / "ticket.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    content = path.read_bytes()
    digest = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    _change(ticket, lambda record: record.update(weights=digest))


def _set(name: str, value: float) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors[name].view(-1)[-1:].fill_(value)


def _to(name: str, dtype: torch.dtype) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


@pytest.mark.fault(47, "NaN, infinities and other dtypes in its weights")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_set("stem.weight", math.nan), "'stem.weight' has NaN or infinite elements"),
        (_set("bn1.running_var", math.inf), "'bn1.running_var' has NaN or infinite elements"),
        (_to("stem.weight", torch.int8), "'stem.weight' is torch.int8, and torch.float32"),
        (_to("stem.weight", torch.float64), "'stem.weight' is torch.float64, and torch.float32"),
        (_to("bn1.num_batches_tracked", torch.int32), "is torch.int32, and torch.int64"),
    ],
)
def test_other_weights_are_refused(
    ticket: Path, change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    _reseal(ticket, change)
    with pytest.raises(CheckpointError, match=said):
        load_ticket(ticket, Residual)


def test_weights_of_less_precision_are_converted(ticket: Path) -> None:
    """A network that was trained in bf16 is loaded into one in float32."""
    _reseal(ticket, _to("stem.weight", torch.bfloat16))
    weight = load_ticket(ticket, Residual).get_parameter("stem.weight")
    assert weight.dtype == torch.float32 and torch.equal(weight, weight.bfloat16().float())


def _exchange_a_channel(kept: list[int], size: int) -> None:
    """One that was dropped for one that was kept; as many stay."""
    dropped = next(index for index in range(size) if index not in kept)
    kept[0] = dropped
    kept.sort()


def _exchange_in_group(content: dict[str, Any]) -> None:
    group = next(g for g in content["groups"] if len(g["kept"]) < g["num_channels"])
    _exchange_a_channel(group["kept"], group["num_channels"])


def _exchange_in_cut(content: dict[str, Any]) -> None:
    named = {group["name"] for group in content["groups"]}
    cut = next(cut for cut in content["cuts"] if cut["module"] in named and cut["dim"] == 0)
    _exchange_a_channel(cut["kept"], cut["size"])


@pytest.mark.fault(47, "other kept channels in a group, a cut, or both; another mask")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([_exchange_in_group], "not those of mask_digest"),
        ([_exchange_in_cut], "keeps other channels than the group"),
        ([_exchange_in_group, _exchange_in_cut], "not those of mask_digest"),
        ([lambda content: content["groups"].pop()], "not those of mask_digest"),
        ([lambda content: content["groups"].append(content["groups"][0])], "mask_digest"),
        ([lambda content: content["groups"][0].update(num_channels=1 << 40)], "num_channels"),
        ([lambda content: content.update(mask_digest="0" * 32)], "not those of mask_digest"),
    ],
)
def test_other_channels_are_refused(ticket: Path, changes: list[_Change], said: str) -> None:
    """As many channels of other numbers fit every shape, and loaded without a word."""
    for change in changes:
        _change(ticket, change)
    with pytest.raises(CheckpointError, match=rf"ticket.json: .*{said}"):
        load_ticket(ticket, Residual)


@pytest.mark.fault(47, "the weights of another ticket with the same shapes")
def test_swapped_weights_are_refused(
    ticket: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    other = tmp_path_factory.mktemp("other")
    engine = _drawn(Residual())
    with torch.no_grad():
        engine.model.get_parameter("stem.weight").add_(1)
    engine.save_ticket(other)
    shutil.copy(other / "ticket.safetensors", ticket / "ticket.safetensors")
    with pytest.raises(CheckpointError, match="sha256"):
        load_ticket(ticket, Residual)


@pytest.mark.fault(49, "build is no function, or returns no network or one without memory")
@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: None, "build returned a NoneType; let it return the dense network"),
        (lambda: Residual, "build returned a type"),
        (Residual(), "build is a Residual; give a function"),
        ("Residual", "build is 'Residual', but"),
        (lambda: Residual().to("meta"), "build returned a network on the meta device"),
    ],
)
def test_what_builds_no_network_is_refused(ticket: Path, build: Any, said: str) -> None:
    """It ended in AttributeError."""
    with pytest.raises(ConfigError, match=f"load_ticket: {said}"):
        load_ticket(ticket, build)
