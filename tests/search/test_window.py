from __future__ import annotations

import torch

from worm_dist import Mask
from worm_dist.search.window import Window


def _mask(number: int) -> Mask:
    """Ten channels of which the first ``number`` are kept: two masks lie |m - n| / 10 apart."""
    return Mask({"only": torch.arange(10) < number})


def _window(length: int, *numbers: int) -> Window:
    window = Window(length)
    for number in numbers:
        window.push(_mask(number))
    return window


def test_distances_are_from_the_newest_to_each_older_mask() -> None:
    assert _window(5).distances == ()
    assert _window(5, 3).distances == ()
    assert _window(5, 3, 7, 5).distances == (0.2, 0.2)
    assert _window(5, 1, 2, 5).distances == (0.4, 0.3)


def test_only_the_newest_masks_stay() -> None:
    window = _window(3, 1, 2, 3, 4)
    assert window.masks == (_mask(2), _mask(3), _mask(4))
