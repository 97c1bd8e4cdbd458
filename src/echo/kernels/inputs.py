"""Checks that a kernel and its twin share. Shapes, dtypes and devices only: nothing is read back from a device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from echo import checks
from echo.errors import EchoError

CACHES = (*checks.FLOATS, torch.float8_e4m3fn, torch.float8_e5m2)
MODES = ("whole", "tree")


class Shapes(NamedTuple):
    """Host facts of one attention call."""

    rows: int
    batch: int
    heads: int
    kv_heads: int
    dim: int
    itemsize: int
    cached: int
    page: int

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads // self.kv_heads


def attention_shapes(
    q: Tensor,
    key_cache: Tensor | None,
    value_cache: Tensor | None,
    page_table: Tensor | None,
    context: Tensor | None,
    tree_key: Tensor,
    tree_value: Tensor,
    request: Tensor,
    indptr: Tensor,
    mask: Tensor,
    mode: str,
    softcap: float | None,
    window: int | None,
    depth: Tensor | None,
    key_scale: Tensor | None,
    value_scale: Tensor | None,
    splits: int | None,
) -> Shapes:
    """The shapes of arguments that fit together.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    s = plan_shapes(q, key_cache, page_table, context, tree_key, indptr, mode, window, splits)
    n, kv_heads, dim, device = s.rows, s.kv_heads, s.dim, q.device
    checks.tensor("tree_value", tree_value, [n, kv_heads, dim], checks.FLOATS, device)
    checks.tensor("request", request, [n], torch.int32, device)
    checks.tensor("mask", mask, [n, "words"], torch.int32, device)
    if mode == "whole" and key_cache is not None:
        checks.tensor("value_cache", value_cache, ["pages", key_cache.shape[1], kv_heads, dim], CACHES, device)
    for name, scales in (("key_scale", key_scale), ("value_scale", value_scale)):
        if scales is not None:
            checks.tensor(name, scales, [kv_heads], torch.float32, device)
    if softcap is not None and checks.real("softcap", softcap, 0.0) == 0:
        raise EchoError("softcap: expected a number above 0, got 0")
    if window is not None:
        checks.tensor("depth", depth, [n], torch.int32, device)
    return s


def plan_shapes(
    q: Tensor,
    key_cache: Tensor | None,
    page_table: Tensor | None,
    context: Tensor | None,
    tree_key: Tensor,
    indptr: Tensor,
    mode: str,
    window: int | None,
    splits: int | None,
) -> Shapes:
    """The shapes of arguments that fit together, as far as a work list depends on them.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    n, heads, dim = checks.tensor("q", q, ["N", "Hq", "D"], checks.FLOATS).shape
    kv_heads = checks.tensor("tree_key", tree_key, [n, "Hkv", dim], checks.FLOATS, q.device).shape[1]
    checks.integer("Hq / Hkv", heads // kv_heads if kv_heads and heads % kv_heads == 0 else 0, 1)
    batch = checks.tensor("indptr", indptr, ["B + 1"], torch.int32, q.device).shape[0] - 1
    checks.integer("B", batch, 0)
    if mode not in MODES:
        raise EchoError(f"mode: expected one of {MODES}, got {mode!r}")
    cached, size = q.element_size(), 0
    if mode == "whole":
        cache = checks.tensor("key_cache", key_cache, ["pages", "page_size", kv_heads, dim], CACHES, q.device)
        cached, size = cache.element_size(), int(cache.shape[1])
        checks.integer("page_size", size, 1)
        checks.tensor("page_table", page_table, [batch, "max_pages"], torch.int32, q.device)
        checks.tensor("context", context, [batch], torch.int32, q.device)
    if window is not None:
        checks.integer("window", window, 1)
    if splits is not None:
        checks.integer("splits", splits, 1, 1024)
    return Shapes(n, batch, heads, kv_heads, dim, q.element_size(), cached, size)


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


def accept_shapes(parent: Tensor, indptr: Tensor, tokens: Tensor, max_depth: int) -> tuple[int, int]:
    """N and B of a packed tree's links.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    (n,) = checks.tensor("tokens", tokens, ["N"], torch.int64).shape
    checks.tensor("parent", parent, [n], torch.int32, tokens.device)
    batch = checks.tensor("indptr", indptr, ["B + 1"], torch.int32, tokens.device).shape[0] - 1
    checks.integer("B", batch, 0)
    checks.integer("max_depth", max_depth, 0)
    return n, batch
