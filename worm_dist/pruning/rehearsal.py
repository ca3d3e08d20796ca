"""Rehearsal: channels dropped from a copy of a network, and what that changes.

Behind a sigmoid, a softmax over channels, a branch without a norm or a width written into the
code, dropping a channel is not the same as its scale and shift being zero.  Rather than to know
every operation, channels are dropped from a copy, and the outputs are compared with those of the
whole network with the same channels silenced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.copying import copied
from ..groups.forward import buffers_kept, floats, run
from ..groups.nested import mapped
from ..groups.training_mode import deciding_modules, in_training
from ..search.mask import Mask
from .readers import Heard, Readers, alike
from .surgery import cuts_of, remove_channels, shapes_of

__all__ = ["Rehearsal", "difference"]

# Of the largest output.  Double precision tells rounding from everything else; single precision
# does not, above all where a GPU rounds convolutions to ten bits.
_TOLERANCE: Mapping[torch.dtype, float] = {torch.float64: 1e-9}
_COARSE_TOLERANCE = 1e-2
_SOMETHING_ELSE = "without some of its channels the network computes something else"
_Within: TypeAlias = AbstractContextManager[None]


class Rehearsal:
    """A copy of a network in double precision, with inputs to run it on.

    Args:
        network: not wrapped, in eval mode.
        example_inputs: as for ``forward.run``.

    Attributes:
        network: the copy, whole.
    """

    def __init__(self, network: nn.Module, example_inputs: Any) -> None:
        # Of the modules in training mode whether what is put out then is the same every time.
        self._modes: dict[tuple[str, ...], bool] = {(): True}
        try:
            self.network = copied(network).double()
            self._inputs = mapped(example_inputs, _double)
            run(self.network, self._inputs)
        except Exception:  # a forward that insists on its own precision
            self.network = copied(network)
            self._inputs = example_inputs
        deciding = deciding_modules(self.network, self._inputs, may_lack=True)
        if deciding:
            self._modes[deciding] = True
            one, other = self._outputs(self.network), self._outputs(self.network)
            self._modes[deciding] = all(map(torch.equal, one, other))

    def difference(
        self, groups: Groups, mask: Mask, dropping: Sequence[ChannelGroup] | None = None
    ) -> str | None:
        """What is wrong once the channels that a mask drops are gone; None if nothing.

        Args:
            groups: of the network.
            mask: of these groups.
            dropping: the groups that lose any; default all of them.
        """
        silenced = copied(self.network)
        tried = groups if dropping is None else dropping
        readers = Readers(silenced, tried, groups, mask)
        heard: list[Heard] = []

        def run_on(network: nn.Module) -> list[Tensor]:
            heard.append([])
            return self._outputs(network, partial(readers.heard, heard[-1]))

        reason = difference(silenced, run_on, groups, mask, dropping)
        if reason is None and not alike(*heard):
            return f"{_SOMETHING_ELSE} in a layer that reads them"
        return reason

    def run(self) -> None:
        """One forward pass of the copy, as it is."""
        run(self.network, self._inputs)

    @property
    def is_finite(self) -> bool:
        """Whether the copy puts out numbers."""
        outputs = self._outputs(self.network)
        return all(bool(output.isfinite().all()) for output in outputs)

    def _outputs(
        self, network: nn.Module, listening: Callable[[nn.Module], _Within] | None = None
    ) -> list[Tensor]:
        """In eval mode, and in training mode if there more of the network runs; of what is random
        only the shape.  Where the network puts out nothing, as a detector that finds nothing, what
        its parts put out.  It is listened to while what it does is not random."""
        outputs: list[Tensor] = []
        for deciding, exact in self._modes.items():
            heard = listening(network) if listening is not None and exact else nullcontext()
            with in_training(network, deciding), _parts_overheard(network) as overheard, heard:
                given = list(floats(run(network, self._inputs)))
                given = given or overheard
                outputs += given if exact else map(torch.zeros_like, given)
        return outputs


@contextmanager
def _parts_overheard(network: nn.Module) -> Iterator[list[Tensor]]:
    """Within, what the network's immediate parts put out is added to the list."""
    overheard: list[Tensor] = []
    handles = [
        part.register_forward_hook(lambda part, args, output: overheard.extend(floats(output)))
        for part in network.children()
    ]
    try:
        yield overheard
    finally:
        for handle in handles:
            handle.remove()


def difference(
    network: nn.Module,
    run_on: Callable[[nn.Module], Sequence[Tensor]],
    groups: Groups,
    mask: Mask,
    dropping: Sequence[ChannelGroup] | None = None,
) -> str | None:
    """What a network puts out once channels are gone that it does not put out once they are zero;
    None if nothing.

    Args:
        network: a copy; it is cut.
        run_on: gives its outputs for some inputs.
        groups: its channel groups.
        mask: of these groups.
        dropping: the groups that lose any; default all of them.
    """
    _silence(network, groups if dropping is None else dropping, mask)
    with buffers_kept(network):  # what is put out may depend on queues and the like
        expected = run_on(network)
    remove_channels(network, cuts_of(groups, mask, shapes_of(network)))
    try:
        outputs = run_on(network)
    except Exception as error:  # whatever a foreign forward may raise
        return f"without some of its channels the network fails: {error}"
    if len(outputs) != len(expected):
        return "without some of its channels the network puts out something else"
    for whole, drawn in zip(expected, outputs):
        if whole.shape != drawn.shape:
            return "its channels are what the network puts out"
        tolerance = _TOLERANCE.get(whole.dtype, _COARSE_TOLERANCE)
        # Written so that a NaN counts as a difference.
        if not bool((whole - drawn).abs().max() <= tolerance * whole.abs().max()):
            return _SOMETHING_ELSE
    return None


def _silence(network: nn.Module, dropping: Sequence[ChannelGroup], mask: Mask) -> None:
    parameters = dict(network.named_parameters())
    for group in dropping:
        for member in group.silencers:
            places = member.positions[~mask[group.name]].flatten()
            for name, dim in member.parameters:
                parameters[name].index_fill_(dim, places.to(parameters[name].device), 0)


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
