"""What is forecast for a ticket is what the engine came to when it drew that ticket."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import random_images
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import Mask, WormConfig
from worm_dist.groups.flops import count_flops
from worm_dist.groups.gates import gated
from worm_dist.models import build_model
from worm_dist.planning.forecast import forecast, members_of
from worm_dist.planning.step_time import Link
from worm_dist.planning.target import Target
from worm_dist.training.evaluation import count_parameters

pytestmark = pytest.mark.slow("forecasts beside whole engines, ten seconds")

SHAPE = (1, 8, 8)
FADE = {"truncation": {**at_once(2)}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "vgg_small": ("vgg_small", FADE),
    "resnet20": ("resnet20", FADE),
    "held columns": ("resnet20", {"truncation": {"frozen_weights": "hold", "scope": "coupled"}}),
    "rounded": ("vgg_small", {"truncation": {**at_once(2), "compression": "bf16"}}),
    "gated": ("vit_small", FADE),
    "ranked by weights": ("vit_small", FADE | {"search": {"importance": "weight_norm"}}),
}


def _run(name: str, config: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Truncate with a mask, fade if the settings say so, draw; what was sent in each step."""
    torch.manual_seed(0)
    sample = torch.zeros(1, *SHAPE)
    worm = WormConfig(**config)
    model = DistributedDataParallel(gated(build_model(name, 10, SHAPE[0]), worm.search))
    optimizer = SGD(model.parameters(), lr=0.05)
    engine = worm_dist.attach(model, optimizer, worm, example_inputs=sample, steps_per_epoch=4)
    keep = {name: torch.rand(size) < 0.5 for name, size in engine.groups.sizes.items()}
    for kept in keep.values():
        kept[0] = True
    mask = Mask(keep)
    engine.truncate(mask)
    sent = []
    for step in range(5):
        if step == 4:
            engine.draw(mask)
        inputs = random_images(4, channels=1, seed=2 * step + dist.get_rank())
        engine.model(inputs).square().mean().backward()
        engine.optimizer.step()
        engine.optimizer.zero_grad()
        sent.append(engine.traffic.sent_bytes)
    if dist.get_rank() == 0:
        engine.save_ticket(folder)
    network = engine.model.get_submodule("module")
    return {
        "sent": sent,
        "dense_bytes": engine.traffic.dense_bytes,
        "parameters": count_parameters(network),
        "flops": count_flops(network, sample),
        "digest": mask.digest,
    }


@pytest.mark.parametrize("case", list(CASES))
def test_it_is_what_the_engine_comes_to(case: str, ranks: Ranks, tmp_path: Path) -> None:
    name, config = CASES[case]
    came_to = ranks(2, _run, name, config, tmp_path / "ticket")[0]
    target = Target(name, SHAPE, 10, WormConfig(**config))
    found = forecast(target, tmp_path / "ticket", None, None)
    total = {stage: costs.total for stage, costs in found.costs.items()}

    assert found.mask.digest == came_to["digest"]
    assert total["dense"].payload_bytes == came_to["dense_bytes"]
    assert total["ticket"].parameters == came_to["parameters"]
    assert total["ticket"].flops == came_to["flops"]
    first, *_, last, ticket = came_to["sent"]
    assert total["ticket"].payload_bytes == ticket
    assert total["truncated"].payload_bytes == first
    assert total["faded" if "faded" in total else "truncated"].payload_bytes == last
    assert ("faded" in total) == (case != "held columns")
    # A gate is folded into the weights at the draw; until then it is sent along.
    num_gates = sum(int(found.mask[group.name].sum()) for group in found.groups if group.gates)
    assert (num_gates > 0) == (case == "gated")
    if "faded" in total:
        assert total["faded"].payload_bytes == ticket + 4 * num_gates


@pytest.mark.parametrize("mode", ["soft", "off"])
def test_where_nothing_freezes_nothing_leaves_before_the_draw(mode: str) -> None:
    config = WormConfig(truncation={"mode": mode})
    found = forecast(Target("vgg_small", SHAPE, 10, config), None, None, None)
    assert list(found.costs) == ["dense", "ticket"]


def test_without_a_ticket_every_group_loses_the_same_share() -> None:
    config = WormConfig(search={"prune_ratio": 0.25})
    found = forecast(Target("vgg_small", SHAPE, 10, config), None, None, None)
    for group in found.groups:
        assert int(found.mask[group.name].sum()) == 0.75 * group.num_channels
    # Of a layer between two groups 9/16 are left.
    dense, ticket = (found.costs[stage].groups["features.7"] for stage in ("dense", "ticket"))
    assert dense.flops * 9 == ticket.flops * 16
    assert found.others == ("head",)


def test_heads_and_neurons_are_groups_and_what_reads_them_is_not() -> None:
    found = forecast(Target("vit_small", SHAPE, 10, WormConfig()), None, None, None)
    assert [group.num_channels for group in found.groups] == 4 * [6, 192]
    first, second, *_ = map(members_of, found.groups)
    layer = "encoder.layers.encoder_layer_0"
    assert first == {
        "producers": [f"{layer}.self_attention"],
        "norms": [],
        "gates": [f"{layer}.self_attention.out_proj"],
        "consumers": [f"{layer}.self_attention.out_proj"],
    }
    assert second["producers"] == [f"{layer}.mlp.0"] and second["gates"] == [f"{layer}.mlp.3"]
    assert found.others[:2] == ("class_token", "conv_proj")
    of_layer = [name.removeprefix(f"{layer}.") for name in found.others if layer in name]
    assert of_layer == ["ln_1", "self_attention.out_proj", "ln_2", "mlp.3"]
    rest = found.costs["dense"].rest
    assert rest.parameters == sum(
        p.numel()
        for name, p in found.target.build().named_parameters()
        if "in_proj" not in name and "mlp.0" not in name
    )


def test_what_the_settings_leave_dense_is_not_searched() -> None:
    search: dict[str, Any] = {"dense": ["features.7"], "importance": "norm_scale"}
    found = forecast(Target("vgg_small", SHAPE, 10, WormConfig(search=search)), None, None, None)
    assert "features.7" not in found.groups.sizes and "features.7" in found.others
    assert found.groups.dense == {"features.8": "search.dense has 'features.7'"}


def test_the_time_of_a_step_is_between_both_at_once_and_one_after_the_other() -> None:
    link = Link.parse(4, "8Mbit/s")
    found = forecast(Target("vgg_small", SHAPE, 10, WormConfig()), None, link, 8)
    assert found.estimate is not None and not dist.is_initialized()
    steps = found.estimate.steps
    assert list(steps) == list(found.costs)
    for stage, step in steps.items():
        payload_bytes = found.costs[stage].total.payload_bytes
        assert step.communication_seconds == pytest.approx(1.5 * payload_bytes / 1e6)
        assert step.shortest_seconds == max(step.compute_seconds, step.communication_seconds)
        assert step.longest_seconds == step.compute_seconds + step.communication_seconds
    # Frozen channels are still computed; a drawn network is measured itself.
    measured = found.estimate.measured
    dense, ticket = (8 / measured.num_samples * seconds for seconds in measured.seconds)
    computing = [step.compute_seconds for step in steps.values()]
    assert computing == [dense, dense, dense, ticket] and min(dense, ticket) > 0
    assert found.estimate.measured.rounds >= 3


def test_remarks_say_what_the_figures_leave_out() -> None:
    def remarks(**truncation: Any) -> str:
        config = WormConfig(truncation=truncation)
        return " ".join(forecast(Target("vgg_small", SHAPE, 10, config), None, None, None).remarks)

    assert remarks() == ""
    assert "PowerSGD" in remarks(compression="powersgd")
    assert "fp16" in remarks(compression="fp16")


def test_a_remark_says_that_norms_of_a_group_need_not_agree() -> None:
    for name, several in (("vgg_small", False), ("resnet20", True)):
        config = WormConfig(search={"grouping": "layer"})
        found = forecast(Target(name, SHAPE, 10, config), None, None, None)
        assert ("disagree in a run" in " ".join(found.remarks)) == several
