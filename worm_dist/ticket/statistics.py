"""Statistics: BatchNorm's running mean and variance, estimated anew after a draw.

Half of the channels are gone, so the statistics that the others were trained with no longer hold;
without new ones the accuracy after a draw says little.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..cluster.agree import Ranks

__all__ = ["Call", "recalibrate"]

Call = tuple[tuple[Any, ...], dict[str, Any], tuple[str, torch.dtype, bool]]
"""One forward pass: its positional and keyword arguments, and device, dtype and use of autocast."""

Norm = nn.modules.batchnorm._BatchNorm


@torch.no_grad()
def recalibrate(
    network: nn.Module,
    calls: Collection[Call],
    ranks: Ranks,
    look: Callable[[Any, Any], None] | None = None,
) -> None:
    """Replace the running statistics by those over the given batches, pooled over the ranks.

    Only the norms see training mode; dropout and the like stay off.

    Args:
        network: not wrapped; changed in place.
        calls: the batches of this rank, at least one and as many as on every other rank.
        ranks: whose statistics are pooled.
        look: is given what each batch puts in, and what the network puts out for it.
    """
    norms = [m for m in network.modules() if isinstance(m, Norm) and m.running_mean is not None]
    if not norms and look is None:
        return
    modes = {module: module.training for module in network.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    network.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = 1.0  # running statistics are those of the newest batch
        norm.train()
    moments = [torch.zeros_like(_moments(norms))] if norms else []
    for positional, keywords, (device, dtype, enabled) in calls:
        with torch.autocast(device, dtype=dtype, enabled=enabled):
            output = network(*positional, **keywords)
        if look is not None:
            look((positional, keywords), output)
        for sums in moments:
            sums += _moments(norms)
    for sums in moments:
        mean, square = ranks.mean(sums / len(calls)).to(sums.device)
        sizes = [norm.num_features for norm in norms]
        variance = square - mean.square()
        for norm, new_mean, new_variance in zip(norms, mean.split(sizes), variance.split(sizes)):
            _tensor(norm.running_mean).copy_(new_mean)
            _tensor(norm.running_var).copy_(new_variance)
            norm.momentum = momenta[norm]
    for module, training in modes.items():
        module.training = training


def _moments(norms: Sequence[Norm]) -> Tensor:
    """First and second moments of the newest batch, float64 ``[2, features of all norms]``.

    Second moments can be averaged over batches and ranks whose means differ; variances cannot.
    In double precision, or a large mean would swallow a small variance.
    """
    means = torch.cat([_tensor(norm.running_mean) for norm in norms]).double()
    variances = torch.cat([_tensor(norm.running_var) for norm in norms]).double()
    return torch.stack([means, variances + means.square()])


def _tensor(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer
