"""Nothing of a draw, or of an engine that has been detached, is left in a process."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Outcome, Ranks
from tests.settings import at_once
from tests.zero.building import engine_around, import_deepspeed, settings_of, whole
from tests.zero.payload import Overheard
from worm_dist import WormConfig
from worm_dist.comm_hooks.patching import Patch

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank, many times")

_WIDTH = 48
_DRAWS = 10
_HOOKS = ("pre", "post")
_REPLACED = (
    "step",
    "allreduce_and_copy",
    "average_tensor",
    "allreduce_bucket",
    "gradient_reduction_w_predivide",
    "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads",
    "_post_step",
)


def _settings(stage: int, precision: str) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if precision == "bf16":
        settings = {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
    # Buckets that are no larger than the network, or they would be most of what is counted.
    buckets = {"reduce_bucket_size": 200_000, "allgather_bucket_size": 200_000}
    return settings_of(stage, zero_optimization=buckets, **settings)


def _around(network: nn.Module, stage: int, precision: str) -> Any:
    optimizer = AdamW(network.parameters(), lr=0.001)
    return engine_around(network, optimizer, _settings(stage, precision))


def _attach(model: Any, images: Tensor) -> worm_dist.Engine:
    config = WormConfig(truncation={"frozen_weights": "hold"})
    return worm_dist.attach(model, config=config, example_inputs=images, steps_per_epoch=4)


def _step(model: Any, images: Tensor) -> None:
    model.backward(model(images).float().square().mean())
    model.step()


def _bytes_of_tensors() -> int:
    """Of all tensors that anything in this process refers to."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in tensors if tensor.layout == torch.strided]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _num_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _draw_again_and_again(stage: int, precision: str) -> list[tuple[int, int, int, int]]:
    """After every draw: parameters, bytes of all tensors (first and last), open files, threads.

    As in many a loop, variables keep the first engine and its optimizer, here those of all draws.
    """
    network = Plain(_WIDTH, _WIDTH)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    images = random_images(2).to(dtype)
    model = _around(network, stage, precision)
    kept, seen = [], []
    for _ in range(_DRAWS):
        kept.append((model, model.optimizer))
        engine = _attach(model, images)
        _step(engine.model, images)
        mask = mask_dropping(engine.groups, 0, engine.groups.num_channels - 1)
        engine.truncate(mask)
        _step(engine.model, images)
        engine.draw(mask)
        _step(engine.model, images)
        model = engine.detach()
        del engine
        with whole(model, network):
            num_parameters = sum(p.numel() for p in network.parameters())
        num_bytes = _bytes_of_tensors() if len(kept) in (1, _DRAWS) else 0  # it takes a while
        seen.append((num_parameters, num_bytes, _num_files(), threading.active_count()))
    return seen


@pytest.mark.parametrize(("stage", "precision"), [(0, "bf16"), (2, "fp32"), (3, "fp32")])
def test_ten_draws_in_a_row_leave_nothing(ranks: Ranks, stage: int, precision: str) -> None:
    """A loop keeps what ``deepspeed.initialize`` returned in its variables; after a draw these held
    the dense network, its master weights and the buckets for as long as the training went on."""
    outcomes = ranks.outcomes(2, _draw_again_and_again, stage, precision)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
        seen = outcome.value
        (whole, before, *_), *_, (left, after, *_) = seen
        assert after < before
        assert (before - after) / (whole - left) > 8, "a weight and two moments, or halves of them"
        # A rank that ends first takes its connections along, so there may be fewer.
        _, _, files, threads = seen[1]
        assert all(mine[2] <= files and mine[3] <= threads for mine in seen[2:])


Left = dict[str, tuple[Any, Any]]


def _functions() -> dict[str, Any]:
    """Everything of DeepSpeed's that all engines of a process share and that is replaced in one."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    optimizers = stage_1_and_2.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3
    shared = (DeepSpeedEngine, *optimizers, stage_1_and_2, stage3)
    return {
        f"{owner.__name__}.{name}": thing for owner in shared for name, thing in vars(owner).items()
    }


def _own(model: Any) -> Counter[str]:
    """How many functions hang on an engine, its optimizer, its torch optimizer and its network."""
    inner = getattr(model.optimizer, "optimizer", model.optimizer)
    found = Counter({name: len(getattr(inner, f"_optimizer_step_{name}_hooks")) for name in _HOOKS})
    for owner in (model, model.optimizer):
        found.update(name for name in vars(owner) if name in _REPLACED)
    for module in model.module.modules():
        found["forward"] += len(module._forward_pre_hooks) + len(module._forward_hooks)
    for parameter in model.module.parameters():
        found["gradients"] += len(parameter._backward_hooks or ())
        found["gathers"] += isinstance(vars(parameter).get("all_gather_coalesced"), Patch)
    return +found  # without zeros


def _what_is_left(stage: int, reduce_scatter: bool) -> Left:
    """Own functions before and after engines were attached and detached."""
    deepspeed = import_deepspeed()
    assert deepspeed
    images = random_images(2)
    zero = {"reduce_scatter": reduce_scatter}
    network = Plain()
    optimizer = AdamW(network.parameters())
    model = engine_around(network, optimizer, settings_of(stage, zero_optimization=zero))
    shared, own = _functions(), _own(model)
    found: Left = {}

    engine = _attach(model, images)
    _step(model, images)
    engine.truncate(mask_dropping(engine.groups, 0, 9))
    _step(model, images)
    assert _own(model) > own, "nothing was there to be left"
    assert engine.detach() is model
    _step(model, images)
    found["detached"] = own, _own(model)

    engine = _attach(model, images)
    engine.draw(mask_dropping(engine.groups, 0, 9))
    _step(engine.model, images)
    model = engine.detach()
    _step(model, images)
    found["drawn and detached"] = own, _own(model)
    changed = {name for name, thing in _functions().items() if shared.get(name) is not thing}
    found["shared"] = set(), changed
    return found


_LEFT = ((0, True), (1, True), (2, False), (3, True))


def _what_all_leave() -> dict[tuple[int, bool], Left]:
    return {way: _what_is_left(*way) for way in _LEFT}


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    ranks = Ranks(tmp_path_factory.mktemp("left"))
    return ranks.outcomes(2, _what_all_leave)


@pytest.mark.parametrize("when", ["detached", "drawn and detached", "shared"])
@pytest.mark.parametrize("way", _LEFT, ids=str)
def test_no_function_of_ours_is_left(
    outcomes: list[Outcome], way: tuple[int, bool], when: str
) -> None:
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
        before, after = outcome.value[way][when]
        assert after == before


def _two_engines(stage: int) -> tuple[list[Tensor], list[Tensor], list[int]]:
    """Weights of an engine that trained alone and beside one that truncates, pass by pass and step
    by step in turns; and what it handed over in each of its steps."""
    overheard = Overheard()
    images = random_images(2)

    def second() -> Any:
        torch.manual_seed(1)
        return _around(Plain(8, 8), stage, "fp32")

    alone = second()
    for _ in range(4):
        _step(alone, images)
    beside = second()
    engine = _attach(_around(Plain(), stage, "fp32"), images)
    model: Any = engine.model
    handed_over = []
    for number in range(4):
        if number == 1:
            engine.truncate(mask_dropping(engine.groups, 0, 3, 9))
        model.backward(model(images).square().mean())
        overheard.take()
        beside.backward(beside(images).square().mean())
        reduced = overheard.take()
        model.step()
        overheard.take()
        beside.step()
        handed_over.append(reduced + overheard.take())
    weights: list[list[Tensor]] = []
    for one in (alone, beside):
        with whole(one, one.module):
            weights.append([p.detach().clone() for p in one.module.parameters()])
    return weights[0], weights[1], handed_over


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_another_engine_of_the_process_is_not_touched(ranks: Ranks, stage: int) -> None:
    for outcome in ranks.outcomes(2, _two_engines, stage):
        assert outcome.exitcode == 0, str(outcome)
        alone, beside, handed_over = outcome.value
        assert all(torch.equal(*pair) for pair in zip(alone, beside, strict=True))
        # In stage 3 the first steps compare the order of the layers, too.
        steady = handed_over[2:] if stage == 3 else handed_over
        assert len(set(steady)) == 1, "it sends as much as before the other one truncated"


def _detached_with_zeros() -> tuple[bool, bool]:
    """Whether weights that stay gathered had zeros that nobody has stored, before ``detach`` and
    after it."""
    images = random_images(2)
    network = Plain()
    model = _around(network, 3, "fp32")
    config = WormConfig(truncation=at_once(2), search={"l1": 0.0})
    engine = worm_dist.attach(model, config=config, example_inputs=images, steps_per_epoch=100)
    engine.truncate(mask_dropping(engine.groups, 0, 3, 9))
    for _ in range(6):
        _step(model, images)

    def read() -> list[Tensor]:
        with import_deepspeed().zero.GatheredParameters(list(network.parameters())):
            return [parameter.detach().clone() for parameter in network.parameters()]

    during = read()
    engine.detach()
    after = read()
    model.empty_partition_cache()
    stored = read()
    had_zeros, has_zeros = (
        any(not torch.equal(*pair) for pair in zip(found, stored, strict=True))
        for found in (during, after)
    )
    return had_zeros, has_zeros


def test_full_weights_are_read_after_detach(ranks: Ranks) -> None:
    """DeepSpeed keeps small weights gathered from one step to the next.  They had zeros for what no
    output depends on, and kept them after ``detach``, until the next step: a loop that saved them
    there saved zeros."""
    for outcome in ranks.outcomes(2, _detached_with_zeros):
        assert outcome.exitcode == 0, str(outcome)
        assert outcome.value == (True, False)
