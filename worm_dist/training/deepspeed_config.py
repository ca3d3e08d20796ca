"""DeepSpeed's configuration: the user's JSON file, completed from the settings of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from .run_config import RunConfig

__all__ = ["deepspeed_settings"]

_SET_BY_RUN_CONFIG = {
    "train_batch_size": "data.batch_size",
    "train_micro_batch_size_per_gpu": "data.batch_size",
    "optimizer": "optimizer",
    "scheduler": "schedule",
}


def deepspeed_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The configuration for ``deepspeed.initialize``.

    The default without a file is ZeRO stage 1.  Gradients are not clipped unless the file asks for
    it, although DeepSpeed's own default is a norm of 1.

    Args:
        config: the run's settings; ``distributed.deepspeed`` is the path of the file.
        world_size: number of ranks.

    Raises:
        ConfigError: the file cannot be read or sets a value that belongs to the run's settings, or
            the batch cannot be divided evenly over the ranks.
    """
    path = config.distributed.deepspeed
    from_file = _read(Path(path)) if path is not None else {}
    for key, ours in _SET_BY_RUN_CONFIG.items():
        if key in from_file:
            raise ConfigError(f"distributed.deepspeed: {path}: {key}: remove it; {ours} sets it")
    settings: dict[str, Any] = {
        "zero_optimization": {"stage": 1},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        **from_file,
    }
    for key in ("bf16", "data_types"):
        if not isinstance(settings.get(key, {}), dict):
            raise ConfigError(f"distributed.deepspeed: {path}: {key}: expected an object")
    if config.precision == "bf16":
        settings["bf16"] = {**settings.get("bf16", {}), "enabled": True}
        # BatchNorm on a CPU requires its statistics in the dtype of its weights.
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
            f"data.batch_size: {config.data.batch_size} cannot be divided over {world_size} "
            f"ranks and {passes} passes (gradient_accumulation_steps)"
        )
    return {**settings, "train_micro_batch_size_per_gpu": share}


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_constant=_reject_constant)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"distributed.deepspeed: {path}: cannot read it: {error}") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"distributed.deepspeed: {path}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"distributed.deepspeed: {path}: expected an object of settings")
    return content


def _reject_constant(word: str) -> float:
    raise ValueError(f"{word} is not a number")
