"""Settings that can never act in a run: valid, and most likely a mistake."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ..config import AUTO_LATEST, RemovalConfig, SearchConfig
from ..interval import Interval
from ..user_function import is_user_function
from .run_config import RunConfig

__all__ = ["ineffective_settings", "reasons_against"]


def ineffective_settings(config: RunConfig, steps_per_epoch: int | None = None) -> list[str]:
    """Describe each setting that can never act, one line each.

    Args:
        config: the run's settings.
        steps_per_epoch: optimizer steps in an epoch; None if not known.  Then intervals in steps
            are not compared with the length of the run.
    """
    lines = list(_without_their_choice(config))
    run = _Length(config.epochs, steps_per_epoch)
    if config.search.enabled:
        lines += _of_the_search(config, run)
    lines += _of_the_schedule(config)
    for key, interval, effect in (
        ("checkpoint.every", config.checkpoint.every, "only the end of the run is saved"),
        (
            "divergence.check_every",
            config.divergence.check_every,
            "the ranks are only compared before a save",
        ),
    ):
        if run.is_shorter_than(interval):
            lines.append(f"{key}: {interval} is longer than the run of {run}; {effect}")
    return lines


class _Length:
    """The length of a run.

    Args:
        epochs: its epochs.
        steps_per_epoch: optimizer steps in an epoch; None if not known.
    """

    def __init__(self, epochs: int, steps_per_epoch: int | None) -> None:
        self._epochs = epochs
        self._steps_per_epoch = steps_per_epoch

    def __str__(self) -> str:
        return f"{self._epochs} epoch{'' if self._epochs == 1 else 's'}"

    def epochs_of(self, interval: Interval) -> float | None:
        """An interval in epochs; None if it is in steps, and an epoch's steps are not known."""
        steps_per_epoch = self._steps_per_epoch
        if steps_per_epoch is not None:
            total_steps = self._epochs * steps_per_epoch
            return interval.steps(steps_per_epoch, total_steps) / steps_per_epoch
        if interval.unit == "dur":
            return interval.count * self._epochs
        return interval.count if interval.unit == "ep" else None

    def is_shorter_than(self, interval: Interval) -> bool:
        epochs = self.epochs_of(interval)
        return epochs is not None and epochs > self._epochs

    def number_of(self, interval: Interval) -> int | None:
        """How often an interval fits into the run; None if not known."""
        epochs = self.epochs_of(interval)
        return None if epochs is None else int(self._epochs / epochs + 1e-9)


def _without_their_choice(config: RunConfig) -> Iterator[str]:
    """Settings that belong to a choice which the run has not made."""
    preset, values = RunConfig(preset=config.preset).flat(), config.flat()
    for key, reason in reasons_against(config).items():
        if values[key] != preset[key]:
            yield f"{key}: has no effect: {reason}"


def reasons_against(config: RunConfig) -> dict[str, str]:
    """By dotted key, each setting that belongs to a choice which the run has not made, and that
    choice."""
    search, truncation, ticket = config.search, config.truncation, config.ticket
    removal = "truncation.removal."
    choices: tuple[tuple[str | tuple[str, ...], bool, str], ...] = (
        (
            ("search.", "truncation.", "ticket."),
            search.enabled,
            "preset 'dense' does not search"
            if config.preset == "dense"
            else "search.enabled is false",
        ),
        ("search.elbow.", truncation.mode != "off", "with truncation.mode off there is no elbow"),
        ("search.elbow.margin", search.elbow.rule == "margin", "for rule margin only"),
        ("search.elbow.fraction", search.elbow.rule == "relative", "for rule relative only"),
        ("truncation.ratio", truncation.mode == "soft", "for truncation.mode soft only"),
        (
            ("truncation.near_distance", "truncation.near_ratio"),
            truncation.mode == "soft" and truncation.ratio == "distance",
            "for truncation.ratio distance only",
        ),
        ("truncation.near_ratio", truncation.near_distance > 0, "truncation.near_distance is 0"),
        ("search.coupling", search.grouping == "group", "for search.grouping group only"),
        ("search.l1_until", search.l1 > 0, "search.l1 is 0"),
        (removal, truncation.removes, "for mode hard with frozen_weights remove only"),
        (
            tuple(f"{removal}{name}" for name in RemovalConfig.model_fields if name != "schedule"),
            truncation.removal.schedule == "gradual",
            "for schedule gradual only",
        ),
        (
            "ticket.recalibrate_memory_mb",
            ticket.recalibrate_batches > 0,
            "ticket.recalibrate_batches is 0",
        ),
        ("optimizer.momentum", config.optimizer.name == "sgd", "for sgd only"),
        ("schedule.gamma", config.schedule.name == "step", "for schedule step only"),
        ("data.root", config.data.name != "digits", "the digits need no folder"),
        (
            "data.image_size",
            config.data.name == "image-folder" or is_user_function(config.data.name),
            "for image-folder only",
        ),
        (
            "distributed.bucket_cap_mb",
            config.distributed.backend != "deepspeed",
            "not for backend deepspeed",
        ),
    )
    found = {
        key: next((why for keys, acts, why in choices if not acts and key.startswith(keys)), None)
        for key in config.flat()
        if key != "search.enabled"
    }
    return {key: reason for key, reason in found.items() if reason is not None}


def _of_the_search(config: RunConfig, run: _Length) -> Iterator[str]:
    search, truncation = config.search, config.truncation
    num_checks, every = run.number_of(search.every), run.epochs_of(search.every)
    if num_checks is None or every is None:
        return
    num_checks += search.first == "before_training"
    if num_checks == 0:
        yield (
            f"search.every: {search.every} is longer than the run of {run}; there is no check, and "
            "no ticket"
        )
        return
    checks = f"the run of {run} has {num_checks} check{'' if num_checks == 1 else 's'}"
    finds_elbow = truncation.mode != "off"
    if finds_elbow and (first := _earliest_start(config, run, every)) > config.epochs:
        yield (
            f"search.elbow.min_masks: {search.masks_before_elbow} masks are never reached, as "
            f"{checks}; there is no elbow, and no ticket"
        )
    elif truncation.removes and truncation.removal.schedule == "gradual":
        yield from _of_the_removal(config, run, first)
    if finds_elbow and first < _intervals_before_elbow(search) * every:
        preset = RunConfig(preset=config.preset).search.elbow
        for key in ("rule", "margin", "fraction", "min_masks"):
            if getattr(search.elbow, key) != getattr(preset, key):
                yield (
                    f"search.elbow.{key}: has no effect: truncation starts at epoch {first:.4g} at "
                    f"the latest (search.elbow.latest: {search.elbow.latest}), before "
                    f"search.elbow.min_masks, {search.masks_before_elbow}, are there"
                )
    if num_checks < search.window:
        effect = "it is never full" if truncation.removes else "no ticket is drawn"
        yield f"search.window: {search.window} masks are never reached, as {checks}; {effect}"


def _earliest_start(config: RunConfig, run: _Length, every: float) -> float:
    """The epoch of the first check at which truncation can start; checks are so many apart."""
    search = config.search
    latest = AUTO_LATEST if search.elbow.latest == "auto" else search.elbow.latest
    after = None if latest is None else run.epochs_of(latest)
    num_checks = _intervals_before_elbow(search)
    if after is not None:
        num_checks = min(num_checks, max(1, math.ceil(after / every - 1e-9)))
    return num_checks * every


def _intervals_before_elbow(search: SearchConfig) -> int:
    """The least number of ``search.every`` before an elbow."""
    return search.masks_before_elbow - (search.first == "before_training")


def _of_the_removal(config: RunConfig, run: _Length, first: float) -> Iterator[str]:
    removal = config.truncation.removal
    duration = removal.duration
    lasts = run.epochs_of(duration) if isinstance(duration, Interval) else 0.0  # fits by itself
    if lasts is not None and first + lasts > config.epochs:
        yield (
            f"truncation.removal.duration: {duration} after the earliest start, at epoch "
            f"{first:.4g}, is behind the end of the run of {run}; there is no ticket"
        )
    if run.is_shorter_than(removal.patience):
        yield (
            f"truncation.removal.patience: {removal.patience} is longer than the run of {run}; no "
            "pause ends the removal"
        )


def _of_the_schedule(config: RunConfig) -> Iterator[str]:
    schedule, epochs = config.schedule, config.epochs
    if schedule.warmup_epochs >= epochs:
        yield (
            f"schedule.warmup_epochs: {schedule.warmup_epochs} of {epochs} epochs; the learning "
            "rate never reaches optimizer.lr"
        )
    behind = [milestone for milestone in schedule.milestones if milestone >= epochs]
    if behind:
        yield f"schedule.milestones: {behind} are not before the end of {epochs} epochs"
