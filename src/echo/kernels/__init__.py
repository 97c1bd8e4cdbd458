"""Kernels and their plain-torch twins. They take tensors, never the library's structures.

Every function here picks one of two implementations of the same signature by ``backend``: ``"torch"``, the twin in
:mod:`echo.kernels.reference`; ``"triton"``, the kernel, for CUDA tensors, or any tensor where Triton was imported with
``TRITON_INTERPRET=1``; ``"auto"``, the kernel for CUDA tensors where Triton is installed, and the twin otherwise. A backend that is
asked for and not there is an :class:`~echo.errors.EchoError`, never a silent fallback. Under ``torch.compile``, "auto" is the twin,
which the compiler can fuse with what is around it.

The step around them, plant to observe, is torch's operations, and a few kernels of the same bits where :func:`use_triton` says so.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels import reference, tiles
from echo.kernels.arguments import Attention, AttentionPlan, Planning, merge_shapes

BACKENDS = ("auto", "torch", "triton")
_preferred = ContextVar("echo.kernels.using", default="auto")


@contextlib.contextmanager
def using(backend: str) -> Iterator[None]:
    """Within it, ``"auto"`` means ``backend``, of the step too: to compare both, or to keep one out.

    It holds for the thread, or the asyncio task, that entered it and for no other. Code compiled by ``torch.compile`` does not see it.

    Raises:
        EchoError: no such backend.
    """
    if backend not in BACKENDS:
        raise EchoError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    before = _preferred.set(backend)
    try:
        yield
    finally:
        _preferred.reset(before)


def use_triton(at: Tensor, backend: str = "auto") -> bool:
    """Whether ``backend`` means the Triton kernels for tensors where ``at`` is, or PyTorch's operations.

    Raises:
        EchoError: no such backend, or "triton" without Triton, or without its interpreter for CPU tensors.
    """
    if backend not in BACKENDS:
        raise EchoError(f"backend: expected one of {BACKENDS}, got {backend!r}")
    if backend == "auto":
        backend = "torch" if torch.compiler.is_compiling() else _preferred.get()
    cuda = isinstance(at, Tensor) and at.is_cuda
    if backend == "torch" or (backend == "auto" and not cuda):
        return False
    if importlib.util.find_spec("triton") is None:
        if backend == "auto":
            return False
        raise EchoError("backend: expected an installed triton for 'triton', got none")
    if not (cuda or tiles.interpreted()):
        device = at.device.type
        raise EchoError(
            f"backend: expected CUDA tensors for 'triton' (or TRITON_INTERPRET=1), got {device} tensors"
        )
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
    splits: int | None = None,
    plan: AttentionPlan | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention of packed tree rows over a paged context and their own ancestors.

    The kernel reads nothing back and launches a grid that depends on shapes only: one CUDA graph serves any raggedness. It is
    deterministic. With ``splits`` given, a request's bits depend on nothing but the request, whatever the batch is.

    Args:
        q: float16, bfloat16 or float32 [N, Hq, D].
        key_cache, value_cache: [pages, page_size, Hkv, D], of q's kinds, or float8_e4m3fn or float8_e5m2. What no row sees, beyond a
            context or before its window, is never read. A cached value that is not finite may spoil all rows of its request: the root
            sees it. None in mode "tree".
        page_table: int32 [B, max_pages]; None in mode "tree". Tokens on a page that the cache does not have, such as the -1 that tables
            are padded with, are not there: no row sees them.
        prefix_lens: int32 [B], tokens in the cache before the tree, cut to 0 and max_pages * page_size; None in mode "tree".
        tree_key, tree_value: [N, Hkv, D], the rows' own keys and values, of q's kinds. What is not finite makes those rows NaN
            that see it, and no others; pad rows may hold anything.
        request: int32 [N]; B on pad rows, which attend to themselves only.
        indptr: int32 [B + 1], where each request's rows begin.
        mask: int32 [N, words], ancestors and the row itself, as in a packed tree; bits beyond the request's rows are ignored.
        mode: "whole", context and tree; or "tree", the tree part only, to be merged with the result of another kernel over the
            context by :func:`merge_attention`. Merge real rows only: a pad row's result is whole by itself.
        scale: of the scores; 1 / sqrt(D) where not given.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        window: a row sees keys at most ``window - 1`` positions before its own.
        depth: int32 [N], needed with ``window``.
        key_scale, value_scale: float32 [Hkv], factors of cached keys and values, as for float8 caches.
        splits: pieces that each request's keys are cut in, at most; balanced over the whole batch where not given. A call needs
            4 * N * Hq * (D + 1) * splits bytes for partial results then, and is refused above 2^30; below 100 MB where not given.
        plan: what :func:`plan_attention` made for this batch; made anew where not given.
        backend: "auto", "torch" or "triton".

    Returns:
        out [N, Hq, D] in q's dtype, and lse float32 [N, Hq], the natural log of the summed exponentials. A row that sees nothing has
        zeros and -inf.

    Raises:
        EchoError: arguments that do not fit, or a backend that is not there.
    """
    call = Attention(
        q, key_cache, value_cache, page_table, prefix_lens, tree_key, tree_value, request, indptr, mask,
        mode=mode, scale=scale, softcap=softcap, window=window, depth=depth, key_scale=key_scale, value_scale=value_scale,
        splits=splits, plan=plan,
    )  # fmt: skip
    if use_triton(q, backend):
        from echo.kernels import attention

        return attention.tree_attention(call)
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
    """The work list of a step, made once on the device for all its layers that share window and splits.

    Args:
        q, key_cache, page_table, prefix_lens, tree_key, indptr: as in :func:`tree_attention`; of q, tree_key and key_cache only
            shapes and dtypes count.
        mode, window, splits, backend: as in :func:`tree_attention`.

    Returns:
        What :func:`tree_attention` takes as ``plan``. Layers of other shapes, element sizes, mode, window or splits refuse it, by
        either backend. Whether ``indptr`` and ``prefix_lens`` still hold the same numbers is not checked: that would wait for the device.

    Raises:
        EchoError: arguments that do not fit, or a backend that is not there.
    """
    call = Planning(
        q,
        key_cache,
        page_table,
        prefix_lens,
        tree_key,
        indptr,
        mode=mode,
        window=window,
        splits=splits,
    )
    if use_triton(q, backend):
        from echo.kernels import attention

        return attention.plan_attention(call)
    return reference.plan_attention(call)


def merge_attention(
    o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Joins attention over two disjoint sets of keys.

    Args:
        o1, o2: float [N, H, D]; a part without keys may hold anything.
        lse1, lse2: float32 [N, H], natural logs; -inf for a part without keys.
        backend: "auto", "torch" or "triton".

    Returns:
        out [N, H, D] in o1's dtype, and lse float32 [N, H].

    Raises:
        EchoError: arguments that do not fit, or a backend that is not there.
    """
    merge_shapes(o1, lse1, o2, lse2)
    if use_triton(o1, backend):
        from echo.kernels import attention

        return attention.merge_attention(o1, lse1, o2, lse2)
    return reference.merge_attention(o1, lse1, o2, lse2)


def accept(
    parent: Tensor, indptr: Tensor, tokens: Tensor, target: Tensor, max_depth: int, *, max_new_tokens: Tensor | None = None,
    eos_tokens: Tensor | None = None, out: tuple[Tensor, ...] | None = None, backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Walks each tree from its root to the child that equals the target's token, while there is one, up to the end of each answer.

    Lossless by construction: what is emitted is always the target's own token. Of duplicate siblings the first row is walked on.
    A row whose target token is negative (logits without a number: :func:`argmax_tokens`) is never walked on: the walk ends before it, and
    a request whose root is such a row emits nothing. A parent outside the row's own request counts as none, so a broken link ends a walk
    and never leaves it. Behind the end of an answer it is as if the target had no number.

    Args:
        parent: int32 [N], row of the parent within its request; -1 for none.
        indptr: int32 [B + 1], where each request's rows begin; rows from the last on are pads.
        tokens: int64 [N], the drafted tokens.
        target: int64 [N], the target's token after each row, negative where it has none; or float [N, V], its logits, read once, of
            which the greedy tokens are taken.
        max_depth: most steps of a walk.
        max_new_tokens: int64 [B], tokens that each answer may still get; as many as there are where not given.
        eos_tokens: int64 [n], tokens that end an answer, themselves included.
        out: what it returns, to be written to.
        backend: "auto", "torch" or "triton".

    Returns:
        rows int64 [B, max_depth + 1], global rows walked, root first, -1 beyond;
        emitted int64 [B, max_depth + 1], the target's token at each, -1 beyond;
        lengths int64 [B], rows walked; 0 for a request without rows, or whose root has no token;
        beyond int64 [B], the drafted row that the walk ended before because it has no token; -1 where it ended for want of a child;
        last int64 [B], the last token emitted, -1 for none.

    Raises:
        EchoError: arguments that do not fit, or a backend that is not there.
    """
    batch = indptr.shape[0] - 1
    if max_new_tokens is not None:
        checks.tensor("max_new_tokens", max_new_tokens, [batch], torch.int64, tokens.device)
    if eos_tokens is not None:
        checks.tensor("eos_tokens", eos_tokens, ["n"], torch.int64, tokens.device)
    step = parent, indptr, tokens, target, max_depth, max_new_tokens, eos_tokens
    if use_triton(tokens, backend):
        from echo.kernels import acceptance

        dense = out is not None and all(buffer.is_contiguous() for buffer in out)
        values = acceptance.accept(*step, out if dense else None)
    else:
        values = reference.accept(*step)
    if out is None:
        return values
    for buffer, value in zip(out, values, strict=True):
        if buffer is not value:
            buffer.copy_(value)
    return out[0], out[1], out[2], out[3], out[4]


def argmax_tokens(logits: Tensor, *, backend: str = "auto") -> Tensor:
    """int64 [N]: greedy tokens of ``logits`` [N, V], by ``backend``; NaN never wins, the lowest of equals does; -1 for none above -inf.

    Raises:
        EchoError: arguments that do not fit, or a backend that is not there.
    """
    if use_triton(logits, backend):
        from echo.kernels import acceptance

        return acceptance.argmax_tokens(logits)
    return reference.argmax_tokens(logits)


__all__ = [
    "BACKENDS",
    "AttentionPlan",
    "accept",
    "argmax_tokens",
    "merge_attention",
    "plan_attention",
    "tree_attention",
    "use_triton",
    "using",
]
