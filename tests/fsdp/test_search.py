"""A whole run under FSDP2, beside the same under DistributedDataParallel: search to ticket."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD

import worm_dist
from tests.fsdp.trainee import full
from tests.nets import Residual, random_images, randomise
from tests.ranks import Ranks
from worm_dist import WormConfig

_NUM_STEPS = 40


def _score(network: nn.Module, group: Any) -> Tensor:
    """By the filters that write a channel."""
    producer = next(member for member in group.members if member.role == "producer")
    weight = network.get_parameter(producer.parameters[0][0])
    return weight.detach().abs().flatten(1).sum(dim=1)[: group.num_channels]


def _run(
    is_sharded: bool, folder: str, score: Any, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    torch.manual_seed(0)
    network = Residual()
    randomise(network, seed=3)
    network.to(dtype)
    model: Any = network
    if is_sharded:
        fully_shard(network.conv1)
        fully_shard(network)
    else:
        model = DistributedDataParallel(network)
    optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
    config = WormConfig(
        search={"every": "4ba", "l1": 1e-3, "prune_ratio": 0.4, "window": 2},
        truncation={"removal": {"duration": "12ba", "fade_steps": 3, "stage": 0.3}},
        ticket={"recalibrate_batches": 2},
    )
    engine = worm_dist.attach(
        model,
        optimizer,
        config,
        example_inputs=random_images(1).to(dtype),
        total_steps=_NUM_STEPS,
        score=score,
    )
    seen = []
    for number in range(_NUM_STEPS):
        images = random_images(4, seed=10 * number + dist.get_rank())
        logits = engine.model(images.to(dtype))
        loss = nn.functional.cross_entropy(logits, torch.arange(4)) + engine.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if engine.is_due:
            with torch.no_grad():  # after which torch leaves full weights in the network
                engine.model(images.to(dtype))
            verdict = engine.check()
            seen.append((number, verdict.phase.value, verdict.stage, verdict.ticket))
            if verdict.stage or verdict.ticket:
                engine.draw()
    assert engine.phase == "ticket"
    images = random_images(5, seed=7).to(dtype)
    network.eval()
    with torch.no_grad():
        outputs = full(engine.model(images))
    if is_sharded or dist.get_rank() == 0:
        engine.save_ticket(folder)
    dist.barrier()
    again = worm_dist.load_ticket(folder, build=lambda: Residual().to(dtype)).eval()
    with torch.no_grad():
        loaded = again(images)
    assert engine.mask is not None
    return {
        "seen": seen,
        "mask": engine.mask,
        "weights": {name: full(p) for name, p in network.named_parameters()},
        "statistics": {name: b.clone() for name, b in network.named_buffers()},
        "outputs": outputs,
        "loaded": loaded,
        "files": hashlib.sha256(Path(folder, "ticket.safetensors").read_bytes()).hexdigest(),
    }


def _both(
    folder: str, score: Any, dtype: torch.dtype = torch.float32
) -> tuple[dict[str, Any], dict[str, Any]]:
    sharded = _run(True, f"{folder}/sharded", score, dtype)
    return sharded, _run(False, f"{folder}/ddp", score, dtype)


def _compare(
    runs: list[tuple[dict[str, Any], dict[str, Any]]], rtol: float = 1e-4, atol: float = 1e-6
) -> None:
    for sharded, ddp in runs:
        assert sharded["seen"] == ddp["seen"]
        assert sharded["mask"].digest == ddp["mask"].digest
        assert any(stage for _, _, stage, _ in sharded["seen"])
        for name, weight in sharded["weights"].items():
            torch.testing.assert_close(weight, ddp["weights"][name], rtol=rtol, atol=atol)
    (first, _), (second, _) = runs
    # Statistics are each rank's own, as in DeepSpeed; a ticket has rank zero's.
    torch.testing.assert_close(first["loaded"], first["outputs"])
    for name, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][name])
    for name, buffer in first["statistics"].items():
        if "num_batches" not in name:
            assert buffer.shape == second["statistics"][name].shape


def test_a_run_ends_as_under_ddp(ranks: Ranks, tmp_path: Path) -> None:
    _compare(ranks(2, _both, str(tmp_path), None))


def test_a_run_differs_from_ddps_by_rounding_alone(ranks: Ranks, tmp_path: Path) -> None:
    """The penalty is added after the average instead of before, and what that rounds otherwise
    grows from step to step.  So with 29 bits more the runs are equal to as many more."""
    _compare(ranks(2, _both, str(tmp_path), None, torch.float64), rtol=1e-12, atol=1e-14)


def test_a_score_of_the_users_sees_full_weights(ranks: Ranks, tmp_path: Path) -> None:
    _compare(ranks(2, _both, str(tmp_path), _score))


def _off() -> tuple[Tensor, Tensor]:
    """Weights of a plain loop, and of one with an engine that does nothing."""
    found = []
    for is_attached in (False, True):
        torch.manual_seed(0)
        network = Residual()
        fully_shard(network.conv1)
        fully_shard(network)
        optimizer = SGD(network.parameters(), lr=0.05, momentum=0.9)
        if is_attached:
            config = WormConfig(truncation={"mode": "off"})
            engine = worm_dist.attach(network, optimizer, config, example_inputs=random_images(1))
        for number in range(3):
            network(random_images(4, seed=number + dist.get_rank())).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if is_attached:
            assert engine.detach() is network
        found.append(torch.cat([full(p).flatten() for p in network.parameters()]))
    plain, attached = found
    return plain, attached


def test_off_is_free(ranks: Ranks) -> None:
    for plain, attached in ranks(2, _off):
        assert torch.equal(plain, attached)
