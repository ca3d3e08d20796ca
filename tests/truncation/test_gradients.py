from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim import SGD

import worm_dist
from tests.gradients import gradient
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from worm_dist import Engine, WormConfig


def _attached(l1: float = 0.0, **truncation: object) -> Engine:
    network = Residual()
    randomise(network, seed=3)
    config = WormConfig(search={"l1": l1}, truncation=truncation)
    optimizer = SGD(network.parameters(), lr=0.1)
    return worm_dist.attach(
        network, optimizer, config, example_inputs=random_images(1), steps_per_epoch=10
    )


def _gradients(engine: Engine, passes: int = 1) -> dict[str, Tensor]:
    engine.optimizer.zero_grad()
    for number in range(passes):
        (engine.model(random_images(8, seed=number)).square().sum() + engine.penalty()).backward()
    return {name: gradient(p).clone() for name, p in engine.model.named_parameters()}


def test_soft_truncation_scales_the_norms_of_dropped_channels_and_nothing_else() -> None:
    engine = _attached(mode="soft", ratio=0.003)
    engine.model.eval()  # so that both passes see the same statistics
    before = _gradients(engine)
    engine.truncate(mask_dropping(engine.groups, 1, 9))
    after = _gradients(engine)
    for name, scaled in after.items():
        factor = torch.ones(scaled.shape[0])
        if name.startswith(("bn0", "bn2")):
            factor[1] = 0.003
        if name.startswith("bn1"):
            factor[1] = 0.003
        view = factor.view(-1, *[1] * (scaled.dim() - 1))
        assert torch.equal(scaled, before[name] * view), name
    assert engine.check().live_fraction == 1


def test_accumulated_passes_are_truncated_once_each() -> None:
    engine = _attached(mode="soft", ratio=0.25)
    engine.model.eval()
    dense = _gradients(engine, passes=3)
    engine.truncate(mask_dropping(engine.groups, 1))
    torch.testing.assert_close(
        _gradients(engine, passes=3)["bn0.weight"][1], dense["bn0.weight"][1] * 0.25
    )


def test_hard_truncation_writes_zeros_even_over_infinities() -> None:
    engine = _attached(mode="hard", frozen_weights="hold")
    engine.truncate(mask_dropping(engine.groups, 1))
    scale = engine.model.get_parameter("bn0.weight")
    scale.grad = None
    scale.backward(torch.full((8,), float("inf")))
    assert gradient(scale)[1] == 0
    assert gradient(scale)[0] == float("inf")


def test_the_next_generation_replaces_the_last() -> None:
    engine = _attached(mode="hard", frozen_weights="hold", scope="norm")
    engine.truncate(mask_dropping(engine.groups, 1))
    engine.truncate(mask_dropping(engine.groups, 2))
    gradient = _gradients(engine)["bn0.weight"]
    assert gradient[2] == 0 and gradient[1] != 0
    assert all(len(p._backward_hooks or ()) <= 1 for p in engine.model.parameters())


def test_detach_takes_every_hook_away() -> None:
    engine = _attached(mode="soft")
    engine.truncate(mask_dropping(engine.groups, 1))
    network = engine.detach()
    assert not any(p._backward_hooks for p in network.parameters())
    assert isinstance(network, nn.Module) and not network._forward_pre_hooks


def test_soft_truncation_with_ratio_one_changes_nothing() -> None:
    """The penalty went through the loss, and once more by hand."""
    trained = []
    for truncates in (False, True):
        torch.manual_seed(0)
        engine = _attached(l1=0.1, mode="soft", ratio=1.0)
        if truncates:
            engine.truncate(mask_dropping(engine.groups, 1, 9))
        _gradients(engine)
        engine.optimizer.step()
        trained.append(engine.model.state_dict())
    assert all(torch.equal(value, trained[1][key]) for key, value in trained[0].items())
