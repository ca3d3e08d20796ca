"""Channel groups: the slices of parameters that live and die together.

For a network ``conv -> norm -> relu -> next`` the group of the conv is

    channel c = filter c of conv, scale c and shift c of norm, input column(s) c of next

and residual sums tie the filters of several convs into one group.  Which layers are coupled, and
by which indices, is read from torch-pruning's dependency graph (Fang et al., CVPR 2023), always
from the graph of the whole, unpruned network: behind a concatenation indices shift as soon as
anything is removed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch_pruning
from torch import Tensor, nn

from ..errors import ConfigError

__all__ = ["ChannelGroup", "Groups", "Member", "find_groups"]

Norm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd


@dataclass(frozen=True, eq=False)
class Member:
    """The part that one module has in a group.

    Attributes:
        module: its name in the unwrapped network.
        role: ``producer`` (its outputs are the channels), ``norm``, or ``consumer`` (its inputs).
        positions: int64 ``[channels, k]``: the places along that side of the module that each
            channel takes; k > 1 behind a flatten.
        parameters: the sliced parameters, each with the dimension it is sliced along.
    """

    module: str
    role: Literal["producer", "norm", "consumer"]
    positions: Tensor
    parameters: tuple[tuple[str, int], ...]


@dataclass(frozen=True, eq=False)
class ChannelGroup:
    """Channels that are kept or dropped one by one, each with all its slices.

    Attributes:
        name: of the first module that produces the channels.
        num_channels: how many channels.
        members: every module that holds slices, in the network's order.
    """

    name: str
    num_channels: int
    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        roles = {member.role for member in self.members}
        assert {"producer", "norm"} <= roles, self.name
        for member in self.members:
            assert member.positions.shape[0] == self.num_channels, (self.name, member.module)

    @property
    def norms(self) -> tuple[Member, ...]:
        return tuple(member for member in self.members if member.role == "norm")


class Groups(Sequence[ChannelGroup]):
    """All channel groups of a network, in the network's order.

    Attributes:
        dense: for each norm that is in no group, why it is left dense.
    """

    def __init__(self, groups: Sequence[ChannelGroup], dense: Mapping[str, str]) -> None:
        self._groups = tuple(groups)
        self.dense = dict(dense)

    @property
    def sizes(self) -> dict[str, int]:
        """Channels of each group."""
        return {group.name: group.num_channels for group in self._groups}

    @property
    def num_channels(self) -> int:
        return sum(self.sizes.values())

    def split(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector ``[num_channels]`` over all channels, group by group."""
        sizes = self.sizes
        return dict(zip(sizes, vector.split(list(sizes.values())), strict=True))

    @property
    def digests(self) -> dict[str, bytes]:
        """The structure of each group: equal if and only if ranks mean the same slices."""
        digests = {}
        for group in self._groups:
            structure = hashlib.blake2b(digest_size=16)
            for member in group.members:
                structure.update(repr((member.module, member.role, member.parameters)).encode())
                structure.update(member.positions.numpy().tobytes())
            digests[group.name] = structure.digest()
        return digests

    def __getitem__(self, index: Any) -> Any:
        return self._groups[index]

    def __len__(self) -> int:
        return len(self._groups)


def find_groups(network: nn.Module, example_inputs: Any) -> Groups:
    """Find the channel groups of a network that have a BatchNorm with a trainable scale.

    Args:
        network: not wrapped.
        example_inputs: one input, a tuple of inputs, or a dict of keyword inputs, on the
            network's device.  It is run through the network once, in eval mode.

    Raises:
        ConfigError: the network cannot be run or traced with these inputs, or has no such group.
    """
    order = {module: place for place, module in enumerate(network.modules())}
    names = {module: name for name, module in network.named_modules()}
    found: list[ChannelGroup] = []
    dense: dict[str, str] = {}
    for group in _coupled_layers(network, example_inputs):
        layers = sorted(_layers(group), key=lambda layer: order.get(layer[0], len(order)))
        norms = [names[module] for module, *_ in layers if isinstance(module, Norm)]
        if not norms:
            continue
        reason = _why_dense(layers, names)
        if reason is None:
            found.append(_channel_group(layers, names))
        else:
            dense |= dict.fromkeys(norms, reason)
    if not found:
        because = "".join(f"\n  {norm}: {reason}" for norm, reason in dense.items())
        raise ConfigError(
            "model: it has no channel group with a BatchNorm scale to rank its channels by"
            + because
        )
    found.sort(key=lambda group: order[network.get_submodule(group.name)])
    return Groups(found, dense)


_Layer = tuple[nn.Module, bool, list[int], list[int]]
"""module, whether its outputs are meant, places in the module, the channel of each place"""


def _coupled_layers(network: nn.Module, example_inputs: Any) -> Iterator[Any]:
    graph = torch_pruning.DependencyGraph()
    with _undisturbed(network), torch.enable_grad():
        try:
            graph.build_dependency(network, example_inputs, verbose=False)
        except Exception as error:  # whatever a foreign forward or tracer may raise
            raise ConfigError(
                f"model: it could not be traced with the example inputs given: "
                f"{type(error).__name__}: {error}"
            ) from error
        yield from graph.get_all_groups()


@contextmanager
def _undisturbed(network: nn.Module) -> Iterator[None]:
    """Tracing switches modules to eval mode and may draw random numbers; put both back."""
    modes = {module: module.training for module in network.modules()}
    devices = {p.device for p in network.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(devices=devices):
        yield
    for module, training in modes.items():
        module.training = training


def _layers(group: Any) -> Iterator[_Layer]:
    """The members of torch-pruning's group that hold parameters."""
    for item in group:
        module = item.dep.target.module
        if isinstance(module, nn.Parameter) or any(True for _ in module.parameters()):
            to_outputs = group._DG.is_out_channel_pruning_fn(item.dep.handler)
            yield module, to_outputs, item.idxs, item.root_idxs


def _why_dense(layers: Sequence[_Layer], names: Mapping[nn.Module, str]) -> str | None:
    num_channels = len({channel for *_, channels in layers for channel in channels})
    for module, _, places, _ in layers:
        name = names.get(module, "a bare parameter")
        if not isinstance(module, (Norm, Conv, nn.Linear)):
            return f"coupled with {name} ({type(module).__name__}), which is not understood"
        if isinstance(module, Conv) and 1 < module.groups < module.out_channels:
            return f"coupled with {name}, a grouped convolution"
        if isinstance(module, Norm) and (module.weight is None or not module.weight.requires_grad):
            return f"{name} has no scale that trains"
        if len(places) % num_channels:
            return f"{name} does not see every channel equally often"
    return None


def _channel_group(layers: Sequence[_Layer], names: Mapping[nn.Module, str]) -> ChannelGroup:
    members = tuple(_member(layer, names[layer[0]]) for layer in layers)
    producer = next(member for member in members if member.role == "producer")
    return ChannelGroup(producer.module, len(producer.positions), members)


def _member(layer: _Layer, name: str) -> Member:
    module, to_outputs, places, channels = layer
    # torch-pruning lists places in its own order; a stable sort by channel makes rows of k.
    by_channel = torch.argsort(torch.tensor(channels), stable=True)
    positions = torch.tensor(places)[by_channel].view(len(set(channels)), -1)
    role: Literal["producer", "norm", "consumer"]
    depthwise = isinstance(module, Conv) and module.groups == module.out_channels > 1
    if isinstance(module, Norm):
        role, sliced = "norm", {"weight": 0, "bias": 0}
    elif to_outputs or depthwise:
        transposed = isinstance(module, Conv) and module.transposed and not depthwise
        role, sliced = "producer", {"weight": int(transposed), "bias": 0}
    else:
        transposed = isinstance(module, Conv) and module.transposed
        role, sliced = "consumer", {"weight": int(not transposed)}
    parameters = tuple(
        (f"{name}.{parameter}" if name else parameter, dim)
        for parameter, dim in sliced.items()
        if getattr(module, parameter) is not None
    )
    return Member(name, role, positions, parameters)
