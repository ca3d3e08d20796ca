"""Sparse weights: parameters whose gradients name only the rows that were looked up."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["sparse_weights"]


def sparse_weights(network: nn.Module) -> frozenset[Tensor]:
    """The weights of all embeddings that were made with ``sparse=True``."""
    return frozenset(
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    )
