"""Masks, distances and the epoch of the ticket, against the published equations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from tests.papers.nets import EVEN, NETS, build
from tests.papers.published import Queue, batch_norms, early_bird_mask
from worm_dist import Mask, WormConfig
from worm_dist.groups.channel_groups import Groups
from worm_dist.groups.tracing import find_groups
from worm_dist.search.convergence import History
from worm_dist.search.ranking import Ranking

RATIOS = (0.3, 0.5, 0.7, 0.29)


@cache
def _groups(kind: str) -> Groups:
    return find_groups(build(kind, 0), torch.zeros(1, 1, 8, 8))


def _ranking(kind: str, network: nn.Module, preset: str, ratio: float) -> Ranking:
    config = WormConfig.preset(preset, search={"prune_ratio": ratio})
    return Ranking(config, network, _groups(kind), None)


def _masks(ranking: Ranking) -> tuple[Mask, Mask]:
    """The mask over the scales, and the mask over the channels."""
    kept, mask, _ = ranking.select(ranking.scores(), ranking.none_removed)
    return kept, mask


@torch.no_grad()
def _set_scales(network: nn.Module, kind: str, generator: torch.Generator) -> None:
    for norm in batch_norms(network).values():
        scale = norm.weight
        if kind == "normal":
            scale.normal_(generator=generator)
        elif kind == "uniform":
            scale.uniform_(generator=generator)
        elif kind == "tied":
            scale.copy_(torch.randint(-4, 5, scale.shape, generator=generator) / 8)
        elif kind == "layers apart":  # whole layers vanish
            scale.uniform_(generator=generator).mul_(torch.rand(1, generator=generator) ** 4)
        else:
            scale.fill_(0.5)


_KINDS = ("normal", "uniform", "tied", "layers apart", "constant")


def _trained(kind: str, preset_l1: float) -> Iterator[nn.Module]:
    """A network after each of some epochs of training on the digits, the first before any."""
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32).unsqueeze(1)[:512]
    classes = torch.tensor(digits.target)[:512]
    network = build(kind, 3)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    yield network
    for _ in range(7):
        for batch in torch.randperm(len(images)).split(64):
            loss = nn.functional.cross_entropy(network(images[batch]), classes[batch])
            norms = batch_norms(network).values()
            (loss + preset_l1 * sum(norm.weight.abs().sum() for norm in norms)).backward()
            optimizer.step()
            optimizer.zero_grad()
        yield network


def _assert_equal(kept: Mask, expected: dict[str, Tensor]) -> None:
    assert set(kept) == set(expected)
    for name in expected:
        assert torch.equal(kept[name], expected[name]), name


@pytest.mark.parametrize("preset", ["early-bird", "worm-paper"])
@pytest.mark.parametrize("kind", [*NETS, EVEN])
def test_masks_and_distances_are_the_published_ones(kind: str, preset: str) -> None:
    """On 42 checkpoints of each network with every ratio: random scales, with ties, constant ones,
    scales of which whole layers fall below the threshold, and trained ones."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    network = build(kind, 0)
    rankings = {ratio: _ranking(kind, network, preset, ratio) for ratio in RATIOS}
    queues = {ratio: Queue(5) for ratio in RATIOS}
    histories = {
        ratio: History(WormConfig.preset(preset, search={"prune_ratio": ratio}).search)
        for ratio in RATIOS
    }

    def compare(source: nn.Module) -> None:
        network.load_state_dict(source.state_dict())
        for ratio in RATIOS:
            kept, mask = _masks(rankings[ratio])
            expected = early_bird_mask(network, ratio)
            _assert_equal(kept, expected)
            queues[ratio].put(expected)
            record = histories[ratio].record(0, kept, ())
            assert list(record.distances) == queues[ratio].distances
            assert record.settled == queues[ratio].is_ticket("0.1")
            # What is drawn has a channel of every layer.
            assert all(bool(mask[name].any()) for name in mask)

    for scales in (*_KINDS, *_KINDS):
        for _ in range(3):
            _set_scales(network, scales, generator)
            compare(network)
    for trained in _trained(kind, 1e-2):
        compare(trained)
    assert len(histories[0.5].records) >= 38


def _epochs(seed: int) -> tuple[dict[str, int], dict[str, int]]:
    """The epochs of the elbow and of the ticket, ours and published, while scales come to rest;
    with some seeds at once, before the window is full."""
    kind = (*NETS, EVEN)[seed % 4]
    generator = torch.Generator().manual_seed(seed)
    network = build(kind, seed)
    window, settled, margin = (3, 4, 5)[seed % 3], ("0.05", "0.1")[seed % 2], "0.05"
    search = {
        "prune_ratio": RATIOS[seed % 3],
        "window": window,
        "settled": float(settled),
        "elbow": {"margin": float(margin)},
    }
    config = WormConfig.preset("worm-paper", search=search)
    ranking = _ranking(kind, network, "worm-paper", config.search.prune_ratio)
    history, queue = History(config.search), Queue(window)
    ours: dict[str, int] = {}
    published: dict[str, int] = {}
    for epoch in range(30):
        for norm in batch_norms(network).values():
            noise = torch.randn(norm.weight.shape, generator=generator)
            if seed % 5 == 0 and not epoch:
                norm.weight.data.uniform_(generator=generator)
            norm.weight.data += (0.03 if seed % 5 == 0 else 0.3) * 0.75**epoch * noise
        record = history.record(epoch, _masks(ranking)[0], ())
        queue.put(early_bird_mask(network, config.search.prune_ratio))
        is_ticket = queue.is_ticket(settled)
        if record.settled:
            ours.setdefault("ticket", epoch)
        if is_ticket:
            published.setdefault("ticket", epoch)
        if record.elbow:
            ours.setdefault("elbow", epoch)
        if is_ticket or queue.is_elbow(settled, margin):
            published.setdefault("elbow", epoch)
    return ours, published


def test_the_ticket_and_the_elbow_come_at_the_published_epochs() -> None:
    """48 sequences of scales, with several windows and thresholds."""
    found = set()
    for seed in range(48):
        ours, published = _epochs(seed)
        assert ours == published
        found.add((published["elbow"], published["ticket"]))
    assert len(found) > 10


@pytest.mark.parametrize(("different", "settled"), [(10, True), (11, False)])
def test_a_distance_of_exactly_s_is_settled(different: int, settled: bool) -> None:
    """Not above s, as published: not below s."""
    history = History(WormConfig.preset("early-bird", search={"window": 2}).search)
    keep = torch.arange(100) < 50
    history.record(0, Mask({"only": keep}), ())
    changed = keep ^ (torch.arange(100) < different)
    assert history.record(1, Mask({"only": changed}), ()).settled == settled


@pytest.mark.parametrize(("different", "elbow"), [(14, True), (15, False)])
def test_a_mean_distance_of_exactly_s_plus_delta_is_no_elbow(different: int, elbow: bool) -> None:
    """In floats 0.1 + 0.05 is 0.15000000000000002, and 0.15 is below it."""
    history = History(WormConfig.preset("worm-paper", search={"window": 3}).search)
    keep = torch.arange(100) < 50
    history.record(0, Mask({"only": keep}), ())
    history.record(1, Mask({"only": keep}), ())
    changed = keep ^ (torch.arange(100) < different)
    assert history.record(2, Mask({"only": changed}), ()).elbow == elbow


def test_nothing_fires_before_the_window_is_full_whatever_its_length() -> None:
    for window in (2, 4, 7):
        history = History(WormConfig.preset("worm-paper", search={"window": window}).search)
        mask = Mask({"only": torch.arange(10) < 5})
        records = [history.record(number, mask, ()) for number in range(window)]
        assert [record.elbow for record in records] == [False] * (window - 1) + [True]
