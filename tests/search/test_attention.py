"""Where heads lie, and what is said of attention that is not understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torchvision.models.swin_transformer import ShiftedWindowAttention

from tests.attending import KINDS, built
from worm_dist.groups.attention import find_attentions, weight_of
from worm_dist.groups.tracing import find_groups
from worm_dist.models.vit import vit_small


@pytest.mark.parametrize("kind", KINDS)
def test_heads_are_slices_of_parameters_that_exist(kind: str) -> None:
    network = built(kind)
    parameters = dict(network.named_parameters())
    attentions, dense = find_attentions(network)
    assert attentions and not dense
    for attention in attentions:
        weight = parameters[weight_of(network, attention.reader)]
        assert attention.columns.flatten().tolist() == list(range(weight.shape[1]))
        for module, positions, sliced in attention.producers:
            network.get_submodule(module)
            assert positions.dtype == torch.int64 and len(positions) == attention.num_heads
            assert sliced
            for name, dim in sliced:
                # Every place belongs to exactly one head.
                places = positions.flatten().sort().values
                assert places.tolist() == list(range(parameters[name].shape[dim]))


def test_a_head_of_packed_rows() -> None:
    attention = nn.MultiheadAttention(4, 2)
    ((found,), _) = find_attentions(attention)
    ((module, positions, parameters),) = found.producers
    assert (found.module, found.num_heads, found.reader) == ("", 2, "out_proj")
    assert found.columns.tolist() == [[0, 1], [2, 3]]
    assert positions.tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10, 11]]
    assert (module, parameters) == ("", (("in_proj_weight", 0), ("in_proj_bias", 0)))


def test_a_head_of_a_window_has_a_column_of_the_table() -> None:
    network = nn.Sequential(ShiftedWindowAttention(4, [2, 2], [0, 0], 2, qkv_bias=False))
    ((found,), _) = find_attentions(network)
    rows, table = found.producers
    assert rows.module == "0.qkv" and rows.parameters == (("0.qkv.weight", 0),)
    assert table.module == "0" and table.parameters == (("0.relative_position_bias_table", 1),)
    assert table.positions.tolist() == [[0], [1]]


class OwnAttention(nn.MultiheadAttention):
    pass


class SelfAttention(nn.Module):
    """Of a kind that somebody might write."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        self.num_heads = 2
        for name, layer in layers.items():
            self.add_module(name, layer)


def _separate(keys: int = 4, reads: int = 4, **more: nn.Module) -> nn.Module:
    return SelfAttention(
        q_proj=nn.Linear(6, 4),
        k_proj=nn.Linear(6, keys),
        v_proj=nn.Linear(6, keys),
        o_proj=nn.Linear(reads, 6),
        **more,
    )


def _normed() -> nn.Module:
    linear: Any = parametrizations.weight_norm(nn.Linear(6, 12))
    return SelfAttention(qkv=linear, proj=nn.Linear(4, 6))


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (OwnAttention(4, 2), "OwnAttention: an unknown subclass of nn.MultiheadAtt"),
        (SelfAttention(mix=nn.Linear(4, 4)), "SelfAttention: not a supported kind of attention"),
        (_separate(keys=2), "several heads share their keys and values"),
        (_separate(reads=8), "at.o_proj does not read its heads side by side"),
        (
            _separate(talk=nn.Linear(2, 2)),
            "its parameters talk.bias, talk.weight cannot be assigned",
        ),
        (_separate(q_norm=nn.LayerNorm(4)), "its parameters q_norm.bias, q_norm.weight cannot"),
        (_normed(), "its qkv is not a plain linear layer"),
        (SelfAttention(qkv=nn.Linear(6, 15), proj=nn.Linear(5, 6)), "15 rows are not made of 2"),
        (
            SelfAttention(query=nn.Linear(6, 4), key=nn.Linear(6, 4), value=nn.Linear(6, 4)),
            "there is no linear layer output.dense to read its heads",
        ),
    ],
)
def test_what_is_not_understood_is_left_dense(attention: nn.Module, reason: str) -> None:
    found, dense = find_attentions(nn.ModuleDict({"at": attention}))
    assert not found and list(dense) == ["at"]
    assert reason in dense["at"]


def test_a_norm_that_all_heads_share_is_no_obstacle() -> None:
    found, dense = find_attentions(_separate(q_norm=nn.LayerNorm(2)))
    assert len(found) == 1 and not dense


def test_of_unknown_attention_the_innermost_is_named() -> None:
    inner = SelfAttention(mix=nn.Linear(4, 4))
    found, dense = find_attentions(nn.Sequential(SelfAttention(inner=inner, dense=nn.Linear(4, 4))))
    assert not found and list(dense) == ["0.inner"]


def test_a_single_head_is_left_dense() -> None:
    """A transformer whose attention was pruned to one head could not be attached again: the trial
    of its groups dropped the head."""
    network = vit_small(10, 1, image_size=8, patch_size=4, num_heads=1, hidden_dim=8, mlp_dim=16)
    groups = find_groups(network, torch.randn(1, 1, 8, 8))
    attention = "encoder.layers.encoder_layer_0.self_attention"
    assert attention not in groups.sizes
    assert groups.dense[attention] == "none of its channels can be dropped without all others"
