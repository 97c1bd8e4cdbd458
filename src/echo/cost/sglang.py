"""SGLang's cost tables (0.5.23): ``bias + alpha(requests) + theta(rows)`` between probes, or steps per second from probe to probe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from echo import _checks as checks

if TYPE_CHECKING:
    from echo.cost.model import CostModel


def write(model: CostModel) -> str:
    """The additive table. A tier is two probes, its first and its last row; a single probe is written twice, as its reader needs."""
    inside = [t for t in model.tiers if t <= model.num_tokens[-1]]
    edges = {t + 1 for t in inside} | set(inside) | {1, *model.num_tokens}
    probes = sorted(edges) if len(edges) > 1 else [1, 2]
    curve = np.asarray(model(np.array(probes)))
    return json.dumps(
        {
            "bias_seconds": float(curve[0]),
            "bs_probes": list(model.num_reqs) or [1],
            "alpha_seconds": list(model.request_seconds) or [0.0],
            "m_probes": probes,
            "theta_seconds": [float(s) for s in curve - curve[0]],
        }
    )


def read(text: str) -> CostModel:
    """See :meth:`CostModel.from_sglang`."""
    from echo.cost.model import CostModel

    with checks.reading("cost: expected one of SGLang's cost tables"):
        data = json.loads(text)
        if "bias_seconds" in data:
            alpha, theta = (_rising(data[name]) for name in ("alpha_seconds", "theta_seconds"))
            rows, seconds = data["m_probes"], float(data["bias_seconds"]) + alpha[0] + theta
            extra: dict[str, Any] = {
                "num_reqs": tuple(data["bs_probes"]),
                "request_seconds": tuple((alpha - alpha[0]).tolist()),
            }
            return CostModel(
                tuple(rows), tuple(seconds.tolist()), **(extra if len(alpha) > 1 else {})
            )
        probes, rate = (
            data["sample_batch_tokens"],
            np.asarray(data["sample_steps_per_sec"], dtype=np.float64),
        )
        seconds = _rising(1.0 / rate)
        starts = {int(p): float(s) for p, s in zip(probes, seconds, strict=True)}
        ends = {int(p) - 1: float(s) for p, s in zip(probes[1:], seconds, strict=False)}
        ends |= {
            int(probes[-1]) + 1: float(seconds[-1])
        }  # held beyond the last probe, as its reader does
        steps = dict(sorted((ends | starts).items()))
        return CostModel(tuple(steps), tuple(steps.values()))


def _rising(values: Any) -> Any:
    from scipy.optimize import isotonic_regression

    return isotonic_regression(np.asarray(values, dtype=np.float64)).x
