"""DeepSpeed settings: the JSON file that a run names, completed by what the run itself decides."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .run_config import RunConfig

__all__ = ["deepspeed_settings"]

_DECIDED_BY_THE_RUN = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}


def deepspeed_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """What ``deepspeed.initialize`` is given.

    Without a file: ZeRO stage 1.  Gradients are not clipped unless the file says so, although
    DeepSpeed's own default is a norm of 1.

    Args:
        config: ``distributed.deepspeed`` names the file.
        world_size: number of ranks.

    Raises:
        ConfigError: the file cannot be read, or decides what the run does; a batch cannot be shared
            out evenly.
    """
    path = config.distributed.deepspeed
    named = _read(Path(path)) if path is not None else {}
    for key, ours in _DECIDED_BY_THE_RUN.items():
        if key in named:
            raise ConfigError(f"distributed.deepspeed: {path}: {key}: leave it out; {ours} decides")
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **named,
    }
    for key in ("bf16", "data_types"):
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"distributed.deepspeed: {path}: {key}: expected an object")
    if config.precision == "bf16":
        settings["bf16"] = {**settings.get("bf16", {}), "enabled": True}
        # BatchNorm on a CPU wants its statistics in the precision of its weights.
        settings["data_types"] = {"buffer_dtype": "bf16", **settings.get("data_types", {})}
    passes = settings.get("gradient_accumulation_steps", 1)
    if type(passes) is not int or not 0 < passes < 2**31:
        raise ConfigError(
            f"distributed.deepspeed: {path}: gradient_accumulation_steps: expected a number of "
            "passes, 1 or more"
        )
    share, rest = divmod(config.data.batch_size, world_size * passes)
    if rest or not share:
        raise ConfigError(
            f"data.batch_size: {config.data.batch_size} cannot be shared out over {world_size} "
            f"ranks and {passes} passes (gradient_accumulation_steps)"
        )
    return {**settings, "train_micro_batch_size_per_gpu": share}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"distributed.deepspeed: {path}: it cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"distributed.deepspeed: {path}: it is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"distributed.deepspeed: {path}: expected an object of settings")
    return content


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")
