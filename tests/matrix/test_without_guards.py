"""What goes wrong without the guards, and by how much: the reason that they are there."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam, Optimizer

import worm_dist
from tests.gradients import gradient
from tests.nets import Residual, random_images, randomise
from tests.oracles import live_flags, mask_dropping, zero_frozen
from tests.ranks import Ranks
from worm_dist import Engine, WormConfig
from worm_dist.distributed.collectives import ProcessGroupComm

DROPPED = (0, 3, 9)
STEPS_BEFORE, STEPS_FROZEN = 4, 10

# ---- zero gradients alone ------------------------------------------------------------------------


def _stays(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    return weight


def _momentum_runs_on(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """0.9 + 0.9² + ... of the last step, which is what the buffer holds."""
    return weight - 0.05 * state["momentum_buffer"] * sum(0.9**k for k in range(1, 11))


def _decays(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    return weight * (1 - 0.05 * 0.01) ** STEPS_FROZEN


def _adam_runs_on(weight: Tensor, state: dict[str, Tensor]) -> Tensor:
    """Both moments decay, the first one faster; their quotient shrinks slowly."""
    for k in range(1, STEPS_FROZEN + 1):
        first = state["exp_avg"] * 0.9**k / (1 - 0.9 ** (STEPS_BEFORE + k))
        second = state["exp_avg_sq"] * 0.999**k / (1 - 0.999 ** (STEPS_BEFORE + k))
        weight = weight - 0.01 * first / (second.sqrt() + 1e-8)
    return weight


Make = Callable[[nn.Module], Optimizer]
Where = Callable[[Tensor, dict[str, Tensor]], Tensor]
OPTIMIZERS: dict[str, tuple[Make, Where]] = {
    "plain": (lambda n: SGD(n.parameters(), lr=0.05), _stays),
    "momentum": (lambda n: SGD(n.parameters(), lr=0.05, momentum=0.9), _momentum_runs_on),
    "weight decay": (lambda n: SGD(n.parameters(), lr=0.05, weight_decay=0.01), _decays),
    "adam": (lambda n: Adam(n.parameters(), lr=0.01), _adam_runs_on),
}


def _engine(make: Make) -> Engine:
    """In double precision, so that the sums below are exact enough to be told apart."""
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=3)
    network.double()
    config = WormConfig(truncation={"frozen_weights": "hold"})
    example = random_images(1).double()
    return worm_dist.attach(network, make(network), config, example_inputs=example)


def _backward(network: nn.Module, optimizer: Optimizer, step: int) -> None:
    optimizer.zero_grad()
    classes = torch.arange(8) % 10
    images = random_images(8, seed=step).double()
    nn.functional.cross_entropy(network(images), classes).backward()


class _Frozen:
    """The frozen slices of every parameter that has some, with and without the engine's guard.

    Attributes:
        start: at the freeze.
        last_step: what the last step before it did to them.
        expected: where the formula says that they are after ten steps of zero gradients.
        end: where they are.
    """

    def __init__(self, name: str, guarded: bool) -> None:
        make, where = OPTIMIZERS[name]
        engine = _engine(make)
        network, optimizer = engine.model, engine.optimizer
        mask = mask_dropping(engine.groups, *DROPPED)
        flags = live_flags(network, engine.groups, ~mask.keep, "producer")

        def frozen() -> dict[str, Tensor]:
            named = network.named_parameters()
            return {n: p.detach()[~flags[n]] for n, p in named if not bool(flags[n].all())}

        for step in range(STEPS_BEFORE):
            before = frozen()
            _backward(network, optimizer, step)
            optimizer.step()
        self.start = frozen()
        self.last_step = {name: value - before[name] for name, value in self.start.items()}
        self.expected = {}
        for key, value in self.start.items():
            state = optimizer.state[network.get_parameter(key)].items()
            moments = {k: v[~flags[key]] for k, v in state if isinstance(v, Tensor) and v.dim()}
            self.expected[key] = where(value, moments)
        if guarded:
            engine.truncate(mask)
        for step in range(STEPS_BEFORE, STEPS_BEFORE + STEPS_FROZEN):
            _backward(network, optimizer, step)
            zero_frozen(network, flags)
            optimizer.step()
        self.end = frozen()

    def moved(self, key: str) -> float:
        return float((self.end[key] - self.start[key]).norm())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_zero_gradients_alone_do_not_hold(name: str) -> None:
    """In ten steps momentum carries frozen slices on by 5.9 times their last step, Adam by 5.1
    times; decay takes half a percent of them.  Only plain SGD leaves them where they are."""
    frozen = _Frozen(name, guarded=False)
    assert len(frozen.end) == 3 + 2 * 3  # convolutions, scales, shifts
    for key, value in frozen.end.items():
        torch.testing.assert_close(value, frozen.expected[key], rtol=1e-9, atol=1e-12)
        in_last_steps = frozen.moved(key) / float(frozen.last_step[key].norm())
        share = frozen.moved(key) / float(frozen.start[key].norm())
        if name == "plain":
            assert frozen.moved(key) == 0
        elif name == "momentum":
            assert in_last_steps == pytest.approx(5.862, rel=1e-3)
        elif name == "weight decay":
            assert share == pytest.approx(0.00499, rel=1e-2)
        else:
            assert in_last_steps == pytest.approx(5.0836, rel=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_engine_holds_bit_for_bit(name: str) -> None:
    frozen = _Frozen(name, guarded=True)
    for key, value in frozen.end.items():
        assert torch.equal(value, frozen.start[key]), key


# ---- masks of one size that are not one mask -----------------------------------------------------


def _train_by_different_masks() -> tuple[Tensor, Tensor, Tensor]:
    """Rank 0 freezes channel 0, rank 1 freezes channel 1, and nobody compares."""
    ProcessGroupComm.assert_equal = lambda self, parts, when: None  # type: ignore[method-assign]
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=3)
    model = DistributedDataParallel(network)
    optimizer = SGD(model.parameters(), lr=0.05)
    config = WormConfig(truncation={"frozen_weights": "hold"})
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    engine.truncate(mask_dropping(engine.groups, dist.get_rank()))
    images = random_images(4, seed=dist.get_rank())
    with model.no_sync():
        model(images).square().mean().backward()
    own = gradient(network.stem.weight).clone()
    optimizer.zero_grad()
    model(images).square().mean().backward()
    averaged = gradient(network.stem.weight).clone()
    optimizer.step()
    return own, averaged, network.stem.weight.detach().clone()


def test_without_the_digest_other_channels_are_added_up_and_nobody_is_told(ranks: Ranks) -> None:
    """Both pack seven rows, so the backend sees nothing.  What rank 0 takes for its row 1 is the
    mean of its row 1 and of rank 1's row 0; after one step the two networks are not the same."""
    (own, averaged, weight), (others_own, others_averaged, others_weight) = ranks(
        2, _train_by_different_masks
    )
    right = (own[1] + others_own[1]) / 2
    wrong = (own[1] + others_own[0]) / 2
    assert torch.equal(averaged[1], wrong) and torch.equal(others_averaged[0], wrong)
    assert (averaged[1] - right).norm() > 0.1 * right.norm()
    assert torch.equal(averaged[2:], (own[2:] + others_own[2:]) / 2)  # these happen to be aligned
    assert not torch.equal(weight[:2], others_weight[:2])
