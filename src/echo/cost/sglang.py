"""Read and write SGLang's cost tables (0.5.23)."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo.cost import fit

if TYPE_CHECKING:
    from echo.cost.model import CostModel


def table(model: CostModel) -> str:
    """Write the additive table (JSON) of a ``model``: see :meth:`CostModel.to_sglang`."""
    if model.context_token:
        pairs = [(n, b) for b in model.num_reqs or (1,) for n in model.num_tokens if n >= b]
        tokens, reqs = np.array(pairs, dtype=np.float64).T
        seconds = replace(model, tiers=())(tokens, num_reqs=reqs)
        nearest = fit.curves(seconds, {"num_tokens": tokens, "num_reqs": reqs})
        model = type(model)(tiers=model.tiers, **nearest)
    inside = [t for t in model.tiers if t <= model.num_tokens[-1]]
    edges = {t + 1 for t in inside} | set(inside) | {1, *model.num_tokens}
    probes = sorted(edges) if len(edges) > 1 else [1, 2]  # SGLang's reader needs two
    curve = np.asarray(model(np.array(probes)))
    written = {
        "bias_seconds": float(curve[0]),
        "bs_probes": model.num_reqs or [1],
        "alpha_seconds": model.request_seconds or [0.0],
        "m_probes": probes,
        "theta_seconds": (curve - curve[0]).tolist(),
    }
    return json.dumps(written)


def fields(text: str) -> dict[str, Any]:
    """Read the fields of a :class:`CostModel` that an SGLang cost table (JSON) determines.

    ``bias + alpha(requests) + theta(tokens)`` between probes, or steps per second held from probe
    to probe.
    """
    with checks.reading("cost: expected one of SGLang's cost tables"):
        data = json.loads(text)
        if "bias_seconds" in data:
            alpha, theta = (_rising(data[name]) for name in ("alpha_seconds", "theta_seconds"))
            seconds = float(data["bias_seconds"]) + alpha[0] + theta
            found = {"num_tokens": data["m_probes"], "seconds": seconds.tolist()}
            if len(alpha) == 1:
                return found
            rises = (alpha - alpha[0]).tolist()
            return found | {"num_reqs": data["bs_probes"], "request_seconds": rises}
        probes = [int(probe) for probe in data["sample_batch_tokens"]]
        seconds = _rising(1.0 / np.asarray(data["sample_steps_per_sec"])).tolist()
        ends = [probe - 1 for probe in probes[1:]] + [probes[-1] + 1]
        flat = dict(zip(ends, seconds, strict=True)) | dict(zip(probes, seconds, strict=True))
        tokens = sorted(flat)
        return {"num_tokens": tokens, "seconds": [flat[count] for count in tokens]}


def _rising(values: Any) -> NDArray[np.float64]:
    from scipy.optimize import isotonic_regression

    return np.asarray(isotonic_regression(np.asarray(values, dtype=np.float64)).x)
