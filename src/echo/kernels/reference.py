"""The plain-torch twin of every kernel: same signature, same meaning, the only oracle. Tensors only, no structures."""

from __future__ import annotations

import torch
from torch import Tensor

from echo.kernels.arguments import (
    Attention,
    AttentionPlan,
    Planning,
    accept_shapes,
    logits_shape,
    merge_shapes,
)


def argmax_tokens(logits: Tensor) -> Tensor:
    """int64 [N]: greedy tokens of logits [N, V]; NaN never wins, and a row without a number greater than -inf has -1."""
    logits_shape(logits)
    clean = torch.where(torch.isnan(logits), -torch.inf, logits)
    value, token = clean.max(dim=-1)
    return torch.where(value > -torch.inf, token, -1)


def cut(
    rows: Tensor,
    emitted: Tensor,
    num_emitted: Tensor,
    cut_row: Tensor | None,
    max_new_tokens: Tensor | None,
    eos_tokens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What :func:`walk` returned, without what lies behind the end of an answer: as if the target had no number there.

    Args:
        rows, emitted, num_emitted, cut_row: of :func:`walk`.
        max_new_tokens: int64 [B], tokens that each answer may still get.
        eos_tokens: int64 [n], tokens that end an answer, themselves included.
    """
    if eos_tokens is None and max_new_tokens is None:
        return rows, emitted, num_emitted, cut_row
    kept = (
        num_emitted
        if max_new_tokens is None
        else torch.minimum(num_emitted, max_new_tokens.clamp(min=0))
    )
    if eos_tokens is not None:
        ends = (emitted[..., None] == eos_tokens).any(dim=2) & (emitted >= 0)
        kept = torch.minimum(kept, (ends.cumsum(dim=1) - ends.long() == 0).sum(dim=1))
    column = torch.arange(emitted.shape[1], device=emitted.device)
    gone, over = column >= kept[:, None], (column == kept[:, None]) & (column > 0)
    last = torch.where(over, rows, -1).amax(dim=1)  # the row that the answer ends before
    last = (
        last
        if cut_row is None
        else torch.maximum(last, cut_row.masked_fill(kept < num_emitted, -1))
    )
    return rows.masked_fill(gone, -1), emitted.masked_fill(gone, -1), kept, last


def accept(
    parent: Tensor, indptr: Tensor, tokens: Tensor, target: Tensor, max_depth: int, max_new_tokens: Tensor | None = None,
    eos_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """As :func:`echo.kernels.accept`."""
    if target.dim() == 2:
        logits_shape(target, tokens)
        target = argmax_tokens(target)
    rows, emitted, lengths, beyond = cut(
        *_path(parent, indptr, tokens, target, max_depth), max_new_tokens, eos_tokens
    )
    assert beyond is not None
    return (
        rows,
        emitted,
        lengths,
        beyond,
        emitted.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0],
    )


def _path(
    parent: Tensor, indptr: Tensor, tokens: Tensor, target_tokens: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows, emitted, lengths and beyond of a walk that no answer ends."""
    count, batch, max_depth = accept_shapes(parent, indptr, tokens, target_tokens, max_depth)
    device = tokens.device
    if batch == 0:  # an idle data-parallel rank
        nothing = torch.empty(0, max_depth + 1, dtype=torch.int64, device=device)
        return nothing, nothing.clone(), nothing.new_empty(0), nothing.new_empty(0)
    first, end = indptr[:-1].long(), indptr[1:].long()
    at = torch.arange(count, device=device)
    request = torch.searchsorted(end, at, right=True).clamp(max=batch - 1)
    above = first[request] + parent
    linked = (parent >= 0) & (above < at) & (at < end[request])
    above = torch.where(linked, above, count)  # the last row, -1 or N, stands for none
    target = torch.cat([target_tokens, target_tokens.new_full((1,), -1)])
    matches = linked & (tokens == target[above]) & (tokens >= 0)
    nowhere = torch.full((count + 1,), count, device=device)
    following = nowhere.scatter_reduce(0, above, torch.where(matches, at, count), "amin")
    walk = [first.masked_fill(end <= first, count)]
    for _ in range(max_depth):
        walk.append(following[walk[-1]])
    rows = torch.stack(walk, dim=1)
    emitted = target[rows].clamp(min=-1)
    there = emitted >= 0
    rows, ended = rows.masked_fill(rows == count, -1), ~there
    beyond = (
        rows.masked_fill(there, -1)[:, 1:].amax(dim=1) if max_depth else torch.full_like(first, -1)
    )
    return rows.masked_fill(ended, -1), emitted, there.sum(dim=1), beyond


def plan_attention(call: Planning) -> AttentionPlan:
    """As :func:`echo.kernels.plan_attention`: only what it was made for, since the reference needs no list."""
    return AttentionPlan(call.shapes, None, call.indptr[:0], call.indptr[:0])


def tree_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.tree_attention`, computed in float64, request by request; it reads back, and needs neither splits nor plan."""
    s, double, device = call.planning.shapes, torch.float64, call.q.device
    query = call.q.to(double).view(s.rows, s.kv_heads, s.group, s.dim)
    tree_key, tree_value = call.tree_key.to(double), call.tree_value.to(double)
    score = (
        torch.einsum("nhgd,nhd->nhg", query, tree_key) * call.factor
    )  # of itself alone: what a pad row sees
    out, lse = tree_value.repeat_interleave(s.group, dim=1), _soft(score, call.softcap).flatten(1)
    bit = torch.arange(32 * call.mask.shape[1], device=device)
    for b in range(s.batch):
        rows, first, end = (
            (call.request == b).nonzero()[:, 0],
            int(call.indptr[b]),
            int(call.indptr[b + 1]),
        )
        keys, values, count = tree_key[first:end], tree_value[first:end], end - first
        seen = ((call.mask[rows][:, bit // 32] >> (bit % 32).int()) & 1).bool()[:, :count]
        seen = torch.nn.functional.pad(seen, (0, count - seen.shape[1]))
        place = (
            torch.zeros(count, dtype=torch.int64, device=device)
            if call.depth is None
            else call.depth[first:end].long()
        )
        if call.cache is not None:
            key_cache, value_cache, page_table, context = call.cache
            length = max(min(int(context[b]), s.longest), 0)
            at = torch.arange(length, device=device)
            pages = page_table[b, at // s.page].long()
            known = (pages >= 0) & (pages < len(key_cache))
            at, pages = at[known], pages[known]
            slots = at % s.page
            cached = [cache[pages, slots].to(double) for cache in (key_cache, value_cache)]
            for part, scales in enumerate((call.key_scale, call.value_scale)):
                if scales is not None:
                    cached[part] = cached[part] * scales.to(double)[:, None]
            keys, values = torch.cat([cached[0], keys]), torch.cat([cached[1], values])
            seen = torch.cat([seen.new_ones(len(rows), len(at)), seen], dim=1)
            place = torch.cat([at - length, place])
        if call.window is not None and call.depth is not None:
            seen = seen & (call.depth[rows].long()[:, None] - place < call.window)
        score = _soft(torch.einsum("nhgd,shd->nhgs", query[rows], keys) * call.factor, call.softcap)
        finite = values.isfinite()  # one that is not spoils the rows that see it, and no other: a weight of 0 times NaN is NaN
        score = score.masked_fill(~finite.all(-1).T[:, None], torch.nan).masked_fill(
            ~seen[:, None, None], -torch.inf
        )
        values, total = torch.where(finite, values, 0.0), score.logsumexp(-1)
        weight = torch.where(total[..., None] == -torch.inf, 0.0, score.softmax(-1))
        out[rows], lse[rows] = (
            torch.einsum("nhgs,shd->nhgd", weight, values).flatten(1, 2),
            total.flatten(1),
        )
    return out.to(call.q.dtype), lse.float()


def _soft(score: Tensor, cap: float | None) -> Tensor:
    return score if cap is None else cap * torch.tanh(score / cap)


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """As :func:`echo.kernels.merge_attention`, computed in float64."""
    merge_shapes(o1, lse1, o2, lse2)
    lse = torch.logaddexp(lse1.double(), lse2.double())
    base = torch.where(lse > -torch.inf, lse, 0.0)
    return (_share(o1, lse1, base) + _share(o2, lse2, base)).to(o1.dtype), lse.float()


def _share(out: Tensor, lse: Tensor, base: Tensor) -> Tensor:
    """What one part brings to the whole, float64; without keys it may hold anything."""
    return torch.where(
        lse[..., None] == -torch.inf, 0.0, out.double() * (lse.double() - base).exp()[..., None]
    )
