"""Device memory of a tier, computed before anything is allocated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.kernels.arguments import Shapes
from echo.workspace import Workspace


class TierMemory(NamedTuple):
    """Bytes of a tier and of all smaller tiers, which share its buffers.

    Attributes:
        workspace: buffers of planning and acceptance, history and counters.
        drafts: keys and values of the step's rows, where they are kept outside the pages.
        attention: work list and partial results of tree attention, shared by all layers.
    """

    workspace: int
    drafts: int
    attention: int

    @property
    def total(self) -> int:
        """Sum of the parts."""
        return sum(self)


def tier_memory(
    scheduler: ElasticBudgetScheduler,
    lanes: int,
    *,
    k: int | Sequence[int],
    num_verify_tokens: int,
    num_layers: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    max_model_len: int,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    page_size: int = 64,
    max_num_reqs: int | None = None,
    device: torch.device | str = "cpu",
) -> TierMemory:
    """Compute the bytes that a tier takes on one rank, without allocating.

    CUDA graphs of a shipped rule hold no further tensors; the driver's memory for their nodes is
    known after capture (:attr:`echo.workspace.Graphs.nbytes`).

    Args:
        scheduler, lanes, k, num_verify_tokens, max_num_reqs: as for :class:`echo.Workspace`.
        num_layers, num_heads, num_kv_heads, head_dim: of the target's attention, on one rank.
        max_model_len: maximum number of cached tokens of a request.
        dtype: of the model.
        cache_dtype: of the KV cache. Defaults to ``dtype``.
        page_size: tokens per page.
        device: the GPU whose multiprocessors share the work of attention.

    Raises:
        EchoError: an argument of the wrong kind or out of range.

    Example:
        >>> import echo
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(4), budget=1024, max_depth=6)
        >>> model = {"num_layers": 32, "num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
        >>> limits = {"k": 4, "num_verify_tokens": 1024, "max_model_len": 8192}
        >>> tier_memory(scheduler, 256, **limits, **model).drafts >> 20  # MiB
        128
    """
    from echo.kernels import schedule

    sizes = {"num_layers": num_layers, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    sizes |= {"head_dim": head_dim, "max_model_len": max_model_len, "page_size": page_size}
    for name, value in sizes.items():
        checks.integer(name, value, 1)
    if num_heads % num_kv_heads:
        raise EchoError(f"num_heads: expected a multiple of {num_kv_heads}, got {num_heads}")
    step: dict[str, Any] = {"num_verify_tokens": num_verify_tokens, "max_num_reqs": max_num_reqs}
    space = Workspace(scheduler, lanes, k=k, **step, device="meta")
    cached = dtype if cache_dtype is None else cache_dtype
    prefix = -(-max_model_len // page_size) * page_size
    shapes = Shapes(
        num_verify_tokens, lanes, num_heads, num_kv_heads, head_dim, dtype.itemsize,
        cached.itemsize, page_size, prefix, "whole", None, None, torch.device(device),
    )  # fmt: skip
    size = schedule.sizes(shapes)
    listed = size.items * schedule.FIELDS.value + 2 * size.programs + size.cuts
    partial = num_kv_heads * size.partials * (head_dim + 1)
    drafts = 2 * num_layers * num_verify_tokens * num_kv_heads * head_dim * dtype.itemsize
    return TierMemory(space.nbytes, drafts, 4 * (listed + partial))
