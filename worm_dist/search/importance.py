"""Importance: one score per candidate, by which channels are ranked.

Usually the candidates are the channels of the groups.  If ranked layer by layer, as in Early-Bird,
they are the scales of every single norm.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from ..config import SearchConfig
from ..distributed.sharded import local
from ..errors import ConfigError, NonFiniteError, WormError
from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.mask import Mask
from ..groups.selection import importance_of
from .candidates import Candidates, NormCandidates
from .scale_index import FullValues, ScaleIndex, detached

__all__ = [
    "ChannelScales",
    "CustomImportance",
    "Importance",
    "LayerScales",
    "WeightNorm",
    "importance_measure",
    "l1_norm",
]

Coupling = Literal["mean", "max"]


class Importance(ABC):
    """Base class of importance measures.

    Attributes:
        candidates: the candidates that are scored.
        replicated: whether all ranks must compute bit-identical scores, because these depend on the
            weights only and not on data.
        reads_weights: whether scores are computed from the network's weights, so that the network
            must have full ones then; otherwise from its scales alone.
        failure: the error to raise if scores are not finite; None if only diverged weights can be
            the cause.
    """

    replicated = True
    reads_weights = False

    def __init__(self, candidates: Candidates, device: torch.device) -> None:
        self.candidates = candidates
        self.failure: WormError | None = None
        self._device = device

    @abstractmethod
    def __call__(self) -> Tensor:
        """Return the scores, float32 ``[candidates]`` on the network's device."""

    @property
    def scales(self) -> list[nn.Parameter]:
        """The parameters that the L1 penalty applies to."""
        return []

    def dropped_scales(self, kept: Mask) -> dict[str, Tensor] | None:
        """By name of every scale parameter, which of its elements a mask over the candidates drops,
        bool ``[elements]``; None if the candidates are not single scales."""
        return None

    def penalty(self, used: Container[nn.Parameter] | None = None) -> Tensor:
        """Return the L1 norm of all scales, or of those in ``used``, as a differentiable scalar."""
        scales = [scale for scale in self.scales if used is None or scale in used]
        return l1_norm(scales) if scales else torch.zeros((), device=self._device)


class ChannelScales(Importance):
    """The magnitude of a channel's scales: |gamma| of its norms, or |gate|, or the signed gate, as
    EarlyBERT ranks them; coupled scales are combined by mean or maximum.

    Source: Network Slimming (arXiv 1708.06519, section 3), Early-Bird (arXiv 1909.11957) and, for
    gates, EarlyBERT (arXiv 2101.00063).
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Groups,
        coupling: Coupling = "mean",
        signed: bool = False,
        full_values: FullValues = detached,
    ) -> None:
        self._index = ScaleIndex(network, groups, full_values)
        super().__init__(Candidates(groups.sizes), self._index.device)
        self._largest = coupling == "max"
        self._signed = signed

    @torch.no_grad()
    def __call__(self) -> Tensor:
        # A gather and an ordered sum, unlike a scatter-add, give the same bits on equal devices.
        index = self._index
        scales_TN = (index.values() if self._signed else index.magnitudes())[index.indices_TN]
        if self._largest:
            return scales_TN.masked_fill(~index.present_TN, -torch.inf).amax(dim=0)
        return (scales_TN * index.shares_TN).sum(dim=0)

    @property
    def scales(self) -> list[nn.Parameter]:
        return self._index.scales


class LayerScales(Importance):
    """|gamma| of every single norm; a coupled channel is dropped only if all its norms drop it.

    Source: Early-Bird (arXiv 1909.11957), which computes a mask for each layer.
    """

    def __init__(
        self,
        network: nn.Module,
        groups: Groups,
        signed: bool = False,
        full_values: FullValues = detached,
    ) -> None:
        self._index = ScaleIndex(network, groups, full_values)
        self._signed = signed
        index = self._index
        indices = index.indices_TN.cpu(), index.present_TN.cpu()
        super().__init__(NormCandidates(index.counts, groups.sizes, *indices), index.device)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        return self._index.values() if self._signed else self._index.magnitudes()

    @property
    def scales(self) -> list[nn.Parameter]:
        return self._index.scales

    def dropped_scales(self, kept: Mask) -> dict[str, Tensor]:
        return self._index.flags_by_name(~kept.keep)


class WeightNorm(Importance):
    """The L2 norm of the weights that produce a channel, divided by the group's mean; coupled
    layers are combined by mean or maximum.

    Source: Pruning Filters (arXiv 1608.08710), there with L1.  The division makes layers of
    different widths comparable.
    """

    reads_weights = True

    def __init__(self, network: nn.Module, groups: Groups, coupling: Coupling = "mean") -> None:
        super().__init__(Candidates(groups.sizes), next(network.parameters()).device)
        self._network = network
        self._largest = coupling == "max"
        self._sources = [
            [
                (*member.parameters[0], member.positions)
                for member in group.members
                if member.role == "producer"
            ]
            for group in groups
        ]

    @torch.no_grad()
    def __call__(self) -> Tensor:
        # By name: sharded weights are gathered into other parameters of the same module.
        weights = dict(self._network.named_parameters())
        return torch.cat([self._of_group(sources, weights) for sources in self._sources])

    def _of_group(
        self, sources: list[tuple[str, int, Tensor]], weights: Mapping[str, nn.Parameter]
    ) -> Tensor:
        norms = []
        for name, dim, positions in sources:
            weight = weights[name]
            squares = weight.float().transpose(0, dim).flatten(1).square().sum(dim=1)
            norm = squares[positions.to(weight.device)].sum(dim=1).sqrt()
            norms.append(norm / norm.mean().clamp(min=torch.finfo(norm.dtype).tiny))
        stacked = torch.stack(norms)
        return stacked.amax(dim=0) if self._largest else stacked.mean(dim=0)


class CustomImportance(Importance):
    """A score function of the user; it may use this rank's data, and is averaged over ranks."""

    replicated = False
    reads_weights = True

    def __init__(
        self,
        score: Callable[[nn.Module, ChannelGroup], Tensor],
        network: nn.Module,
        groups: Groups,
    ) -> None:
        super().__init__(Candidates(groups.sizes), next(network.parameters()).device)
        self._score = score
        self._network = network
        self._groups = groups

    @torch.no_grad()
    def __call__(self) -> Tensor:
        self.failure = NonFiniteError(
            "check: the ranks' scores have no finite average: another rank's score failed; see the "
            "error on that rank"
        )
        try:
            return torch.cat([self._of_group(group) for group in self._groups])
        except Exception as error:  # user code may raise anything
            # The other ranks must not wait for this one: NaN makes the check fail on all of them.
            where = "" if isinstance(error, ConfigError) else f"{type(error).__name__}: "
            self.failure = ConfigError(f"attach: score failed: {where}{error}")
            return torch.full((self.candidates.number,), torch.nan, device=self._device)

    def _of_group(self, group: ChannelGroup) -> Tensor:
        scores = self._score(self._network, group)
        if not isinstance(scores, Tensor) or scores.shape != (group.num_channels,):
            given = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise ConfigError(
                f"group {group.name} needs a tensor [{group.num_channels}], got {given}"
            )
        scores = scores.detach().to(self._device, torch.float32)
        if not bool(scores.isfinite().all()):
            raise ConfigError(f"group {group.name} needs finite floats, got {scores.tolist()}")
        return scores


def l1_norm(scales: Iterable[Tensor]) -> Tensor:
    """Return the sum of the magnitudes of tensors ``[elements]``, at least one, as a differentiable
    float32 scalar; of sharded ones, of this rank's elements."""
    return torch.cat([local(scale).float() for scale in scales]).abs().sum()


def importance_measure(
    search: SearchConfig,
    network: nn.Module,
    groups: Groups,
    custom: Callable[[nn.Module, ChannelGroup], Tensor] | None,
    full_values: FullValues = detached,
) -> Importance:
    """Return the importance measure of the settings, or the custom one.

    Args:
        search: the search settings.
        network: the unwrapped network.
        groups: the searched groups, all of which the measure can rank.
        custom: the user's score function, or None.
        full_values: as for ``ScaleIndex``.
    """
    coupling: Coupling = "max" if search.coupling == "max" else "mean"
    if custom is not None:
        return CustomImportance(custom, network, groups)
    importance = importance_of(search, groups)
    if importance == "weight_norm":
        return WeightNorm(network, groups, coupling)
    if search.grouping == "layer":
        return LayerScales(network, groups, importance == "signed_gate", full_values)
    return ChannelScales(network, groups, coupling, importance == "signed_gate", full_values)
