"""Tracing: from a network to its channel groups.

Which layers are coupled, and by which indices, is read from torch-pruning's dependency graph (Fang
et al., CVPR 2023), always from the graph of the whole, unpruned network: behind a concatenation
indices shift as soon as anything is removed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any, Literal

import torch
import torch_pruning
from torch import nn

from ..errors import ConfigError
from .forward import run, undisturbed
from .groups import ChannelGroup, Groups, Member

__all__ = ["find_groups"]

Norm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)

_Layer = tuple[nn.Module, bool, list[int], list[int]]
"""module, whether its outputs are meant, places in the module, the channel of each place"""


def find_groups(network: nn.Module, example_inputs: Any) -> Groups:
    """The channel groups of a network that have a BatchNorm with a trainable scale; maybe none.

    Args:
        network: not wrapped.
        example_inputs: one input, a tuple of inputs, or a dict of keyword inputs, on the
            network's device.  They are run through the network, in eval mode.

    Raises:
        ConfigError: the network cannot be run or traced with these inputs.
    """
    order = {module: place for place, module in enumerate(network.modules())}
    names = {module: name for name, module in network.named_modules()}
    shared = _shared(network)
    found: list[ChannelGroup] = []
    dense: dict[str, str] = {}
    _require_runs(network, example_inputs)
    for group in _coupled_layers(network, example_inputs):
        layers = sorted(_layers(group), key=lambda layer: order.get(layer[0], len(order)))
        norms = [names[module] for module, *_ in layers if isinstance(module, Norm)]
        if norms:
            reason = _why_dense(layers, names, _is_output(group)) or _why_shared(
                layers, names, shared
            )
            dense |= dict.fromkeys(norms, reason) if reason else {}
            found += [] if reason else [_channel_group(layers, names)]
    _name_the_rest(network, found, dense)
    found.sort(key=lambda group: order[network.get_submodule(group.name)])
    return Groups(found, dense)


def _require_runs(network: nn.Module, example_inputs: Any) -> None:
    try:
        with undisturbed(network), torch.no_grad():
            run(network, example_inputs)
    except Exception as error:  # whatever a foreign forward may raise
        raise ConfigError(
            f"model: it does not run on the example inputs: {type(error).__name__}: {error}"
        ) from error


def _coupled_layers(network: nn.Module, example_inputs: Any) -> Iterator[Any]:
    graph = torch_pruning.DependencyGraph()
    with undisturbed(network), torch.enable_grad():
        # The graph follows autograd, which does not see what does not train.
        network.requires_grad_(True)
        try:
            graph.build_dependency(network, example_inputs, verbose=False)
        except Exception as error:  # whatever a foreign tracer may raise
            raise ConfigError(
                f"model: its structure could not be traced: {type(error).__name__}: {error}"
            ) from error
    yield from graph.get_all_groups()


def _layers(group: Any) -> Iterator[_Layer]:
    """The members of torch-pruning's group that hold parameters, or are normalisations."""
    for item in group:
        module = item.dep.target.module
        holds = isinstance(module, (nn.Parameter, Norm)) or any(True for _ in module.parameters())
        if holds:
            to_outputs = group._DG.is_out_channel_pruning_fn(item.dep.handler)
            yield module, to_outputs, item.idxs, item.root_idxs


def _is_output(group: Any) -> bool:
    """Whether the channels are what the network puts out."""
    return any(type(item.dep.target.module).__name__ == "_OutputOp" for item in group)


def _why_dense(
    layers: Sequence[_Layer], names: Mapping[nn.Module, str], is_output: bool
) -> str | None:
    num_channels = len({channel for *_, channels in layers for channel in channels})
    if is_output or not any(_role(layer) == "consumer" for layer in layers):
        return "its channels are what the network puts out"
    for module, _, places, _ in layers:
        name = names.get(module, "a bare parameter")
        if not isinstance(module, (Norm, Conv, nn.Linear)):
            return f"coupled with {name} ({type(module).__name__}), which is not understood"
        if isinstance(module, Conv) and module.groups > 1 and not _is_depthwise(module):
            return f"coupled with {name}, a grouped convolution"
        # Tracing made every parameter train for a moment; by now that is undone.
        if isinstance(module, Norm) and (module.weight is None or not module.weight.requires_grad):
            return f"{name} has no scale that trains"
        if len(places) % num_channels:
            return f"{name} does not see every channel equally often"
    return None


def _why_shared(
    layers: Sequence[_Layer], names: Mapping[nn.Module, str], shared: Set[str]
) -> str | None:
    """Cut for one layer, a parameter would no longer be the other's."""
    for layer in layers:
        for name, _ in _member(layer, names[layer[0]]).parameters:
            if name in shared:
                return f"{name} is shared with another layer"
    return None


def _shared(network: nn.Module) -> set[str]:
    """All names of the parameters that have several."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _name_the_rest(
    network: nn.Module, found: Sequence[ChannelGroup], dense: dict[str, str]
) -> None:
    """A norm that is in no group at all must not go unmentioned."""
    grouped = {norm.module for group in found for norm in group.norms}
    for name, module in network.named_modules():
        if isinstance(module, Norm) and name not in grouped:
            dense.setdefault(name, "no layer that could be cut makes its channels")
        elif isinstance(module, _OTHER_NORMS):
            dense.setdefault(name, f"{type(module).__name__}: only BatchNorm scales are ranked")


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, Conv):
        return False
    return module.groups == module.in_channels == module.out_channels > 1


def _role(layer: _Layer) -> Literal["producer", "norm", "consumer"]:
    module, to_outputs, *_ = layer
    if isinstance(module, Norm):
        return "norm"
    return "producer" if to_outputs or _is_depthwise(module) else "consumer"


def _channel_group(layers: Sequence[_Layer], names: Mapping[nn.Module, str]) -> ChannelGroup:
    members = tuple(_member(layer, names[layer[0]]) for layer in layers)
    producer = next(member for member in members if member.role == "producer")
    return ChannelGroup(producer.module, len(producer.positions), members)


def _member(layer: _Layer, name: str) -> Member:
    module, _, places, channels = layer
    # torch-pruning lists places in its own order; a stable sort by channel makes rows of k.
    by_channel = torch.argsort(torch.tensor(channels), stable=True)
    positions = torch.tensor(places)[by_channel].view(len(set(channels)), -1)
    role = _role(layer)
    # A transposed convolution has its inputs first; a depthwise one has a row for each channel.
    turned = isinstance(module, Conv) and module.transposed and not _is_depthwise(module)
    sliced = {"weight": int(turned != (role == "consumer"))}
    if role != "consumer":
        sliced["bias"] = 0
    parameters = tuple(
        (f"{name}.{parameter}" if name else parameter, dim)
        for parameter, dim in sliced.items()
        if getattr(module, parameter) is not None
    )
    return Member(name, role, positions, parameters)
