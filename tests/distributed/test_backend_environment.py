from __future__ import annotations

import pytest
import torch

from worm_dist.distributed.backend_environment import variables_of_backend


@pytest.mark.parametrize(
    ("environment", "handling"),
    [
        ({}, "0"),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, "0"),
        ({"TORCHELASTIC_RUN_ID": "x", "TORCH_NCCL_ASYNC_ERROR_HANDLING": "3"}, None),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "1"}, None),
        ({"NCCL_ASYNC_ERROR_HANDLING": "1"}, None),
    ],
)
def test_a_users_choice_of_error_handling_stays(
    environment: dict[str, str], handling: str | None
) -> None:
    """torchrun sets 1 for every worker, unless it finds something else itself."""
    cpu = torch.device("cpu")
    variables = variables_of_backend(2, cpu, environment)
    assert variables.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == handling
    assert not variables_of_backend(1, cpu, environment)


def test_deepspeed_is_given_the_index_of_the_gpu() -> None:
    """Of a process that sees its own GPU only, LOCAL_RANK is no index."""
    assert variables_of_backend(2, torch.device("cuda", 0), {})["LOCAL_RANK"] == "0"
