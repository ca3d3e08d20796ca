"""States that do not fit are refused with the key in the message, before anything is changed."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import differences, through_a_file
from tests.settings import at_once
from worm_dist import CheckpointError, ConfigError, Engine, WormConfig


def _engine(network: nn.Module | None = None, **settings: Any) -> Engine:
    torch.manual_seed(0)
    network = Residual() if network is None else network
    randomise(network, seed=3)
    settings = {"truncation": {**at_once(2)}, "search": {"every": "2ba"}, **settings}
    return worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.05, momentum=0.9),
        WormConfig(**settings),
        example_inputs=random_images(1),
    )


def _train(engine: Engine, num_steps: int) -> None:
    for _ in range(num_steps):
        engine.optimizer.zero_grad()
        engine.model(random_images(4, seed=engine.step)).square().mean().backward()
        engine.optimizer.step()


def _state() -> dict[str, Any]:
    engine = _engine()
    _train(engine, 2)
    engine.check()
    engine.truncate(mask_dropping(engine.groups, 0, 3))
    _train(engine, 1)
    state: dict[str, Any] = through_a_file(engine.state_dict())
    return state


def _without(*keys: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: _part(state, keys[:-1]).pop(keys[-1])


def _with(value: Any, *keys: str) -> Callable[[dict[str, Any]], None]:
    return lambda state: _part(state, keys[:-1]).__setitem__(keys[-1], value)


def _with_a_candidate_less(state: dict[str, Any]) -> None:
    """As the history of a narrower network: masks as wide as its own sizes say."""
    history = state["history"]
    name = list(history["sizes"])[-1]
    history["masks"] = history["masks"][:, : -history["sizes"].pop(name)]


def _part(state: Any, keys: tuple[str, ...]) -> Any:
    for key in keys:
        state = state[key]
    return state


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_without("format"), "format: wanted 4, found None"),
        (_with(2, "format"), "format: wanted 4, found 2"),
        (_without("shared", "checks_dropped"), "shared.checks_dropped: Field required"),
        (
            _without("shared", "dropped", "truncation", "columns"),
            "shared.dropped.truncation.columns: Field required",
        ),
        (
            _with(torch.ones(3) > 0, "shared", "dropped", "removed"),
            r"shared.dropped.removed: wanted \[14\], found \[3\]",
        ),
        (
            _with(torch.ones(14) > 0, "shared", "dropped", "removed"),
            "shared.dropped.mask: keeps a channel that dropped.removed has removed",
        ),
        (
            _with(torch.tensor([14]), "shared", "dropped", "removal", "schedule", "waiting"),
            "shared.dropped.removal.schedule.waiting: not different channel indices",
        ),
        (_with(1, "more"), "more: Extra inputs are not permitted"),
        (
            _with("now", "shared", "training", "step"),
            "shared.training.step: Input should be a valid integer",
        ),
        (
            _with("later", "shared", "verdict", "phase"),
            "shared.verdict.phase: Input should be 'dense'",
        ),
        (
            _with(torch.ones(3), "shared", "dropped", "mask"),
            "shared.dropped.mask: Value error, must be a one-dimensional bool",
        ),
        (
            _with(torch.ones(3) > 0, "shared", "dropped", "mask"),
            r"shared.dropped.mask: wanted \[14\], found \[3\]",
        ),
        (
            _with(torch.ones(3) > 0, "shared", "dropped", "truncation", "frozen"),
            r"shared.dropped.truncation.frozen: wanted \[14\]",
        ),
        (
            _with("ticket", "shared", "verdict", "phase"),
            "shared.dropped.truncation: contradicts phase ticket",
        ),
        (_with(None, "history"), "history: missing; rank 0 must load"),
        (_with_a_candidate_less, r"history.sizes: \w+: not what this network's search ranks"),
        (_with("00", "shared", "groups", "conv1"), "groups: conv1: these are not the groups"),
        (_without("shared", "groups", "conv1"), "groups: conv1: these are not the groups"),
    ],
)
def test_a_state_that_is_not_whole_is_refused(
    change: Callable[[dict[str, Any]], None], said: str
) -> None:
    state, engine = _state(), _engine()
    before = through_a_file(engine.state_dict())
    change(state)
    with pytest.raises(CheckpointError, match=f"load_state_dict: {said}"):
        engine.load_state_dict(state)
    assert not list(differences(engine.state_dict(), before, "changed"))


@pytest.mark.parametrize("state", [None, 3, {}, []])
def test_what_is_no_state_at_all_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match="format: wanted 4, found None"):
        _engine().load_state_dict(state)


def test_a_state_of_another_network_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"conv2, stem: .* attach to the dense network"):
        _engine(Plain()).load_state_dict(_state())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search": {"every": "2ba", "prune_ratio": 0.3}}, "search.prune_ratio: 0.5 -> 0.3"),
        (
            {"search": {"every": "2ba", "budget": {"flops": 0.5}}},
            "search.budget.flops: None -> 0.5",
        ),
        ({"search": {"every": "3ba"}}, "search.every: '2ba' -> '3ba'"),
        (
            {"truncation": {"frozen_weights": "hold"}},
            "truncation.frozen_weights: 'remove' -> 'hold'",
        ),
        ({"search": {"every": "2ba", "ratios": {"conv1": 0.1}}}, r"ratios: \{\} -> \{'conv1'"),
        ({"ticket": {"round_to": 2}}, "ticket.round_to: 8 -> 2"),
    ],
)
def test_other_settings_are_refused_with_each_of_them(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _engine(**settings).load_state_dict(_state())


def test_settings_of_the_draw_may_change() -> None:
    engine = _engine(ticket={"recalibrate_batches": 2})
    engine.load_state_dict(_state())
    assert engine.step == 3 and engine.phase == "truncate"


def test_an_engine_that_has_trained_takes_no_state() -> None:
    state, engine = _state(), _engine()
    _train(engine, 1)
    with pytest.raises(ConfigError, match="this engine has already taken steps"):
        engine.load_state_dict(state)
    engine.detach()
    with pytest.raises(ConfigError, match="detached"):
        engine.state_dict()


def test_an_epoch_of_another_length_is_refused() -> None:
    state = _state()
    state["shared"]["schedule"]["steps_per_epoch"] = 10
    network = Residual()
    engine = worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.05),
        WormConfig(truncation={**at_once(2)}, search={"every": "2ba"}),
        example_inputs=random_images(1),
        steps_per_epoch=12,
    )
    with pytest.raises(ConfigError, match="steps_per_epoch: 10 -> 12"):
        engine.load_state_dict(state)


class _Sized(nn.Module):
    """Is called with something of a type that no file has."""

    def __init__(self) -> None:
        super().__init__()
        self.network = Residual()

    def forward(self, images: torch.Tensor, size: Any = None) -> Any:
        return self.network(images)


def test_inputs_that_are_not_plain_are_left_out_with_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine = _engine(_Sized())
    engine.model(random_images(2), size=torch.Size([2]))
    with caplog.at_level(logging.WARNING, logger="worm_dist"):
        state = through_a_file(engine.state_dict())
    assert state["rank"]["training"]["inputs"] is None
    assert "inputs that contain a Size are not saved in the engine's state" in caplog.text
    _engine(_Sized()).load_state_dict(state)


def test_nested_inputs_come_back_as_they_were() -> None:
    engine = _engine(_Sized(), ticket={"recalibrate_batches": 2})
    size = {"a": [torch.ones(2), (3, None)], 4: "x"}
    for images in (random_images(1), random_images(2), random_images(3)):
        engine.model(images, size=size)
    state = through_a_file(engine.state_dict())
    again = _engine(_Sized(), ticket={"recalibrate_batches": 2})
    again.load_state_dict(state)
    before, after = (
        [(c.positional, c.keywords, c.autocast, sorted(c.training_norms)) for c in remembered]
        for remembered in (engine._training.inputs.calls, again._training.inputs.calls)
    )
    assert [len(positional[0]) for positional, *_ in after] == [2, 3]
    assert not list(differences(before, after, "calls"))


def _state_on(truncation: dict[str, Any]) -> tuple[Engine, dict[str, Any]]:
    engine = _parallel(truncation)
    engine.truncate(mask_dropping(engine.groups, 0, 3))
    _train(engine, 6)
    return engine, through_a_file(engine.state_dict())


def _parallel(truncation: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(Residual())
    return worm_dist.attach(
        model,
        SGD(model.parameters(), lr=0.05, momentum=0.9),
        WormConfig(truncation={**at_once(2), **truncation}),
        example_inputs=random_images(1),
    )


def _differing() -> list[str]:
    """What this rank says of states that are not the same, or fit only on one rank."""
    rank = torch.distributed.get_rank()
    _, state = _state_on({})
    said = []
    changes: list[Callable[[Any], object]] = [
        lambda s: s["shared"]["checks_dropped"].add_(1),
        lambda s: s["shared"]["dropped"]["truncation"].update(generation=9),
        lambda s: s["shared"].pop("checks_dropped"),
    ]
    for change in changes:
        mine = copy.deepcopy(state)
        if rank == 1:
            change(mine)
        try:
            _parallel({}).load_state_dict(mine)
        except worm_dist.WormError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_ranks_that_bring_different_states_all_stop(ranks: Ranks) -> None:
    """Where one rank's did not fit, the others had another error, with another exit code."""
    other, mine = ranks(2, _differing)
    assert other == mine
    for said, group in zip(mine, ("checks_dropped", "dropped.truncation")):
        assert said.startswith("DivergenceError: ") and "load_state_dict" in said
        assert f"state of group {group}: rank 1 differs" in said
    wanted = "CheckpointError: rank 1: load_state_dict: shared.checks_dropped: Field required"
    assert mine[2].startswith(wanted)


def _of_rank_zero(truncation: dict[str, Any]) -> Any:
    """Every rank goes on from rank zero's state, trains and draws."""
    engine, state = _state_on(truncation)
    everyones: list[Any] = [state]
    weights = engine.model.state_dict(), engine.optimizer.state_dict()
    torch.distributed.broadcast_object_list(everyones)
    again = _parallel(truncation)
    try:
        again.load_state_dict(everyones[0])
    except worm_dist.WormError as error:
        return f"{type(error).__name__}: {error}"
    again.model.load_state_dict(weights[0])
    again.optimizer.load_state_dict(weights[1])
    again.draw(again.mask)  # at once: nobody has seen inputs
    _train(again, 1)
    return len(again.history), again._training.inputs.calls


def test_rank_zeros_state_will_do_on_every_rank(ranks: Ranks) -> None:
    """Rank zero had inputs to estimate statistics from at the draw, the other had none, and rank
    zero waited for it: so inputs count only if every rank has its own."""
    for history, calls in ranks(2, _of_rank_zero, {}):
        assert history == 0 and len(calls) == 0


def test_what_powersgd_left_out_is_each_ranks_own(ranks: Ranks) -> None:
    zero, one = ranks(2, _of_rank_zero, {"compression": "powersgd"})
    assert zero == one and one.startswith("CheckpointError: rank 1: load_state_dict: rank: ")
    assert "this state is of rank 0 of 2, and this is rank 1 of 2" in one


def _on_two() -> dict[str, Any]:
    engine, state = _state_on({})
    model = dict(engine.model.get_submodule("module").state_dict())
    return {"engine": state, "model": model, "optimizer": engine.optimizer.state_dict()}


def test_one_process_goes_on_from_two(ranks: Ranks) -> None:
    """What faded is held there too; with nobody to send to nothing has to be left out."""
    saved, _ = ranks(2, _on_two)
    network = Residual()
    engine = worm_dist.attach(
        network,
        SGD(network.parameters(), lr=0.05, momentum=0.9),
        WormConfig(truncation={**at_once(2)}),
        example_inputs=random_images(1),
    )
    engine.load_state_dict(saved["engine"])
    network.load_state_dict(saved["model"])
    engine.optimizer.load_state_dict(saved["optimizer"])
    _train(engine, 2)
    assert engine.step == 8 and engine.mask == mask_dropping(engine.groups, 0, 3)
    for name in ("bn0", "bn2"):
        scale = network.get_parameter(f"{name}.weight")
        assert scale[[0, 3]].tolist() == [0, 0] and bool(scale[[1, 2]].all())
    engine.draw(engine.mask)
    assert network.stem.out_channels == 6


def test_what_follows_a_draw_is_there_again(tmp_path: Path) -> None:
    """An averaged copy is cut like the network, and the ticket can be written."""
    engine = _engine()
    average = AveragedModel(engine.model)
    _train(engine, 2)
    average.update_parameters(engine.model)
    mask = mask_dropping(engine.groups, 0, 3, 9)
    engine.truncate(mask)
    _train(engine, 3)
    engine.draw(mask, copies=[average.module])
    _train(engine, 1)
    average.update_parameters(engine.model)
    saved = through_a_file(
        {
            "engine": engine.state_dict(),
            "model": engine.model.state_dict(),
            "optimizer": engine.optimizer_state(),
            "average": average.state_dict(),
        }
    )
    engine.save_ticket(tmp_path / "one")

    again = _engine()
    average_again = AveragedModel(again.model)
    again.load_state_dict(saved["engine"], copies=[average_again.module])
    again.model.load_state_dict(saved["model"])
    again.load_optimizer_state(saved["optimizer"])
    average_again.load_state_dict(saved["average"])
    again.save_ticket(tmp_path / "other")
    for each in (engine, again):
        _train(each, 2)
    for one, other in ((engine.model, again.model), (average, average_again)):
        assert not list(differences(one.state_dict(), other.state_dict(), "trained on"))
    for name in ("ticket.json", "ticket.safetensors"):
        written, again_written = (tmp_path / folder / name for folder in ("one", "other"))
        assert written.read_bytes() == again_written.read_bytes(), name
