from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.nets import Concatenating, Flattening, Plain, Residual, Separable, Upsampling
from tests.oracles import live_flags
from worm_dist import Mask
from worm_dist.models import build_model
from worm_dist.planning.costs import Costs, costs_of, truncated
from worm_dist.search.groups import ChannelGroup, Groups
from worm_dist.ticket.surgery import cuts_of, remove_channels
from worm_dist.ticket.trial import find_drawable_groups
from worm_dist.training.measure import count_flops, count_parameters
from worm_dist.truncation.plan import Plan

Scope = Literal["norm", "producer", "coupled"]

SAMPLE = torch.zeros(1, 3, 8, 8)


class _DenselyConnected(nn.Module):
    """A norm over the channels of two groups, as in DenseNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 6, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(10)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = self.conv1(images)
        second = self.conv2(torch.relu(self.bn1(first)))
        both = torch.relu(self.bn2(torch.cat([first, second], dim=1)))
        logits: Tensor = self.head(both).mean(dim=(2, 3))
        return logits


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "flattening": Flattening,
    "separable": Separable,
    "concatenating": Concatenating,
    "densely connected": _DenselyConnected,
    "upsampling": Upsampling,
    "resnet20": lambda: build_model("resnet20", 10, 3),
}


class _Case:
    """A network, a mask that drops something of every group, and the network drawn with it."""

    def __init__(self, name: str) -> None:
        self.network = BUILDERS[name]()
        self.groups: Groups = find_drawable_groups(self.network, SAMPLE)
        self.everything = Mask(
            {group.name: torch.ones(group.num_channels, dtype=torch.bool) for group in self.groups}
        )
        keep = {group.name: torch.rand(group.num_channels) < 0.6 for group in self.groups}
        for kept in keep.values():
            kept[0], kept[1] = True, False
        self.mask = Mask(keep)
        self.drawn = copy.deepcopy(self.network)
        remove_channels(self.drawn, cuts_of(self.groups, self.mask, self.drawn))

    def dense_costs(self, compression: str = "none") -> Costs:
        return costs_of(self.network, self.groups, self.everything, SAMPLE, compression)

    def ticket_costs(self, compression: str = "none") -> Costs:
        return costs_of(self.drawn, self.groups, self.mask, SAMPLE, compression)

    def truncated_costs(self, scope: Scope, silent: bool, compression: str = "none") -> Costs:
        frozen = ~self.mask.keep
        plan = Plan(self.network, self.groups, frozen, scope, frozen if silent else None)
        return truncated(self.dense_costs(), self.network, self.groups, plan, compression)

    def elements(self, group: ChannelGroup, flags: dict[str, Tensor]) -> int:
        """How many of the flagged elements make or normalise channels of the group."""
        mine = {name: torch.zeros_like(flag) for name, flag in flags.items()}
        for member in group.members:
            for channel in range(group.num_channels):
                for name, dim in member.parameters if member.role != "consumer" else ():
                    for place in member.positions[channel].tolist():
                        mine[name].select(dim, place).fill_(True)
        return sum(int((flags[name] & mine[name]).sum()) for name in flags)


@pytest.fixture(params=list(BUILDERS))
def case(request: pytest.FixtureRequest) -> _Case:
    return _Case(request.param)


def test_the_dense_network_costs_what_it_has(case: _Case) -> None:
    total = case.dense_costs().total
    assert total.parameters == count_parameters(case.network)
    assert total.flops == count_flops(case.network, SAMPLE)
    assert total.payload_bytes == 4 * total.parameters


def test_the_ticket_costs_what_the_drawn_network_has(case: _Case) -> None:
    total = case.ticket_costs().total
    assert total.parameters == count_parameters(case.drawn)
    assert total.flops == count_flops(case.drawn, SAMPLE)
    assert total.payload_bytes == 4 * total.parameters


def test_every_group_has_the_elements_that_make_and_normalise_its_channels(case: _Case) -> None:
    everything = live_flags(case.network, case.groups, ~case.everything.keep, "coupled")
    left = live_flags(case.network, case.groups, ~case.mask.keep, "coupled")
    dense, ticket = case.dense_costs(), case.ticket_costs()
    for group in case.groups:
        assert dense.groups[group.name].parameters == case.elements(group, everything)
        assert ticket.groups[group.name].parameters == case.elements(group, left)


@pytest.mark.parametrize("scope", ["norm", "producer", "coupled"])
def test_a_truncated_step_sends_the_live_elements_of_each_group(case: _Case, scope: Scope) -> None:
    live = live_flags(case.network, case.groups, ~case.mask.keep, scope)
    costs = case.truncated_costs(scope, silent=False)
    assert costs.total.payload_bytes == 4 * sum(int(flags.sum()) for flags in live.values())
    for group in case.groups:
        assert costs.groups[group.name].payload_bytes == 4 * case.elements(group, live)
    dense = case.dense_costs().total
    assert (costs.total.parameters, costs.total.flops) == (dense.parameters, dense.flops)


def test_a_faded_network_sends_group_by_group_what_its_ticket_sends(case: _Case) -> None:
    faded, ticket = case.truncated_costs("producer", silent=True), case.ticket_costs()
    assert faded.total.payload_bytes == ticket.total.payload_bytes
    for group in case.groups:
        name = group.name
        assert faded.groups[name].payload_bytes == ticket.groups[name].payload_bytes


def test_the_rest_is_what_no_group_makes(case: _Case) -> None:
    for costs in (case.dense_costs(), case.ticket_costs(), case.truncated_costs("norm", False)):
        assert min(costs.rest.parameters, costs.rest.flops, costs.rest.payload_bytes) >= 0
    network = case.network
    if isinstance(network, Plain):
        assert case.dense_costs().rest.parameters == count_parameters(network.head)
        assert case.dense_costs().rest.flops == 2 * network.head.weight.numel()


def test_of_a_concatenation_each_group_has_its_share_of_what_follows() -> None:
    """conv1 makes the first four of ten channels, and conv3 reads all ten: its operations belong to
    its own group, whichever channels they read."""
    case = _Case("concatenating")
    flops = {name: cost.flops for name, cost in case.dense_costs().groups.items()}
    assert flops == {
        "conv1": 2 * 64 * 4 * 3 * 9,
        "conv2": 2 * 64 * 6 * 4 * 9,
        "conv3": 2 * 64 * 5 * 10 * 9,
    }


def test_what_does_not_train_is_not_sent() -> None:
    case = _Case("plain")
    case.network.head.requires_grad_(False)
    costs = case.dense_costs()
    assert costs.rest.payload_bytes == 0 < costs.rest.parameters
    assert costs.total.payload_bytes == 4 * (costs.total.parameters - costs.rest.parameters)


def test_rounded_gradients_take_two_bytes_each() -> None:
    case = _Case("plain")
    for exact, half in (
        (case.ticket_costs(), case.ticket_costs("bf16")),
        (case.truncated_costs("producer", False), case.truncated_costs("producer", False, "fp16")),
    ):
        assert half.total.payload_bytes * 2 == exact.total.payload_bytes
        assert half.rest.payload_bytes * 2 == exact.rest.payload_bytes
