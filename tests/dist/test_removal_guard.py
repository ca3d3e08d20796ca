"""Channels wait while the ranks' average loss is high, and stay if it does not come back."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.nets import Residual, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.resuming import differences, through_a_file
from worm_dist import Engine, WormConfig

pytestmark = pytest.mark.slow("trains whole runs on real ranks")

DROPPED = (0, 1, 3, 5, 9, 10)


def _engine(patience: int) -> Engine:
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=1)
    model = DistributedDataParallel(network)
    removal = {"duration": "90ba", "fade_steps": 1, "patience": f"{patience}ba", "stage": 1.0}
    return worm_dist.attach(
        model,
        SGD(model.parameters(), lr=1e-3),
        WormConfig(search={"every": "1000ba"}, truncation={"removal": removal}),
        example_inputs=random_images(1),
    )


def _step(engine: Engine, loss: float | None) -> float:
    """One step of which this loss is told; returns the share of the dropped that has left."""
    engine.optimizer.zero_grad()
    images = random_images(4, seed=10 * engine.step + dist.get_rank())
    engine.model(images).square().mean().backward()
    if loss is not None:
        engine.watch(torch.tensor(loss))
    engine.optimizer.step()
    return engine.check().removed_fraction


def _truncated(loss: float | None = 1.0, patience: int = 200) -> Engine:
    engine = _engine(patience)
    for _ in range(4):
        _step(engine, loss)
    engine.truncate(mask_dropping(engine.groups, *DROPPED))
    return engine


def _told() -> list[str]:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("worm_dist").addHandler(handler)
    return said


def _waits_and_goes_on() -> Any:
    """Rank one's loss alone is high: the average is what counts."""
    said, engine = _told(), _truncated()
    high = 9.0 if dist.get_rank() == 1 else 1.0
    shares = [_step(engine, high) for _ in range(60)]
    paused = engine.check().paused
    shares += [_step(engine, 0.5) for _ in range(150)]
    return said, shares, paused, engine.check().ticket


def test_channels_wait_while_the_loss_is_high(ranks: Ranks) -> None:
    zero, one = ranks(2, _waits_and_goes_on)
    for said, shares, paused, ticket in (zero, one):
        # What had begun before the loss rose goes to its end.
        assert 0 < shares[30] < 1 and shares[30:60] == [shares[30]] * 30
        assert paused and ticket and shares[-1] == 1
        assert shares == zero[1]
        del said
    (line,) = zero[0]
    assert "the training loss is" in line and "dropped channels pauses" in line
    assert one[0] == []


def _stays() -> Any:
    said, engine = _told(), _truncated(patience=40)
    for _ in range(100):
        _step(engine, 9.0)
    verdict = engine.check()
    assert engine.mask is not None
    dropped = engine.mask.num_channels - engine.mask.num_kept
    engine.draw()
    _step(engine, 9.0)
    return said, verdict.ticket, dropped, engine.mask.digest, engine.phase.value


def test_what_has_left_is_the_ticket_if_the_loss_does_not_come_back(ranks: Ranks) -> None:
    zero, one = ranks(2, _stays)
    assert zero[1:] == one[1:]
    said, ticket, dropped, _, phase = zero
    assert ticket and phase == "ticket"
    assert 0 < dropped < len(DROPPED)
    assert len(said) == 2
    assert f"the remaining {len(DROPPED) - dropped} dropped channels are kept" in said[1]


def _never_begins() -> Any:
    engine = _truncated(patience=20)
    for _ in range(4):
        engine.watch(torch.tensor(1e6))
    for _ in range(40):
        _step(engine, 1e6)
    verdict = engine.check()
    engine.draw()
    return verdict.ticket, engine.mask.num_kept, engine.phase.value  # type: ignore[union-attr]


def test_a_removal_that_never_began_ends_too(ranks: Ranks) -> None:
    """It waited for channels for ever, and no ticket was found."""
    for ticket, num_kept, phase in ranks(2, _never_begins):
        assert ticket and num_kept == 14 and phase == "ticket"


def _not_told() -> list[float]:
    engine = _truncated(None)
    return [_step(engine, None) for _ in range(120)]


def test_who_tells_no_loss_is_not_judged_by_one(ranks: Ranks) -> None:
    for shares in ranks(2, _not_told):
        assert shares[-1] == 1


def _one_rank_tells() -> list[float]:
    engine = _truncated(9.0 if dist.get_rank() else None)
    return [_step(engine, 9.0 if dist.get_rank() else None) for _ in range(120)]


def test_a_loss_that_one_rank_alone_tells_does_not_count(ranks: Ranks) -> None:
    for shares in ranks(2, _one_rank_tells):
        assert shares[-1] == 1


def _broken_off() -> list[str]:
    """In the middle of a pause."""

    def trained(engine: Engine, steps: range) -> None:
        for number in steps:
            _step(engine, 9.0 if 6 <= number < 60 else 1.0)

    whole = _truncated()
    trained(whole, range(40))
    assert whole.check().paused
    saved = through_a_file(
        {
            "engine": whole.state_dict(),
            "model": whole.model.state_dict(),
            "optimizer": whole.optimizer.state_dict(),
        }
    )
    again = _engine(200)
    again.load_state_dict(saved["engine"])
    again.model.load_state_dict(saved["model"])
    again.optimizer.load_state_dict(saved["optimizer"])
    found = list(differences(saved["engine"], again.state_dict(), "at once"))
    for engine in (whole, again):
        trained(engine, range(40, 260))
    found += differences(whole.state_dict(), again.state_dict(), "at the end")
    found += differences(whole.model.state_dict(), again.model.state_dict(), "weights")
    return found if whole.check().ticket else ["the removal has not ended"]


def test_a_pause_goes_on_after_a_restart(ranks: Ranks) -> None:
    for found in ranks(2, _broken_off):
        assert not found, "\n".join(found[:10])


@pytest.mark.parametrize("fade_steps", [0, 9])
def test_long_fades_are_refused(fade_steps: int) -> None:
    """Fades of fifty steps, of all channels at once, ended at chance."""
    with pytest.raises(worm_dist.ConfigError, match=r"truncation.removal.fade_steps: .*got"):
        WormConfig(truncation={"removal": {"fade_steps": fade_steps}})
