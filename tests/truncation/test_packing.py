from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.nets import Flattening, Residual, Separable, Upsampling, random_images
from tests.oracles import live_flags
from worm_dist.search.tracing import find_groups
from worm_dist.truncation.packing import Packing
from worm_dist.truncation.plan import Block, Plan

SHAPES = [(4, 3, 3, 3), (6,), (5, 7), (1,), (1, 4), (4, 1), (1, 1, 1, 1), (8, 2, 3)]


def _block(shape: tuple[int, ...], live: dict[int, list[bool]]) -> Block:
    flags = {dim: torch.tensor(along) for dim, along in live.items()}
    return Block(
        torch.Size(shape),
        live={dim: along.nonzero().flatten() for dim, along in flags.items()},
        frozen={dim: (~along).nonzero().flatten() for dim, along in flags.items()},
    )


def _live_flags(shape: tuple[int, ...], live: dict[int, list[bool]]) -> Tensor:
    """bool, of the parameter's shape: the oracle."""
    flags = torch.ones(shape, dtype=torch.bool)
    for dim, along in live.items():
        view = [1] * len(shape)
        view[dim] = -1
        flags &= torch.tensor(along).view(view)
    return flags


class _Plan:
    def __init__(self, blocks: dict[Tensor, Block]) -> None:
        self.blocks = blocks


def _patterns(size: int) -> list[list[bool]]:
    return [
        [True] * size,
        [False] * size,
        [place % 2 == 0 for place in range(size)],
        [place != 0 for place in range(size)],
    ]


CASES = [
    (shape, dict(zip(dims, patterns)))
    for shape in SHAPES
    for dims in ((0,), (1,), (0, 1))
    if max(dims) < len(shape)
    for patterns in (
        [(pattern,) for pattern in _patterns(shape[dims[0]])]
        if len(dims) == 1
        else [(a, b) for a in _patterns(shape[0]) for b in _patterns(shape[1])]
    )
]


@pytest.mark.parametrize("together", [False, True], ids=["alone", "between whole ones"])
def test_live_elements_survive_the_round_trip_and_frozen_ones_become_zero(together: bool) -> None:
    for shape, live in CASES:
        parameter = nn.Parameter(torch.empty(shape))
        others = [nn.Parameter(torch.empty(3, 2)), nn.Parameter(torch.empty(5))]
        parameters = [others[0], parameter, others[1]] if together else [parameter]
        packing = Packing(
            parameters, _Plan({parameter: _block(shape, live)}), torch.float32, torch.device("cpu")
        )
        flags = _live_flags(shape, live)
        whole = sum(other.numel() for other in others) if together else 0
        assert packing.buffer.shape == (int(flags.sum()) + whole,), (shape, live)

        gradients = [torch.randn(p.shape) for p in parameters]
        # What a frozen channel's gradient holds must not matter.
        own = gradients[1 if together else 0]
        own[~flags] = float("nan")
        expected = [gradient.clone() for gradient in gradients]
        expected[1 if together else 0][~flags] = 0

        packing.pack(gradients)
        live_elements = torch.cat(
            [g[flags] if g is own else g.flatten() for g in gradients]
        )  # row by row, as a boolean mask takes them
        assert torch.equal(packing.buffer, live_elements), (shape, live)

        packing.buffer.mul_(2)
        packing.unpack(gradients)
        for got, want in zip(gradients, expected, strict=True):
            assert torch.equal(got, 2 * want), (shape, live)


def test_a_buffer_is_made_once_and_used_again() -> None:
    parameter = nn.Parameter(torch.empty(4, 3))
    plan = _Plan({parameter: _block((4, 3), {0: [True, False, True, True]})})
    packing = Packing([parameter], plan, torch.float32, torch.device("cpu"))
    place = packing.buffer.data_ptr()
    for _ in range(3):
        packing.pack([torch.randn(4, 3)])
    assert packing.buffer.data_ptr() == place


def test_strided_gradients_are_packed_by_their_indices() -> None:
    """Networks in channels_last have gradients whose memory is not in the order of their rows."""
    shape = (4, 6, 3, 3)
    parameter = nn.Parameter(torch.empty(shape))
    live = {0: [True, False, True, True], 1: [True, True, False, True, False, True]}
    packing = Packing(
        [parameter], _Plan({parameter: _block(shape, live)}), torch.float32, torch.device("cpu")
    )
    gradient = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    flags = _live_flags(shape, live)
    expected = gradient.masked_fill(~flags, 0)
    packing.pack([gradient])
    assert torch.equal(packing.buffer, gradient[flags])
    packing.unpack([gradient])
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("scope", ["norm", "producer", "coupled"])
@pytest.mark.parametrize("build", [Residual, Flattening, Separable, Upsampling])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_plan_counts_what_an_independent_walk_over_the_groups_counts(
    scope: str, build: type[nn.Module], share: float
) -> None:
    network = build()
    groups = find_groups(network, random_images(1))
    frozen = torch.rand(groups.num_channels) < share
    plan = Plan(network, groups, frozen, scope)  # type: ignore[arg-type]
    flags = live_flags(network, groups, frozen, scope)
    assert plan.num_elements == sum(p.numel() for p in network.parameters())
    assert plan.num_live == sum(int(f.sum()) for f in flags.values())
    for name, parameter in network.named_parameters():
        block = plan.blocks.get(parameter)
        assert (block is None) == bool(flags[name].all()), name
        if block is not None:
            assert block.num_live == int(flags[name].sum()), name


def test_parameters_that_do_not_train_are_in_no_plan() -> None:
    network = Residual()
    network.conv1.weight.requires_grad_(False)
    groups = find_groups(Residual(), random_images(1))
    plan = Plan(network, groups, torch.ones(groups.num_channels, dtype=torch.bool), "coupled")
    assert network.conv1.weight not in plan.blocks
    assert plan.num_elements == sum(p.numel() for p in network.parameters() if p.requires_grad)
