"""Traffic: the bytes that a rank hands to collectives."""

from __future__ import annotations

from dataclasses import dataclass

from ..schema import Count, Schema

__all__ = ["Traffic", "TrafficSchema"]


class TrafficSchema(Schema):
    """Schema of ``Traffic`` as a dict."""

    sent_bytes: Count
    dense_bytes: Count
    total_sent_bytes: Count
    total_dense_bytes: Count
    control_bytes: Count


@dataclass
class Traffic:
    """Bytes that this rank hands to collectives.

    Steps with a reducer are counted; for others one averaging backward pass per step is assumed.

    Attributes:
        sent_bytes: bytes of the last optimizer step, with all backward passes since the step
            before, skipped steps of a loss scaler included.  Under ZeRO also this rank's share of
            the gathered weights, with what it is padded by.
        dense_bytes: bytes that a step of the dense network would have sent, after the draw too.
        total_sent_bytes: sum of ``sent_bytes`` over all steps so far.
        total_dense_bytes: sum of ``dense_bytes`` over all steps so far.
        control_bytes: bytes of scores, digests and verdicts in all checks so far.
    """

    sent_bytes: int = 0
    dense_bytes: int = 0
    total_sent_bytes: int = 0
    total_dense_bytes: int = 0
    control_bytes: int = 0

    def add_step(self, sent_bytes: int, dense_bytes: int) -> None:
        self.sent_bytes = sent_bytes
        self.dense_bytes = dense_bytes
        self.total_sent_bytes += sent_bytes
        self.total_dense_bytes += dense_bytes
