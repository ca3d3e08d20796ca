"""Schema: base class and field types of the models that saved state is checked against.

Every component with a ``state_dict`` has such a model beside it; a larger state's model is made of
those of its components.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

__all__ = ["Count", "Flags", "Schema", "first_problem"]


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

Count = Annotated[int, Field(ge=0)]


def first_problem(error: ValidationError) -> str:
    """The first problem of a state, with its dotted key, in one line of limited length."""
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    key = ".".join(map(str, first["loc"]))
    return f"{key[:100]}: {first['msg'][:200]}" if key else first["msg"][:200]
