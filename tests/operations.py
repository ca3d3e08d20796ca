"""Operations: how many of them a step has that launch something on an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._C._profiler import _ExperimentalConfig
from torch.profiler import ProfilerActivity, profile

__all__ = ["num_operations"]

_HOST_ONLY = {
    "aten::alias", "aten::as_strided", "aten::detach", "aten::empty", "aten::empty_like",
    "aten::empty_strided", "aten::expand", "aten::flatten", "aten::narrow", "aten::new_empty",
    "aten::permute", "aten::reshape", "aten::resize_", "aten::result_type", "aten::select",
    "aten::slice", "aten::split", "aten::split_with_sizes", "aten::squeeze", "aten::t", "aten::to",
    "aten::transpose", "aten::unsqueeze", "aten::view", "aten::view_as",
}  # fmt: skip


def num_operations(step: Callable[[], object]) -> int:
    """Operations of a step, those of autograd's threads too; one over many tensors counts once."""
    with profile(
        activities=[ProfilerActivity.CPU],
        experimental_config=_ExperimentalConfig(profile_all_threads=True),
    ) as profiled:
        step()

    def count(event: Any) -> int:
        if event.name.startswith("aten::") and event.name not in _HOST_ONLY:
            return 1
        return sum(map(count, event.cpu_children))

    return sum(count(event) for event in profiled.events() if event.cpu_parent is None)
