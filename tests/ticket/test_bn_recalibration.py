from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Flattening, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from worm_dist import WormConfig
from worm_dist.distributed.collectives import ProcessGroupComm, SingleProcessComm
from worm_dist.groups.selective_norm import SelectiveBatchNorm2d
from worm_dist.pruning.bn_recalibration import recalibrate
from worm_dist.pruning.recorded_inputs import RecordedCall


def _call(*positional: Tensor, norms: Sequence[str] = ("0",), **keywords: Tensor) -> RecordedCall:
    """Seen without autocast."""
    return RecordedCall(positional, keywords, "cpu", torch.bfloat16, False, frozenset(norms))


def _ranks() -> SingleProcessComm | ProcessGroupComm:
    if not dist.is_initialized():
        return SingleProcessComm()
    assert dist.group.WORLD is not None
    return ProcessGroupComm(dist.group.WORLD, torch.device("cpu"))


def _batch(number: int) -> Tensor:
    """Each from another distribution, as images of another class would be."""
    return random_images(16, seed=number) * (1 + number) + 3 * number


def _norm_of_the_input(num_batches: int) -> tuple[Tensor, Tensor]:
    """A norm that sees the batches themselves; they are dealt out among the ranks."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 2, 1))
    recalibrate(network, [_call(_batch(n)) for n in range(rank, num_batches, size)], _ranks())
    return network.get_buffer("0.running_mean"), network.get_buffer("0.running_var")


@pytest.mark.parametrize(
    ("world_size", "num_batches"), [(NO_GROUP, 1), (1, 1), (2, 2), (3, 3), (4, 4)]
)
def test_statistics_are_those_of_all_samples_of_all_ranks(
    ranks: Ranks, world_size: int, num_batches: int
) -> None:
    """One batch a rank.  Each variance is the unbiased one of 1024 values: exact to 1/1024."""
    samples = torch.cat([_batch(number) for number in range(num_batches)])
    for mean, variance in ranks(world_size, _norm_of_the_input, num_batches):
        torch.testing.assert_close(mean, samples.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(variance, samples.var(dim=(0, 2, 3)), rtol=1 / 1024, atol=0)


def test_a_selective_norm_has_the_statistics_of_what_it_reads() -> None:
    """Of channels 0 and 2; the number of values is that of each, also where batches differ."""
    norm = SelectiveBatchNorm2d(3)
    norm.keep(torch.tensor([0, 2]))
    norm.num_features = 2
    for name in ("weight", "bias"):
        setattr(norm, name, nn.Parameter(torch.ones(2)))
    norm.running_mean, norm.running_var = torch.zeros(2), torch.ones(2)
    batches = [_batch(0)[:1, :, :2, :2], _batch(1)]
    recalibrate(nn.Sequential(norm), [_call(batch) for batch in batches], _ranks())
    values = torch.cat([batch[:, [0, 2]].transpose(0, 1).flatten(1) for batch in batches], dim=1)
    torch.testing.assert_close(norm.running_mean, values.mean(dim=1), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var, values.var(dim=1), rtol=1e-5, atol=1e-5)


def _synchronised() -> tuple[Tensor, Tensor, bool]:
    """Rank one has three batches and rank zero one."""
    network = nn.Sequential(nn.SyncBatchNorm(3), nn.Conv2d(3, 2, 1))
    batches = [0] if dist.get_rank() == 0 else [1, 2, 3]
    recalibrate(network, [_call(_batch(number)) for number in batches], _ranks())
    mean, variance = network.get_buffer("0.running_mean"), network.get_buffer("0.running_var")
    return mean, variance, "forward" in vars(network[0])


def test_ranks_with_other_numbers_of_batches_do_not_wait_in_a_synchronised_norm(
    ranks: Ranks,
) -> None:
    """It gathers the moments of every batch while it trains."""
    samples = torch.cat([_batch(number) for number in range(4)])
    for mean, variance, is_patched in ranks(2, _synchronised):
        torch.testing.assert_close(mean, samples.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(variance, samples.var(dim=(0, 2, 3)), rtol=1 / 1024, atol=0)
        assert not is_patched


def _draw_with_dropout() -> tuple[bool, bool, list[Tensor], bool]:
    torch.manual_seed(0)
    network = Flattening()
    randomise(network, seed=1)
    model = DistributedDataParallel(network) if dist.is_initialized() else network
    optimizer = SGD(model.parameters(), lr=0.05)
    engine = worm_dist.attach(
        model,
        optimizer,
        WormConfig(truncation={"mode": "off"}, ticket={"recalibrate_batches": 2}),
        example_inputs=random_images(1),
    )
    rank = dist.get_rank() if dist.is_initialized() else 0
    for step in range(4):
        optimizer.zero_grad()
        engine.model(random_images(8, seed=10 * step + rank)).square().mean().backward()
        optimizer.step()
    seen_in_training: list[bool] = []
    network.dropout.register_forward_hook(lambda m, *_: seen_in_training.append(m.training))
    network.conv.eval()
    random = torch.get_rng_state()
    before = network.get_buffer("bn.running_var").clone()
    engine.draw(mask_dropping(engine.groups, 0))
    # Two batches remembered; a copy that the draw is rehearsed on has the hook too.
    assert len(seen_in_training) >= 2
    statistics = [value for key, value in network.named_buffers() if "running" in key]
    assert network.bn.momentum == 0.1
    assert not torch.equal(network.get_buffer("bn.running_var"), before[1:])
    modes = network.training and network.bn.training and not network.conv.training
    return any(seen_in_training), modes, statistics, torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("world_size", [NO_GROUP, 1, 2])
def test_a_draw_estimates_them_anew_without_dropout(ranks: Ranks, world_size: int) -> None:
    results = ranks(world_size, _draw_with_dropout)
    for dropout_was_on, modes_kept, statistics, random_kept in results:
        assert not dropout_was_on and modes_kept and random_kept
        for one, two in zip(statistics, results[0][2], strict=True):
            assert torch.equal(one, two)


def test_norms_without_statistics_are_left_alone() -> None:
    network = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3, momentum=None)
    )
    recalibrate(network, [_call(_batch(1), norms=("0", "1"))], SingleProcessComm())
    assert network[0].running_mean is None
    assert network[1].momentum is None and int(network[1].num_batches_tracked) == 1


def test_batches_may_be_keyword_arguments() -> None:
    network = nn.BatchNorm2d(3, momentum=0.3)
    recalibrate(network, [_call(input=_batch(2), norms=("",))], SingleProcessComm())
    torch.testing.assert_close(network.running_mean, _batch(2).mean(dim=(0, 2, 3)))


@pytest.mark.parametrize("world_size", [NO_GROUP, 1, 2])
def test_statistics_do_not_depend_on_which_rank_saw_which_batch(
    ranks: Ranks, world_size: int
) -> None:
    """Within a rank variances were averaged, and what lies between its batches was lost."""
    samples = torch.cat([_batch(number) for number in range(4)])
    for mean, variance in ranks(world_size, _norm_of_the_input, 4):
        torch.testing.assert_close(mean, samples.mean(dim=(0, 2, 3)), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(variance, samples.var(dim=(0, 2, 3)), rtol=1 / 1024, atol=0)


def test_a_large_mean_does_not_swallow_the_variance() -> None:
    """E[x^2] - E[x]^2 in single precision has no digits left for a variance of 1 beside 4000."""
    network = nn.BatchNorm2d(3)
    batch = random_images(64, seed=1) + 4000
    recalibrate(network, [_call(batch, norms=("",))], SingleProcessComm())
    torch.testing.assert_close(
        network.running_var, batch.double().var(dim=(0, 2, 3)).float(), rtol=0.01, atol=0
    )
