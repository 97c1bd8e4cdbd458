"""Constants shared by the kernels and the PyTorch implementations."""

from __future__ import annotations

from enum import IntEnum

UNSELECTABLE = 0x7F800000
"""Cost of a node that can never be selected: the bits of +inf, above those of finite float32."""

ONE = 1 << 24
"""Fixed-point 1.0 of a calibrated probability."""

TABLE_BINS = 512
BINS_PER_NAT = 32
"""Resolution of a reliability table: bin i is for path log-probabilities in (-(i+1)/32, -i/32]."""


class Status(IntEnum):
    """Whether a request still drafts, and if not, why."""

    ACTIVE = 0
    TRUNCATED = 1
    """Failed a gate."""
    STARVED = 2
    """Passed the gate but no verify tokens remained; or live, but none remained for its root."""
    FINISHED = 3
    """Reached the deepest layer."""
    EXHAUSTED = 4
    """Nothing to expand: no finite score, or its limit of verify tokens is reached."""
    EMPTY = 5
    """No request at this index."""
