"""A paged engine with elastic speculative decoding in plain torch: a template for custom engines.

    python examples/smollm2/serve.py                 # SmolLM2 with its EAGLE head, four requests
    python examples/smollm2/serve.py --device cuda   # the same code: Triton kernels, CUDA graphs

`PagedCache` owns memory, `Engine.forward` is the model, `Engine.step` one speculative step, and
`Engine.generate` continuous batching.

A step is four CUDA graphs: *draft* (lanes, depth), *pack* (lanes, depth, rows), *verify* and
*accept* (lanes, rows); without speculation it is one, and with ``trims`` drafting is one a layer.
Running requests fill the first lanes, and a graph has 1, 2, 4, ... of them. What graphs exchange
lies at fixed addresses. The host is one step behind: it launches a step, then reads the output of
the one before, one pinned copy and the only device-to-host transfer (but for ``trims``, which reads
drafts), so the device never waits for scheduling. A step's keys and values stay outside the pages
until they are accepted: nothing has to be moved, and drafts need no pages.

Shapes: N rows of a step, Hkv key/value heads of size D.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import echo
from echo import kernels
from echo.tree import slot_mapping

PAGE_SIZE = 16
PAD_SLOT = 0
"""Page 0 belongs to no request: pad rows and empty lanes write there."""
HISTORY = (
    "num_unprocessed_tokens", "generation", "steps", "acceptance_histogram", "expected", "accepted"
)  # fmt: skip
"""Tensors of a history, those of eight bytes first."""

Attention = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PagedCache:
    """Keys and values of all layers in pages.

    Attributes:
        kv: [layers, 2, pages, PAGE_SIZE, Hkv, D].
        page_table: int32 [lanes, pages of a request].
        prefix_lens: int32 [lanes], tokens in the cache.
    """

    def __init__(self, model, max_num_reqs: int, num_pages: int, max_model_len: int) -> None:
        weight, config = model.model.embed_tokens.weight, model.config
        heads = config.num_key_value_heads, model.model.layers[0].self_attn.head_dim
        ints = {"dtype": torch.int32, "device": weight.device}
        self.kv = weight.new_zeros(config.num_hidden_layers, 2, num_pages, PAGE_SIZE, *heads)
        self.page_table = torch.zeros(max_num_reqs, -(-max_model_len // PAGE_SIZE), **ints)
        self.prefix_lens = torch.zeros(max_num_reqs, **ints)
        self.free_pages = list(range(1, num_pages))
        self.pages: dict[int, list[int]] = {}

    def allocate(self, lane: int, num_tokens: int) -> bool:
        """Gives the lane pages for so many tokens; False if they do not fit."""
        count = -(-num_tokens // PAGE_SIZE)
        if count > min(len(self.free_pages), self.page_table.shape[1]):
            return False
        pages = self.pages[lane] = [self.free_pages.pop() for _ in range(count)]
        self.page_table[lane, :count] = self.page_table.new_tensor(pages)
        return True

    def free(self, lane: int) -> None:
        """Takes the pages of a finished request back."""
        self.free_pages += self.pages.pop(lane)

    def move(self, source: int, target: int) -> None:
        """Moves a request from lane ``source`` to lane ``target``."""
        self.pages[target] = self.pages.pop(source)
        for state in (self.page_table, self.prefix_lens):
            state[target] = state[source]

    def write(self, slots: Tensor, kv: Tensor) -> None:
        """Writes ``kv`` [layers, 2, n, Hkv, D] to ``slots`` int64 [n]."""
        self.kv.flatten(2, 3).index_copy_(2, slots, kv)


class StepOutput(NamedTuple):
    """What a step sends to the host.

    Attributes:
        buffer: int32, pinned on a GPU; complete once ``done``.
        done: a CUDA event, or None.
        requests: the request of each lane at launch.
        depth: layers drafted.
        first_tokens: by request, int64 [1], the token that prefill sampled.
    """

    buffer: Tensor
    done: Any
    requests: list[int]
    depth: int
    first_tokens: dict[int, Tensor]


class Engine:
    """Serves a LLaMA-like transformers model: calls its modules, but for attention and cache.

    Args:
        model: a ``LlamaForCausalLM`` or one built alike.
        scheduler: the policy.
        drafter: ``drafter(engine)`` makes any :class:`echo.Drafter`, or one that is captured with
            the step (``GraphEagle`` in ``examples/smollm2``). None: plain decoding.
        max_num_reqs: requests at once.
        num_pages: pages of the cache.
        max_model_len: tokens of a request at most.
        max_verify_tokens: rows of a step at most. Defaults to the policy's, or 16 a lane.
        k: candidates that the drafter returns after each node.
        feature_layers: decoder layers after which hidden states are kept for the drafter.
        sample: logits [N, V] to tokens int64 [N].
        eos_token: ends an answer.
        backend: of :mod:`echo.kernels`.
        shared: an engine of the same model and sizes, idle while this one runs, whose cache,
            buffers and verify graphs are used too.
        graphs: defaults to ``shared``'s, or a new :class:`echo.workspace.Graphs`.

    Attributes:
        hidden: [N, features * width], features of the last forward pass.
    """

    def __init__(
        self, model, scheduler, drafter=None, *, max_num_reqs=4, num_pages=128, max_model_len=512,
        max_verify_tokens=None, k=4, feature_layers=(), sample=kernels.argmax_tokens, eos_token=-1,
        backend="auto", shared=None, graphs=None,
    ) -> None:  # fmt: skip
        self.model, self.scheduler, self.feature_layers = model, scheduler, feature_layers
        self.sample, self.backend, self.max_num_reqs = sample, backend, max_num_reqs
        sizes = max_num_reqs, num_pages, max_model_len
        self.cache = cache = shared.cache if shared else PagedCache(model, *sizes)
        self.device = device = cache.kv.device
        self.graphs = graphs or (shared.graphs if shared else echo.workspace.Graphs(device))
        if max_verify_tokens is None:
            fixed = isinstance(scheduler.budget, int) and scheduler.budget
            default = scheduler.rule.default_budget(max_num_reqs)
            max_verify_tokens = fixed or default or 16 * max_num_reqs
        if shared is None:
            n, kv = round_up(max(max_num_reqs, max_verify_tokens)), cache.kv
            self.step_kv = kv.new_zeros(len(kv), 2, n, *kv.shape[4:])
            self.sampled = torch.zeros(n, dtype=torch.int64, device=device)
            self.features = kv.new_zeros(n, len(feature_layers) * model.config.hidden_size)
        else:
            self.step_kv, self.sampled = shared.step_kv, shared.sampled
            self.features = shared.features
        self.hidden = self.features
        self.workspace = echo.Workspace(
            scheduler, max_num_reqs, k=k, num_verify_tokens=len(self.sampled), device=device,
            packed=shared and shared.workspace.packed,
        )  # fmt: skip
        self.stats = self.workspace.stats
        # By lane: the request's index in the history (on the host too), its last token, and how
        # many it may still emit: 0 once finished, -1 once failed.
        self.req_indices = torch.arange(max_num_reqs, device=device)
        self.host_req_indices = list(range(max_num_reqs))
        self.root_tokens = torch.zeros_like(self.req_indices)
        self.num_remaining = torch.zeros_like(self.req_indices)
        self.eos_tokens = torch.full((1,), eos_token, device=device)
        self.emitted = torch.full((max_num_reqs, scheduler.max_depth + 1), -1, device=device)
        self.host_history = scheduler.history(max_num_reqs, "cpu")  # lags: what scheduling reads
        self.layout = [(part.view(torch.int32).numel(), part.dtype) for part in self.parts()]
        self.output = torch.cat([part.view(torch.int32) for part in self.parts()])
        self.host_outputs = deque(self.pinned(self.output) for _ in range(2))
        self.running: list[int] = []  # the request of each lane
        self.failed: list[int] = []
        self.first_tokens: dict[int, Tensor] = {}
        self.timed, self.times = False, dict[str, list[tuple[Any, Any]]]()
        self.drafter = drafter and drafter(self)
        self.graph_drafter = hasattr(self.drafter, "extend_backlog")
        captured = self.drafter is None or self.graph_drafter
        self.captured = captured or getattr(self.drafter, "capturable", False)

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tensor], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Answers prompts, as many at once as lanes and pages allow; yields ``(prompt, tokens)``.

        Raises:
            ValueError: a prompt that never fits; at the end, answers that broke off because the
                model had no number for their next token.
        """
        waiting, last, self.failed = deque(range(len(prompts))), None, []
        while waiting or self.running or last is not None:
            while waiting and len(self.running) < self.max_num_reqs:
                prompt = prompts[waiting[0]]
                num_tokens = len(prompt) + max_new_tokens + self.scheduler.max_depth
                if not self.cache.allocate(len(self.running), num_tokens):
                    break
                self.admit(waiting.popleft(), prompt, max_new_tokens)
            if waiting and not self.running and last is None:
                size = f"{len(prompts[waiting[0]])} tokens and the answer"
                raise ValueError(f"prompt {waiting[0]}: {size} do not fit the cache")
            output = self.step() if self.running else None
            if last is not None:
                yield from self.update_from_output(last)
            last = output
        if self.failed:
            raise ValueError(f"model: no number for the next token of prompts {self.failed}")

    def admit(self, request: int, prompt: Tensor, max_new_tokens: int) -> None:
        """Prefills a request in the next lane; its first token goes along with the next output."""
        lane, position = len(self.running), torch.arange(len(prompt), device=self.device)
        states, kv, self.hidden = self.forward(prompt, position, causal)
        first = self.sample(self.model.lm_head(states[-1:]))
        lanes = torch.full_like(position, lane)
        slots = slot_mapping(position, lanes, self.cache.page_table, PAGE_SIZE, PAD_SLOT)
        self.cache.write(slots, kv)
        self.cache.prefix_lens[lane], self.root_tokens[lane] = len(prompt), first[0].clamp(min=0)
        remaining = torch.where(first == self.eos_tokens, 0, max_new_tokens - 1)
        self.num_remaining[lane] = torch.where(first < 0, -1, remaining)[0]
        history, req_index = self.workspace.history, self.req_indices[lane : lane + 1]
        self.workspace.history = history.reset(req_index, out=history)
        host_index = torch.tensor([self.host_req_indices[lane]], device="cpu")
        self.host_history = self.host_history.reset(host_index)
        self.running.append(request)
        self.first_tokens[request] = self.pinned(first).copy_(first, non_blocking=True)
        root = self.root_tokens[lane : lane + 1]
        if self.graph_drafter:
            self.drafter.admit(lane, prompt, root, self.hidden)
        elif self.drafter is not None:
            self.drafter.admit(req_index, [prompt], root)
        self.hidden = self.features

    def step(self) -> StepOutput:
        """Launches one step of the running requests; waits for nothing."""
        workspace, drafter, num_reqs = self.workspace, self.drafter, len(self.running)
        lanes = min(1 << (num_reqs - 1).bit_length(), self.max_num_reqs)
        tier = self.scheduler.choose_tier(self.host_history, self.host_req_indices[:num_reqs])
        depth = tier.depth if drafter is not None else 0
        if self.graph_drafter and (depth or drafter.num_unprocessed == drafter.max_backlog):
            drafter.extend_backlog()
        if depth == 0:
            self.run("plain", (lanes,), lambda: self.decode(lanes))
            if self.graph_drafter:
                drafter.num_unprocessed += 1
        else:
            most = workspace.num_verify_tokens
            workspace.set_num_verify_tokens(min(tier.num_verify_tokens, most))
            if self.scheduler.trims:
                tree = self.draft_while_deeper(lanes, tier)
                depth, tier = tree.depth, replace(tier, num_verify_tokens=tree.num_verify_tokens)
            else:
                size = lanes, depth, tier.beam
                tree = self.run("draft", size, lambda: self.draft(*size))
            n = min(round_up(tier.num_verify_tokens), most)
            size = lanes, depth, tier.beam, n
            packed = self.run("pack", size, lambda: workspace.pack(tree, n))
            self.run("verify", (lanes, n), lambda: self.verify(packed))
            self.run("accept", (lanes, n), lambda: self.accept(packed))
        return self.copy_output(depth)

    def run(self, part: str, key: tuple[int, ...], function: Callable[[], Any]) -> Any:
        """Runs a part of a step: as a CUDA graph, unless it calls a drafter that has none."""
        start = self.record_event()
        if self.captured or part in ("pack", "verify"):
            owner = self.cache if part == "verify" else self
            result = self.graphs((part, id(owner), *key), function)
        else:
            result = function()
        if start is not None:
            self.times.setdefault(part, []).append((start, self.record_event()))
        return result

    def draft(self, lanes: int, depth: int, beam: int | None = None) -> echo.SuperTree:
        """Drafts a tree layer by layer; the scheduler chooses which nodes are expanded."""
        tree = self.begin(lanes)
        for _ in range(depth):
            tree = self.grow(tree, beam)
        return tree

    def draft_while_deeper(self, lanes: int, tier: echo.budget.Tier) -> echo.SuperTree:
        """Drafts while a layer pays, and keeps the tokens that do: the host reads the drafts."""
        tree = self.run("begin", (lanes,), lambda: self.begin(lanes))
        while self.scheduler.deeper(tree, tier):
            above, key = tree, (lanes, tree.depth, tier.beam)
            grow = lambda above=above: self.grow(above, tier.beam)
            # only a drafter that is made for graphs keeps its state at one address
            tree = self.run("layer", key, grow) if self.graph_drafter else grow()
        return self.workspace.trim(tree, tier)

    def begin(self, lanes: int) -> echo.SuperTree:
        """Begins a step of the first lanes."""
        remaining, limit = self.num_remaining[:lanes], self.scheduler.max_verify_tokens_per_req
        return self.workspace.begin(
            self.root_tokens[:lanes],
            live=remaining > 0,
            verify_limits=torch.where(remaining > 1, limit, 1),  # the last token needs no draft
        )

    def grow(self, tree: echo.SuperTree, beam: int | None) -> echo.SuperTree:
        """Drafts another layer."""
        candidates = self.drafter.draft(self.req_indices[: tree.batch], tree.frontier)
        return self.workspace.grow(tree, *candidates, beam=beam)

    def decode(self, lanes: int) -> None:
        """A step without speculation: its rows are the roots."""
        packed = self.workspace.pack(self.draft(lanes, 0), lanes)
        self.verify(packed)
        self.accept(packed)

    def verify(self, packed: echo.PackedTree) -> None:
        """The target's forward pass: samples a token after each row, keeps keys and values."""
        cache, config, n = self.cache, self.model.config, packed.num_rows
        prefix_lens, page_table = (x[: packed.batch] for x in (cache.prefix_lens, cache.page_table))
        heads = config.num_attention_heads, config.num_key_value_heads
        q, k = (cache.kv.new_empty(n, each, cache.kv.shape[-1]) for each in heads)
        plan = kernels.plan_attention(
            q, cache.kv[0, 0], page_table, prefix_lens, k, packed.indptr, backend=self.backend
        )  # once for all layers

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            prefix = *cache.kv[layer], page_table, prefix_lens
            tree = k, v, packed.request, packed.indptr, packed.mask
            return kernels.tree_attention(q, *prefix, *tree, plan=plan, backend=self.backend)[0]

        positions = packed.positions(prefix_lens)
        states, _, features = self.forward(packed.tokens, positions, attend, self.step_kv[:, :, :n])
        if self.feature_layers:
            self.features[:n] = features
        self.sampled[:n] = self.sample(self.model.lm_head(states))

    def accept(self, packed: echo.PackedTree) -> None:
        """Accepts drafts, writes their rows to pages, updates history and drafter."""
        workspace, cache, lanes = self.workspace, self.cache, packed.batch
        accepted = workspace.accept(
            packed, self.sampled[: packed.num_rows], max_new_tokens=self.num_remaining[:lanes],
            eos_tokens=self.eos_tokens, backend=self.backend,
        )  # fmt: skip
        rows = workspace.compact(
            packed, accepted, cache.prefix_lens[:lanes], page_table=cache.page_table[:lanes],
            page_size=PAGE_SIZE, pad_slot_id=PAD_SLOT,
        )  # fmt: skip
        cache.write(rows.target.flatten(), self.step_kv[:, :, rows.gather.flatten()])
        cache.prefix_lens[:lanes] = rows.prefix_lens
        workspace.observe(self.req_indices[:lanes], packed, accepted)
        if self.graph_drafter:
            extend = self.drafter.extend if packed.max_depth else self.drafter.defer
            extend(self.features[rows.gather], accepted.tokens, accepted.num_emitted)
        elif self.drafter is not None:
            self.drafter.extend(self.req_indices[:lanes], packed, accepted)
        self.advance(accepted)

    def advance(self, accepted: echo.tree.Accepted) -> None:
        """Sets each lane's next root and remaining tokens, and writes the step's output."""
        lanes, steps = accepted.tokens.shape
        remaining, roots = self.num_remaining[:lanes], self.root_tokens[:lanes]
        emits = accepted.num_emitted > 0
        self.emitted.fill_(-1)
        self.emitted[:lanes, :steps] = accepted.tokens
        torch.where(emits, accepted.bonus, roots, out=roots)
        after = torch.where(accepted.bonus == self.eos_tokens, 0, remaining - accepted.num_emitted)
        failed = torch.where(remaining > 0, -1, remaining)  # live, but the target had no number
        torch.where(emits, after, failed, out=remaining)
        torch.cat([part.view(torch.int32) for part in self.parts()], out=self.output)

    def parts(self) -> list[Tensor]:
        """What goes to the host: tokens, and the history if scheduling reads it."""
        names = HISTORY if isinstance(self.scheduler.budget, echo.CostModel) else ()
        history = [getattr(self.workspace.history, name) for name in names]
        return [part.flatten() for part in (self.emitted, self.num_remaining, *history)]

    def pinned(self, like: Tensor) -> Tensor:
        """A host buffer for a copy of ``like``, pinned on a GPU."""
        return torch.empty_like(like, device="cpu", pin_memory=self.device.type == "cuda")

    def copy_output(self, depth: int) -> StepOutput:
        """Starts the step's one device-to-host copy."""
        buffer, first_tokens, self.first_tokens = self.host_outputs[0], self.first_tokens, {}
        self.host_outputs.rotate()
        buffer.copy_(self.output, non_blocking=True)
        done = self.record_event(always=True)
        return StepOutput(buffer, done, list(self.running), depth, first_tokens)

    def update_from_output(self, output: StepOutput) -> Iterator[tuple[int, list[int]]]:
        """Yields what was emitted, frees finished requests, and updates the host's history."""
        if output.done is not None:
            output.done.synchronize()
        sizes, dtypes = zip(*self.layout, strict=True)
        parts = zip(output.buffer.split(sizes), dtypes, strict=True)
        emitted, remaining, *sums = (part.view(dtype) for part, dtype in parts)
        if sums:
            known = {
                name: part.view(getattr(self.host_history, name).shape)
                for name, part in zip(HISTORY, sums, strict=True)
            }
            generation, lagged = self.host_history.generation, replace(self.host_history, **known)
            if not torch.equal(generation, lagged.generation):  # admitted since that launch
                lagged = replace(lagged.without_stale(generation), generation=generation)
            self.host_history = lagged
        self.host_history = self.host_history.advance(output.depth)
        rows = emitted.view(self.emitted.shape).tolist(), remaining.tolist()
        for request, row, num_remaining in zip(output.requests, *rows, strict=False):
            if request in output.first_tokens:
                row = output.first_tokens[request].tolist() + row
            tokens = [token for token in row if token >= 0]
            if tokens:
                yield request, tokens
            if num_remaining < 1 and request in self.running:
                self.failed += [request] * (num_remaining < 0)
                self.finish(self.running.index(request))

    def finish(self, lane: int) -> None:
        """Ends the lane's request; the last one takes its lane: requests fill the first."""
        last = len(self.running) - 1
        self.cache.free(lane)
        self.num_remaining[lane] = 0
        if lane != last:
            self.cache.move(last, lane)
            for state in (self.root_tokens, self.num_remaining, self.req_indices):
                state[lane], state[last] = state[last].clone(), state[lane].clone()
            host = self.host_req_indices
            host[lane], host[last] = host[last], host[lane]
            self.running[lane] = self.running[last]
            if self.graph_drafter:
                self.drafter.move(last, lane)
        self.running.pop()

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attention, kv: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Runs the decoder over N rows of any requests.

        Returns:
            States [N, width] before the output layer; keys and values [layers, 2, N, Hkv, D], in
            ``kv`` if given; features.
        """
        base, features = self.model.model, []
        x = base.embed_tokens(tokens)
        if kv is None:
            kv = self.cache.kv.new_empty(len(base.layers), 2, len(x), *self.cache.kv.shape[4:])
        cos, sin = (part[0] for part in base.rotary_emb(x[None], positions[None]))
        for index, layer in enumerate(base.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            projections = attention.q_proj, attention.k_proj, attention.v_proj
            q, k, v = (part(h).unflatten(-1, (-1, attention.head_dim)) for part in projections)
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            x = x + attention.o_proj(attend(index, q, k, v).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            kv[index, 0], kv[index, 1] = k, v
            if index + 1 in self.feature_layers:
                features.append(x)
        return base.norm(x), kv, torch.cat(features, dim=-1) if features else x[:, :0]

    def record_event(self, always: bool = False) -> Any:
        """Records an event if the engine is ``timed``, or ``always``; None without a GPU."""
        if self.device.type != "cuda" or not (self.timed or always):
            return None
        event = torch.cuda.Event(enable_timing=self.timed)
        event.record()
        return event


def round_up(num_tokens: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few numbers of rows, so few graphs."""
    power = 1 << max(num_tokens - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and num_tokens <= power * 3 // 4 else power


def causal(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one whole prompt: [N, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out[0].transpose(0, 1)
