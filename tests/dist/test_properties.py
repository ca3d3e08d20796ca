"""Over random networks, masks, optimizers and buckets: packed is exact, held is held."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop

import worm_dist
from tests.nets import random_images, randomise
from tests.ranks import Ranks
from worm_dist import Mask, WormConfig
from worm_dist.groups.freeze_plan import FreezePlan, Scope

pytestmark = pytest.mark.slow("trains random networks on real ranks")

OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01),
    "nesterov": lambda p: SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: Adam(p, lr=0.01, weight_decay=0.01),
    "adamw": lambda p: AdamW(p, lr=0.01, weight_decay=0.1),
    "rmsprop": lambda p: RMSprop(p, lr=0.005, momentum=0.9),
    "adagrad": lambda p: Adagrad(p, lr=0.05, weight_decay=0.01),
}


class _Chain(nn.Module):
    """Convolutions of random widths, some with a residual sum, and an unused layer."""

    def __init__(self, widths: list[int], residual: bool) -> None:
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for before, after in zip([3, *widths], widths):
            self.convs.append(nn.Conv2d(before, after, 3, padding=1, bias=bool(after % 2)))
            self.norms.append(nn.BatchNorm2d(after))
        self.again = nn.Conv2d(widths[-1], widths[-1], 1) if residual else None
        # Where it is unused it is as wide as nothing else, or other layers would stay dense for it.
        self.norm_again = nn.BatchNorm2d(widths[-1] if residual else 97)
        self.head = nn.Linear(widths[-1], 4)

    def forward(self, images: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            images = torch.relu(norm(conv(images)))
        if self.again is not None:
            images = torch.relu(images + self.norm_again(self.again(images)))
        logits: Tensor = self.head(images.mean(dim=(2, 3)))
        return logits


def _drops(groups: Any, seed: int, share: float) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for group in groups:
        kept = torch.rand(group.num_channels, generator=generator) >= share
        kept[int(torch.randint(group.num_channels, (1,), generator=generator))] = True
        keep[group.name] = kept
    return Mask(keep)


def _rows(network: nn.Module, plan: FreezePlan) -> list[Tensor]:
    return [
        parameter.detach().index_select(dim, places).clone()
        for parameter in network.parameters()
        if parameter in plan.blocks
        for dim, places in plan.blocks[parameter].frozen.items()
    ]


def _holds(cases: list[dict[str, Any]]) -> list[str]:
    """What is wrong, case by case; nothing, one hopes."""
    wrong = []
    for case in cases:
        torch.manual_seed(0)
        network = _Chain(case["widths"], case["residual"])
        randomise(network, seed=case["seed"])
        model = DistributedDataParallel(
            network, bucket_cap_mb=case["bucket_cap_mb"], find_unused_parameters=True
        )
        optimizer: Optimizer = OPTIMIZERS[case["optimizer"]](model.parameters())
        config = WormConfig(truncation={"frozen_weights": "hold", "scope": case["scope"]})
        example = random_images(1)
        engine = worm_dist.attach(model, optimizer, config, example_inputs=example)
        for generation in range(3):
            mask = _drops(engine.groups, case["seed"] + generation, case["share"])
            engine.truncate(mask)
            scope: Scope = case["scope"]
            plan = FreezePlan(network, engine.groups, ~mask.keep, scope)
            held = _rows(network, plan)
            for step in range(2):
                images = random_images(2, seed=100 * generation + 10 * step + dist.get_rank())
                wrong += _step(engine, network, plan, images)
            if not all(torch.equal(a, b) for a, b in zip(held, _rows(network, plan), strict=True)):
                wrong.append(f"{case}: held slices moved in generation {generation}")
    return wrong


def _step(engine: Any, network: nn.Module, plan: FreezePlan, images: Tensor) -> list[str]:
    network.zero_grad()
    network(images).square().mean().backward()
    expected = []
    for parameter in network.parameters():
        gradient = parameter.grad
        gradient = torch.zeros_like(parameter) if gradient is None else gradient.clone()
        gradient.mul_(1 / dist.get_world_size())
        dist.all_reduce(gradient)
        for dim, places in (
            plan.blocks[parameter].frozen.items() if parameter in plan.blocks else ()
        ):
            gradient.index_fill_(dim, places, 0)
        expected.append(gradient)
    engine.optimizer.zero_grad()
    engine.model(images).square().mean().backward()
    wrong = [
        f"gradient of {name} differs"
        for (name, parameter), gradient in zip(network.named_parameters(), expected, strict=True)
        if parameter.grad is not None and not torch.equal(parameter.grad, gradient)
    ]
    engine.optimizer.step()
    num_live = plan.num_live(network.parameters())
    if engine.traffic.sent_bytes != 4 * num_live:
        wrong.append(f"{engine.traffic.sent_bytes} bytes sent for {num_live} live elements")
    return wrong


CASES = st.fixed_dictionaries(
    {
        "widths": st.lists(st.integers(2, 7), min_size=1, max_size=3),
        "residual": st.booleans(),
        "seed": st.integers(0, 2**16),
        "share": st.sampled_from([0.0, 0.3, 0.6, 1.0]),
        "optimizer": st.sampled_from(sorted(OPTIMIZERS)),
        "scope": st.sampled_from(["norm", "producer", "coupled"]),
        "bucket_cap_mb": st.sampled_from([0.0001, 0.001, 25.0]),
    }
)


@settings(
    max_examples=8,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(cases=st.lists(CASES, min_size=4, max_size=4))
def test_packed_is_exact_and_held_is_held(ranks: Ranks, cases: list[dict[str, Any]]) -> None:
    outcomes = ranks.outcomes(2, _holds, cases)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
        assert outcome.value == []
