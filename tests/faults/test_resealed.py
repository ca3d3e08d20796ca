"""A saved state with another value somewhere, in files whose hashes fit: refused, with the key.

Hashes find what a disk or a copy has damaged.  They do not find what a script that edits
checkpoints, or another version of the code, has written.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.trainers import small_trainer
from tests.faults.training import train
from tests.leaf_mutations import Mutation, mutations
from tests.ranks import Outcome, Ranks
from tests.resuming import through_a_file
from worm_dist.checkpoint.manager import CheckpointManager
from worm_dist.checkpoint.manifest import CheckpointInfo
from worm_dist.errors import CheckpointError
from worm_dist.training.checkpointer import RUN
from worm_dist.training.run_folder import SETTINGS
from worm_dist.training.run_state import require_valid
from worm_dist.training.share_state import share_state
from worm_dist.training.trainer import Trainer

FOLDER = Path("checkpoints/step-5")
FADING: dict[str, Any] = {
    "preset": "worm",
    "search": {
        "every": "2ba",
        "window": 3,
        "settled": 0.35,
        "l1": 0.01,
        "elbow": {"min_masks": 2, "margin": 0.3, "latest": None},
    },
    "truncation": {"removal": {"duration": "8ba", "fade_steps": 2, "stage": 0.5}},
    "ticket": {"round_to": 1},
}

HARMLESS = re.compile(
    "|".join(
        [
            # Figures of the report, and settings that may change.
            r"result\..*",
            r"phase_stats\..*",
            r"engine\.shared\.settings\.ticket\.recalibrate_.*",
            r"engine\.shared\.verdict\.(distance|live|removed)_.*",
            r"engine\.history\.records\.\d+\.(threshold|distances\.\d+)",
            # None is one of its values, too.
            r"engine\.shared\.schedule\.steps_per_epoch",
            r"engine\.shared\.dropped\.removal\.(allowed_at|guard\.limit)",
            r"ranks\.0\.engine\.training\.(inputs|reducer)",
            r"ranks\.0\.engine\.training\.inputs\.\d+(\.training_norms\.\d+)?",
            # Numbers of the same kind, and precisions that are converted.
            r"(ranks\.0\.|ranks\.0\.engine\.)losses\.\d",
            r"engine\.shared\.dropped\.truncation\.fade\.starts\..*",
            r"schedule\.(base_lrs|_last_lr)\.0",
            r"optimizer\.groups\.0\.options\..*",
            # Not read: it follows from the settings, or from numbers beside it.
            r"schedule\.(_is_initial|_get_lr_called_within_step|lr_lambdas.*)",
            r"ranks\.0\.random\.(python|numpy)\..*",
        ]
    )
)
"""What is accepted if it is of a kind that could be meant."""


def _trainer() -> Trainer:
    return small_trainer(**copy.deepcopy(FADING))


def _saved_while_fading() -> dict[str, Any]:
    trainer = _trainer()
    for number, (inputs, targets) in enumerate(trainer._parts.train_loader):
        trainer._train_step(inputs, targets)
        trainer._position.batch += 1
        if trainer.engine.is_due:
            trainer._check()
        if number == 4:
            break
    assert trainer.engine.phase == "truncate"
    state: dict[str, Any] = through_a_file(trainer.state_dict())
    assert state["engine"]["shared"]["dropped"]["truncation"]["fade"]["starts"]
    assert state["ranks"][0]["engine"]["training"]["inputs"]
    return state


def _names(mutation: Mutation, error: Exception) -> bool:
    """Whether it says where: by a key of the path, since items of lists have none."""
    keys = [key for key in mutation.path if isinstance(key, str)]
    return any(key in str(error) for key in keys[-2:]) and "\n" not in str(error)


def _refused_by_its_types() -> tuple[int, list[str], list[str]]:
    """How many of all mutations are; those that fail otherwise, and those that are accepted."""
    state = _saved_while_fading()
    require_valid(state, FOLDER)
    num_refused, odd, accepted = 0, [], []
    for mutation in mutations(state):
        try:
            require_valid(mutation.state, FOLDER)
        except CheckpointError as error:
            num_refused += 1
            if not _names(mutation, error):
                odd.append(f"{mutation.key} {mutation.how}: {error}")
        else:
            accepted.append(mutation.key)
    return num_refused, odd, accepted


@pytest.mark.fault(46, "every value of a state, removed or of another type")
def test_a_value_of_another_type_is_refused_before_anything_is_used(ranks: Ranks) -> None:
    """KeyError, TypeError and a traceback came out of a state that lacked a key."""
    ((num_refused, odd, accepted),) = ranks(1, _refused_by_its_types)
    assert not odd, odd[:5]
    assert num_refused > 1500
    other = [key for key in accepted if not HARMLESS.fullmatch(key)]
    # The rest is compared with network, optimizer, data and settings, which are not there yet.
    with_network = ("network.", "optimizer.", "engine.", "position.", "schedule.", "ranks.0")
    assert not [key for key in other if not key.startswith(with_network)]


def _shared(state: Any) -> dict[str, Any]:
    shared = share_state(state, torch.device("cpu"))
    assert shared is not None
    return shared


def _refused_in_a_run() -> tuple[int, list[str]]:
    """Of what has the right types: refused by a new trainer, or it trains on."""
    state = _saved_while_fading()
    trainer, num_refused, odd = _trainer(), 0, []
    for mutation in mutations(state):
        try:
            require_valid(mutation.state, FOLDER)
        except CheckpointError:
            continue
        if mutation.key.startswith("engine.shared.settings") and mutation.how != "removed":
            continue  # compared one by one, as settings are
        try:
            trainer.load_state_dict(_shared(mutation.state))
            trainer._train_step(*next(iter(trainer._parts.train_loader)))
            trainer.state_dict()
        except CheckpointError as error:
            num_refused += 1
            if not _names(mutation, error):
                odd.append(f"{mutation.key} {mutation.how}: {error}")
        except Exception as error:
            odd.append(f"{mutation.key} {mutation.how}: {type(error).__name__}: {error}")
        else:
            if not HARMLESS.fullmatch(mutation.key):
                odd.append(f"{mutation.key} {mutation.how}: accepted")
        trainer = _trainer()
    return num_refused, odd


@pytest.mark.slow("builds some hundred trainers, 30 seconds")
@pytest.mark.fault(46, "every value that could be meant: refused, or it trains on")
def test_a_value_that_does_not_fit_the_run_is_refused(ranks: Ranks) -> None:
    (outcome,) = ranks.outcomes(1, _refused_in_a_run, group_timeout=180)
    assert outcome.exitcode == 0, str(outcome)
    num_refused, odd = outcome.value
    assert not odd, "\n".join(odd[:10])
    assert num_refused > 150


# ---- a run ---------------------------------------------------------------------------------------


def _broken_off(out: Path) -> None:
    train(out, heed=lambda halt: halt.stop_at(3), preset="dense")


def _go_on(out: Path) -> None:
    train(out, preset="dense")


def _reseal(out: Path, change: Any) -> None:
    """Write the newest checkpoint again, as whoever edits it would."""
    saved = CheckpointManager(out / "checkpoints").newest()
    assert saved is not None
    state, settings = saved.read(RUN), saved.read(SETTINGS)
    change(state)
    about = CheckpointInfo(step=saved.step, world_size=1, phase="dense", value=None)
    CheckpointManager(out / "checkpoints").save(about, {RUN: state, SETTINGS: settings})


def _spoil(state: Any) -> None:
    state["network"]["features.1.running_var"][0] = torch.nan


@pytest.mark.fault(46, "a key that is missing, NaN in statistics and in momentum, in a run")
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("report"), "report: Field required"),
        (_spoil, "network.features.1.running_var: has NaN or infinite elements"),
        (
            lambda state: state["optimizer"]["parameters"]["features.0.weight"]["moments"][
                "momentum_buffer"
            ].fill_(torch.inf),
            "parameters.features.0.weight.momentum_buffer: has NaN or infinite elements",
        ),
    ],
)
def test_a_run_does_not_go_on_from_it(ranks: Ranks, tmp_path: Path, change: Any, said: str) -> None:
    """NaN in saved weights ended in "the training loss is nan; lower optimizer.lr"."""
    ranks(1, _broken_off, tmp_path / "run")
    _reseal(tmp_path / "run", change)
    refused: Outcome
    (refused,) = ranks.outcomes(1, _go_on, tmp_path / "run")
    assert refused.error == "CheckpointError", str(refused)
    assert said in refused.text and "lower" not in refused.text
