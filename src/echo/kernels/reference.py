"""The plain-torch twin of every kernel: same signature, same meaning, the only oracle. Tensors only, no structures."""

from __future__ import annotations

import torch
from torch import Tensor

from echo import checks


def accept(parent: Tensor, indptr: Tensor, tokens: Tensor, target_tokens: Tensor, max_depth: int) -> tuple[Tensor, Tensor, Tensor]:
    """Walks each tree from its root to the child that equals the target's token, while there is one.

    Lossless by construction: what is emitted is always the target's own token. Of duplicate siblings the first row is walked on.
    A parent outside the row's own request counts as none, so a broken link ends a walk and never leaves it.

    Args:
        parent: int32 [N], row of the parent within its request; -1 for none.
        indptr: int32 [B + 1], where each request's rows begin; rows from the last on are pads.
        tokens: int64 [N], the drafted tokens.
        target_tokens: int64 [N], the target's token after each row; -1 (no row equals it) where it has none.
        max_depth: most steps of a walk.

    Returns:
        rows int64 [B, max_depth + 1], global rows walked, root first, -1 beyond;
        emitted int64 [B, max_depth + 1], the target's token at each, -1 beyond;
        lengths int64 [B], rows walked; 0 for a request without rows.
    """
    count, batch = tokens.shape[0], indptr.shape[0] - 1
    device = tokens.device
    if batch == 0:  # an idle data-parallel rank
        nothing = torch.empty(0, max_depth + 1, dtype=torch.int64, device=device)
        return nothing, nothing.clone(), nothing.new_empty(0)
    first, end = indptr[:-1].long(), indptr[1:].long()
    at = torch.arange(count, device=device)
    request = torch.searchsorted(end, at, right=True).clamp(max=batch - 1)
    above = first[request] + parent
    linked = (parent >= 0) & (above < at) & (at < end[request])
    above = torch.where(linked, above, count)
    target = torch.cat([target_tokens, target_tokens.new_full((1,), -1)])
    matches = linked & (tokens == target[above]) & (tokens >= 0)
    nowhere = torch.full((count + 1,), count, device=device)
    following = nowhere.scatter_reduce(0, above, torch.where(matches, at, count), "amin")
    following[count] = count
    row = torch.where(end > first, first, count)
    walk = [row]
    for _ in range(max_depth):
        row = following[row]
        walk.append(row)
    rows = torch.stack(walk, dim=1)
    there = rows < count
    return torch.where(there, rows, -1), torch.where(there, target[rows], -1), there.sum(dim=1)


def argmax_tokens(logits: Tensor) -> Tensor:
    """int64 [N]: greedy tokens of logits [N, V]; NaN never wins, and a row without a number greater than -inf has -1."""
    clean = torch.where(torch.isnan(logits), -torch.inf, logits)
    value, token = clean.max(dim=-1)
    return torch.where(value > -torch.inf, token, -1)


def tree_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    page_table: Tensor,
    context: Tensor,
    tree_key: Tensor,
    tree_value: Tensor,
    request: Tensor,
    indptr: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    depth: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of packed tree rows over a paged context and their own ancestors. Computed in float32, row by row.

    Args:
        q: float [N, Hq, D].
        key_cache, value_cache: float [pages, page_size, Hkv, D].
        page_table: int32 [B, max_pages].
        context: int32 [B], tokens in the cache before the tree.
        tree_key, tree_value: float [N, Hkv, D], the rows' own keys and values.
        request: int32 [N]; B on pad rows, which attend to themselves only.
        indptr: int32 [B + 1].
        mask: int32 [N, words], ancestors, as in a packed tree.
        scale: of the scores; 1 / sqrt(D) where not given.
        softcap: scores become ``softcap * tanh(score / softcap)``.
        window: a row sees keys at most ``window - 1`` positions before its own.
        depth: int32 [N], needed with ``window``.

    Returns:
        out [N, Hq, D] in q's dtype, and lse float32 [N, Hq], the natural log of the summed exponentials.

    Raises:
        EchoError: shapes or dtypes that do not fit.
    """
    n, heads, dim = checks.tensor("q", q, ["N", "Hq", "D"], checks.FLOATS).shape
    _, page, kv_heads, _ = checks.tensor("key_cache", key_cache, ["pages", "page_size", "Hkv", dim], checks.FLOATS).shape
    checks.tensor("tree_key", tree_key, [n, kv_heads, dim], checks.FLOATS)
    checks.tensor("tree_value", tree_value, [n, kv_heads, dim], checks.FLOATS)
    checks.tensor("request", request, [n], torch.int32)
    words = checks.tensor("mask", mask, [n, "words"], torch.int32).shape[1]
    batch = checks.tensor("context", context, ["B"], torch.int32).shape[0]
    checks.tensor("page_table", page_table, [batch, "max_pages"], torch.int32)
    checks.tensor("indptr", indptr, [batch + 1], torch.int32)
    checks.integer("Hq / Hkv", heads // kv_heads if heads % kv_heads == 0 else 0, 1)

    out = torch.empty(n, heads, dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(n, heads, dtype=torch.float32, device=q.device)
    bit = torch.arange(32 * words, device=q.device)
    visible = ((mask[:, bit // 32] >> (bit % 32).int()) & 1).bool()
    factor = dim**-0.5 if scale is None else scale
    for row in range(n):
        b = int(request[row])
        own = torch.tensor([row], device=q.device) if b >= batch else int(indptr[b]) + visible[row].nonzero()[:, 0]
        length = 0 if b >= batch else int(context[b])
        position = torch.arange(length, device=q.device)
        where = position if b >= batch else page_table[b, position // page].long() * page + position % page
        keys = torch.cat([key_cache.flatten(0, 1)[where], tree_key[own]]).float()
        values = torch.cat([value_cache.flatten(0, 1)[where], tree_value[own]]).float()
        query = q[row].float().view(kv_heads, heads // kv_heads, dim)
        score = torch.einsum("hgd,shd->hgs", query, keys) * factor
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        if window is not None and depth is not None:
            at = torch.cat([position, length + depth[own].long()])
            score = score.masked_fill(at <= length + int(depth[row]) - window, -torch.inf)
        lse[row] = score.logsumexp(-1).flatten()
        out[row] = torch.einsum("hgs,shd->hgd", score.softmax(-1), values).flatten(0, 1)
    return out.to(q.dtype), lse
