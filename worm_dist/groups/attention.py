"""Attention: where the heads of attention modules lie.

Head h of an attention with heads of d numbers is, with ``W`` the rows that make queries, keys and
values and ``O`` the layer that reads all heads side by side

    head h = rows h*d .. (h+1)*d of W_q, W_k and W_v with their biases, and those columns of O

and whatever else a kind of attention holds for each head, such as a bias for relative positions.
Modules are known by the name of their class and by what they consist of, so no library has to be
there.  Of a known module every single parameter is accounted for, or it is left dense.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["Attention", "Slices", "find_attentions", "weight_of"]


class Slices(NamedTuple):
    """What one module holds for each head.

    Attributes:
        module: its name in the network.
        positions: int64 ``[heads, k]``: the places of each head along the dimension given.
        parameters: names in the network, each with the dimension along which it is sliced.
    """

    module: str
    positions: Tensor
    parameters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class Attention:
    """The heads of one attention module.

    Attributes:
        module: its name in the network.
        num_heads: how many heads.
        makers: all that makes the heads: rows of queries, keys and values and their biases, ...
        reader: name of the linear layer whose inputs are the heads.
        columns: int64 ``[heads, head_dim]``: the inputs of the reader that are each head's.
    """

    module: str
    num_heads: int
    makers: tuple[Slices, ...]
    reader: str
    columns: Tensor


def find_attentions(network: nn.Module) -> tuple[list[Attention], dict[str, str]]:
    """All attention modules of a network, in its order.

    Returns:
        Those whose heads are understood; and for every other module that by its name is an
        attention, why its heads are left dense.
    """
    found: list[Attention] = []
    dense: dict[str, str] = {}
    for name, module in network.named_modules():
        read = _reading_of(module)
        if read is not None:
            try:
                found.append(read(network, name, module))
            except _NotUnderstood as reason:
                dense[name] = f"{type(module).__name__}: {reason}"
    known = [attention.module for attention in found] + list(dense)
    for name, module in reversed(list(network.named_modules())):  # the inner ones first
        if _sounds_like_one(module) and not any(_nested(name, other) for other in known):
            dense[name] = f"{type(module).__name__}: not a kind of attention that is understood"
            known.append(name)
    return found, dense


def weight_of(network: nn.Module, linear: str) -> str:
    """The name of the parameter that a linear layer's weight, perhaps gated, is computed from."""
    parametrized = _join(linear, "parametrizations.weight.original")
    names = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    return parametrized if parametrized in names else _join(linear, "weight")


class _NotUnderstood(Exception):
    """Why the heads of a module are left dense."""


_Reading = Callable[[nn.Module, str, nn.Module], Attention]

_SEPARATE: Mapping[tuple[str, str, str], str | None] = {
    ("query", "key", "value"): None,
    ("q_proj", "k_proj", "v_proj"): "o_proj",
    ("q_lin", "k_lin", "v_lin"): "out_lin",
}
"""Layers that make queries, keys and values, and the one that reads the heads; None: it is the
``output.dense`` beside the module, as in BERT."""

_TORCH = ("MultiheadAttention", "FewerHeads")
_TORCHVISION = ("ShiftedWindowAttention", "ShiftedWindowAttentionV2")
_TORCHVISION_CUT = ("FewerWindowHeads", "FewerWindowHeadsV2")


def _reading_of(module: nn.Module) -> _Reading | None:
    kind = type(module).__name__
    if isinstance(module, nn.MultiheadAttention):
        return _read_torch if kind in _TORCH else _decline
    if kind in _TORCHVISION + _TORCHVISION_CUT:
        return _read_packed
    if not _sounds_like_one(module):
        return None
    children = dict(module.named_children())
    if {"qkv", "proj"} <= children.keys():
        return _read_packed
    if any(children.keys() >= set(makers) for makers in _SEPARATE):
        return _read_separate
    return None


def _decline(network: nn.Module, name: str, module: nn.Module) -> Attention:
    raise _NotUnderstood("a class of its own, derived from nn.MultiheadAttention")


def _read_torch(network: nn.Module, name: str, module: nn.Module) -> Attention:
    """nn.MultiheadAttention: all rows in one parameter, or in three but for the bias."""
    assert isinstance(module, nn.MultiheadAttention)
    heads, width = module.num_heads, module.num_heads * module.head_dim
    packed, single = _places(heads, 3 * width, parts=3), _places(heads, width)
    own = module._parameters
    if own.get("in_proj_weight") is not None:
        makers = [_slices(name, module, packed, {"in_proj_weight": 0, "in_proj_bias": 0})]
    else:
        weights = {"q_proj_weight": 0, "k_proj_weight": 0, "v_proj_weight": 0}
        makers = [_slices(name, module, single, weights)]
        if own.get("in_proj_bias") is not None:
            makers.append(_slices(name, module, packed, {"in_proj_bias": 0}))
    if own.get("bias_k") is not None:
        makers.append(_slices(name, module, single, {"bias_k": 2, "bias_v": 2}))
    return _attention(network, name, heads, makers, _join(name, "out_proj"))


def _read_packed(network: nn.Module, name: str, module: nn.Module) -> Attention:
    """timm's and torchvision's: one layer makes queries, keys and values."""
    heads = _num_heads(module)
    qkv = _linear(module, "qkv")
    makers = [
        _slices(
            _join(name, "qkv"),
            qkv,
            _places(heads, qkv.weight.shape[0], parts=3),
            {"weight": 0, "bias": 0},
        )
    ]
    own = module._parameters
    each = _places(heads, heads)
    if "relative_position_bias_table" in own:
        makers.append(_slices(name, module, each, {"relative_position_bias_table": 1}))
    if type(module).__name__ in (_TORCHVISION[1], _TORCHVISION_CUT[1]):
        makers.append(_slices(name, module, each, {"logit_scale": 0}))
        to_bias = module.get_submodule("cpb_mlp.2")
        makers.append(_slices(_join(name, "cpb_mlp.2"), to_bias, each, {"weight": 0}))
    return _attention(network, name, heads, makers, _join(name, "proj"))


def _read_separate(network: nn.Module, name: str, module: nn.Module) -> Attention:
    """Hugging Face's: a layer each for queries, keys and values."""
    heads = _num_heads(module)
    names = next(makers for makers in _SEPARATE if hasattr(module, makers[0]))
    layers = {child: _linear(module, child) for child in names}
    sizes = {layer.weight.shape[0] for layer in layers.values()}
    if len(sizes) > 1:
        raise _NotUnderstood("several heads share their keys and values")
    places = _places(heads, sizes.pop())
    makers = [
        _slices(_join(name, child), layer, places, {"weight": 0, "bias": 0})
        for child, layer in layers.items()
    ]
    inside = _SEPARATE[names]
    if inside is not None:
        reader = inside if hasattr(module, inside) else "out_proj"
        return _attention(network, name, heads, makers, _join(name, reader))
    beside = _join(name.rpartition(".")[0], "output.dense")
    return _attention(network, name, heads, makers, beside)


def _attention(
    network: nn.Module, name: str, heads: int, makers: list[Slices], reader: str
) -> Attention:
    """An attention all of whose parameters are accounted for."""
    parameters = dict(network.named_parameters(remove_duplicate=False))
    weight = parameters.get(weight_of(network, reader))
    if weight is None or not isinstance(network.get_submodule(reader), nn.Linear):
        raise _NotUnderstood(f"there is no linear layer {reader} to read its heads")
    rows = max(sliced.positions.numel() for sliced in makers)
    columns = _places(heads, weight.shape[1])
    if rows not in (weight.shape[1], 3 * weight.shape[1]):
        raise _NotUnderstood(f"{reader} does not read its heads side by side")
    inside = _join(name, "")
    accounted = {parameter for sliced in makers for parameter, _ in sliced.parameters}
    rest = {
        parameter.removeprefix(inside)
        for parameter, tensor in parameters.items()
        if parameter.startswith(inside)
        and parameter not in accounted
        and not parameter.startswith(reader + ".")
        and not _is_of_every_head(parameter.removeprefix(inside), tensor, columns.shape[1])
    }
    if rest:
        raise _NotUnderstood(f"what its {', '.join(sorted(rest))} is to each head is not known")
    return Attention(name, heads, tuple(makers), reader, columns)


def _is_of_every_head(parameter: str, tensor: Tensor, head_dim: int) -> bool:
    """A norm of queries or keys, or the hidden layer of Swin v2's network for positions."""
    norm = parameter.startswith(("q_norm.", "k_norm.")) and tensor.shape == (head_dim,)
    return norm or parameter.startswith("cpb_mlp.0.")


def _num_heads(module: nn.Module) -> int:
    for attribute in ("num_attention_heads", "num_heads", "n_heads"):
        heads = getattr(module, attribute, None)
        if isinstance(heads, int):
            return heads
    raise _NotUnderstood("it does not say how many heads it has")


def _places(heads: int, size: int, parts: int = 1) -> Tensor:
    """int64 ``[heads, size / heads]``: places of each head where every part has all heads."""
    if size % (heads * parts):
        raise _NotUnderstood(f"{size} rows are not made of {heads} equal heads")
    return torch.arange(size).view(parts, heads, -1).transpose(0, 1).reshape(heads, -1)


def _linear(module: nn.Module, child: str) -> nn.Linear:
    layer = getattr(module, child)
    if not isinstance(layer, nn.Linear) or "weight" not in layer._parameters:
        raise _NotUnderstood(f"its {child} is not a plain linear layer")
    return layer


def _slices(name: str, module: nn.Module, positions: Tensor, sliced: Mapping[str, int]) -> Slices:
    parameters = tuple(
        (_join(name, parameter), dim)
        for parameter, dim in sliced.items()
        if module._parameters.get(parameter) is not None
    )
    return Slices(name, positions, parameters)


def _sounds_like_one(module: nn.Module) -> bool:
    kind = type(module).__name__.lower()
    return ("attention" in kind or "attn" in kind) and any(True for _ in module.parameters())


def _nested(one: str, other: str) -> bool:
    """Whether one of two modules is within the other, or the other itself."""
    return _join(other, "").startswith(_join(one, "")) or _join(one, "").startswith(
        _join(other, "")
    )


def _join(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
