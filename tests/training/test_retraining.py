"""What the settings of ``retraining`` and ``model`` do around the draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.ranks import Ranks
from worm_dist import ConfigError
from worm_dist.checkpoint.state_file import pack
from worm_dist.distributed.init import RankInfo
from worm_dist.errors import CheckpointError
from worm_dist.models import build_model
from worm_dist.training.initial_network import initial_network
from worm_dist.training.rank_state import seed_all
from worm_dist.training.reporting.recovery import recovery
from worm_dist.training.reporting.reporter import Report
from worm_dist.training.reporting.result import Result
from worm_dist.training.run_config import ModelConfig, RunConfig
from worm_dist.training.trainer import Trainer

MODEL: dict[str, Any] = {
    "name": "vgg_small",
    "num_classes": 10,
    "in_channels": 1,
    "arguments": {"widths": [8, "M", 16]},
}


def _config(**retraining: Any) -> RunConfig:
    """Draws at the second mask, after one epoch of 22 steps."""
    return RunConfig(
        preset="early-bird",
        epochs=6,
        search={"prune_ratio": 0.3, "window": 2, "settled": 1.0, "every": "1ep"},
        data={"batch_size": 64, "augment": False},
        model={"arguments": MODEL["arguments"], "norm_scale": 0.5},
        optimizer={"lr": 0.1, "momentum": 0.9},
        schedule={"name": "step", "milestones": [1]},
        retraining=retraining,
    )


class _AtDraw(Report):
    """The ticket's weights, moments and learning rate when its training begins, and later rates."""

    def __init__(self) -> None:
        self.rates: list[float] = []
        self.first: dict[str, Tensor] = {}
        self.num_moments: int | None = None
        self.trainer: Trainer

    def step(self, engine: Any, learning_rate: float, loss: Tensor) -> None:
        self.rates.append(round(float(engine.optimizer.param_groups[0]["lr"]), 6))

    def epoch(self, epoch: int, engine: Any, evaluation: Any, flops: int) -> None:
        if str(engine.phase) == "ticket" and not self.first:
            network = self.trainer._parts.network
            self.first = {name: p.clone() for name, p in network.state_dict().items()}
            self.num_moments = len(engine.optimizer.state)


def _run(config: RunConfig, resumed_from: int | None = None) -> dict[str, Any]:
    report = _AtDraw()
    trainer = Trainer(config, RankInfo(0, 1, 0), torch.device("cpu"), report)
    report.trainer = trainer
    result = trainer.run()
    engine, network = trainer.engine, trainer._parts.network
    assert engine.mask is not None
    return {
        "result": result.as_dict(),
        "rates": report.rates,
        "first": report.first,
        "num_moments": report.num_moments,
        "penalty": float(engine.penalty().detach()),
        "scales": sum(
            float(m.weight.detach().abs().sum())
            for m in network.modules()
            if isinstance(m, nn.BatchNorm2d)
        ),
        "mask": dict(engine.mask.items()),
        "epoch": trainer._position.epoch,
    }


def _initial(config: RunConfig) -> nn.Module:
    seed_all(config.seed)
    return initial_network(config.model, MODEL)


def _drawn(network: nn.Module, mask: dict[str, Tensor]) -> dict[str, Tensor]:
    """The first convolution and its norm, without dropped channels."""
    kept = mask["features.0"]
    state = network.state_dict()
    return {name: state[name][kept] for name in ("features.0.weight", "features.1.weight")}


def test_a_ticket_restarts_from_its_initial_weights(ranks: Ranks) -> None:
    config = _config(epochs=2, optimizer="fresh", weights="start")
    (seen,) = ranks(1, _run, config)
    # The draw is at the end of an epoch, before its test: no step has been taken since.
    for name, expected in _drawn(_initial(config), seen["mask"]).items():
        assert torch.equal(seen["first"][name], expected), name
    assert seen["num_moments"] == 0
    assert bool((seen["first"]["features.1.weight"] == 0.5).all())
    # One epoch of search, and two of the ticket; the schedule starts again.
    assert seen["epoch"] == seen["result"]["ticket_epoch"] + 2 == 3
    # After each step the rate of the next one, but for what the draw changes.
    assert seen["rates"] == [0.1] * 21 + [0.01] + [0.1] * 21 + [0.01] * 23
    assert seen["result"]["accuracy"]["after_one_epoch"] is not None
    # The L1 penalty goes on.
    assert seen["penalty"] == pytest.approx(1e-4 * seen["scales"], rel=1e-4)


def test_by_default_the_ticket_goes_on(ranks: Ranks) -> None:
    (seen,) = ranks(1, _run, _config())
    assert seen["epoch"] == 6 and seen["num_moments"] > 0
    assert seen["rates"] == [0.1] * 21 + [0.01] * (1 + 22 * 5)


def test_the_run_ends_at_an_accuracy(ranks: Ranks) -> None:
    (seen,) = ranks(1, _run, _config(epochs=5, until_accuracy=0.001))
    assert seen["epoch"] == 1 and seen["result"]["recovery"] == {"accuracy": 0.001, "epochs": 0.0}


def _saved(config: RunConfig, until: int) -> tuple[Any, dict[str, Tensor]]:
    """The state after some epochs, and the weights at the end."""
    trainer = Trainer(config, RankInfo(0, 1, 0), torch.device("cpu"), Report())
    for _ in range(until):
        trainer._train_epoch()
        trainer._end_epoch()
    state = trainer.state_dict()
    pack(state)
    copied = torch.utils._pytree.tree_map_only(Tensor, torch.clone, state)
    trainer.run()
    return copied, trainer._parts.network.state_dict()


def _resumed(config: RunConfig, until: int) -> list[str]:
    state, expected = _saved(config, until)
    trainer = Trainer(config, RankInfo(0, 1, 0), torch.device("cpu"), Report())
    trainer.load_state_dict({**state, "rank": state["ranks"][0]})
    trainer.run()
    found = trainer._parts.network.state_dict()
    return [name for name in expected if not torch.equal(expected[name], found[name])]


@pytest.mark.parametrize(("weights", "window", "until"), [("start", 3, 1), ("1ep", 4, 2)])
def test_a_resumed_run_ends_equal(ranks: Ranks, weights: str, window: int, until: int) -> None:
    """Broken off in the search, before the ticket restarts from weights that only the checkpoint
    has; and the schedule starts again."""
    config = _config(epochs=2, optimizer="fresh", weights=weights)
    config = RunConfig(
        **{**config.model_dump(mode="json"), "search": {"window": window, "settled": 1.0}}
    )
    assert ranks(1, _resumed, config, until) == [[]]


def test_weights_are_read_from_a_file(tmp_path: Path) -> None:
    torch.manual_seed(5)
    trained = build_model(**MODEL)
    torch.save(trained.state_dict(), tmp_path / "weights.pth")
    config = ModelConfig(weights=str(tmp_path / "weights.pth"))
    found = initial_network(config, MODEL).state_dict()
    assert all(torch.equal(found[name], value) for name, value in trained.state_dict().items())
    with pytest.raises(CheckpointError, match=r"^model\.weights: .* head\.bias is \[10\], not"):
        initial_network(config, {**MODEL, "num_classes": 1000})


def test_a_file_that_would_execute_code_is_refused(tmp_path: Path) -> None:
    torch.save({"head.bias": nn.ReLU()}, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=r"^model\.weights: .* cannot be read"):
        initial_network(ModelConfig(weights=str(tmp_path / "weights.pth")), MODEL)


def test_weights_contradict_initial_scales() -> None:
    with pytest.raises(ConfigError, match=r"norm_scale 0\.5 contradicts weights 'a'"):
        RunConfig(model={"weights": "a", "norm_scale": 0.5})


def test_deepspeed_keeps_what_it_has() -> None:
    with pytest.raises(ConfigError, match=r"retraining\.optimizer 'fresh' and retraining\.weights"):
        RunConfig(
            distributed={"backend": "deepspeed"},
            retraining={"optimizer": "fresh", "weights": "2ep"},
        )


@pytest.mark.parametrize(
    ("after_draw", "tests", "expected"),
    [
        (0.9, [], 0.0),
        (0.5, [(2, 0.95), (3, 0.8), (4, 0.9), (5, 0.99)], 1.5),
        (0.5, [(3, 0.8)], None),
    ],
)
def test_recovery_counts_from_the_draw(
    after_draw: float, tests: list[tuple[float, float]], expected: float | None
) -> None:
    assert recovery(0.9, 2.5, after_draw, tests) == expected


def test_a_result_has_the_figures_of_the_papers() -> None:
    result = Result(preset="", seed=0, world_size=1, backend="", data="")
    result.tested(1, 0.8, None)
    assert (result.accuracy.final, result.recovery.epochs) == (0.8, None)
    result.ticket_epoch, result.accuracy.before_draw, result.accuracy.after_draw = 1.4, 0.8, 0.1
    for epoch, accuracy in ((2, 0.5), (3, 0.7), (4, 0.8), (5, 0.9)):
        result.tested(epoch, accuracy, None)
    assert result.accuracy.after_one_epoch == 0.7
    assert result.recovery.accuracy == 0.8 and result.recovery.epochs == pytest.approx(2.6)
