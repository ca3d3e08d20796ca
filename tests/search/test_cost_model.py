"""The cost of a mask, without drawing it, is that of the drawn network: to the element, of every
architecture; and so a budget is met to one channel."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import ceil
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from tests.families.families import FAMILIES
from tests.nets import Attentive, Concatenating, Flattening, Grouped, Plain, Residual, Separable
from worm_dist import ConfigError, Mask, WormConfig, add_gates
from worm_dist.config import Quantity
from worm_dist.groups.channel_groups import ChannelGroup, Groups, Member
from worm_dist.groups.cost_model import CostModel
from worm_dist.groups.flops import count_flops
from worm_dist.groups.nested import mapped
from worm_dist.groups.selection import select_groups
from worm_dist.groups.tracing import find_groups
from worm_dist.planning.hypothetical import drawn
from worm_dist.pruning.predicted_cost import predicted_cost
from worm_dist.search.budgets import Budget
from worm_dist.search.ranking import Ranking

_QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
_FLOOR = 0.1


class _Subject:
    """A network with its groups.

    Args:
        network: the network, gated or not.
        inputs: as for ``forward.run``.
        importance: what ranks its channels.
    """

    def __init__(self, network: nn.Module, inputs: Any, importance: str = "auto") -> None:
        self.network, self.inputs, self.importance = network, inputs, importance
        self.groups = select_groups(find_groups(network, inputs), self.config("flops", 1.0).search)

    def config(self, quantity: Quantity, share: float, **search: Any) -> WormConfig:
        # Channels of all groups are in one order, so that the next one to keep is known.
        rules = {"importance": self.importance, "threshold": "global"}
        search = {**rules, "budget": {quantity: share}, **search}
        return WormConfig(search=search, ticket={"round_to": 1})

    def model(self, quantity: Quantity) -> CostModel:
        config = self.config(quantity, 0.5)
        model = predicted_cost(config, self.network, self.groups, self.inputs)
        assert model is not None
        return model

    def counted(self, quantity: Quantity, mask: Mask) -> int:
        """What a drawn copy costs."""
        if quantity == "channels":
            return mask.num_kept
        ticket, _ = drawn(self.network, self.groups, mask)
        if quantity == "flops":
            return count_flops(ticket, self.inputs)
        trained = [p for p in ticket.parameters() if quantity == "parameters" or p.requires_grad]
        return sum(p.numel() * (1 if quantity == "parameters" else 4) for p in trained)

    def dense(self, quantity: Quantity) -> int:
        """What the network costs."""
        parameters = sum(p.numel() for p in self.network.parameters())
        return {
            "flops": lambda: count_flops(self.network, self.inputs),
            "parameters": lambda: parameters,
            "bytes": lambda: 4 * parameters,
            "channels": lambda: self.groups.num_channels,
        }[quantity]()


def _random_mask(groups: Groups, seed: int) -> Mask:
    generator = torch.Generator().manual_seed(seed)
    keep = {}
    for name, size in groups.sizes.items():
        num_kept = int(torch.randint(1, size + 1, (), generator=generator))
        keep[name] = torch.rand(size, generator=generator).argsort() < num_kept
    return Mask(keep)


def _assert_exact(subject: _Subject) -> None:
    for quantity in _QUANTITIES:
        model = subject.model(quantity)
        assert model.dense == subject.dense(quantity)
        for seed in range(2):
            mask = _random_mask(subject.groups, seed)
            assert model.of(mask.num_kept_by_group) == subject.counted(quantity, mask), quantity


def _assert_met_to_one_channel(subject: _Subject) -> None:
    groups = subject.groups
    scores = torch.rand(groups.num_channels, generator=torch.Generator().manual_seed(3))
    none_gone = torch.zeros(groups.num_channels, dtype=torch.bool)
    fewest = torch.tensor([max(1, ceil(Fraction("0.1") * size)) for size in groups.sizes.values()])
    for quantity in _QUANTITIES:
        model = subject.model(quantity)
        for share in (0.25, 0.5):
            limit, config = share * subject.dense(quantity), subject.config(quantity, share)
            if model.of(fewest) > limit:  # of a transformer without its embedding, say
                with pytest.raises(ConfigError, match=rf"^search.budget.{quantity}: .* cannot be"):
                    Ranking(config, subject.network, groups, None, model)
                continue
            ranking = Ranking(config, subject.network, groups, None, model)
            mask = ranking.select(scores, none_gone)[1]
            assert subject.counted(quantity, mask) <= limit
            best = scores.masked_fill(mask.keep, -1).argmax()
            more = Mask.from_vector(groups.sizes, mask.keep.index_fill(0, best, True))
            assert model.of(more.num_kept_by_group) > limit


@pytest.mark.slow("draws a network of every kind, four minutes")
@pytest.mark.parametrize("name", [name for name, each in FAMILIES.items() if not each.large])
def test_of_every_architecture_the_cost_is_exact_and_a_budget_met(name: str) -> None:
    family = FAMILIES[name]
    single = mapped(family.inputs(0), lambda x: x.float() if x.is_floating_point() else x)
    subject = _Subject(family.built().float(), single, family.score)
    _assert_exact(subject)
    _assert_met_to_one_channel(subject)


_IMAGES = torch.zeros(1, 3, 8, 8)
_SMALL: Mapping[str, Any] = {
    kind.__name__: kind for kind in (Concatenating, Flattening, Grouped, Plain, Residual, Separable)
} | {"gated": lambda: add_gates(Attentive())}


@pytest.mark.parametrize("name", _SMALL)
def test_the_cost_is_exact_and_a_budget_met(name: str) -> None:
    subject = _Subject(_SMALL[name](), _IMAGES)
    _assert_exact(subject)
    _assert_met_to_one_channel(subject)


def test_a_step_sends_only_what_trains_and_as_it_is_compressed() -> None:
    network = Plain()
    network.conv2.weight.requires_grad_(False)
    subject = _Subject(network, _IMAGES)
    mask = _random_mask(subject.groups, 1)
    search = {"budget": {"bytes": 0.5}}
    config = WormConfig(search=search, truncation={"compression": "bf16"})
    halved = predicted_cost(config, network, subject.groups, _IMAGES)
    full = subject.model("bytes")
    assert halved is not None and halved.dense == full.dense
    assert full.dense == 4 * sum(p.numel() for p in network.parameters() if p.requires_grad)
    expected = subject.counted("bytes", mask)
    assert full.of(mask.num_kept_by_group) == 2 * halved.of(mask.num_kept_by_group) == expected


class _Orthogonal(nn.Conv2d):
    """Measures how far its filters are from orthogonal, which takes their number squared."""

    def forward(self, input: Tensor) -> Tensor:
        filters = self.weight.detach().flatten(1)
        self.overlap = (filters @ filters.T).norm()
        return super().forward(input)


def test_what_cannot_be_predicted_is_refused_in_one_line() -> None:
    network = Plain()
    network.conv2 = _Orthogonal(6, 8, 3, padding=1)
    subject = _Subject(network, _IMAGES)
    with pytest.raises(ConfigError) as error:
        subject.model("flops")
    message = str(error.value)
    assert message.startswith("search.budget.flops: cannot be predicted exactly for this network (")
    assert "\n" not in message
    mask = _random_mask(subject.groups, 0)
    for quantity in _QUANTITIES[1:]:
        predicted = subject.model(quantity).of(mask.num_kept_by_group)
        assert predicted == subject.counted(quantity, mask)


class _Refusing(nn.Conv2d):
    """Refuses to run under a dispatch mode, as what is compiled or written in C++ may do."""

    def forward(self, input: Tensor) -> Tensor:
        if _get_current_dispatch_mode() is not None:
            raise RuntimeError("not under a mode\nand so on")
        return super().forward(input)


def test_what_cannot_be_counted_is_refused_in_one_line() -> None:
    network = Plain()
    network.conv2 = _Refusing(6, 8, 3, padding=1)
    subject = _Subject(network, _IMAGES)
    with pytest.raises(ConfigError, match=r"\(RuntimeError: not under a mode\); limit") as error:
        subject.model("flops")
    assert "\n" not in str(error.value)


def test_an_index_that_goes_with_two_channels_is_refused() -> None:
    positions = torch.tensor([[0], [1]])
    made = Member("a", "producer", positions, (("a.weight", 0),))
    read = Member("b", "consumer", positions, (("b.weight", 1),))
    swapped = Member("b", "consumer", positions.flip(0), (("b.weight", 1),))
    groups = Groups([ChannelGroup("a", 2, (made, read, swapped))], {})
    shapes = {"a.weight": torch.Size([2, 3]), "b.weight": torch.Size([4, 2])}
    with pytest.raises(ConfigError, match=r"an index of b\.weight belongs to several channels"):
        CostModel.build(groups, 14, shapes, {"a.weight": 6, "b.weight": 8}, {})


def test_the_floors_alone_may_exceed_a_budget() -> None:
    subject = _Subject(Plain(), _IMAGES)
    cost = subject.model("flops")
    config = subject.config("flops", 0.01)
    message = (
        r"^search\.budget\.flops: 0\.01 cannot be met: with search\.min_keep_ratio 0\.1 the "
        r"smallest ticket takes 0\.\d+ of the dense network; raise the one or lower the other$"
    )
    with pytest.raises(ConfigError, match=message):
        Ranking(config, subject.network, subject.groups, None, cost)


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
@pytest.mark.parametrize("seed", range(3))
def test_a_budget_of_channels_is_the_share_that_is_not_dropped(share: float, seed: int) -> None:
    subject = _Subject(Residual(width=16, inner=12), _IMAGES)
    cost = subject.model("channels")
    by_cost = Ranking(
        subject.config("channels", share), subject.network, subject.groups, None, cost
    )
    search = {"threshold": "global", "prune_ratio": 1 - share}
    config = WormConfig(search=search, ticket={"round_to": 1})
    by_count = Ranking(config, subject.network, subject.groups, None)
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(subject.groups.num_channels, generator=generator)
    gone = torch.rand(subject.groups.num_channels, generator=generator) < 0.2
    assert by_cost.select(scores, gone) == by_count.select(scores, gone)


def test_the_share_is_a_decimal_number() -> None:
    """0.29 * 100 is 28.999999999999996 in floats."""
    cost = CostModel(
        100, torch.tensor([1]), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1, 1).long()
    )
    assert Budget("channels", 0.29, cost, {"a": 100}).limit == 29
