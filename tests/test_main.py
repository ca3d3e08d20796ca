"""The command line as people meet it: real processes, exit codes, what lies in the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.data import default_collate

import worm_dist
from tests.programs import call, variables_of_ranks
from worm_dist.training.data import load_data
from worm_dist.training.run_config import DataConfig

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "digits.yaml"
PYTHON = (sys.executable, "-W", "error", "-m")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def _call(command: Sequence[Any], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: os.environ[key] for key in os.environ if not key.startswith("PYTEST")}
    return subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The main job on two ranks: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("digits")
    words = ["-m", "worm_dist", "train", CONFIG, "--out", folder / "run"]
    first, second = call(words, folder, variables_of_ranks(2))
    assert (first.exitcode, second.exitcode) == (0, 0), first.err + second.err
    assert second.out == ""
    return folder / "run", first.out


def _result(digits: tuple[Path, str]) -> Any:
    return json.loads((digits[0] / "result.json").read_text())


def _board(digits: tuple[Path, str]) -> EventAccumulator:
    (events,) = digits[0].glob("events.out.tfevents.*")
    shown = EventAccumulator(str(events), size_guidance={"images": 0, "scalars": 0})
    return shown.Reload()


def _curve(digits: tuple[Path, str], tag: str) -> dict[int, float]:
    return {event.step: event.value for event in _board(digits).Scalars(tag)}


def _journal(digits: tuple[Path, str]) -> list[Any]:
    return [json.loads(line) for line in (digits[0] / "journal.jsonl").read_text().splitlines()]


@pytest.mark.slow("needs a whole run")
def test_the_main_job_finds_its_ticket(digits: tuple[Path, str]) -> None:
    result = _result(digits)
    assert result["status"] == "ticket"
    assert (result["preset"], result["seed"], result["world_size"]) == ("worm", 0, 2)
    assert result["backend"] == "gloo"
    assert "1437 train / 360 test" in result["data"]
    assert result["accuracy"]["final"] >= 0.98
    assert result["accuracy"]["after_draw"] >= 0.94
    assert result["parameters"]["ticket"] <= 0.45 * result["parameters"]["dense"]
    assert result["flops"]["ticket"] <= 0.45 * result["flops"]["dense"]
    traffic = result["traffic"]
    assert traffic["dense_bytes_per_step"] == 4 * result["parameters"]["dense"]
    assert traffic["ticket_bytes_per_step"] == 4 * result["parameters"]["ticket"]
    # 22 steps an epoch, 16 epochs: dense to the elbow, then ever less, then the ticket.
    elbow, ticket = (round(22 * result[f"{phase}_epoch"]) for phase in ("elbow", "ticket"))
    curve = _curve(digits, "traffic/sent_bytes_per_step")
    removing = [sent for step, sent in sorted(curve.items()) if elbow < step <= ticket]
    assert removing == sorted(removing, reverse=True)
    assert removing[0] < 0.55 * traffic["dense_bytes_per_step"]
    assert removing[-1] < 1.1 * traffic["ticket_bytes_per_step"]
    least = (
        elbow * traffic["dense_bytes_per_step"] + (352 - elbow) * traffic["ticket_bytes_per_step"]
    )
    assert least < traffic["total_bytes"] < 1.2 * least
    assert result["flops"]["mean"] < 0.45 * result["flops"]["dense"]
    seconds = result["seconds"]
    assert sum(seconds[phase] for phase in ("search", "truncate", "ticket")) == pytest.approx(
        seconds["total"], abs=0.5
    )


@pytest.mark.slow("needs a whole run")
def test_the_journal_has_a_line_for_each_check_and_phase(digits: tuple[Path, str]) -> None:
    result, lines = _result(digits), _journal(digits)
    checks = [line for line in lines if line["event"] == "check"]
    assert len(checks) == result["checks"]
    assert [line["step"] for line in checks] == [22 * (n + 1) for n in range(len(checks))]
    assert [len(line["distances"]) for line in checks] == [0, 1]
    assert checks[-1]["elbow"] and checks[-1]["mask_digest"] == result["mask_digest"]
    assert [line["elbow"] for line in checks].count(True) == 1
    left = [line["removed_fraction"] for line in lines if line["event"] == "removal"]
    assert left == sorted(left) and left[-1] == 1
    assert not any(line["paused"] for line in lines if line["event"] == "removal")
    sizes = [line["parameters"] for line in lines if line["event"] == "stage"]
    assert len(sizes) >= 2 and sizes == sorted(sizes, reverse=True)
    phases = [(line["phase"], line["epoch"]) for line in lines if line["event"] == "phase"]
    assert phases == [("truncate", result["elbow_epoch"]), ("ticket", result["ticket_epoch"])]


@pytest.mark.slow("needs a whole run")
def test_tensorboard_shows_curves_pictures_and_settings(digits: tuple[Path, str]) -> None:
    shown = _board(digits)
    tags = shown.Tags()
    assert {
        "train/loss",
        "train/learning_rate",
        "train/images_per_second",
        "test/accuracy",
        "search/distance_mean",
        "search/distance_max",
        "search/settled_threshold",
        "search/elbow_threshold",
        "search/live_fraction",
        "traffic/sent_bytes_per_step",
        "traffic/dense_bytes_per_step",
        "compute/flops_per_sample",
        "compute/dense_flops_per_sample",
    } <= set(tags["scalars"])
    assert set(tags["images"]) == {
        "search/masks",
        "search/distance_matrix",
        "search/distance_curve",
    }
    sent = _curve(digits, "traffic/sent_bytes_per_step")
    traffic = _result(digits)["traffic"]
    assert sent[22] == traffic["dense_bytes_per_step"]
    assert sent[352] == traffic["ticket_bytes_per_step"]
    flops = _curve(digits, "compute/flops_per_sample")
    counted = _result(digits)["flops"]
    assert (flops[22], flops[352]) == (counted["dense"], counted["ticket"])
    assert shown.PluginTagToContent("hparams")


@pytest.mark.slow("needs a whole run")
def test_the_console_is_plain_where_it_is_no_terminal(digits: tuple[Path, str]) -> None:
    printed = digits[1]
    assert "\x1b" not in printed and "\r" not in printed
    assert sum(line.startswith("epoch ") for line in printed.splitlines()) == 16
    assert "truncation starts" in printed and "ticket drawn at epoch" in printed
    assert str(digits[0]) in printed.replace("\n", "").replace(" ", "")


@pytest.mark.slow("needs a whole run")
def test_the_ticket_answers_as_the_run_says(digits: tuple[Path, str]) -> None:
    network = worm_dist.load_ticket(digits[0] / "ticket").eval()
    result = _result(digits)
    assert sum(p.numel() for p in network.parameters()) == result["parameters"]["ticket"]
    test = load_data(DataConfig(name="digits")).test
    images, classes = default_collate([test[index] for index in range(len(test))])
    right = network(images).argmax(dim=1) == classes
    assert float(right.double().mean()) == pytest.approx(result["accuracy"]["final"], abs=1e-6)


@pytest.mark.slow("trains in processes of their own")
def test_one_process_without_a_launcher_trains_too_and_again(tmp_path: Path) -> None:
    """The second time puts the first one's folder aside."""
    words = ["-m", "worm_dist", "train", CONFIG, "--epochs", 1, "--preset", "dense", "--seed=3"]
    done = _call([sys.executable, "-W", "error", *words], tmp_path)
    assert done.returncode == 0, done.stderr
    (again,) = call(words, tmp_path)
    assert again.exitcode == 0, again.err
    results = list(tmp_path.glob("runs/digits*/result.json"))
    assert len(results) == 2
    for result in (json.loads(path.read_text()) for path in results):
        assert (result["status"], result["world_size"], result["seed"]) == ("dense", 1, 3)
        of_a_ticket = result["parameters"]["ticket"], result["mask_digest"], result["elbow_epoch"]
        assert of_a_ticket == (None, None, None)


@pytest.mark.slow("starts torchrun")
@pytest.mark.fault(13, "told once, alone and under torchrun")
def test_all_mistakes_are_told_once_by_rank_zero_with_exit_code_2(tmp_path: Path) -> None:
    wrong = ["--search.prune_ratoi", "0.3", "--optimizer.lr=fast", "--data.batch_size", "0"]
    done = _call([*PYTHON, "worm_dist", "train", CONFIG, *wrong], tmp_path)
    assert done.returncode == 2
    assert "search.prune_ratoi: unknown key; did you mean search.prune_ratio?" in done.stderr
    assert "optimizer.lr:" in done.stderr and "data.batch_size:" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "runs").exists()

    done = _call([*TORCHRUN, 2, "-m", "worm_dist", "train", CONFIG, *wrong], tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("did you mean search.prune_ratio?") == 1
    assert "exitcode  : 2" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model.name", "vgg_smal"], "did you mean vgg_small?"),
        (["--data.name=cifar10", "--data.root=/nowhere"], "/nowhere"),
        (["--data.batch_size", "5000"], "data.batch_size: 5000 is more than the 1437 samples"),
        (["--seed"], "expected one argument"),
        (["epochs", "3"], "expected --key.subkey value"),
        (["--epochs"], "its value is missing"),
    ],
)
@pytest.mark.fault(13, "mistakes that show later: model, data, command line")
def test_a_users_mistake_is_one_clear_line(tmp_path: Path, arguments: list[str], says: str) -> None:
    (ended,) = call(["-m", "worm_dist", "train", CONFIG, *arguments], tmp_path)
    assert ended.exitcode == 2
    assert says in ended.err
    assert "Traceback" not in ended.err


@pytest.mark.fault(21, "RANK without WORLD_SIZE")
def test_a_launcher_that_contradicts_itself_is_exit_code_6(tmp_path: Path) -> None:
    (ended,) = call(["-m", "worm_dist", "train", CONFIG], tmp_path, [{"RANK": "0"}])
    assert ended.exitcode == 6
    assert "RANK set, but not WORLD_SIZE" in ended.err
