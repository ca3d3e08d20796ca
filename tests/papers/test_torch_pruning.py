"""torch-pruning's BatchNorm-scale pruner: the same channels where its rule is the same, and the
documented differences where it is not."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch_pruning as tp
from torch import Tensor, nn

from tests.nets import randomise
from tests.papers.nets import build
from worm_dist import Mask, WormConfig, attach

IMAGES = torch.zeros(1, 1, 8, 8)


def _random(kind: str, seed: int) -> nn.Module:
    network = build(kind, seed)
    randomise(network, seed)
    return network.eval()


def _theirs(network: nn.Module, ratio: float) -> nn.Module:
    """Pruned by torch-pruning: the lowest of all groups, whose scales are averaged."""
    pruned = copy.deepcopy(network)
    head = next(module for module in pruned.modules() if isinstance(module, nn.Linear))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tp.pruner.BNScalePruner(
            pruned,
            IMAGES,
            importance=tp.importance.BNScaleImportance(normalizer=None),
            global_pruning=True,
            pruning_ratio=ratio,
            ignored_layers=[head],
        ).step()
    return pruned


def _ours(network: nn.Module, ratio: float, **search: object) -> tuple[nn.Module, Mask]:
    pruned = copy.deepcopy(network).train()
    config = WormConfig(
        search={
            "prune_ratio": ratio,
            "min_keep_ratio": 0.0,
            "threshold": "global",
            **search,
        },
        truncation={"mode": "off"},
        ticket={"round_to": 1, "recalibrate_batches": 0},
    )
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    engine = attach(pruned, optimizer, config, example_inputs=IMAGES, steps_per_epoch=1)
    engine.check()
    assert engine.mask is not None
    engine.draw(engine.mask)
    return pruned.eval(), engine.mask


def _same(one: nn.Module, other: nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return all(torch.equal(mine[name], theirs[name]) for name in mine) and [*mine] == [*theirs]


def _outputs(network: nn.Module) -> Tensor:
    images = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs: Tensor = network(images)
    return outputs


@pytest.mark.parametrize(("ratio", "selection"), [(0.5, "count"), (0.3, "above")])
@pytest.mark.parametrize("seed", [1, 2])
def test_one_global_threshold_gives_the_same_network(
    seed: int, ratio: float, selection: str
) -> None:
    """Without coupling both drop the share of the lowest scales, each channel by its own.  Of 82
    channels torch-pruning drops 41 and 25: it rounds 24.6 up, ``count`` down; ``above`` drops the
    channel at the threshold too."""
    network = _random("vgg", seed)
    mine, _ = _ours(network, ratio, selection=selection)
    theirs = _theirs(network, ratio)
    assert _same(mine, theirs)
    assert torch.equal(_outputs(mine), _outputs(theirs))


@pytest.mark.parametrize("seed", [1, 2])
def test_coupled_norms_are_averaged_by_both(seed: int) -> None:
    """Grouping ``group`` and coupling ``mean``: the same network too."""
    network = _random("resnet", seed)
    mine, _ = _ours(network, 0.5)
    theirs = _theirs(network, 0.5)
    assert _same(mine, theirs)
    assert torch.equal(_outputs(mine), _outputs(theirs))


def test_the_published_selection_drops_one_channel_more() -> None:
    network = _random("vgg", 1)
    _, exact = _ours(network, 0.5)
    _, above = _ours(network, 0.5, selection="above")
    assert (exact.num_kept, above.num_kept) == (41, 40)
