"""Sparse weights: parameters with sparse gradients."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["sparse_weights"]


def sparse_weights(network: nn.Module) -> frozenset[Tensor]:
    """The weights of all embeddings constructed with ``sparse=True``."""
    return frozenset(
        module.weight
        for module in network.modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    )
