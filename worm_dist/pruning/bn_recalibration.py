"""BatchNorm recalibration: new estimates of running means and variances.

While channels are removed, running statistics lag behind, and after the removal they no longer fit
the remaining channels; evaluation in eval mode needs new ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.collectives import Communicator
from ..groups.forward import buffers_kept, in_training, norms_in_training, undisturbed
from .recorded_inputs import Norm, RecordedCall

__all__ = ["Statistics", "recalibrate"]

logger = logging.getLogger(__name__)

Observer = Callable[[Any, Any], None]


def recalibrate(
    network: nn.Module,
    calls: Sequence[RecordedCall],
    ranks: Communicator,
    when: str = "draw",
    observe: Observer | None = None,
) -> None:
    """Replace running statistics by those over the given batches, pooled over the ranks.
    Collective.

    Args:
        network: the unwrapped network; modified in place.
        calls: the recorded batches of this rank.
        ranks: the communicator of the ranks whose statistics are pooled.
        when: the operation, as a prefix of the warning.
        observe: a function called with the inputs and outputs of each batch.
    """
    Statistics(network, calls, observe).write(ranks, when)


class Statistics:
    """BatchNorm statistics over the batches of this rank; the network is unchanged until ``write``.

    Only norms that were in training mode when the batches were recorded are estimated, and only
    they are put in training mode; dropout stays off.  All values have equal weight, whatever the
    batch sizes.  Batches on which the network fails are skipped.

    Args:
        network: the unwrapped network.
        calls: the recorded batches.
        observe: a function called with the inputs and outputs of each batch.
    """

    @torch.no_grad()
    def __init__(
        self, network: nn.Module, calls: Sequence[RecordedCall], observe: Observer | None = None
    ) -> None:
        trained = frozenset[str]().union(*(call.training_norms for call in calls))
        norms = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, Norm) and module.running_mean is not None
        }
        # Ranks may have recorded different norms, so the pooled tensor has room for every norm.
        self._norms = list(norms.values())
        self._wanted = [norm for name, norm in norms.items() if name in trained]
        self._sums = _Sums(self._wanted)
        self._failure = (
            _run_all(network, calls, self._sums, observe)
            if self._wanted or observe is not None
            else None
        )

    @torch.no_grad()
    def write(self, ranks: Communicator, when: str) -> None:
        """Pool the statistics over the ranks and write them into the network.  Collective.

        A norm without values on any rank keeps its statistics, with a warning.

        Args:
            ranks: the communicator of the ranks whose statistics are pooled.
            when: the operation, as a prefix of the warning.
        """
        if not self._norms:
            return
        pooled = ranks.mean(torch.cat([self._sums.of(norm).flatten() for norm in self._norms]))
        missing = 0
        # One transfer to the host instead of one for each norm.
        parts = pooled.cpu().split([4 * norm.num_features for norm in self._norms])
        for norm, part in zip(self._norms, parts, strict=True):
            num_batches, count, total, squares = part.view(4, -1)
            if not count[0]:
                missing += norm in self._wanted
                continue
            mean = total / count
            number = count * ranks.size
            unbiased = number / (number - 1).clamp(min=1)
            _not_none(norm.running_mean).copy_(mean)
            _not_none(norm.running_var).copy_((squares / count - mean.square()) * unbiased)
            if norm.momentum is None:  # cumulative average: continues from this number of batches
                _not_none(norm.num_batches_tracked).fill_(round(float(num_batches[0])))
        if missing and ranks.rank == 0:
            why = "" if self._failure is None else f" ({_message(self._failure)})"
            logger.warning(
                "%s: BatchNorm statistics of %d norms could not be estimated anew and are "
                "unchanged%s",
                when,
                missing,
                why,
            )


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _run_all(
    network: nn.Module, calls: Sequence[RecordedCall], sums: _Sums, observe: Observer | None
) -> Exception | None:
    """Run every batch; returns the error of the last batch that failed, or None."""
    failure: Exception | None = None
    with undisturbed(network), _only_norms_train(network, sums):
        for call in calls:
            # Some networks take these inputs in training mode only, such as with targets.
            for composed in (False, True):
                sums.begin()
                try:
                    with _composed_train(network) if composed else nullcontext():
                        output = call.run(network)
                except Exception as error:  # user code may raise anything
                    failure = error
                    continue
                sums.commit()
                if observe is not None:
                    observe((call.positional, call.keywords), output)
                break
    return failure


class _Sums:
    """The number of batches and values, sums, and sums of squares of every feature.

    In double precision, since a small variance would be lost next to a large mean in single.

    Args:
        norms: the norms to estimate.
    """

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.norms = norms
        self._committed: dict[Norm, Tensor] = {}
        self._batch: dict[Norm, Tensor] = {}

    def begin(self) -> None:
        """Start a forward pass; discards sums that have not been committed."""
        self._batch = {}

    def add(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Add the statistics of one call of a norm: a forward hook of norms with momentum one."""
        count = output.numel() // norm.num_features  # of the inputs, a selective norm reads some
        mean, variance = (
            _not_none(statistic).double() for statistic in (norm.running_mean, norm.running_var)
        )
        square = variance * (count - 1) / count + mean.square()
        one = torch.ones_like(mean)
        sums = torch.stack([one, count * one, count * mean, count * square])
        self._batch[norm] = self._batch[norm] + sums if norm in self._batch else sums

    def commit(self) -> None:
        """Keep the sums of a forward pass that has completed."""
        for norm, sums in self._batch.items():
            self._committed[norm] = (
                self._committed[norm] + sums if norm in self._committed else sums
            )

    def of(self, norm: Norm) -> Tensor:
        """Return the sums of a norm, float64 ``[4, features]``; zeros if it has not been called."""
        device = _not_none(norm.running_mean).device
        nothing = torch.zeros(4, norm.num_features, dtype=torch.float64, device=device)
        return self._committed.get(norm, nothing)


@contextmanager
def _only_norms_train(network: nn.Module, sums: _Sums) -> Iterator[None]:
    """Put only the norms in training mode and record their batch statistics within the context.

    All buffers, including running statistics, are restored afterwards.
    """
    handles = [norm.register_forward_hook(sums.add, with_kwargs=True) for norm in sums.norms]
    try:
        with buffers_kept(network), norms_in_training(sums.norms):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _composed_train(network: nn.Module) -> Iterator[None]:
    """Put composite modules, but not their leaves, in training mode within the context."""
    composed = [
        name
        for name, module in network.named_modules()
        if any(True for _ in module.children()) and not isinstance(module, Norm)
    ]
    with in_training(network, composed):
        yield


def _not_none(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer
