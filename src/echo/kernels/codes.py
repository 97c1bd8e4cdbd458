"""Numbers that kernels and torch's operations must agree on."""

from __future__ import annotations

from enum import IntEnum

UNSELECTABLE = 0x7F800000
"""Cost of a node that can never be selected: the bits of +inf, above those of every finite float32."""

ONE = 1 << 24
"""Fixed-point 1.0 of a calibrated probability."""

TABLE_BINS, BINS_PER_NAT = 512, 32
"""The look-up table of a reliability map: bin i holds path log-probabilities in (-(i+1)/32, -i/32]; the last one all below."""


class Status(IntEnum):
    """Why a request stopped drafting, or that it has not."""

    ACTIVE = 0
    TRUNCATED = 1
    """Failed a gate."""
    STARVED = 2
    """Passed, and found no rows left to buy; or live, and found no row for its root."""
    FINISHED = 3
    """Reached the deepest layer."""
    EXHAUSTED = 4
    """Nothing to draft on: no finite score, or the row limit of the request reached."""
    EMPTY = 5
    """No request in this slot."""
