"""PowerSGD of what lives, against torch's own hook on buckets of exactly the live elements."""

# No postponed annotations here: torch reads a hook's, and wants classes, not strings.

import copy
import math
from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import LinearLR

import worm_dist
from tests.nets import Plain, Residual, random_images, randomise
from tests.oracles import live_flags, mask_dropping
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import Engine, WormConfig

pytestmark = pytest.mark.slow("trains with PowerSGD on two and three ranks")

DENSE: tuple[int, ...] = ()
GENERATIONS = [DENSE, (0, 3, 9), (3, 4, 10, 12), (0, 1)]  # channels 0, 9, 4, ... thaw again
DRAWN = (-1,)
STEPS_EACH = 4
STEM = tuple(range(8))
INNER = tuple(range(8, 14))
"""All channels of the two groups of ``Residual``."""


class _Bucket:
    """What torch's hook asks of a bucket."""

    def __init__(self, bucket: GradBucket, buffer: Tensor, gradients: list[Tensor]) -> None:
        self.index, self.is_last = bucket.index, bucket.is_last
        self.buffer = lambda: buffer
        self.gradients = lambda: gradients


class TorchsOwn:
    """torch's hook, given the live elements, which boolean flags pick out of every bucket.

    What it leaves out is kept for whole buckets, zero where nothing lives.
    """

    def __init__(self, rank: int) -> None:
        self.flags: dict[Tensor, Tensor] = {}
        self._left_out: dict[int, Tensor] = {}
        self._lived: dict[int, Tensor] = {}
        self._state = PowerSGDState(
            None,
            matrix_approximation_rank=rank,
            start_powerSGD_iter=2,
            orthogonalization_epsilon=1e-8,
        )

    def average(self, bucket: GradBucket) -> None:
        state, index, whole = self._state, bucket.index(), bucket.buffer()
        flags = [
            self.flags.get(p, torch.ones(p.shape, dtype=torch.bool)) for p in bucket.parameters()
        ]
        lives = torch.cat([flag.flatten() for flag in flags])
        buffer = whole[lives]
        parts = buffer.split([int(flag.sum()) for flag in flags])
        live = _Bucket(
            bucket,
            buffer,
            [
                part.view([len(places.unique()) for places in flag.nonzero().T])
                for part, flag in zip(parts, flags, strict=True)
                if part.numel() > 0
            ],
        )
        if index in self._left_out:
            state.error_dict[index] = self._left_out[index][lives]
            if not torch.equal(lives, self._lived[index]):
                state.p_memory_dict.pop(index, None)
                state.q_memory_dict.pop(index, None)
        if buffer.numel() > 0:
            powerSGD_hook(state, live).wait()
        else:
            state.maybe_increase_iter(live)
        if index in state.error_dict:
            self._left_out[index] = torch.zeros_like(whole)
            self._left_out[index][lives] = state.error_dict[index]
            self._lived[index] = lives
        whole.zero_()
        whole[lives] = buffer


def _torchs_own(torchs: TorchsOwn, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    torchs.average(bucket)
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _engine(rank: int = 1, rule: str = "hold", **changes: Any) -> Engine:
    torch.manual_seed(0)
    network: nn.Module = Residual()
    randomise(network, seed=3)
    arguments = changes.pop("wrapper", {})
    truncation = {
        "compression": "powersgd",
        "compression_rank": rank,
        "frozen_weights": rule,
        **changes,
    }
    model = DistributedDataParallel(network, **arguments)
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    config = WormConfig(truncation=truncation)
    return worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))


def _images(step: int) -> Tensor:
    return random_images(8, seed=step * dist.get_world_size() + dist.get_rank())


def _backward(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Gradients by name."""
    model.zero_grad()
    model(images).square().mean().backward()
    network = getattr(model, "module", model)
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def _num_sent(flags: Tensor, exact: bool, rank: int) -> int:
    """Elements sent for the block that lives: two thin matrices, if they halve it."""
    num_live = int(flags.sum())
    if exact or flags.dim() == 1 or num_live == 0:
        return num_live
    rows, columns = int(flags.flatten(1).any(1).sum()), int(flags.any(0).sum())
    thin = (rows + columns) * min(rows, columns, rank)
    return thin if 2 * thin < num_live else num_live


def _count_bytes(counted: list[int]) -> None:
    """Add what this process hands to all-reduces from now on to the last item."""
    all_reduce = dist.all_reduce

    def counting(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        counted[-1] += tensor.numel() * tensor.element_size()
        return all_reduce(tensor, *args, **kwargs)

    dist.all_reduce = counting


def _side_by_side(
    stages: list[tuple[int, ...]], scope: str, rank: int, arguments: dict[str, Any]
) -> tuple[list[str], list[tuple[int, int, int]]]:
    """What differs; for every step the bytes that the engine counts, that are handed over, and that
    should be.  Every stage is a few steps with these channels frozen, or after a draw."""
    engine = _engine(rank, scope=scope, wrapper=arguments)
    groups = engine.groups
    handed_over: list[int] = [0]
    _count_bytes(handed_over)
    differences, sent = [], []

    def other() -> tuple[DistributedDataParallel, TorchsOwn]:
        torchs = TorchsOwn(rank)
        plain = DistributedDataParallel(copy.deepcopy(engine.model.module), **arguments)
        plain.register_comm_hook(torchs, _torchs_own)
        return plain, torchs

    network = engine.model.get_submodule("module")
    plain, torchs = other()
    flags = {n: torch.ones_like(p, dtype=torch.bool) for n, p in network.named_parameters()}
    num_passes = 0
    for stage in stages:
        if stage == DRAWN:
            engine.draw(mask_dropping(groups, 0, 1))
            plain, torchs = other()
            flags = {n: torch.ones_like(p, dtype=torch.bool) for n, p in network.named_parameters()}
            num_passes = 0
        else:
            mask = mask_dropping(groups, *stage)
            engine.truncate(mask)
            flags = live_flags(network, groups, ~mask.keep, scope)
            torchs.flags = {plain.module.get_parameter(name): f for name, f in flags.items()}
        held = {name: p.detach().clone() for name, p in network.named_parameters()}
        for _ in range(STEPS_EACH):
            plain.module.load_state_dict(network.state_dict())
            expected = _backward(plain, _images(engine.step))
            handed_over.append(0)
            gradients = _backward(engine.model, _images(engine.step))
            differences += [
                f"{stage}: {name} in step {engine.step}"
                for name, gradient in gradients.items()
                if not torch.equal(gradient, expected[name])
            ]
            engine.optimizer.step()
            exact = num_passes < 2
            numel = sum(_num_sent(flag, exact, rank) for flag in flags.values())
            sent.append((engine.traffic.sent_bytes, handed_over[-1], 4 * numel))
            num_passes += 1
        differences += [
            f"{stage}: {name} was not held"
            for name, p in network.named_parameters()
            if not torch.equal(p[~flags[name]], held[name][~flags[name]])
        ]
    return differences, sent


@pytest.mark.parametrize(
    ("rank", "arguments"),
    [
        (1, {}),
        (1, {"bucket_cap_mb": 0.001, "gradient_as_bucket_view": True}),
        (2, {"bucket_cap_mb": 0.001}),
    ],
)
def test_with_nothing_frozen_it_is_torchs_own_before_and_after_a_draw(
    ranks: Ranks, rank: int, arguments: dict[str, Any]
) -> None:
    stages = [DENSE, DRAWN]
    for differences, sent in ranks(2, _side_by_side, stages, "producer", rank, arguments):
        assert not differences
        assert all(counted == handed_over == should for counted, handed_over, should in sent)
        # Two exact passes of a new wrapper, then little.
        dense, drawn = sent[:STEPS_EACH], sent[STEPS_EACH:]
        assert [bytes_ == dense[0] for bytes_ in dense] == [True, True, False, False]
        assert [bytes_ == drawn[0] for bytes_ in drawn] == [True, True, False, False]


@pytest.mark.parametrize("scope", ["producer", "coupled"])
@pytest.mark.parametrize("cap", [0.001, None], ids=["tiny", "default"])
def test_what_is_left_out_stays_with_its_elements_while_others_freeze_and_thaw(
    ranks: Ranks, cap: float | None, scope: str
) -> None:
    arguments = {} if cap is None else {"bucket_cap_mb": cap}
    for differences, sent in ranks(2, _side_by_side, GENERATIONS, scope, 1, arguments):
        assert not differences
        assert all(counted == handed_over == should for counted, handed_over, should in sent)


def test_it_is_torchs_own_on_three_ranks(ranks: Ranks) -> None:
    """Both send the same elements in the same order, so that even a ring adds alike."""
    for differences, _ in ranks(3, _side_by_side, GENERATIONS[:3], "producer", 1, {}):
        assert not differences


@pytest.mark.parametrize("group", [STEM, INNER], ids=["last", "other"])
def test_a_bucket_in_which_nothing_lives_is_not_sent_and_counts(
    ranks: Ranks, group: tuple[int, ...]
) -> None:
    """The last bucket of a pass counts the passes: where it did not, because nothing lived in it,
    gradients would be averaged exactly for ever.  What thaws again has nothing left out."""
    arguments = {"bucket_cap_mb": 0.0001}
    stages = [group, DENSE, group, DENSE]
    for differences, sent in ranks(2, _side_by_side, stages, "producer", 1, arguments):
        assert not differences
        assert all(counted == handed_over == should for counted, handed_over, should in sent)
        assert sent[2][0] < sent[1][0]


def _behind_faded_channels() -> tuple[list[bool], list[int]]:
    """Whether all weights are finite, and bytes sent, in every step."""
    engine = _engine(rule="remove", **at_once(2))
    engine.truncate(mask_dropping(engine.groups, *INNER))
    finite, sent = [], []
    for _ in range(8):
        _backward(engine.model, _images(engine.step))
        engine.optimizer.step()
        finite.append(all(bool(p.isfinite().all()) for p in engine.model.parameters()))
        sent.append(engine.traffic.sent_bytes)
    return finite, sent


def test_a_layer_behind_channels_that_have_all_faded_stays_finite(ranks: Ranks) -> None:
    """Its gradient is all zeros for a step, until its columns have left the payload.  torch's
    default divides by the length of a vector of zeros, and the weights became NaN."""
    for finite, sent in ranks(2, _behind_faded_channels):
        assert all(finite)
        assert sent[-1] < sent[2]  # compressed first, then without the columns


def _one_dark_pass() -> list[float]:
    """Length of the stem's gradient in every pass; the images of the third are black."""
    engine = _engine()
    lengths = []
    for number in range(8):
        images = _images(number)
        gradients = _backward(engine.model, images.zero_() if number == 2 else images)
        lengths.append(float(gradients["stem.weight"].norm()))
    return lengths


def test_a_matrix_that_was_zero_once_lives_again(ranks: Ranks) -> None:
    """A gradient of zeros has thin matrices of zeros, and these are what the next approximation
    begins with: it was zero, too, and so was every one after it."""
    for lengths in ranks(2, _one_dark_pass):
        assert lengths[2] == 0
        assert min(lengths[3:]) > 0.1 * lengths[0], lengths


def _one_overflow() -> list[dict[str, Tensor]]:
    """Gradients of every pass; one of rank 1's is infinite in the fourth."""
    engine = _engine()
    engine.truncate(mask_dropping(engine.groups, *GENERATIONS[1]))
    network = engine.model.get_submodule("module")
    assert isinstance(network, Residual)
    found = []
    for number in range(8):
        poisoned = dist.get_rank() == 1 and number == 3
        factor = torch.full_like(network.conv2.weight, torch.inf if poisoned else 1)
        handle = network.conv2.weight.register_hook(lambda g, factor=factor: g * factor)
        found.append(_backward(engine.model, _images(number)))
        handle.remove()
    return found


def test_an_overflow_is_forgotten(ranks: Ranks) -> None:
    """Loss scaling provokes them, and skips the step.  What PowerSGD remembered of such a pass
    was not finite, and neither was any gradient after it."""
    mine, other = ranks(2, _one_overflow)
    for number, (gradients, others) in enumerate(zip(mine, other, strict=True)):
        finite = all(bool(g.isfinite().all()) for g in gradients.values())
        assert finite == (number != 3)
        if finite:
            assert all(torch.equal(g, others[name]) for name, g in gradients.items())
            assert all(bool(g.any()) for g in gradients.values())


class _WithScalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.network = Plain()
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images) * self.temperature
        return logits


def _scalar() -> list[Tensor]:
    torch.manual_seed(0)
    model = DistributedDataParallel(_WithScalar())
    config = WormConfig(truncation={"compression": "powersgd"})
    optimizer = SGD(model.parameters(), lr=0.05)
    engine = worm_dist.attach(
        model, optimizer, config, example_inputs=random_images(1), steps_per_epoch=1
    )
    return [_backward(engine.model, _images(n))["temperature"] for n in range(4)]


def test_a_scalar_is_averaged_exactly(ranks: Ranks) -> None:
    """torch's hook asks every gradient for its number of rows."""
    mine, other = ranks(2, _scalar)
    assert mine == other and all(bool(g.isfinite() & (g != 0)) for g in mine)


def _digits() -> dict[tuple[str, bool], float]:
    """Mean loss over the last epoch, by compression and by whether channels fade and are drawn on
    the way."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None].expand(-1, 3, -1, -1) / 8 - 1
    labels = torch.tensor(digits.target)
    epoch, num_steps = 28, 4 * 28
    losses = {}
    for compression, draws in product(("none", "powersgd"), (False, True)):
        torch.manual_seed(0)
        model = DistributedDataParallel(Plain(12, 16))
        config = WormConfig(truncation={"compression": compression, **at_once(8)})
        optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
        schedule = LinearLR(optimizer, 1, 0, total_iters=num_steps)
        engine = worm_dist.attach(model, optimizer, config, example_inputs=images[:1])
        mask = mask_dropping(engine.groups, *range(4), *range(12, 17))
        total = 0.0
        for step in range(num_steps):
            if draws and step == epoch:
                engine.truncate(mask)
            if draws and step == 2 * epoch:
                engine.draw(mask)
            batch = torch.arange(32) * 2 + dist.get_rank() + 64 * (step % epoch)
            engine.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(engine.model(images[batch]), labels[batch])
            loss.backward()
            engine.optimizer.step()
            schedule.step()
            total += float(loss.detach()) if step >= num_steps - epoch else 0
        losses[compression, draws] = total / epoch
    return losses


def test_digits_are_learned_as_with_plain_powersgd(ranks: Ranks) -> None:
    """It learns more slowly than exact gradients do; with channels that freeze, fade and leave, by
    no more than it does without."""
    losses, _ = ranks(2, _digits)
    slower = losses["powersgd", False] / losses["none", False]
    assert losses["powersgd", True] < 0.7 * math.log(10), losses
    assert losses["powersgd", True] < 1.1 * slower * losses["none", True], losses
