"""Whatever a network does with its channels, a group that is accepted is drawn exactly, or the draw
is refused and nothing has been changed."""

from __future__ import annotations

import copy
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import worm_dist
from tests.oracles import scaling_members
from tests.ticket.random_networks import RandomNetwork, Recipe, look_trained, recipes
from worm_dist import ConfigError, DrawError, Mask, WormConfig, WormError
from worm_dist.config import TicketConfig
from worm_dist.engine.engine import Engine
from worm_dist.groups.channel_groups import Groups
from worm_dist.pruning import exactness
from worm_dist.pruning.rehearsal import Rehearsal
from worm_dist.pruning.surgery import cuts_of, remove_channels, shapes_of

pytestmark = pytest.mark.slow("draws 170 random networks")

_NUM_EXAMPLES = 85
_NUM_PARTS = int(os.environ.get("RANDOM_NETWORKS", "170")) // _NUM_EXAMPLES
_TOLERANCE = 1e-9
# What is drawn keeps its statistics, so it can be compared.
_CONFIG = WormConfig(ticket=TicketConfig(recalibrate_batches=0))
_REFUSAL = (
    "a rehearsal on a copy fails: (without some of its channels the network (fails: |computes|"
    "returns)|its channels are outputs of the network)"
)


def check(recipe: Recipe, outcomes: Counter[str]) -> None:
    """The property, for one network; what came of it is counted."""
    network = recipe.built()
    optimizer = _optimizer(network, recipe.seed)
    _train(network, network, optimizer, recipe.seed)  # if this fails, the recipe is at fault
    outcomes["examples"] += 1
    engine = _attached(network, optimizer)
    if engine is None:
        outcomes["nothing to draw"] += 1
        return
    reasons = engine.groups.dense.values()
    assert all(reasons)
    outcomes["dense by trial"] += any("without some of its channels" in why for why in reasons)
    look_trained(network, recipe.seed + 2)
    first, *rest = _masks(engine.groups, recipe.seed)
    rehearsal = Rehearsal(copy.deepcopy(network).eval(), network.example())
    drawn = [_can_be_drawn(network, rehearsal, engine.groups, mask) for mask in rest]
    _train(engine.model, network, optimizer, recipe.seed)
    drawn.append(_is_drawn(engine, network, optimizer, first))
    outcomes["drawn" if all(drawn) else "refused"] += 1


def _attached(network: RandomNetwork, optimizer: Optimizer) -> Engine | None:
    """None if there is nothing to draw; then nothing has been changed either."""
    before = _state(network, optimizer)
    engines: list[Engine] = []

    def attach() -> None:
        example = network.example()
        engines.append(
            worm_dist.attach(network, optimizer, _CONFIG, example_inputs=example, steps_per_epoch=1)
        )

    refusal = _refusal(attach, ConfigError)
    assert refusal is None or refusal.startswith("model: it has no channel group of which channels")
    _assert_same(_state(network, optimizer), before)
    return engines[0] if engines else None


def _can_be_drawn(network: RandomNetwork, rehearsal: Rehearsal, groups: Groups, mask: Mask) -> bool:
    """Whether a draw would not be refused, tried on a copy; if so it is exact."""
    with torch.no_grad():
        if rehearsal.difference(groups, mask) is not None:
            return False
    whole, drawn = copy.deepcopy(network), copy.deepcopy(network)
    _silence(whole, groups, mask)
    remove_channels(drawn, cuts_of(groups, mask, shapes_of(drawn)))
    _assert_alike(drawn, whole)
    return True


def _is_drawn(engine: Engine, network: RandomNetwork, optimizer: Optimizer, mask: Mask) -> bool:
    """The same of the engine itself; training goes on in any case."""
    whole = copy.deepcopy(network)
    _silence(whole, engine.groups, mask)
    before, phase = _state(network, optimizer), engine.phase
    refusal = _refusal(lambda: engine.draw(mask), DrawError)
    assert engine.model is network and engine.optimizer is optimizer
    if refusal is None:
        _assert_alike(network, whole)
    else:
        assert re.search(_REFUSAL, refusal)
        assert engine.phase is phase
        _assert_same(_state(network, optimizer), before)
    _train(network, network, optimizer, 3)
    return refusal is None


def _refusal(action: Callable[[], None], kind: type[WormError]) -> str | None:
    """With what message an action was refused; None if it was not."""
    try:
        action()
    except kind as error:
        return str(error)
    return None


def _masks(groups: Groups, number: int) -> Iterator[Mask]:
    """One channel of every group is kept, or one is dropped, or any number; the number says which
    of the three comes first."""
    generator = torch.Generator().manual_seed(number)
    for how in range(number, number + 3):
        keep = {}
        for name, size in groups.sizes.items():
            num_any = int(torch.randint(1, size + 1, (), generator=generator))
            num_kept = (1, size - 1, num_any)[how % 3]
            order = torch.randperm(size, generator=generator)
            keep[name] = torch.zeros(size, dtype=torch.bool).index_fill_(0, order[:num_kept], True)
        yield Mask(keep)


@torch.no_grad()
def _silence(network: nn.Module, groups: Groups, mask: Mask) -> None:
    for group in groups:
        for member in scaling_members(group):
            for name, dim in member.parameters:
                places = member.positions[~mask[group.name]].flatten()
                network.get_parameter(name).index_fill_(dim, places, 0)


@torch.no_grad()
def _assert_alike(drawn: RandomNetwork, whole: RandomNetwork) -> None:
    """On inputs of another size than the example, in every way in which it can be called."""
    batch, side = whole.recipe.batch % 3 + 1, whole.recipe.side + 1
    for call in whole.calls(batch, side, whole.recipe.seed + 4):
        for training in (False, True):
            expected = _outputs(whole, training, call)
            for one, other in zip(_outputs(drawn, training, call), expected, strict=True):
                assert one.shape == other.shape and bool(other.isfinite().all())
                assert (one - other).abs().max() <= _TOLERANCE * other.abs().max()


def _outputs(network: nn.Module, training: bool, call: dict[str, Any]) -> list[Tensor]:
    """With its own code in training mode or not; its layers never are."""
    for module in network.modules():
        module.training = training and any(True for _ in module.children())
    put_out = _floats(network(**call))
    network.train()
    return put_out


def _floats(output: Any) -> list[Tensor]:
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [each for part in parts for each in _floats(part)]


def _optimizer(network: nn.Module, number: int) -> Optimizer:
    if number % 2:
        return AdamW(network.parameters(), lr=1e-3)
    return SGD(network.parameters(), lr=1e-3, momentum=0.9)


def _train(model: nn.Module, network: RandomNetwork, optimizer: Optimizer, number: int) -> None:
    """A step, with every way in which it can be called."""
    optimizer.zero_grad()
    put_out = [each for call in network.calls(3, 8, number) for each in _floats(model(**call))]
    torch.stack([each.square().mean() for each in put_out]).sum().backward()
    optimizer.step()


def _state(network: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    kept = [value for state in optimizer.state.values() for value in state.values()]
    tensors = [*network.state_dict().values(), *filter(torch.is_tensor, kept)]
    return [tensor.detach().clone() for tensor in tensors]


def _assert_same(tensors: list[Tensor], before: list[Tensor]) -> None:
    assert len(tensors) == len(before) and all(map(torch.equal, tensors, before))


def outcomes_of(number: int, num_examples: int, phases: tuple[Phase, ...]) -> Counter[str]:
    """Of so many networks, drawn at random by this number; the property holds for all of them."""
    outcomes: Counter[str] = Counter()

    @seed(number)
    @settings(
        max_examples=num_examples,
        phases=phases,
        database=None,
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(recipes())
    def holds(recipe: Recipe) -> None:
        check(recipe, outcomes)

    holds()
    return outcomes


@pytest.mark.parametrize("part", range(_NUM_PARTS))
def test_what_is_accepted_is_drawn_exactly(part: int) -> None:
    outcomes = outcomes_of(part, _NUM_EXAMPLES, (Phase.generate, Phase.shrink))
    assert outcomes["examples"] >= _NUM_EXAMPLES
    # What draws nothing, leaves nothing dense or refuses everything would pass too.
    assert outcomes["drawn"] > _NUM_EXAMPLES / 3
    assert outcomes["dense by trial"] > _NUM_EXAMPLES / 10
    assert outcomes["refused"] < _NUM_EXAMPLES / 20


def _accept_all(self: object) -> dict[str, str]:
    return {}


def test_without_a_trial_draws_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness._Trial, "inexact", _accept_all)
    outcomes = outcomes_of(0, 30, (Phase.generate,))
    assert outcomes["refused"] > 5


def _find_nothing(self: object, groups: Groups, mask: Mask) -> None:
    """In the place of a rehearsal."""


def test_without_a_trial_and_a_rehearsal_they_are_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exactness._Trial, "inexact", _accept_all)
    monkeypatch.setattr(Rehearsal, "difference", _find_nothing)
    with pytest.raises((AssertionError, RuntimeError)):
        outcomes_of(0, 30, (Phase.generate,))
