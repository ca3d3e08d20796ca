"""The comparisons with the published rules can fail: each of them does where one detail of our rule
is another one."""

from __future__ import annotations
import __future__

import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import pytest
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from tests.papers import test_earlybert
from tests.papers import test_masks as masks
from tests.papers import test_training as training
from tests.papers.nets import EVEN
from tests.ranks import NO_GROUP, Ranks
from worm_dist.comm_hooks.grad_hooks import GradientHooks
from worm_dist.engine.penalty import Penalty
from worm_dist.groups.freeze_plan import FreezePlan
from worm_dist.presets import PRESETS
from worm_dist.search.budgets import Pool
from worm_dist.search.decision import decide
from worm_dist.search.elbow import _below_threshold, elbow_reached
from worm_dist.search.importance import ChannelScales, LayerScales
from worm_dist.search.ranking import Ranking
from worm_dist.search.select import select_channels
from worm_dist.search.window import Window

Mutation = Callable[[], AbstractContextManager[object]]


@contextmanager
def _changed(function: Any, old: str, new: str) -> Iterator[None]:
    """The function with another text in its body, wherever it has been imported."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} is not in {function.__qualname__} once"
    flags = __future__.annotations.compiler_flag
    there: dict[str, Any] = {}
    changed = compile(source.replace(old, new), "<changed>", "exec", flags)
    function = inspect.unwrap(function)  # a decorator's work stays
    exec(changed, dict(function.__globals__), there)
    original = function.__code__
    function.__code__ = inspect.unwrap(there[function.__name__]).__code__
    try:
        yield
    finally:
        function.__code__ = original


def _preset(name: str, part: str, key: str, value: object) -> AbstractContextManager[object]:
    return patch.dict(PRESETS[name][part], {key: value})


MASKS: Mapping[str, Mutation] = {
    "at the threshold it is kept": partial(
        _changed, select_channels, "compared[members] <= threshold", "compared[members] < threshold"
    ),
    "one position lower": partial(
        _changed,
        Pool.position,
        "int(num_channels * self.ratio)",
        "int(num_channels * self.ratio) - 1",
    ),
    "one position higher": partial(
        _changed,
        Pool.position,
        "int(num_channels * self.ratio)",
        "int(num_channels * self.ratio) + 1",
    ),
    "the exact product": partial(
        _changed,
        Pool.position,
        "int(num_channels * self.ratio)",
        "int(exact(self.ratio) * num_channels)",
    ),
    "signed": partial(_changed, LayerScales.__call__, "index.magnitudes()", "index.values()"),
    "a threshold for each norm": partial(_preset, "early-bird", "search", "threshold", "layer"),
    "a count": partial(_preset, "early-bird", "search", "selection", "count"),
    "a floor": partial(_preset, "early-bird", "search", "min_keep_ratio", 0.1),
    "a window of four": partial(_preset, "early-bird", "search", "window", 4),
    "a window without its oldest mask": partial(
        _changed, Window.__init__, "maxlen=length", "maxlen=length - 1"
    ),
}
"""By what is wrong: of masks and distances."""


@pytest.mark.parametrize("wrong", MASKS)
def test_other_masks_are_detected(wrong: str) -> None:
    with MASKS[wrong](), pytest.raises(AssertionError):
        masks.test_masks_and_distances_are_the_published_ones(EVEN, "early-bird")


EPOCHS: Mapping[str, Mutation] = {
    "a distance of s is not settled": partial(
        _changed, decide, "default=0) <= config.settled", "default=0) < config.settled"
    ),
    "a mean of s + delta is an elbow": partial(
        _changed, _below_threshold, "means[-1] < threshold", "means[-1] <= threshold"
    ),
    "settled by one mask less": partial(
        _changed, decide, "len(newest) == config.window - 1", "len(newest) >= config.window - 2"
    ),
    "an elbow by one mask less": partial(
        _changed, elbow_reached, "len(means) + 1 <", "len(means) + 2 <"
    ),
    "an elbow by one mask more": partial(
        _changed, elbow_reached, "len(means) + 1 <", "len(means) <"
    ),
    "the distance to the newest other mask alone": partial(
        _changed, decide, "max(newest, default=0)", "(newest or (0,))[-1]"
    ),
}
"""By what is wrong: of the epochs of elbow and ticket."""


@pytest.mark.parametrize("wrong", EPOCHS)
def test_other_epochs_are_detected(wrong: str) -> None:
    with EPOCHS[wrong](), pytest.raises(AssertionError):
        masks.test_the_ticket_and_the_elbow_come_at_the_published_epochs()


HEADS: Mapping[str, Mutation] = {
    "at the quantile it is kept": MASKS["at the threshold it is kept"],
    "one position higher": partial(
        _changed, Pool.position, "(num_channels - 1))", "(num_channels - 1)) + 1"
    ),
    "magnitudes": partial(
        _changed, ChannelScales.__call__, "index.values() if self._signed else ", ""
    ),
}
"""By what is wrong: of EarlyBERT's masks."""


@pytest.mark.parametrize("wrong", HEADS)
def test_other_heads_and_neurons_are_detected(wrong: str) -> None:
    with HEADS[wrong](), pytest.raises(AssertionError):
        test_earlybert.test_masks_of_random_coefficients(6)


@contextmanager
def _truncated_after_averaging() -> Iterator[None]:
    """Gradients are multiplied just before the optimizer's step, when they have been averaged."""
    in_force: list[tuple[FreezePlan, float]] = []

    def remember(hooks: GradientHooks, plan: FreezePlan, ratio: float) -> None:
        in_force[:] = [(plan, ratio)]

    def truncate(optimizer: Optimizer, args: object, kwargs: object) -> None:
        for plan, ratio in in_force:
            for parameter, block in plan.blocks.items():
                if any(parameter is p for g in optimizer.param_groups for p in g["params"]):
                    assert parameter.grad is not None
                    parameter.grad[block.frozen[0]] *= ratio

    handle = register_optimizer_step_pre_hook(truncate)
    try:
        with patch.object(GradientHooks, "set_plan", remember):
            yield
    finally:
        handle.remove()


WEIGHTS: Mapping[str, tuple[Mutation, int, str, str | None]] = {
    "the mask of the group": (
        partial(patch.object, Ranking, "dropped_scales", lambda self, kept: None),
        NO_GROUP,
        "resnet",
        "worm-paper",
    ),
    "another ratio": (
        partial(_preset, "worm-paper", "truncation", "ratio", 0.003001),
        NO_GROUP,
        "vgg",
        "worm-paper",
    ),
    "truncated after averaging": (_truncated_after_averaging, 2, "vgg", "worm-paper"),
    "the first mask after an epoch": (
        partial(_preset, "worm-paper", "search", "first", "after_first_interval"),
        NO_GROUP,
        "vgg",
        "worm-paper",
    ),
    "no penalty in the search": (
        partial(_changed, Penalty.term, "self._l1 * self._ranking", "0 * self._ranking"),
        NO_GROUP,
        "vgg",
        None,
    ),
}
"""By what is wrong: of the weights.  With the world size, network and variant of the comparison."""


def _differs(wrong: str) -> bool:
    mutation, _, kind, variant = WEIGHTS[wrong]
    with mutation():
        try:
            return bool(training._train(kind, variant)["wrong"])
        except AssertionError:
            return True


@pytest.mark.parametrize("wrong", WEIGHTS)
def test_other_weights_are_detected(ranks: Ranks, wrong: str) -> None:
    world_size = WEIGHTS[wrong][1]
    if world_size == NO_GROUP:
        assert _differs(wrong)
    else:
        assert any(ranks(world_size, _differs, wrong))


def test_a_ticket_that_is_retrained_without_penalty_is_detected() -> None:
    with _changed(Penalty.follow_ticket, 'self._until == "end"', "False"):
        assert training._retrain()


def test_without_a_change_the_comparisons_hold() -> None:
    """The changes above have left nothing behind."""
    masks.test_masks_and_distances_are_the_published_ones(EVEN, "early-bird")
    assert training._train("vgg", "worm-paper")["wrong"] == training._retrain() == []
