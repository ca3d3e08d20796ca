"""The network becomes smaller in stages while other channels still leave, and nothing else changes.

Each training is run twice: with stages, and with one draw when the last channel is zero.  In double
precision they differ by rounding alone: sums over fewer zeros are taken in another order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel

import worm_dist
from tests.nets import Flattening, Grouped, Residual, Separable, Stacking, random_images, randomise
from tests.oracles import mask_dropping
from tests.ranks import NO_GROUP, Ranks
from tests.resuming import transformer
from worm_dist import ConfigError, Engine, WormConfig

pytestmark = pytest.mark.slow("draws in stages on two ranks, ten seconds")

NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "flattening": Flattening,
    "separable": Separable,
    "grouped": Grouped,
    "stacking": Stacking,
    "transformer": transformer,
}
DROPPED = (0, 2, 3, 5, 9)
NUM_STEPS = 22
_CLOSE = 1e-9


class Staged:
    """A training that draws whenever it may.

    Attributes:
        drawn: for every draw the step, whether it was a stage, and how much the outputs changed.
        sent: bytes of every step.
    """

    def __init__(self, net: str, optimizer: str, stage: float, **truncation: Any) -> None:
        torch.manual_seed(0)
        self.network = NETS[net]()
        randomise(self.network, seed=1)
        self.network.double()
        for module in self.network.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # a smaller network would draw other numbers
        model: nn.Module = self.network
        if dist.is_initialized():
            model = DistributedDataParallel(self.network)
        self.optimizer: Optimizer = (
            SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
            if optimizer == "sgd"
            else AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
        )
        removal = {"duration": "14ba", "fade_steps": 2, "stage": stage}
        config = WormConfig(
            search={"l1": 0.01, "every": "100ba"},
            truncation={"removal": removal, **truncation},
            ticket={"recalibrate_batches": 2},
        )
        images = self._images(0)
        self.engine: Engine = worm_dist.attach(
            model, self.optimizer, config, example_inputs=images[:1]
        )
        self.average = AveragedModel(self.network)
        self.drawn: list[tuple[int, bool, float]] = []
        self.sent: list[int] = []
        self.step()
        dropped = [channel for channel in DROPPED if channel < self.engine.groups.num_channels]
        self.engine.truncate(mask_dropping(self.engine.groups, *dropped))

    def _images(self, number: int) -> Tensor:
        rank = dist.get_rank() if dist.is_initialized() else 0
        return random_images(6, seed=10 * number + rank).double()

    def step(self) -> None:
        torch.manual_seed(self.engine.step)
        self.optimizer.zero_grad()
        logits = self.engine.model(self._images(self.engine.step))
        loss = nn.functional.cross_entropy(logits, torch.arange(6))
        (loss + self.engine.penalty()).backward()
        self.optimizer.step()
        self.average.update_parameters(self.network)
        self.sent.append(self.engine.traffic.sent_bytes)

    def run(self) -> None:
        for _ in range(NUM_STEPS):
            self.step()
            verdict = self.engine.check()
            if self.engine.phase != "ticket" and (verdict.stage or verdict.ticket):
                before = self._outputs()
                self.engine.draw(copies=[self.average.module])
                change = float((self._outputs() - before).abs().max())
                self.drawn.append((self.engine.step, verdict.stage, change))

    @torch.no_grad()
    def _outputs(self) -> Tensor:
        self.network.eval()
        outputs: Tensor = self.network(self._images(99))
        self.network.train()
        return outputs

    @property
    def result(self) -> dict[str, Tensor]:
        """Weights, moments, statistics and the averaged copy."""
        found = {f"weight {name}": value for name, value in self.network.state_dict().items()}
        found |= {f"average {name}": v for name, v in self.average.module.state_dict().items()}
        for name, parameter in self.network.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                if isinstance(value, Tensor):
                    found[f"{key} of {name}"] = value
        return {name: value.clone() for name, value in found.items()}


def _both(net: str, optimizer: str, truncation: dict[str, Any]) -> Any:
    staged, whole = (Staged(net, optimizer, stage, **truncation) for stage in (0.2, 1.0))
    staged.run()
    whole.run()
    digests = staged.engine.mask.digest, whole.engine.mask.digest  # type: ignore[union-attr]
    ticket = 8 * sum(p.numel() for p in staged.network.parameters())
    return (staged.drawn, staged.result, staged.sent), (whole.drawn, whole.result), digests, ticket


@pytest.mark.parametrize(
    ("world_size", "net", "optimizer", "truncation"),
    [
        (NO_GROUP, "residual", "sgd", {}),
        (NO_GROUP, "transformer", "adamw", {}),
        (1, "separable", "adamw", {}),
        (2, "residual", "adamw", {}),
        (2, "flattening", "sgd", {}),
        (2, "separable", "sgd", {"scope": "coupled"}),
        (2, "grouped", "adamw", {}),
        (2, "stacking", "sgd", {"scope": "norm"}),
        (2, "transformer", "sgd", {}),
    ],
)
def test_stages_change_nothing_but_the_size(
    ranks: Ranks, world_size: int, net: str, optimizer: str, truncation: dict[str, Any]
) -> None:
    for (drawn, result, sent), (drawn_once, whole, *_), digests, ticket in ranks(
        world_size, _both, net, optimizer, truncation
    ):
        assert digests[0] == digests[1]
        assert [is_stage for _, is_stage, _ in drawn] == [True] * (len(drawn) - 1) + [False]
        assert len(drawn) >= 3, "no stages"
        assert [is_stage for _, is_stage, _ in drawn_once] == [False]
        assert drawn[-1][0] == drawn_once[0][0], "the last channel is zero at the same step"
        for step, _, change in (*drawn, *drawn_once):
            assert change < _CLOSE, f"a draw that is not lossless, after step {step}"
        assert result.keys() == whole.keys()
        for name, value in whole.items():
            assert value.shape == result[name].shape, name
            distance = float((value - result[name]).double().abs().max())
            assert distance <= _CLOSE * (1 + float(value.double().abs().max())), (name, distance)
        if world_size == 2:
            assert sent[-1] == ticket and sent == sorted(sent, reverse=True)


def _misused() -> list[str]:
    training = Staged("residual", "sgd", 0.2)
    engine, said = training.engine, []

    def told(function: Callable[[], object]) -> None:
        try:
            function()
        except ConfigError as error:
            said.append(str(error))

    told(engine.draw)
    while not engine.check().stage:
        training.step()
    told(lambda: engine.draw(copies=[Residual(width=5).double()]))
    engine.draw(copies=[training.average.module])
    removed = int(engine._dropped.channels.removed.nonzero()[0])
    keeping = mask_dropping(engine.groups, *(c for c in DROPPED if c != removed))
    told(lambda: engine.draw(keeping))
    told(lambda: engine.truncate(keeping))
    told(lambda: engine.draw(engine.mask, copies=[Residual().double()]))
    training.step()
    return said


def test_what_is_wrong_with_a_stage_is_told_and_changes_nothing(ranks: Ranks) -> None:
    for said in ranks(2, _misused):
        early, other, *back, stale = said
        assert "wait for verdict.stage or verdict.ticket" in early
        assert "copies[0] is not a copy of the network" in other
        assert len(back) == 2
        for line in back:
            assert "has begun to leave, or has left" in line
        assert "copies[0] is not a copy" in stale


def test_a_mask_from_elsewhere_completes_the_draw_between_stages() -> None:
    training = Staged("residual", "sgd", 0.2)
    engine = training.engine
    while not engine.check().stage:
        training.step()
    engine.draw()
    assert engine.phase == "truncate"
    mask = mask_dropping(engine.groups, *DROPPED, 10)
    engine.draw(mask)
    assert engine.phase == "ticket" and engine.mask == mask
    training.average = AveragedModel(training.network)
    training.step()
    assert training.network.stem.out_channels + training.network.conv1.out_channels == 14 - 6  # type: ignore[operator, union-attr]


def test_a_ticket_drawn_in_stages_is_that_of_one_draw(tmp_path: Any) -> None:
    """What was cut is told in the indices of the dense network."""
    staged, whole = Staged("residual", "sgd", 0.2), Staged("residual", "sgd", 1.0)
    for training, name in ((staged, "staged"), (whole, "whole")):
        training.run()
        training.engine.save_ticket(tmp_path / name)
    loaded = worm_dist.load_ticket(tmp_path / "staged", build=lambda: Residual().double())
    for name, value in staged.network.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    one, other = (
        (tmp_path / name / "ticket.json").read_text().split('"seal"')[0].split('"digest"')[0]
        for name in ("staged", "whole")
    )
    assert one[:200] == other[:200]
