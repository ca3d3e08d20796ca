from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

from tests.gradients import gradient
from tests.nets import Flattening, Residual, Separable, Upsampling, random_images
from tests.operations import num_operations
from tests.oracles import live_flags, mask_dropping, zero_frozen
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import WormConfig, attach
from worm_dist.comm_hooks import packing as packing_module
from worm_dist.comm_hooks.packing import Packing
from worm_dist.groups.freeze_plan import Block, FreezePlan
from worm_dist.pruning.exactness import find_drawable_groups as find_groups

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


def _bucket(gradients: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """A bucket with copies of these gradients, and its views, which keep their strides."""
    bucket = torch.empty(sum(gradient.numel() for gradient in gradients))
    views, offset = [], 0
    for tensor in gradients:
        views.append(bucket.as_strided(tensor.shape, tensor.stride(), offset).copy_(tensor))
        offset += tensor.numel()
    return bucket, views


def _packing(blocks: list[Block | None], shapes: list[tuple[int, ...]]) -> Packing:
    bucket, gradients = _bucket([torch.empty(shape) for shape in shapes])
    return Packing(blocks, gradients, bucket)


# Of a CPU's own choice; all by one index, as on accelerators; all by rows and columns, as small or
# as large gradients.
WAYS = {
    "chosen": {},
    "index": {"_SHORT_ROW": 2**62},
    "rows": {"LARGE": 0},
    "large rows": {"LARGE": 0, "_TOO_LARGE_TO_WRITE_TWICE": 0},
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in WAYS[request.param].items():
        monkeypatch.setattr(packing_module, name, value)


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
def test_live_elements_survive_the_round_trip_and_frozen_ones_become_zero(
    together: bool, way: None
) -> None:
    for shape, live in CASES:
        shapes = [(3, 2), shape, (5,)] if together else [shape]
        own = 1 if together else 0
        packing = _packing(
            [_block(shape, live) if n == own else None for n in range(len(shapes))], shapes
        )
        flags = _live_flags(shape, live)
        whole = 11 if together else 0
        assert packing.buffer.shape == (int(flags.sum()) + whole,), (shape, live)

        bucket, gradients = _bucket([torch.randn(shape) for shape in shapes])
        # What a frozen channel's gradient holds must not matter.
        gradients[own][~flags] = float("nan")
        expected = [gradient.clone() for gradient in gradients]
        expected[own][~flags] = 0

        packing.pack(bucket)
        live_elements = torch.cat(
            [g[flags] if n == own else g.flatten() for n, g in enumerate(gradients)]
        )  # row by row, as a boolean mask takes them
        assert torch.equal(packing.buffer, live_elements), (shape, live)

        packing.buffer.mul_(2)
        packing.unpack(bucket)
        for got, want in zip(gradients, expected, strict=True):
            assert torch.equal(got, 2 * want), (shape, live)


def test_live_elements_keep_the_order_of_the_bucket(way: None) -> None:
    """Vectors, whole gradients, rows and blocks are copied in different ways; still a ring of ranks
    must add them as it would without truncation."""
    torch.manual_seed(1)
    shapes = [(6,), (8, 2, 9), (5, 7), (3, 70), (7,), (4, 6, 3, 3)]
    blocks: list[Block | None] = [
        _block(shapes[0], {0: [True, False] * 3}),
        _block(shapes[1], {0: [False, True] * 4}),
        None,
        _block(shapes[3], {0: [True, False, True]}),
        None,
        _block(shapes[5], {0: [True, False, False, True], 1: [True, True, False] * 2}),
    ]
    bucket, gradients = _bucket([torch.randn(shape) for shape in shapes])
    packing = Packing(blocks, gradients, bucket)
    packing.pack(bucket)
    live = torch.cat(
        [
            gradient.flatten() if block is None else gradient[_live_flags(shape, _flags(block))]
            for gradient, block, shape in zip(gradients, blocks, shapes, strict=True)
        ]
    )
    assert torch.equal(packing.buffer, live)
    before = bucket.clone()
    packing.unpack(bucket)
    assert torch.equal(bucket[bucket != 0], before[bucket != 0])
    assert int((bucket != 0).sum()) == packing.num_live


def _flags(block: Block) -> dict[int, list[bool]]:
    return {
        dim: torch.zeros(block.shape[dim], dtype=torch.bool).index_fill_(0, live, True).tolist()
        for dim, live in block.live.items()
    }


def test_a_buffer_is_made_once_and_used_again() -> None:
    packing = _packing([_block((4, 3), {0: [True, False, True, True]})], [(4, 3)])
    place = packing.buffer.data_ptr()
    for _ in range(3):
        packing.pack(torch.randn(12))
    assert packing.buffer.data_ptr() == place


def _flags_of_half(size: int) -> list[bool]:
    return [place % 2 == 0 for place in range(size)]


@pytest.mark.parametrize(
    ("shapes", "pack", "unpack"),
    [
        # One gather and one scatter, after one fill, for all small gradients of a bucket.
        ([(16,)] * 5 + [(16, 3, 3, 3)] * 5 + [(64, 16, 3, 3)] * 3, 1, 2),
        # A large gradient of whole rows is copied alone.
        ([(16,), (64, 128, 3, 3), (16,), (16, 64)], 3, 4),
    ],
)
def test_operations_of_a_bucket(shapes: list[tuple[int, ...]], pack: int, unpack: int) -> None:
    """They do not grow with the number of small gradients, whatever their shapes."""
    blocks = [_block(shape, {0: _flags_of_half(shape[0])}) for shape in shapes]
    bucket, gradients = _bucket([torch.randn(shape) for shape in shapes])
    packing = Packing(blocks, gradients, bucket)
    packing.pack(bucket)
    assert num_operations(lambda: packing.pack(bucket)) == pack
    assert num_operations(lambda: packing.unpack(bucket)) == unpack


def test_operations_of_a_block_of_rows_and_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing_module, "LARGE", 0)
    shape = (8, 6, 3, 3)
    block = _block(shape, {dim: _flags_of_half(shape[dim]) for dim in (0, 1)})
    bucket, gradients = _bucket([torch.randn(shape)])
    packing = Packing([block], gradients, bucket)
    packing.pack(bucket)
    packing.unpack(bucket)
    assert num_operations(lambda: packing.pack(bucket)) == 2
    assert num_operations(lambda: packing.unpack(bucket)) == 4


def test_strided_gradients_are_packed_by_their_indices(way: None) -> None:
    """Networks in channels_last have gradients whose memory is not in the order of their rows."""
    shape = (4, 6, 3, 3)
    live = {0: [True, False, True, True], 1: [True, True, False, True, False, True]}
    strided = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    bucket, (whole, gradient) = _bucket([torch.randn(2, 3), strided])
    packing = Packing([None, _block(shape, live)], [whole, gradient], bucket)
    flags = _live_flags(shape, live)
    expected = gradient.masked_fill(~flags, 0)
    packing.pack(bucket)
    assert torch.equal(packing.parts[1].flatten(), gradient[flags])
    packing.unpack(bucket)
    assert torch.equal(gradient, expected)


def test_another_buffer_lies_as_the_own_one_does() -> None:
    """What is remembered of live elements is packed and unpacked as they are."""
    shape = torch.Size([4, 3])
    live = {0: [True, False, True, True], 1: [False, True, True]}
    bucket, gradients = _bucket([torch.randn(2), torch.randn(shape)])
    packing = Packing([None, _block(shape, live)], gradients, bucket)
    own, other = packing.buffer.zero_(), torch.empty_like(packing.buffer)
    packing.pack(bucket, other)
    whole, part = packing.parts_of(other)
    assert torch.equal(whole, gradients[0])
    assert torch.equal(part.flatten(), gradients[1][_live_flags(shape, live)])
    assert not own.any()
    packing.unpack(bucket, own)
    assert not bucket.any()


@pytest.mark.parametrize("scope", ["norm", "producer", "coupled"])
@pytest.mark.parametrize("build", [Residual, Flattening, Separable, Upsampling])
@pytest.mark.parametrize("share", [0.0, 0.4, 1.0])
def test_plan_counts_what_an_independent_walk_over_the_groups_counts(
    scope: str, build: type[nn.Module], share: float
) -> None:
    network = build()
    groups = find_groups(network, random_images(1))
    frozen = torch.rand(groups.num_channels) < share
    plan = FreezePlan(network, groups, frozen, scope)  # type: ignore[arg-type]
    flags = live_flags(network, groups, frozen, scope)
    assert plan.num_live(network.parameters()) == sum(int(f.sum()) for f in flags.values())
    for name, parameter in network.named_parameters():
        block = plan.blocks.get(parameter)
        assert (block is None) == bool(flags[name].all()), name
        if block is not None:
            assert block.num_live == int(flags[name].sum()), name


def test_parameters_that_train_only_later_are_in_every_plan() -> None:
    """A layer that had not been unfrozen yet was left out, and its dropped filters trained on."""
    network = Residual()
    network.conv1.weight.requires_grad_(False)
    groups = find_groups(Residual(), random_images(1))
    plan = FreezePlan(network, groups, torch.ones(groups.num_channels, dtype=torch.bool), "coupled")
    assert network.conv1.weight in plan.blocks


def _in_channels_last(view: bool) -> tuple[list[str], int, int]:
    """Gradients that differ from a bare network's; bytes sent after a fade, and the ticket's."""
    networks = [Residual(), Residual()]
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        network.to(memory_format=torch.channels_last)
    images = random_images(4).to(memory_format=torch.channels_last)
    model = DistributedDataParallel(networks[0], gradient_as_bucket_view=view)
    optimizer = SGD(model.parameters(), lr=0.05)
    config = WormConfig(truncation={"scope": "coupled", "frozen_weights": "hold"})
    engine = attach(model, optimizer, config, example_inputs=images[:1])
    mask = mask_dropping(engine.groups, 0, 3, 9)
    engine.truncate(mask)
    for called in (model, networks[1]):
        called(images).square().mean().backward()
    zero_frozen(networks[1], live_flags(networks[1], engine.groups, ~mask.keep, "coupled"))
    differ = [
        name
        for name, p in networks[0].named_parameters()
        if not torch.equal(gradient(p), gradient(networks[1].get_parameter(name)))
    ]

    config = WormConfig(truncation={**at_once(1)})
    engine = attach(engine.detach(), optimizer, config, example_inputs=images[:1])
    engine.truncate(mask)
    for _ in range(4):
        optimizer.zero_grad()
        engine.model(images).square().mean().backward()
        optimizer.step()
    sent = engine.traffic.sent_bytes
    engine.draw(mask)
    return differ, sent, 4 * sum(p.numel() for p in engine.model.parameters())


@pytest.mark.parametrize("view", [False, True], ids=["", "bucket-view"])
def test_columns_of_weights_in_channels_last_are_their_own(ranks: Ranks, view: bool) -> None:
    """A bucket hands every gradient out in rows, but it lies there as the parameter does: where
    weights were in channels_last, other elements were sent than those that live, and faded columns
    were heard that were silent."""
    for differ, sent, ticket in ranks(1, _in_channels_last, view):
        assert not differ
        assert sent == ticket
