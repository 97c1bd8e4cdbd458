"""Checks that a kernel and its twin share. Shapes, dtypes and devices only: nothing is read back from a device."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple, cast

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.kernels.tiles import Tile

PARTIAL_BYTES = 1 << 30
"""What the partial results of a call with fixed splits take at most."""
LONGEST = (1 << 31) - (1 << 10)
"""Tokens of a context at most, so that the end of its last block is an int32."""
CACHES = (*checks.FLOATS, torch.float8_e4m3fn, torch.float8_e5m2)
MODES = ("whole", "tree")


class Shapes(NamedTuple):
    """Host facts of one attention call; of a page and of the longest context 0 where there is none.

    ``itemsize`` and ``cached`` are bytes of an element of the queries and of the cache.
    """

    rows: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    itemsize: int
    cached: int
    page: int
    longest: int
    mode: str
    window: int | None
    splits: int | None
    device: torch.device

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


@dataclass(frozen=True)
class AttentionPlan:
    """The work list of a step, for all layers that it fits: :func:`echo.kernels.plan_attention` makes it.

    Attributes:
        shapes: what it was made for; a call of anything else is refused.
        tile: how one program works; None of the reference, which has no list.
        work: int32 [items, 8], pieces of a request's keys.
        spans: int32 [B + 1, 2], of each request where its partial results begin, and its pieces.
    """

    shapes: Shapes
    tile: Tile | None
    work: Tensor
    spans: Tensor


@dataclass(frozen=True)
class Planning:
    """The arguments of :func:`echo.kernels.plan_attention`, which fit together.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """

    q: Tensor
    key_cache: Tensor | None
    page_table: Tensor | None
    prefix_lens: Tensor | None
    tree_key: Tensor
    indptr: Tensor
    _: KW_ONLY
    mode: str = "whole"
    window: int | None = None
    splits: int | None = None
    shapes: Shapes = field(init=False)

    def __post_init__(self) -> None:
        q = checks.tensor("q", self.q, ["N", "Hq", "D"], checks.FLOATS)
        (n, heads, dim), device = q.shape, q.device
        kv_heads = checks.tensor(
            "tree_key", self.tree_key, [n, "Hkv", dim], checks.FLOATS, device
        ).shape[1]
        if not kv_heads or heads % kv_heads:
            raise EchoError(
                f"q: expected a multiple of the {kv_heads} heads of tree_key, got {heads} heads"
            )
        batch = checks.tensor("indptr", self.indptr, ["B + 1"], torch.int32, device).shape[0] - 1
        checks.integer("B", batch, 0)
        if self.mode not in MODES:
            raise EchoError(f"mode: expected one of {MODES}, got {self.mode!r}")
        cached, size, pages = q.element_size(), 0, 0
        if self.mode == "whole":
            cache = checks.tensor(
                "key_cache", self.key_cache, ["pages", "page_size", kv_heads, dim], CACHES, device
            )
            cached, size = cache.element_size(), int(cache.shape[1])
            checks.integer("page_size", size, 1)
            pages = checks.tensor(
                "page_table", self.page_table, [batch, "max_pages"], torch.int32, device
            ).shape[1]
            checks.tensor("prefix_lens", self.prefix_lens, [batch], torch.int32, device)
        if self.window is not None:
            checks.integer_field(self, "window", 1)
        if self.splits is not None:
            checks.integer_field(self, "splits", 1, 1024)
        if self.splits is not None and self.splits > 1:
            most = PARTIAL_BYTES // (4 * max(n, 1) * heads * (dim + 1))
            if self.splits > most:
                raise EchoError(
                    f"splits: expected at most {most}, whose partial results take {PARTIAL_BYTES} bytes, got {self.splits}"
                )
        longest = min(pages * size, LONGEST)
        facts = q.element_size(), cached, size, longest, self.mode, self.window, self.splits, device
        object.__setattr__(self, "shapes", Shapes(n, batch, heads, kv_heads, dim, *facts))


@dataclass(frozen=True)
class Attention:
    """The arguments of :func:`echo.kernels.tree_attention`, which fit together.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """

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
    _: KW_ONLY
    mode: str = "whole"
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    depth: Tensor | None = None
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    splits: int | None = None
    plan: AttentionPlan | None = None
    planning: Planning = field(init=False)

    def __post_init__(self) -> None:
        planning = Planning(
            self.q, self.key_cache, self.page_table, self.prefix_lens, self.tree_key, self.indptr,
            mode=self.mode, window=self.window, splits=self.splits,
        )  # fmt: skip
        for name, value in (
            ("planning", planning),
            ("window", planning.window),
            ("splits", planning.splits),
        ):
            object.__setattr__(self, name, value)
        s, device = planning.shapes, self.q.device
        checks.tensor(
            "tree_value", self.tree_value, [s.rows, s.kv_heads, s.dim], checks.FLOATS, device
        )
        checks.tensor("request", self.request, [s.rows], torch.int32, device)
        checks.tensor("mask", self.mask, [s.rows, "words"], torch.int32, device)
        if self.mode == "whole" and self.key_cache is not None:
            pages = self.key_cache.shape[0]
            checks.tensor(
                "value_cache", self.value_cache, [pages, s.page, s.kv_heads, s.dim], CACHES, device
            )
        for name, scales in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if scales is not None:
                checks.tensor(name, scales, [s.kv_heads], torch.float32, device)
        if self.softcap is not None:
            checks.real_field(self, "softcap", 0.0)
            if self.softcap == 0:
                raise EchoError("softcap: expected a number above 0, got 0")
        if self.window is not None:
            checks.tensor("depth", self.depth, [s.rows], torch.int32, device)
        if self.plan is not None:
            made = checks.instance("plan", self.plan, AttentionPlan).shapes
            if made != s:
                wanted, got = zip(
                    *(
                        (f"{n}={a}", f"{n}={b}")
                        for n, a, b in zip(s._fields, s, made, strict=True)
                        if a != b
                    ),
                    strict=True,
                )
                raise EchoError(
                    f"plan: expected one made for {', '.join(wanted)}, got one for {', '.join(got)}"
                )

    @property
    def cache(self) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """Keys, values, page table and context; None in mode "tree"."""
        parts = self.key_cache, self.value_cache, self.page_table, self.prefix_lens
        return (
            cast("tuple[Tensor, Tensor, Tensor, Tensor]", parts) if self.mode == "whole" else None
        )

    @property
    def factor(self) -> float:
        """Of the scores."""
        return self.planning.shapes.dim**-0.5 if self.scale is None else float(self.scale)


def merge_shapes(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[int, int, int]:
    """N, H and D of two parts that fit together.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    n, heads, dim = checks.tensor("o1", o1, ["N", "H", "D"], checks.FLOATS).shape
    checks.tensor("o2", o2, [n, heads, dim], checks.FLOATS, o1.device)
    checks.tensor("lse1", lse1, [n, heads], torch.float32, o1.device)
    checks.tensor("lse2", lse2, [n, heads], torch.float32, o1.device)
    return n, heads, dim


def accept_shapes(
    parent: Tensor, indptr: Tensor, tokens: Tensor, target_tokens: Tensor, max_depth: int
) -> tuple[int, int, int]:
    """N, B and depth of a packed tree's links and the target's tokens.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    (n,) = checks.tensor("tokens", tokens, ["N"], torch.int64).shape
    checks.tensor("parent", parent, [n], torch.int32, tokens.device)
    checks.tensor("target_tokens", target_tokens, [n], torch.int64, tokens.device)
    batch = checks.tensor("indptr", indptr, ["B + 1"], torch.int32, tokens.device).shape[0] - 1
    checks.integer("B", batch, 0)
    return n, batch, checks.integer("max_depth", max_depth, 0)


def logits_shape(logits: Tensor, tokens: Tensor | None = None) -> tuple[int, int]:
    """N and V of logits, one row for each of the ``tokens``, int64 [N], where given.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    rows, device = ("N", None) if tokens is None else (tokens.shape[0], tokens.device)
    n, vocabulary = checks.tensor("logits", logits, [rows, "V"], checks.FLOATS, device).shape
    return n, checks.integer("V", vocabulary, 1, 1 << 30)
