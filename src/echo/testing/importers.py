"""Inverses of :mod:`echo.tree.layouts`: from an engine's layout to a packed step.

Host work that copies and checks every value, a batch at a time. Layouts carry no scores, so scores
are 0 (path probability 1). Rows are put into canonical order. Where a row that sees only itself is
a pad, an empty request becomes its root, unless ``num_nodes`` says that it has none.

All take ``num_rows``, N of the result, which defaults to the rows in use; some take ``num_nodes``,
int64 [B], 0 for an empty request. All raise EchoError, naming the request and row of what is no
tree: a mask that hides an ancestor or shows other rows, a negative token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.tree.layouts import Chains, FlashInferMask, HuggingFaceInputs, SGLangLinks, TensorRTLinks
from echo.tree.packed import WORD, PackedTree, pack
from echo.tree.supertree import SuperTree
from echo.tree.validate import host, refuse

Array = NDArray[Any]
Bools = NDArray[np.bool_]
INTS = checks.INTEGERS


def from_sglang(
    links: SGLangLinks, *, num_nodes: Tensor | None = None, num_rows: int | None = None
) -> PackedTree:
    """Import SGLang's draft tokens and links, siblings in any order; unreached rows are pads.

    ``positions`` and ``retrive_index`` of ``links`` are ignored.

    Raises:
        EchoError: naming the request and row of a link that leaves the tree, leads back or meets
            another.
    """
    down = links.retrive_next_token
    across = links.retrive_next_sibling
    batch, n = checks.tensor("retrive_next_token", down, ["B", "n"], INTS).shape
    checks.tensor("draft_tokens", links.draft_tokens, [batch * n], INTS)
    checks.tensor("retrive_next_sibling", across, [batch, n], INTS)
    parent = _parents_by_links(host(down), host(across), _sizes(num_nodes, batch, n) > 0)
    reached = parent > -2
    order = np.argsort(~reached, axis=1, kind="stable")  # a tree's rows before the pads
    place = reached.cumsum(1) - 1
    parent = np.where(parent >= 0, np.take_along_axis(place, parent.clip(min=0), 1), -1)
    parent = np.take_along_axis(parent, order, 1)
    tokens = links.draft_tokens.reshape(batch, n)
    tokens = tokens.gather(1, torch.from_numpy(order).to(tokens.device))
    return _packed(tokens, parent, reached.sum(1), num_rows)


def from_tensorrt_llm(links: TensorRTLinks, *, num_rows: int | None = None) -> PackedTree:
    """Import TensorRT-LLM's packed mask; a row that sees only itself is a pad.

    Reads ``tokens``, ``packed_mask`` and ``generation_lengths`` of ``links``.
    """
    batch, n = checks.tensor("tokens", links.tokens, ["B", "n"], INTS).shape
    checks.tensor("packed_mask", links.packed_mask, [batch, n, -(-n // WORD)], torch.int32)
    sizes = _sizes(links.generation_lengths, batch, n)
    return _from_squares(links.tokens, _bits(links.packed_mask)[..., :n], sizes, num_rows)


def from_sglang_mask(
    mask: Tensor,
    draft_tokens: Tensor,
    max_verify_tokens_per_req: int,
    mode: Literal["FULL_MASK", "QLEN_ONLY", "QLEN_ONLY_BITPACKING"],
    *,
    prefix_lens: Tensor | None = None,
    num_nodes: Tensor | None = None,
    num_rows: int | None = None,
) -> PackedTree:
    """Import SGLang's ``tree_mask``; a row that sees only itself is a pad.

    Args:
        mask: from :func:`~echo.tree.layouts.sglang_mask`; FULL_MASK and QLEN_ONLY in any shape.
        draft_tokens: int64 [B * n].
        max_verify_tokens_per_req: n.
        mode: of the mask.
        prefix_lens: int32 or int64 [B], for FULL_MASK.
    """
    n = checks.integer("max_verify_tokens_per_req", max_verify_tokens_per_req, 1)
    batch = checks.tensor("draft_tokens", draft_tokens, ["B * n"], INTS).shape[0] // n
    if mode == "QLEN_ONLY":
        square = host(checks.tensor("mask", mask.reshape(-1), [batch * n * n], torch.bool))
    elif mode == "QLEN_ONLY_BITPACKING":
        kinds = torch.uint8, torch.uint16, torch.uint32
        square = _bits(checks.tensor("mask", mask, [batch * n], kinds)[:, None])
        square = np.pad(square, ((0, 0), (0, max(0, n - square.shape[1]))))[:, :n]
    elif mode == "FULL_MASK" and prefix_lens is not None:
        past = _ints("prefix_lens", prefix_lens, batch)
        refuse("prefix_lens", past < 0, lambda b: f"expected tokens >= 0, got {past[b]}")
        begin = n * ((past + n).cumsum() - (past + n))
        square = _squares(host(mask.reshape(-1)), begin, past + n, past, np.full(batch, n))
    else:
        modes = "QLEN_ONLY, QLEN_ONLY_BITPACKING, or FULL_MASK with prefix_lens"
        raise EchoError(f"mode: expected {modes}, got {mode!r}")
    tokens = draft_tokens.reshape(batch, n)
    square = square.reshape(batch, n, n)
    return _from_squares(tokens, square, _sizes(num_nodes, batch, n), num_rows)


def from_flashinfer(
    mask: FlashInferMask, tokens: Tensor, *, num_rows: int | None = None
) -> PackedTree:
    """Import FlashInfer's custom mask, flat or packed according to its dtype.

    Args:
        mask: from :func:`~echo.tree.layouts.flashinfer`; must show the whole prefix.
        tokens: int64 [rows of all requests].
    """
    ends = _ends("qo_indptr", mask.qo_indptr, tokens)
    q = np.diff(ends)
    packed = mask.mask.dtype == torch.uint8
    checks.tensor("mask", mask.mask, ["size"], (torch.bool, torch.uint8))
    begin = _ints("indptr", mask.indptr, len(ends))[:-1] * (8 if packed else 1)
    kv = _ints("kv_lens", mask.kv_lens, len(q))
    refuse("kv_lens", kv < q, lambda b: f"expected at least its {q[b]} rows, got {kv[b]}")
    entries = _bits(mask.mask) if packed else host(mask.mask)
    square = _squares(entries, begin, kv, kv - q, q)
    hidden = np.concatenate([[0], np.cumsum(~entries, dtype=np.int32)])
    row = np.arange(square.shape[1])
    first = np.where(row < q[:, None], begin[:, None] + row * kv[:, None], 0)
    last = np.where(row < q[:, None], first + (kv - q)[:, None], 0)
    say = "expected the whole prefix visible"
    refuse("mask", hidden[last] > hidden[first], lambda b, row: say)
    return _from_squares(_ragged(tokens, ends), square, q, num_rows, padded=False)


def from_flashinfer_xqa(
    mask: Tensor, indptr: Tensor, tokens: Tensor, *, num_rows: int | None = None
) -> PackedTree:
    """Import FlashInfer's XQA mask.

    Args:
        mask: uint16 [N, halves].
        indptr: int32 [B + 1], its ``q_cu_seq_lens``.
        tokens: int64 [N].
    """
    count = checks.tensor("tokens", tokens, ["N"], INTS).shape[0]
    bits = _bits(checks.tensor("mask", mask, [count, "halves"], torch.uint16))
    ends = _ends("indptr", indptr, tokens)
    q = np.diff(ends)
    width = np.full_like(q, bits.shape[1])
    square = _squares(bits.ravel(), ends[:-1] * width, width, 0, q)
    return _from_squares(_ragged(tokens, ends), square, q, num_rows, padded=False)


def from_qq_bias(bias: Tensor, tokens: Tensor, *, num_rows: int | None = None) -> PackedTree:
    """Import vLLM's ``qq_bias``; a row that sees only itself is a pad.

    Args:
        bias: float32 [N, N]; below 0: hidden.
        tokens: int64 [N].
        num_rows: of the result. Defaults to N.
    """
    n = checks.tensor("tokens", tokens, ["N"], INTS).shape[0]
    square = host(checks.tensor("bias", bias, [n, n], torch.float32)) >= 0
    num_rows = n if num_rows is None else num_rows
    return _from_squares(tokens[None], square[None], np.full(1, n), num_rows)


def from_hugging_face(
    inputs: HuggingFaceInputs, *, num_nodes: Tensor | None = None, num_rows: int | None = None
) -> PackedTree:
    """Import token ids and a 4-D mask, bool or float (below 0: hidden).

    A row that sees only itself is a pad. ``position_ids`` of ``inputs`` are ignored.
    """
    batch, n = checks.tensor("input_ids", inputs.input_ids, ["B", "n"], INTS).shape
    kinds = (torch.bool, *checks.FLOATS)
    shape = (batch, 1, n, "past + n")
    mask = checks.tensor("attention_mask", inputs.attention_mask, shape, kinds)[:, 0, :, -n:]
    square = host(mask if mask.dtype == torch.bool else mask >= 0)
    return _from_squares(inputs.input_ids, square, _sizes(num_nodes, batch, n), num_rows)


def from_chains(chain: Chains, *, num_rows: int | None = None) -> PackedTree:
    """Import ragged chains: ``tokens`` and ``qo_indptr`` of ``chain``.

    ``num_rows`` defaults to ``graph_num_tokens``.
    """
    ends = _ends("qo_indptr", chain.qo_indptr, chain.tokens)
    tokens = _ragged(chain.tokens, ends)
    parents = np.broadcast_to(np.arange(-1, tokens.shape[1] - 1), tokens.shape)
    count = chain.graph_num_tokens if num_rows is None else num_rows
    return _packed(tokens, parents, np.diff(ends), count)


def _parents_by_links(down: Array, across: Array, live: Bools) -> Array:
    """Local parent of each row, int64 [B, n]: -1 for the root, -2 where no link leads.

    Follows all links of one distance at once.
    """
    batch, n = down.shape
    links = np.stack([down.ravel(), across.ravel()])
    parent = np.full(batch * n, -2)
    wave = np.flatnonzero(live) * n
    parent[wave] = -1
    while len(wave):
        kind = np.repeat([0, 1], len(wave))
        at = np.tile(wave, 2)
        child = links[kind, at]
        up = np.where(kind, parent[at], at % n)
        real = (child != -1) & (up >= 0)  # a root has no sibling
        kind, at, child, up = (x[real] for x in (kind, at, child, up))
        outside = (child < 0) | (child >= n)
        target = np.where(outside, 0, at - at % n + child)
        order = np.lexsort((at, target))
        twice = parent[target] > -2
        twice[order[1:]] |= np.diff(target[order]) == 0
        faults = np.flatnonzero(outside | twice | (child < up))
        if len(faults):
            i = faults[at[faults].argmin()]
            b, row = divmod(int(at[i]), n)
            name = ("retrive_next_token", "retrive_next_sibling")[kind[i]]
            want = f"a row behind its parent {up[i]}, got {child[i]}"
            if outside[i]:
                want = f"-1 or a row from 0 to {n - 1}, got {child[i]}"
            elif twice[i]:
                came = f"{child[i]} (a cycle, or two parents)"
                want = f"a row that no other link reaches, got {came}"
            raise EchoError(f"{name}: request {b}, row {row}: expected {want}")
        parent[target] = up
        wave = target
    return parent.reshape(batch, n)


def _from_squares(
    tokens: Tensor, square: Bools, sizes: Array, num_rows: int | None, *, padded: bool = True
) -> PackedTree:
    """Import tokens [B, n] and the rows that each sees; pads end a request if ``padded``.

    The parent is the last ancestor, whose own ancestors must be the others.
    """
    n = int(sizes.max(initial=1))
    row = np.arange(n)
    there = row < sizes[:, None]
    square = square[:, :n, :n] & there[:, :, None] & there[:, None]
    own = square[:, row, row]
    above = square & ~np.eye(n, dtype=bool)
    alone = ~above.any(2)
    parent = np.where(alone, -1, n - 1 - above[..., ::-1].argmax(2))
    pad = np.logical_or.accumulate(there & alone & (row > 0), axis=1) & there & padded
    tree = there & ~pad
    same = (square[np.arange(len(square))[:, None], parent] == above).all(2)
    fits = (alone == (row == 0)) & (alone | same)
    seen: Callable[[int, int], list[int]] = lambda b, i: np.flatnonzero(square[b, i]).tolist()
    refuse("mask", tree & ~own, lambda b, i: "expected a row to see itself")
    before = "expected a row before its child, got row"
    refuse("mask", tree & (parent > row), lambda b, i: f"{before} {parent[b, i]}")
    family = "expected itself, a parent and that parent's ancestors"
    refuse("mask", tree & ~fits, lambda b, i: f"{family}, got {seen(b, i)}")
    lone = "expected a pad that sees itself alone"
    refuse("mask", pad & ~(alone & own), lambda b, i: f"{lone}, got {seen(b, i)}")
    return _packed(tokens, parent, tree.sum(1), num_rows)


def _squares(entries: Bools, begin: Array, stride: Array, past: Array | int, q: Array) -> Bools:
    """bool [B, max q, max q]: for q rows from ``begin``, the last q of their ``stride`` entries."""
    row = np.arange(int(q.max(initial=1)))
    ends = begin + q * stride
    say = lambda b: f"expected at least {ends[b]} entries, got {len(entries)}"
    refuse("mask", (ends > len(entries)) | (begin < 0), say)
    at = (begin + past)[:, None, None] + row[:, None] * stride[:, None, None] + row
    there = row < q[:, None]
    inside = there[:, :, None] & there[:, None]
    seen = np.zeros(at.shape, dtype=bool)
    seen[inside] = entries[at[inside]]
    return seen


def _ints(name: str, value: Tensor, size: int | str) -> Array:
    return host(checks.tensor(name, value, [size], INTS)).astype(np.int64)


def _ends(name: str, indptr: Tensor, tokens: Tensor) -> Array:
    """Check and return where each request's rows begin among the tokens, int64 [B + 1]."""
    n = checks.tensor("tokens", tokens, ["N"], INTS).shape[0]
    ends = _ints(name, indptr, "B + 1")
    if not len(ends) or ends[0] != 0 or (np.diff(ends) < 0).any() or ends[-1] > n:
        expected = f"numbers rising from 0 to at most {n}"
        raise EchoError(f"{name}: expected {expected}, got {ends.tolist()}")
    return ends


def _ragged(tokens: Tensor, ends: Array) -> Tensor:
    """int64 [B, max q]: each request's tokens, then any."""
    at = ends[:-1, None] + np.arange(np.diff(ends).max(initial=1))
    return tokens[torch.from_numpy(at.clip(max=len(tokens) - 1)).to(tokens.device)]


def _bits(words: Tensor) -> Bools:
    """bool [..., width]: the bits of integers [..., k], least significant first."""
    values = np.ascontiguousarray(host(words))
    bits = np.unpackbits(values.view(np.uint8).ravel(), bitorder="little").view(bool)
    return bits.reshape(*values.shape[:-1], 8 * values.itemsize * values.shape[-1])


def _sizes(num_nodes: Tensor | None, batch: int, n: int) -> Array:
    """Check ``num_nodes``, which defaults to ``n``."""
    if num_nodes is None:
        return np.full(batch, n)
    sizes = _ints("num_nodes", num_nodes, batch)
    bad = (sizes < 0) | (sizes > n)
    refuse("num_nodes", bad, lambda b: f"expected 0 to {n} rows, got {sizes[b]}")
    return sizes


def _packed(tokens: Tensor, parents: Array, sizes: Array, num_rows: int | None) -> PackedTree:
    """Check, put into canonical order and pack each request's tokens and parents, [B, n]."""
    width = int(sizes.max(initial=1))
    count = max(int(sizes.sum()), 1)
    token = tokens[:, :width].long()
    host_values = parents[:, :width].astype(np.int64), sizes.astype(np.int64)
    parent, num_nodes = (torch.from_numpy(x).to(token.device) for x in host_values)
    q = torch.zeros_like(token, dtype=torch.float32)
    tree = SuperTree.from_arrays(token, parent, q, num_nodes=num_nodes)
    num_rows = count if num_rows is None else checks.integer("num_rows", num_rows, count)
    return pack(tree, torch.isfinite(tree.forest.score), num_rows, -(-width // WORD))
