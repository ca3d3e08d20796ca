from __future__ import annotations

import argparse
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from worm_dist import ConfigError, WormError
from worm_dist.__main__ import main
from worm_dist.models import build_model
from worm_dist.planning.command import add_parser, run

ROOT = Path(__file__).parents[2]
DIGITS = str(Path(__file__).parents[2] / "configs" / "digits.yaml")


def _plan(*words: str) -> int:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return run(parser.parse_args(["plan", *words]))


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    assert _plan(*words, "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert isinstance(content, dict)
    return content


def test_settings_are_planned_for(capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(DIGITS) == 0
    assert "Drops 224 of 448 channels: 50 % asked, 50 % after" in capsys.readouterr().out
    assert not dist.is_initialized()


def test_one_object_says_all(capsys: pytest.CaptureFixture[str]) -> None:
    words = (DIGITS, "--ratio", "0.25", "--world", "2", "--bandwidth", "1Gbit/s", "--batch", "2")
    plan = _json(capsys, *words)
    assert plan["model"] == {
        "name": "vgg_small",
        "arguments": {},
        "sample_shape": [1, 8, 8],
        "num_classes": 10,
    }
    assert plan["dropped"]["by"] == "settings"
    assert plan["dropped"]["prune_ratio"] == plan["dropped"]["ratio_reached"] == 0.25
    assert plan["settings"]["search"]["importance"] == "auto"
    assert plan["settings"]["ticket"] == {
        "recalibrate_batches": 8,
        "recalibrate_memory_mb": 256,
        "round_to": 8,
    }
    first = plan["groups"][0]
    assert (first["name"], first["num_channels"], first["num_kept"]) == ("features.0", 32, 24)
    assert (first["producers"], first["norms"]) == (["features.0"], ["features.1"])
    assert (first["gates"], first["consumers"]) == ([], ["features.3"])
    assert first["places_each"] == 1
    for stage, total in plan["total"].items():
        for key, value in total.items():
            parts = [group["costs"][stage][key] for group in plan["groups"]]
            assert sum(parts) + plan["others"]["costs"][stage][key] == value
    assert plan["others"]["modules"] == ["head"] and plan["dense"] == {}
    assert plan["estimate"]["samples_per_rank"] == 2
    assert plan["estimate"]["bandwidth_bits_per_second"] == 1e9
    steps = plan["estimate"]["steps"]
    # Two buckets, each of two messages of 50 microseconds.
    expected = pytest.approx(1_152_680 * 8 / 1e9 + 2 * 2 * 50e-6)
    assert steps["dense"]["communication_seconds"] == expected


def test_a_sharded_run_also_sends_weights(capsys: pytest.CaptureFixture[str]) -> None:
    """Half of them on each of two ranks, for both passes but those of the root."""
    config = str(ROOT / "configs" / "fsdp.yaml")
    plan = _json(capsys, config)
    assert plan["backend"] == {"name": "fsdp", "world_size": 2}
    dense, num_bytes = plan["traffic"]["dense"], 4 * plan["total"]["dense"]["parameters"]
    assert dense["gradient_bytes"] == num_bytes
    assert num_bytes / 2 < dense["weight_bytes"] < num_bytes
    assert plan["training_memory"]["dense"]["weights"] == num_bytes / 2
    four = _json(capsys, config, "--backend", "zero-3", "--world", "4")
    assert four["backend"] == {"name": "zero-3", "world_size": 4}
    # All is small enough to stay gathered, and is gathered once.
    assert four["traffic"]["dense"]["weight_bytes"] == pytest.approx(num_bytes / 4, rel=1e-4)
    alone = _json(capsys, config, "--backend", "ddp")
    assert (
        alone["traffic"]["dense"]["total_bytes"]
        == num_bytes
        == alone["traffic"]["dense"]["gradient_bytes"]
    )
    assert _plan(config, "--world", "4") == 0
    text = capsys.readouterr().out
    assert "Trains under fully_shard, on 4 ranks." in text
    assert "Bytes a step, as each of 4 ranks hands them to collectives" in text


def test_a_compute_time_can_be_given(capsys: pytest.CaptureFixture[str]) -> None:
    link = ("--world", "1024", "--bandwidth", "100Gbit/s", "--latency", "5us", "--batch", "4")
    plan = _json(capsys, DIGITS, "--ratio", "0.5", *link, "--compute", "40ms")
    steps, total = plan["estimate"]["steps"], plan["total"]
    assert steps["dense"]["compute_seconds"] == 0.04
    share = total["ticket"]["flops"] / total["dense"]["flops"]
    assert steps["ticket"]["compute_seconds"] == pytest.approx(0.04 * share)
    assert plan["estimate"]["latency_seconds"] == pytest.approx(5e-6)
    assert plan["estimate"]["rounds"] == 0
    assert set(plan["estimate"]["formulas"]) == {"all-reduce", "reduce-scatter", "all-gather"}


def test_the_standard_error_says_what_it_does_meanwhile(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert _plan(DIGITS, "--world", "2", "--bandwidth", "1Gbit/s", "--batch", "4") == 0
    said = capsys.readouterr().err.splitlines()
    assert said[:3] == [
        "plan: loading torch",
        "plan: building vgg_small",
        "attach: tracing the network",
    ]
    rounds = [line for line in said if line.startswith("attach: verifying the couplings of 6")]
    assert len(rounds) == 6 and rounds[-1].endswith("round 6 of 6")
    assert "attach: found 6 channel groups with 448 channels" in said
    assert said[-1].startswith("plan: measuring passes on batches of ")
    assert not logging.getLogger("worm_dist").handlers


def chatty(num_classes: int, in_channels: int) -> nn.Module:
    """A function of the user's that prints."""
    print("here I am")
    return build_model("vgg_small", num_classes, in_channels, {"widths": [8, "M", 8]})


def test_json_is_alone_on_the_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _json(capsys, f"{__name__}:chatty", "--input", "1x8x8", "--classes", "10")
    assert plan["model"]["name"].endswith("chatty")


def test_a_name_is_planned_for_with_its_input(capsys: pytest.CaptureFixture[str]) -> None:
    plan = _json(capsys, "resnet20", "--input", "1x16x16", "--classes", "7", "--ratio", "0.3")
    assert plan["model"]["sample_shape"] == [1, 16, 16] and plan["model"]["num_classes"] == 7
    assert plan["estimate"] is None


def test_a_budget_shows_the_widths_that_meet_it(capsys: pytest.CaptureFixture[str]) -> None:
    """Instead of the file's prune_ratio."""
    plan = _json(capsys, DIGITS, "--budget", "flops=0.25")
    dropped, totals = plan["dropped"], plan["total"]
    assert dropped["budget"] == {"flops": 0.25} and dropped["prune_ratio"] is None
    reached = totals["ticket"]["flops"] / totals["dense"]["flops"]
    assert dropped["budget_reached"] == reached
    assert 0.23 < reached <= 0.25
    widths = [group["num_kept"] for group in plan["groups"]]
    assert all(width % 8 == 0 for width in widths[2:])
    assert _plan(DIGITS, "--budget", "flops=0.25") == 0
    text = capsys.readouterr().out
    assert f"25 % of the FLOPs; {100 * reached:.4g} % after rounding to 8" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nosuch",), "model.name"),
        (("nosuch.yaml",), "No such file"),
        (("vgg_small", "--input", "3x224"), "--input: '3x224'"),
        (("vgg_small", "--input", "3x0x8"), "--input: '3x0x8'"),
        (("vgg_small", "--classes", "0"), "--classes: 0"),
        (("vgg_small", "--ratio", "1.5"), "search.prune_ratio"),
        (("vgg_small", "--ratio", "nan"), "search.prune_ratio"),
        ((DIGITS, "--ratio", "1.5"), "search.prune_ratio"),
        (("vgg_small", "--world", "0"), "--world: 0 ranks"),
        (("vgg_small", "--world", "1", "--backend", "fsdp"), "shards the network over the ranks"),
        (("vgg_small", "--bandwidth", "1Gbit/s"), "needs both"),
        (("vgg_small", "--batch", "8"), "--batch"),
        (("vgg_small", "--ticket", "x", "--ratio", "0.5"), "--ratio"),
        (("vgg_small", "--budget", "flops=0.5", "--ratio", "0.5"), "--ratio: --budget determines"),
        (("vgg_small", "--budget", "0.5"), "--budget: '0.5' is not a share of something"),
        (("vgg_small", "--budget", "flops=much"), "--budget: 'flops=much' is not a share"),
        (("vgg_small", "--budget", "speed=0.5"), "search.budget.speed: unknown key"),
        (("vgg_small", "--budget", "flops=1.5"), "search.budget.flops: .* less than or equal to 1"),
        (("vgg_small", "--budget", "flops=0.001"), "search.budget.flops: 0.001 cannot be met"),
        ((DIGITS, "--budget", "flops=0.001"), "search.budget.flops: 0.001 cannot be met"),
        (("vgg_small", "--ticket", "x", "--weights", "y"), "--weights: --ticket determines"),
        (("vgg_small", "--ticket", "nowhere"), "is this the folder of a ticket"),
        ((DIGITS, "--world", "3", "--bandwidth", "1Gbit/s"), "not divisible by 3"),
        (("vgg_small", "--input", "3x2x2"), "does not run"),
    ],
)
def test_a_mistake_is_one_clear_error(words: tuple[str, ...], message: str) -> None:
    with pytest.raises(WormError, match=message):
        _plan(*words)


def test_a_batch_that_cannot_be_trained_on_is_refused() -> None:
    """BatchNorm has no variance of a single value: one sample, shrunk to one pixel."""
    words = ("vgg_small", "--input", "3x4x4", "--world", "2", "--bandwidth", "1Gbit/s")
    with pytest.raises(ConfigError, match="--batch: the network cannot be trained on batches of 1"):
        _plan(*words, "--batch", "1")


@pytest.mark.slow("a process that imports torch, five seconds")
def test_the_documentation_shows_what_it_prints() -> None:
    """In a process of its own, as a user runs it."""
    page = (ROOT / "docs" / "before-a-run.md").read_text()
    shown = re.search(r"```console\n\$ python (-m worm_dist plan .*)\n([^`]*)```", page)
    assert shown is not None
    done = subprocess.run(
        [sys.executable, "-W", "error", *shown[1].split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert all(line.startswith(("plan: ", "attach: ")) for line in done.stderr.splitlines())
    assert [line.rstrip() for line in done.stdout.splitlines()] == shown[2].splitlines()


def test_words_that_it_does_not_know_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "vgg_small", "--search.prune_ratio", "0.3"])
    assert "unrecognized arguments: --search.prune_ratio 0.3" in capsys.readouterr().err


def test_a_mistake_on_the_command_line_has_its_exit_code(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["plan", "vgg_smal"]) == 2
    assert "did you mean vgg_small?" in capsys.readouterr().err


@pytest.mark.fault(26, "plan | head -1")
@pytest.mark.parametrize("words", [[], ["--json"]])
def test_a_reader_may_stop_reading_a_forecast(
    monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    """It was a traceback of a BrokenPipeError, or exit code 1."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["plan", DIGITS, *words]) == 0
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), writer)  # what is left to flush
