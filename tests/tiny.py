"""A small transformer with random weights and a paged cache, and an EAGLE-like drafter."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LAYERS, HEADS, KV_HEADS, DIM, WIDTH, VOCAB = 2, 4, 2, 16, 64, 48
PAGE = 4
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class Model:
    """Decoder layers over a paged cache ``kv`` [layers, 2, slots, Hkv, D]; page 0 is for pads."""

    def __init__(self, batch: int, pages: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def weight(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=generator) * scale * shape[0] ** -0.5

        self.embed, self.head = weight(VOCAB, WIDTH, scale=6.0), weight(WIDTH, VOCAB, scale=4.0)
        self.qkv = [weight(WIDTH, (HEADS + 2 * KV_HEADS) * DIM, scale=2.0) for _ in range(LAYERS)]
        self.out = [weight(HEADS * DIM, WIDTH, scale=0.7) for _ in range(LAYERS)]
        self.up = [weight(WIDTH, 2 * WIDTH) for _ in range(LAYERS)]
        self.down = [weight(2 * WIDTH, WIDTH) for _ in range(LAYERS)]
        self.kv = torch.zeros(LAYERS, 2, (1 + batch * pages) * PAGE, KV_HEADS, DIM)
        order = 1 + torch.randperm(batch * pages, generator=generator)
        self.page_table = order.view(batch, pages).int()

    def __call__(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, attend: Attend
    ) -> tuple[Tensor, Tensor]:
        """Logits [N, V] and hidden states [N, width]; writes keys and values to ``slots``."""
        x = self.embed[tokens]
        for layer in range(LAYERS):
            qkv = (norm(x) @ self.qkv[layer]).view(len(x), -1, DIM)
            q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            q, k = rotate(q, positions), rotate(k, positions)
            self.kv[layer, 0, slots], self.kv[layer, 1, slots] = k, v
            x = x + attend(layer, q, k, v).flatten(1) @ self.out[layer]
            x = x + torch.tanh(norm(x) @ self.up[layer]) @ self.down[layer]
        return norm(x) @ self.head, x

    def prefill(self, request: int, prompt: Tensor) -> tuple[int, Tensor]:
        """Writes a prompt into the cache; its greedy next token and last state [width]."""
        place = torch.arange(len(prompt))
        slots = self.page_table[request].long()[place // PAGE] * PAGE + place % PAGE

        def causal(_layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, place[:, None] >= place)

        logits, hidden = self(prompt, place, slots, causal)
        return int(logits[-1].argmax()), hidden[-1]

    def greedy(self, prompt: Tensor, count: int) -> list[int]:
        """The prompt's greedy continuation, without a cache: what speculation must write too."""
        text = prompt.tolist()
        for _ in range(count):
            text.append(self.prefill(0, torch.tensor(text))[0])
        return text[len(prompt) :]


class Drafter:
    """Next tokens from a token and its parent's state: the target's layers without attention."""

    def __init__(self, model: Model, batch: int, k: int) -> None:
        self.model, self.k, self.state = model, k, torch.zeros(batch, WIDTH)

    def __call__(self, token: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens and log-probabilities [B, W, k], and the nodes' own states [B, W, width]."""
        x = self.model.embed[token] + 0.05 * state
        for up, down in zip(self.model.up, self.model.down, strict=True):
            x = x + torch.tanh(norm(x) @ up) @ down
        best = (norm(x) @ self.model.head).log_softmax(-1).topk(self.k)
        return best.indices, best.values, x

    def extend(self, requests: Tensor, hidden: Tensor, tokens: Tensor, valid: Tensor) -> None:
        """Keeps the last of the accepted rows' states ``hidden`` [B, D + 1, width]."""
        last = (valid.sum(1) - 1).clamp(min=0)
        self.state[requests] = hidden[torch.arange(len(last)), last]


def norm(x: Tensor) -> Tensor:
    """Unit root mean square."""
    return x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


def rotate(x: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions of ``x`` [N, heads, D]."""
    angle = positions[:, None, None] * 100.0 ** -(torch.arange(DIM // 2) / (DIM // 2))
    one, two = x.chunk(2, dim=-1)
    return torch.cat(
        [one * angle.cos() - two * angle.sin(), one * angle.sin() + two * angle.cos()], dim=-1
    )


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """Attention of ``q`` [n, Hq, D] over ``k``, ``v`` [m, Hkv, D], where ``seen`` [n, m]."""
    k, v = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (k, v))
    score = torch.einsum("nhd,mhd->hnm", q, k) * DIM**-0.5
    return torch.einsum("hnm,mhd->nhd", score.masked_fill(~seen, -torch.inf).softmax(-1), v)
