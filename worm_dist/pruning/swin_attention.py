"""Swin attention: torchvision's shifted window attention (v1 and v2) with fewer heads.

The same computation as ``torchvision.models.swin_transformer.shifted_window_attention``, except
that the head dimension is not the input width divided by the number of heads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.swin_transformer import ShiftedWindowAttention, ShiftedWindowAttentionV2

__all__ = ["WITH_FEWER_HEADS", "FewerWindowHeads", "FewerWindowHeadsV2"]


def _forward(module: ShiftedWindowAttention, images: Tensor) -> Tensor:
    """Compute the attention of images ``[N, H, W, C]``; the result has the same shape."""
    height, width = images.shape[1:3]
    down, right = module.window_size
    padded = F.pad(images, (0, 0, 0, -width % right, 0, -height % down))
    size = padded.shape[1:3]
    # A window that covers the whole image is not shifted.
    shift = [
        0 if window >= whole else step
        for step, window, whole in zip(module.shift_size, module.window_size, size)
    ]
    shifted = torch.roll(padded, (-shift[0], -shift[1]), dims=(1, 2)) if any(shift) else padded
    windows = shifted.unflatten(2, (-1, right)).unflatten(1, (-1, down)).transpose(2, 3)
    outer = windows.shape[:3]  # N, windows down, windows across
    mask = _shift_mask(images, size, module.window_size, shift) if any(shift) else None
    tokens = _attend(module, windows.flatten(3, 4).flatten(0, 2), mask)
    tokens = F.dropout(tokens, module.dropout, module.training)
    merged = tokens.unflatten(1, (down, right)).unflatten(0, outer).transpose(2, 3)
    output = merged.flatten(3, 4).flatten(1, 2)
    if any(shift):
        output = torch.roll(output, (shift[0], shift[1]), dims=(1, 2))
    unpadded: Tensor = output[:, :height, :width].contiguous()
    return unpadded


def _attend(module: ShiftedWindowAttention, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Compute the attention within windows.

    Args:
        module: the attention module.
        tokens: the inputs ``[N * windows, tokens, C]``; the result has the same shape.
        mask: ``[windows, tokens, tokens]``, added to the logits.
    """
    bias = module.qkv.bias
    scale = getattr(module, "logit_scale", None)
    if scale is not None and bias is not None:
        # In v2 keys have no bias: that part of the parameter is ignored.
        queries, keys, values = bias.chunk(3)
        bias = torch.cat([queries, torch.zeros_like(keys), values])
    qkv = F.linear(tokens, module.qkv.weight, bias)
    q, k, v = qkv.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    if scale is None:
        logits = q * q.shape[-1] ** -0.5 @ k.transpose(2, 3)
    else:
        logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(2, 3)
        logits = logits * scale.clamp(max=math.log(100.0)).exp()
    logits = logits + module.get_relative_position_bias()
    if mask is not None:
        logits = (logits.unflatten(0, (-1, len(mask))) + mask.unsqueeze(1)).flatten(0, 1)
    weights = F.dropout(logits.softmax(dim=-1), module.attention_dropout, module.training)
    output: Tensor = module.proj((weights @ v).transpose(1, 2).flatten(2))
    return output


def _shift_mask(like: Tensor, size: torch.Size, window: list[int], shift: list[int]) -> Tensor:
    """Build the mask with -100 between tokens that share a window only because of the shift.

    Returns:
        The mask ``[windows, tokens, tokens]``, with the dtype and device of ``like``.
    """
    region = like.new_zeros(tuple(size))
    for dim in (0, 1):
        index = torch.arange(size[dim], device=like.device)
        rolled_in = (index >= size[dim] - shift[dim]).to(like.dtype)
        band = rolled_in + (index >= size[dim] - window[dim]).to(like.dtype)
        region = region * 3 + (band.unsqueeze(1) if dim == 0 else band)
    windows = region.unflatten(1, (-1, window[1])).unflatten(0, (-1, window[0])).transpose(1, 2)
    of_token = windows.flatten(2).flatten(0, 1)
    apart = of_token.unsqueeze(1) != of_token.unsqueeze(2)
    return torch.zeros_like(apart, dtype=like.dtype).masked_fill(apart, -100.0)


class FewerWindowHeads(ShiftedWindowAttention):  # type: ignore[misc]
    """The attention of Swin v1 with fewer heads."""

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)


class FewerWindowHeadsV2(ShiftedWindowAttentionV2):  # type: ignore[misc]
    """The attention of Swin v2 with fewer heads: cosine logits, a scale per head, position MLP."""

    def forward(self, x: Tensor) -> Tensor:
        return _forward(self, x)


WITH_FEWER_HEADS: Mapping[type[nn.Module], type[nn.Module]] = {
    ShiftedWindowAttention: FewerWindowHeads,
    ShiftedWindowAttentionV2: FewerWindowHeadsV2,
}
