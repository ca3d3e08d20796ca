"""Statistics: BatchNorm's running mean and variance, estimated anew.

While channels leave they lag behind, and once half of the channels are gone those that the others
were trained with no longer hold; without new ones the accuracy says little.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.collectives import Communicator
from ..engine.recorded_inputs import Norm, RecordedCall
from ..groups.forward import buffers_kept, undisturbed
from ..groups.training_mode import in_training, norms_in_training

__all__ = ["Statistics", "recalibrate"]

logger = logging.getLogger(__name__)

Look = Callable[[Any, Any], None]


def recalibrate(
    network: nn.Module,
    calls: Sequence[RecordedCall],
    ranks: Communicator,
    when: str = "draw",
    look: Look | None = None,
) -> None:
    """Replace running statistics by those over the given batches, pooled over the ranks.
    Collective.

    Args:
        network: not wrapped; changed in place.
        calls: the batches of this rank.
        ranks: whose statistics are pooled.
        when: for the warning.
        look: is given what each batch puts in, and what the network puts out for it.
    """
    Statistics(network, calls, look).write(ranks, when)


class Statistics:
    """Those over the batches of this rank; the network is left as it was until ``write``.

    Only norms that were in training mode are estimated, and only they see training mode; dropout
    and the like stay off.  Every value counts alike, whatever batch it is in.  A batch that the
    network cannot be run with counts for nothing.

    Args:
        network: not wrapped.
        calls: the batches.
        look: is given what each batch puts in, and what the network puts out for it.
    """

    @torch.no_grad()
    def __init__(
        self, network: nn.Module, calls: Sequence[RecordedCall], look: Look | None = None
    ) -> None:
        trained = frozenset[str]().union(*(call.training_norms for call in calls))
        norms = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, Norm) and module.running_mean is not None
        }
        # Ranks agree on neither the norms that they have seen nor on their batches; so a sum has a
        # place for every norm.
        self._norms = list(norms.values())
        self._wanted = [norm for name, norm in norms.items() if name in trained]
        self._sums = _Sums(self._wanted)
        self._failure = (
            _run_all(network, calls, self._sums, look) if self._wanted or look is not None else None
        )

    @torch.no_grad()
    def write(self, ranks: Communicator, when: str) -> None:
        """Pool them over the ranks, and write them into the network.  Collective.

        A norm of which no rank has seen a value keeps what it has, with a warning.

        Args:
            ranks: whose statistics are pooled.
            when: for the warning.
        """
        if not self._norms:
            return
        pooled = ranks.mean(torch.cat([self._sums.of(norm).flatten() for norm in self._norms]))
        missing = 0
        # To the host once: what is known of a norm is asked for one by one.
        parts = pooled.cpu().split([4 * norm.num_features for norm in self._norms])
        for norm, part in zip(self._norms, parts, strict=True):
            num_batches, count, total, squares = part.view(4, -1)
            if not count[0]:
                missing += norm in self._wanted
                continue
            mean = total / count
            number = count * ranks.size
            unbiased = number / (number - 1).clamp(min=1)
            _tensor(norm.running_mean).copy_(mean)
            _tensor(norm.running_var).copy_((squares / count - mean.square()) * unbiased)
            if norm.momentum is None:  # the average goes on from so many batches
                _tensor(norm.num_batches_tracked).fill_(round(float(num_batches[0])))
        if missing and ranks.rank == 0:
            why = "" if self._failure is None else f" ({_told(self._failure)})"
            logger.warning(
                "%s: BatchNorm statistics of %d norms could not be estimated anew and stay as they "
                "were%s",
                when,
                missing,
                why,
            )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _run_all(
    network: nn.Module, calls: Sequence[RecordedCall], sums: _Sums, look: Look | None
) -> Exception | None:
    """Run every batch; returns why the newest one that could not be run could not."""
    failure: Exception | None = None
    with undisturbed(network), _only_norms_train(network, sums):
        for call in calls:
            # Some want their whole code in training mode, with targets and the like.
            for composed in (False, True):
                sums.begin()
                try:
                    with _composed_train(network) if composed else nullcontext():
                        output = call.run(network)
                except Exception as error:  # whatever a foreign forward may raise
                    failure = error
                    continue
                sums.keep()
                if look is not None:
                    look((call.positional, call.keywords), output)
                break
    return failure


class _Sums:
    """Numbers of batches and of values, sums and sums of squares of every feature, in double
    precision: in single, a large mean would swallow a small variance."""

    def __init__(self, norms: Sequence[Norm]) -> None:
        self.norms = norms
        self._kept: dict[Norm, Tensor] = {}
        self._batch: dict[Norm, Tensor] = {}

    def begin(self) -> None:
        """A pass begins."""
        self._batch = {}

    def note(self, norm: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A norm with momentum one has seen this batch; its statistics are the batch's."""
        inputs: Tensor = args[0] if args else kwargs["input"]
        count = inputs.numel() // norm.num_features
        mean, variance = (
            _tensor(statistic).double() for statistic in (norm.running_mean, norm.running_var)
        )
        square = variance * (count - 1) / count + mean.square()
        one = torch.ones_like(mean)
        sums = torch.stack([one, count * one, count * mean, count * square])
        self._batch[norm] = self._batch[norm] + sums if norm in self._batch else sums

    def keep(self) -> None:
        """The pass has come to its end."""
        for norm, sums in self._batch.items():
            self._kept[norm] = self._kept[norm] + sums if norm in self._kept else sums

    def of(self, norm: Norm) -> Tensor:
        """float64 ``[4, features]``, zeros where nothing was seen."""
        device = _tensor(norm.running_mean).device
        nothing = torch.zeros(4, norm.num_features, dtype=torch.float64, device=device)
        return self._kept.get(norm, nothing)


@contextmanager
def _only_norms_train(network: nn.Module, sums: _Sums) -> Iterator[None]:
    """Within, of a network in eval mode these norms train, and tell of every batch; then what a
    pass writes to is put back, their statistics too."""
    handles = [norm.register_forward_hook(sums.note, with_kwargs=True) for norm in sums.norms]
    try:
        with buffers_kept(network), norms_in_training(sums.norms):
            yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _composed_train(network: nn.Module) -> Iterator[None]:
    """Within, modules that consist of others are in training mode by themselves."""
    composed = [
        name
        for name, module in network.named_modules()
        if any(True for _ in module.children()) and not isinstance(module, Norm)
    ]
    with in_training(network, composed):
        yield


def _tensor(buffer: Tensor | None) -> Tensor:
    assert buffer is not None
    return buffer
