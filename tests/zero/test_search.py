"""The same search, truncation and ticket under DistributedDataParallel and ZeRO 0, 1, 2 and 3.

A loop as a user writes it, with checks and the penalty.  In fp32, without clipping and with one
pass a step all of them do the same sums, so everything is the same to the bit.
"""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, gated, random_images, randomise
from tests.ranks import Ranks
from tests.settings import at_once
from tests.zero.building import engine_around, settings_of, whole
from worm_dist import WormConfig

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank, many times")

_WAYS = ("DDP", "ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3", "ZeRO 3 late")
_BF16_WAYS = ("ZeRO 0 bf16", "ZeRO 1 bf16", "ZeRO 2 bf16", "ZeRO 3 bf16")
_PRESETS = ("worm", "worm-paper", "early-bird", "dense", "worm with gates")
_STEPS = 14


class _Run(NamedTuple):
    """Digests of weights and mask, the phase and the penalty after every step, and all weights
    after the last."""

    steps: list[tuple[str, ...]]
    weights: Tensor


class _Loop:
    """Two steps, then a check; a ticket is drawn when there is one.

    Args:
        way: wrapper and precision.
        preset: with or without gates.
    """

    def __init__(self, way: str, preset: str) -> None:
        torch.manual_seed(0)
        preset, _, network = preset.partition(" with ")
        self._network = gated() if network == "gates" else Residual()
        randomise(self._network, seed=3)
        self._optimizer = SGD(self._network.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
        self._is_ddp = way == "DDP"
        self._dtype = torch.bfloat16 if way.endswith("bf16") else torch.float32
        model: Any
        if self._is_ddp:
            model = DistributedDataParallel(self._network)
        else:
            bf16 = {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}
            settings = dict(bf16) if way.endswith("bf16") else {}
            if way.endswith("late"):  # also scales are gathered for a pass alone
                settings["zero_optimization"] = {"stage3_param_persistence_threshold": 0}
            settings = settings_of(int(way.split()[1]), **settings)
            model = engine_around(self._network, self._optimizer, settings)
        search = {"prune_ratio": 0.4, "every": "2ba", "window": 3, "settled": 0.3, "l1": 0.01}
        changes: dict[str, Any] = {"search": search}
        if preset == "worm":
            changes["truncation"] = {**at_once(2)}
        if preset == "worm-paper":
            search |= {"window": 4, "elbow": {"min_masks": 3}}
        if preset == "dense":
            changes = {}
        self.engine = worm_dist.attach(
            model,
            self._optimizer,
            WormConfig.preset(preset, **changes),
            example_inputs=random_images(1).to(self._dtype),
            steps_per_epoch=2,
        )

    def run(self) -> _Run:
        seen: list[tuple[str, ...]] = []
        engine = self.engine
        for number in range(_STEPS):
            images = random_images(4, seed=10 * number + dist.get_rank())
            logits = engine.model(images.to(self._dtype)).float()
            penalty = engine.penalty()
            loss = nn.functional.cross_entropy(logits, torch.arange(4)) + penalty
            if self._is_ddp:
                loss.backward()
                engine.optimizer.step()
                engine.optimizer.zero_grad()
            else:
                model: Any = engine.model
                model.backward(loss)
                model.step()
            if number % 2:
                verdict = engine.check()
                if verdict.ticket:
                    engine.draw()
            mask = "" if engine.mask is None else engine.mask.digest
            with whole(engine.model, self._network):
                digest = _digest(self._network)
            seen.append((digest, mask, str(engine.phase.value), f"{penalty.item():.9g}"))
        with whole(engine.model, self._network):
            weights = [p.detach().float().flatten() for p in self._network.parameters()]
            return _Run(seen, torch.cat(weights))


def _digest(network: nn.Module) -> str:
    digest = hashlib.sha256()
    for parameter in network.parameters():
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _all_ways() -> dict[tuple[str, str], _Run]:
    runs = [(way, preset) for preset in _PRESETS for way in _WAYS]
    runs += [(way, "worm") for way in _BF16_WAYS]
    return {(way, preset): _Loop(way, preset).run() for way, preset in runs}


Seen = list[dict[tuple[str, str], _Run]]


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    outcomes = Ranks(tmp_path_factory.mktemp("search")).outcomes(2, _all_ways)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize("way", _WAYS[1:])
@pytest.mark.parametrize("preset", _PRESETS)
def test_zero_finds_and_trains_the_same_as_ddp(everyone: Seen, preset: str, way: str) -> None:
    """With gates in stage 3 not to the bit: DeepSpeed replaces the linear layers by its own."""
    is_rounded = "gates" in preset and "ZeRO 3" in way
    for seen in everyone:
        zero, ddp = seen[way, preset], seen["DDP", preset]
        if is_rounded:
            assert [step[1:3] for step in zero.steps] == [step[1:3] for step in ddp.steps]
            torch.testing.assert_close(zero.weights, ddp.weights, rtol=1e-6, atol=1e-6)
        else:
            assert zero.steps == ddp.steps


def test_ranks_agree(everyone: Seen) -> None:
    first, second = everyone
    assert first.keys() == second.keys()
    for run, seen in first.items():
        assert seen.steps == second[run].steps


def test_stages_are_the_same_in_bf16(everyone: Seen) -> None:
    """Stage 0 is not: there DeepSpeed decays the master weights once more when it begins."""
    one, two, three = (everyone[0][f"ZeRO {stage} bf16", "worm"].steps for stage in (1, 2, 3))
    assert one == two == three


_PHASES = {
    "worm": ["search", "truncate", "ticket"],
    "worm-paper": ["search", "truncate", "ticket"],
    "early-bird": ["search", "ticket"],
    "dense": ["dense"],
    "worm with gates": ["search", "truncate", "ticket"],
}


@pytest.mark.parametrize(
    ("way", "preset"),
    [*(("ZeRO 2", preset) for preset in _PRESETS), *((way, "worm") for way in _BF16_WAYS)],
)
def test_the_runs_come_through_all_phases(everyone: Seen, way: str, preset: str) -> None:
    """Or the comparisons would say little."""
    steps = everyone[0][way, preset].steps
    assert list(dict.fromkeys(phase for _, _, phase, _ in steps)) == _PHASES[preset]
    assert (float(steps[0][-1]) > 0) == (preset != "dense"), "the penalty"
