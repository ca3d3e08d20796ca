"""Attention heads: the parameter slices of each head in known attention modules.

With head dimension d, projections ``W_q``, ``W_k``, ``W_v`` and output projection ``O``:

    head h = rows h*d .. (h+1)*d of W_q, W_k and W_v with their biases, and those columns of O

plus any other per-head parameter, such as a relative position bias.  Modules are recognised by
class name and children, so the library that defines them need not be installed.  Every parameter of
a recognised module must be accounted for; otherwise the module stays dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Attention", "Slices", "find_attentions", "weight_of"]


class Slices(NamedTuple):
    """The per-head slices of one module.

    Attributes:
        module: the module's name in the network.
        positions: int64 ``[heads, k]``: the indices of each head along the sliced dimension.
        parameters: the sliced parameters: (name in the network, sliced dimension).
    """

    module: str
    positions: Tensor
    parameters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Attention:
    """The heads of one attention module.

    Attributes:
        module: the attention module's name in the network.
        num_heads: the number of heads.
        producers: the slices that compute the heads: rows of queries, keys and values, biases, ...
        reader: the name of the linear layer whose inputs are the heads (output projection).
        columns: int64 ``[heads, head_dim]``: the input columns of ``reader`` for each head.
    """

    module: str
    num_heads: int
    producers: tuple[Slices, ...]
    reader: str
    columns: Tensor


def find_attentions(network: nn.Module) -> tuple[list[Attention], dict[str, str]]:
    """Find the attention modules of a network, in network order.

    Returns:
        The supported attentions; and, by name, the reason why the heads of every other module
        with an attention-like class name stay dense.
    """
    found: list[Attention] = []
    dense: dict[str, str] = {}
    for name, module in network.named_modules():
        read = _reader_of(module)
        if read is not None:
            try:
                found.append(read(network, name, module))
            except _Unsupported as reason:
                dense[name] = f"{type(module).__name__}: {reason}"
    known = [attention.module for attention in found] + list(dense)
    for name, module in reversed(list(network.named_modules())):  # innermost first
        if _is_named_attention(module) and not any(_nested(name, other) for other in known):
            dense[name] = f"{type(module).__name__}: not a supported kind of attention"
            known.append(name)
    return found, dense


def weight_of(network: nn.Module, linear: str) -> str:
    """Return the name of the parameter that holds a linear layer's weight, gated or not."""
    parametrized = _join(linear, "parametrizations.weight.original")
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return parametrized if parametrized in names else _join(linear, "weight")


class _Unsupported(Exception):
    """An attention module whose heads stay dense, with the reason."""


_AttentionReader = Callable[[nn.Module, str, nn.Module], Attention]

_SEPARATE: Mapping[tuple[str, str, str], str | None] = {
    ("query", "key", "value"): None,
    ("q_proj", "k_proj", "v_proj"): "o_proj",
    ("q_lin", "k_lin", "v_lin"): "out_lin",
}
"""Child layers for queries, keys and values, and the output projection; None means that it is
``output.dense`` of the parent module, as in BERT."""

_TORCH = ("MultiheadAttention", "FewerHeads")
_TORCHVISION = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
_TORCHVISION_PRUNED = ("FewerWindowHeads", "FewerWindowHeadsV2")


def _reader_of(module: nn.Module) -> _AttentionReader | None:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return _read_torch if kind in _TORCH else _refuse_subclass
    if kind in _TORCHVISION + _TORCHVISION_PRUNED:
        return _read_packed
    if not _is_named_attention(module):
        return None
    children = dict(module.named_children())
    if {"qkv", "proj"} <= children.keys():
        return _read_packed
    if any(children.keys() >= set(producers) for producers in _SEPARATE):
        return _read_separate
    return None


def _refuse_subclass(network: nn.Module, name: str, module: nn.Module) -> Attention:
    raise _Unsupported("an unknown subclass of nn.MultiheadAttention")


def _read_torch(network: nn.Module, name: str, module: nn.Module) -> Attention:
    """Read nn.MultiheadAttention: one packed weight or three separate ones; the bias is packed."""
    assert isinstance(module, nn.MultiheadAttention)
    heads, width = module.num_heads, module.num_heads * module.head_dim
    packed, single = _head_indices(heads, 3 * width, parts=3), _head_indices(heads, width)
    parameters = module._parameters
    if parameters.get("in_proj_weight") is not None:
        producers = [_slices(name, module, packed, {"in_proj_weight": 0, "in_proj_bias": 0})]
    else:
        weights = {"q_proj_weight": 0, "k_proj_weight": 0, "v_proj_weight": 0}
        producers = [_slices(name, module, single, weights)]
        if parameters.get("in_proj_bias") is not None:
            producers.append(_slices(name, module, packed, {"in_proj_bias": 0}))
    if parameters.get("bias_k") is not None:
        producers.append(_slices(name, module, single, {"bias_k": 2, "bias_v": 2}))
    return _attention(network, name, heads, producers, _join(name, "out_proj"))


def _read_packed(network: nn.Module, name: str, module: nn.Module) -> Attention:
    """Read the attention of timm and torchvision: one linear layer ``qkv``."""
    heads = _num_heads(module)
    qkv = _linear(module, "qkv")
    producers = [
        _slices(
            _join(name, "qkv"),
            qkv,
            _head_indices(heads, qkv.weight.shape[0], parts=3),
            {"weight": 0, "bias": 0},
        )
    ]
    parameters = module._parameters
    each = _head_indices(heads, heads)
    if "relative_position_bias_table" in parameters:
        producers.append(_slices(name, module, each, {"relative_position_bias_table": 1}))
    if type(module).__name__ in (_TORCHVISION[1], _TORCHVISION_PRUNED[1]):
        producers.append(_slices(name, module, each, {"logit_scale": 0}))
        to_bias = module.get_submodule("cpb_mlp.2")
        producers.append(_slices(_join(name, "cpb_mlp.2"), to_bias, each, {"weight": 0}))
    return _attention(network, name, heads, producers, _join(name, "proj"))


def _read_separate(network: nn.Module, name: str, module: nn.Module) -> Attention:
    """Read the attention of Hugging Face: separate linear layers for queries, keys and values."""
    heads = _num_heads(module)
    names = next(producers for producers in _SEPARATE if hasattr(module, producers[0]))
    layers = {child: _linear(module, child) for child in names}
    sizes = {layer.weight.shape[0] for layer in layers.values()}
    if len(sizes) > 1:
        raise _Unsupported("several heads share their keys and values")
    indices = _head_indices(heads, sizes.pop())
    producers = [
        _slices(_join(name, child), layer, indices, {"weight": 0, "bias": 0})
        for child, layer in layers.items()
    ]
    inside = _SEPARATE[names]
    if inside is not None:
        reader = inside if hasattr(module, inside) else "out_proj"
        return _attention(network, name, heads, producers, _join(name, reader))
    beside = _join(name.rpartition(".")[0], "output.dense")
    return _attention(network, name, heads, producers, beside)


def _attention(
    network: nn.Module, name: str, heads: int, producers: list[Slices], reader: str
) -> Attention:
    """Build the ``Attention`` after checking that all its parameters are accounted for."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    weight = parameters.get(weight_of(network, reader))
    if weight is None or not isinstance(network.get_submodule(reader), nn.Linear):
        raise _Unsupported(f"there is no linear layer {reader} to read its heads")
    rows = max(sliced.positions.numel() for sliced in producers)
    columns = _head_indices(heads, weight.shape[1])
    if rows not in (weight.shape[1], 3 * weight.shape[1]):
        raise _Unsupported(f"{reader} does not read its heads side by side")
    inside = _join(name, "")
    accounted = {parameter for sliced in producers for parameter, _ in sliced.parameters}
    rest = {
        parameter.removeprefix(inside)
        for parameter, tensor in parameters.items()
        if parameter.startswith(inside)
        and parameter not in accounted
        and not parameter.startswith(reader + ".")
        and not _is_shared_by_heads(parameter.removeprefix(inside), tensor, columns.shape[1])
    }
    if rest:
        raise _Unsupported(f"its parameters {', '.join(sorted(rest))} cannot be assigned to heads")
    return Attention(name, heads, tuple(producers), reader, columns)


def _is_shared_by_heads(parameter: str, tensor: Tensor, head_dim: int) -> bool:
    """Whether all heads use the parameter: a norm of queries or keys, or Swin v2's position MLP."""
    norm = parameter.startswith(("q_norm.", "k_norm.")) and tensor.shape == (head_dim,)
    return norm or parameter.startswith("cpb_mlp.0.")


def _num_heads(module: nn.Module) -> int:
    for attribute in ("num_attention_heads", "num_heads", "n_heads"):
        heads = getattr(module, attribute, None)
        if isinstance(heads, int):
            return heads
    raise _Unsupported("it has no attribute num_heads, num_attention_heads or n_heads")


def _head_indices(heads: int, size: int, parts: int = 1) -> Tensor:
    """Return the indices of each head, int64 ``[heads, size / heads]``.

    Args:
        heads: the number of heads.
        size: the size of the sliced dimension.
        parts: the number of equal parts side by side (3 for packed qkv), each with all heads.
    """
    if size % (heads * parts):
        raise _Unsupported(f"{size} rows are not made of {heads} equal heads")
    return torch.arange(size).view(parts, heads, -1).transpose(0, 1).reshape(heads, -1)


def _linear(module: nn.Module, child: str) -> nn.Linear:
    layer = getattr(module, child)
    if not isinstance(layer, nn.Linear) or "weight" not in layer._parameters:
        raise _Unsupported(f"its {child} is not a plain linear layer")
    return layer


def _slices(name: str, module: nn.Module, positions: Tensor, sliced: Mapping[str, int]) -> Slices:
    parameters = tuple(
        (_join(name, parameter), dim)
        for parameter, dim in sliced.items()
        if module._parameters.get(parameter) is not None
    )
    return Slices(name, positions, parameters)


def _is_named_attention(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return ("attention" in kind or "attn" in kind) and any(True for _ in module.parameters())


def _nested(one: str, other: str) -> bool:
    """Whether two module names are equal or one contains the other."""
    return _join(other, "").startswith(_join(one, "")) or _join(one, "").startswith(
        _join(other, "")
    )


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
