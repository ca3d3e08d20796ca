"""Rehearsal: drops channels from a copy of a network and compares the outputs.

Where channels pass through a sigmoid, a softmax over channels, a branch without a norm or code with
a fixed width, dropping a channel is not equivalent to setting its scale and shift to zero.  Instead
of rules for every operation, channels are dropped from a copy, and its outputs are compared with
those of the whole network with the same channels set to zero.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ..groups.calls import Calls
from ..groups.channel_groups import ChannelGroup, Groups
from ..groups.copying import copied
from ..groups.forward import buffers_kept, floats, in_training, run
from ..groups.mask import Mask
from ..groups.nested import mapped
from .readers import OutputSums, Readers, same_outputs
from .surgery import cuts_of, remove_channels, shapes_of

__all__ = ["Rehearsal", "difference"]

# Relative to the largest output.  Single precision needs a coarse tolerance, above all on GPUs that
# round the inputs of convolutions to ten mantissa bits (TF32).
_TOLERANCE = 1e-9
_COARSE_TOLERANCE = 1e-2
_OUTPUTS_DIFFER = "without some of its channels the network computes other values"
_MOST_BYTES_ON_DEVICE = 2 << 30
"""Size of the parameters in double precision above which they are tried on the CPU."""
_Within: TypeAlias = AbstractContextManager[None]


class Rehearsal:
    """A copy of a network in double precision, if it runs in it, with inputs to run it on.

    Args:
        network: the unwrapped network, in eval mode.
        example_inputs: inputs as for ``forward.run``.
        tolerance: the relative difference of outputs that rounding explains in double precision.
        calls: what runs of the network on these inputs; found out by default.

    Attributes:
        network: the copy, from which no channels are removed.
    """

    def __init__(
        self,
        network: nn.Module,
        example_inputs: Any,
        tolerance: float = _TOLERANCE,
        calls: Calls | None = None,
    ) -> None:
        self._tolerance = tolerance
        # By the modules in training mode: whether the outputs are deterministic in that mode.
        self._modes: dict[tuple[str, ...], bool] = {(): True}
        for device in _trial_devices(network):
            try:
                self.network = copied(network, partial(_double_copy, device=device))
                self.network.to(device).double()
                self._inputs = mapped(example_inputs, partial(_double, device=device))
                if calls is None:
                    calls = Calls.of(self.network, self._inputs)
                else:
                    run(self.network, self._inputs)
                break
            except Exception:  # such as a forward with a fixed dtype or device
                self.network = None  # type: ignore[assignment]  # its memory is free before the next
        else:
            self.network = copied(network)
            self._inputs = example_inputs
            if calls is None:
                calls = Calls.of(self.network, self._inputs)
        deciding = calls.deciding(may_lack=True)
        if deciding:
            with suppress(Exception):  # training mode may fail in double precision
                one, other = (self._outputs_in(deciding, self.network) for _ in range(2))
                self._modes[deciding] = all(map(torch.equal, one, other))

    def copy(self, tolerance: float) -> Rehearsal:
        """Return a rehearsal with a copy of the network and with another tolerance."""
        same = copy.copy(self)
        same.network, same._tolerance = copied(self.network), tolerance
        return same

    def difference(
        self, groups: Groups, mask: Mask, dropping: Sequence[ChannelGroup] | None = None
    ) -> str | None:
        """Return what is wrong after the channels that a mask drops are removed; None if nothing.

        Args:
            groups: the network's channel groups.
            mask: the mask over these groups.
            dropping: the groups that lose channels; default all groups.
        """
        trial = copied(self.network, lambda data: data)  # shares the memory of the parameters
        tried = groups if dropping is None else dropping
        readers = Readers(trial, tried, groups, mask)
        sums: list[OutputSums] = []

        def run_on(network: nn.Module) -> list[Tensor]:
            sums.append([])
            return self._outputs(network, partial(readers.recording, sums[-1]))

        reason = difference(trial, run_on, groups, mask, dropping, self._tolerance)
        if reason is None and not same_outputs(*sums, tolerance=self._tolerance):
            return f"{_OUTPUTS_DIFFER} in a layer that reads them"
        return reason

    def run(self) -> None:
        """Run one forward pass of the copy."""
        run(self.network, self._inputs)

    @property
    def is_finite(self) -> bool:
        """Whether all outputs of the copy are finite."""
        outputs = self._outputs(self.network)
        return all(bool(output.isfinite().all()) for output in outputs)

    def _outputs(
        self, network: nn.Module, recording: Callable[[nn.Module], _Within] | None = None
    ) -> list[Tensor]:
        """Return the outputs in eval mode, and in training mode if that runs more of the network.

        Random outputs are replaced by zeros of their shape, and ``recording`` is active in
        deterministic modes only.
        """
        outputs: list[Tensor] = []
        for deciding, exact in self._modes.items():
            with recording(network) if recording is not None and exact else nullcontext():
                given = self._outputs_in(deciding, network)
            outputs += given if exact else map(torch.zeros_like, given)
        return outputs

    def _outputs_in(self, deciding: Collection[str], network: nn.Module) -> list[Tensor]:
        """Return the outputs with these modules in training mode.

        If the network has no outputs, such as a detector without detections, those of its immediate
        children are returned.
        """
        with in_training(network, deciding), _child_outputs(network) as child_outputs:
            return list(floats(run(network, self._inputs))) or child_outputs


@contextmanager
def _child_outputs(network: nn.Module) -> Iterator[list[Tensor]]:
    """Collect the outputs of the network's immediate children within the context."""
    child_outputs: list[Tensor] = []
    handles = [
        part.register_forward_hook(lambda part, args, output: child_outputs.extend(floats(output)))
        for part in network.children()
    ]
    try:
        yield child_outputs
    finally:
        for handle in handles:
            handle.remove()


def difference(
    network: nn.Module,
    run_on: Callable[[nn.Module], Sequence[Tensor]],
    groups: Groups,
    mask: Mask,
    dropping: Sequence[ChannelGroup] | None = None,
    tolerance: float = _TOLERANCE,
) -> str | None:
    """Compare a network's outputs after channels are removed with those after they are zeroed.

    Args:
        network: a copy of the network; its channels are removed.  Its parameters may share memory
            with those of another network, which stays unchanged.
        run_on: a function that returns the network's outputs for some inputs.
        groups: the network's channel groups.
        mask: the mask over these groups.
        dropping: the groups that lose channels; default all groups.
        tolerance: the relative difference that rounding explains in double precision.

    Returns:
        The reason why the removal is not exact; None if it is.
    """
    _zero_channels(network, groups if dropping is None else dropping, mask)
    with buffers_kept(network):  # outputs may depend on buffers that a pass changes
        expected = run_on(network)
    # Rows first, since they are contiguous and fewer columns are left to be gathered.
    cuts = sorted(cuts_of(groups, mask, shapes_of(network)), key=lambda cut: cut.dim)
    remove_channels(network, cuts)
    try:
        outputs = run_on(network)
    except Exception as error:  # user code may raise anything
        return f"without some of its channels the network fails: {error}"
    if len(outputs) != len(expected):
        return "without some of its channels the network returns other outputs"
    for whole, drawn in zip(expected, outputs):
        if whole.shape != drawn.shape:
            return "its channels are outputs of the network"
        allowed = tolerance if whole.dtype == torch.float64 else _COARSE_TOLERANCE
        # Written so that NaN counts as a difference.
        if not bool((whole - drawn).abs().max() <= allowed * whole.abs().max()):
            return _OUTPUTS_DIFFER
    return None


def _zero_channels(network: nn.Module, dropping: Sequence[ChannelGroup], mask: Mask) -> None:
    """Set the dropped channels of these groups to zero, without writing to shared memory."""
    parameters = dict(network.named_parameters())
    for group in dropping:
        dropped = ~mask[group.name]
        for member in group.zeroing_members:
            for name, dim in member.parameters:
                data = parameters[name].detach()
                indices = member.positions[dropped].flatten().to(data.device)
                parameters[name].data = data.index_fill(dim, indices, 0)


def _trial_devices(network: nn.Module) -> list[torch.device]:
    """Where to try the network in double precision: on its own device, but first on the CPU if it
    is large, since the memory of a GPU is needed for the training."""
    sizes = {p: p.numel() for p in network.parameters()}
    own = next(iter(sizes)).device if sizes else torch.device("cpu")
    is_large = 8 * sum(sizes.values()) > _MOST_BYTES_ON_DEVICE
    return list(dict.fromkeys([torch.device("cpu"), own] if is_large else [own]))


def _double_copy(data: Tensor, device: torch.device) -> Tensor:
    dtype = torch.float64 if data.is_floating_point() else data.dtype
    return data.to(device, dtype, copy=True)


def _double(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float64 if tensor.is_floating_point() else tensor.dtype)
