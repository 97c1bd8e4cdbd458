"""The inverses: an engine's layout as a packed step. Host work that reads and checks every value.

No layout carries scores: they come out as 0, path probability 1. Rows are put into canonical order, whatever theirs was.
A uniform layout does not say that a slot is empty: without ``lengths`` it comes out as a tree of its root alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from echo import checks
from echo.errors import EchoError
from echo.tree.build import from_arrays
from echo.tree.layouts.ragged import Chains, FlashInferMask
from echo.tree.layouts.uniform import HuggingFaceInputs, SGLangLinks, TensorRTLinks
from echo.tree.packed import WORD, PackedTree, pack, unpack


def from_sglang(links: SGLangLinks, *, lengths: Tensor | None = None, rows: int | None = None) -> PackedTree:
    """From SGLang's draft tokens and links, siblings in any order. Rows that no link reaches are pads.

    Args:
        links: as :func:`sglang` makes them; ``positions`` and ``retrive_index`` are not read.
        lengths: int64 [B], 0 where a slot is empty.
        rows: N; as many as there are where not given.

    Raises:
        EchoError: naming the request and the row of a link that leaves the tree, leads back or meets another.
    """
    batch, n = checks.tensor("retrive_next_token", links.retrive_next_token, ["B", "n"], checks.INTEGERS).shape
    checks.tensor("draft_tokens", links.draft_tokens, [batch * n], checks.INTEGERS)
    checks.tensor("retrive_next_sibling", links.retrive_next_sibling, [batch, n], checks.INTEGERS)
    return _from_links(links.draft_tokens.view(batch, n), links.retrive_next_token, links.retrive_next_sibling, lengths, rows)


def from_tensorrt_llm(links: TensorRTLinks, *, rows: int | None = None) -> PackedTree:
    """From TensorRT-LLM's packed mask; a row that sees itself alone is a pad.

    Raises:
        EchoError: naming the request and the row of a mask that no tree has.
    """
    batch, n = checks.tensor("tokens", links.tokens, ["B", "n"], checks.INTEGERS).shape
    checks.tensor("packed_mask", links.packed_mask, [batch, n, -(-n // WORD)], torch.int32)
    return _from_squares(links.tokens, unpack(links.packed_mask)[..., :n], links.generation_lengths, rows)


def from_sglang_mask(
    mask: Tensor,
    draft_tokens: Tensor,
    n: int,
    mode: Literal["FULL_MASK", "QLEN_ONLY", "QLEN_ONLY_BITPACKING"],
    *,
    context: Tensor | None = None,
    lengths: Tensor | None = None,
    rows: int | None = None,
) -> PackedTree:
    """From SGLang's ``tree_mask``; a row that sees itself alone is a pad.

    Args:
        mask: as :func:`sglang_mask` makes it; FULL_MASK and QLEN_ONLY in any shape of so many entries.
        draft_tokens: int64 [B * n].
        n: rows of every request.
        mode: of the mask.
        context: int32 or int64 [B], for FULL_MASK.
        lengths, rows: as in :func:`from_sglang`.

    Raises:
        EchoError: naming the request and the row of a mask that no tree has.
    """
    checks.integer("n", n, 1)
    batch = checks.tensor("draft_tokens", draft_tokens, ["B * n"], checks.INTEGERS).shape[0] // n
    if mode == "QLEN_ONLY":
        square = mask.reshape(batch, n, n)
    elif mode == "QLEN_ONLY_BITPACKING":
        checks.tensor("mask", mask, [batch * n], (torch.uint8, torch.uint16, torch.uint32))
        words = torch.tensor(mask.tolist(), dtype=torch.int64, device=mask.device).view(batch, n, 1)
        square = (words >> torch.arange(n, device=mask.device) & 1).bool()
    elif mode == "FULL_MASK" and context is not None:
        square, at = torch.empty(batch, n, n, dtype=torch.bool, device=mask.device), 0
        for b, length in enumerate(checks.tensor("context", context, [batch], checks.INTEGERS).tolist()):
            size = n * (length + n)
            square[b] = _part(mask, at, size, b).view(n, length + n)[:, length:]
            at += size
    else:
        raise EchoError(f"mode: expected QLEN_ONLY, QLEN_ONLY_BITPACKING, or FULL_MASK with context, got {mode!r}")
    return _from_squares(draft_tokens.view(batch, n), square, lengths, rows)


def from_flashinfer(mask: FlashInferMask, tokens: Tensor, *, rows: int | None = None) -> PackedTree:
    """From FlashInfer's flat or packed custom mask (told apart by dtype) and the tokens int64 of all rows.

    Raises:
        EchoError: naming the request and the row of a mask that no tree has, or that hides a token of the context.
    """
    ends, begins, kv = (x.tolist() for x in (mask.qo_indptr, mask.indptr, mask.kv_lens))
    all_tokens, trees = checks.tensor("tokens", tokens, ["N"], checks.INTEGERS).tolist(), []
    for b, length in enumerate(kv):
        q = ends[b + 1] - ends[b]
        entries = _part(mask.mask, begins[b], begins[b + 1] - begins[b], b)
        if mask.mask.dtype == torch.uint8:
            entries = (entries[:, None] >> torch.arange(8, dtype=torch.uint8, device=entries.device) & 1).bool().flatten()
        seen = entries[: q * length].view(q, length) if q else entries.new_zeros(0, 0)
        hidden = (~seen[:, : length - q]).any(dim=1).tolist()
        if True in hidden:
            raise EchoError(f"mask: request {b}, row {hidden.index(True)}: expected the whole context visible")
        trees.append((all_tokens[ends[b] : ends[b + 1]], _parents(b, seen[:, length - q :].tolist(), padded=False)))
    return _packed(trees, rows, tokens.device)


def from_hugging_face(inputs: HuggingFaceInputs, *, lengths: Tensor | None = None, rows: int | None = None) -> PackedTree:
    """From token ids and a 4-D mask, bool or float (below 0: hidden); a row that sees itself alone is a pad.

    Raises:
        EchoError: naming the request and the row of a mask that no tree has.
    """
    n = checks.tensor("input_ids", inputs.input_ids, ["B", "n"], checks.INTEGERS).shape[1]
    mask = inputs.attention_mask[:, 0, :, -n:]
    return _from_squares(inputs.input_ids, mask if mask.dtype == torch.bool else mask >= 0, lengths, rows)


def from_chains(chain: Chains, *, rows: int | None = None) -> PackedTree:
    """From ragged chains; ``tokens`` and ``qo_indptr`` are read.

    Raises:
        EchoError: a negative token, naming the request and the row.
    """
    ends, tokens = chain.qo_indptr.tolist(), chain.tokens.tolist()
    trees = [(tokens[first:end], list(range(-1, end - first - 1))) for first, end in itertools.pairwise(ends)]
    return _packed(trees, chain.graph_num_tokens if rows is None else rows, chain.tokens.device)


def _from_links(tokens: Tensor, token: Tensor, sibling: Tensor, lengths: Tensor | None, rows: int | None) -> PackedTree:
    sizes = [1] * len(tokens) if lengths is None else lengths.tolist()
    trees = []
    for b, (mine, down, across) in enumerate(zip(tokens.tolist(), token.tolist(), sibling.tolist(), strict=True)):
        parent = {0: -1} if sizes[b] else {}
        waiting = [0] if sizes[b] else []
        while waiting:
            up = waiting.pop()
            child, link, at = down[up], "retrive_next_token", up
            while child != -1:
                where = f"{link}: request {b}, row {at}"
                if not 0 <= child < len(mine):
                    raise EchoError(f"{where}: expected -1 or a row from 0 to {len(mine) - 1}, got {child}")
                if child in parent:
                    raise EchoError(f"{where}: expected a row that no other link reaches, got {child} (a cycle, or two parents)")
                if child < up:
                    raise EchoError(f"{where}: expected a row behind its parent {up}, got {child}")
                parent[child] = up
                waiting.append(child)
                link, at, child = "retrive_next_sibling", child, across[child]
        order = sorted(parent)
        place = {-1: -1} | {row: i for i, row in enumerate(order)}
        trees.append(([mine[row] for row in order], [place[parent[row]] for row in order]))
    return _packed(trees, rows, tokens.device)


def _from_squares(tokens: Tensor, square: Tensor, lengths: Tensor | None, rows: int | None) -> PackedTree:
    batch, n = tokens.shape
    checks.tensor("mask", square, [batch, n, n], torch.bool)
    sizes = [n] * batch if lengths is None else lengths.tolist()
    trees = []
    for b, mine in enumerate(tokens.tolist()):
        parents = _parents(b, square[b, : sizes[b], : sizes[b]].tolist(), padded=True)
        trees.append((mine[: len(parents)], parents))
    return _packed(trees, rows, tokens.device)


def _parents(b: int, square: Sequence[Sequence[bool]], *, padded: bool) -> list[int]:
    """Parent of each row: its last ancestor, whose own ancestors must be the others. Pads (seeing themselves alone) end the tree."""
    parents: list[int] = []
    seen = [{column for column, on in enumerate(row) if on} for row in square]
    for row, mine in enumerate(seen):
        above = mine - {row}
        where = f"mask: request {b}, row {row}"
        if row not in mine:
            raise EchoError(f"{where}: expected a row to see itself")
        if not above and row and padded:
            break
        if above and max(above) > row:
            raise EchoError(f"{where}: expected a row before its child, got row {max(above)}")
        if (not above) != (row == 0) or (above and seen[max(above)] != above):
            raise EchoError(f"{where}: expected itself, a parent and that parent's ancestors, got {sorted(mine)}")
        parents.append(max(above, default=-1))
    for row in range(len(parents), len(seen)):
        if seen[row] != {row}:
            raise EchoError(f"mask: request {b}, row {row}: expected a pad that sees itself alone, got {sorted(seen[row])}")
    return parents


def _part(mask: Tensor, begin: int, size: int, b: int) -> Tensor:
    if begin + size > mask.numel():
        raise EchoError(f"mask: expected at least {begin + size} entries for request {b}, got {mask.numel()}")
    return mask.flatten()[begin : begin + size]


def _packed(trees: Sequence[tuple[Sequence[int], Sequence[int]]], rows: int | None, device: torch.device) -> PackedTree:
    """Checked, put into canonical order and packed: token and parent of each row, by request."""
    width = max((len(token) for token, _ in trees), default=1) or 1
    token, parent = (
        torch.tensor([[*tree[i], *[0] * (width - len(tree[i]))] for tree in trees], dtype=torch.int64, device=device).view(-1, width)
        for i in (0, 1)
    )
    lengths = torch.tensor([len(token) for token, _ in trees], dtype=torch.int64, device=device)
    tree = from_arrays(token, parent, torch.zeros(token.shape, device=device), lengths=lengths)
    count = sum(len(token) for token, _ in trees)
    selected = torch.isfinite(tree.forest.score)
    return pack(tree, selected, max(count, 1) if rows is None else checks.integer("rows", rows, max(count, 1)), -(-width // WORD))
