"""Page of the benchmark: growth of bytes and messages with the ranks, estimated step times."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..ledger.table import header
from ..network import rate_text
from .row import CHECK, ScaleRow

__all__ = ["PAGE", "write"]

PAGE = "scale.md"
_TEXT = """\
# Scale

Ranks in network namespaces on one machine, each with a link of this rate to a bridge.  They share
the machine's cores, so the compute time grows with their number; the estimate takes it as measured.

## Bytes and messages

{traffic}

`payload`: what a rank passes to collectives.  `ring`: what it sends of that by the formula of a
ring, 2 (n-1)/n times the payload.  `on the wire`: what left its interface, with headers,
acknowledgements and, in a step, BatchNorm's buffers.  Means over the ranks.

## Step times beside plan's estimate

{times}

The estimate is `expected` of `python -m worm_dist plan`, from the measured compute time, latency of
a message, and bandwidth: that which an all-reduce of the network's gradients reaches while nothing
is computed.  `by the rate`: the same from the rate of the link instead.  Ratios are to the measured
time.
"""


def write(folder: Path, rows: Sequence[ScaleRow]) -> str:
    """Write ``scale.md``; return its text."""
    ordered = sorted(rows, key=lambda row: (row.model, row.variant == CHECK, row.ranks))
    text = _TEXT.format(traffic="\n".join(_traffic(ordered)), times="\n".join(_times(ordered)))
    (folder / PAGE).write_text(text, encoding="utf-8")
    return text


def _traffic(rows: Sequence[ScaleRow]) -> list[str]:
    titles = ["network", "what", "ranks", "collectives", "payload", "ring", "on the wire"]
    lines = header([*titles, "packets"])
    first = {(row.model, row.variant, row.ranks): row for row in reversed(rows)}
    for row in first.values():
        wire = (
            ("–", "–") if not row.wire_bytes else (f"{row.wire_bytes:,.0f}", f"{row.packets:.0f}")
        )
        cells = (f"{row.payload_bytes:,}", f"{row.ring_bytes:,.0f}", *wire)
        lines.append(
            f"| {row.model} | {row.variant} | {row.ranks} | {row.collectives} | "
            f"{' | '.join(cells)} |"
        )
    return lines


def _times(rows: Sequence[ScaleRow]) -> list[str]:
    titles = ["network", "link", "ranks", "what", "computing (ms)", "latency (us)"]
    titles += ["bandwidth (Mbit/s)", "measured (ms)", "estimated (ms)", "ratio"]
    lines = header([*titles, "by the rate (ms)", "ratio"])
    for row in rows:
        if row.variant == CHECK:
            continue
        estimates = (row.estimate_seconds, row.nominal_estimate_seconds)
        cells = [
            ("–", "–") if each is None else (f"{1000 * each:.1f}", f"{each / row.seconds:.2f}")
            for each in estimates
        ]
        lines.append(
            f"| {row.model} | {rate_text(row.network)} | {row.ranks} | {row.variant} | "
            f"{1000 * row.compute_seconds:.1f} | {1e6 * row.latency_seconds:.0f} | "
            f"{row.bits_per_second / 1e6:.0f} | {1000 * row.seconds:.1f} | "
            f"{' | '.join(cells[0])} | {' | '.join(cells[1])} |"
        )
    return lines
