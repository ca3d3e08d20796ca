"""A draw in the middle of a training under DeepSpeed: what stands around the network goes on."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.optim.swa_utils import AveragedModel

import worm_dist
from tests.failing import BROKEN, PLACES, broken
from tests.nets import Residual, random_images
from tests.oracles import mask_dropping
from tests.ranks import Outcome, Ranks
from tests.resuming import differences
from tests.zero.building import engine_around, settings_of, whole
from worm_dist import BackendError, DrawError, WormConfig

pytestmark = pytest.mark.slow("imports DeepSpeed on every rank, many times")

Stage = tuple[int, str]

_STAGES: tuple[Stage, ...] = ((0, "bf16"), (1, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16"))
_SCHEDULERS: dict[str, dict[str, Any]] = {
    "WarmupLR": {"warmup_max_lr": 0.1, "warmup_num_steps": 20, "warmup_type": "linear"},
    "OneCycle": {"cycle_min_lr": 0.001, "cycle_max_lr": 0.1, "cycle_first_step_size": 5},
}
_DROPPED = (0, 3, 9)


class Training:
    """A residual network in DeepSpeed's engine, with an engine of ours attached or not."""

    def __init__(self, stage: int, precision: str, attached: bool = True, **settings: Any) -> None:
        torch.manual_seed(0)
        self.stage = stage
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        scheduler: Callable[..., Any] | None = settings.pop("client_scheduler", None)
        if precision == "bf16":
            settings["bf16"] = {"enabled": True}
            settings["data_types"] = {"buffer_dtype": "bf16"}
        self.network: nn.Module = Residual()
        self.optimizer = SGD(self.network.parameters(), lr=0.05, momentum=0.9)
        arguments = {} if scheduler is None else {"lr_scheduler": scheduler(self.optimizer)}
        settings = settings_of(stage, **settings)
        self.first = engine_around(self.network, self.optimizer, settings, **arguments)
        if attached:
            self.engine = worm_dist.attach(
                self.first,
                self.optimizer,
                WormConfig(truncation={"frozen_weights": "hold"}),
                example_inputs=self.images(1),
                steps_per_epoch=4,
            )

    @property
    def model(self) -> Any:
        return self.engine.model if hasattr(self, "engine") else self.first

    def images(self, number: int) -> Tensor:
        return random_images(4, seed=10 * number + dist.get_rank()).to(self._dtype)

    def step(self, *numbers: int) -> None:
        for number in numbers:
            loss = self.model(self.images(number)).float().square().mean()
            self.model.backward(loss)
            self.model.step()

    def draw(self, **arguments: Any) -> None:
        self.engine.draw(mask_dropping(self.engine.groups, *_DROPPED), **arguments)

    @property
    def weights(self) -> Tensor:
        with whole(self.model, self.network):
            return torch.cat([p.detach().float().flatten() for p in self.network.parameters()])


def _rates(stage: int, precision: str, **settings: Any) -> list[Any]:
    """Learning rates and momenta after every step, with a draw and without."""
    drawn = Training(stage, precision, **settings)
    plain = Training(stage, precision, attached=False, **settings)
    rates = []
    for number in range(8):
        if number == 4:
            drawn.draw()
        for training in (drawn, plain):
            training.step(number)
        here, there = drawn.model, plain.model
        rates.append(((here.get_lr(), here.get_mom()), (there.get_lr(), there.get_mom())))
        assert drawn.optimizer.param_groups[0]["lr"] == here.get_lr()[0]
    return rates


def _schedules(stage: int, precision: str) -> dict[str, list[Any]]:
    found = {
        name: _rates(stage, precision, scheduler={"type": name, "params": parameters})
        for name, parameters in _SCHEDULERS.items()
    }
    found["client's"] = _rates(
        stage, precision, client_scheduler=lambda optimizer: CosineAnnealingLR(optimizer, 10)
    )
    return found


def _checkpoints(stage: int, precision: str, folder: str) -> dict[str, bool]:
    """Whether two steps after a checkpoint are the same again once it has been loaded."""
    training = Training(stage, precision)
    training.step(0, 1, 2)
    training.engine.truncate(mask_dropping(training.engine.groups, *_DROPPED))
    training.step(3)
    found = {"while it truncates": _same_again(training, folder, 4)}
    training.draw()
    found["right after the draw"] = _same_again(training, folder, 6)
    return found


def _same_again(training: Training, folder: str, number: int) -> bool:
    training.model.save_checkpoint(folder, tag=str(number))
    steps = training.model.global_steps
    training.step(number, number + 1)
    weights = training.weights
    training.model.load_checkpoint(folder, tag=str(number))
    assert training.model.global_steps == steps
    training.step(number, number + 1)
    return torch.equal(training.weights, weights)


def _average(stage: int, precision: str) -> tuple[Tensor, Tensor]:
    """An averaged copy after two steps beyond a draw, and what it should be."""
    training = Training(stage, precision)
    average = AveragedModel(training.network)
    training.step(0)
    average.update_parameters(training.network)
    training.draw(copies=[average.module])
    weights = [torch.cat([p.detach().flatten() for p in average.module.parameters()]).float()]
    for number in (1, 2):
        training.step(number)
        average.update_parameters(training.network)
        weights.append(training.weights)
    averaged = torch.cat([p.detach().float().flatten() for p in average.module.parameters()])
    return averaged, torch.stack(weights).mean(dim=0)


def _events(stage: int, precision: str, folder: str) -> list[list[int]]:
    """For every file of events on rank zero, the samples at which a learning rate was written."""
    monitor = {"enabled": True, "output_path": folder, "job_name": "job"}
    training = Training(stage, precision, tensorboard=monitor)
    training.step(0, 1, 2)
    training.draw()
    training.step(3, 4, 5)
    dist.barrier()
    if dist.get_rank() > 0:
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = []
    for path in Path(folder).rglob("events*"):
        events = EventAccumulator(str(path))
        events.Reload()
        found.append([event.step for event in events.Scalars("Train/Samples/lr")])
    return found


def _between_passes(stage: int, precision: str) -> tuple[list[int], list[int], Tensor]:
    """Steps of both engines and passes, with a draw after the first of two passes."""
    training = Training(stage, precision, gradient_accumulation_steps=2)
    training.step(0, 1, 2)
    model, engine = training.model, training.engine
    before = [engine.step, model.global_steps, model.micro_steps]
    training.draw()
    training.step(3, 4, 5)
    after = [engine.step, training.model.global_steps, training.model.micro_steps]
    return before, after, training.weights


def _changed_batch(stage: int, precision: str) -> tuple[int, int]:
    """Batch and passes a step after a draw, of which the settings know nothing."""
    training = Training(stage, precision)
    training.model.set_train_batch_size(24)
    training.draw()
    return training.model.train_batch_size(), training.model.gradient_accumulation_steps()


def _dead(stage: int, precision: str) -> list[str]:
    """What the engine and the optimizer from before the draw say."""
    training = Training(stage, precision)
    optimizer = training.first.optimizer
    training.draw()
    said = [str(optimizer.param_groups[0]["lr"])]
    for use in (lambda: training.first(training.images(0)), optimizer.step, optimizer.zero_grad):
        try:
            use()
            said.append("nothing")
        except BackendError as error:
            said.append(str(error))
    return said


def _undone(stage: int, precision: str) -> list[str]:
    """What is wrong after a draw has failed at each place in turn, and then succeeds."""
    alone, failing = Training(stage, precision), Training(stage, precision)
    wrong: list[str] = []
    logged: list[str] = []

    def seen(record: logging.LogRecord) -> bool:
        logged.append(record.getMessage())
        return True

    logging.getLogger("worm_dist.engine.draw").addFilter(seen)
    for training in (alone, failing):
        training.step(0, 1)
        training.engine.truncate(mask_dropping(training.engine.groups, *_DROPPED))
        training.step(2)
    for number, place in enumerate(PLACES):
        if "the optimizer" in place:
            continue  # it is cut on the way from one of DeepSpeed's engines to the next
        before = _outcome(failing)
        # DeepSpeed's engine is built by all ranks together, so there it may not fail on one alone.
        rank = None if place == "before the new wrapper" else 1
        try:
            with broken(place, rank):
                failing.draw()
        except DrawError as error:
            where = "ranks 0, 1: " if rank is None else "rank 1: "
            if BROKEN not in str(error) or where not in str(error):
                wrong.append(f"{place}: {error}")
        else:
            wrong.append(f"{place}: drawn")
        wrong += differences(before, _outcome(failing), place)
        for training in (alone, failing):
            training.step(3 + number)
        wrong += differences(_outcome(alone), _outcome(failing), f"{place}, a step later")
    # Before ranks are compared: DeepSpeed's other ranks may wait for one that has failed.
    if [line for line in logged if BROKEN in line and "no new wrapper" in line] != logged[:2]:
        wrong.append(f"logged: {logged}")
    for training in (alone, failing):
        training.draw()
        training.step(50, 51)
    return [*wrong, *differences(_outcome(alone), _outcome(failing), "in the end")]


def _outcome(training: Training) -> dict[str, Any]:
    modules = training.network.named_modules()
    return {
        "weights": training.weights,
        "buffers": [buffer.clone() for buffer in training.network.buffers()],
        "modes": {name: (type(module), module.training) for name, module in modules},
        "phase": training.engine.phase.value,
        "rates": training.model.get_lr(),
        "steps": training.model.global_steps,
        # In stage 3 to look at the weights releases some, which are gathered once more.
        "sent": training.engine.traffic.total_sent_bytes if training.stage < 3 else None,
    }


def _everything(stage: int, precision: str, folder: str) -> dict[str, Any]:
    return {
        "schedules": _schedules(stage, precision),
        "checkpoints": _checkpoints(stage, precision, f"{folder}/checkpoints"),
        "average": _average(stage, precision) if stage < 3 else None,
        "events": _events(stage, precision, f"{folder}/events"),
        "between passes": _between_passes(stage, precision),
        "changed batch": _changed_batch(stage, precision),
        "dead": _dead(stage, precision),
        "undone": _undone(stage, precision),
    }


@pytest.fixture(scope="module", params=_STAGES, ids=lambda stage: f"{stage[0]} {stage[1]}")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[Outcome]:
    """A call of two ranks for each stage."""
    folder = tmp_path_factory.mktemp("draw")
    return Ranks(folder).outcomes(2, _everything, *request.param, str(folder))


@pytest.fixture
def everyone(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """What each rank has seen."""
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    return [outcome.value for outcome in outcomes]


@pytest.mark.parametrize("name", [*_SCHEDULERS, "client's"])
def test_a_schedule_goes_on(everyone: list[dict[str, Any]], name: str) -> None:
    for seen in everyone:
        rates = seen["schedules"][name]
        assert all(drawn == plain for drawn, plain in rates)
        assert all(rate != before for before, rate in itertools.pairwise(rates))


@pytest.mark.parametrize("when", ["while it truncates", "right after the draw"])
def test_a_checkpoint_of_deepspeeds_can_be_returned_to(
    everyone: list[dict[str, Any]], when: str
) -> None:
    assert all(seen["checkpoints"][when] for seen in everyone)


def test_an_averaged_copy_follows(everyone: list[dict[str, Any]]) -> None:
    for seen in everyone:
        if seen["average"] is None:
            pytest.skip("in stage 3 a rank has no whole weights to average")
        averaged, expected = seen["average"]
        torch.testing.assert_close(averaged, expected, rtol=0.02, atol=0.002)


def test_one_file_of_events_is_written_on(everyone: list[dict[str, Any]]) -> None:
    assert [seen["events"] for seen in everyone] == [[[8, 16, 24, 32, 40, 48]], []]


def test_a_draw_between_passes_drops_what_waits(everyone: list[dict[str, Any]]) -> None:
    weights = []
    for seen in everyone:
        before, after, mine = seen["between passes"]
        assert before == [1, 1, 3]
        assert after == [3, 3, 6]
        weights.append(mine)
    assert bool(weights[0].isfinite().all()) and torch.equal(*weights)


def test_a_batch_size_that_was_changed_stays(everyone: list[dict[str, Any]]) -> None:
    assert [seen["changed batch"] for seen in everyone] == [(24, 3), (24, 3)]


def test_a_draw_that_fails_anywhere_leaves_everything_as_it_was(
    everyone: list[dict[str, Any]],
) -> None:
    for seen in everyone:
        assert seen["undone"] == []


def test_what_was_before_the_draw_says_so(everyone: list[dict[str, Any]]) -> None:
    for seen in everyone:
        rate, *said = seen["dead"]
        assert rate == "0.05"
        assert len(said) == 3
        assert all("continue with engine.model and engine.optimizer" in text for text in said)
