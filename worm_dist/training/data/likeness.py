"""Likeness: the ranks see the same data, as every host brings its own."""

from __future__ import annotations

from ...distributed.collectives import Communicator
from ...errors import ConfigError
from .dataset import Data

__all__ = ["require_same_data"]


def require_same_data(data: Data, num_batches: int, ranks: Communicator) -> None:
    """Compare what a rank would train on.  Collective.

    A rank with one batch less would leave the others waiting at the end of the epoch.

    Args:
        num_batches: of an epoch, on this rank.

    Raises:
        ConfigError: the ranks differ; names what of, with the value of each.
    """
    found = ranks.differences(
        {
            "the number of training samples": str(len(data.train)),
            "the number of test samples": str(len(data.test)),
            "the number of batches": str(num_batches),
            "the number of classes": str(data.num_classes),
            "the shape of a sample": str(data.sample_shape),
        }
    )
    if found:
        raise ConfigError(
            f"data: the ranks do not see the same data: {'; '.join(found)}; give every host the "
            "whole data set"
        )
