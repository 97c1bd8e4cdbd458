"""A small paged engine around ``tiny.Model`` whose sampler, masks and cache are the test's; and
plain decoding, token by token and without a cache, as the oracle.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import echo
import tiny
from echo import kernels


def full(model: tiny.Model, text: list[int], window: int | None = None) -> Tensor:
    """Logits [V] after the whole text."""
    place = torch.arange(len(text))
    seen = place[:, None] >= place
    if window is not None:
        seen &= place[:, None] - place < window
    attend = lambda _, q, k, v: tiny.attention(q, k, v, seen)
    return model(torch.tensor(text), place, torch.zeros_like(place), attend)[0][-1]


def plain(
    model: tiny.Model,
    prompt: list[int],
    count: int,
    sample: Callable[[Tensor, list[int]], int],
    window: int | None = None,
) -> list[int]:
    """``count`` tokens, each sampled from its logits [V] and what was emitted before."""
    emitted: list[int] = []
    for _ in range(count):
        emitted.append(sample(full(model, prompt + emitted, window), emitted))
    return emitted


class Server:
    """Speculative decoding of ``prompts``, all at once.

    ``sample(packed, logits)`` gives int64 [N]. Hooks may be replaced: ``attend``, ``allow``,
    ``slots_of``; ``live`` are the requests that run.
    """

    def __init__(self, model, prompts, scheduler, sample, *, k=4, window=None, first=None):
        self.model, self.scheduler, self.sample, self.window = model, scheduler, sample, window
        batch = len(prompts)
        self.drafter = tiny.Drafter(model, batch, k)
        self.history, self.ids = scheduler.history(batch), torch.arange(batch)
        self.prefix_lens = torch.tensor([len(p) for p in prompts], dtype=torch.int32)
        roots = []
        for b, prompt in enumerate(prompts):
            token, self.drafter.state[b] = model.prefill(b, torch.tensor(prompt))
            if first is not None:
                token = first(b, full(model, prompt, window))
            roots.append(token)
        self.root_tokens = torch.tensor(roots)
        self.texts, self.live = [[token] for token in roots], torch.ones(batch, dtype=torch.bool)
        self.pages = {"page_table": model.page_table, "page_size": tiny.PAGE, "pad_slot_id": 0}
        self.allow: Callable[..., Tensor | None] = lambda tree, tokens: None
        self.slots_of: Callable[[echo.PackedTree], Tensor] = lambda packed: packed.slot_mapping(
            self.prefix_lens, **self.pages
        )

    def attend(
        self, packed: echo.PackedTree, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        keys, values = self.model.kv[layer].unflatten(1, (-1, tiny.PAGE))
        args: dict[str, Any] = {}
        if self.window is not None:
            args = {"window": self.window, "depth": packed.depth}
        tree = k, v, packed.request, packed.indptr, packed.mask
        prefix = self.model.page_table, self.prefix_lens
        return kernels.tree_attention(q, keys, values, *prefix, *tree, **args, backend="torch")[0]

    def draft(self) -> echo.SuperTree:
        tree = self.scheduler.begin(self.root_tokens, live=self.live)
        state = self.drafter.state[self.ids][:, None]
        for _ in range(self.scheduler.max_depth):
            tokens, log_probs, state = self.drafter(tree.frontier.token, state)
            allowed = self.allow(tree, tokens)
            tree = self.scheduler.grow(tree, tokens, log_probs, allowed=allowed)
            state = tree.frontier.inherit(state)
        return tree

    def verify(self, packed: echo.PackedTree) -> tuple[Tensor, Tensor]:
        positions, slots = packed.positions(self.prefix_lens), self.slots_of(packed)
        return self.model(packed.tokens, positions, slots, lambda *a: self.attend(packed, *a))

    def step(self) -> tuple[echo.PackedTree, echo.tree.Accepted]:
        packed = self.scheduler.pack(self.draft())
        logits, hidden = self.verify(packed)
        accepted = echo.accept(packed, self.sample(packed, logits))
        self.finish(packed, accepted, hidden)
        return packed, accepted

    def finish(
        self, packed: echo.PackedTree, accepted: echo.tree.Accepted, hidden: Tensor
    ) -> echo.tree.Compaction:
        moves = echo.compact(packed, accepted, self.prefix_lens, **self.pages)
        kv = self.model.kv
        kv[:, :, moves.target] = kv[:, :, moves.source]
        self.prefix_lens = moves.prefix_lens
        self.root_tokens = torch.where(accepted.num_emitted > 0, accepted.bonus, self.root_tokens)
        self.history = self.history.observe(self.ids, packed, accepted)
        self.drafter.extend(self.ids, hidden[moves.gather], accepted.tokens, moves.valid)
        for text, emitted in zip(self.texts, accepted.tokens.tolist(), strict=True):
            text += [token for token in emitted if token >= 0]
        return moves

    def run(self, count: int) -> int:
        """Until every answer has ``count`` tokens; drafts that were accepted."""
        accepted = 0
        while min(map(len, self.texts)) < count:
            accepted += int(self.step()[1].num_accepted_drafts.sum())
        self.texts = [text[:count] for text in self.texts]
        return accepted
