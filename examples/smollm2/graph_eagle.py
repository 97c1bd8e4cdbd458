"""The EAGLE head for an engine of CUDA graphs: fixed shapes, buffers at fixed addresses, nothing read back to the host.

It drafts what :class:`drafters.Eagle` drafts (float32: to rounding). Lanes are dense: every call works on the first B lanes. Whatever is
a function of the token alone, or of the position alone, is a table.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

import echo
from head import FEATURES, FLOOR, HEADS, WEIGHTS, WIDTH, EagleHead

EPS = torch.finfo(torch.float32).eps
SIZE = WIDTH // HEADS
CHUNK = 16
"""Tokens of each lane that :meth:`GraphEagle.read` extends at once."""


class GraphEagle:
    """The trained head as a drafter that a CUDA graph can hold.

    Every method but :meth:`admit`, :meth:`move` and :meth:`catch_up` may be captured; its shapes follow from B and the frontier alone.

    Args:
        model: the target, whose embeddings, device and type of features it takes.
        lanes: requests at most.
        length: tokens of a request at most; what lies beyond is not read, and drafts are poor from there on.
        count: candidates k of each node.
        beam: nodes of a frontier at most.
        depth: layers drafted at most.
        floor: below nodes of smaller path log-probability nothing is drafted.
        pending: steps without speculation until :meth:`catch_up` is due.
        weights: of the head.
        dtype: the head computes in it.
        fused: between matrix products, Triton kernels (``eagle_kernels``) instead of torch's operations; on a GPU where not given.

    Attributes:
        used: int64 [lanes], tokens read.
        unread: steps remembered since the last :meth:`catch_up`. Counted by the engine, because a replayed graph runs no Python.
    """

    def __init__(
        self, model, lanes: int, length: int = 512, count: int = 4, *, beam: int = 4, depth: int = 8, floor: float = FLOOR,
        pending: int = 64, weights: Path = WEIGHTS, dtype: torch.dtype = torch.float32, fused: bool | None = None,
    ) -> None:  # fmt: skip
        embedding = model.model.embed_tokens.weight.detach()
        device, kind = embedding.device, embedding.dtype
        self.length, self.count, self.beam, self.depth, self.floor = (
            length,
            count,
            beam,
            depth,
            floor,
        )
        self.fused, self.eps = device.type == "cuda" if fused is None else fused, EPS
        self._weights(
            EagleHead.read(weights).requires_grad_(False).to(device), embedding.float(), dtype
        )
        self.angles = _angles(2 * length + depth, device)
        self.turns = torch.view_as_real(self.angles)
        self.lane, self.steps = (
            torch.arange(lanes, device=device),
            torch.arange(max(length, depth), device=device),
        )

        # By column of a lane: its text, then the nodes drafted in this step, `beam` a layer; last one that is never looked at, for
        # what is no entry.
        self.text = -(-length // 8) * 8
        columns = (
            -(-(self.text + depth * beam + 1) // 8) * 8
        )  # strides of 8, as masks of attention want them
        self.scratch = columns - 1
        self.kv = torch.zeros(lanes, columns, 2, HEADS, SIZE, dtype=dtype, device=device)
        self.column = torch.arange(columns, device=device)
        self.column[self.text :] = 2 * length
        self.seen = torch.zeros((), dtype=dtype, device=device)
        # What a node sees of nothing but itself. A lane without text sees its first column, so that no number is NaN.
        self.alone = torch.full((beam, columns), -torch.inf, dtype=dtype, device=device)
        self.alone[:, 0] = 0.0
        for layer in range(depth):
            self.alone[:, self.text + layer * beam :][:, :beam].fill_diagonal_(0.0)

        # Of the text, by lane; one lane more, for lanes that keep what they have.
        self.used = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.root = torch.zeros(lanes + 1, WIDTH, dtype=dtype, device=device)
        self.tokens = torch.zeros(lanes + 1, count, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(lanes + 1, count, device=device)

        # Of the layers drafted in this step.
        self.state = torch.zeros(lanes, beam, WIDTH, dtype=dtype, device=device)
        self.mask = torch.zeros(lanes, beam, columns, dtype=dtype, device=device)
        self.angle = torch.zeros(
            lanes, depth, *self.angles.shape[1:], dtype=self.angles.dtype, device=device
        )
        self.sees = torch.zeros(
            depth, lanes, beam, depth, dtype=torch.int32, device=device
        )  # a node's ancestor in each layer, itself last

        # Of the text not read yet; one place more, for what is no entry.
        self.room, self.unread = pending, 0
        self.pending = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.pending_features = torch.zeros(lanes, pending + 1, FEATURES, dtype=kind, device=device)
        self.pending_tokens = torch.zeros(lanes, pending + 1, dtype=torch.int64, device=device)

    def _weights(self, head: EagleHead, embedding: Tensor, dtype: torch.dtype) -> None:
        """The head's matrices with the norms' weights in them, and the part of queries, keys and values that a token alone decides."""
        of_token, of_state = head.qkv.weight.split(WIDTH, dim=1)
        # The pairs that turn together lie side by side, as one complex number: products of queries and keys are the same.
        order = (
            torch.arange(WIDTH, device=embedding.device)
            .view(HEADS, 2, -1)
            .transpose(1, 2)
            .flatten()
        )
        order = torch.cat(
            [order, order + WIDTH, torch.arange(2 * WIDTH, 3 * WIDTH, device=embedding.device)]
        )
        table = head.norm_embed(head.embed(embedding / embedding.norm(dim=-1).mean()))
        self.table = (table @ of_token[order].T).to(dtype)
        self.vocab, self.fuse = head.vocab, head.fuse.weight.to(dtype)
        self.qkv = (of_state * head.norm_state.weight)[order].to(dtype)
        self.out, self.down = head.out.weight.to(dtype), head.down.weight.to(dtype)
        self.gate_up = (head.gate_up.weight * head.norm_mlp.weight).to(dtype)
        self.head = (head.head.weight * head.norm_out.weight).to(dtype)

    def admit(self, lane: int, prompt: Tensor, first: Tensor, features: Tensor) -> None:
        """A new request: reads its prompt and finds its first layer.

        Args:
            lane: whose former request is forgotten.
            prompt: int64 [n].
            first: int64, one element, the token sampled after it.
            features: [n, 1728], the target's hidden states of the prompt.

        Raises:
            EchoError: a prompt longer than ``length``.
        """
        if len(prompt) > self.length:
            raise echo.EchoError(
                f"prompt: expected at most {self.length} tokens, got {len(prompt)}"
            )
        at = slice(lane, lane + 1)
        self.used[at] = self.pending[at] = 0
        after = torch.cat([prompt[1:], first.view(1)])
        self._extend(
            at, features[None], after[None], torch.full((1,), len(prompt), device=self.used.device)
        )

    def extend(self, features: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """Reads what the first B lanes emitted, and finds their next first layer.

        Args:
            features: [B, n, 1728], the target's hidden states of the accepted rows; those beyond ``lengths`` are not looked at.
            tokens: int64 [B, n], the token after each; beyond ``lengths`` anything.
            lengths: int64 [B]; a lane of 0 keeps what it has.
        """
        self._extend(slice(0, len(tokens)), features, tokens, lengths)

    def remember(self, features: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """Keeps one token of the first B lanes, for :meth:`catch_up`: what a step without speculation costs. The engine counts ``unread``.

        Args:
            features: [B, 1, 1728].
            tokens: int64 [B, 1].
            lengths: int64 [B], 1 or 0.
        """
        batch = len(tokens)
        count, lane = self.pending[:batch], self.lane[:batch]
        at = lane, torch.where(lengths > 0, count, self.room)
        self.pending_features.index_put_(at, features[:, 0])
        self.pending_tokens.index_put_(at, tokens[:, 0])
        count.add_(lengths).clamp_(max=self.room)

    def catch_up(self) -> None:
        """Reads all that was remembered. Due before the next draft, and when ``unread`` steps are as many as ``pending``."""
        for chunk in range(-(-min(self.unread, self.room) // CHUNK)):
            self.read(chunk)
        self.pending.zero_()
        self.unread = 0

    def read(self, chunk: int) -> None:
        """One part of :meth:`catch_up`, in order: remembered tokens ``chunk * CHUNK`` and those after it, of every lane."""
        part = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, self.room))
        lengths = (self.pending - part.start).clamp(0, part.stop - part.start)
        self.extend(self.pending_features[:, part], self.pending_tokens[:, part], lengths)

    def move(self, source: int, target: int) -> None:
        """The request of lane ``source`` is from now on that of lane ``target``."""
        for state in (
            self.kv, self.used, self.root, self.tokens, self.log_probs, self.pending, self.pending_features, self.pending_tokens
        ):  # fmt: skip
            state[target].copy_(state[source])

    def draft(self, slots: Tensor, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
        """The k likeliest tokens after each node of the first B lanes, as :class:`echo.Drafter` says; ``slots`` are not looked at.

        The root's were found when its text was read. Inactive nodes and those below the floor get -inf.

        Raises:
            EchoError: a frontier wider than ``beam``, or deeper than ``depth``.
        """
        (batch, width), layer = frontier.token.shape, frontier.depth - 1
        if width > self.beam or layer >= self.depth:
            raise echo.EchoError(
                f"frontier: expected at most {self.beam} nodes of a depth up to {self.depth}, got {width} of {layer + 1}"
            )
        if layer >= 0 and self.fused:
            from eagle_kernels import draft

            return draft(self, frontier)
        if layer < 0 and not self.fused:
            used = self.used[:batch, None]
            torch.where(self.column < used[..., None], self.seen, self.alone, out=self.mask[:batch])
            self.angle[:batch] = self.angles[used + self.steps[: self.depth]]
        if layer < 0:
            return self.tokens[:batch, None], self.log_probs[:batch, None]
        mask, first = self.mask[:batch], self.text + layer * self.beam
        if layer == 0:
            state = self.root[:batch, None].expand(-1, width, -1)
        else:
            state = frontier.inherit(self.state[:batch])
            mask[:, :width, self.text : first] = frontier.inherit(mask[..., self.text : first])
        q, kv = self._inputs(state, frontier.token, self.angle[:batch, layer, None])
        self.kv[:batch, first : first + width] = kv
        new = self._outputs(
            state, q, self.kv[:batch, : first + self.beam], mask[:, :width, : first + self.beam]
        )
        self.state[:batch, :width] = new
        tokens, log_probs = self._candidates(new)
        drafted = frontier.active & (frontier.score >= self.floor)
        return tokens, torch.where(drafted[..., None], log_probs, -torch.inf)

    def _extend(self, lanes: slice, features: Tensor, tokens: Tensor, lengths: Tensor) -> None:
        """:meth:`extend` of any lanes side by side. Only each one's last token needs a query, the feed-forward layer and logits."""
        if self.fused:
            from eagle_kernels import extend

            extend(self, lanes, features, tokens, lengths)
            return
        used, lane, batch = self.used[lanes], self.lane[lanes], self.lane[: len(tokens)]
        place = used[:, None] + self.steps[: tokens.shape[1]]
        used.add_(lengths).clamp_(max=self.length)
        state = F.linear(features.to(self.fuse.dtype), self.fuse)
        q, kv = self._inputs(state, tokens.clamp(min=0), self.angles[place])
        self.kv.index_put_(
            (lane[:, None], torch.where(place < used[:, None], place, self.scratch)),
            kv.to(self.kv.dtype),
        )
        last = batch, (lengths - 1).clamp(min=0)
        mask = torch.where(
            self.column[: self.text] < used[:, None], self.seen, self.alone[0, : self.text]
        )[:, None]
        new = self._outputs(
            state[last][:, None], q[last][:, None], self.kv[lanes, : self.text], mask
        )
        keep = torch.where(lengths > 0, lane, len(self.lane))
        for mine, found in zip(
            (self.root, self.tokens, self.log_probs), (new, *self._candidates(new)), strict=True
        ):
            mine.index_copy_(0, keep, found[:, 0])

    def _inputs(self, state: Tensor, tokens: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Turned queries [B, T, heads, D], and turned keys beside values [B, T, 2, heads, D]; ``angle`` [B, T, 3, 1, D / 2]."""
        qkv = torch.addmm(self.table[tokens].flatten(0, 1), _norm(state).flatten(0, 1), self.qkv.T)
        pairs = torch.view_as_complex(qkv.float().view(*tokens.shape, 3, HEADS, -1, 2))
        turned = torch.view_as_real(pairs * angle).flatten(-2)
        return turned[:, :, 0].to(qkv.dtype), turned[:, :, 1:]

    def _outputs(self, state: Tensor, q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """The layer's output state [B, T, width] from attention over ``kv`` [B, S, 2, heads, D], with ``mask`` [B, T, S] added."""
        q, k, v = (x.transpose(1, 2) for x in (q, kv[:, :, 0], kv[:, :, 1]))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)
        new = torch.addmm(state.flatten(0, 1), attended.flatten(2).flatten(0, 1), self.out.T)
        gate, up = F.linear(_norm(new), self.gate_up).chunk(2, dim=-1)
        return torch.addmm(new, F.silu(gate) * up, self.down.T).view(state.shape)

    def _candidates(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 and log-probabilities float32, each [B, T, k], likeliest first."""
        logits = F.linear(_norm(state), self.head)
        log_probs, index = logits.log_softmax(-1, dtype=torch.float32).topk(self.count, dim=-1)
        return self.vocab[index], log_probs


def _norm(state: Tensor) -> Tensor:
    return F.rms_norm(state, (WIDTH,), eps=EPS)


def _angles(length: int, device: torch.device) -> Tensor:
    """By position, as complex numbers, how queries and keys turn, and that values do not: [length, 3, 1, D / 2]."""
    half = SIZE // 2
    frequency = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device)[:, None].float() * frequency
    turn = torch.complex(angle.cos(), angle.sin())
    return torch.stack([turn, turn, torch.ones_like(turn)], dim=1)[:, :, None]
