"""Ranking layer by layer, as Early-Bird does: every norm has a mask of its own, and a channel goes
where all its norms drop it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, Stacking, random_images, randomise
from tests.ranks import Ranks
from worm_dist import WormConfig

_RATIO = 0.4
_NETWORKS = {"residual": Residual, "stacking": Stacking}
_CHANNELS: Mapping[str, Mapping[str, list[tuple[str, int]]]] = {
    "residual": {"stem": [("bn0", 0), ("bn2", 0)], "conv1": [("bn1", 0)]},
    "stacking": {
        "conv1": [("bn1", 0), ("bn2", 0), ("bn3", 0)],
        "conv2": [("bn2", 5), ("bn3", 5)],
        "conv3": [("bn3", 9)],
    },
}
"""For each group its norms, each with the place of the group's first channel."""


class Check(NamedTuple):
    """What one rank saw of a check.

    Attributes:
        scales: of every norm, just before.
        candidates: the mask in the history, for every norm; on rank zero only.
        mask: in force, for every group.
        digest: of the mask in force.
        phase: after it.
    """

    scales: dict[str, Tensor]
    candidates: dict[str, Tensor]
    mask: dict[str, Tensor]
    digest: str
    phase: str


class Seen(NamedTuple):
    """A run.

    Attributes:
        checks: until the draw.
        drawn: channels of every norm in the drawn network.
        weights: of the drawn network, two steps later.
    """

    checks: list[Check]
    drawn: dict[str, int]
    weights: Tensor


def _run(name: str, preset: str, changes: dict[str, Any]) -> Seen:
    """Two steps, then a check, until the ticket is drawn."""
    torch.manual_seed(0)
    network = _NETWORKS[name]()
    randomise(network, seed=4)
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    search = {"prune_ratio": _RATIO, "window": 4, "settled": 0.2, "l1": 0.01, "every": "2ba"}
    removal = {"removal": {"duration": "4ba", "fade_steps": 2}}
    truncation = removal if preset == "worm" else {}
    config = WormConfig.preset(preset, search=search | changes, truncation=truncation)
    engine = worm_dist.attach(
        DistributedDataParallel(network),
        optimizer,
        config,
        example_inputs=random_images(1),
        steps_per_epoch=2,
    )
    checks: list[Check] = []
    number = 0

    def step() -> None:
        nonlocal number
        images = random_images(10, seed=10 * number + dist.get_rank())
        loss = nn.functional.cross_entropy(engine.model(images), torch.arange(10))
        optimizer.zero_grad()
        (loss + engine.penalty()).backward()
        optimizer.step()
        number += 1

    while engine.phase != "ticket" and len(checks) < 15:
        step()
        step()
        scales = {
            norm: module.weight.detach().abs().clone()
            for norm, module in network.named_modules()
            if isinstance(module, nn.BatchNorm2d)
        }
        verdict = engine.check()
        assert engine.mask is not None
        newest = dict(engine.history[-1].mask.items()) if engine.history else {}
        mask = dict(engine.mask.items())
        checks.append(Check(scales, newest, mask, engine.mask.digest, engine.phase.value))
        if verdict.ticket:
            engine.draw()
    drawn = {norm: len(network.get_parameter(f"{norm}.weight")) for norm in checks[0].scales}
    step()
    step()
    return Seen(checks, drawn, torch.cat([p.detach().flatten() for p in network.parameters()]))


_RUNS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "residual, worm-paper": ("residual", "worm-paper", {"elbow": {"min_masks": 3}}),
    "stacking, worm-paper": ("stacking", "worm-paper", {"elbow": {"min_masks": 3}}),
    "residual, fade": ("residual", "worm", {"grouping": "layer", "threshold": "global"}),
    "stacking, fade": ("stacking", "worm", {"grouping": "layer", "threshold": "global"}),
}


def _all_runs() -> dict[str, Seen]:
    return {name: _run(*arguments) for name, arguments in _RUNS.items()}


@pytest.fixture(scope="module")
def everyone(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Seen]]:
    found: list[dict[str, Seen]] = Ranks(tmp_path_factory.mktemp("layers"))(2, _all_runs)
    return found


def _published(scales: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
    """Early-Bird's rule as its authors run it, and its threshold: sorted[int(total * p)] of all
    scales; what is strictly greater is kept."""
    everything = torch.cat(list(scales.values())).sort().values
    threshold = float(everything[int(len(everything) * _RATIO)])
    return {name: size > threshold for name, size in scales.items()}, threshold


@pytest.mark.parametrize("name", _RUNS)
def test_ranks_agree_and_come_through_all_phases(
    everyone: list[dict[str, Seen]], name: str
) -> None:
    first, second = (seen[name] for seen in everyone)
    assert [c.digest for c in first.checks] == [c.digest for c in second.checks]
    assert torch.equal(first.weights, second.weights)
    assert bool(first.weights.isfinite().all())
    phases = [check.phase for check in first.checks]
    assert list(dict.fromkeys(phases)) == ["search", "truncate"]
    assert all(check.candidates for check in first.checks)
    assert not any(check.candidates for check in second.checks), "history is rank zero's"


@pytest.mark.parametrize("name", _RUNS)
def test_masks_of_the_norms_are_those_of_the_published_rule(
    everyone: list[dict[str, Seen]], name: str
) -> None:
    """Among faded channels the published rule has nothing to say.  The preset ``worm`` keeps the
    channel at the threshold: the share p is meant, so int(total * p) channels go."""
    seen = everyone[0][name]
    fades = name.endswith("fade")
    compared = [check for check in seen.checks if check.phase == "search" or not fades]
    # The check that starts the fade is cut before it.
    compared += [c for c in seen.checks if c.phase == "truncate"][:1] if fades else []
    assert len(compared) >= 3
    for check in compared:
        published, threshold = _published(check.scales)
        assert check.candidates.keys() == published.keys()
        at_threshold = 0
        for norm, kept in check.candidates.items():
            here = check.scales[norm] == threshold
            assert torch.equal(kept & ~here, published[norm]), norm
            assert bool(kept[here].all()) == fades or not bool(here.any())
            at_threshold += int(here.sum())
        assert at_threshold == 1, "no ties, or the test says nothing"
        num_dropped = sum(int((~kept).sum()) for kept in check.candidates.values())
        assert num_dropped == int(sum(map(len, published.values())) * _RATIO) + (not fades)


@pytest.mark.parametrize("name", _RUNS)
def test_a_channel_goes_where_all_its_norms_drop_it(
    everyone: list[dict[str, Seen]], name: str
) -> None:
    seen = everyone[0][name]
    num_spared = 0
    for check in seen.checks:
        for group, norms in _CHANNELS[_RUNS[name][0]].items():
            kept = check.mask[group]
            votes = torch.stack([check.candidates[n][at : at + len(kept)] for n, at in norms])
            rescued = check.mask[group] & ~votes.any(dim=0)
            assert torch.equal(kept & ~rescued, votes.any(dim=0)), group
            assert int(rescued.sum()) <= 1 and not bool(votes.any() & rescued.any()), group
            num_spared += int((kept & ~votes.all(dim=0)).sum())
    assert num_spared, "nowhere was there a difference"


@pytest.mark.parametrize("name", _RUNS)
def test_the_masks_of_the_groups_are_drawn(everyone: list[dict[str, Seen]], name: str) -> None:
    for ranks_own in everyone:
        seen = ranks_own[name]
        widths = dict.fromkeys(seen.drawn, 0)
        for group, norms in _CHANNELS[_RUNS[name][0]].items():
            for norm, _ in norms:
                widths[norm] += int(seen.checks[-1].mask[group].sum())
        assert seen.drawn == widths
        assert sum(widths.values()) < sum(map(len, seen.checks[0].scales.values()))


@pytest.mark.parametrize("name", [name for name in _RUNS if name.endswith("fade")])
def test_a_faded_channel_is_dropped_by_all_its_norms_from_then_on(
    everyone: list[dict[str, Seen]], name: str
) -> None:
    seen = everyone[0][name]
    fading = [check for check in seen.checks if check.phase == "truncate"]
    assert len(fading) >= 2
    gone = {group: torch.zeros_like(kept) for group, kept in fading[0].mask.items()}
    for check in fading:
        for group, norms in _CHANNELS[_RUNS[name][0]].items():
            assert not bool((check.mask[group] & gone[group]).any()), "a faded channel came back"
            for norm, at in norms:
                votes = check.candidates[norm][at : at + len(gone[group])]
                assert not bool((votes & gone[group]).any()), norm
            gone[group] |= ~check.mask[group]
    assert any(bool(channels.any()) for channels in gone.values())


def test_with_ties_the_count_stays_and_earlier_channels_go_first(ranks: Ranks) -> None:
    """With the published rule scales that are all alike drop everything."""
    (first, digest), (_, other) = ranks(2, _tied)
    assert digest == other
    everything = {"bn0": torch.ones(8), "bn2": torch.ones(8), "bn1": torch.ones(6)}
    assert not any(bool(kept.any()) for kept in _published(everything)[0].values())
    # Eight go; the last one of bn0 is protected, so the first one of bn2 takes its place.
    assert first == {
        "bn0": [False] * 7 + [True],
        "bn2": [False] + [True] * 7,
        "bn1": [True] * 6,
    }


def _tied() -> tuple[dict[str, list[bool]], str]:
    """For each norm what is kept of a network whose scales are all one; the digest of the mask."""
    network = Residual()
    model, optimizer = DistributedDataParallel(network), SGD(network.parameters(), lr=0.1)
    search: dict[str, Any] = {"prune_ratio": _RATIO, "min_keep_ratio": 0.0}
    config = WormConfig(search={**search, "grouping": "layer", "threshold": "global"})
    engine = worm_dist.attach(model, optimizer, config, example_inputs=random_images(1))
    engine.check()
    assert engine.mask is not None
    assert (~engine.mask.keep).nonzero().flatten().tolist() == [0], "both norms drop it"
    kept = {name: k.tolist() for f in engine.history for name, k in f.mask.items()}
    return kept, engine.mask.digest
