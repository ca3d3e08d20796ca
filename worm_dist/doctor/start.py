"""The start of a run: everything up to its first step, with the run's own code."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from ..distributed.collectives import ProcessGroupComm
from ..distributed.init import RankInfo
from ..distributed.progress import Progress
from ..errors import WormError
from ..groups.channel_groups import Groups
from ..planning.forecast import members_of
from ..training.build import TrainingParts, build
from ..training.consistency import require_same_start
from ..training.data import load_data
from ..training.ineffective_settings import ineffective_settings
from ..training.kernels import choose_kernels
from ..training.run_config import RunConfig
from ..training.user_functions import require_user_functions
from .finding import Finding, note, ok, problems

__all__ = ["Start", "own_data", "start"]

_MOST_NAMED = 6


def own_data(config: RunConfig) -> list[Finding]:
    """Load the data on this rank; without a collective, as hosts may differ.

    Returns:
        The problems; none if the data can be used.
    """
    try:
        require_user_functions(config)
        load_data(config.data)
    except WormError as error:
        return problems("data", error)
    except Exception as error:  # the other ranks wait for this one's findings
        return [_unexpected("data", error)]
    return []


@dataclass(frozen=True)
class Start:
    """A run that could take its first step.

    Attributes:
        config: its settings.
        parts: the parts of its training.
    """

    config: RunConfig
    parts: TrainingParts

    @property
    def groups(self) -> Groups:
        return self.parts.engine.groups

    @property
    def findings(self) -> list[Finding]:
        result, config, steps = self.parts.result, self.config, len(self.parts.train_loader)
        chosen = (
            f"{config.optimizer.name}, {config.precision}, {result.backend}, truncation "
            f"{config.truncation.mode}, compression {config.truncation.compression}: supported "
            "together"
        )
        return [
            ok("data", f"{result.data}; {steps} steps an epoch"),
            ok(
                "model",
                f"{config.model.name}: {result.parameters.dense:,} parameters, "
                f"{result.flops.dense:,} FLOPs a sample",
            ),
            ok("settings", chosen),
            *(note("settings", line) for line in ineffective_settings(config, steps)),
            *self._of_groups(),
        ]

    def _of_groups(self) -> list[Finding]:
        if not self.config.search.enabled:
            return [ok("groups", "there is no search, so nothing is dropped")]
        coupled = [group for group in self.groups if group.tied]
        findings = [
            ok(
                "groups",
                f"{len(self.groups)} channel groups with {self.groups.num_channels:,} channels can "
                "be ranked and dropped",
            )
        ]
        for group in coupled[:_MOST_NAMED]:
            layers = members_of(group)["producers"]
            findings.append(
                ok(
                    "groups",
                    f"{group.name}: a sum couples {len(layers)} layers: {_listed(layers)}",
                )
            )
        findings += _rest("groups", "coupled by sums", len(coupled))
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.groups.dense.items():
            by_reason.setdefault(reason, []).append(name)
        for reason, names in list(by_reason.items())[:_MOST_NAMED]:
            findings.append(note("groups", f"stays dense: {_listed(names)}: {reason}"))
        return findings + _rest("groups", "reasons to stay dense", len(by_reason))

    def as_dict(self) -> dict[str, Any]:
        """The groups as JSON values."""
        return {
            "groups": [
                {
                    "name": group.name,
                    "num_channels": group.num_channels,
                    "coupled": group.tied,
                    **members_of(group),
                }
                for group in self.groups
            ],
            "dense": dict(self.groups.dense),
        }


def start(
    config: RunConfig, rank_info: RankInfo, device: torch.device
) -> tuple[Start | None, list[Finding]]:
    """Compare the ranks, wrap the network and attach the engine, as a run does.  Collective.

    The run's own code checks which settings are compatible; there is no second list of them.

    Args:
        config: the run's settings.
        rank_info: rank, world size and local rank of this process.
        device: this rank's device.

    Returns:
        The start, None if it fails; and what was found.
    """
    assert dist.group.WORLD is not None
    comm = ProcessGroupComm(dist.group.WORLD, device)
    try:
        require_same_start(config, comm)
        choose_kernels(config, device)
        parts = build(config, rank_info, device, comm, Progress())
    except WormError as error:
        return None, problems("start", error)
    except Exception as error:  # of the user's network, of a wrapper or of a device
        return None, [_unexpected("start", error)]
    started = Start(config, parts)
    return started, started.findings


def _unexpected(topic: str, error: Exception) -> Finding:
    return Finding(topic, "problem", f"{type(error).__name__}: {error}"[:600])


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
    return ", ".join(names[:_MOST_NAMED]) + more


def _rest(topic: str, what: str, number: int) -> list[Finding]:
    if number <= _MOST_NAMED:
        return []
    return [ok(topic, f"... and {number - _MOST_NAMED} more {what}; --json has all")]
