"""Input record: the newest inputs of a network in training, and statistics estimated from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..config import TicketConfig
from ..distributed.collectives import Communicator
from ..groups.channel_groups import Groups
from ..pruning.bn_recalibration import recalibrate
from ..pruning.collapse import Liveness
from ..pruning.recorded_inputs import RecordedCall, RecordedInputs, calls_from, plain_calls

__all__ = ["InputRecord"]


class InputRecord:
    """Records the newest inputs of a network while it trains.

    Args:
        config: the settings of the draw.
        may_draw: whether channels may be removed; otherwise no inputs are recorded.

    Attributes:
        is_on: whether inputs are recorded to estimate BatchNorm statistics from.
    """

    def __init__(self, config: TicketConfig, may_draw: bool) -> None:
        num_calls = config.recalibrate_batches if may_draw else 0
        self._recorded = RecordedInputs(num_calls, config.recalibrate_memory_mb << 20)
        self.is_on = self._recorded.is_on
        self._handle: RemovableHandle | None = None
        self._estimated_after: tuple[int, int] | None = None

    @property
    def calls(self) -> Sequence[RecordedCall]:
        """The newest inputs, oldest first."""
        return self._recorded.calls

    def register(self, module: nn.Module) -> None:
        """Record the inputs of this module: the outermost one, so that inputs are recorded outside
        of torch.compile's graph; before its other hooks, which run again with what is recorded."""
        self._handle = module.register_forward_pre_hook(
            self._recorded, prepend=True, with_kwargs=True
        )

    def replace(self, calls: Sequence[RecordedCall]) -> None:
        """Replace the recorded inputs."""
        self._recorded.replace(calls)

    def rank_state(self) -> list[dict[str, Any]] | None:
        """This rank's inputs in plain values; None if one is of another type."""
        return plain_calls(self.calls)

    def load_rank_state(
        self, inputs: Sequence[dict[str, Any]], device: torch.device, estimated_after: int | None
    ) -> None:
        """Restore inputs, on this device if they were not on the CPU.

        Args:
            inputs: the result of ``rank_state``.
            device: the network's device.
            estimated_after: the step of the check that has estimated the statistics from them; None
                if something has been trained since.
        """
        self.replace(calls_from(inputs, device))
        if estimated_after is not None:
            self._estimated_after = estimated_after, self._recorded.num_passes

    def recalibrate(
        self,
        network: nn.Module,
        groups: Groups,
        comm: Communicator,
        step: int,
        warned: set[str],
    ) -> None:
        """Estimate BatchNorm statistics from the recorded inputs, and check the network for
        collapse.  Collective.

        Args:
            network: the network.
            groups: its channel groups, as it is now.
            comm: the communicator of the data-parallel ranks.
            step: optimizer steps so far, when a check is made.
            warned: names of groups that a warning was given for; new ones are added.

        Raises:
            CollapseError: on every rank, if the network's output does not depend on its input.
        """
        if self.is_on:
            where = f"check at step {step}"
            with Liveness(network, groups) as liveness:
                recalibrate(network, self.calls, comm, where, liveness.observe)
            liveness.require(comm, where, warned)
            self._estimated_after = step, self._recorded.num_passes

    def is_estimated(self, step: int, comm: Communicator) -> bool:
        """Whether the statistics are those that ``recalibrate`` estimated, with nothing trained
        since.  Collective: a pass on one rank counts for all.

        Args:
            step: optimizer steps so far.
            comm: the communicator of the data-parallel ranks.
        """
        return not comm.any(torch.tensor([float(not self.is_estimated_here(step))]))

    def is_estimated_here(self, step: int) -> bool:
        """``is_estimated`` on this rank alone."""
        return self._estimated_after == (step, self._recorded.num_passes)

    @contextmanager
    def unrecorded(self) -> Iterator[None]:
        """Context after which its passes count as not made; they must not change statistics."""
        calls, num_passes = list(self.calls), self._recorded.num_passes
        yield
        self.replace(calls)
        self._recorded.num_passes = num_passes

    def stop(self) -> None:
        """Record no inputs from now on, and let go of those recorded."""
        if self._handle is not None:
            self._handle.remove()
        self.replace(())
