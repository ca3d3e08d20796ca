"""Drawing: one architecture is trained, drawn and trained on; every element is looked at."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.families.families import Family, Inputs
from tests.families.finding import Finding, structure_of
from tests.settings import at_once
from worm_dist import Mask, WormConfig
from worm_dist.engine.engine import Engine
from worm_dist.groups.channel_groups import Groups
from worm_dist.groups.gates import gates_of

__all__ = ["draw", "outputs_of"]

_GATED = ".parametrizations.weight.original"
_SCALE = ".parametrizations.weight.0.scale"

Survivors = Mapping[str, Tensor]
"""For every parameter, by the name it has once gates are folded, bool of its shape."""


def draw(family: Family, number: int, folder: Path) -> Finding:
    """What comes of it; the ticket and the outputs of the drawn network are put into the folder.

    Args:
        number: says which optimizer trains it, and whether it is truncated before the draw.
    """
    network = family.built()
    _look_trained(network)
    config = WormConfig(
        search={"importance": family.score},
        truncation={**at_once(1)},
        ticket={"recalibrate_batches": 0},
    )
    start = time.perf_counter()
    engine = worm_dist.attach(
        network,
        _optimizer(network, number),
        config,
        example_inputs=family.inputs(0),
        steps_per_epoch=1,
    )
    seconds = time.perf_counter() - start
    _train(engine, family, range(2))
    engine.check()
    mask = _random_mask(engine.groups)
    truncated = number % 4 >= 2
    if truncated:
        engine.truncate(mask)
        _train(engine, family, range(2, 4))
    finding = _drawn(engine, mask, family, seconds, truncated)
    _train(engine, family, range(4, 6))
    folder.mkdir()
    engine.save_ticket(folder)
    torch.save(outputs_of(network, family.inputs(9)), folder / "outputs.pt")
    return finding


@torch.no_grad()
def outputs_of(network: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All floating point tensors that it puts out in eval mode."""
    network.eval()
    put_out = list(_floats(_run(network, inputs)))
    network.train()
    return put_out


def _drawn(engine: Engine, mask: Mask, family: Family, seconds: float, truncated: bool) -> Finding:
    network, groups, optimizer = engine.model, engine.groups, engine.optimizer
    searched = _survivors(network, groups, dict.fromkeys(groups.sizes, False))
    num_apart = sum(int(apart.sum()) for apart in searched.values())
    num_parameters = sum(parameter.numel() for parameter in network.parameters())
    masked = copy.deepcopy(network)
    _silence(masked, groups, mask)
    whole = outputs_of(network, family.inputs(9))
    expected = outputs_of(masked, family.inputs(9))
    survivors = _survivors(network, groups, mask)
    weights, state = _weights(network), _state(network, optimizer)

    engine.draw(mask)

    # Else a mask that silences nothing would pass.
    assert truncated or _difference(whole, expected) > 1e-6
    _assert_survived(network, optimizer, survivors, weights, state)
    return Finding(
        family.score,
        num_parameters,
        len(groups),
        groups.num_channels,
        1 - num_apart / num_parameters,
        groups.dense,
        seconds,
        structure_of(groups),
        _difference(outputs_of(network, family.inputs(9)), expected),
    )


def _assert_survived(
    network: nn.Module,
    optimizer: Optimizer,
    survivors: Survivors,
    weights: Mapping[str, Tensor],
    state: Mapping[str, Mapping[str, Any]],
) -> None:
    """Every element of a weight and of its state is the one that was there before, bit for bit."""
    parameters = dict(network.named_parameters())
    assert parameters.keys() == weights.keys()
    assert len(optimizer.state) == len(state)
    for name, parameter in parameters.items():
        assert torch.equal(parameter.flatten(), weights[name][survivors[name]]), name
        assert optimizer.state[parameter].keys() == state.get(name, {}).keys(), name
        for key, before in state.get(name, {}).items():
            after = optimizer.state[parameter][key]
            if isinstance(before, Tensor) and before.shape == survivors[name].shape:
                assert after.shape == parameter.shape, (name, key)
                assert torch.equal(after.flatten(), before[survivors[name]]), (name, key)
            else:
                assert after == before, (name, key)


def _survivors(network: nn.Module, groups: Groups, keep: Mapping[str, Any]) -> dict[str, Tensor]:
    """Which elements are left of every parameter, by the places that the members have."""
    flags = {n: torch.ones_like(p, dtype=torch.bool) for n, p in network.named_parameters()}
    for group in groups:
        kept = torch.as_tensor(keep[group.name]).expand(group.num_channels)
        for member in group.members:
            for name, dim in member.parameters:
                flags[name].index_fill_(dim, member.positions[~kept].flatten(), False)
    return {_plain(name): each for name, each in flags.items() if not name.endswith(_SCALE)}


def _weights(network: nn.Module) -> dict[str, Tensor]:
    """What the layers compute with: gates multiplied in."""
    weights = {}
    for name, parameter in network.named_parameters():
        weight: Any = parameter
        if name.endswith(_GATED):
            weight = network.get_submodule(name.removesuffix(_GATED)).weight
        if not name.endswith(_SCALE):
            weights[_plain(name)] = weight.detach().clone()
    return weights


def _state(network: nn.Module, optimizer: Optimizer) -> dict[str, dict[str, Any]]:
    return {
        _plain(name): copy.deepcopy(optimizer.state[parameter])
        for name, parameter in network.named_parameters()
        if parameter in optimizer.state and not name.endswith(_SCALE)
    }


def _plain(name: str) -> str:
    return name.replace(_GATED, ".weight")


@torch.no_grad()
def _silence(network: nn.Module, groups: Groups, mask: Mask) -> None:
    for group in groups:
        for member in group.zeroing_members:
            for name, dim in member.parameters:
                places = member.positions[~mask[group.name]].flatten()
                network.get_parameter(name).index_fill_(dim, places, 0)


def _random_mask(groups: Groups) -> Mask:
    """Of every group some channels, never none and never all."""
    generator = torch.Generator().manual_seed(5)
    keep = {}
    for name, size in groups.sizes.items():
        order = torch.randperm(size, generator=generator)
        num_kept = int(torch.randint(1, size, (), generator=generator))
        keep[name] = torch.zeros(size, dtype=torch.bool).index_fill_(0, order[:num_kept], True)
    return Mask(keep)


@torch.no_grad()
def _look_trained(network: nn.Module) -> None:
    """Scales, shifts, statistics and gates as if they had been trained; nothing that is zero."""
    generator = torch.Generator().manual_seed(3)
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.weight.uniform_(0.4, 1.6, generator=generator)
            module.bias.uniform_(-0.5, 0.5, generator=generator)
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.uniform_(-0.5, 0.5, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    for _, gate in gates_of(network):
        gate.scale.uniform_(0.4, 1.6, generator=generator)
    for parameter in network.parameters():
        if not parameter.any():
            parameter.uniform_(0, 0.1, generator=generator)


def _optimizer(network: nn.Module, number: int) -> Optimizer:
    if number % 2:
        return AdamW(network.parameters(), lr=1e-4)
    return SGD(network.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)


def _train(engine: Engine, family: Family, steps: range) -> None:
    for step in steps:
        before = [parameter.detach().clone() for parameter in engine.model.parameters()]
        engine.optimizer.zero_grad()
        put_out = _floats(_run(engine.model, family.inputs(step)))
        (sum((each - 1).square().mean() for each in put_out) + engine.penalty()).backward()
        engine.optimizer.step()
        after = list(engine.model.parameters())
        assert all(bool(parameter.isfinite().all()) for parameter in after)
        moved = sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
        assert moved > len([p for p in after if p.grad is not None]) / 2


def _run(network: nn.Module, inputs: Inputs) -> Any:
    return network(**inputs) if isinstance(inputs, dict) else network(*inputs)


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor) and output.is_floating_point():
        yield output
    elif isinstance(output, (Mapping, tuple, list)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _floats(part)


def _difference(outputs: list[Tensor], expected: list[Tensor]) -> float:
    """The largest, as a share of the largest value of that output."""
    assert [each.shape for each in outputs] == [each.shape for each in expected]
    assert all(bool(each.isfinite().all()) and bool(each.any()) for each in expected)
    return max(
        float((one - other).abs().max() / other.abs().max())
        for one, other in zip(outputs, expected, strict=True)
    )
