"""Tracing: finds the channel groups of a network."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError
from .attention import Attention, find_attentions, weight_of
from .calls import Calls
from .channel_flow import Layer
from .channel_groups import ChannelGroup, Groups, Member
from .copying import scratch_copy
from .dependency import Coupled, coupled_layers
from .forward import undisturbed
from .grouped_conv import interleaved
from .reachability import reasons_of_unreached
from .selective_norm import SelectiveBatchNorm2d

__all__ = ["Trace", "find_groups", "trace"]

Norm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd
_IS_OUTPUT = "its channels are outputs of the network"
_ALONE = "none of its channels can be dropped without all others"
_LATE_PARAMETER = (
    "model: its parameter {name} is created or renamed by its first forward pass; run it "
    "once, then wrap it, make the optimizer and attach"
)
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


class Trace(NamedTuple):
    """What tracing a network has found.

    Attributes:
        groups: the channel groups; there may be none.
        example_inputs: the inputs that the network was traced with.
        calls: the modules that run on them.
    """

    groups: Groups
    example_inputs: Any
    calls: Calls


def find_groups(network: nn.Module, example_inputs: Any) -> Groups:
    """Find the channel groups of a network: channels of convolutions, neurons of linear layers and
    attention heads.

    A copy of the network is traced.  The result may be empty.

    Args:
        network: the unwrapped network.
        example_inputs: one input, a tuple of inputs, or a dict of keyword inputs, on the
            network's device; they are run through the network in eval mode.

    Raises:
        ConfigError: the network cannot be copied or run with these inputs; parts of it are
            TorchScript, were created in inference mode, or are created by the first forward pass.
    """
    return trace(network, example_inputs).groups


def trace(network: nn.Module, example_inputs: Any, smaller: Any = None) -> Trace:
    """Find the channel groups of a network, and what runs of it.

    Args:
        network: the unwrapped network.
        example_inputs: inputs as for ``find_groups``.
        smaller: inputs to trace the network with instead, if the same modules run on them.

    Raises:
        ConfigError: as in ``find_groups``.
    """
    _require_modules(network)
    with scratch_copy(network) as network_copy:
        calls = _calls(network_copy, example_inputs)
        if smaller is not None and _run_alike(network, smaller, calls):
            example_inputs = smaller
        groups = _groups(network_copy, example_inputs, calls)
        _require_parameters_of(network_copy, network)
    return Trace(groups, example_inputs, calls)


def _groups(network: nn.Module, example_inputs: Any, calls: Calls) -> Groups:
    attentions, dense = find_attentions(network)
    opaque = [network.get_submodule(attention.module) for attention in attentions]
    sets, untraced = coupled_layers(network, example_inputs, opaque, calls.deciding())
    builder = _GroupBuilder(network)
    dense |= {builder.names[module]: f"not traced: {why}" for module, why in untraced.items()}
    found = [_head_group(attention, network) for attention in attentions if attention.num_heads > 1]
    dense |= {attention.module: _ALONE for attention in attentions if attention.num_heads == 1}
    for coupled in sets:
        group = builder.group_of(coupled)
        if isinstance(group, ChannelGroup):
            found.append(group)
        else:
            dense |= group
    _report_ungrouped_norms(network, found, dense)
    _report_uncalled_layers(network, sets, [*opaque, *untraced], dense)
    order = {name: number for number, (name, _) in enumerate(network.named_modules())}
    groups = Groups(sorted(found, key=lambda group: order[group.name]), dense)
    reached = {network.get_submodule(name) for name in calls.reached}
    if reached == {network} and any(True for _ in network.children()):
        raise ConfigError(
            "model: run as a copy, it calls none of its own modules: its forward is bound to the "
            "modules of the network that it was copied from; define it in the class"
        )
    reached |= {module for outer in opaque for module in outer.modules()}
    return groups.without(reasons_of_unreached(network, reached, groups))


def _require_modules(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"model: {name or 'it'} is TorchScript ({module.original_name}), which cannot be "
                "traced; pass the module that was given to torch.jit.script"
            )
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(_LATE_PARAMETER.format(name=name))
        if parameter.is_inference():
            raise ConfigError(
                f"model: parameter {name} was made in inference mode and cannot be trained; build "
                "the network outside of torch.inference_mode"
            )


def _require_parameters_of(network_copy: nn.Module, network: nn.Module) -> None:
    """Check that the first forward pass has not created or renamed parameters."""
    late = {name for name, _ in network_copy.named_parameters()} ^ {
        name for name, _ in network.named_parameters()
    }
    if late:
        raise ConfigError(_LATE_PARAMETER.format(name=min(late)))


def _run_alike(network: nn.Module, inputs: Any, calls: Calls) -> bool:
    """Whether a copy of the network runs on these inputs, and with these calls."""
    with scratch_copy(network) as network_copy:
        try:
            return Calls.of(network_copy, inputs) == calls
        except Exception:  # such as a layer that needs inputs of another size
            return False


def _calls(network: nn.Module, example_inputs: Any) -> Calls:
    """Run the network.

    Raises:
        ConfigError: it does not run on these inputs.
    """
    try:
        with undisturbed(network):
            return Calls.of(network, example_inputs)
    except Exception as error:  # user code may raise anything
        raise ConfigError(
            f"model: it does not run on the example inputs: {type(error).__name__}: {error}"
            f"{_input_form_hint(example_inputs)}"
        ) from error


def _input_form_hint(example_inputs: Any) -> str:
    """Return a hint for the error message if the inputs may have been meant differently."""
    if isinstance(example_inputs, list):
        return ". A list is taken for several inputs; one input that is a list is ([...],)"
    if isinstance(example_inputs, Mapping):
        return ". A dict is taken for keyword inputs; one input that is a dict is ({...},)"
    return ""


class _GroupBuilder:
    """Builds channel groups from the coupled layers of one network."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        # Bare parameters are looked up too; they are not in this table and come last.
        self._order: dict[object, int] = {
            module: number for number, module in enumerate(network.modules())
        }
        self.names: dict[Any, str] = {module: name for name, module in network.named_modules()}
        self._shared = _shared(network)
        self._weights = _weights(network)
        self._grouped = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, Conv) and module.groups > 1 and not _is_depthwise(module)
        }
        self._used_names: set[str] = set()
        self._positions: dict[Any, Tensor] = {}

    def group_of(self, coupled: Coupled) -> ChannelGroup | dict[str, str]:
        """Return the group, or by module name the reason why the layers stay dense."""
        layers = sorted(
            coupled.stream.layers,
            key=lambda layer: self._order.get(layer.module, len(self._order)),
        )
        found = self._why_dense(coupled, layers) or self._group(layers)
        if isinstance(found, ChannelGroup):
            return found
        norms = [self.names[layer.module] for layer in layers if _role(layer) == "norm"]
        return dict.fromkeys(norms or self._layers_to_report(layers, found), found)

    def _layers_to_report(self, layers: Sequence[Layer], reason: str) -> list[str]:
        """Return the name of the layer to report as dense, for layers without a BatchNorm.

        Output layers are not reported, and norms of other kinds are reported by themselves.
        """
        if reason == _IS_OUTPUT or any(isinstance(layer.module, _OTHER_NORMS) for layer in layers):
            return []
        producers = (layer.module for layer in layers if layer.to_outputs)
        return [
            self.names[producer]
            for producer in producers
            if isinstance(producer, (Conv, nn.Linear))
        ][:1]

    def _group(self, layers: Sequence[Layer]) -> ChannelGroup | str:
        """Return the group, or the reason why there is none."""
        members = interleaved([self._member(layer) for layer in layers], self._grouped)
        if isinstance(members, str):
            return members
        producers = [member for member in members if self._produces_channels(member)]
        name = next(
            (producer.module for producer in producers if producer.module not in self._used_names),
            None,
        )
        if name is None:
            return f"{producers[0].module} makes channels of another group too"
        self._used_names.add(name)
        order = producers[0].positions[:, 0].argsort()
        if len(order) == 1:
            return _ALONE
        members = [self._with_positions(member, member.positions[order]) for member in members]
        gates = [
            gate
            for member in members
            if member.role == "consumer"
            for gate in _gate_of(self._network, member.module)
        ]
        depthwise = sum(
            member.role == "producer" and not self._produces_channels(member) for member in members
        )
        norms = sum(member.role == "norm" for member in members) - depthwise
        # Multiplication by squeeze-and-excitation factors does not tie the outputs of two norms.
        tied = len(producers) > 1 and (norms > 1 or norms + depthwise == 0)
        return ChannelGroup(name, len(order), (*members, *gates), tied)

    def _produces_channels(self, member: Member) -> bool:
        """Whether a member produces channels; a depthwise convolution only transforms them, and so
        does a norm, unless it selects channels."""
        module = self._network.get_submodule(member.module)
        if isinstance(module, SelectiveBatchNorm2d):
            return True
        return member.role == "producer" and not _is_depthwise(module)

    def _with_positions(self, member: Member, positions: Tensor) -> Member:
        """Return the member with these positions; equal position tensors are stored once."""
        key = (positions.shape, positions.numpy().tobytes())
        return dataclasses.replace(member, positions=self._positions.setdefault(key, positions))

    def _why_dense(self, coupled: Coupled, layers: Sequence[Layer]) -> str | None:
        stream = coupled.stream
        if stream.reaches_output and not coupled.whole:
            return "its channels go where the network could not be traced"
        if stream.reaches_output or not any(_role(layer) == "consumer" for layer in layers):
            return _IS_OUTPUT
        for layer in layers:
            module: Any = layer.module
            name = self.names.get(module, "a bare parameter")
            if isinstance(module, SelectiveBatchNorm2d) and not layer.to_outputs:
                return f"{name} reads them, and drops channels of its own instead"
            if name not in self._weights and not _is_bare_norm(module):
                return f"coupled with {name} ({type(module).__name__}), which is not supported"
            # Tracing set requires_grad on all parameters; that has been undone by now.
            if isinstance(module, Norm) and (
                module.weight is None or not module.weight.requires_grad
            ):
                return f"{name} has no scale that trains"
        if stream.is_unresolved:
            return "what happens to its channels between the layers is not understood"
        # Slicing a shared parameter for one layer would break the other.
        for parameter in (p for layer in layers for p, _ in self._member(layer).parameters):
            if parameter in self._shared:
                return f"{parameter} is shared with another layer"
        return None

    def _member(self, layer: Layer) -> Member:
        module: Any = layer.module
        name, role = self.names[module], _role(layer)
        # The first dimension of a transposed convolution is its inputs, of a depthwise one the
        # channels; PReLU has no other dimension.
        swapped = isinstance(module, Conv) and module.transposed and not _is_depthwise(module)
        swapped |= isinstance(module, nn.PReLU)
        parameters = [(self._weights[name], int(swapped != (role == "consumer")))]
        if role != "consumer" and getattr(module, "bias", None) is not None:
            parameters.append((f"{name}.bias" if name else "bias", 0))
        return Member(name, role, layer.positions, tuple(parameters))


def _head_group(attention: Attention, network: nn.Module) -> ChannelGroup:
    members = [
        Member(attention.module, "producer", producers.positions, producers.parameters)
        for producers in attention.producers
    ]
    weight = (weight_of(network, attention.reader), 1)
    members.append(Member(attention.reader, "consumer", attention.columns, (weight,)))
    members += _gate_of(network, attention.reader)
    return ChannelGroup(attention.module, attention.num_heads, tuple(members))


def _gate_of(network: nn.Module, reader: str) -> list[Member]:
    """Return the gate of a layer as a member; empty if it has none."""
    gate = "parametrizations.weight.0"
    own = dict(network.get_submodule(reader).named_parameters())
    scale = own.get(f"{gate}.scale")
    if scale is None:
        return []
    positions = torch.arange(scale.numel())[:, None]
    return [Member(f"{reader}.{gate}", "gate", positions, ((f"{reader}.{gate}.scale", 0),))]


def _weights(network: nn.Module) -> dict[str, str]:
    """Return the weight parameter of every prunable layer, by layer name.

    Plain and gated weights are supported; other parametrizations are not.
    """
    parameters = {name for name, _ in network.named_parameters(remove_duplicate=False)}
    weights = {}
    for name, module in network.named_modules():
        if isinstance(module, (Norm, Conv, nn.Linear, nn.PReLU)):
            plain = f"{name}.weight" if name else "weight"
            gated = f"{name}.parametrizations.weight.original"
            if plain in parameters:
                weights[name] = plain
            elif gated in parameters and _gate_of(network, name):
                weights[name] = gated
    return weights


def _is_bare_norm(module: Any) -> bool:
    return isinstance(module, Norm) and module.weight is None


def _shared(network: nn.Module) -> set[str]:
    """Return all names of parameters that have more than one name."""
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in network.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return {name for several in names.values() if len(several) > 1 for name in several}


def _report_ungrouped_norms(
    network: nn.Module, found: Sequence[ChannelGroup], dense: dict[str, str]
) -> None:
    """Add a reason to ``dense`` for every norm that is in no group."""
    grouped = {norm.module for group in found for norm in group.norms}
    for name, module in network.named_modules():
        if isinstance(module, Norm) and name not in grouped:
            dense.setdefault(name, "no prunable layer produces its channels")
        elif isinstance(module, _OTHER_NORMS):
            kind = type(module).__name__
            dense.setdefault(name, f"{kind}: of all norms only BatchNorm's channels are dropped")


def _report_uncalled_layers(
    network: nn.Module,
    sets: Sequence[Coupled],
    opaque: Sequence[nn.Module],
    dense: dict[str, str],
) -> None:
    """Add a reason to ``dense`` for every layer that is not called, or not as a module."""
    called = {layer.module for coupled in sets for layer in coupled.stream.layers}
    called |= {module for outer in opaque for module in outer.modules()}
    for name, module in network.named_modules():
        if isinstance(module, (Conv, nn.Linear)) and module not in called:
            dense.setdefault(name, "it is never called, or not as a module")


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, Conv):
        return False
    return module.groups == module.in_channels == module.out_channels > 1


def _role(layer: Layer) -> Literal["producer", "norm", "consumer"]:
    if isinstance(layer.module, SelectiveBatchNorm2d) and not layer.to_outputs:
        return "consumer"
    if isinstance(layer.module, Norm):
        return "norm"
    if isinstance(layer.module, nn.PReLU):
        return "consumer"  # it produces no channels: zeros stay zeros, whatever the slope
    return "producer" if layer.to_outputs else "consumer"
