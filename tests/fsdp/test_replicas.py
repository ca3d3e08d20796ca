"""Two-dimensional meshes: how sums over replicas are scaled, and where they are."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import worm_dist
from tests.fsdp.masked import masked
from tests.fsdp.row import ROWS
from tests.fsdp.trainee import full, network_of
from tests.nets import random_images
from tests.oracles import mask_dropping
from tests.ranks import Ranks
from tests.settings import at_once
from worm_dist import BackendError, WormConfig, WormError
from worm_dist.comm_hooks.fsdp_replicas import Replicas

_NAMES = ("replicas", "shards")

_PASSES = 2


class _Training:
    """A network with three frozen channels, whose first layer has sums in double precision.

    Args:
        mesh: the mesh.
        reduce_dtype: precision of the other sums.
        frozen_in_pass: the pass of the first step before which channels freeze.
    """

    def __init__(
        self, mesh: DeviceMesh, reduce_dtype: torch.dtype | None = None, frozen_in_pass: int = 0
    ) -> None:
        network: Any = network_of(ROWS["replicas"])
        fully_shard(network.conv1, mesh=mesh, mp_policy=MixedPrecisionPolicy(None, torch.float64))
        fully_shard(network, mesh=mesh, mp_policy=MixedPrecisionPolicy(None, reduce_dtype))
        self.network = network
        self._optimizer = torch.optim.SGD(network.parameters(), 0.05)
        config = WormConfig(
            search={"every": "1ba", "l1": 0.0},
            truncation={"frozen_weights": "hold", **at_once(2)},
        )
        self.engine = worm_dist.attach(
            network, self._optimizer, config, example_inputs=random_images(1)
        )
        self._frozen_in_pass = frozen_in_pass

    def gradients(self) -> Tensor:
        """The gradients of a step, all but the last of whose passes leave partial sums."""
        for number in range(_PASSES):
            if number == self._frozen_in_pass and self.engine.phase == "search":
                self.engine.truncate(mask_dropping(self.engine.groups, 0, 3, 9))
            self.network.set_requires_all_reduce(number == _PASSES - 1)
            images = random_images(4, seed=10 * number + dist.get_rank())
            self.network(images).square().mean().backward()
        return torch.cat([full(p.grad).flatten() for p in self.network.parameters()])

    def step(self) -> Tensor:
        """The weights after a step."""
        self.gradients()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return torch.cat([full(p).flatten() for p in self.network.parameters()])


def _pair() -> tuple[_Training, _Training]:
    """A packed training, and one with a masked dense reduction."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=_NAMES)
    packed = _Training(mesh)
    with masked():
        return packed, _Training(mesh)


def _scale(network: Any, sums: bool, factor: float) -> None:
    for module in (network.conv1, network):
        module.set_force_sum_reduction_for_comms(sums)
        if factor:
            module.set_gradient_divide_factor(factor)


@contextmanager
def _premultiplied() -> Iterator[list[Tensor]]:
    """Reduce-scatters with PREMUL_SUM over gloo, which has not got it, as NCCL defines it: every
    rank multiplies what it sends.

    Yields:
        What has been sent so.
    """
    reduce_scatter = dist.reduce_scatter_single
    sent: list[Tensor] = []

    def multiplied(output: Tensor, input: Tensor, op: Any, **arguments: Any) -> Any:
        if op == dist.ReduceOp.PREMUL_SUM:
            _, factor = op.__getstate__()
            input, op = input * factor, dist.ReduceOp.SUM
            sent.append(input)
        return reduce_scatter(output, input, op=op, **arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dist, "reduce_scatter_single", multiplied)
        yield sent


def _scaled() -> list[bool]:
    """Whether weights are those of a masked dense reduction, after steps scaled differently."""
    packed, dense = _pair()
    found = []
    for sums, factor in ((False, 0.0), (True, 0.0), (True, 8.0), (False, 2.0)):
        _scale(packed.network, sums, factor)
        _scale(dense.network, sums, factor)
        found.append(torch.equal(packed.step(), dense.step()))
    return found


def test_sums_over_replicas_are_scaled_as_by_torch(ranks: Ranks) -> None:
    assert ranks(4, _scaled) == [[True] * 4] * 4


def _scaled_before_the_sum() -> list[bool]:
    """Whether weights are those of a masked dense reduction, and whether both were sent so."""
    packed, dense = _pair()
    found = []
    for factor in (8.0, 3.0):
        weights = []
        for training in (packed, dense):
            _scale(training.network, False, factor)
            with _premultiplied() as sent:
                weights.append(training.step())
            found.append(bool(sent))
        found.append(torch.equal(*weights))
    return found


def test_scaled_before_the_reduce_scatter_replicas_are_summed(ranks: Ranks) -> None:
    """``set_gradient_divide_factor`` scales what is reduce-scattered (PREMUL_SUM); the sums over
    replicas must not be scaled again."""
    assert ranks(4, _scaled_before_the_sum) == [[True] * 6] * 4


def _refused_by_gloo() -> list[str]:
    said = []
    for training in _pair():
        _scale(training.network, False, 8.0)
        try:
            training.step()
        except RuntimeError as error:
            said.append(str(error).splitlines()[0])
    return said


def test_gloo_refuses_to_scale_before_the_sum_packed_or_not(ranks: Ranks) -> None:
    for packed, dense in ranks(4, _refused_by_gloo):
        assert packed == dense and "PREMUL_SUM" in packed


def _frozen_between_passes() -> bool:
    """Whether gradients are those of a masked dense reduction if channels freeze before the last
    pass of a step."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=_NAMES)
    packed = _Training(mesh, frozen_in_pass=_PASSES - 1)
    with masked():
        dense = _Training(mesh, frozen_in_pass=_PASSES - 1)
        right = dense.gradients()
    return torch.equal(packed.gradients(), right)


def test_partial_sums_of_channels_that_freeze_then_are_dropped(ranks: Ranks) -> None:
    """A pass before the freeze has left live gradients of slices that are frozen since."""
    assert ranks(4, _frozen_between_passes) == [True] * 4


def _are_rows_alive() -> list[bool]:
    """Whether the rows before one are still in memory while it is averaged, in one pass."""
    rows: list[weakref.ref[Tensor]] = []
    alive = []
    all_reduce = Replicas.all_reduce

    def watched(self: Replicas, row: Tensor, *arguments: Any) -> None:
        alive.append(all(earlier() is not None for earlier in rows))
        rows.append(weakref.ref(row))
        all_reduce(self, row, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Replicas, "all_reduce", watched)
        mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=_NAMES)
        _Training(mesh, reduce_dtype=torch.bfloat16).step()
    assert not any(row() is not None for row in rows), "kept beyond the pass"
    return alive


def test_rows_outlive_the_sums_over_replicas(ranks: Ranks) -> None:
    """A row in bf16 is not part of the gradients.  Freed at once, its memory could be written on
    the stream of reduce-scatters while the stream of all-reduces still reads it."""
    for alive in ranks(2, _are_rows_alive):
        assert alive == [True, True]


def _of_replicas_that_differ() -> list[str]:
    """What a check says after one rank's scale has changed, and after it is not a number."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=_NAMES)
    training, said = _Training(mesh), []
    for value in (5.0, torch.nan):
        if dist.get_rank() == 3:
            training.network.bn0.weight.to_local().detach()[0] = value
        training.step()
        try:
            training.engine.check()
        except WormError as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_a_replica_that_differs_stops_all_ranks(ranks: Ranks) -> None:
    for different, not_finite in ranks(4, _of_replicas_that_differ):
        assert different.startswith("DivergenceError") and "rank 2, 3 differs" in different
        assert not_finite.startswith("NonFiniteError")


def _over_two_of_three() -> str:
    mesh = DeviceMesh("cpu", torch.arange(2).view(1, 2), mesh_dim_names=_NAMES)
    if dist.get_rank() < 2:
        try:
            _Training(mesh)
        except BackendError as error:
            return str(error)
    return ""


def test_a_mesh_over_some_of_the_ranks_is_refused(ranks: Ranks) -> None:
    """It needs a process group of these ranks, which all ranks would have to create: later groups
    of all ranks hung, because torch numbers groups by how many a rank has created."""
    first, second, other = ranks(3, _over_two_of_three)
    assert first == second and "has 2 of 3 ranks" in first and not other
