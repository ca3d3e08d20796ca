"""Attention heads: attention modules with fewer heads than they were built with.

nn.MultiheadAttention and torchvision's windowed attention derive the head dimension from the input
width, which is wrong after heads are removed.  So the class of these modules is replaced by one
with its own forward; parameters and their names are unchanged.  For other modules only the number
of heads is set.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .swin_attention import WITH_FEWER_HEADS

__all__ = ["FewerHeads", "keep_heads"]

_COUNTS = ("num_heads", "num_attention_heads", "n_heads")
_WIDTHS = ("attn_dim", "kv_dim", "all_head_size")


def keep_heads(network: nn.Module, attention: str, num_heads: int) -> None:
    """Adapt an attention module after the parameters of some heads have been removed.

    Linear layers and their size attributes are not changed.

    Args:
        network: the network that contains the attention; modified in place.
        attention: the name of a module that ``find_attentions`` finds.
        num_heads: the number of remaining heads, at least one.
    """
    assert num_heads > 0, attention
    module = network.get_submodule(attention)
    if isinstance(module, nn.MultiheadAttention):
        module.__class__ = FewerHeads
        # Keeps nn.TransformerEncoderLayer from computing the attention in its fast path.
        module._qkv_same_embed_dim = False
        _disable_nested_tensors(network, attention)
    elif type(module) in WITH_FEWER_HEADS:
        module.__class__ = WITH_FEWER_HEADS[type(module)]
    count = next(name for name in _COUNTS if hasattr(module, name))
    for width in _WIDTHS:
        if hasattr(module, width):
            setattr(module, width, getattr(module, width) // getattr(module, count) * num_heads)
    setattr(module, count, num_heads)


def _disable_nested_tensors(network: nn.Module, attention: str) -> None:
    """Disable nested tensors in all enclosing nn.TransformerEncoder modules.

    They pass padded batches on as nested tensors, which only their own fast path supports.
    """
    for name, module in network.named_modules():
        within = not name or attention.startswith(f"{name}.")
        if within and isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False


class FewerHeads(nn.MultiheadAttention):
    """nn.MultiheadAttention with ``num_heads * head_dim`` smaller than ``embed_dim``.

    Arguments and results are those of nn.MultiheadAttention; masks ``[N * num_heads, L, S]`` and
    per-head attention weights refer to the remaining heads.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask, so give attn_mask too")
        batched = query.dim() == 3
        additive = _additive_mask(attn_mask, query.dtype)
        padding = _additive_mask(key_padding_mask, query.dtype)
        self._check_mask_shapes(query, key, additive, padding)
        q, k, v = self._project(query, key, value)
        if not batched:
            q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
        elif not self.batch_first:
            q, k, v = q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(len(k), -1, -1)], dim=1)
            v = torch.cat([v, self.bias_v.expand(len(v), -1, -1)], dim=1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        # The causal hint of scaled_dot_product_attention excludes any other mask.
        uses_causal_hint = is_causal and padding is None and not need_weights
        mask = None if uses_causal_hint else self._mask(additive, padding)
        q, k, v = (x.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = q * (1 / math.sqrt(self.head_dim)) @ k.transpose(2, 3)
            weights = (weights if mask is None else weights + mask).softmax(dim=3)
            weights = F.dropout(weights, dropout)
            heads = weights @ v
            weights = weights.mean(dim=1) if average_attn_weights else weights
        else:
            heads = F.scaled_dot_product_attention(q, k, v, mask, dropout, uses_causal_hint)
        targets_first = batched and not self.batch_first
        side_by_side = heads.permute((2, 0, 1, 3) if targets_first else (0, 2, 1, 3)).flatten(2)
        # The kernel for non-contiguous inputs would depend on whether gradients are required.
        output = self.out_proj(side_by_side.contiguous())
        if not batched:
            return output.squeeze(0), None if weights is None else weights.squeeze(0)
        return output, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values of all heads, in the layout of the inputs."""
        bias = self.in_proj_bias
        if self.in_proj_weight is not None and query is key and key is value:
            return F.linear(query, self.in_proj_weight, bias).chunk(3, dim=-1)
        if self.in_proj_weight is not None:
            rows = self.in_proj_weight.chunk(3)
        else:
            rows = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None, None, None) if bias is None else bias.chunk(3)
        inputs = (query, key, value)
        return tuple(F.linear(x, w, b) for x, w, b in zip(inputs, rows, biases))

    def _check_mask_shapes(
        self, query: Tensor, key: Tensor, attn_mask: Tensor | None, padding: Tensor | None
    ) -> None:
        """Raise RuntimeError if a mask has a wrong shape, which might be broadcast silently."""
        in_order = self.batch_first or query.dim() == 2
        samples = 1 if query.dim() == 2 else query.shape[0 if in_order else 1]
        targets, sources = (x.shape[-2 if in_order else 0] for x in (query, key))
        fitting = ((targets, sources), (samples * self.num_heads, targets, sources))
        if attn_mask is not None and tuple(attn_mask.shape) not in fitting:
            raise RuntimeError(
                f"attn_mask is {list(attn_mask.shape)}, but must be {list(fitting[0])} or, as "
                f"{self.num_heads} heads are left, {list(fitting[1])}"
            )
        if padding is not None and padding.numel() != samples * sources:
            raise RuntimeError(
                f"key_padding_mask is {list(padding.shape)}, but must be {[samples, sources]}"
            )

    def _mask(self, additive: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """Combine the additive masks, broadcastable to ``[N, num_heads, targets, sources]``."""
        if additive is not None and additive.dim() == 3:
            additive = additive.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            padding = padding.view(-1, 1, 1, padding.shape[-1])
        masks = [mask for mask in (additive, padding) if mask is not None]
        if not masks:
            return None
        mask = masks[0] if len(masks) == 1 else masks[0] + masks[1]
        more = (self.bias_k is not None) + self.add_zero_attn
        return F.pad(mask, (0, more)) if more else mask  # every query may attend to these


def _additive_mask(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Convert a bool mask, True = do not attend, to a float mask that is added to the logits."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -math.inf)
