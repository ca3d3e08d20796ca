"""Preloaded: what the fork server of the ranks has imported before the first of them is forked."""

from __future__ import annotations

import gc

import pytest  # noqa: F401
import torch._dynamo
import torch.distributed
import torch.nn.parallel  # noqa: F401

import worm_dist.training.run  # noqa: F401

# A rank's collector leaves these objects alone: to look at each would copy all their memory.
gc.collect()
gc.freeze()
