"""A score of the user's own: it may look at one rank's data, and one rank's mistake stops all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Normless, random_images
from tests.ranks import Outcome, Ranks
from tests.settings import at_once
from worm_dist import ConfigError, DivergenceError, WormConfig
from worm_dist.groups.channel_groups import ChannelGroup

pytestmark = pytest.mark.slow("trains with many scores on real ranks")

_RATIO = 0.5


def _activity(network: nn.Module, group: ChannelGroup) -> Tensor:
    """How strongly each channel answers to this rank's images: one sees red, the other green."""
    answers: list[Tensor] = []
    layer = network.get_submodule(group.name)
    handle = layer.register_forward_hook(lambda module, inputs, output: answers.append(output))
    images = torch.zeros(16, 3, 5, 5)
    images[:, dist.get_rank()] = random_images(16, channels=1, side=5)[:, 0]
    network(images)
    handle.remove()
    strengths = answers[0].transpose(0, 1).flatten(1).std(dim=1)
    return strengths / strengths.mean()


def _engine(score: Any) -> worm_dist.Engine:
    """Of a network without norms, which the default score would refuse."""
    torch.manual_seed(0)
    model = DistributedDataParallel(Normless())
    optimizer = SGD(model.parameters(), lr=0.1, momentum=0.9)
    config = WormConfig(
        search={"prune_ratio": _RATIO, "threshold": "global", "window": 2, "l1": 1.0},
        truncation={**at_once(1)},
    )
    return worm_dist.attach(
        model,
        optimizer,
        config,
        example_inputs=random_images(1, side=5),
        steps_per_epoch=1,
        score=score,
    )


def _step(engine: worm_dist.Engine, number: int) -> None:
    images = random_images(8, side=5, seed=10 * number + dist.get_rank())
    loss = nn.functional.cross_entropy(engine.model(images), torch.arange(8)) + engine.penalty()
    engine.optimizer.zero_grad()
    loss.backward()
    engine.optimizer.step()


# ---- what a rank alone sees is averaged ----------------------------------------------------------


def _by_activity() -> tuple[Tensor, Tensor, float, str, str, Tensor]:
    """This rank's own scores, the mask, the penalty, then the phase and digests after a draw."""
    engine = _engine(_activity)
    network = engine.model.get_submodule("module")
    with torch.no_grad():
        scores = torch.cat([_activity(network, group) for group in engine.groups])
    engine.check()
    mask = engine.mask
    assert mask is not None
    penalty = float(engine.penalty())
    for number in range(12):
        _step(engine, number)
        if engine.check().ticket:
            engine.draw()
            break
    _step(engine, 12)
    weights = torch.cat([p.detach().flatten() for p in engine.model.parameters()])
    assert engine.mask is not None
    return scores, mask.keep, penalty, engine.phase.value, engine.mask.digest, weights


def _lowest(scores: Tensor) -> Tensor:
    """Which are kept if the lowest half goes, each group keeping its best."""
    keep = torch.ones(len(scores), dtype=torch.bool)
    best = [
        part.argmax() + first for part, first in zip(scores.split([6, 5, 4, 7]), (0, 6, 11, 15))
    ]
    for channel in scores.argsort().tolist():
        if channel not in best and int((~keep).sum()) < int(_RATIO * len(scores)):
            keep[channel] = False
    return keep


def test_scores_of_each_ranks_own_data_are_averaged(ranks: Ranks) -> None:
    """Two ranks with other images agree on one mask, which is neither's own."""
    (mine, mask, penalty, phase, digest, weights), other = ranks(2, _by_activity)
    theirs = other[0]
    assert torch.equal(mask, other[1])
    assert torch.equal(mask, _lowest((mine + theirs) / 2))
    assert not torch.equal(mask, _lowest(mine)) and not torch.equal(mask, _lowest(theirs))
    assert penalty == 0, "there are no scales"
    assert phase == "ticket" and (phase, digest) == other[3:5]
    assert torch.equal(weights, other[5]) and bool(weights.isfinite().all())


# ---- one rank's mistake --------------------------------------------------------------------------


def _raises(group: ChannelGroup) -> Tensor:
    raise LookupError("no data on this rank")


def _nan(group: ChannelGroup) -> Tensor:
    scores = torch.ones(group.num_channels)
    scores[-1] = torch.nan
    return scores


_MISTAKES: dict[str, tuple[Callable[[ChannelGroup], Any], str]] = {
    "raises": (_raises, "LookupError: no data on this rank"),
    "shape": (
        lambda group: torch.ones(group.num_channels, 1),
        "group down needs a tensor [6], got (6, 1)",
    ),
    "too few": (
        lambda group: torch.ones(6),  # right for the first group alone
        "group up needs a tensor [5], got (6,)",
    ),
    "no tensor": (
        lambda group: [1.0] * group.num_channels,
        "group down needs a tensor [6], got list",
    ),
    "not a number": (_nan, "group down needs finite floats, got [1.0, 1.0, 1.0, 1.0, 1.0, nan]"),
    "infinite in float32": (
        lambda group: torch.full((group.num_channels,), 1e300, dtype=torch.float64),
        "group down needs finite floats, got [inf, ",
    ),
    "device": (
        lambda group: torch.ones(group.num_channels, device="meta"),
        "Cannot copy out of meta tensor",
    ),
}


class _Sometimes:
    """A score that makes a mistake on one rank, when it is told to."""

    def __init__(self) -> None:
        self.mistake = ""
        self.rank = -1

    def __call__(self, network: nn.Module, group: ChannelGroup) -> Any:
        if self.mistake and dist.get_rank() == self.rank:
            return _MISTAKES[self.mistake][0](group)
        return torch.arange(group.num_channels)  # whole numbers will do


def _make_every_mistake() -> dict[tuple[str, int], tuple[str, str]]:
    """For every mistake and the rank that makes it, type and text of this rank's error; after each
    the next check is as if nothing had been."""
    score = _Sometimes()
    engine = _engine(score)
    engine.check()
    mask, said = engine.mask, {}
    for mistake in _MISTAKES:
        for rank in range(2):
            score.mistake, score.rank = mistake, rank
            engine.optimizer.step()  # there are no gradients
            try:
                engine.check()
            except worm_dist.WormError as error:
                said[mistake, rank] = type(error).__name__, str(error)
            assert engine.mask is mask
            score.mistake = ""
    engine.optimizer.step()
    engine.check()
    assert engine.mask is not None and mask is not None
    assert engine.mask.digest == mask.digest
    assert dist.get_rank() or len(engine.history) == 2, "failed checks are not in the history"
    return said


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    ranks = Ranks(tmp_path_factory.mktemp("score"))
    outcomes = ranks.outcomes(2, _make_every_mistake)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return outcomes


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("mistake", _MISTAKES)
def test_a_mistake_on_one_rank_stops_both(mistaken: list[Outcome], mistake: str, rank: int) -> None:
    kind, text = mistaken[rank].value[mistake, rank]
    assert kind == ConfigError.__name__
    assert text.startswith("attach: score failed: ") and _MISTAKES[mistake][1] in text
    kind, text = mistaken[1 - rank].value[mistake, rank]
    assert kind == "NonFiniteError"
    assert "another rank's score failed" in text and "\n" not in text


def test_nobody_waits_for_a_timeout(mistaken: list[Outcome]) -> None:
    """Fourteen failed checks in all; one that waited would wait a minute."""
    assert all(outcome.seconds < 20 for outcome in mistaken)


def _attach_on_one_rank_with_a_score() -> None:
    _engine(_Sometimes() if dist.get_rank() else None)


def test_a_score_on_one_rank_alone_is_refused_at_attach(ranks: Ranks) -> None:
    for outcome in ranks.outcomes(2, _attach_on_one_rank_with_a_score):
        assert outcome.error == DivergenceError.__name__, str(outcome)
        assert "setting of group score: rank 1 differs" in outcome.text
