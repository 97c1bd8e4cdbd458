"""A paged engine with elastic speculative decoding in one page of plain torch: the template for an engine of one's own.

    python examples/smollm2/serve.py                 # SmolLM2 with its EAGLE head, four requests at a time
    python examples/smollm2/serve.py --device cuda   # the same code over the Triton kernels, a CUDA graph for each number of rows

`PagedCache` owns memory, `Engine.forward` is the model, `Engine.step` is one speculative step, `Engine.generate` the continuous batch.
All slots are lanes of every step, so that shapes are fixed; an empty lane costs no row. A step's keys and values stay beside the
cache until the target has judged: only accepted rows are written into pages, nothing has to be moved, and no page is reserved for drafts.

Not run on a GPU yet. Tests run it on the CPU with the plain-torch twin and with the Triton kernels in their interpreter; capture and
replay (`Engine.verify`) are the only lines that they do not reach.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import echo
from echo import kernels
from echo.tree import slots as cache_slots

PAGE = 16
DUMMY = 0
"""Page 0 belongs to nobody: what pad rows and empty lanes write goes there."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PagedCache:
    """Keys and values [layers, 2, pages, PAGE, Hkv, D], a page table [lanes, pages of a request], and the tokens each lane holds."""

    def __init__(self, model, lanes: int, pages: int, length: int) -> None:
        like, config = model.model.embed_tokens.weight, model.config
        shape = (config.num_hidden_layers, 2, pages, PAGE, config.num_key_value_heads, model.model.layers[0].self_attn.head_dim)
        self.kv = torch.zeros(shape, dtype=like.dtype, device=like.device)
        self.table = torch.zeros(lanes, -(-length // PAGE), dtype=torch.int32, device=like.device)
        self.context = torch.zeros(lanes, dtype=torch.int32, device=like.device)
        self.free, self.owned = list(range(1, pages)), dict[int, list[int]]()

    def reserve(self, lane: int, tokens: int) -> bool:
        """Gives the lane pages for so many tokens; False where they do not fit."""
        count = -(-tokens // PAGE)
        if count > min(len(self.free), self.table.shape[1]):
            return False
        self.owned[lane] = [self.free.pop() for _ in range(count)]
        self.table[lane, :count] = torch.tensor(self.owned[lane], dtype=torch.int32, device=self.table.device)
        return True

    def release(self, lane: int) -> None:
        """The request in the lane is done."""
        self.free += self.owned.pop(lane)
        self.table[lane] = self.context[lane] = 0

    def write(self, slots: Tensor, kv: Tensor) -> None:
        """Puts ``kv`` [layers, 2, n, Hkv, D] into ``slots`` int64 [n]."""
        self.kv.flatten(2, 3)[:, :, slots] = kv


class Engine:
    """Serves a LLaMA-like transformers model, whose modules it calls; attention, cache, batch and steps are its own.

    Args:
        model: a ``LlamaForCausalLM`` or one that is built alike.
        scheduler: the policy.
        drafter: an :class:`echo.Drafter`, made by ``drafter(engine)`` because some read the engine's ``hidden``; None: plain decoding.
        lanes, pages, length: requests at once, pages of the cache, tokens of a request at most.
        features: after which decoder layers the hidden states are kept in ``hidden`` [N, features * width].
        sample: logits [N, V] to tokens int64 [N].
        eos_token: ends an answer.
        backend: of :mod:`echo.kernels`; "auto" is Triton on a GPU and the plain-torch twin elsewhere.
    """

    def __init__(
        self, model, scheduler, drafter=None, *, lanes=4, pages=128, length=512, features=(), sample=kernels.argmax_tokens, eos_token=-1,
        backend="auto",
    ) -> None:  # fmt: skip
        self.model, self.scheduler, self.features, self.sample = model, scheduler, features, sample
        self.eos_token, self.backend = eos_token, backend
        self.cache = PagedCache(model, lanes, pages, length)
        device = self.cache.table.device
        self.lanes = torch.arange(lanes, device=device)
        self.root, self.left = torch.zeros_like(self.lanes), torch.zeros_like(self.lanes)  # last token, tokens still to emit (-1: broken)
        self.ends = torch.full((1,), eos_token, device=device)
        self.history = scheduler.history(lanes, device)
        self.known = self.history.to("cpu")  # what the host knows of it: forecasts never wait for the device
        self.stats = echo.StepStats.empty(device)
        self.buffers, self.graphs = dict[int, echo.PackedTree](), dict[int, tuple]()
        self.hidden = torch.empty(0)
        self.drafter = drafter and drafter(self)

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Tensor], max_new_tokens: int) -> Iterator[tuple[int, list[int]]]:
        """Answers all prompts, as many at once as lanes and pages allow; yields what a request emits, as ``(prompt, tokens)``.

        Raises ValueError at the end where answers broke off because the model had no number for their next token.
        """
        waiting, running, broken = deque(range(len(prompts))), dict[int, int](), list[int]()
        while waiting or running:
            for lane in self.lanes.tolist():
                if waiting and lane not in running:
                    prompt = prompts[waiting[0]]
                    if not self.cache.reserve(lane, len(prompt) + max_new_tokens + self.scheduler.max_depth):
                        break
                    running[lane] = waiting.popleft()
                    first = self.admit(lane, prompt, max_new_tokens)
                    yield running[lane], [first] if first >= 0 else []
            if not running:
                raise ValueError(f"prompt {waiting[0]}: {len(prompts[waiting[0]])} tokens and the answer do not fit the cache")
            said, left, self.known = self.step().tolist(), self.left.tolist(), self.history.to("cpu")  # where the host waits
            for lane, request in list(running.items()):
                yield request, [token for token in said[lane] if token >= 0]
                if left[lane] <= 0:
                    broken += [request] if left[lane] < 0 else []
                    self.cache.release(lane)
                    del running[lane]
        if broken:
            raise ValueError(f"model: no number for the next token of prompts {broken}")

    def admit(self, lane: int, prompt: Tensor, max_new_tokens: int) -> int:
        """Prefills a request alone, causally, and samples its first token."""
        where, place = self.lanes[lane : lane + 1], torch.arange(len(prompt), device=prompt.device)
        states, kv = self.forward(prompt, place, causal)
        first = self.sample(self.model.lm_head(states[-1:]))
        self.cache.write(cache_slots(place, where.expand_as(place), self.cache.table, PAGE, DUMMY), kv)
        self.cache.context[lane] = len(prompt)
        self.root[lane] = first[0].clamp(min=0)
        self.left[lane] = torch.where(first[0] < 0, -1, (max_new_tokens - 1) * (first[0] != self.eos_token))
        self.history, self.known = self.history.reset(where), self.known.reset(where.cpu())
        if self.drafter is not None:
            self.drafter.admit(where, [prompt], self.root[where])
        return int(first)

    def step(self) -> Tensor:
        """One speculative step of all lanes: int64 [lanes, depth + 1], the tokens each emits, -1 beyond. Reads nothing back."""
        live, scheduler, cache = self.left > 0, self.scheduler, self.cache
        shape = scheduler.forecast(self.known, sorted(cache.owned))
        capacity = torch.where(self.left > 1, scheduler.max_tree_rows, 1)  # who needs one token more has no use for drafts
        tree = scheduler.plant(self.root, live=live, capacity=capacity, rows=shape.rows)
        for _ in range(shape.depth if self.drafter is not None else 0):
            tree = scheduler.grow(tree, *self.drafter.draft(self.lanes, tree.frontier))
        packed = scheduler.pack(tree, out=self.buffers.get(shape.rows))
        self.buffers.setdefault(shape.rows, replace(packed, outlook=None, expected=None))
        sampled, kv, self.hidden = self.verify(packed)
        accepted = echo.verify(packed, sampled, backend=self.backend).cut(eos_tokens=self.ends, limits=self.left)
        lists = echo.compact(packed, accepted, cache.context, page_table=cache.table, page_size=PAGE, dummy=DUMMY)
        cache.write(lists.target.flatten(), kv[:, :, lists.gather.flatten()])
        cache.context.copy_(lists.context)
        self.history = self.history.observe(self.lanes, packed, accepted)
        self.stats = self.stats.observe(packed, accepted)
        if self.drafter is not None:
            self.drafter.keep(self.lanes, packed, accepted)
        said = accepted.lengths > 0
        self.root = torch.where(said, accepted.bonus, self.root)
        left = torch.where(accepted.bonus == self.ends, 0, self.left - accepted.lengths)
        self.left = torch.where(said, left, torch.where(live, -1, self.left))
        return accepted.tokens

    def verify(self, packed: echo.PackedTree) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`target`, on a GPU as one CUDA graph for each number of rows: ``packed``, cache and lanes have fixed addresses."""
        if not packed.tokens.is_cuda:
            return self.target(packed)
        if packed.rows not in self.graphs:
            self.target(packed)  # compiles the kernels
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = self.target(packed)
            self.graphs[packed.rows] = graph, result
        graph, result = self.graphs[packed.rows]
        graph.replay()
        return result

    def target(self, packed: echo.PackedTree) -> tuple[Tensor, Tensor, Tensor]:
        """The target's pass over a packed step: its token after each row, the rows' keys and values, their features."""
        cache, config, n = self.cache, self.model.config, packed.rows
        q, k = (cache.kv.new_empty(n, heads, cache.kv.shape[-1]) for heads in (config.num_attention_heads, config.num_key_value_heads))
        shape = q, cache.kv[0, 0], cache.table, cache.context, k, packed.indptr
        plan = kernels.plan_attention(*shape, backend=self.backend)  # once for all layers

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.kv[layer]
            tree = k, v, packed.request, packed.indptr, packed.mask
            return kernels.tree_attention(q, keys, values, cache.table, cache.context, *tree, plan=plan, backend=self.backend)[0]

        states, kv = self.forward(packed.tokens, packed.position(cache.context), attend)
        return self.sample(self.model.lm_head(states)), kv, self.hidden

    def forward(self, tokens: Tensor, position: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
        """States [N, width] before the output layer, and keys and values [layers, 2, N, Hkv, D], of N rows of any requests."""
        base, kv, features = self.model.model, [], []
        x = base.embed_tokens(tokens)
        cos, sin = (turn[0] for turn in base.rotary_emb(x[None], position[None]))
        for index, layer in enumerate(base.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (part(h).unflatten(-1, (-1, attention.head_dim)) for part in (attention.q_proj, attention.k_proj, attention.v_proj))
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            x = x + attention.o_proj(attend(index, q, k, v).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            kv.append(torch.stack([k, v]))
            if index + 1 in self.features:
                features.append(x)
        self.hidden = torch.cat(features, dim=-1) if features else x[:, :0]
        return base.norm(x), torch.stack(kv)


def causal(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one whole prompt: [N, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1)
