"""Checked arguments of the public functions: shapes, dtypes and devices only, so sync-free.

A failed check is an :class:`~echo.EchoError` naming the argument, what was expected and what came.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import FLOATS, EchoError
from echo.kernels.tiles import Tile

PARTIAL_BYTES = 1 << 30
"""Maximum bytes of partial results of a call with fixed splits."""
LONGEST = (1 << 31) - (1 << 10)
"""Maximum tokens of a prefix: the end of its last block must be an int32."""
CACHES = (*FLOATS, torch.float8_e4m3fn, torch.float8_e5m2)
MODES = ("whole", "tree")


class Shapes(NamedTuple):
    """What the host knows of an attention call.

    ``itemsize`` and ``cache_itemsize`` are bytes per element; ``page_size`` and ``max_prefix``
    are 0 in mode "tree".
    """

    num_rows: int
    batch: int
    num_heads: int
    num_kv_heads: int
    dim: int
    itemsize: int
    cache_itemsize: int
    page_size: int
    max_prefix: int
    mode: str
    window: int | None
    splits: int | None
    device: torch.device

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


@dataclass(frozen=True)
class AttentionPlan:
    """A step's work list, made by :func:`echo.kernels.plan_attention`.

    Attributes:
        shapes: what it was made for; other calls are rejected.
        tile: a program's tile; None without a list: the reference, and mode "tree".
        work: int32 [items, 9], row tiles by ranges of their keys.
        programs: int32 [programs, 2], first and end work item of each.
        cuts: int32 [cuts], the first work item of each row tile that was cut; -1 for none.
    """

    shapes: Shapes
    tile: Tile | None
    work: Tensor
    programs: Tensor
    cuts: Tensor


def attention_shapes(
    q: Tensor,
    key_cache: Tensor | None,
    page_table: Tensor | None,
    prefix_lens: Tensor | None,
    tree_key: Tensor,
    indptr: Tensor,
    mode: str,
    window: int | None,
    splits: int | None,
) -> Shapes:
    """Return the shapes of arguments of :func:`echo.kernels.plan_attention`, if they fit."""
    q = checks.tensor("q", q, ["N", "Hq", "D"], FLOATS)
    n, heads, dim = q.shape
    device = q.device
    kv_heads = checks.tensor("tree_key", tree_key, [n, "Hkv", dim], FLOATS, device).shape[1]
    if not kv_heads or heads % kv_heads:
        wanted = f"a multiple of the {kv_heads} heads of tree_key"
        raise EchoError(f"q: expected {wanted}, got {heads} heads")
    batch = checks.tensor("indptr", indptr, ["B + 1"], torch.int32, device).shape[0] - 1
    checks.integer("B", batch, 0)
    if mode not in MODES:
        raise EchoError(f"mode: expected one of {MODES}, got {mode!r}")
    cache_itemsize = q.element_size()
    page_size = 0
    pages = 0
    if mode == "whole":
        shape = ("pages", "page_size", kv_heads, dim)
        cache = checks.tensor("key_cache", key_cache, shape, CACHES, device)
        cache_itemsize = cache.element_size()
        page_size = checks.integer("page_size", cache.shape[1], 1)
        table = checks.tensor("page_table", page_table, [batch, "max_pages"], torch.int32, device)
        pages = table.shape[1]
        checks.tensor("prefix_lens", prefix_lens, [batch], torch.int32, device)
    if window is not None:
        window = checks.integer("window", window, 1)
    if splits is not None:
        splits = checks.integer("splits", splits, 1, 1024)
        limit = PARTIAL_BYTES // (4 * max(n, 1) * heads * (dim + 1))
        if 1 < splits > limit:
            wanted = f"at most {limit}, whose partial results take {PARTIAL_BYTES} bytes"
            raise EchoError(f"splits: expected {wanted}, got {splits}")
    longest = min(pages * page_size, LONGEST)
    sizes = (q.element_size(), cache_itemsize, page_size)
    return Shapes(n, batch, heads, kv_heads, dim, *sizes, longest, mode, window, splits, device)


@dataclass(frozen=True)
class Attention:
    """Arguments of :func:`echo.kernels.tree_attention`, checked to fit together."""

    q: Tensor
    key_cache: Tensor | None
    value_cache: Tensor | None
    page_table: Tensor | None
    prefix_lens: Tensor | None
    tree_key: Tensor
    tree_value: Tensor
    request: Tensor
    indptr: Tensor
    mask: Tensor
    mode: str = "whole"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    depth: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    sinks: Tensor | None = None
    prefix_out: Tensor | None = None
    prefix_lse: Tensor | None = None
    splits: int | None = None
    plan: AttentionPlan | None = None
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        cached = self.key_cache, self.page_table, self.prefix_lens
        s = attention_shapes(
            self.q, *cached, self.tree_key, self.indptr, self.mode, self.window, self.splits
        )
        for name, value in (("shapes", s), ("window", s.window), ("splits", s.splits)):
            object.__setattr__(self, name, value)
        device = self.q.device
        kv = [s.num_kv_heads, s.dim]
        checks.tensor("tree_value", self.tree_value, [s.num_rows, *kv], FLOATS, device)
        checks.tensor("request", self.request, [s.num_rows], torch.int32, device)
        checks.tensor("mask", self.mask, [s.num_rows, "words"], torch.int32, device)
        if self.mode == "whole" and self.key_cache is not None:
            shape = [self.key_cache.shape[0], s.page_size, *kv]
            checks.tensor("value_cache", self.value_cache, shape, CACHES, device)
        for name, scales in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if scales is not None:
                checks.tensor(name, scales, kv[:1], torch.float32, device)
        if self.sinks is not None:
            checks.tensor("sinks", self.sinks, [s.num_heads], torch.float32, device)
        if self.prefix_out is not None or self.prefix_lse is not None:
            if self.mode != "tree":
                raise EchoError(f'prefix_out: expected mode "tree" with it, got {self.mode!r}')
            both = [s.num_rows, s.num_heads]
            checks.tensor("prefix_out", self.prefix_out, [*both, s.dim], FLOATS, device)
            checks.tensor("prefix_lse", self.prefix_lse, both, torch.float32, device)
        if self.softcap is not None:
            checks.real_field(self, "softcap", 0.0)
            if self.softcap == 0:
                raise EchoError("softcap: expected a number above 0, got 0")
        if self.window is not None:
            checks.tensor("depth", self.depth, [s.num_rows], torch.int32, device)
        if self.plan is not None:
            made = checks.instance("plan", self.plan, AttentionPlan).shapes
            odd = [(n, a, b) for n, a, b in zip(s._fields, s, made, strict=True) if a != b]
            if odd:
                wanted, got = (", ".join(f"{x[0]}={x[i]}" for x in odd) for i in (1, 2))
                raise EchoError(f"plan: expected one made for {wanted}, got one for {got}")

    @property
    def cache(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Keys, values, page table and prefix lengths; None in mode "tree"."""
        if self.mode == "tree":
            return None
        parts = self.key_cache, self.value_cache, self.page_table, self.prefix_lens
        return cast("tuple[Tensor, Tensor, Tensor, Tensor]", parts)

    @property
    def factor(self) -> float:
        """Scale of the scores."""
        return self.shapes.dim**-0.5 if self.scale is None else float(self.scale)


def check_merge(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> None:
    """Check the arguments of :func:`echo.kernels.merge_attention`."""
    n, heads, dim = checks.tensor("o1", o1, ["N", "H", "D"], FLOATS).shape
    checks.tensor("o2", o2, [n, heads, dim], FLOATS, o1.device)
    checks.tensor("lse1", lse1, [n, heads], torch.float32, o1.device)
    checks.tensor("lse2", lse2, [n, heads], torch.float32, o1.device)


def check_accept(
    parent: Tensor,
    indptr: Tensor,
    tokens: Tensor,
    target: Tensor,
    max_depth: int,
    max_new_tokens: Tensor | None,
    eos_tokens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, Tensor | None, Tensor | None]:
    """Check the arguments of :func:`echo.kernels.accept`, and return them."""
    (n,) = checks.tensor("tokens", tokens, ["N"], torch.int64).shape
    device = tokens.device
    checks.tensor("parent", parent, [n], torch.int32, device)
    batch = checks.tensor("indptr", indptr, ["B + 1"], torch.int32, device).shape[0] - 1
    checks.integer("B", batch, 0)
    if isinstance(target, Tensor) and target.dim() == 2:
        check_logits(target, tokens)
    else:
        checks.tensor("target_tokens", target, [n], torch.int64, device)
    if max_new_tokens is not None:
        checks.tensor("max_new_tokens", max_new_tokens, [batch], torch.int64, device)
    if eos_tokens is not None:
        checks.tensor("eos_tokens", eos_tokens, ["n"], torch.int64, device)
    max_depth = checks.integer("max_depth", max_depth, 0)
    return parent, indptr, tokens, target, max_depth, max_new_tokens, eos_tokens


def check_logits(logits: Tensor, tokens: Tensor | None = None) -> None:
    """Check logits [N, V], one row for each of the ``tokens`` int64 [N], if given."""
    rows, device = ("N", None) if tokens is None else (tokens.shape[0], tokens.device)
    shape = checks.tensor("logits", logits, [rows, "V"], FLOATS, device).shape
    checks.integer("V", shape[1], 1, 1 << 30)
