"""Step hooks: count optimizer steps, record inputs, and add up the bytes sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..backends.optimizer_view import Handle, OptimizerView, Owners
from ..pruning.recorded_inputs import RecordedCall, RecordedInputs

__all__ = ["StepHooks", "Traffic"]


@dataclass
class Traffic:
    """Bytes that this rank hands to collectives.

    Steps with a reducer are counted; for others one averaging backward pass per step is assumed.

    Attributes:
        sent_bytes: bytes of the last optimizer step, with all backward passes since the step
            before, skipped steps of a loss scaler included.  Under ZeRO also this rank's share of
            the gathered weights.
        dense_bytes: bytes that a step of the dense network would have sent, after the draw too.
        total_sent_bytes: sum of ``sent_bytes`` over all steps so far.
        total_dense_bytes: sum of ``dense_bytes`` over all steps so far.
        control_bytes: bytes of scores, digests and verdicts in all checks so far.
    """

    sent_bytes: int = 0
    dense_bytes: int = 0
    total_sent_bytes: int = 0
    total_dense_bytes: int = 0
    control_bytes: int = 0

    def add_step(self, sent_bytes: int, dense_bytes: int) -> None:
        self.sent_bytes = sent_bytes
        self.dense_bytes = dense_bytes
        self.total_sent_bytes += sent_bytes
        self.total_dense_bytes += dense_bytes


class StepHooks:
    """Counts optimizer steps and records the newest inputs.

    Args:
        network: the module that the wrapper calls, whose inputs are recorded.
        view: the view of the optimizer whose steps are counted.
        recorded: the recorder, registered as a forward pre-hook.
        before_step, hold, after_step: called around every optimizer step, the last two with its
            number; ``hold`` right after weights have changed, with the stepped tensors.

    Attributes:
        step: optimizer steps so far.
        calls: the newest forward passes in training mode, oldest first.
    """

    def __init__(
        self,
        network: nn.Module,
        view: OptimizerView,
        recorded: RecordedInputs,
        before_step: Callable[[], None],
        hold: Callable[[int, Owners], None],
        after_step: Callable[[int], None],
    ) -> None:
        self.step = 0
        self._is_suspended = False
        self._recorded = recorded
        self._before_step = before_step
        self._hold = hold
        self._after_step = after_step
        self._step_handles: list[Handle] = []
        self.register(view)
        self._input_handle = network.register_forward_pre_hook(self._recorded, with_kwargs=True)

    @property
    def calls(self) -> Sequence[RecordedCall]:
        return self._recorded.calls

    def register(self, view: OptimizerView) -> None:
        """Register the hooks on another optimizer, instead of the one before."""
        for handle in self._step_handles:
            handle.remove()
        self._step_handles = view.register_hooks(
            lambda: None if self._is_suspended else self._before_step(),
            lambda owners: None if self._is_suspended else self._hold(self.step + 1, owners),
            lambda: None if self._is_suspended else self._stepped(),
        )

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context in which optimizer steps are ignored: DeepSpeed's initialisation takes one."""
        self._is_suspended = True
        try:
            yield
        finally:
            self._is_suspended = False

    def _stepped(self) -> None:
        self.step += 1
        self._after_step(self.step)

    def restore(self, step: int, calls: Sequence[RecordedCall]) -> None:
        """Set the step count and the newest inputs."""
        self.step = step
        self._recorded.replace(calls)

    def stop_recording(self) -> None:
        """Record no inputs from now on."""
        self._input_handle.remove()
        self._recorded.replace(())

    def remove(self) -> None:
        """Remove all hooks."""
        self.stop_recording()
        for handle in self._step_handles:
            handle.remove()
