"""Observer: what the engine hears of the training it is attached to: steps, inputs, bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from torch import nn

from ..backends.optimizer_view import Handle, OptimizerView, Owners
from .recorded_inputs import RecordedCall, RecordedInputs

__all__ = ["StepHooks", "Traffic"]


@dataclass
class Traffic:
    """Bytes that this rank hands to collectives.

    Truncated steps are counted; for others one averaging backward pass a step is taken for granted.

    Attributes:
        sent_bytes: in the last optimizer step, with all passes since the one before; those of a
            step that a loss scaler skipped are among them.  Under ZeRO also the weights that ranks
            tell one another: a rank's share of what all tell.
        dense_bytes: what a step of the dense network would have sent, after the draw too.
        total_sent_bytes: gradients of all steps so far.
        total_dense_bytes: what dense steps would have sent.
        control_bytes: scores, digests and verdicts of all checks so far.
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
    """Counts optimizer steps and remembers the newest inputs.

    Args:
        network: not wrapped; its training inputs are remembered.
        stepping: its steps are counted.
        remembered: is told of them.
        before_step, hold, after_step: called around every optimizer step, with its number; ``hold``
            as soon as weights have moved.

    Attributes:
        step: optimizer steps so far.
        calls: arguments of the newest forward passes in training mode, oldest first.
    """

    def __init__(
        self,
        network: nn.Module,
        stepping: OptimizerView,
        remembered: RecordedInputs,
        before_step: Callable[[], None],
        hold: Callable[[int, Owners], None],
        after_step: Callable[[int], None],
    ) -> None:
        self.step = 0
        self._is_deaf = False
        self._remembered = remembered
        self._before_step = before_step
        self._hold = hold
        self._after_step = after_step
        self._steps: list[Handle] = []
        self.listen(stepping)
        self._inputs = network.register_forward_pre_hook(self._remembered, with_kwargs=True)

    @property
    def calls(self) -> Sequence[RecordedCall]:
        return self._remembered.calls

    def listen(self, stepping: OptimizerView) -> None:
        """Count the steps of another optimizer from now on, where it has been built anew."""
        for handle in self._steps:
            handle.remove()
        self._steps = stepping.listen(
            lambda: None if self._is_deaf else self._before_step(),
            lambda owners: None if self._is_deaf else self._hold(self.step + 1, owners),
            lambda: None if self._is_deaf else self._stepped(),
        )

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Within, steps are none of the training's: DeepSpeed takes one while it is built."""
        self._is_deaf = True
        try:
            yield
        finally:
            self._is_deaf = False

    def _stepped(self) -> None:
        self.step += 1
        self._after_step(self.step)

    def go_on_from(self, step: int, calls: Sequence[RecordedCall]) -> None:
        """As if ``step`` steps had been taken, and these had been the newest inputs."""
        self.step = step
        self._remembered.replace(calls)

    def forget_inputs(self) -> None:
        """Remember no inputs from now on."""
        self._inputs.remove()
        self._remembered.replace(())

    def remove(self) -> None:
        """Hear nothing from now on."""
        self.forget_inputs()
        for handle in self._steps:
            handle.remove()
