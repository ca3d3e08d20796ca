"""GPU smoke test, on every rank: packed gradients, memory of a draw, operations of a step.

Started by torchrun; rank zero prints lines in Markdown.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.profiler import ProfilerActivity, profile

import worm_dist
from worm_dist.bench.variants import WARM_UP, Batch, dense, training, uniform_mask, variants
from worm_dist.distributed.init import RankInfo, process_group
from worm_dist.groups.freeze_plan import FreezePlan
from worm_dist.models import build_model

MEASURED = ("DDP", "worm 100 %", "worm 50 %", "worm 50 % faded")
"""Variants whose steps are profiled; with all channels live the engine is idle."""
SYNCHRONISING = (
    "aten::_local_scalar_dense",  # a value is read on the host
    "cudaDeviceSynchronize",
    "cudaStreamSynchronize",
    "cudaEventSynchronize",
)


def measure() -> None:
    """The section ``checks`` on this rank; rank zero prints."""
    with process_group(RankInfo.from_environment(), "auto", 120.0) as device:
        lines = [_packed(device), _memory(device), *_operations(device)]
        if dist.get_rank() == 0:
            print("\n".join(lines))


def _network(device: torch.device) -> nn.Module:
    return build_model("resnet18" if device.type == "cuda" else "resnet20", 10, 3).to(device)


def _batch(device: torch.device) -> Batch:
    size = 64 if device.type == "cuda" else 2
    generator = torch.Generator().manual_seed(dist.get_rank())
    images = torch.randn(size, 3, 32, 32, generator=generator)
    return images.to(device), torch.randint(10, (size,), generator=generator).to(device)


def _packed(device: torch.device) -> str:
    """Compare the averaged gradients with those of plain DDP, frozen slices set to zero."""
    batch = _batch(device)
    plain, _ = training(lambda: _network(device))
    model, optimizer = training(lambda: _network(device))
    config = worm_dist.WormConfig(truncation={"frozen_weights": "hold"})
    engine = worm_dist.attach(model, optimizer, config, example_inputs=batch[0][:1])
    mask = uniform_mask(engine.groups, 0.5)
    engine.truncate(mask)
    torch.backends.cudnn.deterministic = True
    for each in (plain, engine.model):
        nn.functional.cross_entropy(each(batch[0]), batch[1]).backward()
    plan = FreezePlan(model.module, engine.groups, ~mask.keep, config.truncation.scope)
    largest = 0.0
    for wanted, found in zip(plain.parameters(), model.parameters(), strict=True):
        assert wanted.grad is not None and found.grad is not None
        for dim, frozen in plan.blocks[found].frozen.items() if found in plan.blocks else ():
            wanted.grad.index_fill_(dim, frozen, 0)
        scale = wanted.grad.abs().max().clamp_min(1e-12)
        largest = max(largest, float((wanted.grad - found.grad).abs().max() / scale))
    if largest > (0 if dist.get_world_size() <= 2 and device.type == "cpu" else 1e-4):
        raise RuntimeError(f"packed gradients differ from masked DDP's by {largest:.2e}")
    return f"- packed hook and masked DDP: largest relative difference of a gradient {largest:.1e}"


def _memory(device: torch.device) -> str:
    """Weigh the training before and after a draw of half the channels."""
    batch = _batch(device)
    model, optimizer = training(lambda: _network(device))
    engine = worm_dist.attach(model, optimizer, example_inputs=batch[0][:1], steps_per_epoch=1000)
    del model
    sizes = []
    for draws in (False, True):
        if draws:
            engine.draw(uniform_mask(engine.groups, 0.5))
        for _ in range(WARM_UP):
            dense(engine.model, engine.optimizer, batch)()
        engine.optimizer.zero_grad()
        network = sum(p.nbytes for p in engine.model.parameters())
        held = torch.cuda.memory_allocated(device) if device.type == "cuda" else None
        sizes.append(
            f"{network / 1e6:.1f} MB of parameters, "
            + ("memory not measured on a CPU" if held is None else f"{held / 1e6:.1f} MB allocated")
        )
    return f"- draw: before {sizes[0]}; after {sizes[1]}"


def _operations(device: torch.device) -> Iterator[str]:
    """Count operations and synchronisations of one step of each variant under the profiler."""
    yield "\n| step | ms (median of 5) | operations | kernels | synchronisations |"
    yield "|---|---|---|---|---|"
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for variant in variants(lambda: _network(device), _batch(device)):
        if variant.name not in MEASURED:
            continue
        for _ in range(WARM_UP):
            variant.step()
        seconds = statistics.median(_seconds(variant.step, device) for _ in range(5))
        with profile(activities=activities) as profiler:
            variant.step()
            _wait(device)
        counts = Counter({event.key: event.count for event in profiler.key_averages()})
        operations = sum(n for key, n in counts.items() if key.startswith("aten::"))
        syncs = sum(counts[key] for key in SYNCHRONISING) - (device.type == "cuda")  # of _wait
        kernels = counts["cudaLaunchKernel"] + counts["cudaLaunchKernelExC"]
        shown = kernels if device.type == "cuda" else "-"
        yield f"| {variant.name} | {1000 * seconds:.1f} | {operations} | {shown} | {syncs} |"


def _seconds(step: Callable[[], object], device: torch.device) -> float:
    _wait(device)
    begin = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - begin


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    measure()
