"""The shape of one image, as it is given on the command line."""

from __future__ import annotations

import re

from ..errors import ConfigError

__all__ = ["parse_image_shape"]


def parse_image_shape(text: str) -> tuple[int, int, int]:
    """Parse channels, height and width of an image, such as ``3x224x224``.

    Raises:
        ConfigError: the text is of another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise ConfigError(f"--input: {text!r} is not an image shape; write 3x224x224")
    return int(match[1]), int(match[2]), int(match[3])
