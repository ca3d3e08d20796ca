from __future__ import annotations

import pytest
import torch
from torch import nn

from worm_dist import ConfigError
from worm_dist.planning.timing import affordable_batch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU takes the whole batch")


class _Slow(nn.Module):
    """A network whose passes take half a second as soon as the batch has eight samples."""

    def __init__(self, clock: list[float]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self._clock = clock

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self._clock[0] += 0.5 if len(inputs) >= 8 else 0.0
        output: torch.Tensor = self.linear(inputs.flatten(1))
        return output


@pytest.mark.parametrize(("wanted", "expected"), [(64, 8), (5, 5), (1, 1)])
def test_a_batch_grows_until_a_pass_takes_long_enough(
    monkeypatch: pytest.MonkeyPatch, wanted: int, expected: int
) -> None:
    clock = [0.0]
    monkeypatch.setattr("worm_dist.planning.timing.time.perf_counter", lambda: clock[0])
    assert affordable_batch(_Slow(clock), (1, 2, 2), wanted, "fp32") == expected


def test_a_batch_that_cannot_be_trained_on_is_refused() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 2), nn.BatchNorm1d(2))
    with pytest.raises(ConfigError, match="--batch: the network cannot be trained on batches of 1"):
        affordable_batch(network, (1, 2, 2), 1, "fp32")
