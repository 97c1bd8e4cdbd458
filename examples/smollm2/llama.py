"""SmolLM2 in plain torch, read from its GGUF file in seconds: for engines without transformers.

Modules are named as in transformers' ``LlamaForCausalLM``, whose weights these are bit for bit
(float32); attention is the engine's. Of the format it reads this file's types: float32, Q4_1, Q8_0.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import carry

BLOCK = 32
"""Weights that share a scale."""
SCALARS = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
STRING, ARRAY = 8, 9


CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "rope.dimension_count",
    "vocab_size": "vocab_size",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "rope_theta": "rope.freq_base",
}
NAMES = {
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
}
"""Our names of GGUF's facts and weights."""


class Rotary(nn.Module):
    """Cosines and sines [..., N, D] at positions [..., N], in the dtype of ``x``."""

    def __init__(self, size: int, base: float) -> None:
        super().__init__()
        frequency = 1.0 / base ** (torch.arange(0, size, 2) / size)
        self.frequency = nn.Buffer(frequency, persistent=False)

    def forward(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        angle = position[..., None].float() * self.frequency.float()
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


class Mlp(nn.Module):
    """The gated feed-forward layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One layer's weights."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        width, size = config.hidden_size, config.head_dim
        heads, kv_heads = config.num_attention_heads * size, config.num_key_value_heads * size
        self.self_attn = nn.Module()
        self.self_attn.head_dim = size
        for name, rows in (("q_proj", heads), ("k_proj", kv_heads), ("v_proj", kv_heads)):
            setattr(self.self_attn, name, nn.Linear(width, rows, bias=False))
        self.self_attn.o_proj = nn.Linear(heads, width, bias=False)
        self.mlp = Mlp(width, config.intermediate_size)
        norms = (nn.RMSNorm(width, config.rms_norm_eps) for _ in range(2))
        self.input_layernorm, self.post_attention_layernorm = norms


class Llama(nn.Module):
    """The weights of a LLaMA, its output layer tied to its embeddings."""

    def __init__(self, config: SimpleNamespace) -> None:
        super().__init__()
        self.config, self.model = config, nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.model.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.model.rotary_emb = Rotary(config.head_dim, config.rope_theta)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self.lm_head.weight.dtype


def load(
    device: str = "cpu", dtype: torch.dtype = torch.float32, folder: Path | str | None = None
) -> Llama:
    """The model, from the installed package or carried parts (:func:`carry.weights`)."""
    facts, tensors = read(carry.weights(folder), device)
    config = {name: facts[f"llama.{fact}"] for name, fact in CONFIG.items()}
    config = SimpleNamespace(**config, eos_token_id=facts["tokenizer.ggml.eos_token_id"])
    with torch.device("meta"):
        model = Llama(config)
    weights = {}
    for name, weight in tensors:
        part = name.removesuffix(".weight").split(".")
        own = f"layers.{part[1]}.{NAMES[part[2]]}" if part[0] == "blk" else NAMES[part[0]]
        if part[-1] in (
            "attn_q",
            "attn_k",
        ):  # pairs that rotate together lie side by side in the file
            pairs = weight.view(-1, config.head_dim // 2, 2, weight.shape[1])
            weight = pairs.transpose(1, 2).flatten(0, 2)
        weights[f"model.{own}.weight"] = weight.to(dtype)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, assign=True)
    model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = Rotary(config.head_dim, config.rope_theta).to(device)
    return model.requires_grad_(False).eval()


def cast(model: Llama, dtype: torch.dtype) -> Llama:
    """The same weights in another type."""
    with torch.device("meta"):
        other = Llama(model.config)
    weights = {name: weight.to(dtype) for name, weight in model.state_dict().items()}
    other.load_state_dict(weights, assign=True)
    other.lm_head.weight = other.model.embed_tokens.weight
    other.model.rotary_emb = model.model.rotary_emb
    return other.requires_grad_(False).eval()


def read(file: Path, device: str = "cpu") -> tuple[dict[str, object], Iterator[tuple[str, Tensor]]]:
    """A GGUF file's facts, without arrays, and its tensors in float32, one after the other.

    Raises:
        ValueError: not a GGUF file of version 3, or a tensor of a type that is not known here.
    """
    data = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
    raw, at = data.numpy().data, 0

    def take(form: str) -> tuple:
        nonlocal at
        values = struct.unpack_from("<" + form, raw, at)
        at += struct.calcsize("<" + form)
        return values

    def text() -> str:
        nonlocal at
        (size,) = take("Q")
        at += size
        return bytes(raw[at - size : at]).decode()

    def value(kind: int) -> object:
        nonlocal at
        if kind == STRING:
            return text()
        if kind != ARRAY:
            return take(SCALARS[kind])[0]
        kind, count = take("IQ")
        if kind == STRING:
            for _ in range(count):
                (size,) = take("Q")
                at += size
        else:
            at += count * struct.calcsize(SCALARS[kind])
        return None

    magic, version = take("4sI")
    if magic != b"GGUF" or version != 3:
        got = f"{magic!r}, version {version}"
        raise ValueError(f"{file}: expected a GGUF file of version 3, got {got}")
    count, pairs = take("QQ")
    facts = {text(): value(*take("I")) for _ in range(pairs)}
    listed = [(text(), take("Q" * take("I")[0])[::-1], *take("IQ")) for _ in range(count)]
    unknown = {kind for _, _, kind, _ in listed} - KINDS.keys()
    if unknown:
        expected = f"expected tensors of types {sorted(KINDS)}"
        raise ValueError(f"{file}: {expected}, got {sorted(unknown)}")
    align = facts.get("general.alignment", 32)
    begin = -(-at // align) * align

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, shape, kind, offset in listed:
            block, size, decode = KINDS[kind]
            part = data[begin + offset :][: math.prod(shape) // block * size]
            yield name, decode(part.to(device).view(-1, size)).reshape(shape)

    return facts, tensors()


def _half(two: Tensor) -> Tensor:
    return two.contiguous().view(torch.float16).float()


def _q4_1(blocks: Tensor) -> Tensor:
    scale, least, packed = _half(blocks[:, :2]), _half(blocks[:, 2:4]), blocks[:, 4:]
    return torch.cat([packed & 15, packed >> 4], dim=1).mul(scale).add_(least)


def _q8_0(blocks: Tensor) -> Tensor:
    return blocks[:, 2:].view(torch.int8).mul(_half(blocks[:, :2]))


KINDS = {
    0: (1, 4, lambda blocks: blocks.clone().view(torch.float32)),
    3: (BLOCK, 4 + BLOCK // 2, _q4_1),
    8: (BLOCK, 2 + BLOCK, _q8_0),
}
"""By type: weights of a block, its bytes, and blocks uint8 [n, bytes] to float32 [n, weights]."""
