"""Resuming: trains once without a break, and again from what was saved on the way.

Everything that can be seen of a training is compared bit for bit: weights, statistics, optimizer,
verdicts, bytes of every step, and the engine's own state at the end.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import worm_dist
from worm_dist import Engine
from worm_dist.checkpoint.state_file import pack

__all__ = ["Course", "Trainee", "differences", "through_a_file", "transformer"]


class Trainee(Protocol):
    """A network in training."""

    engine: Engine

    def step(self, number: int) -> None:
        """One optimizer step on the ``number``-th batch."""

    def save(self) -> Any:
        """Collective."""

    def load(self, state: Any) -> None:
        """Into a new one.  Collective."""


@dataclass(frozen=True)
class Course:
    """What happens when.

    Attributes:
        num_steps: of the whole training.
        events: before these steps; each is given the trainee.
        saved_at: numbers of steps before which, and before whose event, a state is saved.
    """

    num_steps: int
    events: Mapping[int, Callable[[Any], Any]]
    saved_at: Sequence[int]

    def resumed(self, build: Callable[[], Trainee]) -> list[str]:
        """What differs if the training is broken off before every step of ``saved_at``."""
        whole = build()
        seen, _ = self._train(whole, 0, [])
        end = whole.save()
        saving = build()
        seen_saving, states = self._train(saving, 0, self.saved_at)
        found = list(differences((seen, end), (seen_saving, saving.save()), "saving changes"))
        for number, state in states.items():
            again, where = build(), f"from step {number}"
            again.load(through_a_file(state))
            found += differences(state, again.save(), f"{where}, saved at once")
            seen_again, states_again = self._train(again, number, [number + 1])
            if number + 1 in states:  # then it could be broken off again
                pair = states[number + 1], states_again[number + 1]
                found += differences(*pair, f"{where}, saved after a step")
            found += differences((seen[number:], end), (seen_again, again.save()), where)
        return found

    def _train(
        self, trainee: Trainee, first: int, saved_at: Sequence[int]
    ) -> tuple[list[Any], dict[int, Any]]:
        """What is seen of every step, and the states."""
        seen, states = [], {}
        for number in range(first, self.num_steps):
            if number in saved_at:
                states[number] = through_a_file(trainee.save())
            verdict = self.events.get(number, _nothing)(trainee)
            trainee.step(number)
            seen.append((number, str(verdict), vars(trainee.engine.traffic).copy()))
        return seen, states


def _nothing(trainee: Trainee) -> None:
    pass


def through_a_file(state: Any) -> Any:
    """As it comes back; both ways to write it must take it."""
    pack(state)
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def differences(one: Any, other: Any, where: str) -> Iterator[str]:
    """Between two nested states, to the bit."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        if one.dtype != other.dtype or not torch.equal(_bits(one), _bits(other)):
            yield f"{where}: {_shown(one)} is not {_shown(other)}"
    elif isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {**one, **other}:
            if key not in one or key not in other:
                yield f"{where}: {key} is in one alone"
            else:
                yield from differences(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            yield f"{where}: {len(one)} items and {len(other)}"
        for number, pair in enumerate(zip(one, other)):
            yield from differences(*pair, f"{where}.{number}")
    elif one != other:
        yield f"{where}: {one!r} is not {other!r}"


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.flatten()[:3].tolist()}"


def transformer() -> nn.Module:
    """A small one for images of 8 by 8, with gates: four heads, twelve neurons."""
    network: nn.Module = VisionTransformer(
        image_size=8, patch_size=4, num_layers=1, num_heads=4, hidden_dim=16, mlp_dim=12
    )
    return worm_dist.add_gates(network)
