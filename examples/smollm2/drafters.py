"""The trained EAGLE-style head as a drafter for SmolLM2, and with prompt lookup as a second opinion."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import echo
from head import FLOOR, HEADS, WEIGHTS, WIDTH, EagleHead
from model import SmolLM2


class Eagle:
    """The trained head as a drafter (``echo.Drafter``). Its cache holds true features only, so it depends on the text alone.

    It reads the target's features of the accepted rows (draft-extend), and that pass already scores the next step's first layer. It
    reads them when it next drafts: while speculation is off they are only kept, so that "off" costs next to nothing.

    Args:
        target: whose ``hidden`` it reads right after each of the target's passes.
        slots, length: as of the target.
        count: candidates k at each node.
        floor: nodes of smaller path log-probability are not drafted on.
    """

    def __init__(
        self,
        target: SmolLM2,
        slots: int,
        length: int = 512,
        count: int = 4,
        floor: float = FLOOR,
        weights: Path = WEIGHTS,
    ) -> None:
        self.target, self.count, self.floor = target, count, floor
        embedding = target.model.model.embed_tokens.weight.detach()
        self.head = EagleHead.read(weights).to(embedding.device)
        self.embedding = embedding / embedding.norm(dim=-1).mean()
        self.keys = torch.zeros(slots, length, HEADS, WIDTH // HEADS, dtype=torch.float32)
        self.values = torch.zeros_like(self.keys)
        self.used = torch.zeros(slots, dtype=torch.int64)
        self.tokens = torch.zeros(slots, count, dtype=torch.int64)
        self.log_probs = torch.zeros(
            slots, count, dtype=torch.float16
        )  # two bytes: what a trace holds is exactly what was ranked
        self.root = torch.zeros(slots, WIDTH, dtype=torch.float32)
        # Of the text not read yet, in order: slots [n], features [n, 1728], and the token after each, [n]; each slot's begins at its
        # own place of the list.
        self.unread: list[tuple[Tensor, Tensor, Tensor]] = []
        self.since = torch.zeros(slots, dtype=torch.int64)
        # Of the layers drafted in this step: states [B, W, width], keys, values [B, nodes, heads, D], who sees whom [B, W, nodes].
        self.state = self.own_keys = self.own_values = self.sees = torch.empty(0)

    @torch.inference_mode()
    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor) -> None:
        """Keeps the prompts' features, which the target's prefill has just left in ``hidden``; forgets who was in the slots before."""
        self.used[req_indices], self.since[req_indices], self.state = (
            0,
            len(self.unread),
            torch.empty(0),
        )
        where = torch.repeat_interleave(req_indices, torch.tensor([len(p) for p in prompts]))
        after = torch.cat(
            [torch.cat([p[1:], t[None]]) for p, t in zip(prompts, first, strict=True)]
        )
        self.unread.append((where, self.target.hidden, after))

    @torch.inference_mode()
    def extend(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        """Keeps the accepted rows' features."""
        self.state = torch.empty(0)
        request, local = (accepted.rows >= 0).nonzero(as_tuple=True)
        self.unread.append(
            (
                req_indices[request],
                self.target.hidden[accepted.rows[request, local]],
                accepted.tokens[request, local],
            )
        )

    @torch.inference_mode()
    def draft(self, req_indices: Tensor, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens after each node. The root's were found when its text was read; inactive nodes are not computed."""
        batch, width = frontier.token.shape
        if frontier.depth == 0 or not len(self.state):  # the first layer may come from elsewhere
            self._read()
            self.state = self.root[req_indices][:, None]
            self.own_keys = self.own_values = self.keys.new_empty(batch, 0, HEADS, WIDTH // HEADS)
            self.sees = torch.zeros(batch, 1, 0, dtype=torch.bool)
        if frontier.depth == 0:
            return self.tokens[req_indices][:, None], self.log_probs[req_indices][:, None]
        request, node = (frontier.active & (frontier.score >= self.floor)).nonzero(as_tuple=True)
        state = frontier.inherit(self.state)
        position = (self.used[req_indices] + frontier.depth - 1)[request]
        q, k, v = self.head.inputs(
            state[request, node], self.embedding[frontier.token[request, node]], position
        )
        own = self.keys.new_zeros(batch, 2 * width, HEADS, WIDTH // HEADS)
        own[request, node], own[request, width + node] = k, v
        self.own_keys = torch.cat([self.own_keys, own[:, :width]], dim=1)
        self.own_values = torch.cat([self.own_values, own[:, width:]], dim=1)
        self.sees = torch.cat(
            [frontier.inherit(self.sees), torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)],
            dim=2,
        )
        queries = self.keys.new_zeros(batch, width, HEADS, WIDTH // HEADS)
        queries[request, node] = q
        longest = int(self.used[req_indices].max())
        past = torch.arange(longest) < self.used[req_indices][:, None]
        mask = torch.cat([past[:, None].expand(-1, width, -1), self.sees], dim=2)
        keys = torch.cat([self.keys[req_indices, :longest], self.own_keys], dim=1)
        values = torch.cat([self.values[req_indices, :longest], self.own_values], dim=1)
        attended = _attend(queries, keys, values, mask)
        new = self.head.outputs(state[request, node], attended[request, node])
        self.state = self.root.new_zeros(batch, width, WIDTH)
        self.state[request, node] = new
        tokens = torch.zeros(batch, width, self.count, dtype=torch.int64)
        log_probs = torch.full(tokens.shape, -torch.inf, dtype=torch.float16)
        tokens[request, node], log_probs[request, node] = self._candidates(new)
        return tokens, log_probs

    def _read(self) -> None:
        """Adds true entries to the cache: all text that came since the last time."""
        if not self.unread:
            return
        where, features, after = (torch.cat(column) for column in zip(*self.unread, strict=True))
        place = torch.repeat_interleave(torch.tensor([len(rows[0]) for rows in self.unread]))
        mine = (place >= self.since[where]).nonzero()[:, 0]
        self.unread, self.since = [], torch.zeros_like(self.since)
        turn = mine[where[mine].argsort(stable=True)]
        where, features, after = where[turn], features[turn], after[turn]
        slots, request, lengths = where.unique_consecutive(return_inverse=True, return_counts=True)
        local = torch.arange(len(where)) - (lengths.cumsum(0) - lengths)[request]
        used = self.used[slots]
        position = used[request] + local
        state = self.head.fuse(features)
        q, k, v = self.head.inputs(state, self.embedding[after], position)
        self.keys[where, position], self.values[where, position] = k, v
        longest = int(lengths.max())
        queries = self.keys.new_zeros(len(slots), longest, HEADS, WIDTH // HEADS)
        queries[request, local] = q
        total = int((used + lengths).max())
        mask = torch.arange(total) <= (used[:, None] + torch.arange(longest))[..., None]
        attended = _attend(queries, self.keys[slots, :total], self.values[slots, :total], mask)
        ends = lengths - 1
        last = local == ends[request]
        new = self.head.outputs(state[last], attended[request, local][last])
        self.used[slots] = used + lengths
        self.root[slots] = new
        self.tokens[slots], self.log_probs[slots] = self._candidates(new)

    def _candidates(self, state: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head.logits(state)
        top = logits.topk(self.count, dim=-1)
        return self.head.vocab[top.indices], (
            top.values - logits.logsumexp(-1, keepdim=True)
        ).half()


def pooled(target: SmolLM2, slots: int, length: int = 512, **options) -> echo.PromptLookup:
    """The head, and what the text's own past says: the drafter of the demo. ``options`` are :class:`Eagle`'s."""
    return echo.PromptLookup(
        slots, length, Eagle(target, slots, length, **options), device=target.model.device
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """[B, R, heads, D] queries over [B, S, heads, D] keys; ``mask`` bool [B, R, S]."""
    out = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None]
    )
    return out.transpose(1, 2)
