"""The trained EAGLE-style head as a drafter for SmolLM2, alone and mixed with prompt lookup.

B requests, W nodes of a frontier, k candidates of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import echo
from head import FLOOR, HEADS, WEIGHTS, WIDTH, EagleHead
from model import SmolLM2

SIZE = WIDTH // HEADS


class Eagle:
    """The trained head as an ``echo.Drafter``. Its cache holds true features only, no drafted ones.

    Draft extend, which reads the target's features of accepted rows and scores the next step's
    first layer, waits until something is drafted: without speculation features are only kept.

    Args:
        target: whose ``hidden`` it takes right after each of the target's passes.
        max_num_reqs: requests at once.
        length: tokens of a request.
        k: candidates of each node.
        floor: nodes of smaller path log-probability are not expanded.
        weights: of the head.
    """

    def __init__(
        self, target: SmolLM2, max_num_reqs: int, length: int = 512, k: int = 4,
        floor: float = FLOOR, weights: Path = WEIGHTS,
    ) -> None:  # fmt: skip
        self.target, self.k, self.floor = target, k, floor
        embedding = target.model.model.embed_tokens.weight.detach()
        self.head = EagleHead.read(weights).to(embedding.device)
        self.embedding = embedding / embedding.norm(dim=-1).mean()
        self.keys = torch.zeros(max_num_reqs, length, HEADS, SIZE, dtype=torch.float32)
        self.values = torch.zeros_like(self.keys)
        self.used = torch.zeros(max_num_reqs, dtype=torch.int64)
        self.tokens = torch.zeros(max_num_reqs, k, dtype=torch.int64)
        # Two bytes: a recorded trace holds exactly what was ranked.
        self.log_probs = torch.zeros(max_num_reqs, k, dtype=torch.float16)
        self.root = torch.zeros(max_num_reqs, WIDTH, dtype=torch.float32)
        # Text before its draft extend: request indices [n], features [n, 1728], next tokens [n];
        # and where in the list each request's begins.
        self.backlog: list[tuple[Tensor, Tensor, Tensor]] = []
        self.since = torch.zeros(max_num_reqs, dtype=torch.int64)
        # Layers of this step: states [B, W, width], keys and values [B, nodes, heads, size],
        # ancestors [B, W, nodes].
        self.state = self.own_keys = self.own_values = self.ancestors = torch.empty(0)

    @torch.inference_mode()
    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor) -> None:
        """Keeps the prompts' features, which prefill has just left in the target's ``hidden``."""
        self.used[req_indices], self.since[req_indices] = 0, len(self.backlog)
        self.state = torch.empty(0)
        where = torch.repeat_interleave(req_indices, torch.tensor([len(p) for p in prompts]))
        after = [torch.cat([p[1:], t[None]]) for p, t in zip(prompts, first, strict=True)]
        self.backlog.append((where, self.target.hidden, torch.cat(after)))

    @torch.inference_mode()
    def extend(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        """Keeps the accepted rows' features."""
        self.state = torch.empty(0)
        path = (accepted.rows >= 0).nonzero(as_tuple=True)
        features, tokens = self.target.hidden[accepted.rows[path]], accepted.tokens[path]
        self.backlog.append((req_indices[path[0]], features, tokens))

    @torch.inference_mode()
    def draft(self, req_indices: Tensor, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens after each node; inactive nodes are not computed."""
        batch, width = frontier.token.shape
        if frontier.depth == 0 or not len(self.state):  # the first layer may come from elsewhere
            self._extend()
            self.state = self.root[req_indices][:, None]
            self.own_keys = self.own_values = self.keys.new_empty(batch, 0, HEADS, SIZE)
            self.ancestors = torch.zeros(batch, 1, 0, dtype=torch.bool)
        if frontier.depth == 0:
            return self.tokens[req_indices][:, None], self.log_probs[req_indices][:, None]
        nodes = (frontier.active & (frontier.score >= self.floor)).nonzero(as_tuple=True)
        state, used = frontier.inherit(self.state)[nodes], self.used[req_indices]
        position = (used + frontier.depth - 1)[nodes[0]]
        qkv = self.head.inputs(state, self.embedding[frontier.token[nodes]], position)
        q, k, v = self.keys.new_zeros(3, batch, width, HEADS, SIZE)
        q[nodes], k[nodes], v[nodes] = qkv
        self.own_keys = torch.cat([self.own_keys, k], dim=1)
        self.own_values = torch.cat([self.own_values, v], dim=1)
        itself = torch.eye(width, dtype=torch.bool).expand(batch, -1, -1)
        self.ancestors = torch.cat([frontier.inherit(self.ancestors), itself], dim=2)
        longest = int(used.max())
        past = (torch.arange(longest) < used[:, None])[:, None].expand(-1, width, -1)
        keys = torch.cat([self.keys[req_indices, :longest], self.own_keys], dim=1)
        values = torch.cat([self.values[req_indices, :longest], self.own_values], dim=1)
        attended = _attend(q, keys, values, torch.cat([past, self.ancestors], dim=2))
        new = self.head.outputs(state, attended[nodes])
        self.state = self.root.new_zeros(batch, width, WIDTH)
        self.state[nodes] = new
        tokens = torch.zeros(batch, width, self.k, dtype=torch.int64)
        log_probs = torch.full(tokens.shape, -torch.inf, dtype=torch.float16)
        tokens[nodes], log_probs[nodes] = self._candidates(new)
        return tokens, log_probs

    def _extend(self) -> None:
        """Draft extend of the backlog."""
        if not self.backlog:
            return
        where, features, after = (torch.cat(column) for column in zip(*self.backlog, strict=True))
        entry = torch.repeat_interleave(torch.tensor([len(rows[0]) for rows in self.backlog]))
        own = (entry >= self.since[where]).nonzero()[:, 0]
        self.backlog, self.since = [], torch.zeros_like(self.since)
        order = own[where[own].argsort(stable=True)]
        where, features, after = where[order], features[order], after[order]
        groups = where.unique_consecutive(return_inverse=True, return_counts=True)
        req_indices, request, counts = groups
        local = torch.arange(len(where)) - (counts.cumsum(0) - counts)[request]
        used = self.used[req_indices]
        position = used[request] + local
        state = self.head.fuse(features)
        q, k, v = self.head.inputs(state, self.embedding[after], position)
        self.keys[where, position], self.values[where, position] = k, v
        longest, total = int(counts.max()), int((used + counts).max())
        queries = self.keys.new_zeros(len(req_indices), longest, HEADS, SIZE)
        queries[request, local] = q
        mask = torch.arange(total) <= (used[:, None] + torch.arange(longest))[..., None]
        keys, values = self.keys[req_indices, :total], self.values[req_indices, :total]
        attended = _attend(queries, keys, values, mask)[request, local]
        last = local == (counts - 1)[request]
        new = self.head.outputs(state[last], attended[last])
        self.used[req_indices] = used + counts
        self.root[req_indices] = new
        self.tokens[req_indices], self.log_probs[req_indices] = self._candidates(new)

    def _candidates(self, state: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.head.logits(state)
        top = logits.topk(self.k, dim=-1)
        log_probs = top.values - logits.logsumexp(-1, keepdim=True)
        return self.head.vocab[top.indices], log_probs.half()


def pooled(target: SmolLM2, max_num_reqs: int, length: int = 512, **options) -> echo.PromptLookup:
    """The head mixed with prompt lookup: the demo's drafter; ``options`` are :class:`Eagle`'s."""
    head = Eagle(target, max_num_reqs, length, **options)
    return echo.PromptLookup(max_num_reqs, length, head, device=target.model.device)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """q [B, R, heads, size] over k and v [B, S, heads, size]; ``mask`` bool [B, R, S]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
    return out.transpose(1, 2)
