"""Triton kernels and their PyTorch references: tree attention, acceptance, and a step's parts.

Shapes: B requests, N packed rows (each request's rows, then pad rows), Hq query heads, Hkv KV
heads, D the head dimension. All functions take tensors, never the library's structures, and are
sync-free.

``backend`` picks the implementation: ``"torch"``, the reference; ``"triton"``, the kernel, for CUDA
tensors, or any tensor if ``TRITON_INTERPRET=1`` was set; ``"auto"``, the kernel for CUDA tensors if
Triton is installed, otherwise, and under ``torch.compile``, the reference. Requesting a missing
backend is an :class:`~echo.EchoError`, never a silent fallback.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels import arguments, reference, tiles
from echo.kernels.arguments import Attention, AttentionPlan

__all__ = [
    "BACKENDS",
    "AttentionPlan",
    "accept",
    "argmax_tokens",
    "compiling",
    "merge_attention",
    "plan_attention",
    "tree_attention",
    "use_triton",
    "using",
]

BACKENDS = ("auto", "torch", "triton")
_preferred = ContextVar("echo.kernels.using", default="auto")


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Make ``"auto"`` mean ``backend`` within the block, for the scheduler's kernels too.

    Applies to the current thread or asyncio task only; code under ``torch.compile`` ignores it.

    Raises:
        EchoError: an unknown backend.

    Example:
        >>> with using("torch"):
        ...     argmax_tokens(torch.tensor([[0.0, 2.0, 1.0]])).tolist()
        [1]
    """
    _known(backend)
    before = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(before)


def _known(backend: str) -> None:
    if backend not in BACKENDS:
        raise EchoError(f"backend: expected one of {BACKENDS}, got {backend!r}")


@contextlib.contextmanager
def compiling(max_workers: int | None = None) -> Iterator[None]:
    """Compile the kernels called within the block in parallel, without launching them.

    Run it once for each shape that a server will use, before its first request waits for a
    compiler. Outputs are uninitialised, and PyTorch's own operations run as usual: make the calls
    on a :class:`echo.Workspace`, whose buffers begin as zeros, or index nothing by their results.
    ``max_workers`` compiler threads, or the executor's default; nested blocks join the outer one.

    Raises:
        EchoError: not a positive int.

    Example:
        >>> with compiling():
        ...     _ = argmax_tokens(torch.zeros(1, 8))
    """
    if max_workers is not None:
        checks.integer("max_workers", max_workers, 1)
    if importlib.util.find_spec("triton") is None or tiles.compiles_only.get():
        yield
        return
    import triton

    before = tiles.compiles_only.set(True)
    try:
        with ThreadPoolExecutor(max_workers) as threads, triton.AsyncCompileMode(threads):
            yield
    finally:
        tiles.compiles_only.reset(before)


def use_triton(at: Tensor, backend: str = "auto") -> bool:
    """Whether ``backend`` selects the Triton kernels for tensors on the device of ``at``.

    Raises:
        EchoError: an unknown backend; or "triton" without Triton, or for CPU tensors outside its
            interpreter.

    Example:
        >>> use_triton(torch.zeros(1), "torch")
        False
    """
    _known(backend)
    if backend == "auto":
        backend = "torch" if torch.compiler.is_compiling() else _preferred.get()
    if backend == "torch" or (backend == "auto" and not at.is_cuda):
        return False
    if importlib.util.find_spec("triton") is None:
        if backend == "auto":
            return False
        raise EchoError("backend: expected an installed triton for 'triton', got none")
    if not (at.is_cuda or tiles.interpreted()):
        wanted = "CUDA tensors for 'triton' (or TRITON_INTERPRET=1)"
        raise EchoError(f"backend: expected {wanted}, got {at.device.type} tensors")
    return True


def tree_attention(
    q: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    page_table: Tensor | None,
    prefix_lens: Tensor | None,
    tree_key: Tensor,
    tree_value: Tensor,
    request: Tensor,
    indptr: Tensor,
    mask: Tensor,
    *,
    mode: str = "whole",
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    depth: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    sinks: Tensor | None = None,
    prefix_out: Tensor | None = None,
    prefix_lse: Tensor | None = None,
    splits: int | None = None,
    plan: AttentionPlan | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of packed tree rows over a paged KV cache and their own ancestors.

    Deterministic; the grid depends on shapes only, so one CUDA graph serves any raggedness. If
    ``splits`` is given, a request's bits do not depend on the rest of the batch.

    Args:
        q: float16, bfloat16 or float32 [N, Hq, D].
        key_cache, value_cache: [pages, page_size, Hkv, D], of q's dtypes or float8_e4m3fn or
            float8_e5m2. Slots past a prefix or before its window are never read. A non-finite
            cached value may corrupt all rows of its request. None in mode "tree".
        page_table: int32 [B, max_pages]; None in mode "tree". Tokens on pages that the cache does
            not have, such as the usual padding -1, are not visible.
        prefix_lens: int32 [B], tokens in the cache before the root, clamped to 0 and max_pages *
            page_size; None in mode "tree".
        tree_key, tree_value: [N, Hkv, D], keys and values of the rows, of q's dtypes. Rows that see
            a non-finite one become NaN, no others; pad rows may hold anything.
        request: int32 [N]; B on pad rows, which attend to themselves only.
        indptr: int32 [B + 1], where each request's rows begin.
        mask: int32 [N, words], ancestors and the row itself, as in :class:`echo.PackedTree`; bits
            past the request's rows are ignored.
        mode: "whole", prefix and tree; or "tree", the tree part only, one launch, joined with
            another kernel's attention over the prefix if ``prefix_out`` is given.
        scale: of the scores. Defaults to 1 / sqrt(D).
        softcap: scores become ``softcap * tanh(score / softcap)``.
        window: a row sees keys at most ``window - 1`` positions before its own (prefix + depth).
        depth: int32 [N], required with ``window``.
        key_scale, value_scale: float32 [Hkv], factors of cached keys and values, as for float8.
        sinks: float32 [Hq], a logit per head that takes part in the softmax of real rows but has no
            value, as in gpt-oss; it counts in lse. The prefix's kernel must leave it out.
        prefix_out, prefix_lse: the prefix's part to join in mode "tree": float [N, Hq, D] and
            float32 [N, Hq], natural log; any strides but the last of prefix_out. Rows without keys
            (infinite lse of either sign) and pad rows may hold anything.
        splits: maximum pieces of a request's keys. Partial results take 4 * N * Hq * (D + 1) *
            splits bytes, at most 2^30. Defaults to equal shares for all programs, below 100 MB.
        plan: from :func:`plan_attention` for this batch. Defaults to one made in this call.
        backend: "auto", "torch" or "triton".

    Returns:
        out [N, Hq, D] in q's dtype, and lse float32 [N, Hq], the natural log of the summed
        exponentials. A row that sees no key gets zeros and -inf.

    Raises:
        EchoError: arguments that do not fit, or a missing backend. The kernel also rejects a last
            dimension that is not contiguous, and head dimensions outside 16 to 256.

    Source: Flash-Decoding's split and merge (Dao et al., 2023), FlashAttention-2's online softmax.

    Example:
        >>> row, own = torch.zeros(1, 1, 16), torch.ones(1, 1, 16)
        >>> links = torch.zeros(1).int(), torch.tensor([0, 1]).int(), torch.ones(1, 1).int()
        >>> out, lse = tree_attention(row, *[None] * 4, row, own, *links, mode="tree")
        >>> torch.equal(out, own), lse.item()
        (True, 0.0)
    """
    call = Attention(
        q, key_cache, value_cache, page_table, prefix_lens, tree_key, tree_value, request, indptr,
        mask, mode, scale, softcap, window, depth, key_scale, value_scale, sinks, prefix_out,
        prefix_lse, splits, plan,
    )  # fmt: skip
    if use_triton(q, backend):
        from echo.kernels import attention, join

        return join.tree_attention(call) if mode == "tree" else attention.tree_attention(call)
    return reference.tree_attention(call)


def plan_attention(
    q: Tensor,
    key_cache: Tensor | None,
    page_table: Tensor | None,
    prefix_lens: Tensor | None,
    tree_key: Tensor,
    indptr: Tensor,
    *,
    mode: str = "whole",
    window: int | None = None,
    splits: int | None = None,
    backend: str = "auto",
) -> AttentionPlan:
    """Make a step's work list on the device, shared by all layers of one window and splits.

    Arguments as in :func:`tree_attention`; only shapes and dtypes of q, tree_key and key_cache
    matter. Mode "tree" needs no plan; its is empty.

    Returns:
        The ``plan`` of :func:`tree_attention`, which rejects one made for other shapes, element
        sizes, mode, window or splits. It cannot check that ``indptr`` and ``prefix_lens`` still
        hold the same values: that would be a device-to-host sync.

    Raises:
        EchoError: arguments that do not fit, or a missing backend.

    Example:
        >>> row, indptr = torch.zeros(2, 1, 16), torch.tensor([0, 2]).int()
        >>> plan_attention(row, None, None, None, row, indptr, mode="tree").shapes.num_rows
        2
    """
    shapes = arguments.attention_shapes(
        q, key_cache, page_table, prefix_lens, tree_key, indptr, mode, window, splits
    )
    if prefix_lens is not None and shapes.mode == "whole" and use_triton(q, backend):
        from echo.kernels import schedule

        return schedule.plan_attention(shapes, indptr, prefix_lens)
    return AttentionPlan(shapes, None, *(indptr[:0],) * 3)


def merge_attention(
    o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys.

    Args:
        o1, o2: float [N, H, D]; a part without keys may hold anything.
        lse1, lse2: float32 [N, H], natural logs; -inf for a part without keys.
        backend: "auto", "torch" or "triton".

    Returns:
        out [N, H, D] in o1's dtype, and lse float32 [N, H].

    Raises:
        EchoError: arguments that do not fit, or a missing backend.

    Example:
        >>> one, lse = torch.ones(1, 1, 2), torch.zeros(1, 1)
        >>> merge_attention(one, lse, 3 * one, lse)[0].tolist()
        [[[2.0, 2.0]]]
    """
    arguments.check_merge(o1, lse1, o2, lse2)
    if use_triton(o1, backend):
        from echo.kernels import join

        return join.merge_attention(o1, lse1, o2, lse2)
    return reference.merge_attention(o1, lse1, o2, lse2)


def accept(
    parent: Tensor,
    indptr: Tensor,
    tokens: Tensor,
    target: Tensor,
    max_depth: int,
    *,
    max_new_tokens: Tensor | None = None,
    eos_tokens: Tensor | None = None,
    out: tuple[Tensor, ...] | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Greedy acceptance: follow each tree from its root to the child of the target's token.

    Lossless by construction: every emitted token is the target's own. Among equal siblings the
    first is followed. Acceptance ends before a row whose target token is negative (logits without a
    finite maximum: :func:`argmax_tokens`); a request whose root is such a row emits nothing. A
    parent outside the row's own request counts as none. Rows past the end of an answer count as
    having no target token.

    Args:
        parent: int32 [N], row of the parent within its request; -1 for none.
        indptr: int32 [B + 1], where each request's rows begin; rows from the last on are pads.
        tokens: int64 [N], the drafted tokens.
        target: int64 [N], the target's token at each row, negative for none; or its logits, float
            [N, V], read once, for greedy tokens.
        max_depth: maximum number of drafts to accept per request.
        max_new_tokens: int64 [B], tokens that each answer may still get. Defaults to no limit.
        eos_tokens: int64 [n], tokens that end an answer as its last token.
        out: buffers of the results, written to and returned.
        backend: "auto", "torch" or "triton"; both give the same bits.

    Returns:
        rows int64 [B, max_depth + 1], accepted rows of the packed layout, root first, then -1;
        emitted int64 [B, max_depth + 1], the target's token at each, then -1;
        num_emitted int64 [B], bonus token included; 0 without rows or without a token at the root;
        cut_row int64 [B], the accepted row that emitted no token and ended the path; -1 for none;
        bonus int64 [B], the last token emitted, -1 for none.

    Raises:
        EchoError: arguments that do not fit, or a missing backend.

    Example:
        >>> parent, indptr = torch.tensor([-1, 0, 0]).int(), torch.tensor([0, 3]).int()
        >>> tokens, target = torch.tensor([7, 5, 6]), torch.tensor([6, 1, 2])
        >>> rows, emitted, *_ = accept(parent, indptr, tokens, target, 2)
        >>> rows.tolist(), emitted.tolist()
        ([[0, 2, -1]], [[6, 2, -1]])
    """
    step = arguments.check_accept(
        parent, indptr, tokens, target, max_depth, max_new_tokens, eos_tokens
    )
    if use_triton(tokens, backend):
        from echo.kernels import acceptance

        dense = out is not None and all(buffer.is_contiguous() for buffer in out)
        found = acceptance.accept(*step, out if dense else None)
    else:
        found = reference.accept(*step)
    if out is None:
        return found
    for buffer, value in zip(out, found, strict=True):
        if buffer is not value:
            buffer.copy_(value)
    return out[0], out[1], out[2], out[3], out[4]


def argmax_tokens(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """Return greedy tokens int64 [N] of ``logits`` [N, V], the lowest of equals; NaN never wins.

    A row without a value above -inf gets -1. ``backend`` as in :func:`accept`.

    Raises:
        EchoError: arguments that do not fit, or a missing backend.

    Example:
        >>> argmax_tokens(torch.tensor([[0.0, 2.0, 2.0], [torch.nan] * 3])).tolist()
        [1, -1]
    """
    arguments.check_logits(logits)
    if use_triton(logits, backend):
        from echo.kernels import acceptance

        return acceptance.argmax_tokens(logits)
    return reference.argmax_tokens(logits)
