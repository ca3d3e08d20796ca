from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from worm_dist import ConfigError
from worm_dist.planning.target import target_of, target_of_config
from worm_dist.planning.wrapper import WrapperSettings, ZeroSettings
from worm_dist.training.data import load_data
from worm_dist.training.run_config import DataConfig

CONFIGS = Path(__file__).parents[2] / "configs"


def test_a_name_gets_the_images_it_is_made_for() -> None:
    own, theirs = (target_of(name, None, None) for name in ("resnet18", "mobilenet_v2"))
    assert (own.sample_shape, own.num_classes) == ((3, 32, 32), 10)
    assert (theirs.sample_shape, theirs.num_classes) == ((3, 224, 224), 1000)
    of_one_size = target_of("vit_small", None, None)
    assert (of_one_size.sample_shape, of_one_size.num_classes) == ((1, 8, 8), 10)
    other = target_of("resnet18", (1, 8, 8), 7, {"prune_ratio": 0.3})
    assert (other.sample_shape, other.num_classes) == ((1, 8, 8), 7)
    assert other.worm.search.prune_ratio == 0.3
    assert other.build()(torch.zeros(2, 1, 8, 8)).shape == (2, 7)


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_the_settings_of_a_run_say_it_all_but_the_classes_in_folders(path: Path) -> None:
    classes = 1000 if path.stem in ("resnet50", "resnet18_imagenet") else None
    target = target_of_config(path, None, classes)
    target.build()
    assert target.batch_size is not None and target.samples_per_rank(2) * 2 == target.batch_size


def test_samples_are_what_the_data_are() -> None:
    target = target_of_config(CONFIGS / "digits.yaml", None, None)
    data = load_data(DataConfig())
    assert target.sample_shape == data.sample_shape
    assert target.num_classes == data.num_classes


def test_classes_are_counted_where_the_folders_are(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"data: {{name: image-folder, root: {tmp_path}, image_size: 64}}\n")
    with pytest.raises(ConfigError, match="give --classes"):
        target_of_config(path, None, None)
    for name in ("cat", "dog", "eel"):
        (tmp_path / "train" / name).mkdir(parents=True)
    target = target_of_config(path, None, None)
    assert (target.num_classes, target.sample_shape) == (3, (3, 64, 64))
    assert target_of_config(path, None, 5).num_classes == 5


def test_a_run_without_a_search_has_nothing_to_plan(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("preset: dense\n")
    with pytest.raises(ConfigError, match="drops nothing"):
        target_of_config(path, None, None)


def test_a_batch_that_cannot_be_shared_out_is_refused() -> None:
    target = target_of_config(CONFIGS / "digits.yaml", None, None)
    assert target.samples_per_rank(4) == 16
    with pytest.raises(ConfigError, match="64 is not divisible by 3 ranks"):
        target.samples_per_rank(3)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_run_is_planned_for_with_its_backend(tmp_path: Path, stage: int) -> None:
    path, settings = tmp_path / "run.yaml", CONFIGS / "deepspeed" / f"zero{stage}.json"
    path.write_text(f"distributed: {{backend: deepspeed, deepspeed: {settings}}}\n")
    wrapper = target_of_config(path, None, None).wrapper
    assert wrapper.name == f"zero-{stage}" and wrapper.zero == ZeroSettings(
        stage,
    )
    path.write_text("distributed: {backend: fsdp, bucket_cap_mb: 3}\n")
    assert target_of_config(path, None, None).wrapper == WrapperSettings("fsdp", unit_mb=3)
    assert target_of_config(CONFIGS / "digits.yaml", None, None).wrapper == WrapperSettings()


def test_another_backend_is_planned_for_with_the_settings_of_the_file(tmp_path: Path) -> None:
    """``--backend`` used to go back to defaults: units of 25 MiB, and fp32."""
    path = tmp_path / "run.yaml"
    path.write_text("precision: bf16\ndistributed: {bucket_cap_mb: 3}\n")
    wrapper = target_of_config(path, None, None).wrapper
    assert wrapper.name == "ddp" and wrapper.named("fsdp").unit_mb == 3
    assert wrapper.named("zero-3").zero.weights == torch.bfloat16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": True}, "zero_optimization: True is not an object"),
        ({"zero_optimization": {"stage": 4}}, "stage: 4 is not 0, 1, 2 or 3"),
        (
            {"zero_optimization": {"reduce_bucket_size": "auto"}},
            "reduce_bucket_size: 'auto' is not a number of elements",
        ),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
    ],
)
def test_what_deepspeed_would_refuse_is_refused(settings: dict[str, Any], message: str) -> None:
    """These were tracebacks, or planned for in fp32; "auto" is common in files for transformers."""
    with pytest.raises(ConfigError, match=f"distributed.deepspeed: .*{message}"):
        ZeroSettings.of(settings)


def test_what_deepspeed_would_do_by_default_is_known() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in range(4):
        theirs, ours = (
            DeepSpeedZeroConfig(stage=stage),
            ZeroSettings.of({"zero_optimization": {"stage": stage}}),
        )
        assert (ours.reduces_early, ours.round_robin, ours.is_aligned, ours.bucket) == (
            theirs.overlap_comm,
            theirs.round_robin_gradients,
            theirs.parameter_alignment,
            theirs.reduce_bucket_size,
        )
        assert (ours.most_prefetched, ours.most_live, ours.reuse_distance) == (
            theirs.prefetch_bucket_size,
            theirs.max_live_parameters,
            theirs.max_reuse_distance,
        )
        assert (ours.persistent, ours.most_persistent) == (
            theirs.param_persistence_threshold,
            theirs.model_persistence_threshold,
        )
