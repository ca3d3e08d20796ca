"""Preloaded: what the fork server of the ranks has imported before the first of them is forked."""

from __future__ import annotations

import contextlib
import gc
import os
import warnings

import pytest  # noqa: F401
import sklearn.datasets
import sklearn.model_selection  # noqa: F401
import torch._dynamo
import torch.distributed
import torch.nn.parallel  # noqa: F401

import tests.nets
import tests.oracles
import tests.resuming
import tests.settings  # noqa: F401
import worm_dist.engine.attach
import worm_dist.training.data.digits
import worm_dist.training.reporting.plots
import worm_dist.training.run
import worm_dist.truncation.memory  # noqa: F401

with contextlib.suppress(ImportError), warnings.catch_warnings():
    warnings.simplefilter("ignore")
    os.environ["DS_ACCELERATOR"] = "cpu"  # it is chosen now
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401  # wanted by the first engine

    del os.environ["DS_ACCELERATOR"]

# A rank's collector leaves these objects alone: to look at each would copy all their memory.
gc.collect()
gc.freeze()
