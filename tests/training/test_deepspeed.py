"""The main job under DeepSpeed: the same decisions, the same weights, the same ticket."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ranks import Ranks
from worm_dist import ConfigError
from worm_dist.distributed.init import RankInfo
from worm_dist.engine.engine import Engine
from worm_dist.training.config_file import read_run_config
from worm_dist.training.deepspeed_config import deepspeed_settings
from worm_dist.training.reporting.reporter import Report
from worm_dist.training.trainer import Trainer
from worm_dist.verdict import Verdict

CONFIGS = Path(__file__).parents[2] / "configs"
DEEPSPEED = ("distributed.backend", "deepspeed")


class _Digests(Report):
    def __init__(self) -> None:
        self.masks: list[str] = []

    def check(self, epoch: float, engine: Engine, verdict: Verdict) -> None:
        assert engine.mask is not None
        self.masks.append(f"{engine.step} {engine.mask.digest} {verdict.phase} {verdict.ticket}")


def _train(runs: dict[str, list[tuple[str, str]]]) -> dict[str, tuple[list[str], str, Any]]:
    """For every run the masks at its checks, a digest of its last weights, its result."""
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    os.environ.update(place.torchrun_environment, MASTER_ADDR="localhost", MASTER_PORT="1")
    warnings.simplefilter("ignore")  # of DeepSpeed's, at its import
    ends = {}
    for name, replaced in runs.items():
        config = read_run_config(CONFIGS / "digits.yaml", replaced)
        digests = _Digests()
        trainer = Trainer(config, place, torch.device("cpu"), digests)
        result = trainer.run().as_dict()
        weights = hashlib.sha256()
        for parameter in trainer.engine.model.get_submodule("module").parameters():
            weights.update(parameter.detach().float().numpy().tobytes())
        ends[name] = digests.masks, weights.hexdigest(), result
    return ends


@pytest.mark.slow("trains whole runs under DeepSpeed")
def test_ddp_and_zero_decide_and_train_alike_bit_for_bit(ranks: Ranks) -> None:
    short = [
        ("epochs", "5"),
        ("search.elbow.latest", "null"),
        ("truncation.removal.duration", "1ep"),
        ("model.arguments", "{widths: [16, 16, M, 32, 32]}"),
        ("data.batch_size", "128"),
    ]
    runs = {
        f"zero{stage}": [
            *short,
            DEEPSPEED,
            ("distributed.deepspeed", str(CONFIGS / "deepspeed" / f"zero{stage}.json")),
        ]
        for stage in (0, 1, 2)
    }
    outcomes = ranks.outcomes(2, _train, {"ddp": short, **runs}, group_timeout=100)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    first, second = (outcome.value for outcome in outcomes)
    masks, weights, result = first["ddp"]
    assert result["status"] == "ticket" and len(masks) == 3
    for name in runs:
        assert first[name][:2] == second[name][:2] == (masks, weights), name
        theirs = first[name][2]
        assert theirs["accuracy"] == result["accuracy"]
        assert theirs["mask_digest"] == result["mask_digest"]
    # Stage 0 averages gradients and nothing else; 1 and 2 also tell each other their weights.
    assert first["zero0"][2]["traffic"] == result["traffic"]
    for name in ("zero1", "zero2"):
        traffic = first[name][2]["traffic"]
        dense = result["traffic"]["dense_bytes_per_step"]
        assert traffic["dense_bytes_per_step"] == pytest.approx(1.5 * dense, rel=1e-3)
        assert traffic["ticket_bytes_per_step"] == pytest.approx(
            1.5 * result["traffic"]["ticket_bytes_per_step"], rel=1e-3
        )


@pytest.mark.slow("trains whole runs under DeepSpeed")
def test_passes_and_bf16(ranks: Ranks, tmp_path: Path) -> None:
    """Two passes a step are one step of twice the batch; bf16 trains on fp32 copies."""
    settings = tmp_path / "passes.json"
    settings.write_text(json.dumps({"gradient_accumulation_steps": 2}))
    small = ("model.arguments", "{widths: [8, M, 16]}")
    short = [("epochs", "2"), DEEPSPEED, small]
    runs = {
        "passes": [*short, ("distributed.deepspeed", str(settings))],
        "bf16": [("epochs", "2"), DEEPSPEED, ("precision", "bf16"), small],
    }
    outcomes = ranks.outcomes(2, _train, runs, group_timeout=100)
    for outcome in outcomes:
        assert outcome.exitcode == 0, str(outcome)
    first, second = (outcome.value for outcome in outcomes)
    for name in runs:
        assert first[name][:2] == second[name][:2]
        assert first[name][2]["accuracy"]["final"] > 0.15
    assert first["passes"][2]["backend"] == "deepspeed zero-1, gloo"


def _settings(tmp_path: Path, content: str, *replaced: tuple[str, str]) -> dict[str, Any]:
    path = tmp_path / "deepspeed.json"
    path.write_text(content)
    named = ("distributed.deepspeed", str(path))
    config = read_run_config(CONFIGS / "digits.yaml", [DEEPSPEED, named, *replaced])
    return deepspeed_settings(config, world_size=2)


def test_the_run_completes_the_settings(tmp_path: Path) -> None:
    content = '{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}'
    settings = _settings(tmp_path, content, ("precision", "bf16"))
    assert settings["zero_optimization"] == {"stage": 2}
    assert settings["train_micro_batch_size_per_gpu"] == 64 // (2 * 4)
    assert settings["gradient_clipping"] == 0.0, "DeepSpeed's own default clips"
    assert settings["bf16"] == {"enabled": True}
    assert _settings(tmp_path, '{"gradient_clipping": 0.5}')["gradient_clipping"] == 0.5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not valid JSON"),
        ("[]", "expected an object of settings"),
        ('{"train_batch_size": 64}', "train_batch_size: remove it; data.batch_size sets it"),
        ('{"optimizer": {}}', "optimizer: remove it; optimizer sets it"),
        ('{"gradient_accumulation_steps": 3}', "cannot be divided over 2 ranks and 3 passes"),
    ],
)
def test_settings_that_do_not_fit_are_told(tmp_path: Path, content: str, told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        _settings(tmp_path, content)


def _refusals(path: Path, settings: list[Any]) -> list[str]:
    """What is said of each, on a rank."""
    said = []
    for each in settings:
        if dist.get_rank() == 0:
            path.write_text(json.dumps({"zero_optimization": each}))
        dist.barrier()
        with pytest.raises(ConfigError) as caught:
            _train({"": [DEEPSPEED, ("distributed.deepspeed", str(path))]})
        said.append(str(caught.value))
        dist.barrier()
    return said


@pytest.mark.slow("imports DeepSpeed on every rank")
def test_what_deepspeed_itself_refuses_is_told(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    for said in ranks(2, _refusals, path, [{"stage": 9}, {"stage": 1, "stagger": 2}]):
        assert all(f"distributed.deepspeed: {path}: DeepSpeed rejects it" in each for each in said)
        assert "stage Input should be 0, 1, 2" in said[0]
        assert "stagger" in said[1]


def test_settings_of_a_backend_that_is_not_used_are_told() -> None:
    with pytest.raises(ConfigError, match="contradicts backend 'auto'"):
        read_run_config(CONFIGS / "digits.yaml", [("distributed.deepspeed", "zero1.json")])
