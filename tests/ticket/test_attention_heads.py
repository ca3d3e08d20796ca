"""A network without some of its heads computes what the whole one does where nothing reads them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models.swin_transformer import ShiftedWindowAttentionV2

from tests.attending import KINDS, built, inputs_of, without_heads
from worm_dist.groups.attention import Attention, find_attentions, weight_of
from worm_dist.pruning.attention_heads import FewerHeads, keep_heads

_CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}


def _alternating(attentions: list[Attention], first: int = 1) -> dict[str, Tensor]:
    """Keeps every other head of each attention."""
    kept = {}
    for attention in attentions:
        keep = torch.zeros(attention.num_heads, dtype=torch.bool)
        keep[first::2] = True
        kept[attention.module] = keep
    return kept


@torch.no_grad()
def _unread(network: nn.Module, kept: Mapping[str, Tensor]) -> nn.Module:
    """A copy that keeps all its heads, but reads only those that are kept."""
    silenced = copy.deepcopy(network)
    for attention in find_attentions(network)[0]:
        columns = attention.columns[~kept[attention.module]].flatten()
        silenced.get_parameter(weight_of(network, attention.reader))[:, columns] = 0
    return silenced


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _tensors(part)
    elif isinstance(output, tuple):
        for part in output:
            yield from _tensors(part)


def _outputs(network: nn.Module, inputs: tuple[Any, ...], **options: Any) -> list[Tensor]:
    """The network's outputs, then its gradient by every floating point input."""
    inputs = tuple(x.clone().requires_grad_(x.is_floating_point()) for x in inputs)
    network.zero_grad()
    outputs = list(_tensors(network(*inputs, **options)))
    sum(output.sin().sum() for output in outputs).backward()  # type: ignore[union-attr]
    return outputs + [x.grad for x in inputs if x.grad is not None]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_and_gradients_are_those_of_the_unread_heads(kind: str, training: bool) -> None:
    network = built(kind).train(training)
    attentions, dense = find_attentions(network)
    assert attentions and not dense
    kept = _alternating(attentions)
    silenced = _unread(network, kept)
    cut, places = without_heads(network, kept)
    # The weights of nn.MultiheadAttention are an average over the heads: another one with fewer.
    options = {"need_weights": False} if kind.startswith("attention") else {}
    expected = _outputs(silenced, inputs_of(kind), **options)
    outputs = _outputs(cut, inputs_of(kind), **options)
    for one, other in zip(outputs, expected, strict=True):
        torch.testing.assert_close(one, other, **_CLOSE)
    whole = dict(silenced.named_parameters())
    assert list(dict(cut.named_parameters())) == list(whole)
    for name, parameter in cut.named_parameters():
        gradient = whole[name].grad
        for dim, at in places.get(name, {}).items():
            gradient = None if gradient is None else gradient.index_select(dim, at)
        assert (gradient is None) == (parameter.grad is None), name
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, msg=name, **_CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_can_be_cut_again(kind: str) -> None:
    """In a network that is drawn already, heads lie where they lie in one built like that."""
    network = built(kind).eval()
    attentions, _ = find_attentions(network)
    at_once = {a.module: torch.arange(a.num_heads) == 2 for a in attentions}
    first = {a.module: torch.arange(a.num_heads) != 1 for a in attentions}
    then = {name: keep[first[name]] for name, keep in at_once.items()}
    once, _ = without_heads(network, at_once)
    twice, _ = without_heads(without_heads(network, first)[0], then)
    with torch.no_grad():
        expected = list(_tensors(once(*inputs_of(kind))))
        for one, other in zip(_tensors(twice(*inputs_of(kind))), expected, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", ["encoder", "Swin", "Swin v2"])
def test_what_is_cut_stays_a_plain_module(kind: str) -> None:
    network = built(kind).eval()
    cut, _ = without_heads(network, _alternating(find_attentions(network)[0]))
    assert list(cut.state_dict()) == list(network.state_dict())
    with torch.no_grad():
        expected = cut(*inputs_of(kind))
        for again in (copy.deepcopy(cut), pickle.loads(pickle.dumps(cut))):
            assert torch.equal(again(*inputs_of(kind)), expected)


@pytest.mark.parametrize(
    ("attention", "shape"),
    [
        (nn.MultiheadAttention(12, 3, batch_first=True), (2, 5, 12)),
        (ShiftedWindowAttentionV2(12, [3, 2], [1, 1], 3), (2, 7, 5, 12)),
    ],
)
def test_it_compiles_without_a_break(attention: nn.Module, shape: tuple[int, ...]) -> None:
    keep = torch.tensor([True, False, True])
    cut, _ = without_heads(nn.ModuleList([attention.double()]), {"0": keep})
    tokens = (_random(*shape),) * (3 if isinstance(attention, nn.MultiheadAttention) else 1)
    torch.compiler.reset()
    first = cut.get_submodule("0")
    compiled = torch.compile(first, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tokens), first(*tokens), **_CLOSE)


_HEADS, _BATCH, _TARGETS, _SOURCES = 3, 2, 4, 5
_FUTURE = torch.ones(_TARGETS, _SOURCES).triu(1).bool()

_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch first": {"batch_first": True},
    "more keys": {"add_bias_kv": True, "add_zero_attn": True},
    "of three": {"kdim": 7, "vdim": 5, "bias": False},
}


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def _hidden(*shape: int) -> Tensor:
    """True for a few, but never for all sources of a target."""
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return hidden


def _with_forward_of_ours(attention: nn.MultiheadAttention) -> nn.Module:
    """The same attention, all its heads there."""
    ours = copy.deepcopy(attention)
    keep_heads(ours, "", _HEADS)
    assert type(ours) is FewerHeads
    return ours


_MASKS: Mapping[str, Callable[[], dict[str, Any]]] = {
    "none": dict,
    "bool": lambda: {"attn_mask": _hidden(_TARGETS, _SOURCES)},
    "float": lambda: {"attn_mask": _random(_TARGETS, _SOURCES)},
    "by head": lambda: {"attn_mask": _hidden(_BATCH * _HEADS, _TARGETS, _SOURCES)},
    "padding": lambda: {"key_padding_mask": _hidden(_BATCH, _SOURCES)},
    "float padding": lambda: {"key_padding_mask": _random(_BATCH, _SOURCES)},
    "both": lambda: {
        "attn_mask": _random(_BATCH * _HEADS, _TARGETS, _SOURCES),
        "key_padding_mask": _random(_BATCH, _SOURCES),
    },
    "causal": lambda: {"attn_mask": _FUTURE, "is_causal": True},
    "causal and padding": lambda: {
        "attn_mask": _FUTURE,
        "is_causal": True,
        "key_padding_mask": _hidden(_BATCH, _SOURCES),
    },
}


def _attention(options: Mapping[str, Any]) -> tuple[nn.MultiheadAttention, list[Tensor]]:
    """With dropout, and its inputs."""
    attention = nn.MultiheadAttention(12, _HEADS, dropout=0.3, dtype=torch.float64, **options)
    widths = (12, options.get("kdim", 12), options.get("vdim", 12))
    inputs = [
        _random(_BATCH, length, width)
        for length, width in zip((_TARGETS, _SOURCES, _SOURCES), widths)
    ]
    if not options.get("batch_first"):
        inputs = [x.transpose(0, 1) for x in inputs]
    return attention, inputs


@pytest.mark.parametrize("masks", _MASKS)
@pytest.mark.parametrize("options", _OPTIONS)
def test_arguments_mean_what_they_mean_to_torch(options: str, masks: str) -> None:
    attention, inputs = _attention(_OPTIONS[options])
    ours = _with_forward_of_ours(attention)
    given = _MASKS[masks]()
    for training in (False, True):
        attention.train(training)
        ours.train(training)
        for weights in ({}, {"average_attn_weights": False}, {"need_weights": False}):
            torch.manual_seed(0)
            expected = attention(*inputs, **given, **weights)
            torch.manual_seed(0)
            output = ours(*inputs, **given, **weights)
            torch.testing.assert_close(output[0], expected[0], **_CLOSE)
            assert (output[1] is None) == (expected[1] is None)
            torch.testing.assert_close(output[1], expected[1], **_CLOSE)


@pytest.mark.parametrize("options", ["plain", "more keys", "of three"])
def test_a_single_sample_needs_no_batch(options: str) -> None:
    attention, inputs = _attention(_OPTIONS[options])
    ours = _with_forward_of_ours(attention.eval())
    single = [x[:, 0] for x in inputs]
    masks = {
        "attn_mask": _hidden(_HEADS, _TARGETS, _SOURCES),
        "key_padding_mask": _hidden(_SOURCES),
    }
    for weights in ({}, {"average_attn_weights": False}, {"need_weights": False}):
        expected = attention(*single, **masks, **weights)
        output = ours(*single, **masks, **weights)
        torch.testing.assert_close(output, expected, **_CLOSE)


def test_masks_that_do_not_fit_are_refused() -> None:
    """One that is broadcast instead would mean something that nobody said."""
    attention, inputs = _attention({})
    ours = _with_forward_of_ours(attention)
    with pytest.raises(RuntimeError, match=r"attn_mask is \[1, 5\], but must be \[4, 5\]"):
        ours(*inputs, attn_mask=_hidden(1, _SOURCES))
    with pytest.raises(RuntimeError, match="as 3 heads are left"):
        ours(*inputs, attn_mask=_hidden(_BATCH * 4, _TARGETS, _SOURCES))
    with pytest.raises(RuntimeError, match="key_padding_mask"):
        ours(*inputs, key_padding_mask=_hidden(1, _SOURCES))
    with pytest.raises(RuntimeError, match="give attn_mask too"):
        ours(*inputs, is_causal=True)


def test_padded_batches_without_gradients() -> None:
    """In eval mode nn.TransformerEncoder hands padded batches on as nested tensors, and its
    layers compute all at once from the attention's weights, when nothing keeps them from it."""
    network = built("encoder").eval()
    kept = _alternating(find_attentions(network)[0], first=0)
    cut, _ = without_heads(network, kept)
    (tokens,) = inputs_of("encoder")
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    padding[0, 3:] = True
    expected = _unread(network, kept)(tokens, src_key_padding_mask=padding)
    with torch.no_grad():
        output = cut(tokens, src_key_padding_mask=padding)
    torch.testing.assert_close(output[~padding], expected[~padding], **_CLOSE)
