"""Build: the parts of a training, made from its settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

import worm_dist

from ..distributed.agreed_failure import refused_on_every_rank
from ..distributed.collectives import Communicator
from ..distributed.init import RankInfo
from ..distributed.progress import Progress
from ..engine.attachment import context_of
from ..engine.engine import Engine
from ..errors import ConfigError
from ..groups.copying import copied
from ..groups.flops import count_flops
from ..groups.gates import gated
from .consistency import require_same_data
from .data import Placement, load_data, test_loader, train_loader
from .evaluation import count_parameters
from .initial_network import initial_network
from .kernels import memory_format
from .optim import ScheduleStart, build_schedule
from .parallelize import backend_name, parallelize
from .rank_state import seed_all
from .reporting.result import Result
from .retraining import Retraining
from .run_config import RunConfig

__all__ = ["TrainingParts", "build"]


@dataclass(frozen=True)
class TrainingParts:
    """The parts of a training.

    Attributes:
        network: the bare network, on the device; always the same object.
        engine: the engine, attached to the wrapped network.
        schedule: the learning rate schedule, stepped once per optimizer step.
        retraining: what happens to weights, optimizer and schedule at the draw.
        train_loader, test_loader: the loaders of this rank's samples, on the host.
        placement: puts their batches on the device.
        sample: zeros ``[1, *sample shape]``, of the network's dtype on its device.
        model_arguments: keyword arguments of ``build_model`` that rebuild the dense network.
        result: the run's figures; filled with those of the dense network.
    """

    network: nn.Module
    engine: Engine
    schedule: LRScheduler
    retraining: Retraining
    train_loader: DataLoader[Any]
    test_loader: DataLoader[Any]
    placement: Placement
    sample: Tensor
    model_arguments: dict[str, Any]
    result: Result


def build(
    config: RunConfig,
    rank_info: RankInfo,
    device: torch.device,
    comm: Communicator,
    progress: Progress,
) -> TrainingParts:
    """Build data, network, wrapper, optimizer, schedule and engine.  Collective.

    Args:
        config: the run's settings.
        rank_info: rank, world size and local rank of this process.
        device: the device to train on.
        comm: the communicator of all ranks.
        progress: receives the progress of this rank, for the watchdog.

    Raises:
        ConfigError: data or model do not fit the settings, or the ranks do not see the same data;
            raised on every rank.
        CheckpointError: ``model.weights`` cannot be read; raised on every rank.
    """
    seed_all(config.seed)
    progress.reach("the start, loading the data")
    with refused_on_every_rank(comm, ConfigError):
        data = load_data(config.data)
        shares = (config.data, rank_info.rank, rank_info.world_size)
        loader = train_loader(data, *shares, config.seed, device)
        steps_per_epoch = len(loader)
        tests = test_loader(data, *shares, device)
    require_same_data(data, steps_per_epoch, comm)
    progress.reach("the start, building the network")
    with refused_on_every_rank(comm):  # weights may be read from a file
        model_arguments = {
            "name": config.model.name,
            "num_classes": _num_classes(config, data.num_classes),
            "in_channels": data.sample_shape[0],
            "arguments": config.model.arguments,
        }
        network = gated(initial_network(config.model, model_arguments), config.search).to(device)
    layout = memory_format(config, device)
    if layout is not torch.contiguous_format:
        network.to(memory_format=layout)
    rewound = copied(network) if config.retraining.weights != "keep" else None
    model, optimizer = parallelize(network, config, rank_info.world_size, device)
    dtype = next(network.parameters()).dtype  # DeepSpeed may have changed it
    placement = Placement(device, dtype, layout, data.normalization)
    sample = torch.zeros(1, *data.sample_shape, device=device, dtype=dtype)
    start = ScheduleStart(config.epochs)
    schedule = build_schedule(config.schedule, optimizer, start, steps_per_epoch)
    engine = worm_dist.attach(
        model,
        optimizer,
        config.worm,
        example_inputs=sample,
        steps_per_epoch=steps_per_epoch,
        total_steps=config.epochs * steps_per_epoch,
    )
    result = Result(
        preset=config.preset,
        seed=config.seed,
        world_size=rank_info.world_size,
        backend=backend_name(model, device),
        data=data.description,
    )
    result.parameters.dense = count_parameters(network)
    with context_of(engine).full_network() as full:
        result.flops.dense = count_flops(full, sample)
    retraining = Retraining(config, network, rewound, schedule, start, steps_per_epoch)
    return TrainingParts(
        network,
        engine,
        schedule,
        retraining,
        loader,
        tests,
        placement,
        sample,
        model_arguments,
        result,
    )


def _num_classes(config: RunConfig, num_classes: int) -> int:
    given = config.model.num_classes
    if given is not None and given < num_classes:
        raise ConfigError(
            f"model.num_classes: {given} outputs, but the data has {num_classes} classes"
        )
    return given or num_classes
