"""Tickets of pre-activation ResNets (arXiv 1909.11957): every norm keeps what the published mask
keeps, and the drawn network computes what the published one does, which selects behind norms."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from tests.nets import randomise
from tests.papers.nets import build
from tests.papers.published import batch_norms, early_bird_mask
from tests.ranks import Ranks
from tests.resuming import through_a_file
from tests.settings import at_once
from tests.ticket_command.tickets import change_weights, copied
from worm_dist import CheckpointError, Engine, Mask, WormConfig, attach, load_ticket
from worm_dist.__main__ import main
from worm_dist.groups.selective_norm import SelectiveBatchNorm2d
from worm_dist.groups.tracing import find_groups
from worm_dist.models import build_model

IMAGE = torch.zeros(1, 1, 8, 8)
MODEL: dict[str, Any] = {"name": "preresnet20", "num_classes": 10, "in_channels": 1}


def _images(seed: int, number: int = 4) -> Tensor:
    return torch.randn(number, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


def _network(seed: int = 0) -> nn.Module:
    network = build("preresnet", seed)
    randomise(network, seed)
    return network


def _attached(network: nn.Module, preset: str = "early-bird", **changes: Any) -> Engine:
    config = WormConfig.preset(preset, **changes)
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return attach(model, optimizer, config, example_inputs=IMAGE, steps_per_epoch=2)


def _selective(network: nn.Module) -> dict[str, SelectiveBatchNorm2d]:
    return {n: m for n, m in batch_norms(network).items() if isinstance(m, SelectiveBatchNorm2d)}


def _step(engine: Engine, seed: int) -> None:
    classes = torch.arange(4) % 10
    nn.functional.cross_entropy(engine.model(_images(seed)), classes).backward()
    engine.optimizer.step()
    engine.optimizer.zero_grad()


@torch.no_grad()
def _outputs(network: nn.Module) -> Tensor:
    network.eval()
    outputs: Tensor = network(_images(9))
    network.train()
    return outputs


def _published(network: nn.Module, mask: dict[str, Tensor]) -> nn.Module:
    """The published surgery: norms of the stream keep their size, and channels are selected behind
    them; convolutions and other norms are sliced."""
    small = copy.deepcopy(network)
    selected = _selective(network)
    for name, norm in batch_norms(small).items():
        kept = mask[name].nonzero().flatten()
        path, _, last = name.rpartition(".")
        block = small.get_submodule(path)
        if name in selected:
            plain = nn.BatchNorm2d(norm.num_features)
            plain.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "indices"})
            plain.register_forward_hook(lambda _, inputs, output, kept=kept: output[:, kept])
            setattr(block, last, plain)
        else:
            for attribute in ("weight", "bias"):
                parameter = norm.get_parameter(attribute)
                parameter.data = parameter.data[kept]
            for attribute in ("running_mean", "running_var"):
                setattr(norm, attribute, norm.get_buffer(attribute)[kept])
            before = block.get_parameter(f"conv{int(last[-1]) - 1}.weight")
            before.data = before.data[kept]
        after = "head" if name == "bn" else f"conv{last[-1]}"
        behind = block.get_parameter(f"{after}.weight")
        behind.data = behind.data[:, kept]
    return small


@pytest.mark.parametrize("seed", [0, 1])
def test_the_ticket_is_the_published_one(seed: int) -> None:
    """Outputs in both modes, and gradients, are equal to the bit."""
    network = _network(seed)
    expected = early_bird_mask(network, 0.5)
    assert all(bool(kept.any()) for kept in expected.values())
    published = _published(network, expected)
    before = copy.deepcopy(network)
    engine = _attached(network, search={"window": 1, "l1": 0.0})
    assert engine.check().ticket
    engine.draw()
    for name, norm in batch_norms(network).items():
        assert norm.num_features == int(expected[name].sum()), name
    for name, norm in _selective(network).items():
        assert torch.equal(norm.indices, expected[name].nonzero().flatten())
    # The stream is whole.
    for name in ("conv1", "stages.0.0.conv3", "stages.1.0.shortcut"):
        assert network.get_submodule(name).out_channels == before.get_submodule(name).out_channels
    for training in (False, True):
        network.train(training), published.train(training)
        assert torch.equal(network(_images(1)), published(_images(1)))
    for drawn in (network, published):
        drawn(_images(2)).square().sum().backward()
    theirs = dict(published.named_parameters())
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        selects = name.rpartition(".")[0] in _selective(network)
        gradient = theirs[name].grad
        assert gradient is not None
        if selects:
            gradient = gradient[expected[name.rpartition(".")[0]]]
        assert torch.equal(parameter.grad, gradient), name


def test_a_norm_of_the_stream_drops_channels_for_its_own_reader_alone() -> None:
    groups = find_groups(_network(), IMAGE)
    members = {
        group.name: [(member.module, member.role) for member in group.members] for group in groups
    }
    assert members["stages.0.1.bn1"] == [
        ("stages.0.1.bn1", "norm"),
        ("stages.0.1.conv1", "consumer"),
    ]
    assert members["bn"] == [("bn", "norm"), ("head", "consumer")]
    assert not any(group.tied for group in groups)
    assert sorted(groups.dense) == ["conv1", "stages.0.0.conv3", "stages.1.0.conv3"]
    assert groups.dense["conv1"] == (
        "stages.0.0.bn1 reads them, and drops channels of its own instead"
    )


def test_importance_by_weights_leaves_selected_channels_dense() -> None:
    engine = _attached(_network(), "dense", search={"importance": "weight_norm"})
    assert not {*_selective(build("preresnet", 0))} & {*engine.groups.sizes}
    assert "a norm selects its channels" in engine.groups.dense["bn"]


def _removed(resumed_at: int | None) -> dict[str, Any]:
    """Freeze, remove and draw channels on the way, and train on; perhaps broken off before a step,
    and resumed.  The state at the end, and how the draw changed the outputs."""
    settings = {
        "search": {"prune_ratio": 0.4, "l1": 0.0},
        "truncation": {"scope": "coupled", **at_once(2)},
        "ticket": {"round_to": 1, "recalibrate_batches": 0},
    }
    network = _network(1)
    engine = _attached(network, "worm", **settings)
    change = 0.0
    for step in range(7):
        if step == resumed_at:
            state = engine.state_dict(), network.state_dict(), engine.optimizer.state_dict()
            of_engine, weights, of_optimizer = through_a_file(state)
            network = build("preresnet", 7)
            engine = _attached(network, "worm", **settings)
            engine.load_state_dict(of_engine)
            network.load_state_dict(weights)
            engine.optimizer.load_state_dict(of_optimizer)
        if step == 1:
            sizes = engine.groups.sizes
            engine.truncate(Mask({name: torch.arange(n) % 3 > 0 for name, n in sizes.items()}))
        elif step == 5:
            before = _outputs(network)
            assert engine.check().ticket
            engine.draw()
            change = float((_outputs(network) - before).abs().max() / before.abs().max())
        _step(engine, 10 * step + (dist.get_rank() if dist.is_initialized() else 0))
    return {
        "change": change,
        "indices": {name: norm.indices.tolist() for name, norm in _selective(network).items()},
        "state": {
            name: value
            for name, value in network.state_dict().items()
            if "running" not in name  # each rank's own
        },
    }


def test_two_ranks_remove_channels_and_draw(ranks: Ranks) -> None:
    one, other = ranks(2, _removed, None)
    assert one["change"] < 1e-5
    assert one["indices"]["bn"] == [number for number in range(16) if number % 3]
    assert all(torch.equal(one["state"][name], other["state"][name]) for name in one["state"])


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_while_channels_leave_and_after_the_draw_it_is_the_same(step: int) -> None:
    whole, again = _removed(None), _removed(step)
    assert whole["indices"] == again["indices"]
    assert all(torch.equal(whole["state"][name], again["state"][name]) for name in whole["state"])


@pytest.fixture(scope="module")
def ticket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    network = build_model(**MODEL)
    randomise(network, 1)
    engine = _attached(network, search={"window": 1})
    engine.check()
    engine.draw()
    folder = tmp_path_factory.mktemp("ticket")
    engine.save_ticket(folder, model=MODEL)
    torch.save(network.eval()(_images(3)).detach(), folder / "outputs.pt")
    return folder


def test_a_ticket_comes_back_with_its_selection(ticket: Path) -> None:
    network = load_ticket(ticket).eval()
    assert torch.equal(network(_images(3)), torch.load(ticket / "outputs.pt"))
    assert any(len(norm.indices) < 64 for norm in _selective(network).values())


def test_a_ticket_whose_selection_was_changed_is_refused(ticket: Path, tmp_path: Path) -> None:
    folder = copied(ticket, tmp_path / "changed")

    def shift(tensors: dict[str, Tensor]) -> None:
        tensors["bn.indices"] += 1

    change_weights(folder, shift)
    with pytest.raises(CheckpointError, match=r"'bn\.indices' are not the channels that"):
        load_ticket(folder)


@pytest.mark.slow("torch.export, five seconds")
def test_a_ticket_with_a_selection_is_exported(ticket: Path, tmp_path: Path) -> None:
    path = tmp_path / "small.pt2"
    assert main(["ticket", "export", str(ticket), "--torch-export", str(path)]) == 0
    found = torch.export.load(path).module()(_images(3))
    torch.testing.assert_close(found, torch.load(ticket / "outputs.pt"))
