"""PowerSGD state: a bucket's error feedback and Q matrices, split by parameter.

After a resume DDP starts with other buckets than the run had, and rebuilds them after the first
pass.  The state is moved from one set of buckets to the next parameter by parameter; where new Q
matrices are due, they are drawn as the old buckets would have drawn them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError
from ..groups.freeze_plan import Block, FreezePlan
from ..schema import Count, FiniteTensor, Schema
from .packing import Packing, with_parameter_strides

__all__ = ["AveragerSchema", "BucketState", "blocks_under", "pq_sizes", "require_fits"]


class _BucketSchema(Schema):
    parameters: list[str]
    error_feedback: dict[str, FiniteTensor]
    q: dict[str, FiniteTensor] | None


class AveragerSchema(Schema):
    """Schema of ``PowerSGD.state_dict``."""

    num_passes: Count
    num_draws: Count
    buckets: list[_BucketSchema]


@dataclass(frozen=True, eq=False)
class BucketState:
    """PowerSGD's state of one bucket.

    Attributes:
        parameters: the bucket's parameters, in its order.
        blocks: the live and frozen slices of each parameter when it was last averaged; None if all
            of it was live.
        error_feedback: the approximation errors by parameter, of the parameters' shapes, zero in
            frozen slices; empty if there were none.
        q: by parameter the Q matrix that the next approximation starts from, flattened; empty for
            parameters averaged exactly.  None if they have to be drawn.
    """

    parameters: Sequence[Tensor]
    blocks: Sequence[Block | None]
    error_feedback: Mapping[Tensor, Tensor]
    q: Mapping[Tensor, Tensor] | None

    @classmethod
    def from_hook(
        cls,
        parameters: Sequence[Tensor],
        packing: Packing | None,
        error_feedback: Tensor | None,
        q: Tensor | None,
        rank: int,
    ) -> BucketState:
        """Split the state that torch's hook keeps of a bucket.

        Args:
            parameters: the bucket's parameters, in its order.
            packing: the bucket's packing.
            error_feedback: the approximation errors ``[live elements]``.
            q: all Q matrices, flattened and concatenated.
            rank: maximum number of columns of Q.
        """
        blocks = [None] * len(parameters) if packing is None else packing.blocks
        errors = {} if error_feedback is None else _unpacked(error_feedback, parameters, packing)
        matrices = None
        if q is not None:
            sizes = [
                pq_sizes(_live_shape(p, block), rank)[1]
                for p, block in zip(parameters, blocks, strict=True)
            ]
            rows = (row.clone() for row in q.split(sizes))
            matrices = dict(zip(parameters, rows, strict=True))
        return cls(parameters, blocks, errors, matrices)

    @classmethod
    def regrouped(cls, states: Sequence[BucketState], parameters: Sequence[Tensor]) -> BucketState:
        """The state of a bucket with these parameters, from the states of other buckets."""
        state_of = {p: state for state in states for p in state.parameters}
        blocks = {p: b for state in states for p, b in zip(state.parameters, state.blocks)}
        errors = {p: state_of[p].error_feedback for p in parameters}
        q = {p: state_of[p].q for p in parameters}
        return cls(
            parameters,
            [blocks[p] for p in parameters],
            {p: of_bucket[p] for p, of_bucket in errors.items() if p in of_bucket},
            None
            if any(rows is None for rows in q.values())
            else {p: rows[p] for p, rows in q.items() if rows is not None},
        )

    def fits(self, plan: FreezePlan | None) -> bool:
        """Whether this plan has the same live slices: only then is ``q`` valid."""
        current = blocks_under(plan, self.parameters)
        return all(saved is block for saved, block in zip(self.blocks, current, strict=True))

    def draw_q(self, plan: FreezePlan | None, rank: int, seed: int) -> dict[Tensor, Tensor]:
        """Draw Q as torch's hook would draw it for this bucket under this plan.

        Returns:
            The flattened Q matrices by parameter.
        """
        matrices = {}
        blocks = blocks_under(plan, self.parameters)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for parameter, block in zip(self.parameters, blocks, strict=True):
                _, size = pq_sizes(_live_shape(parameter, block), rank)
                row = torch.randn(size, dtype=parameter.dtype) if size else torch.empty(0)
                matrices[parameter] = row.to(parameter)
        return matrices

    def num_live(self, plan: FreezePlan | None) -> int:
        """Number of the bucket's live elements under this plan."""
        blocks = blocks_under(plan, self.parameters)
        return sum(
            p.numel() if block is None else block.num_live
            for p, block in zip(self.parameters, blocks, strict=True)
        )


def require_fits(
    buckets: Sequence[Mapping[str, Any]],
    is_complete: bool,
    plan: FreezePlan | None,
    parameters: Mapping[str, Tensor],
    rank: int,
) -> None:
    """Check that saved buckets are of this network.

    Args:
        buckets: the buckets of ``PowerSGD.state_dict``, of the types of ``AveragerSchema``.
        is_complete: whether they must have all parameters; else they may have none.
        plan: the plan in force.
        parameters: the averaged parameters, by name.
        rank: maximum number of columns of Q.

    Raises:
        CheckpointError: naming the key.
    """
    seen: set[str] = set()
    key_of_all = "load_state_dict: rank.training.reducer.averager.buckets"
    for number, bucket in enumerate(buckets):
        where = f"{key_of_all}.{number}"
        names = bucket["parameters"]
        if not names or len({*names}) < len(names) or {*names} & seen or {*names} - {*parameters}:
            raise CheckpointError(f"{where}.parameters: not different parameters of this network")
        seen |= {*names}
        members = [parameters[name] for name in names]
        blocks = blocks_under(plan, members)
        wanted = {name: list(p.shape) for name, p in zip(names, members, strict=True)}
        matrices = {
            name: [pq_sizes(_live_shape(p, block), rank)[1]]
            for name, p, block in zip(names, members, blocks, strict=True)
        }
        q, errors = bucket["q"], bucket["error_feedback"]
        for key, found, shapes in (("error_feedback", errors, wanted), ("q", q or {}, matrices)):
            for name in sorted(found.keys() | (names if found else ())):
                shape = list(found[name].shape) if name in found else None
                if shape != shapes.get(name):
                    raise CheckpointError(
                        f"{where}.{key}.{name[:100]}: wanted {shapes.get(name)}, found {shape}"
                    )
    missing = sorted(parameters.keys() - seen)
    if missing and (is_complete or buckets):
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise CheckpointError(f"{key_of_all}: {missing[0][:100]}{more}: in none of them")


def blocks_under(plan: FreezePlan | None, parameters: Sequence[Tensor]) -> list[Block | None]:
    """The live and frozen slices of each parameter under a plan; None if all of it is live."""
    return [plan.blocks.get(p) if plan is not None else None for p in parameters]


def pq_sizes(shape: Sequence[int], rank: int) -> tuple[int, int]:
    """Numbers of elements of P and Q for a gradient of this shape; 0 if torch's hook averages it
    exactly, as it does where P and Q would not be less than half as large."""
    rows = shape[0] if shape else 1
    columns = torch.Size(shape).numel() // max(1, rows)
    rank = min(rows, columns, rank)
    compresses = (rows + columns) * rank * 2 < rows * columns
    return (rows * rank, columns * rank) if compresses else (0, 0)


def _live_shape(parameter: Tensor, block: Block | None) -> Sequence[int]:
    return parameter.shape if block is None else block.live_shape


def _unpacked(
    elements: Tensor, parameters: Sequence[Tensor], packing: Packing | None
) -> dict[Tensor, Tensor]:
    """A bucket's live elements as tensors of the parameters' shapes, zero in frozen slices."""
    full = [elements.new_empty(p.shape) for p in parameters]
    if packing is not None:
        bucket = elements.new_empty(sum(p.numel() for p in parameters))
        packing.unpack(bucket, elements)
        torch._foreach_copy_(full, packing.gradients_of(bucket))
    else:
        rows = elements.split([p.numel() for p in parameters])
        for p, row, out in zip(parameters, rows, full, strict=True):
            out.copy_(with_parameter_strides(p, row.view(p.shape)))
    return dict(zip(parameters, full, strict=True))
