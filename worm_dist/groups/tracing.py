"""Tracing: from a network to its channel groups."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from ..errors import ConfigError
from .attention import Attention, find_attentions, weight_of
from .channel_flow import Layer
from .channel_groups import ChannelGroup, Groups, Member
from .copying import scratch
from .dependency import Coupled, coupled_layers
from .forward import run, undisturbed
from .grouped_conv import interleaved
from .reachability import reasons_of_unreached
from .training_mode import called_modules, deciding_modules, in_training

__all__ = ["find_groups"]

Norm = nn.modules.batchnorm._BatchNorm
Conv = nn.modules.conv._ConvNd
_PUT_OUT = "its channels are what the network puts out"
_MADE_LATE = (
    "model: its parameter {name} is made, or gets another name, by its first forward pass; run it "
    "once, then wrap it, make the optimizer and attach"
)
_OTHER_NORMS = (nn.GroupNorm, nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def find_groups(network: nn.Module, example_inputs: Any) -> Groups:
    """The channel groups of a network: channels of convolutions, neurons of linear layers, heads
    of attentions; maybe none.  It is a copy that is looked at.

    Args:
        network: not wrapped.
        example_inputs: one input, a tuple of inputs, or a dict of keyword inputs, on the
            network's device.  They are run through the network, in eval mode.

    Raises:
        ConfigError: the network cannot be run with these inputs, or not be copied; parts of it are
            TorchScript, were made in inference mode, or are made by the first forward pass.
    """
    _require_modules(network)
    with scratch(network) as apart:
        groups = _groups(apart, example_inputs)
        _require_parameters_of(apart, network)
    return groups


def _groups(network: nn.Module, example_inputs: Any) -> Groups:
    _require_runs(network, example_inputs)
    attentions, dense = find_attentions(network)
    opaque = [network.get_submodule(attention.module) for attention in attentions]
    sets, untraced = coupled_layers(network, example_inputs, opaque)
    reading = _Reading(network)
    dense |= {reading.names[module]: f"not traced: {why}" for module, why in untraced.items()}
    found = [_head_group(attention, network) for attention in attentions]
    for coupled in sets:
        group = reading.group_of(coupled)
        if isinstance(group, ChannelGroup):
            found.append(group)
        else:
            dense |= group
    _name_the_rest(network, found, dense)
    _name_the_uncalled(network, sets, [*opaque, *untraced], dense)
    order = {name: place for place, (name, _) in enumerate(network.named_modules())}
    groups = Groups(sorted(found, key=lambda group: order[group.name]), dense)
    reached = _reached(network, example_inputs)
    if reached == {network} and any(True for _ in network.children()):
        raise ConfigError(
            "model: run as a copy, it calls none of its own modules: its forward is bound to the "
            "modules of the network that it was copied from; define it in the class"
        )
    reached |= {module for outer in opaque for module in outer.modules()}
    return groups.without(reasons_of_unreached(network, reached, groups))


def _reached(network: nn.Module, example_inputs: Any) -> set[nn.Module]:
    """The modules that run, in eval mode or while the network trains."""
    with undisturbed(network):
        reached = called_modules(network, example_inputs)
        deciding = deciding_modules(network, example_inputs)
        if deciding:
            with in_training(network, deciding):
                reached |= called_modules(network, example_inputs)
    return reached


def _require_modules(network: nn.Module) -> None:
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ConfigError(
                f"model: {name or 'it'} is TorchScript ({module.original_name}), which cannot be "
                "looked into; give the module that torch.jit.script was given"
            )
    for name, parameter in network.named_parameters():
        if is_lazy(parameter):
            raise ConfigError(_MADE_LATE.format(name=name))
        if parameter.is_inference():
            raise ConfigError(
                f"model: parameter {name} was made in inference mode and cannot be trained; build "
                "the network outside of torch.inference_mode"
            )


def _require_parameters_of(apart: nn.Module, network: nn.Module) -> None:
    """A copy that has run must have the network's parameters."""
    late = {name for name, _ in apart.named_parameters()} ^ {
        name for name, _ in network.named_parameters()
    }
    if late:
        raise ConfigError(_MADE_LATE.format(name=min(late)))


def _require_runs(network: nn.Module, example_inputs: Any) -> None:
    try:
        with undisturbed(network), torch.no_grad():
            run(network, example_inputs)
    except Exception as error:  # whatever a foreign forward may raise
        raise ConfigError(
            f"model: it does not run on the example inputs: {type(error).__name__}: {error}"
            f"{_hint(example_inputs)}"
        ) from error


def _hint(example_inputs: Any) -> str:
    """What is most often meant."""
    if isinstance(example_inputs, list):
        return ". A list is taken for several inputs; one input that is a list is ([...],)"
    if isinstance(example_inputs, Mapping):
        return ". A dict is taken for keyword inputs; one input that is a dict is ({...},)"
    return ""


class _Reading:
    """Makes groups of the coupled layers of one network."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        # A parameter of its own is looked up too, and comes last.
        self._order: dict[object, int] = {
            module: place for place, module in enumerate(network.modules())
        }
        self.names: dict[Any, str] = {module: name for name, module in network.named_modules()}
        self._shared = _shared(network)
        self._weights = _weights(network)
        self._grouped = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, Conv) and module.groups > 1 and not _is_depthwise(module)
        }
        self._taken: set[str] = set()
        self._positions: dict[Any, Tensor] = {}

    def group_of(self, coupled: Coupled) -> ChannelGroup | dict[str, str]:
        """The group, or by module why it is left dense."""
        layers = sorted(
            coupled.stream.layers,
            key=lambda layer: self._order.get(layer.module, len(self._order)),
        )
        found = self._why_dense(coupled, layers) or self._group(layers)
        if isinstance(found, ChannelGroup):
            return found
        norms = [self.names[module] for module, *_ in layers if isinstance(module, Norm)]
        return dict.fromkeys(norms or self._worth_a_word(layers, found), found)

    def _worth_a_word(self, layers: Sequence[Layer], reason: str) -> list[str]:
        """Of layers without a norm the one to be spoken of: nobody expects a head to be cut, and
        norms of other kinds speak for themselves."""
        if reason == _PUT_OUT or any(isinstance(layer.module, _OTHER_NORMS) for layer in layers):
            return []
        makers = (layer.module for layer in layers if layer.to_outputs)
        return [
            self.names[made_by] for made_by in makers if isinstance(made_by, (Conv, nn.Linear))
        ][:1]

    def _group(self, layers: Sequence[Layer]) -> ChannelGroup | str:
        """The group, or why there is none."""
        members = interleaved([self._member(layer) for layer in layers], self._grouped)
        if isinstance(members, str):
            return members
        makers = [member for member in members if self._makes_channels(member)]
        name = next((maker.module for maker in makers if maker.module not in self._taken), None)
        if name is None:
            return f"{makers[0].module} makes channels of another group too"
        self._taken.add(name)
        order = makers[0].positions[:, 0].argsort()
        if len(order) == 1:
            return "none of its channels can be dropped without all others"
        members = [self._sharing(member, member.positions[order]) for member in members]
        gates = [
            gate
            for member in members
            if member.role == "consumer"
            for gate in _gate_of(self._network, member.module)
        ]
        depthwise = sum(member.role == "producer" for member in members) - len(makers)
        norms = sum(member.role == "norm" for member in members) - depthwise
        # A product with a squeeze-and-excitation's factors is no sum of what two norms put out.
        tied = len(makers) > 1 and (norms > 1 or norms + depthwise == 0)
        return ChannelGroup(name, len(order), (*members, *gates), tied)

    def _makes_channels(self, member: Member) -> bool:
        """A depthwise convolution only passes them on."""
        module = self._network.get_submodule(member.module)
        return member.role == "producer" and not _is_depthwise(module)

    def _sharing(self, member: Member, positions: Tensor) -> Member:
        """The member with these positions; equal ones are one tensor, or a network of many layers
        would hold thousands of copies of 0, 1, 2, ..."""
        key = (positions.shape, positions.numpy().tobytes())
        return dataclasses.replace(member, positions=self._positions.setdefault(key, positions))

    def _why_dense(self, coupled: Coupled, layers: Sequence[Layer]) -> str | None:
        stream = coupled.stream
        if stream.leaves and not coupled.whole:
            return "its channels go where the network could not be traced"
        if stream.leaves or not any(_role(layer) == "consumer" for layer in layers):
            return _PUT_OUT
        for layer in layers:
            module: Any = layer.module
            name = self.names.get(module, "a bare parameter")
            if name not in self._weights and not _is_bare_norm(module):
                return f"coupled with {name} ({type(module).__name__}), which is not understood"
            # Tracing made every parameter train for a moment; by now that is undone.
            if isinstance(module, Norm) and (
                module.weight is None or not module.weight.requires_grad
            ):
                return f"{name} has no scale that trains"
        if stream.strays:
            return "what happens to its channels between the layers is not understood"
        # Cut for one layer, a parameter would no longer be the other's.
        for parameter in (p for layer in layers for p, _ in self._member(layer).parameters):
            if parameter in self._shared:
                return f"{parameter} is shared with another layer"
        return None

    def _member(self, layer: Layer) -> Member:
        module: Any = layer.module
        name, role = self.names[module], _role(layer)
        by_channel = torch.argsort(torch.tensor(layer.channels), stable=True)
        positions = torch.tensor(layer.places)[by_channel].view(len(set(layer.channels)), -1)
        # A transposed convolution has its inputs first; a depthwise one a row for each channel, and
        # PReLU nothing else.
        turned = isinstance(module, Conv) and module.transposed and not _is_depthwise(module)
        turned |= isinstance(module, nn.PReLU)
        parameters = [(self._weights[name], int(turned != (role == "consumer")))]
        if role != "consumer" and getattr(module, "bias", None) is not None:
            parameters.append((f"{name}.bias" if name else "bias", 0))
        return Member(name, role, positions, tuple(parameters))


def _head_group(attention: Attention, network: nn.Module) -> ChannelGroup:
    members = [
        Member(attention.module, "producer", makers.positions, makers.parameters)
        for makers in attention.makers
    ]
    weight = (weight_of(network, attention.reader), 1)
    members.append(Member(attention.reader, "consumer", attention.columns, (weight,)))
    members += _gate_of(network, attention.reader)
    return ChannelGroup(attention.module, attention.num_heads, tuple(members))


def _gate_of(network: nn.Module, reader: str) -> list[Member]:
    """The gate in front of a layer, if it has one."""
    gate = "parametrizations.weight.0"
    own = dict(network.get_submodule(reader).named_parameters())
    scale = own.get(f"{gate}.scale")
    if scale is None:
        return []
    places = torch.arange(scale.numel())[:, None]
    return [Member(f"{reader}.{gate}", "gate", places, ((f"{reader}.{gate}.scale", 0),))]


def _weights(network: nn.Module) -> dict[str, str]:
    """The weight of every layer that can be cut: a parameter, or one that our gates scale; what
    other parametrizations compute is not understood."""
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
            kind = type(module).__name__
            dense.setdefault(name, f"{kind}: of all norms only BatchNorm's channels are dropped")


def _name_the_uncalled(
    network: nn.Module,
    sets: Sequence[Coupled],
    opaque: Sequence[nn.Module],
    dense: dict[str, str],
) -> None:
    """Nor a layer that the network does not run, or runs behind its back."""
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
    if isinstance(layer.module, Norm):
        return "norm"
    if isinstance(layer.module, nn.PReLU):
        return "consumer"  # it makes nothing: what is zero stays zero, whatever the slope
    return "producer" if layer.to_outputs else "consumer"
