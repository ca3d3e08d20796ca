"""Schema: base class and field types of the models that saved state is checked against.

Every component with a ``state_dict`` has such a model beside it; a larger state's model is made of
those of its components.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from torch import Tensor

__all__ = [
    "Count",
    "Finite",
    "FiniteTensor",
    "Flags",
    "Integers",
    "Schema",
    "Share",
    "first_problem",
    "schema_of",
]


class Schema(BaseModel):
    """Base of the models: immutable, strict types, no unknown keys; tensors are allowed."""

    model_config = ConfigDict(
        extra="forbid", strict=True, frozen=True, arbitrary_types_allowed=True
    )


def _require_flags(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.bool or tensor.dim() != 1:
        raise ValueError("must be a one-dimensional bool tensor")
    return tensor


Flags = Annotated[Tensor, AfterValidator(_require_flags)]
"""One bool for each channel."""


def _require_integers(tensor: Tensor) -> Tensor:
    if tensor.dtype != torch.int64 or tensor.dim() != 1:
        raise ValueError("must be a one-dimensional int64 tensor")
    return tensor


Integers = Annotated[Tensor, AfterValidator(_require_integers)]
"""One integer for each channel."""


def _require_finite(tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise ValueError(f"must be floating point, not {tensor.dtype}")
    if not bool(tensor.isfinite().all()):
        raise ValueError("has NaN or infinite elements")
    return tensor


FiniteTensor = Annotated[Tensor, AfterValidator(_require_finite)]
"""Floating point values, none of which is NaN or infinite."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]


class _Figures(Schema):
    model_config = ConfigDict(allow_inf_nan=False)


def schema_of(kind: type) -> type[Schema]:
    """The schema of a dataclass as a dict: every field is required, and every number finite."""
    fields: dict[str, Any] = {
        name: (schema_of(hint) if isinstance(hint, type) and is_dataclass(hint) else hint, ...)
        for name, hint in get_type_hints(kind).items()
    }
    return create_model(kind.__name__, __base__=_Figures, **fields)


def first_problem(error: ValidationError) -> str:
    """The first problem of a state, with its dotted key, in one line of limited length."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key[:100]}: {first['msg'][:200]}" if key else first["msg"][:200]
