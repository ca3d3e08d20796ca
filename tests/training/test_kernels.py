"""Kernels on GPUs: flags of the process, which can be read without one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from worm_dist.training.kernels import choose_kernels
from worm_dist.training.run_config import RunConfig

_GPU, _CPU = torch.device("cuda"), torch.device("cpu")


def _flags() -> tuple[bool, bool, bool]:
    """Benchmark, and TF32 in matrix products and convolutions."""
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    if hasattr(matmul, "fp32_precision"):
        tf32 = matmul.fp32_precision == "tf32", cudnn.conv.fp32_precision == "tf32"
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
