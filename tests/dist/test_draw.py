"""The draw under DDP: one structure on all ranks, one wrapper, and training goes on exactly."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Sized
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Optimizer

import worm_dist
from tests.gradients import gradient
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from worm_dist import BackendError, ConfigError, Engine, Mask, WormConfig

pytestmark = pytest.mark.slow("sixty draws on two ranks, half a minute")

DROPPED = (0, 3, 4, 9, 12)
ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"bucket_cap_mb": 0.001},
    {"gradient_as_bucket_view": True},
    {"gradient_as_bucket_view": True, "bucket_cap_mb": 0.001},
    {"find_unused_parameters": True},
    {"static_graph": True},
    {"buffers": False},
]


def _buffers_argument() -> str:
    """torch 2.14 renamed it, and warns of the old name."""
    names = DistributedDataParallel.__init__.__code__.co_varnames
    return "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"


def _wrap(network: nn.Module, arguments: dict[str, Any]) -> nn.Module:
    if not dist.is_initialized():
        return network
    given = dict(arguments)
    if "buffers" in given:
        given[_buffers_argument()] = given.pop("buffers")
    return DistributedDataParallel(network, **given)


def _attached(arguments: dict[str, Any], momentum: float = 0.9, **config: Any) -> Engine:
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=3)
    model = _wrap(network, arguments)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=momentum, weight_decay=0.01)
    config = {"truncation": {"frozen_weights": "hold"}, **config}
    return worm_dist.attach(
        model, optimizer, WormConfig(**config), example_inputs=random_images(1), steps_per_epoch=4
    )


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _train(model: nn.Module, optimizer: Optimizer, steps: range) -> list[dict[str, Tensor]]:
    """Gradients of every step."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    gradients = []
    for step in steps:
        optimizer.zero_grad()
        model(random_images(8, seed=step * size + rank)).square().mean().backward()
        gradients.append({n: gradient(p).clone() for n, p in _bare(model).named_parameters()})
        optimizer.step()
    return gradients


def _equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def _fresh(engine: Engine, arguments: dict[str, Any]) -> tuple[nn.Module, Optimizer]:
    """The same network and optimizer state, but objects that no engine has ever seen."""
    network = copy.deepcopy(_bare(engine.model))
    for parameter in network.parameters():
        parameter.grad = None
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    optimizer.load_state_dict(copy.deepcopy(engine.optimizer.state_dict()))
    return _wrap(network, arguments), optimizer


def _draw_and_go_on(arguments: dict[str, Any], truncate: bool) -> dict[str, Any]:
    engine = _attached(arguments)
    first = engine.model
    _train(engine.model, engine.optimizer, range(3))
    mask = mask_dropping(engine.groups, *DROPPED)
    if truncate:
        engine.truncate(mask)
        _train(engine.model, engine.optimizer, range(3, 6))
    # A forward pass without its backward: the old reducer still waits for gradients.
    engine.model(random_images(8)).sum()
    engine.draw(mask)
    model, optimizer = _fresh(engine, arguments)
    gradients = _train(engine.model, engine.optimizer, range(6, 12))
    expected = _train(model, optimizer, range(6, 12))
    assert all(_equal(one, two) for one, two in zip(gradients, expected, strict=True))
    assert _equal(_bare(engine.model).state_dict(), _bare(model).state_dict())
    shapes = {name: tuple(p.shape) for name, p in _bare(engine.model).named_parameters()}
    num_bytes = sum(4 * p.numel() for p in engine.model.parameters())
    if dist.is_initialized():
        assert engine.model is not first
        assert engine.traffic.sent_bytes == num_bytes
    return {"shapes": shapes, "weights": _bare(engine.model).state_dict()}


@pytest.mark.parametrize("truncate", [False, True], ids=["", "truncated before"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_training_goes_on_as_under_a_fresh_wrapper(
    ranks: Ranks, arguments: dict[str, Any], truncate: bool
) -> None:
    """The old wrapper's reducer would average the gradients of untouched parameters again."""
    one, two = ranks(2, _draw_and_go_on, arguments, truncate)
    assert one["shapes"] == two["shapes"]
    assert one["shapes"]["stem.weight"] == (5, 3, 3, 3)
    assert one["shapes"]["conv2.weight"] == (5, 4, 3, 3)
    for key, value in one["weights"].items():
        if "running" not in key:  # each rank's own until the next forward pass
            assert torch.equal(value, two["weights"][key]), key


@pytest.mark.parametrize("truncate", [False, True], ids=["", "truncated before"])
@pytest.mark.parametrize("world_size", [NO_GROUP, 1])
def test_alone_training_goes_on_too(ranks: Ranks, world_size: int, truncate: bool) -> None:
    (result,) = ranks(world_size, _draw_and_go_on, {}, truncate)
    assert result["shapes"]["head.weight"] == (10, 5)


_KEPT = (
    "bucket_bytes_cap",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
    "require_forward_param_sync",
    "device_ids",
    "dim",
    "process_group",
)


def _arguments_after(arguments: dict[str, Any], leave: str) -> list[tuple[str, Any, Any]]:
    engine = _attached(arguments)
    old = engine.model
    mask = mask_dropping(engine.groups, *DROPPED)
    _train(engine.model, engine.optimizer, range(2))
    engine.truncate(mask)
    if leave == "draw":
        engine.draw(mask)
    else:
        engine.detach()
    assert engine.model is not old and type(engine.model) is DistributedDataParallel
    keys = [key for key in (*_KEPT, _buffers_argument()) if hasattr(old, key)]
    return [
        (key, getattr(old, key), getattr(engine.model, key))
        for key in keys
        if getattr(old, key) is not getattr(engine.model, key)
        and getattr(old, key) != getattr(engine.model, key)
    ]


@pytest.mark.parametrize("leave", ["draw", "detach"])
@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_the_new_wrapper_has_the_arguments_of_the_old(
    ranks: Ranks, arguments: dict[str, Any], leave: str
) -> None:
    assert ranks(2, _arguments_after, arguments, leave) == [[], []]


def _refused(how: str) -> str:
    """What the refusal says; everything is as it was, and training goes on."""
    engine = _attached({})
    _train(engine.model, engine.optimizer, range(2))
    mask: Mask | None = None
    if how == "no survivor":
        mask = mask_dropping(engine.groups, *range(8))
    elif how == "no live survivor":
        engine.truncate(mask_dropping(engine.groups, *range(7)))
        mask = mask_dropping(engine.groups, 7)
    elif how == "foreign":
        mask = Mask({"elsewhere": torch.ones(14, dtype=torch.bool)})
    elif how == "twice":
        engine.draw(mask_dropping(engine.groups, 0))
        mask = mask_dropping(engine.groups, 1)
    model, phase, mask_before = engine.model, engine.phase, engine.mask
    state = copy.deepcopy(model.state_dict())
    optimizer_state = copy.deepcopy(engine.optimizer.state_dict())
    with pytest.raises(ConfigError) as refusal:
        engine.draw(mask)
    assert (engine.model, engine.phase, engine.mask) == (model, phase, mask_before)
    assert _equal(state, model.state_dict())
    for key, value in engine.optimizer.state_dict()["state"].items():
        before = optimizer_state["state"][key]["momentum_buffer"]
        assert torch.equal(value["momentum_buffer"], before)
    _train(engine.model, engine.optimizer, range(2, 4))
    return str(refusal.value)


@pytest.mark.parametrize("world_size", [NO_GROUP, 1, 2])
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no ticket", "no check has found the ticket yet"),
        ("no survivor", "group stem"),
        ("no live survivor", "group stem: no channel that the mask keeps is live"),
        ("foreign", "not of this network's groups: "),
        ("twice", "draw"),
    ],
)
@pytest.mark.fault(25, "a mask that leaves a layer without life")
def test_a_refused_draw_changes_nothing_on_any_rank(
    ranks: Ranks, world_size: int, how: str, message: str
) -> None:
    messages = ranks(world_size, _refused, how)
    assert len(set(messages)) == 1 and message in messages[0]


def _num_hooks(model: nn.Module, optimizer: Optimizer) -> int:
    network = _bare(model)
    hooks: list[Sized] = [
        table
        for module in network.modules()
        for table in (
            module._forward_hooks,
            module._forward_pre_hooks,
            module._backward_hooks,
            module._backward_pre_hooks,
        )
    ]
    hooks += [p._backward_hooks or () for p in network.parameters()]
    hooks += [optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks]
    hooks += [getattr(model, "_comm_hooks", ())]
    return sum(map(len, hooks))


def _detach(arguments: dict[str, Any], when: str) -> None:
    engine = _attached(arguments)
    _train(engine.model, engine.optimizer, range(3))
    mask = mask_dropping(engine.groups, *DROPPED)
    if when != "search":
        engine.truncate(mask)
        _train(engine.model, engine.optimizer, range(3, 6))
    if when == "ticket":
        engine.draw(mask)
        _train(engine.model, engine.optimizer, range(6, 9))
    assert _num_hooks(engine.model, engine.optimizer) > 0
    engine.model(random_images(8)).sum()
    model = engine.detach()
    assert model is engine.model
    assert _num_hooks(model, engine.optimizer) == 0
    fresh, optimizer = _fresh(engine, arguments)
    gradients = _train(model, engine.optimizer, range(9, 14))
    expected = _train(fresh, optimizer, range(9, 14))
    assert all(_equal(one, two) for one, two in zip(gradients, expected, strict=True))
    assert _equal(_bare(model).state_dict(), _bare(fresh).state_dict())


@pytest.mark.parametrize("when", ["search", "truncate", "ticket"])
@pytest.mark.parametrize(
    ("world_size", "arguments"),
    [(NO_GROUP, {}), (1, {}), (2, {}), (2, {"gradient_as_bucket_view": True})],
)
def test_after_detach_no_hook_is_left_and_training_is_plain(
    ranks: Ranks, world_size: int, arguments: dict[str, Any], when: str
) -> None:
    ranks(world_size, _detach, arguments, when)


def _whole_run() -> tuple[list[str], list[Any], dict[str, tuple[int, ...]]]:
    """Search, remove in stages and draw by verdict alone, as a user's loop does."""
    engine = _attached(
        {},
        search={"prune_ratio": 0.4, "window": 3, "l1": 0.01},
        truncation={"removal": {"duration": "10ba", "fade_steps": 2, "stage": 0.4}},
    )
    phases: list[str] = []
    verdicts = []
    for epoch in range(12):
        _train(engine.model, engine.optimizer, range(4 * epoch, 4 * epoch + 4))
        verdict = engine.check()
        phases.append(str(verdict.phase))
        verdicts.append(verdict)
        if verdict.stage or verdict.ticket:
            engine.draw()
    return phases, verdicts, {n: tuple(p.shape) for n, p in _bare(engine.model).named_parameters()}


@pytest.mark.parametrize("world_size", [NO_GROUP, 1, 2])
def test_a_whole_run_goes_through_its_phases_in_order(ranks: Ranks, world_size: int) -> None:
    results = ranks(world_size, _whole_run)
    phases, verdicts, shapes = results[0]
    assert all(result == results[0] for result in results)
    order = ["search", "truncate", "ticket"]
    assert sorted(phases, key=order.index) == phases and set(phases) == set(order)
    assert sum(verdict.elbow for verdict in verdicts) == 1
    assert sum(verdict.ticket for verdict in verdicts) == 1
    # 14 channels, int(0.4 * 14) of them gone.
    assert shapes["stem.weight"][0] + shapes["conv1.weight"][0] == 14 - 5
    # What has left after an epoch is a stage; the last ones leave in the second.
    elbow = phases.index("truncate")
    assert [n - elbow for n, verdict in enumerate(verdicts) if verdict.stage] == [1]
    assert [n - elbow for n, verdict in enumerate(verdicts) if verdict.ticket] == [2]


def _attach_where_it_cannot(how: str) -> None:
    network = Plain()
    optimizer = SGD(network.parameters(), lr=0.1)
    model: nn.Module = network
    if how == "hook":
        model = DistributedDataParallel(network)
        model.register_comm_hook(None, fp16_compress_hook)
    with pytest.raises(BackendError) as refusal:
        worm_dist.attach(model, optimizer, example_inputs=random_images(1))
    assert ("fp16_compress_hook" if how == "hook" else "wrap it in Distr") in str(refusal.value)
    assert not optimizer._optimizer_step_post_hooks and not network._forward_pre_hooks
    if how == "hook":
        config = WormConfig(truncation={"mode": "soft"})
        worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))


@pytest.mark.parametrize("how", ["hook", "bare"])
def test_a_taken_hook_or_a_bare_module_on_two_ranks_is_refused(ranks: Ranks, how: str) -> None:
    ranks(2, _attach_where_it_cannot, how)


@pytest.mark.parametrize("call", ["truncate", "draw"])
def test_a_mask_is_read_by_the_names_of_its_groups_not_by_their_order(call: str) -> None:
    """Equal dicts may differ in order; the channels of another group were dropped."""
    engine = _attached({})
    mask = mask_dropping(engine.groups, 0, 9)
    getattr(engine, call)(Mask(dict(reversed(list(mask.items())))))
    assert engine.mask == mask
    if call == "draw":
        stem, inner = (engine.model.get_parameter(f"{name}.weight") for name in ("stem", "conv1"))
        assert (stem.shape[0], inner.shape[0]) == (7, 5)


def _old_wrapper_is_collected() -> bool:
    engine = _attached({})
    old = weakref.ref(engine.model)
    _train(engine.model, engine.optimizer, range(2))
    engine.draw(mask_dropping(engine.groups, 0))
    gc.collect()
    return old() is None


def test_the_old_wrapper_is_not_kept_alive(ranks: Ranks) -> None:
    """It holds buckets as large as the dense network."""
    assert ranks(2, _old_wrapper_is_collected) == [True, True]


def _old_wrapper_after_a_draw() -> str:
    engine = _attached({})
    old = engine.model
    engine.draw(mask_dropping(engine.groups, 0))
    with pytest.raises(worm_dist.BackendError) as caught:
        old(random_images(2))
    return str(caught.value)


def test_the_old_wrapper_refuses_to_train_on(ranks: Ranks) -> None:
    """It ran without an error and averaged nothing: weights differed between ranks at once."""
    for text in ranks(2, _old_wrapper_after_a_draw):
        assert "call engine.model" in text


def _settings_that_differ() -> None:
    model = DistributedDataParallel(Residual())
    optimizer = SGD(model.parameters(), lr=0.1)
    steps_per_epoch = 10 + dist.get_rank()
    worm_dist.attach(
        model, optimizer, example_inputs=random_images(1), steps_per_epoch=steps_per_epoch
    )


def test_settings_that_differ_between_ranks_are_named_at_attach(ranks: Ranks) -> None:
    """Fades of different lengths ended in collectives that did not match."""
    for outcome in ranks.outcomes(2, _settings_that_differ):
        assert outcome.error == "DivergenceError"
        assert "setting of group steps_per_epoch: rank 1 differs" in outcome.text


def _copies_on_rank_zero_alone() -> None:
    engine = _attached({})
    network = engine.model.get_submodule("module")
    copies = [copy.deepcopy(network)] if dist.get_rank() == 0 else []
    engine.draw(mask_dropping(engine.groups, 0), copies=copies)


def test_copies_on_one_rank_alone_are_refused_on_all(ranks: Ranks) -> None:
    for outcome in ranks.outcomes(2, _copies_on_rank_zero_alone):
        assert outcome.error == "DivergenceError", str(outcome)
