"""A paged engine with elastic speculative decoding in one page of plain torch: the template for a custom engine.

    python examples/smollm2/serve.py                 # SmolLM2 with its EAGLE head, four requests at a time
    python examples/smollm2/serve.py --device cuda   # the same code over the Triton kernels, in CUDA graphs

`PagedCache` owns memory, `Engine.forward` is the model, `Engine.step` is one speculative step, `Engine.generate` the continuous batch.

A step is four CUDA graphs: *draft* (lanes, depth), *plan* (lanes, depth, rows), *target* and *accept* (lanes, rows); a step without
speculation is one. Running requests are the first lanes, a tier of 1, 2, 4, ... of them, and all that graphs exchange lies at fixed
addresses. The host launches a step from what it knows of the step before the last, then reads the last one's report, its only transfer:
the device never waits for it. A step's keys and values stay beside the cache until the target has judged: only accepted rows are written
into pages, nothing has to be moved, and no page is reserved for drafts.
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
from echo.tree import slot_mapping as cache_slots

PAGE = 16
DUMMY = 0
"""Page 0 belongs to no request: what pad rows and empty lanes write goes there."""
SUMS = ("unread", "generation", "steps", "outlook", "expected", "accepted")
"""Tensors of a history, those of eight bytes first."""

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class PagedCache:
    """Keys and values [layers, 2, pages, PAGE, Hkv, D], a page table [lanes, pages of a request], and the tokens each lane holds."""

    def __init__(self, model, lanes: int, pages: int, length: int) -> None:
        like, config = model.model.embed_tokens.weight, model.config
        shape = (
            config.num_hidden_layers,
            2,
            pages,
            PAGE,
            config.num_key_value_heads,
            model.model.layers[0].self_attn.head_dim,
        )
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
        self.table[lane, :count] = torch.tensor(
            self.owned[lane], dtype=torch.int32, device=self.table.device
        )
        return True

    def release(self, lane: int) -> None:
        """The request in the lane is done."""
        self.free += self.owned.pop(lane)

    def move(self, source: int, target: int) -> None:
        """The request of lane ``source`` is from now on that of lane ``target``."""
        self.owned[target] = self.owned.pop(source)
        self.table[target], self.context[target] = self.table[source], self.context[source]

    def write(self, slots: Tensor, kv: Tensor) -> None:
        """Puts ``kv`` [layers, 2, n, Hkv, D] into ``slots`` int64 [n]."""
        self.kv.flatten(2, 3).index_copy_(2, slots, kv)


class Report(NamedTuple):
    """What a step tells the host, once ``done``: ``numbers`` int32, pinned where there is a GPU; and what its lanes were at its launch."""

    numbers: Tensor
    done: Any
    requests: list[int]
    depth: int
    first: dict[int, Tensor]


class Engine:
    """Serves a LLaMA-like transformers model, whose modules it calls; attention, cache, batch and steps are its own.

    Args:
        model: a ``LlamaForCausalLM`` or one that is built alike.
        scheduler: the policy.
        drafter: made by ``drafter(engine)``; None: plain decoding. An :class:`echo.Drafter` works as it is. One with ``extend``,
            ``remember`` and ``move`` (``examples/smollm2/graph_eagle.py``) is captured with the step.
        lanes, pages, length: requests at once, pages of the cache, tokens of a request at most.
        rows: rows of a step at most; where not given, what the policy asks for, or 16 for each lane.
        candidates: those that the drafter returns after each node.
        features: after which decoder layers the hidden states are kept in ``hidden`` [N, features * width].
        sample: logits [N, V] to tokens int64 [N].
        eos_token: ends an answer.
        backend: of :mod:`echo.kernels`; "auto" is Triton on a GPU and the plain-torch reference elsewhere.
        like: another engine of the same model and sizes, idle while this one runs: its cache, buffers and captured target are used too.
        graphs: :class:`echo.workspace.Graphs`; its own, or ``like``'s, where not given.
    """

    def __init__(
        self, model, scheduler, drafter=None, *, lanes=4, pages=128, length=512, rows=None, candidates=4, features=(),
        sample=kernels.argmax_tokens, eos_token=-1, backend="auto", like=None, graphs=None,
    ) -> None:  # fmt: skip
        self.model, self.scheduler, self.features, self.sample = model, scheduler, features, sample
        self.backend = backend
        asked = (
            scheduler.budget
            if isinstance(scheduler.budget, int)
            else scheduler.rule.default_budget(lanes) or 16 * lanes
        )
        most = len(like.sampled) if like else tier(max(lanes, rows or asked))
        self.cache = like.cache if like else PagedCache(model, lanes, pages, length)
        self.device = device = self.cache.table.device
        self.graphs = (
            (like.graphs if like else echo.workspace.Graphs(device)) if graphs is None else graphs
        )
        packed = like.space.packed if like else None
        self.space = echo.Workspace(
            scheduler, lanes, k=candidates, num_verify_tokens=most, device=device, packed=packed
        )
        self.lanes = torch.arange(lanes, device=device)
        self.slot, self.places = (
            self.lanes.clone(),
            list(range(lanes)),
        )  # each lane's slot of the history, of empty lanes too; the host's
        self.stats = self.space.stats
        self.ends = torch.full((1,), eos_token, device=device)
        self.root, self.left = (
            torch.zeros_like(self.lanes),
            torch.zeros_like(self.lanes),
        )  # last token, tokens still to emit
        self.known = scheduler.history(
            lanes, "cpu"
        )  # what the host knows of the history: forecasts never wait for the device
        kv = self.cache.kv
        self.stash = (
            like.stash if like else kv.new_zeros(len(kv), 2, most, *kv.shape[4:])
        )  # a step's keys and values
        self.sampled = like.sampled if like else torch.zeros(most, dtype=torch.int64, device=device)
        self.kept = (
            like.kept if like else kv.new_zeros(most, len(features) * model.config.hidden_size)
        )
        self.hidden = self.kept
        self.said = torch.full((lanes, scheduler.max_depth + 1), -1, device=device)
        self.layout = [(part.view(torch.int32).numel(), part.dtype) for part in self.parts()]
        self.report = torch.zeros(
            sum(size for size, _ in self.layout), dtype=torch.int32, device=device
        )
        on_gpu = device.type == "cuda"
        self.pinned = deque(
            torch.zeros(self.report.shape, dtype=torch.int32, device="cpu", pin_memory=on_gpu)
            for _ in range(2)
        )
        self.running: list[int] = []  # the prompt that each lane answers
        self.failed: list[int] = []
        self.first: dict[int, Tensor] = {}
        self.timed, self.times = False, dict[str, list[tuple[Any, Any]]]()
        self.drafter = drafter and drafter(self)
        self.extends = hasattr(self.drafter, "extend")
        self.whole = drafter is None or self.extends  # all of a step can be captured

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Tensor], max_new_tokens: int
    ) -> Iterator[tuple[int, list[int]]]:
        """Answers all prompts, as many at once as lanes and pages allow; yields what a request emits, as ``(prompt, tokens)``.

        Raises ValueError at the end where answers broke off because the model had no number for their next token.
        """
        waiting, last, self.failed = deque(range(len(prompts))), None, []
        while waiting or self.running or last is not None:
            while waiting and len(self.running) < len(self.lanes):
                prompt = prompts[waiting[0]]
                if not self.cache.reserve(
                    len(self.running), len(prompt) + max_new_tokens + self.scheduler.max_depth
                ):
                    break
                self.admit(waiting.popleft(), prompt, max_new_tokens)
            if waiting and not self.running and last is None:
                raise ValueError(
                    f"prompt {waiting[0]}: {len(prompts[waiting[0]])} tokens and the answer do not fit the cache"
                )
            now = self.step() if self.running else None
            if last is not None:
                yield from self.read(last)
            last = now
        if self.failed:
            raise ValueError(f"model: no number for the next token of prompts {self.failed}")

    def admit(self, request: int, prompt: Tensor, max_new_tokens: int) -> None:
        """Prefills a request alone, causally, in the next lane, and samples its first token, which the next report brings."""
        lane, place = len(self.running), torch.arange(len(prompt), device=self.device)
        states, kv, self.hidden = self.forward(prompt, place, causal)
        first = self.sample(self.model.lm_head(states[-1:]))
        self.cache.write(
            cache_slots(place, self.lanes[lane].expand_as(place), self.cache.table, PAGE, DUMMY), kv
        )
        self.cache.context[lane], self.root[lane] = len(prompt), first[0].clamp(min=0)
        self.left[lane] = torch.where(
            first[0] < 0, -1, torch.where(first[0] == self.ends[0], 0, max_new_tokens - 1)
        )
        history, slot = self.space.history, self.slot[lane : lane + 1]
        fresh = history.reset(slot)
        for name in SUMS:
            getattr(history, name).copy_(getattr(fresh, name))
        self.known = self.known.reset(torch.tensor([self.places[lane]], device="cpu"))
        self.running.append(request)
        self.first[request] = torch.zeros(
            1, dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda"
        )
        self.first[request].copy_(first, non_blocking=True)
        if self.extends:
            self.drafter.admit(lane, prompt, self.root[lane : lane + 1], self.hidden)
        elif self.drafter is not None:
            self.drafter.admit(slot, [prompt], self.root[lane : lane + 1])
        self.hidden = self.kept

    def step(self) -> Report:
        """Launches one speculative step of the running lanes. Waits for nothing."""
        live, space, drafter = len(self.running), self.space, self.drafter
        lanes = min(1 << (live - 1).bit_length(), len(self.lanes))
        plan = self.scheduler.choose_tier(self.known, self.places[:live])
        depth = plan.depth if drafter is not None else 0
        if (
            self.extends
            and drafter.num_unprocessed_tokens
            and (depth or drafter.num_unprocessed_tokens == drafter.room)
        ):
            drafter.catch_up()
        if depth == 0:
            self.run("plain", (lanes,), lambda: self.without(lanes))
            if self.extends:
                drafter.num_unprocessed_tokens += 1
        else:
            rows = min(tier(plan.num_verify_tokens), space.num_verify_tokens)
            space.set_num_verify_tokens(min(plan.num_verify_tokens, rows))
            tree = self.run("draft", (lanes, depth), lambda: self.draft(lanes, depth))
            packed = self.run("plan", (lanes, depth, rows), lambda: space.pack(tree, rows))
            self.run("target", (lanes, rows), lambda: self.target(packed))
            self.run("accept", (lanes, rows), lambda: self.accept(packed))
        return self.send(depth)

    def run(self, part: str, key: tuple[int, ...], function: Callable[[], Any]) -> Any:
        """A part of a step: captured by what alone changes it, but for what calls a drafter that cannot be captured."""
        begin = self.mark()
        if part == "target":
            result = self.graphs((part, id(self.cache), *key), function)
        else:
            result = (
                self.graphs((part, id(self), *key), function)
                if self.whole or part == "plan"
                else function()
            )
        if begin is not None:
            self.times.setdefault(part, []).append((begin, self.mark()))
        return result

    def draft(self, lanes: int, depth: int) -> echo.SuperTree:
        """Roots, then a layer after another: the drafter says, the scheduler plans."""
        left = self.left[:lanes]
        capacity = torch.where(
            left > 1, self.scheduler.max_verify_tokens_per_req, 1
        )  # what needs one token more has no use for drafts
        tree = self.space.begin(self.root[:lanes], live=left > 0, verify_limits=capacity)
        for _ in range(depth):
            tree = self.space.grow(tree, *self.drafter.draft(self.slot[:lanes], tree.frontier))
        return tree

    def without(self, lanes: int) -> None:
        """A step without speculation, whole: the roots are its rows."""
        packed = self.space.pack(self.draft(lanes, 0), lanes)
        self.target(packed)
        self.accept(packed)

    def accept(self, packed: echo.PackedTree) -> None:
        """What the target's tokens mean: accepted rows go into pages, the history learns, the drafter extends, lanes move on."""
        lanes, space, cache = packed.batch, self.space, self.cache
        accepted = space.accept(
            packed,
            self.sampled[: packed.num_rows],
            max_new_tokens=self.left[:lanes],
            eos_tokens=self.ends,
            backend=self.backend,
        )
        pages = {"page_table": cache.table[:lanes], "page_size": PAGE, "dummy": DUMMY}
        lists = space.compact(packed, accepted, cache.context[:lanes], **pages)
        cache.write(lists.target.flatten(), self.stash[:, :, lists.gather.flatten()])
        cache.context[:lanes] = lists.prefix_lens
        space.observe(self.slot[:lanes], packed, accepted)
        if self.extends:
            extend = self.drafter.extend if packed.max_depth else self.drafter.remember
            extend(self.kept[lists.gather], accepted.tokens, accepted.num_emitted)
        elif self.drafter is not None:
            self.drafter.extend(self.slot[:lanes], packed, accepted)
        self.advance(accepted)

    def advance(self, accepted: echo.tree.Accepted) -> None:
        """What the accepted tokens mean for each lane: what it says, its next root, the tokens left; and the step's report."""
        lanes, steps = accepted.tokens.shape
        left, root = self.left[:lanes], self.root[:lanes]
        self.said.fill_(-1)
        self.said[:lanes, :steps] = accepted.tokens
        torch.where(accepted.num_emitted > 0, accepted.bonus, root, out=root)
        rest = torch.where(accepted.bonus == self.ends, 0, left - accepted.num_emitted)
        torch.where(
            accepted.num_emitted > 0, rest, torch.where(left > 0, -1, left), out=left
        )  # -1: the target had no number
        torch.cat([part.view(torch.int32) for part in self.parts()], out=self.report)

    def parts(self) -> list[Tensor]:
        """What a report is made of: tokens said, tokens left, and the history where forecasts read it."""
        names = SUMS if isinstance(self.scheduler.budget, echo.CostModel) else ()
        return [
            part.flatten()
            for part in (
                self.said,
                self.left,
                *(getattr(self.space.history, name) for name in names),
            )
        ]

    def send(self, depth: int) -> Report:
        """The step's one transfer to the host."""
        numbers = self.pinned[0]
        self.pinned.rotate()
        numbers.copy_(self.report, non_blocking=True)
        first, self.first = self.first, {}
        return Report(numbers, self.mark(always=True), list(self.running), depth, first)

    def read(self, report: Report) -> Iterator[tuple[int, list[int]]]:
        """Reads a report: yields what was said, forgets what is finished, and learns what the next forecast needs."""
        if report.done is not None:
            report.done.synchronize()
        sizes, kinds = zip(*self.layout, strict=True)
        parts = [
            part.view(kind) for part, kind in zip(report.numbers.split(sizes), kinds, strict=True)
        ]
        said, left = parts[0].view(self.said.shape).tolist(), parts[1].tolist()
        if parts[2:]:
            sums = {
                name: part.view(getattr(self.known, name).shape)
                for name, part in zip(SUMS, parts[2:], strict=True)
            }
            now, lagged = self.known.generation, replace(self.known, **sums)
            self.known = (
                lagged
                if torch.equal(now, lagged.generation)
                else replace(lagged.of(now), generation=now)
            )
        self.known = self.known.advance(report.depth)
        for lane, request in enumerate(report.requests):
            first = report.first[request].tolist() if request in report.first else []
            tokens = [token for token in first + said[lane] if token >= 0]
            if tokens:
                yield request, tokens
            if left[lane] < 1 and request in self.running:
                self.failed += [request] * (left[lane] < 0)
                self.finish(self.running.index(request))

    def finish(self, lane: int) -> None:
        """The lane's request is done: the last one takes its place, so that running requests are always the first lanes."""
        last = len(self.running) - 1
        self.cache.release(lane)
        self.left[lane] = 0
        if lane != last:
            self.cache.move(last, lane)
            for state in (self.root, self.left, self.slot):
                state[lane], state[last] = state[last].clone(), state[lane].clone()
            self.places[lane], self.places[last] = self.places[last], self.places[lane]
            self.running[lane] = self.running[last]
            if self.extends:
                self.drafter.move(last, lane)
        self.running.pop()

    def target(self, packed: echo.PackedTree) -> None:
        """The target's pass over a packed step: its token after each row, the rows' keys and values and features, into buffers."""
        cache, config, n, lanes = self.cache, self.model.config, packed.num_rows, packed.batch
        context, table = cache.context[:lanes], cache.table[:lanes]
        q, k = (
            cache.kv.new_empty(n, heads, cache.kv.shape[-1])
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        plan = kernels.plan_attention(
            q, cache.kv[0, 0], table, context, k, packed.indptr, backend=self.backend
        )  # once for all layers

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = cache.kv[layer]
            tree = k, v, packed.request, packed.indptr, packed.mask
            return kernels.tree_attention(
                q, keys, values, table, context, *tree, plan=plan, backend=self.backend
            )[0]

        states, _, hidden = self.forward(
            packed.tokens, packed.positions(context), attend, self.stash[:, :, :n]
        )
        if self.features:
            self.kept[:n] = hidden
        self.sampled[:n] = self.sample(self.model.lm_head(states))

    def forward(
        self, tokens: Tensor, position: Tensor, attend: Attend, kv: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States [N, width] before the output layer, keys and values [layers, 2, N, Hkv, D], and features, of N rows of any requests."""
        base, features = self.model.model, []
        x = base.embed_tokens(tokens)
        kv = (
            self.cache.kv.new_empty(len(base.layers), 2, len(x), *self.cache.kv.shape[4:])
            if kv is None
            else kv
        )
        cos, sin = (turn[0] for turn in base.rotary_emb(x[None], position[None]))
        for index, layer in enumerate(base.layers):
            attention, h = layer.self_attn, layer.input_layernorm(x)
            q, k, v = (
                part(h).unflatten(-1, (-1, attention.head_dim))
                for part in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            q, k = apply_rotary_pos_emb(q, k, cos, sin)
            x = x + attention.o_proj(attend(index, q, k, v).flatten(1))
            x = x + layer.mlp(layer.post_attention_layernorm(x))
            kv[index, 0], kv[index, 1] = k, v
            if index + 1 in self.features:
                features.append(x)
        return base.norm(x), kv, torch.cat(features, dim=-1) if features else x[:, :0]

    def mark(self, always: bool = False) -> Any:
        """An event of the device at this point of a step, where it is ``timed``, or ``always``."""
        if self.device.type != "cuda" or not (self.timed or always):
            return None
        event = torch.cuda.Event(enable_timing=self.timed)
        event.record()
        return event


def tier(rows: int) -> int:
    """The next of 1, 2, 3, 4, 6, 8, 12, 16, ...: few numbers of rows, so few graphs."""
    power = 1 << max(rows - 1, 0).bit_length()
    return power * 3 // 4 if power >= 4 and rows <= power * 3 // 4 else power


def causal(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of one whole prompt: [N, H, D]."""
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(
        0, 1
    )
