"""Calls: the newest inputs of a network, remembered while it trains.

Statistics are estimated anew from them, and a draw is rehearsed with them; so a run that is resumed
shortly before a draw needs them too.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..groups.nested import mapped, tensors_in

__all__ = ["Norm", "RecordedCall", "RecordedInputs", "calls_from", "plain_calls"]

logger = logging.getLogger(__name__)

_LEAVES = (bool, int, float, str, type(None))

Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True, eq=False)
class RecordedCall:
    """One forward pass in training mode.

    Attributes:
        positional, keywords: arguments, without a graph.
        device, dtype, autocast: type of the device, and whether and how it computed in mixed
            precision.
        training_norms: names of the norms that were in training mode.
        versions: of the tensors among the arguments when they were remembered; empty if they are
            copies, which nobody else can change.
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
        """Nobody has written to the arguments since."""
        return all(tensor._version == version for tensor, version in self.versions)

    def run(self, network: nn.Module) -> Any:
        """What a network puts out for the same arguments, which it may write to."""
        positional, keywords = mapped((self.positional, self.keywords), _copied)
        with torch.autocast(self.device, dtype=self.dtype, enabled=self.autocast):
            return network(*positional, **keywords)


class RecordedInputs:
    """A forward pre-hook that keeps the newest inputs.

    They are kept by reference as long as nobody writes to them.  A loop that copies every batch
    into one buffer, or a network that normalises its inputs in place, is noticed one pass later;
    what has been written over is forgotten, and from then on they are copied.

    It belongs to the network and so goes where its copies go, to an AveragedModel or a file; a copy
    of it remembers nothing and knows nothing of the training.

    Args:
        num_calls: how many to keep.
        most_bytes: that all of them may take; the newest is kept whatever it takes.
        belongs_to_an_engine: it is no copy.
    """

    def __init__(self, num_calls: int, most_bytes: int, belongs_to_an_engine: bool = True) -> None:
        self.belongs_to_an_engine = belongs_to_an_engine
        self._calls: deque[RecordedCall] = deque(maxlen=num_calls)
        self._most_bytes = most_bytes
        self._copies = False

    @property
    def is_on(self) -> bool:
        """Whether anything is remembered."""
        return self._calls.maxlen != 0

    @property
    def calls(self) -> list[RecordedCall]:
        """Oldest first; none that has been written to since."""
        return [call for call in self._calls if call.is_intact]

    def __call__(self, network: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not network.training or not self.is_on:
            return
        given = list(tensors_in((args, kwargs)))
        apart = self._apart_from(given)
        self._copies |= len(apart) < len(self._calls) or any(t.is_inference() for t in given)
        self.replace(apart)
        positional, keywords = mapped((args, kwargs), _copied if self._copies else Tensor.detach)
        kept = [] if self._copies else list(tensors_in((positional, keywords)))
        device = next(network.parameters()).device.type
        self._calls.append(
            RecordedCall(
                positional,
                keywords,
                device,
                torch.get_autocast_dtype(device),
                torch.is_autocast_enabled(device),
                frozenset(
                    name
                    for name, module in network.named_modules()
                    if isinstance(module, Norm) and module.training
                ),
                tuple((tensor, tensor._version) for tensor in kept),
            )
        )
        self._bound()

    def _apart_from(self, given: Sequence[Tensor]) -> list[RecordedCall]:
        """The calls that nobody has written to, and that do not lie where these tensors do: torch
        does not count what is written by way of numpy or of ``data``."""
        places = {tensor.data_ptr() for tensor in given if tensor.numel()}
        return [
            call
            for call in self.calls
            if not any(tensor.data_ptr() in places for tensor, _ in call.versions)
        ]

    def _bound(self) -> None:
        sizes = [
            sum(tensor.nbytes for tensor in tensors_in((call.positional, call.keywords)))
            for call in self._calls
        ]
        while len(sizes) > 1 and sum(sizes) > self._most_bytes:
            self._calls.popleft()
            sizes.pop(0)

    def replace(self, calls: Sequence[RecordedCall]) -> None:
        """As if these had been the newest calls.  After copies come copies: a run that is resumed
        need not find out once more, by losing a batch, that all lie in one place."""
        self._copies |= any(not call.versions for call in calls)
        self._calls.clear()
        self._calls.extend(calls)

    def __reduce__(self) -> tuple[type[RecordedInputs], tuple[int, int, bool]]:
        return RecordedInputs, (0, 0, False)


def _copied(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False):
        return tensor.detach().clone()


def plain_calls(calls: Sequence[RecordedCall]) -> list[dict[str, Any]] | None:
    """Dicts, lists, tuples, numbers, strings and tensors; None, with a warning, if the network is
    called with anything else."""
    plain = []
    for call in calls:
        on_cpu: list[bool] = []

        def noted(tensor: Tensor, on_cpu: list[bool] = on_cpu) -> Tensor:
            on_cpu.append(tensor.is_cpu)
            return tensor.detach()

        try:
            _require_plain([list(call.positional), dict(call.keywords)])
        except TypeError as error:
            logger.warning(
                "inputs that hold a %s are not in the engine's state: resumed, it has to see "
                "others before BatchNorm statistics can be estimated at a draw",
                error,
            )
            return None
        plain.append(
            {
                "arguments": mapped([list(call.positional), dict(call.keywords)], noted),
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
    """The calls again, with the tensors on this device that were not on the CPU."""
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
    """Raises:
    TypeError: naming the type of what is not plain.
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
