"""Why masks are compared before anything is packed: no backend would notice."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Plain, random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from worm_dist import DivergenceError, WormConfig


def _gradient(dropped: list[int], agreed: bool) -> Tensor:
    """The averaged gradient of the first convolution, after each rank has dropped a channel."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Plain())
    optimizer = SGD(model.parameters(), lr=0.1)
    config = WormConfig(truncation={"motion": "hold"})
    engine = worm_dist.attach(
        model, optimizer, config, example_inputs=random_images(1), steps_per_epoch=1
    )
    mask = mask_dropping(engine.groups, dropped[dist.get_rank()])
    if agreed:
        engine.truncate(mask)
    else:
        engine._freeze(~mask.keep)
    engine.model(random_images(4, seed=dist.get_rank())).square().mean().backward()
    gradient = next(engine.model.parameters()).grad
    assert gradient is not None
    return gradient.clone()


def _refused(dropped: list[int]) -> str:
    with pytest.raises(DivergenceError) as caught:
        _gradient(dropped, agreed=True)
    return str(caught.value)


@pytest.mark.fault(15, "what happens if nobody looks: wrong sums without an error")
def test_without_the_comparison_sums_are_wrong_and_nobody_says_so(ranks: Ranks) -> None:
    """Rank zero packs channels 1, 2, 3, ... and rank one 0, 2, 3, ...: as many elements."""
    right, same = ranks(2, _gradient, [0, 0], False)
    assert torch.equal(right, same)
    first, second = ranks(2, _gradient, [0, 1], False)
    assert not torch.equal(first, second)
    # Rank one's channel 0 was added to rank zero's channel 1.
    assert torch.equal(first[1], second[0]) and not torch.equal(first[1], right[1])


@pytest.mark.fault(15, "masks from elsewhere that differ")
def test_with_the_comparison_all_are_refused(ranks: Ranks) -> None:
    first, second = ranks(2, _refused, [0, 1])
    assert first == second and "mask of group" in first and "rank 1 differs" in first
