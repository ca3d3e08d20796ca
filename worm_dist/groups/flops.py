"""Counts the floating point operations (FLOPs) of a network and of each of its modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from .copying import copied
from .forward import run, undisturbed
from .gates import fold_gates, gates_of

__all__ = ["Operation", "count_flops", "count_flops_by_module", "count_flops_by_operation"]


class Operation(NamedTuple):
    """Where operations are computed.

    Attributes:
        module: the name of the innermost module that runs.
        parameter: the name of the parameter that is an operand, in the network without gates; None
            if none is, as in the products of an attention.
    """

    module: str
    parameter: str | None


def count_flops(network: nn.Module, inputs: Any) -> int:
    """Count the FLOPs of one forward pass; a multiply and an add count as two.

    Args:
        network: the network, run in eval mode.
        inputs: inputs as for ``forward.run``, with a batch size of one for the FLOPs of one sample.
    """
    with _counter(network) as counter:
        run(network, inputs)
    return int(counter.get_total_flops())


def count_flops_by_module(network: nn.Module, inputs: Any) -> dict[str, int]:
    """Count the FLOPs of each module by its name, without those of its submodules.

    Args:
        network: the network; a copy of it is run.
        inputs: as for ``count_flops``.
    """
    counts = {name: 0 for name, _ in network.named_modules()}
    for (module, parameter), flops in count_flops_by_operation(network, inputs).items():
        # torch's attention uses its output projection's weight without calling the module.
        counts[module if parameter is None else parameter.rpartition(".")[0]] += flops
    return counts


def count_flops_by_operation(network: nn.Module, inputs: Any) -> Mapping[Operation, int]:
    """Count the FLOPs by what computes them.

    Args:
        network: the network; a copy of it, with its gates folded, is run.
        inputs: as for ``count_flops``.

    Raises:
        ConfigError: a gated layer has another parametrization too.
    """
    network = copied(network)
    if gates_of(network):
        fold_gates(network)
    running: list[str] = []

    def begin(name: str) -> Callable[..., None]:
        return lambda *_: running.append(name)

    def end(*_: object) -> None:
        running.pop()

    with _counter(network) as counter, _Recorder(network, counter, running) as recorder:
        for name, module in network.named_modules():
            module.register_forward_pre_hook(begin(name))
            module.register_forward_hook(end)
        run(network, inputs)
    counts: Mapping[Operation, int] = recorder.counts
    return counts


class _Recorder(TorchDispatchMode):
    """Attributes what a counter around it counts."""

    def __init__(self, network: nn.Module, counter: FlopCounterMode, running: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[Operation] = Counter()
        self._counter = counter
        self._running = running
        self._names = {_memory(p): name for name, p in network.named_parameters() if p.dim() > 1}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before = self._counter.get_total_flops()
        output = function(*args, **(kwargs or {}))
        flops = int(self._counter.get_total_flops()) - before
        if flops:
            operands = (self._names.get(_memory(a)) for a in args if isinstance(a, Tensor))
            parameter = next((name for name in operands if name is not None), None)
            self.counts[Operation(self._running[-1], parameter)] += flops
        return output


def _memory(tensor: Tensor) -> int:
    """Return the address of a tensor's memory, which a parameter shares with its views only."""
    return tensor.untyped_storage().data_ptr()


@contextmanager
def _counter(network: nn.Module) -> Iterator[FlopCounterMode]:
    # The counter sees neither torch's fast path for transformers nor, on some devices, fused
    # attention; matrix products it sees on all.
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), undisturbed(network), sdpa_kernel(SDPBackend.MATH), counter:
        yield counter
