"""Numbers that the kernels and PyTorch's operations share."""

from __future__ import annotations

from enum import IntEnum

UNSELECTABLE = 0x7F800000
"""Cost of a node that can never be selected: the bits of +inf, above all finite float32."""

ONE = 1 << 24
"""Fixed-point 1.0 of a calibrated probability."""

TABLE_BINS = 512
BINS_PER_NAT = 32
"""Look-up table of a reliability map: bin i holds path log-probabilities in (-(i+1)/32, -i/32]."""


class Status(IntEnum):
    """Why a request stopped drafting, or that it has not."""

    ACTIVE = 0
    TRUNCATED = 1
    """Failed a gate."""
    STARVED = 2
    """Passed, and no verify tokens remained; or live, and none remained for its root."""
    FINISHED = 3
    """Reached the deepest layer."""
    EXHAUSTED = 4
    """Nothing to expand: no finite score, or the request's limit of verify tokens reached."""
    EMPTY = 5
    """No request at this index."""
