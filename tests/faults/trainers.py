"""Trainers: the training loop in the processes of the ``ranks`` fixture, without a command line."""

from __future__ import annotations

import multiprocessing
import warnings
from typing import Any

import torch
import torch.distributed as dist

from tests.faults.driver import small_data
from worm_dist.distributed.init import RankInfo
from worm_dist.training import build
from worm_dist.training.data import Data
from worm_dist.training.reporting.reporter import Report
from worm_dist.training.run_config import RunConfig
from worm_dist.training.trainer import Trainer

__all__ = ["small_trainer"]


def small_trainer(samples: Data | None = None, **settings: Any) -> Trainer:
    """A trainer of this rank: eight steps an epoch, two epochs, no search."""
    warnings.simplefilter("ignore")  # of DeepSpeed's, at its import
    # The fork server has handed its own way on; loader processes would import torch for seconds.
    multiprocessing.set_start_method("fork", force=True)
    vars(build)["load_data"] = lambda _: samples or small_data(dist.get_rank())
    config = RunConfig(
        **{
            "preset": "dense",
            "epochs": 2,
            "data": {"batch_size": 16},
            "model": {"name": "vgg_small", "arguments": {"widths": [4, "M", 8]}},
            **settings,
        }
    )
    place = RankInfo(dist.get_rank(), dist.get_world_size(), 0)
    return Trainer(config, place, torch.device("cpu"), Report())
