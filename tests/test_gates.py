"""Gates change nothing while they are one, silence what they scale to zero, and fold into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD

from tests.attending import KINDS, built, inputs_of, without_heads
from tests.ranks import Ranks
from worm_dist.errors import ConfigError
from worm_dist.groups.attention import find_attentions
from worm_dist.groups.gates import absorb_gates, add_gates, fold_gates, gates_of, remove_gates

_WITH_NEURONS = [kind for kind in KINDS if not kind.startswith("attention")]


def _gated(kind: str, seed: int = 0) -> nn.Module:
    """In eval mode; its gates are as if they had been trained."""
    network = add_gates(built(kind)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, gate in gates_of(network):
            gate.scale.uniform_(0.3, 2, generator=generator)
    return network


def _outputs(network: nn.Module, kind: str, inputs: Any = None) -> list[Tensor]:
    with torch.no_grad():
        return list(_tensors(network(*(inputs or inputs_of(kind)))))


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (Mapping, tuple)):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _equal(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@contextmanager
def _layer_by_layer() -> Iterator[None]:
    """Without torch's computation of whole encoder layers at once."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("kind", KINDS)
def test_gates_of_one_change_nothing(kind: str) -> None:
    plain = built(kind).eval()
    gated = add_gates(copy.deepcopy(plain))
    heads = [attention.num_heads for attention in find_attentions(plain)[0]]
    sizes = [len(gate.scale) for _, gate in gates_of(gated)]
    assert [size for size in sizes if size in heads] == heads
    assert (len(sizes) > len(heads)) == (kind in _WITH_NEURONS)
    assert _equal(_outputs(gated, kind), _outputs(plain, kind))
    assert [a.module for a in find_attentions(gated)[0]] == [
        a.module for a in find_attentions(plain)[0]
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_folding_leaves_the_network_as_it_was_built(kind: str, dtype: torch.dtype) -> None:
    plain = built(kind)
    network = _gated(kind).to(dtype)
    inputs = tuple(x.to(dtype) if x.is_floating_point() else x for x in inputs_of(kind))
    expected = _outputs(network, kind, inputs)
    weights = {
        reader: network.get_parameter(f"{reader}.parametrizations.weight.original")
        for reader, _ in gates_of(network)
    }
    fold_gates(network)
    assert _equal(_outputs(network, kind, inputs), expected)
    assert all(network.get_parameter(f"{r}.weight") is weight for r, weight in weights.items())
    assert [(name, type(module)) for name, module in network.named_modules()] == [
        (name, type(module)) for name, module in plain.named_modules()
    ]
    # An optimizer's state is saved in the order of the parameters.
    assert [name for name, _ in network.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_gate_of_zero_is_a_head_that_is_gone(kind: str) -> None:
    network = _gated(kind)
    kept = {}
    for attention in find_attentions(network)[0]:
        keep = torch.arange(attention.num_heads) % 2 == 0
        kept[attention.module] = keep
        with torch.no_grad():
            dict(gates_of(network))[attention.reader].scale[~keep] = 0
    gone, _ = without_heads(network, kept)
    options = {"need_weights": False} if kind.startswith("attention") else {}
    with torch.no_grad():
        expected = list(_tensors(network(*inputs_of(kind), **options)))
        still_gated = list(_tensors(gone(*inputs_of(kind), **options)))
        fold_gates(gone)
        folded = list(_tensors(gone(*inputs_of(kind), **options)))
    torch.testing.assert_close(still_gated, expected, rtol=1e-9, atol=1e-9)
    assert _equal(folded, still_gated)


def test_a_gate_learns_how_much_its_columns_matter() -> None:
    network = _gated("encoder")
    (tokens,) = inputs_of("encoder")
    network(tokens).sin().sum().backward()
    for reader, gate in gates_of(network):
        weight = network.get_parameter(f"{reader}.parametrizations.weight.original")
        assert weight.grad is not None
        # d/dg of f(g * w) and d/dw differ by w and g; summed over the columns of the gate.
        by_factor = (weight.grad * weight).sum(0).view(len(gate.scale), -1).sum(1) / gate.scale
        torch.testing.assert_close(gate.scale.grad, by_factor, rtol=1e-9, atol=1e-9)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_computed_at_once_sees_the_gates(padded: bool) -> None:
    """In eval mode without gradients torch takes the layers' weights and calls no layer."""
    network = _gated("encoder")
    (tokens,) = inputs_of("encoder")
    padding = torch.zeros(tokens.shape[:2], dtype=torch.bool)
    padding[0, 3:] = padded
    called: list[nn.Module] = []

    def told(layer: nn.LayerNorm) -> Any:
        own = layer.forward

        def forward(input: Tensor) -> Tensor:
            called.append(layer)
            return own(input)

        return forward

    for layer in network.modules():
        if isinstance(layer, nn.LayerNorm):
            layer.forward = told(layer)  # type: ignore[method-assign]
    with torch.no_grad():
        at_once = network(tokens, src_key_padding_mask=padding if padded else None)
        assert not called
        with _layer_by_layer():
            expected = network(tokens, src_key_padding_mask=padding if padded else None)
        assert called
    torch.testing.assert_close(at_once[~padding], expected[~padding], rtol=1e-9, atol=1e-9)


def test_folding_a_copy_leaves_the_original_gated() -> None:
    """torch keeps the gated weight as a property of a class that copies of a layer share, and its
    own removal deletes it there: the layer that was copied then had no weight at all."""
    network = _gated("encoder")
    expected = _outputs(network, "encoder")
    twin = copy.deepcopy(network)
    fold_gates(twin)
    assert not gates_of(twin) and gates_of(network)
    assert _equal(_outputs(network, "encoder"), expected)
    assert _equal(_outputs(twin, "encoder"), expected)


def test_the_optimizer_goes_on_with_folded_weights() -> None:
    network = _gated("encoder").train()
    optimizer = SGD(network.parameters(), lr=0.1, momentum=0.9)
    network(*inputs_of("encoder")).sin().sum().backward()
    optimizer.step()
    reader = gates_of(network)[0][0]
    fold_gates(network)
    weight = network.get_parameter(f"{reader}.weight")
    momentum = optimizer.state[weight]["momentum_buffer"]
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    assert torch.equal(weight, before.add(momentum, alpha=-0.1))


def test_absorbing_and_removing_are_two_steps() -> None:
    network = _gated("encoder")
    expected = _outputs(network, "encoder")
    absorb_gates(network)
    assert all(bool((gate.scale == 1).all()) for _, gate in gates_of(network))
    assert _equal(_outputs(network, "encoder"), expected)
    remove_gates(network)
    assert not gates_of(network) and not any(map(parametrize.is_parametrized, network.modules()))
    assert _equal(_outputs(network, "encoder"), expected)
    assert gates_of(add_gates(network))


def test_a_state_dict_brings_the_gates_along() -> None:
    network, other = _gated("torchvision ViT", seed=1), _gated("torchvision ViT", seed=2)
    other.load_state_dict(network.state_dict())
    kind = "torchvision ViT"
    assert _equal(_outputs(other, kind), _outputs(network, kind))


def test_gated_networks_compile_without_a_break() -> None:
    network = _gated("encoder").train()
    (tokens,) = inputs_of("encoder")
    torch.compiler.reset()
    network(tokens).sin().sum().backward()
    expected = [gate.scale.grad for _, gate in gates_of(network)]
    network.zero_grad()
    torch.compile(network, backend="eager", fullgraph=True)(tokens).sin().sum().backward()
    for (_, gate), gradient in zip(gates_of(network), expected, strict=True):
        torch.testing.assert_close(gate.scale.grad, gradient, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("autocast", [False, True])
def test_gates_in_bf16(autocast: bool) -> None:
    kind, dtype = "torchvision ViT", torch.float32 if autocast else torch.bfloat16
    (exact,) = _outputs(_gated(kind), kind)
    network = _gated(kind).to(dtype)
    (images,) = inputs_of(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = network(images.to(dtype))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    coarse = 0.1 * float(exact.abs().max())
    torch.testing.assert_close(output.detach().double(), exact, rtol=0, atol=coarse)
    for _, gate in gates_of(network):
        assert gate.scale.grad is not None and gate.scale.grad.dtype == gate.scale.dtype


def _average_of_gradients() -> tuple[list[Tensor], list[Tensor]]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    network = _gated("encoder").train()
    mine = _gated("encoder").train()
    (tokens,) = inputs_of("encoder")
    for sample in range(world_size):
        (mine(tokens * (sample + 1)).sin().sum() / world_size).backward()
    wrapped = DistributedDataParallel(network)
    wrapped(tokens * (rank + 1)).sin().sum().backward()
    return (
        [gate.scale.grad for _, gate in gates_of(network) if gate.scale.grad is not None],
        [gate.scale.grad for _, gate in gates_of(mine) if gate.scale.grad is not None],
    )


def test_ddp_averages_gates_like_any_parameter(ranks: Ranks) -> None:
    for averaged, expected in ranks(2, _average_of_gradients):
        assert len(averaged) == 4
        torch.testing.assert_close(averaged, expected, rtol=1e-9, atol=1e-9)


def test_gates_are_added_once() -> None:
    network = add_gates(built("encoder"))
    with pytest.raises(ConfigError, match="it has gates already"):
        add_gates(network)


def test_a_network_without_anything_to_gate_says_so() -> None:
    with pytest.raises(ConfigError, match="no attention and no feed-forward layer"):
        add_gates(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))

    class OwnAttention(nn.MultiheadAttention):
        pass

    with pytest.raises(ConfigError, match=r"\n  0: OwnAttention: an unknown subclass"):
        add_gates(nn.Sequential(OwnAttention(4, 2)))


def test_what_others_compute_with_is_not_gated() -> None:
    attentions = [nn.MultiheadAttention(4, 2) for _ in range(4)]
    attentions[1].out_proj.weight = attentions[0].out_proj.weight
    parametrizations.weight_norm(attentions[2].out_proj)
    network = nn.ModuleList(attentions)
    add_gates(network)
    assert [reader for reader, _ in gates_of(network)] == ["3.out_proj"]


def test_another_parametrization_beside_a_gate_is_not_thrown_away() -> None:
    network = _gated("encoder")
    reader = gates_of(network)[0][0]
    parametrizations.spectral_norm(network.get_submodule(reader))
    with pytest.raises(ConfigError, match=f"{reader} has another parametrization beside"):
        fold_gates(network)
