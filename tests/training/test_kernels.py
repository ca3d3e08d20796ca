"""Kernels on GPUs: flags of the process, which can be read without one; memory formats and fused
optimizers, which CPUs have too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.faults.trainers import small_trainer
from tests.ranks import Ranks
from worm_dist.errors import ConfigError
from worm_dist.training.kernels import choose_kernels, memory_format
from worm_dist.training.optim import build_optimizer
from worm_dist.training.run_config import OptimizerConfig, RunConfig

_GPU, _CPU = torch.device("cuda"), torch.device("cpu")


def _flags() -> tuple[bool, bool, bool]:
    """Benchmark, and TF32 in matrix products and convolutions."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        tf32 = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
        # With the newer flags alone torch raised an error here, and so in Inductor.
        assert tf32 == (matmul.allow_tf32, cudnn.allow_tf32)
    else:
        tf32 = matmul.allow_tf32, cudnn.allow_tf32
    return cudnn.benchmark, *tf32


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    before = torch.backends.cudnn.benchmark
    yield
    choose_kernels(RunConfig(precision="fp32", cudnn_benchmark=before), _GPU)


def test_by_default_a_gpu_is_fast() -> None:
    choose_kernels(RunConfig(), _GPU)
    assert _flags() == (True, True, True)


def test_fp32_rounds_nowhere() -> None:
    """torch's default is mixed: TF32 in convolutions alone."""
    choose_kernels(RunConfig(precision="fp32", cudnn_benchmark=False), _GPU)
    assert _flags() == (False, False, False)


@pytest.mark.parametrize("settings", [{}, {"precision": "fp32", "cudnn_benchmark": False}])
def test_on_a_cpu_nothing_changes(settings: dict[str, object]) -> None:
    before = _flags(), torch.get_float32_matmul_precision()
    choose_kernels(RunConfig(**settings), _CPU)
    assert (_flags(), torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(
    ("settings", "device", "is_last"),
    [
        ({}, _GPU, True),
        ({}, _CPU, False),
        ({"model": {"channels_last": "on"}}, _CPU, True),
        ({"model": {"channels_last": "off"}}, _GPU, False),
        ({"precision": "fp32"}, _GPU, False),
        ({"distributed": {"backend": "deepspeed"}}, _GPU, False),
    ],
)
def test_channels_are_innermost_where_it_pays(
    settings: dict[str, object], device: torch.device, is_last: bool
) -> None:
    found = memory_format(RunConfig(**settings), device)
    assert found == (torch.channels_last if is_last else torch.contiguous_format)


def test_deepspeed_has_no_memory_formats() -> None:
    with pytest.raises(ConfigError, match="channels_last 'on' contradicts"):
        RunConfig(model={"channels_last": "on"}, distributed={"backend": "deepspeed"})


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize(("choice", "fused"), [("auto", None), ("off", None), ("on", True)])
def test_on_a_cpu_an_optimizer_is_fused_if_that_is_asked_for(
    name: str, choice: str, fused: bool | None
) -> None:
    """False instead of None would be a loop over the parameters."""
    config = OptimizerConfig(name=name, fused=choice)  # type: ignore[arg-type]
    (group,) = build_optimizer(config, torch.nn.Linear(2, 2)).param_groups
    assert group["fused"] is fused and group["foreach"] is None


def _trained(settings: dict[str, Any]) -> list[tuple[torch.Tensor, bool]]:
    """The weights after an epoch, and whether their channels are innermost."""
    trainer = small_trainer(epochs=1, **settings)
    trainer.run()
    weights = [p.detach() for p in trainer.engine.model.parameters()]
    return [
        (w.contiguous(), w.dim() == 4 and w.is_contiguous(memory_format=torch.channels_last))
        for w in weights
    ]


def test_a_memory_format_and_a_fused_optimizer_change_rounding_only(ranks: Ranks) -> None:
    model = {"name": "vgg_small", "arguments": {"widths": [4, "M", 8]}}
    plain, _ = ranks(2, _trained, {"model": model})
    other, _ = ranks(
        2,
        _trained,
        {"model": {**model, "channels_last": "on"}, "optimizer": {"fused": "on"}},
    )
    assert [is_last for weight, is_last in other if weight.dim() == 4] == [True, True]
    for (weight, _), (same, _) in zip(plain, other, strict=True):
        torch.testing.assert_close(weight, same, rtol=1e-3, atol=1e-5)
