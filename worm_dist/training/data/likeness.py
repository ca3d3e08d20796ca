"""Checks that all ranks see the same data, as every host reads its own copy."""

from __future__ import annotations

from ...distributed.collectives import Communicator
from ...errors import ConfigError
from .dataset import Data

__all__ = ["require_same_data"]


def require_same_data(data: Data, num_batches: int, ranks: Communicator) -> None:
    """Compare the size and shape of the data across the ranks.  Collective.

    If one rank had a batch less, the others would hang at the end of the epoch.

    Args:
        data: this rank's data set.
        num_batches: number of training batches of this rank in an epoch.
        ranks: the ranks that train together.

    Raises:
        ConfigError: the ranks differ; names the property and each rank's value.
    """
    differences = ranks.compare(
        {
            "the number of training samples": str(len(data.train)),
            "the number of test samples": str(len(data.test)),
            "the number of batches": str(num_batches),
            "the number of classes": str(data.num_classes),
            "the shape of a sample": str(data.sample_shape),
        }
    )
    if differences:
        raise ConfigError(
            f"data: the ranks do not see the same data: {'; '.join(differences)}; give every "
            "host the whole data set"
        )
