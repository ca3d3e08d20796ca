"""Flat collectives: reduce-scatter and all-gather of one tensor, by the names they have in torch.

torch 2.14 renamed both functions, and warns about the old names.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

__all__ = ["all_gather", "reduce_scatter"]


def reduce_scatter(out: Tensor, parts: Tensor, group: dist.ProcessGroup, op: dist.ReduceOp) -> None:
    """Reduce every rank's part to its rank.  Collective.

    Args:
        out: ``[elements of a part]``, receives this rank's part; may be that part of ``parts``.
        parts: ``[ranks x elements of a part]``.
        group: the process group.
        op: how elements are reduced.
    """
    single = getattr(dist, "reduce_scatter_single", None)
    (single or dist.reduce_scatter_tensor)(out, parts, group=group, op=op)


def all_gather(out: Tensor, part: Tensor, group: dist.ProcessGroup) -> dist.Work:
    """Start to gather every rank's part.  Collective.

    Args:
        out: ``[ranks x elements of a part]``, receives the parts.
        part: ``[elements of a part]``, this rank's part; may be that part of ``out``.
        group: the process group.

    Returns:
        What to wait for; on a GPU the current stream waits then, not the host.
    """
    single = getattr(dist, "all_gather_single", None)
    work = (single or dist.all_gather_into_tensor)(out, part, group=group, async_op=True)
    assert work is not None
    return work
