"""The buckets of an estimate are those that DDP makes."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.ranks import Ranks
from worm_dist.planning.buckets import buckets_of
from worm_dist.planning.step_time import Collective, in_backward


def _network() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(1000, 2000), nn.Linear(2000, 4000), nn.Linear(4000, 100), nn.Linear(100, 2600)
    )


def _bytes_of_ddps_buckets() -> list[int]:
    model = DistributedDataParallel(_network())
    sizes: list[int] = []

    def seen(state: None, bucket):  # type: ignore[no-untyped-def]
        sizes.append(bucket.buffer().nbytes)
        done = torch.futures.Future()  # type: ignore[var-annotated]
        done.set_result(bucket.buffer())
        return done

    model.register_comm_hook(None, seen)
    for _ in range(2):  # DDP rebuilds its buckets after the first pass
        sizes.clear()
        model(torch.randn(2, 1000)).sum().backward()
    return sizes


def test_they_have_the_sizes_of_ddps(ranks: Ranks) -> None:
    network = _network()
    every = {name: p.nbytes for name, p in network.named_parameters()}
    buckets = buckets_of(network, every, {})
    assert len(buckets) == 3
    for sizes in ranks(2, _bytes_of_ddps_buckets):
        assert sizes == [bucket.payload_bytes for bucket in buckets]


def test_they_are_ready_by_the_share_of_the_operations() -> None:
    network = _network()
    sent = dict.fromkeys(dict(network.named_parameters()), 1)
    flops = {"": 0, "0": 10, "1": 20, "2": 30, "3": 40}
    first, second, third = buckets_of(network, sent, flops)
    # The first has the last layer; the second the two before it; the third the first layer.
    assert first == Collective("all-reduce", 2, in_backward(0.4))
    assert second.ready == in_backward(0.9)
    assert third.ready == 1.0
    assert first.payload_bytes + second.payload_bytes + third.payload_bytes == 8
