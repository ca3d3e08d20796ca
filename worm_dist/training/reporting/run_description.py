"""Description of a run, written at its start: the content of ``run.json``."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.durable_io import write_json
from ..run_config import RunConfig
from .result import versions

__all__ = ["DESCRIPTION", "machine", "write_description"]

DESCRIPTION = "run.json"


def machine() -> dict[str, Any]:
    """The machine of this process, without its name."""
    return {"platform": platform.platform(), "cores": os.cpu_count()}


def write_description(folder: Path, config: RunConfig, device: torch.device) -> None:
    """Write ``run.json``: settings by dotted key, versions and machine.  A resumed run
    replaces it, as some settings, and the machine, may have changed.

    Args:
        folder: the run's folder.
        config: the run's settings.
        device: the device that rank zero trains on.

    Raises:
        OSError: the file cannot be written.
    """
    is_gpu = device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else device.type
    content = {
        "settings": config.flat(),
        "versions": versions(),
        "machine": {**machine(), "device": name},
    }
    write_json(folder / DESCRIPTION, content)
