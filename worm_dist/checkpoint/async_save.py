"""Asynchronous saving: a checkpoint is written by a thread while training goes on.

Training waits only while the state is copied in memory, not while it is hashed and written.  At
most one save is in flight, and its buffers are reused by the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .state_file import Packed, pack
from .tensor_meta import TensorMetadata

__all__ = ["AsyncSaver"]

Write = Callable[[Mapping[str, Packed]], object]


class AsyncSaver:
    """Copies states to CPU memory and writes the copies in a thread.

    Call ``finish`` at the end: only then is the last checkpoint known to be written.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, states: Mapping[str, Any], write: Write) -> None:
        """Wait for the previous save, copy the states and start writing the copies.

        Args:
            states: the state of each part, by name; see ``Staged.write``.
            write: function that writes the copies; called in the thread.  It must not keep them,
                nor communicate with other processes.

        Raises:
            CheckpointError: a state cannot be saved.
            Exception: any error that ``write`` raised in the previous save.
        """
        self.finish()
        copies = self._copy(states)
        copied = None
        if torch.cuda.is_initialized():
            # The copies from a GPU are ordered before the kernels of the next step; only the thread
            # waits for them.
            copied = torch.cuda.Event()
            copied.record()
        arguments = (write, copies, copied)
        self._thread = threading.Thread(target=self._run, args=arguments, name="checkpoint")
        self._thread.start()

    def finish(self) -> None:
        """Wait until the save in flight is written, if there is one.

        Raises:
            Exception: any error that ``write`` raised in that save.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _run(
        self, write: Write, copies: Mapping[str, Packed], copied: torch.cuda.Event | None
    ) -> None:
        try:
            if copied is not None:
                copied.synchronize()
            write(copies)
        except BaseException as error:
            self._error = error

    def _copy(self, states: Mapping[str, Any]) -> dict[str, Packed]:
        buffers: dict[tuple[str, str], Tensor] = {}
        copies: dict[str, Packed] = {}
        for part, state in states.items():
            packed = pack(state)
            shards = packed.shards
            copies[part] = Packed(
                packed.structure,
                self._copied(part, packed.tensors, buffers),
                None if shards is None else self._copied(f"{part} shards", shards, buffers),
            )
        self._buffers = buffers
        return copies

    def _copied(
        self,
        part: str,
        tensors: Mapping[str, tuple[TensorMetadata, Tensor]],
        buffers: dict[tuple[str, str], Tensor],
    ) -> dict[str, tuple[TensorMetadata, Tensor]]:
        copied: dict[str, tuple[TensorMetadata, Tensor]] = {}
        for name, (metadata, memory) in tensors.items():
            # Reused, because allocating new memory takes several times as long as the copy.
            buffer = self._buffers.pop((part, name), None)
            if buffer is None or buffer.numel() != memory.numel():
                # Only to pinned memory does a GPU copy while the host goes on.
                buffer = torch.empty(memory.numel(), dtype=torch.uint8, pin_memory=memory.is_cuda)
            buffers[part, name] = buffer
            copied[name] = metadata, buffer.copy_(memory, non_blocking=True)
        return copied
