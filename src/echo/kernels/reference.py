"""The PyTorch reference of every kernel: the same meaning, and the tests' only oracle.

Arguments were checked by :mod:`echo.kernels`: call these there, with ``backend="torch"``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from echo.kernels.arguments import Attention


def argmax_tokens(logits: Tensor) -> Tensor:
    """Implement :func:`echo.kernels.argmax_tokens`."""
    value, token = torch.where(torch.isnan(logits), -torch.inf, logits).max(dim=-1)
    return torch.where(value > -torch.inf, token, -1)


def accept(
    parent: Tensor,
    indptr: Tensor,
    tokens: Tensor,
    target: Tensor,
    max_depth: int,
    max_new_tokens: Tensor | None = None,
    eos_tokens: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Implement :func:`echo.kernels.accept`."""
    if target.dim() == 2:
        target = argmax_tokens(target)
    path = _path(parent, indptr, tokens, target, max_depth)
    rows, emitted, num_emitted, cut_row = truncate(*path, max_new_tokens, eos_tokens)
    assert cut_row is not None
    last = (num_emitted - 1).clamp(min=0)[:, None]
    return rows, emitted, num_emitted, cut_row, emitted.gather(1, last)[:, 0]


def _path(
    parent: Tensor, indptr: Tensor, tokens: Tensor, target: Tensor, max_depth: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Accepted rows, emitted tokens, their number, and cut rows, for answers without an end."""
    count = len(tokens)
    batch = len(indptr) - 1
    device = tokens.device
    if batch == 0:  # an idle data-parallel rank
        none = torch.empty(0, max_depth + 1, dtype=torch.int64, device=device)
        return none, none.clone(), none.new_empty(0), none.new_empty(0)
    first = indptr[:-1].long()
    end = indptr[1:].long()
    at = torch.arange(count, device=device)
    request = torch.searchsorted(end, at, right=True).clamp(max=batch - 1)
    above = first[request] + parent
    linked = (parent >= 0) & (above < at) & (at < end[request])
    above = torch.where(linked, above, count)  # row N, which reads -1 as well, means none
    target = torch.cat([target, target.new_full((1,), -1)])
    matches = linked & (tokens == target[above]) & (tokens >= 0)
    none = torch.full((count + 1,), count, device=device)
    following = none.scatter_reduce(0, above, torch.where(matches, at, count), "amin")
    path = [first.masked_fill(end <= first, count)]
    for _ in range(max_depth):
        path.append(following[path[-1]])
    rows = torch.stack(path, dim=1)
    emitted = target[rows].clamp(min=-1)
    there = emitted >= 0
    rows = rows.masked_fill(rows == count, -1)
    cut_row = torch.full_like(first, -1)
    if max_depth:
        cut_row = rows.masked_fill(there, -1)[:, 1:].amax(dim=1)
    return rows.masked_fill(~there, -1), emitted, there.sum(dim=1), cut_row


def truncate(
    rows: Tensor,
    emitted: Tensor,
    num_emitted: Tensor,
    cut_row: Tensor | None,
    max_new_tokens: Tensor | None,
    eos_tokens: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Cut the first results of :func:`accept`, as it returns them, at the ends of answers."""
    if eos_tokens is None and max_new_tokens is None:
        return rows, emitted, num_emitted, cut_row
    kept = num_emitted
    if max_new_tokens is not None:
        kept = torch.minimum(num_emitted, max_new_tokens.clamp(min=0))
    if eos_tokens is not None:
        ends = (emitted[..., None] == eos_tokens).any(dim=2) & (emitted >= 0)
        kept = torch.minimum(kept, (ends.cumsum(dim=1) - ends.long() == 0).sum(dim=1))
    column = torch.arange(emitted.shape[1], device=emitted.device)
    past_end = column >= kept[:, None]
    over = (column == kept[:, None]) & (column > 0)
    last = torch.where(over, rows, -1).amax(dim=1)  # the row that the answer ends before
    if cut_row is not None:
        last = torch.maximum(last, cut_row.masked_fill(kept < num_emitted, -1))
    return rows.masked_fill(past_end, -1), emitted.masked_fill(past_end, -1), kept, last


def tree_attention(call: Attention) -> tuple[Tensor, Tensor]:
    """Implement :func:`echo.kernels.tree_attention` in float64, per request; not sync-free."""
    s = call.shapes
    device = call.q.device
    query = call.q.double().view(s.num_rows, s.num_kv_heads, s.group, s.dim)
    tree_key = call.tree_key.double()
    tree_value = call.tree_value.double()
    score = torch.einsum("nhgd,nhd->nhg", query, tree_key) * call.factor  # pad rows see themselves
    out = tree_value.repeat_interleave(s.group, dim=1)
    lse = _cap(score, call.softcap).flatten(1)
    bit = torch.arange(32 * call.mask.shape[1], device=device)
    for b in range(s.batch):
        rows = (call.request == b).nonzero()[:, 0]
        first = int(call.indptr[b])
        end = int(call.indptr[b + 1])
        keys = tree_key[first:end]
        values = tree_value[first:end]
        count = end - first
        seen = ((call.mask[rows][:, bit // 32] >> (bit % 32).int()) & 1).bool()[:, :count]
        seen = F.pad(seen, (0, count - seen.shape[1]))
        position = torch.zeros(count, dtype=torch.int64, device=device)
        if call.depth is not None:
            position = call.depth[first:end].long()
        if call.cache is not None:
            key_cache, value_cache, page_table, prefix_lens = call.cache
            length = max(min(int(prefix_lens[b]), s.max_prefix), 0)
            at = torch.arange(length, device=device)
            pages = page_table[b, at // s.page_size].long()
            known = (pages >= 0) & (pages < len(key_cache))
            at = at[known]
            pages = pages[known]
            cached = [cache[pages, at % s.page_size].double() for cache in (key_cache, value_cache)]
            for part, scales in zip(cached, (call.key_scale, call.value_scale), strict=True):
                if scales is not None:
                    part *= scales.double()[:, None]
            keys = torch.cat([cached[0], keys])
            values = torch.cat([cached[1], values])
            seen = torch.cat([seen.new_ones(len(rows), len(at)), seen], dim=1)
            position = torch.cat([at - length, position])
        if call.window is not None and call.depth is not None:
            seen = seen & (call.depth[rows].long()[:, None] - position < call.window)
        score = _cap(torch.einsum("nhgd,shd->nhgs", query[rows], keys) * call.factor, call.softcap)
        finite = values.isfinite()  # other values spoil only rows that see them; but 0 * NaN is NaN
        score = score.masked_fill(~finite.all(-1).T[:, None], torch.nan)
        score = score.masked_fill(~seen[:, None, None], -torch.inf)
        values = torch.where(finite, values, 0.0)
        total = score.logsumexp(-1)
        weight = torch.where(total[..., None] == -torch.inf, 0.0, score.softmax(-1))
        found = torch.einsum("nhgs,shd->nhgd", weight, values).flatten(1, 2)
        total = total.flatten(1)
        if call.sinks is not None:  # a key whose value is 0
            sinks = call.sinks.expand_as(total)
            found, total = _merged(found, total, torch.zeros_like(found), sinks)
        if call.prefix_out is not None and call.prefix_lse is not None:
            before = call.prefix_lse[rows]
            before = before.masked_fill(before == torch.inf, -torch.inf)
            found, total = _merged(found, total, call.prefix_out[rows], before)
        out[rows] = found
        lse[rows] = total
    return out.to(call.q.dtype), lse.float()


def _cap(score: Tensor, cap: float | None) -> Tensor:
    return score if cap is None else cap * torch.tanh(score / cap)


def merge_attention(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Implement :func:`echo.kernels.merge_attention` in float64."""
    out, lse = _merged(o1, lse1, o2, lse2)
    return out.to(o1.dtype), lse.float()


def _merged(o1: Tensor, lse1: Tensor, o2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse1.double(), lse2.double())
    base = torch.where(lse > -torch.inf, lse, 0.0)

    def weighted(out: Tensor, own: Tensor) -> Tensor:
        weight = (own.double() - base).exp()[..., None]
        return torch.where(own[..., None] == -torch.inf, 0.0, out.double() * weight)

    return weighted(o1, lse1) + weighted(o2, lse2), lse
