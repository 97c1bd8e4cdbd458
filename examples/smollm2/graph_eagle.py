"""The EAGLE head for CUDA graphs: fixed shapes, buffers at fixed addresses, sync-free.

It drafts what :class:`drafters.Eagle` drafts (float32: to rounding). A call works on the first B
lanes. What depends on the token alone, or on the position alone, is a table. D is a head's size.
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
"""Tokens of each lane that :meth:`GraphEagle.extend_chunk` reads at once."""


class GraphEagle:
    """The trained head as a drafter that a CUDA graph can hold.

    Every method but :meth:`admit`, :meth:`move` and :meth:`extend_backlog` may be captured.

    Args:
        model: the target, whose embeddings, device and type of features it takes.
        lanes: requests at most.
        length: tokens of a request at most; beyond them drafts are poor.
        k: candidates of each node.
        beam: nodes of a frontier at most.
        depth: layers drafted at most.
        floor: nodes of smaller path log-probability are not expanded.
        max_backlog: steps without speculation until :meth:`extend_backlog` is due.
        weights: of the head.
        dtype: the head computes in it.
        fused: Triton kernels (``eagle_kernels``) between matrix products. Defaults to a GPU's.

    Attributes:
        used: int64 [lanes], tokens read.
        num_unprocessed: steps deferred since the last :meth:`extend_backlog`, which the engine
            counts: a replayed graph runs no Python.
    """

    def __init__(
        self, model, lanes: int, length: int = 512, k: int = 4, *, beam: int = 4, depth: int = 8,
        floor: float = FLOOR, max_backlog: int = 64, weights: Path = WEIGHTS,
        dtype: torch.dtype = torch.float32, fused: bool | None = None,
    ) -> None:  # fmt: skip
        embedding = model.model.embed_tokens.weight.detach()
        device, kind = embedding.device, embedding.dtype
        self.length, self.k, self.beam, self.depth, self.floor = length, k, beam, depth, floor
        self.fused, self.eps = device.type == "cuda" if fused is None else fused, EPS
        head = EagleHead.read(weights).requires_grad_(False).to(device)
        self._weights(head, embedding.float(), dtype)
        self.rotary = _rotary(2 * length + depth, device)
        self.cos_sin = torch.view_as_real(self.rotary)
        self.lane = torch.arange(lanes, device=device)
        self.steps = torch.arange(max(length, depth), device=device)

        # Columns of a lane: its text, then the nodes drafted in this step, `beam` a layer; the last
        # is never read and takes what is no entry. Strides of 8, as attention masks want them.
        self.text = -(-length // 8) * 8
        columns = -(-(self.text + depth * beam + 1) // 8) * 8
        self.scratch = columns - 1
        self.kv = torch.zeros(lanes, columns, 2, HEADS, SIZE, dtype=dtype, device=device)
        self.column = torch.arange(columns, device=device)
        self.column[self.text :] = 2 * length
        self.visible = torch.zeros((), dtype=dtype, device=device)
        # A node's mask before its prefix and ancestors; without text, column 0, so nothing is NaN.
        self.alone = torch.full((beam, columns), -torch.inf, dtype=dtype, device=device)
        self.alone[:, 0] = 0.0
        for layer in range(depth):
            self.alone[:, self.text + layer * beam :][:, :beam].fill_diagonal_(0.0)

        # Of the text; one lane more, for lanes that keep what they have.
        self.used = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.root = torch.zeros(lanes + 1, WIDTH, dtype=dtype, device=device)
        self.tokens = torch.zeros(lanes + 1, k, dtype=torch.int64, device=device)
        self.log_probs = torch.zeros(lanes + 1, k, device=device)

        # Of the layers drafted in this step. ancestors: a node's in each layer, itself last.
        self.state = torch.zeros(lanes, beam, WIDTH, dtype=dtype, device=device)
        self.mask = torch.zeros(lanes, beam, columns, dtype=dtype, device=device)
        self.angle = self.rotary.new_zeros(lanes, depth, *self.rotary.shape[1:])
        self.ancestors = torch.zeros(depth, lanes, beam, depth, dtype=torch.int32, device=device)

        # Text that is not read yet; one place more, for what is no entry.
        self.max_backlog, self.num_unprocessed = max_backlog, 0
        size = lanes, max_backlog + 1
        self.backlog = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.backlog_features = torch.zeros(*size, FEATURES, dtype=kind, device=device)
        self.backlog_tokens = torch.zeros(size, dtype=torch.int64, device=device)

    def _weights(self, head: EagleHead, embedding: Tensor, dtype: torch.dtype) -> None:
        """Matrices with norm weights folded in; ``table`` is a token's part of q, k and v."""
        of_token, of_state = head.qkv.weight.split(WIDTH, dim=1)
        # Pairs that rotate together lie side by side, as complex numbers: q @ k is the same.
        columns = torch.arange(3 * WIDTH, device=embedding.device)
        order = columns[:WIDTH].view(HEADS, 2, -1).transpose(1, 2).flatten()
        order = torch.cat([order, order + WIDTH, columns[2 * WIDTH :]])
        table = head.norm_embed(head.embed(embedding / embedding.norm(dim=-1).mean()))
        self.table = (table @ of_token[order].T).to(dtype)
        self.vocab, self.fuse = head.vocab, head.fuse.weight.to(dtype)
        self.qkv = (of_state * head.norm_state.weight)[order].to(dtype)
        self.out, self.down = head.out.weight.to(dtype), head.down.weight.to(dtype)
        self.gate_up = (head.gate_up.weight * head.norm_mlp.weight).to(dtype)
        self.head = (head.head.weight * head.norm_out.weight).to(dtype)

    def admit(self, lane: int, prompt: Tensor, first: Tensor, features: Tensor) -> None:
        """Reads a new request's prompt, which also finds its first layer.

        Args:
            lane: of the request.
            prompt: int64 [n].
            first: int64 [1], the token sampled after it.
            features: [n, 1728], the target's hidden states of the prompt.

        Raises:
            EchoError: a prompt longer than ``length``.
        """
        size = len(prompt)
        if size > self.length:
            raise echo.EchoError(f"prompt: expected at most {self.length} tokens, got {size}")
        at = slice(lane, lane + 1)
        self.used[at] = self.backlog[at] = 0
        after = torch.cat([prompt[1:], first.view(1)])
        num_tokens = torch.full((1,), size, device=self.used.device)
        self._extend(at, features[None], after[None], num_tokens)

    def extend(self, features: Tensor, tokens: Tensor, num_tokens: Tensor) -> None:
        """Draft extend of the first B lanes: reads emitted tokens, finds the next first layer.

        Args:
            features: [B, n, 1728], the target's hidden states of the accepted rows.
            tokens: int64 [B, n], the token after each.
            num_tokens: int64 [B], how many count; a lane of 0 keeps what it has.
        """
        self._extend(slice(0, len(tokens)), features, tokens, num_tokens)

    def defer(self, features: Tensor, tokens: Tensor, num_tokens: Tensor) -> None:
        """Appends a token of each of the first B lanes to the backlog: a step without speculation.

        The engine counts ``num_unprocessed``.

        Args:
            features: [B, 1, 1728].
            tokens: int64 [B, 1].
            num_tokens: int64 [B], 1 or 0.
        """
        batch = len(tokens)
        count, lane = self.backlog[:batch], self.lane[:batch]
        at = lane, torch.where(num_tokens > 0, count, self.max_backlog)
        self.backlog_features.index_put_(at, features[:, 0])
        self.backlog_tokens.index_put_(at, tokens[:, 0])
        count.add_(num_tokens).clamp_(max=self.max_backlog)

    def extend_backlog(self) -> None:
        """Draft extend of the backlog: due before the next draft, or once it is full."""
        for chunk in range(-(-min(self.num_unprocessed, self.max_backlog) // CHUNK)):
            self.extend_chunk(chunk)
        if self.num_unprocessed:
            self.backlog.zero_()
        self.num_unprocessed = 0

    def extend_chunk(self, chunk: int) -> None:
        """Draft extend of ``CHUNK`` tokens of every lane's backlog; chunks go in order."""
        part = slice(chunk * CHUNK, min((chunk + 1) * CHUNK, self.max_backlog))
        num_tokens = (self.backlog - part.start).clamp(0, part.stop - part.start)
        self.extend(self.backlog_features[:, part], self.backlog_tokens[:, part], num_tokens)

    def move(self, source: int, target: int) -> None:
        """Moves a request from lane ``source`` to lane ``target``."""
        states = self.kv, self.used, self.root, self.tokens, self.log_probs
        for state in (*states, self.backlog, self.backlog_features, self.backlog_tokens):
            state[target].copy_(state[source])

    def draft(self, req_indices: Tensor, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
        """As :meth:`echo.Drafter.draft`, of the first B lanes; ``req_indices`` are not used.

        The root's candidates were found by draft extend. Inactive nodes and those below the floor
        get -inf.

        Raises:
            EchoError: a frontier wider than ``beam``, or deeper than ``depth``.
        """
        (batch, width), layer = frontier.token.shape, frontier.depth - 1
        if width > self.beam or layer >= self.depth:
            expected = f"at most {self.beam} nodes of a depth up to {self.depth}"
            raise echo.EchoError(f"frontier: expected {expected}, got {width} of {layer + 1}")
        if layer >= 0 and self.fused:
            from eagle_kernels import draft

            return draft(self, frontier)
        if layer < 0:
            if not self.fused:
                used, prefix = self.used[:batch, None], self.mask[:batch]
                torch.where(self.column < used[..., None], self.visible, self.alone, out=prefix)
                self.angle[:batch] = self.rotary[used + self.steps[: self.depth]]
            return self.tokens[:batch, None], self.log_probs[:batch, None]
        mask, first = self.mask[:batch], self.text + layer * self.beam
        end = first + self.beam
        if layer == 0:
            state = self.root[:batch, None].expand(-1, width, -1)
        else:
            state = frontier.inherit(self.state[:batch])
            mask[:, :width, self.text : first] = frontier.inherit(mask[..., self.text : first])
        q, kv = self._inputs(state, frontier.token, self.angle[:batch, layer, None])
        self.kv[:batch, first : first + width] = kv
        new = self._outputs(state, q, self.kv[:batch, :end], mask[:, :width, :end])
        self.state[:batch, :width] = new
        tokens, log_probs = self._candidates(new)
        expanded = frontier.active & (frontier.score >= self.floor)
        return tokens, torch.where(expanded[..., None], log_probs, -torch.inf)

    def _extend(self, lanes: slice, features: Tensor, tokens: Tensor, num_tokens: Tensor) -> None:
        """As :meth:`extend`, any adjacent lanes. Only last tokens need q, MLP and logits."""
        if self.fused:
            from eagle_kernels import extend

            extend(self, lanes, features, tokens, num_tokens)
            return
        used, lane, batch = self.used[lanes], self.lane[lanes], self.lane[: len(tokens)]
        position = used[:, None] + self.steps[: tokens.shape[1]]
        used.add_(num_tokens).clamp_(max=self.length)
        state = F.linear(features.to(self.fuse.dtype), self.fuse)
        q, kv = self._inputs(state, tokens.clamp(min=0), self.rotary[position])
        column = torch.where(position < used[:, None], position, self.scratch)
        self.kv.index_put_((lane[:, None], column), kv.to(self.kv.dtype))
        prefix, alone = self.column[: self.text] < used[:, None], self.alone[0, : self.text]
        mask = torch.where(prefix, self.visible, alone)[:, None]
        last = batch, (num_tokens - 1).clamp(min=0)
        new = self._outputs(
            state[last][:, None], q[last][:, None], self.kv[lanes, : self.text], mask
        )
        to = torch.where(num_tokens > 0, lane, len(self.lane))
        tokens, log_probs = self._candidates(new)
        for mine, found in ((self.root, new), (self.tokens, tokens), (self.log_probs, log_probs)):
            mine.index_copy_(0, to, found[:, 0])

    def _inputs(self, state: Tensor, tokens: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated q [B, T, heads, D], and rotated k beside v [B, T, 2, heads, D].

        ``angle`` is [B, T, 3, 1, D / 2].
        """
        qkv = torch.addmm(self.table[tokens].flatten(0, 1), _norm(state).flatten(0, 1), self.qkv.T)
        pairs = torch.view_as_complex(qkv.float().view(*tokens.shape, 3, HEADS, -1, 2))
        rotated = torch.view_as_real(pairs * angle).flatten(-2)
        return rotated[:, :, 0].to(qkv.dtype), rotated[:, :, 1:]

    def _outputs(self, state: Tensor, q: Tensor, kv: Tensor, mask: Tensor) -> Tensor:
        """The layer's states [B, T, width], from ``kv`` [B, S, 2, heads, D], ``mask`` [B, T, S]."""
        q, k, v = (x.transpose(1, 2) for x in (q, kv[:, :, 0], kv[:, :, 1]))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None]).transpose(1, 2)
        new = torch.addmm(state.flatten(0, 1), attended.flatten(2).flatten(0, 1), self.out.T)
        gate, up = F.linear(_norm(new), self.gate_up).chunk(2, dim=-1)
        return torch.addmm(new, F.silu(gate) * up, self.down.T).view(state.shape)

    def _candidates(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens int64 and log-probabilities float32 [B, T, k], likeliest first."""
        logits = F.linear(_norm(state), self.head)
        log_probs, index = logits.log_softmax(-1, dtype=torch.float32).topk(self.k, dim=-1)
        return self.vocab[index], log_probs


def _norm(state: Tensor) -> Tensor:
    return F.rms_norm(state, (WIDTH,), eps=EPS)


def _rotary(length: int, device: torch.device) -> Tensor:
    """Rotations of q and k by position, complex; v stays: [length, 3, 1, D / 2]."""
    half = SIZE // 2
    frequency = 10000.0 ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    angle = torch.arange(length, device=device)[:, None].float() * frequency
    turn = torch.complex(angle.cos(), angle.sin())
    return torch.stack([turn, turn, torch.ones_like(turn)], dim=1)[:, :, None]
