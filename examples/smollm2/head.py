"""The EAGLE-style head: one decoder layer over the target's own features.

At position t the head sees the target's hidden states of token t (after three of its layers) and
the embedding of token t+1, and predicts token t+2. Deeper, its own output takes the place of the
hidden states. Recipe: EAGLE-3 (arXiv 2503.01840), unrolled training included.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

WIDTH, HEADS, HIDDEN, FEATURES, EMBED = 256, 4, 1024, 1728, 576
FEATURE_LAYERS = (10, 20, 30)
"""The target's hidden states after these decoder layers are what the head reads."""
WEIGHTS = Path(__file__).with_name("eagle.safetensors")
FLOOR = -6.0
"""Nodes of smaller path log-probability are not expanded: one in 400 would be accepted."""


def rotate(x: Tensor, position: Tensor) -> Tensor:
    """Rotary embedding of x [..., T, D] at position [..., T]."""
    half = x.shape[-1] // 2
    frequency = 10000.0 ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = position[..., None].float() * frequency
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


class EagleHead(nn.Module):
    """Weights of the head, and its three stages: ``inputs``, attention by the caller, ``outputs``.

    Attributes:
        vocab: int64 [V], target ids of the draft vocabulary.
    """

    def __init__(self, vocab: Tensor) -> None:
        super().__init__()
        self.register_buffer("vocab", vocab)
        self.fuse = nn.Linear(FEATURES, WIDTH, bias=False)
        self.embed = nn.Linear(EMBED, WIDTH, bias=False)
        self.norm_embed, self.norm_state = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.qkv = nn.Linear(2 * WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.norm_mlp, self.norm_out = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.gate_up = nn.Linear(WIDTH, 2 * HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)
        self.head = nn.Linear(WIDTH, len(vocab), bias=False)

    def inputs(
        self, state: Tensor, embedding: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q, rotated k, v [..., T, heads, D] of states and embeddings [..., T, width]."""
        x = torch.cat([self.norm_embed(self.embed(embedding)), self.norm_state(state)], dim=-1)
        q, k, v = (y.unflatten(-1, (HEADS, -1)) for y in self.qkv(x).chunk(3, dim=-1))
        turn = lambda y: rotate(y.transpose(-2, -3), position[..., None, :]).transpose(-2, -3)
        return turn(q), turn(k), v

    def outputs(self, state: Tensor, attended: Tensor) -> Tensor:
        """The layer's output state [..., T, width]; ``attended`` [..., T, heads, D]."""
        state = state + self.out(attended.flatten(-2))
        gate, up = self.gate_up(self.norm_mlp(state)).chunk(2, dim=-1)
        return state + self.down(F.silu(gate) * up)

    def logits(self, state: Tensor) -> Tensor:
        """Over the draft vocabulary: [..., V]."""
        return self.head(self.norm_out(state))

    def save(self, path: Path) -> None:
        parts = self.state_dict().items()
        save_file({k: v.half() if v.is_floating_point() else v.int() for k, v in parts}, path)

    @classmethod
    def read(cls, path: Path) -> EagleHead:
        weights = load_file(path)
        head, parts = cls(weights["vocab"].long()), weights.items()
        head.load_state_dict(
            {k: v.float() if v.is_floating_point() else v.long() for k, v in parts}
        )
        return head.eval()
