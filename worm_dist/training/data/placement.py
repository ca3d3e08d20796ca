"""Placement: puts batches on the device of the training, in the form that the network takes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from .batches import batches
from .normalization import Normalization

__all__ = ["Placement"]


class Placement:
    """Copies batches to a device and makes inputs of their images.

    Args:
        device: the device of the network.
        dtype: the dtype of its weights.
        layout: the memory format of its inputs.
        normalization: that of images in bytes; None if a data set has images of floats only.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        layout: torch.memory_format,
        normalization: Normalization | None,
    ) -> None:
        self._device, self._dtype, self._layout = device, dtype, layout
        self._copies = _CopyStream(device) if device.type == "cuda" else None
        # Once for all batches: a constant of the host would be another copy in each.
        self._constants = None if normalization is None else normalization.constants(device)

    def batches(self, loader: DataLoader[Any]) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over a loader.

        Returns:
            Inputs ``[batch, *sample shape]`` and classes, int64 ``[batch]``, on the device.  No
            batch shares memory with another.

        Raises:
            ConfigError: see ``batches``.
        """
        for images, classes in batches(loader):
            images, classes = self._on_device((images, classes))
            yield self._inputs(images), classes

    def inputs(self, images: Tensor) -> Tensor:
        """The inputs for a batch of images, uint8 or float ``[batch, *sample shape]``."""
        (images,) = self._on_device((images,))
        return self._inputs(images)

    def _on_device(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        if self._copies is not None:
            return self._copies.copy(tensors)
        return [tensor.to(self._device) for tensor in tensors]

    def _inputs(self, images: Tensor) -> Tensor:
        if images.dtype == torch.uint8:
            assert self._constants is not None, "images in bytes need a normalization"
            mean, std = self._constants
            images = images.to(torch.float32).div_(255).sub_(mean).div_(std)
        return images.to(self._dtype).contiguous(memory_format=self._layout)


class _CopyStream:
    """Copies from pinned memory on a separate stream, while a GPU trains on the batch before.

    The host asks for the next batch as soon as it has enqueued the step on the newest one, which
    the GPU has then hardly begun.  In the training's own stream the copy would wait for the end of
    that step; in this stream it runs beside it.  Two orders make that safe:

    - ``wait_stream``: what the training's stream is given from now on, the pass on this batch,
      waits for the copy.  The host does not.
    - ``record_stream``: the memory belongs to the copying stream, whose allocator would hand it to
      the next copy as soon as the tensor is deleted on the host.  Now it first waits for what the
      training's stream has been given by then.

    Pinned memory of the host is kept by torch until the copy has read it.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors on the GPU, ready for the current stream."""
        with torch.cuda.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        for copied in copies:
            copied.record_stream(current)
        return copies
