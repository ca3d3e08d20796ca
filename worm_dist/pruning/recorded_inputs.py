"""Recorded inputs: the newest inputs of a network, recorded while it trains.

BatchNorm statistics are estimated from them, and a draw is rehearsed with them; so they are saved
in the engine's state, for a run that is resumed shortly before a draw.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import model_validator
from torch import Tensor, nn
from typing_extensions import Self

from ..backends.backend import not_compiled
from ..groups.nested import mapped, tensors_in
from ..schema import Schema

__all__ = [
    "CallSchema",
    "Norm",
    "RecordedCall",
    "RecordedInputs",
    "calls_from",
    "most_recorded_bytes",
    "plain_calls",
]

logger = logging.getLogger(__name__)

_LEAVES = (bool, int, float, str, type(None))

Norm = nn.modules.batchnorm._BatchNorm


class CallSchema(Schema):
    """Schema of one call in ``plain_calls``."""

    arguments: list[Any]
    on_cpu: list[bool]
    device: str
    dtype: str
    autocast: bool
    training_norms: list[str]
    copied: bool

    @model_validator(mode="after")
    def _check(self) -> Self:
        kinds = [type(part) for part in self.arguments]
        if kinds not in ([], [list, dict]):  # none where a run reads them from its data again
            raise ValueError("arguments are not a list and a dict")
        if any(type(name) is not str for name in dict(*self.arguments[1:])):
            raise ValueError("names of keyword arguments are not strings")
        num_tensors = len(list(tensors_in(self.arguments)))
        if len(self.on_cpu) != num_tensors:
            raise ValueError(f"on_cpu has {len(self.on_cpu)} items for {num_tensors} tensors")
        if not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise ValueError(f"dtype is {self.dtype[:50]!r}, which torch does not have")
        try:
            torch.device(self.device)
        except RuntimeError:
            raise ValueError(f"device is {self.device[:50]!r}, which torch does not have") from None
        return self


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One forward pass in training mode.

    Attributes:
        positional, keywords: the arguments, detached.
        device: the type of the network's device.
        dtype, autocast: the autocast dtype, and whether autocast was on.
        training_norms: names of the norms in training mode.
        versions: the tensors among the arguments with their version counters when they were
            recorded; empty if they are copies.
    """

    positional: tuple[Any, ...]
    keywords: Mapping[str, Any]
    device: str
    dtype: torch.dtype
    autocast: bool
    training_norms: frozenset[str] = frozenset()
    versions: tuple[tuple[Tensor, int], ...] = ()

    @property
    def is_intact(self) -> bool:
        """Whether no argument has been written to since."""
        return all(tensor._version == version for tensor, version in self.versions)

    @cached_property
    def num_bytes(self) -> int:
        """Size of the arguments."""
        return sum(tensor.nbytes for tensor in tensors_in((self.positional, self.keywords)))

    def run(self, network: nn.Module) -> Any:
        """The output of a network for copies of the arguments."""
        positional, keywords = mapped((self.positional, self.keywords), _copied)
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast):
            return network(*positional, **keywords)


class RecordedInputs:
    """A forward pre-hook that records the newest inputs.

    They are kept by reference as long as nothing writes to them.  A loop that copies every batch
    into one buffer, or a network that normalises its inputs in place, is detected one pass later;
    overwritten inputs are dropped, and from then on inputs are copied.

    As a hook of the network it is copied and pickled with it, for example into an AveragedModel; a
    copy records nothing.

    Args:
        num_calls: maximum number of recorded calls.
        most_bytes: maximum size of all of them in bytes; the newest is kept whatever its size.
        belongs_to_an_engine: False for a copy.

    Attributes:
        num_passes: number of passes so far.
    """

    def __init__(self, num_calls: int, most_bytes: int, belongs_to_an_engine: bool = True) -> None:
        self.belongs_to_an_engine = belongs_to_an_engine
        self._calls: deque[RecordedCall] = deque(maxlen=num_calls)
        self._most_bytes = most_bytes
        self._copies = False
        self.num_passes = 0
        self._record = torch.compiler.disable(self._record_call)

    @property
    def is_on(self) -> bool:
        """Whether inputs are recorded."""
        return self._calls.maxlen != 0

    @property
    def calls(self) -> list[RecordedCall]:
        """The recorded calls that are intact, oldest first."""
        return [call for call in self._calls if call.is_intact]

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._record(network, args, kwargs)

    def _record_call(
        self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if not network.training or not self.is_on:
            return
        self.num_passes += 1
        if _is_redirected(network):
            return
        arguments = mapped((args, kwargs), Tensor.detach)
        new_tensors = list(tensors_in(arguments))
        unaffected = self._not_overlapping(new_tensors)
        if len(unaffected) < len(self._calls):
            self._copies = True
            self.replace(unaffected)
        self._copies |= any(tensor.is_inference() for tensor in new_tensors)
        if self._copies:
            arguments = mapped(arguments, _copied)
            new_tensors = []
        positional, keywords = arguments
        device = next(network.parameters()).device.type
        self._calls.append(
            RecordedCall(
                positional,
                keywords,
                device,
                torch.get_autocast_dtype(device),
                torch.is_autocast_enabled(device),
                _training_norms(not_compiled(network)),
                tuple((tensor, tensor._version) for tensor in new_tensors),
            )
        )
        self._bound()

    def _not_overlapping(self, new_tensors: Sequence[Tensor]) -> list[RecordedCall]:
        """The intact calls that share no memory with these tensors: torch's version counters miss
        writes through numpy or ``data``."""
        addresses = {tensor.data_ptr() for tensor in new_tensors if tensor.numel()}
        return [
            call
            for call in self.calls
            if not any(tensor.data_ptr() in addresses for tensor, _ in call.versions)
        ]

    def _bound(self) -> None:
        num_bytes = sum(call.num_bytes for call in self._calls)
        while len(self._calls) > 1 and num_bytes > self._most_bytes:
            num_bytes -= self._calls.popleft().num_bytes

    def replace(self, calls: Sequence[RecordedCall]) -> None:
        """Replace the recorded calls.  If one is a copy, later ones are copied too, so that a
        resumed run does not lose a batch to detect the shared buffer again."""
        self._copies |= any(not call.versions for call in calls)
        self._calls.clear()
        self._calls.extend(calls)

    def __reduce__(self) -> tuple[type[RecordedInputs], tuple[int, int, bool]]:
        return RecordedInputs, (0, 0, False)


def _training_norms(network: nn.Module) -> frozenset[str]:
    """Names of the norms in training mode: of ``named_modules``, whose nested generators take
    several times as long, in every pass."""
    names: list[str] = []
    seen: set[nn.Module] = set()

    def visit(module: nn.Module, name: str) -> None:
        if module in seen:
            return
        seen.add(module)
        if module.training and isinstance(module, Norm):
            names.append(name)
        prefix = f"{name}." if name else ""
        for child_name, child in module._modules.items():
            if child is not None:
                visit(child, prefix + child_name)

    visit(network, "")
    return frozenset(names)


def _is_redirected(network: nn.Module) -> bool:
    """Whether the call runs another method than ``forward``: Lightning calls ``training_step``
    through the wrapper, whose arguments are a batch and its number."""
    return "_ForwardRedirection" in getattr(vars(network).get("forward"), "__qualname__", "")


def most_recorded_bytes(num_calls: int, most_bytes: int, bytes_of_a_call: int) -> int:
    """Bytes that ``RecordedInputs`` with these arguments keeps of inputs of one size."""
    return bytes_of_a_call * min(num_calls, max(1, most_bytes // max(1, bytes_of_a_call)))


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.detach().clone()


def plain_calls(calls: Sequence[RecordedCall]) -> list[dict[str, Any]] | None:
    """Calls as dicts, lists, tuples, numbers, strings and tensors; None, with a warning, if an
    argument is anything else."""
    plain = []
    for call in calls:
        on_cpu: list[bool] = []

        def detached(tensor: Tensor, on_cpu: list[bool] = on_cpu) -> Tensor:
            on_cpu.append(tensor.is_cpu)
            return tensor.detach()

        try:
            _require_plain([list(call.positional), dict(call.keywords)])
        except TypeError as error:
            logger.warning(
                "inputs that contain a %s are not saved in the engine's state; after a resume, "
                "BatchNorm statistics at a draw are estimated from new inputs only",
                error,
            )
            return None
        plain.append(
            {
                "arguments": mapped([list(call.positional), dict(call.keywords)], detached),
                "on_cpu": on_cpu,
                "device": call.device,
                "dtype": str(call.dtype).removeprefix("torch."),
                "autocast": call.autocast,
                "training_norms": sorted(call.training_norms),
                "copied": not call.versions,
            }
        )
    return plain


def calls_from(plain: Sequence[dict[str, Any]], device: torch.device) -> list[RecordedCall]:
    """The calls of ``plain_calls``, with tensors that were not on the CPU on this device."""
    calls: list[RecordedCall] = []
    for call in plain:
        on_cpu = iter(call["on_cpu"])

        def placed(tensor: Tensor, on_cpu: Any = on_cpu) -> Tensor:
            return tensor if next(on_cpu) else tensor.to(device)

        positional, keywords = mapped(call["arguments"], placed)
        tensors = [] if call["copied"] else tensors_in((positional, keywords))
        calls.append(
            RecordedCall(
                tuple(positional),
                keywords,
                call["device"],
                getattr(torch, call["dtype"]),
                call["autocast"],
                frozenset(call["training_norms"]),
                tuple((tensor, tensor._version) for tensor in tensors),
            )
        )
    return calls


def _require_plain(value: Any) -> None:
    """Refuse values that ``plain_calls`` cannot represent.

    Raises:
        TypeError: naming the type of the value.
    """
    kind = type(value)
    if kind in (list, tuple):
        for part in value:
            _require_plain(part)
    elif kind is dict and all(type(key) in (str, int) for key in value):
        for part in value.values():
            _require_plain(part)
    elif not isinstance(value, Tensor) and kind not in _LEAVES:
        raise TypeError(kind.__name__)
