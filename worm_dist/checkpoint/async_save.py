"""Background: a checkpoint is written while training goes on.

Training waits while the state is copied in memory, not while it is hashed and written.  One save is
on its way at a time, and one copy of the state is kept for all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .state_file import Packed, pack
from .tensor_meta import TensorMetadata

__all__ = ["Background"]

Write = Callable[[Mapping[str, Packed]], object]


class Background:
    """Copies states and has them written by a thread.

    Leave it with ``finish``: only then is the last checkpoint known to be written.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, states: Mapping[str, Any], write: Write) -> None:
        """Copy the states and return; the copies are written meanwhile.

        Waits for the save before this one.

        Args:
            states: by the name of their part; see ``Staged.write``.
            write: is called in the thread with the copies, of which it keeps nothing; it talks to
                no other process.

        Raises:
            WormError, or what else ``write`` raised in the save before this one.
            CheckpointError: the states cannot be saved.
        """
        self.finish()
        copies = self._copies(states)
        self._thread = threading.Thread(target=self._run, args=(write, copies), name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the save on its way is written, if there is one.

        Raises:
            What ``write`` raised.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(self, write: Write, copies: Mapping[str, Packed]) -> None:
        try:
            write(copies)
        except BaseException as error:
            self._error = error

    def _copies(self, states: Mapping[str, Any]) -> dict[str, Packed]:
        buffers: dict[tuple[str, str], Tensor] = {}
        copies: dict[str, Packed] = {}
        for part, state in states.items():
            packed = pack(state)
            tensors: dict[str, tuple[TensorMetadata, Tensor]] = {}
            for name, (form, memory) in packed.tensors.items():
                # The memory of the save before: to take new memory costs several times the copy.
                buffer = self._buffers.pop((part, name), None)
                if buffer is None or buffer.numel() != memory.numel():
                    buffer = torch.empty(memory.numel(), dtype=torch.uint8)
                buffers[part, name] = buffer
                tensors[name] = form, buffer.copy_(memory)
            copies[part] = Packed(packed.skeleton, tensors)
        self._buffers = buffers
        return copies
