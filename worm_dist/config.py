"""The settings of the engine: what is searched, how it is truncated, when the ticket is drawn.

Typed, frozen and strict.  All mistakes are reported at once, each with the key it concerns and,
for an unknown key, the nearest valid one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)
from typing_extensions import Self

from .errors import ConfigError
from .interval import Interval
from .mistakes import mistakes_in, shown
from .presets import PRESETS, merge
from .ratio import exact, parse_ratio
from .settings import Count, Factor, Settings

__all__ = [
    "AUTO_LATEST",
    "SHORTEST_REMOVAL",
    "BudgetConfig",
    "ElbowConfig",
    "Quantity",
    "RemovalConfig",
    "SearchConfig",
    "TicketConfig",
    "TruncationConfig",
    "WormConfig",
    "WormParts",
]

IntervalField = Annotated[
    Interval,
    BeforeValidator(Interval.parse),
    PlainSerializer(str, return_type=str),
]


def _duration(text: object) -> object:
    return text if text == "auto" else Interval.parse(text)


DurationField = Annotated[
    Interval | Literal["auto"],
    BeforeValidator(_duration),
    PlainSerializer(str, return_type=str),
]


def _latest(text: object) -> object:
    return text if text is None else _duration(text)


LatestField = Annotated[
    Interval | Literal["auto"] | None,
    BeforeValidator(_latest),
    PlainSerializer(lambda latest: None if latest is None else str(latest)),
]

AUTO_LATEST = Interval(0.1, "dur")
"""``search.elbow.latest: auto``, where the length of the training is known.  Later starts cost more
and were not better (docs/results/trigger)."""
SHORTEST_REMOVAL = 100
"""Optimizer steps that ``truncation.removal.duration: auto`` has at least."""


def _count_or_window(value: object) -> object:
    if value == "window" or (type(value) is int and 1 <= value < 2**31):
        return value
    raise ValueError(f"must be a whole number from 1 on, or 'window', got {shown(value)}")


def _factor_or_distance(value: object) -> object:
    if value == "distance":
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise ValueError(f"must be from 0 to 1, or 'distance', got {shown(value)}")


Quantity = Literal["flops", "parameters", "bytes", "channels"]
"""What a budget limits."""
_Share = Annotated[float, Field(gt=0, le=1)]
_Ratio = Annotated[float, Field(ge=0, lt=1), BeforeValidator(parse_ratio)]
"""A share of channels: a number or a fraction such as ``"1/3"``."""


class ElbowConfig(Settings):
    """The elbow rule: when truncation may start."""

    rule: Literal["margin", "relative", "kneedle"] = "margin"
    """``margin``: mean distance below ``search.settled + margin`` (the paper's).  ``relative``:
    below ``fraction`` of the largest mean so far.  ``kneedle``: the kneed library's knee."""
    margin: float = Field(default=0.05, ge=0, le=1)
    """``margin`` only."""
    fraction: float = Field(default=0.5, gt=0, lt=1)
    """``relative`` only."""
    min_masks: Annotated[int | Literal["window"], BeforeValidator(_count_or_window)] = 3
    """No rule fires before this many masks are in the history; ``window``: before the window is
    full.  With 1 truncation starts at the first mask, which has no distance yet."""
    latest: LatestField = "auto"
    """Truncation starts at the first check after this length of training, whatever the rule says.
    ``auto`` is a tenth of the training, ``0.1dur``, where ``attach`` knows its length
    (``total_steps``), otherwise never; null is never."""


class BudgetConfig(Settings):
    """A limit on the ticket, as a share of the dense network, above 0 to 1; at most one of them."""

    flops: _Share | None = None
    """Of the floating point operations of a forward pass on ``attach``'s ``example_inputs``."""
    parameters: _Share | None = None
    """Of the elements of all parameters, gates included; the ticket has no gates."""
    bytes: _Share | None = None
    """Of the gradient bytes of a step, uncompressed; those of the ticket are counted as
    ``truncation.compression`` sends them."""
    channels: _Share | None = None
    """Of the searched channels."""

    @property
    def chosen(self) -> tuple[Quantity, float] | None:
        """What is limited, and its share; None without a budget."""
        quantities: tuple[Quantity, ...] = get_args(Quantity)
        shares = ((quantity, getattr(self, quantity)) for quantity in quantities)
        return next(((quantity, share) for quantity, share in shares if share is not None), None)

    @model_validator(mode="after")
    def _only_one(self) -> Self:
        given = {key: share for key, share in self if share is not None}
        if len(given) > 1:
            shares = ", ".join(f"{key} {share:g}" for key, share in given.items())
            raise ValueError(f"{shares} contradict: give exactly one of them")
        return self


class SearchConfig(Settings):
    """The search: how channels are ranked and masked, and when the masks have settled."""

    enabled: bool = True
    """Whether there is a search at all."""
    importance: Literal["auto", "norm_scale", "gate", "signed_gate", "weight_norm"] = "auto"
    """What ranks channels.  ``auto``: the scales of norms and gates, or the norms of the producing
    weights in a network that has neither; the others: only scales of norms, only gates, or only
    weights.  ``signed_gate`` ranks gates by value instead of magnitude, as EarlyBERT does.
    ``attach`` also takes a custom score."""
    grouping: Literal["group", "layer"] = "group"
    """``group``: rank channels, coupled layers together.  ``layer``: rank the scales of each norm
    separately, as Early-Bird does; then a coupled channel is dropped only if all its norms drop
    it."""
    coupling: Literal["mean", "max", "skip"] = "mean"
    """How the scores of layers coupled by a sum are combined; ``skip`` keeps the residual stream
    dense, as EB Train does."""
    prune_ratio: _Ratio = 0.5
    """Share p of all channels that the mask drops, 0 to 1; a number, or a fraction such as
    ``1/3``."""
    selection: Literal["count", "above", "quantile"] = "count"
    """``count``: drop the share p exactly.  The published rules drop one channel more, and equal
    scores together: ``above`` keeps what is strictly above the score of position int(p N)
    (Early-Bird), ``quantile`` what is strictly above the p-quantile (EarlyBERT)."""
    budget: BudgetConfig = BudgetConfig()
    """Instead of ``prune_ratio``: the lowest channels are dropped until the ticket costs no more
    than this share of the dense network."""
    threshold: Literal["global", "layer"] = "layer"
    """Whether p is the share of all channels together, or of each group's.  With a budget: whether
    channels are ordered by their importance, or by their rank within their group, so that all
    groups lose about the same share."""
    ratios: dict[str, _Ratio] = Field(default={})
    """Shares for single groups, by patterns of their names such as ``layer4.*``; with grouping
    ``layer``, of the norms' names.  The first matching pattern counts."""
    dense: list[str] = Field(default=[])
    """Patterns of names of modules whose channels are all kept."""
    min_keep_ratio: _Ratio = 0.1
    """Minimum share of its channels that every group keeps; at least one channel, also where a
    published ``selection`` drops them all."""
    every: IntervalField = Interval(1, "ep")
    """How often the trainer calls ``check``.  In a custom loop, call it equally often.  Like every
    interval it is in epochs (``1ep``), optimizer steps (``200ba``) or, where ``attach`` knows
    ``total_steps``, a share of the training (``0.01dur``)."""
    first: Literal["before_training", "after_first_interval"] = "after_first_interval"
    """When the trainer takes the first mask.  ``before_training``, as the papers' authors: in a
    custom loop, call ``check`` once before the first step too."""
    window: Count = Field(default=5, ge=1)
    """Number of newest masks that are compared.  With 1 the first mask is the ticket, whatever it
    is: with ``every`` 0.2ep EarlyBERT's, after a fifth of an epoch."""
    settled: float = Field(default=0.1, gt=0, le=1)
    """The ticket is found when no distance in a full window is above this."""
    elbow: ElbowConfig = ElbowConfig()
    l1: Factor = Field(default=1e-4, ge=0)
    """Weight of the L1 penalty on the scales."""
    l1_until: Literal["draw", "end"] = "draw"
    """Whether the penalty ends with the draw of the ticket, or goes on in its training, on the
    scales of norms."""

    @property
    def masks_before_elbow(self) -> int:
        """The least number of masks in the history at an elbow."""
        return self.window if self.elbow.min_masks == "window" else self.elbow.min_masks

    @model_serializer(mode="wrap")
    def _without_replaced(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Without the ratio that a budget replaces, so that what is written can be read."""
        values: dict[str, Any] = serialize(self)
        if self.budget.chosen is not None:
            values.pop("prune_ratio", None)
        return values

    @model_validator(mode="after")
    def _budget_stands_alone(self) -> Self:
        if self.budget.chosen is None:
            return self
        quantity, share = self.budget.chosen
        contradicting = [
            text
            for text, is_given in (
                (f"prune_ratio {self.prune_ratio:g}", "prune_ratio" in self.model_fields_set),
                (f"ratios {self.ratios}", bool(self.ratios)),
            )
            if is_given
        ]
        if contradicting:
            raise ValueError(
                f"budget {quantity} {share:g} contradicts {' and '.join(contradicting)}: it "
                "determines how many channels are dropped; give only one"
            )
        if self.grouping == "layer":
            raise ValueError(
                f"budget {quantity} {share:g} contradicts grouping 'layer': where the norms of a "
                "channel disagree it is kept, so no share of them meets a budget"
            )
        if self.selection != "count":
            raise ValueError(
                f"budget {quantity} {share:g} contradicts selection {self.selection!r}, which "
                "determines how many channels are dropped; choose selection 'count'"
            )
        return self

    @model_validator(mode="after")
    def _ratios_fit_together(self) -> Self:
        if self.budget.chosen is None and exact(self.prune_ratio) + exact(self.min_keep_ratio) > 1:
            raise ValueError(
                f"prune_ratio {self.prune_ratio:g} and min_keep_ratio {self.min_keep_ratio:g} "
                "contradict: together they exceed 1"
            )
        for pattern, ratio in self.ratios.items():
            if exact(ratio) + exact(self.min_keep_ratio) > 1:
                raise ValueError(
                    f"ratios: {pattern!r} {ratio:g} and min_keep_ratio {self.min_keep_ratio:g} "
                    "contradict: together they exceed 1"
                )
        if self.grouping == "layer" and self.importance == "weight_norm":
            raise ValueError(
                "grouping 'layer' contradicts importance 'weight_norm': it ranks the scales of "
                "norms only"
            )
        return self


class RemovalConfig(Settings):
    """How dropped channels are removed while the others train: gradual pruning (arXiv
    1710.01878)."""

    schedule: Literal["gradual", "one_shot"] = "gradual"
    """``gradual``: one after another, from the elbow on.  ``one_shot``: all at the elbow, by the
    draw itself."""
    duration: DurationField = "auto"
    """From the start of the first fade to the end of the last one: many channels at first, fewer
    and fewer later (a cubic schedule).  ``auto`` is a fifth of the training, ``0.2dur``, at
    least 100 steps, but at most half of what is left of it; without ``total_steps`` it is an epoch,
    at least 100 steps."""
    fade_steps: Annotated[int, Field(ge=1, le=8)] = 4
    """Optimizer steps in which a channel's scale fades to exact zero.  The following norm rescales
    channels that fade together, and the network depends on them until they are zero; so long fades
    destroy networks."""
    stage: float = Field(default=0.25, gt=0, le=1)
    """The network is made smaller whenever this share of all dropped channels has become zero; 1
    waits for the last of them."""
    pause_above: float = Field(default=2.0, ge=1, le=1e6)
    """No further channel begins to fade while the training loss is above this multiple of its level
    at the elbow (see ``Engine.watch``)."""
    patience: IntervalField = Interval(1, "ep")
    """After a pause of this length no further channel is removed: the ticket is what is left."""


class TruncationConfig(Settings):
    """Truncation: what is frozen of dropped channels, and what their weights do."""

    mode: Literal["hard", "soft", "off"] = "hard"
    """``hard``: gradients of frozen slices are zero and are not sent.  ``soft``: gradients of their
    scales and shifts are multiplied by ``ratio``.  ``off``: no truncation."""
    ratio: Annotated[float | Literal["distance"], BeforeValidator(_factor_or_distance)] = 0.003
    """Soft mode: factor of the gradients of a dropped channel's scale and shift.  ``distance``: the
    mean distance of the newest mask to those in the window, at every check anew."""
    near_distance: float = Field(default=0.0, ge=0, le=1)
    """Ratio ``distance``: while that mean is strictly below this, the factor is ``near_ratio``
    instead, as WORM has it for BERT; 0 is never."""
    near_ratio: float = Field(default=0.01, ge=0, le=1)
    """Ratio ``distance``: factor of the gradients while the masks are near."""
    scope: Literal["norm", "producer", "coupled"] = "producer"
    """What is frozen.  ``norm``: the norm's scale and shift; ``producer``: also the filters that
    feed it; ``coupled``: also the consumers' input columns.  Soft mode supports only ``norm``."""
    frozen_weights: Literal["remove", "hold", "free"] = "remove"
    """Frozen channels are removed one after another, held bit for bit, or still changed by the
    optimizer's momentum and weight decay and by the penalty."""
    removal: RemovalConfig = RemovalConfig()
    compression: Literal["none", "bf16", "fp16", "powersgd"] = "none"
    """Hard mode, from ``attach`` on: cast live gradients for the all-reduce, or send PowerSGD's
    approximation of them (arXiv 1905.13727).  torch allows one communication hook, so its own
    compression hooks cannot be combined with the packing."""
    compression_rank: Count = Field(default=1, ge=1)
    """PowerSGD: rank of the approximation, the number of columns of P and Q."""
    checksums: bool = False
    """Compare the sum of each truncated bucket with the sum of what the ranks have put in, under
    DistributedDataParallel without PowerSGD: a difference beyond rounding ends the run before the
    weights are changed, on a GPU at the step after.  Two more elements a bucket, which
    ``traffic`` leaves out."""

    @property
    def removes(self) -> bool:
        """Whether dropped channels fade out during training, before they are drawn."""
        return self.mode == "hard" and self.frozen_weights == "remove"

    @model_validator(mode="before")
    @classmethod
    def _without_freezing(cls, values: Any) -> Any:
        """Defaults of the modes that freeze nothing: their only valid scope and policy."""
        if isinstance(values, Mapping) and values.get("mode") in ("soft", "off"):
            return {"scope": "norm", "frozen_weights": "free", **values}
        return values

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        wrong = [
            f"{key} {value!r} contradicts mode {self.mode!r}, which freezes nothing"
            for key, value, only in (
                ("scope", self.scope, "norm"),
                ("frozen_weights", self.frozen_weights, "free"),
            )
            if self.mode != "hard" and value != only
        ]
        if self.mode != "hard" and self.compression != "none":
            # The state of torch's own PowerSGD hook would not fit the network after a draw.
            powersgd = self.compression == "powersgd"
            way = "choose mode 'hard'" if powersgd else "register torch's own communication hook"
            wrong.append(f"compression {self.compression!r} contradicts mode {self.mode!r}; {way}")
        if self.compression != "powersgd" and self.compression_rank != 1:
            wrong.append(
                f"compression_rank {self.compression_rank} contradicts compression "
                f"{self.compression!r}, which has no rank; choose compression 'powersgd'"
            )
        if wrong:
            raise ValueError("; ".join(wrong))
        return self


class TicketConfig(Settings):
    """What is done when the ticket is drawn."""

    recalibrate_batches: Count = Field(default=8, ge=0)
    """Number of last training batches from which BatchNorm statistics are estimated anew, while
    channels are removed and at a draw.  The engine keeps references to them during the search, or
    copies if they are written to.  0 turns it off."""
    recalibrate_memory_mb: Count = Field(default=256, ge=1)
    """Maximum memory of these batches per rank in MiB, on their device; fewer batches are kept if
    they are larger, but always the last one."""
    round_to: Count = Field(default=8, ge=1)
    """Groups of more than four times this many channels keep a multiple of it, for efficient
    kernels; the search's masks are rounded up or down, as close to p as possible, and never above
    a budget.  1 turns it off."""


class WormParts(Settings):
    """The three parts of the engine's settings; reports all mistakes at once."""

    search: SearchConfig = SearchConfig()
    truncation: TruncationConfig = TruncationConfig()
    ticket: TicketConfig = TicketConfig()

    @model_validator(mode="after")
    def _bytes_are_known(self) -> Self:
        if self.search.budget.bytes is not None and self.truncation.compression == "powersgd":
            raise ValueError(
                "search.budget.bytes contradicts truncation.compression 'powersgd', whose bytes "
                "are not in proportion to the elements; give search.budget.parameters"
            )
        return self

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("\n".join(mistakes_in(error, list(self.keys())))) from None


class WormConfig(WormParts):
    """All settings of the engine.

    Raises:
        ConfigError: listing every mistake at once.
    """

    if TYPE_CHECKING:  # the one that type checkers derive refuses mappings

        def __init__(
            self,
            /,
            *,
            search: SearchConfig | Mapping[str, Any] = ...,
            truncation: TruncationConfig | Mapping[str, Any] = ...,
            ticket: TicketConfig | Mapping[str, Any] = ...,
        ) -> None: ...

    @classmethod
    def preset(cls, name: str, **changes: Any) -> Self:
        """The preset called ``name``, with ``changes`` on top.

        Raises:
            ConfigError: there is no such preset, or the changes are not valid.
        """
        if name not in PRESETS:
            raise ConfigError(f"preset: {name!r} is none of {', '.join(PRESETS)}")
        return cls(**merge(PRESETS[name], changes))
