"""Selective norm: a BatchNorm of some of the channels that reach it.

In networks with pre-activation, norms read the residual stream, which many layers write and read,
so none of its channels can be removed for the sake of one norm.  A selective norm drops channels of
its own instead: it has a list of the channels of its input that it reads, and the layers behind it
see no others.  The stream itself stays whole.

Source: channel selection of Network Slimming (Liu et al. 2017, arXiv 1708.06519), which Early-Bird
tickets use for pre-activation ResNets (arXiv 1909.11957).  There the selection stands behind the
norm, which gives the same values, since a BatchNorm treats each channel by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_pruning.pruner.function import BasePruningFunc

__all__ = ["SelectiveBatchNorm2d", "SelectiveNormPruner"]


class SelectiveBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm of selected channels of images, with learnable scale and shift.

    At first it reads all channels, and is a ``BatchNorm2d``.  A draw removes channels from it and
    from the layers behind it, not from those before it.  ``convert_sync_batchnorm`` of torch makes
    a norm of it that selects nothing, so it must not be applied to a drawn network.

    Args:
        num_channels: the number of channels of its input.

    Attributes:
        indices: int64 ``[num_features]``, the channels of the input that it reads, in ascending
            order; a buffer, and so a part of the ``state_dict``.
        num_features: the number of channels that it reads and returns.
    """

    indices: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels)
        self.register_buffer("indices", torch.arange(num_channels))

    def forward(self, input: Tensor) -> Tensor:
        """Map ``[batch, num_channels, height, width]`` to ``[batch, num_features, ...]``."""
        if self.num_features < input.shape[1]:
            input = input.index_select(1, self.indices)
        return super().forward(input)

    @torch.no_grad()
    def keep(self, kept: Tensor) -> None:
        """Read only these of the channels that are read now.

        Args:
            kept: int64 ``[new num_features]``, places in ``indices``, in ascending order.
        """
        self.indices = self.indices.index_select(0, kept.to(self.indices.device))


class SelectiveNormPruner(BasePruningFunc):  # type: ignore[misc]
    """The torch-pruning handler of a selective norm, whose inputs and outputs share no channels."""

    def prune_out_channels(self, layer: Any, idxs: Any) -> Any:
        raise AssertionError("the graph is read-only")

    def prune_in_channels(self, layer: Any, idxs: Any) -> Any:
        raise AssertionError("the graph is read-only")

    def get_out_channels(self, layer: SelectiveBatchNorm2d) -> int:
        return layer.num_features

    def get_in_channels(self, layer: Any) -> None:
        return None
