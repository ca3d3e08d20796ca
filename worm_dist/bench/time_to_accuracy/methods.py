"""Methods that are compared, and the runs that this takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from ..hooks import POWER_SGD_RANK
from ..ledger.control import EQUAL_FLOPS, Control
from ..ledger.row import Key
from ..ledger.rule import DENSE, RULES, Rule
from ..ledger.spec import RunSpec

__all__ = ["BASELINE", "LABELS", "counterpart", "specs"]

BASELINE = DENSE.name
"""Name of the rule that all others are compared with: plain DDP."""

_BF16 = {"truncation": {"compression": "bf16"}}
_POWER_SGD = {"truncation": {"compression": "powersgd", "compression_rank": POWER_SGD_RANK}}

_DENSE = (
    DENSE,
    Rule("dense, bf16 hook", "dense", hook="bf16"),
    Rule("dense, PowerSGD hook", "dense", hook="PowerSGD"),
)
_WORM = RULES["worm"]
_PRUNING = (
    _WORM.changed("worm, bf16", _BF16),
    _WORM.changed("worm, PowerSGD", _POWER_SGD),
    RULES["early-bird"],
)
_UNIFORM = Control(EQUAL_FLOPS, _WORM)

LABELS: Mapping[str, str] = {
    "dense": "DDP",
    "dense, bf16 hook": "DDP, bf16 hook",
    "dense, PowerSGD hook": f"DDP, PowerSGD hook (rank {POWER_SGD_RANK})",
    _UNIFORM.name: "DDP, uniformly thinner at the ticket's FLOPs",
    "early-bird": "early-bird",
    "worm": "worm",
    "worm, bf16": "worm, bf16",
    "worm, PowerSGD": f"worm, PowerSGD (rank {POWER_SGD_RANK})",
}
"""What each rule is called in tables, in their order."""

_COUNTERPARTS = {"worm, bf16": "dense, bf16 hook", "worm, PowerSGD": "dense, PowerSGD hook"}


def counterpart(key: Key) -> str | None:
    """The rule that compresses as this one does, without pruning; None if this does not compress.

    Args:
        key: key of a run.
    """
    return _COUNTERPARTS.get(key.rule)


def specs(
    subject: str,
    ratios: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    ranks: int,
    chosen: Sequence[str] = (),
) -> Iterator[RunSpec]:
    """The runs, the first seed first, each after the one that it depends on.

    Args:
        subject: name of the subject.
        ratios: shares of channels to drop.
        seeds: seeds of the weights and of the order of the data, alike for all methods.
        epochs: number of epochs.
        ranks: number of ranks that share each batch.
        chosen: names of rules; empty for all.
    """
    for seed in seeds:
        for rule in _DENSE:
            if not chosen or rule.name in chosen:
                yield RunSpec(subject, rule, 0.0, seed, epochs, ranks)
        for ratio in ratios:
            for method in (_WORM, _UNIFORM, *_PRUNING):
                if not chosen or method.name in chosen:
                    yield RunSpec(subject, method, ratio, seed, epochs, ranks)
