"""Settings: base class and bounded numbers of the parts of a configuration."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Count", "Factor", "Settings"]

Count = Annotated[int, Field(le=2**31 - 1)]
"""A count that fits in 32 bits, as many of its users require."""
Factor = Annotated[float, Field(le=1e6)]
"""A factor of weights or gradients.  Bounded, because torch raises in the middle of a step for a
value that float32 cannot represent."""


class Settings(BaseModel):
    """A strict, frozen part of a configuration.

    The string under a field describes it, also to programs: pydantic has it as the field's
    ``description``.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )

    @classmethod
    def keys(cls, prefix: str = "") -> Iterator[str]:
        """Every dotted key below this part, the parts themselves included."""
        for name, field in cls.model_fields.items():
            part = field.annotation
            yield f"{prefix}{name}"
            if isinstance(part, type) and issubclass(part, Settings):
                yield from part.keys(f"{prefix}{name}.")
