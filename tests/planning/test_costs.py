from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

from tests.nets import Concatenating, Flattening, Plain, Residual, Separable, Upsampling
from tests.oracles import live_flags
from worm_dist import Mask, add_gates
from worm_dist.groups.channel_groups import ChannelGroup, Groups
from worm_dist.groups.flops import count_flops
from worm_dist.groups.freeze_plan import FreezePlan
from worm_dist.models import build_model
from worm_dist.planning.costs import Costs, costs_of, truncated
from worm_dist.planning.hypothetical import drawn
from worm_dist.pruning.exactness import find_drawable_groups
from worm_dist.training.evaluation import count_parameters

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


class _Grouped(nn.Module):
    """A convolution with two groups of its own: a channel is two filters, one in each."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(12)
        self.head = nn.Conv2d(12, 5, 1)

    def forward(self, images: Tensor) -> Tensor:
        first = torch.relu(self.bn1(self.conv1(images)))
        second = torch.relu(self.bn2(self.conv2(first)))
        logits: Tensor = self.head(second).mean(dim=(2, 3))
        return logits


def _transformer() -> nn.Module:
    network = VisionTransformer(8, 4, 2, num_heads=4, hidden_dim=16, mlp_dim=24, num_classes=10)
    return add_gates(network)


BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "residual": Residual,
    "flattening": Flattening,
    "separable": Separable,
    "concatenating": Concatenating,
    "densely connected": _DenselyConnected,
    "upsampling": Upsampling,
    "grouped": _Grouped,
    "gated": _transformer,
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
        self.drawn, self.groups_of_drawn = drawn(self.network, self.groups, self.mask)

    def live(self, frozen: Tensor, scope: Scope) -> dict[str, Tensor]:
        """As the oracle has it; a gate is frozen in any scope, and then all that it scales."""
        is_gated = any(group.gates for group in self.groups)
        flags = live_flags(
            self.network,
            self.groups,
            frozen,
            "coupled" if is_gated and scope == "producer" else scope,
        )
        for group, here in zip(self.groups, self.groups.split(frozen).values(), strict=True):
            for gate in group.gates:
                flags[gate.parameters[0][0]][here] = False
        return flags

    def dense_costs(self, compression: str = "none") -> Costs:
        return costs_of(self.network, self.groups, self.everything, SAMPLE, compression)

    def ticket_costs(self, compression: str = "none") -> Costs:
        return costs_of(self.drawn, self.groups_of_drawn, self.mask, SAMPLE, compression)

    def truncated_costs(self, scope: Scope, silent: bool, compression: str = "none") -> Costs:
        frozen = ~self.mask.keep
        plan = FreezePlan(self.network, self.groups, frozen, scope, frozen if silent else None)
        return truncated(self.dense_costs(), self.network, self.groups, plan, compression)

    def num_live_gates(self, group: ChannelGroup) -> int:
        """Factors that live until the draw folds them."""
        return len(group.gates) * int(self.mask[group.name].sum())

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
    everything = case.live(~case.everything.keep, "coupled")
    left = case.live(~case.mask.keep, "coupled")
    dense, ticket = case.dense_costs(), case.ticket_costs()
    for group in case.groups:
        assert dense.groups[group.name].parameters == case.elements(group, everything)
        folded = case.elements(group, left) - case.num_live_gates(group)
        assert ticket.groups[group.name].parameters == folded


@pytest.mark.parametrize("scope", ["norm", "producer", "coupled"])
def test_a_truncated_step_sends_the_live_elements_of_each_group(case: _Case, scope: Scope) -> None:
    live = case.live(~case.mask.keep, scope)
    costs = case.truncated_costs(scope, silent=False)
    assert costs.total.payload_bytes == 4 * sum(int(flags.sum()) for flags in live.values())
    for group in case.groups:
        assert costs.groups[group.name].payload_bytes == 4 * case.elements(group, live)
    dense = case.dense_costs().total
    assert (costs.total.parameters, costs.total.flops) == (dense.parameters, dense.flops)


def test_a_faded_network_sends_group_by_group_what_its_ticket_sends_and_its_gates(
    case: _Case,
) -> None:
    faded, ticket = case.truncated_costs("producer", silent=True), case.ticket_costs()
    gate_bytes = {group.name: 4 * case.num_live_gates(group) for group in case.groups}
    for name, own in gate_bytes.items():
        assert faded.groups[name].payload_bytes == ticket.groups[name].payload_bytes + own
    more = sum(gate_bytes.values())
    assert faded.total.payload_bytes == ticket.total.payload_bytes + more


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


def test_an_attention_makes_heads_and_its_last_layer_does_not() -> None:
    """Five tokens of 16 numbers, in four heads and 24 neurons; see the formula of every layer."""
    case = _Case("gated")
    costs = case.dense_costs()
    attention, neurons, *_ = costs.groups.values()
    assert attention.flops == 2 * 5 * 16 * (3 * 16) + 2 * (2 * 5 * 5 * 16)
    assert neurons.flops == 2 * 5 * 16 * 24
    assert attention.parameters == 3 * 16 * 17 + 4 and neurons.parameters == 24 * 17 + 24
    readers = 2 * 5 * 16 * (16 + 24)
    embedding, head = 2 * 4 * 16 * (3 * 4 * 4), 2 * 16 * 10
    assert costs.rest.flops == 2 * readers + embedding + head
    kept = [int(flags.sum()) for flags in case.mask.values()]
    of_ticket = [cost.flops for cost in case.ticket_costs().groups.values()]
    assert of_ticket[0] * 4 == attention.flops * kept[0]
    assert of_ticket[1] * 24 == neurons.flops * kept[1]


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
