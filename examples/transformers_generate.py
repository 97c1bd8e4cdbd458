"""Speculative decoding for a LLaMA-like causal LM of transformers: ragged, greedy or sampled.

    python examples/transformers_generate.py --target LLM --draft SMALLER_LLM --prompt "Hi!"
    python examples/transformers_generate.py --target LLM --draft eagle.safetensors \\
        --policy throughput-optimal --prompts questions.txt
    python examples/transformers_generate.py --target LLM --draft lookup --policy eagle --compare

It stands on transformers' public interface: cache layers, a 4-D attention mask, `position_ids`.
The draft is a model with the same tokenizer, or a head as `examples/smollm2/train.py` makes them.
Policies that need figures (echo, rank, throughput-optimal) warm up first, on the prompts. Every
token is the target's own: greedy text is that of `generate`, and sampled text depends on the seed
and the prompt's number, never on the policy.

A batch is padded to its largest tree, over a static cache (see `echo.layouts.hugging_face`).
`examples/engine.py` is how an engine does it, with pages and without padding.

B requests, W nodes of a frontier, k candidates of a node, R rows of a padded tree.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, Cache
from transformers.cache_utils import CacheLayerMixin

import echo
from echo import kernels

POLICIES = ("plain", "eagle", "ddd", "echo", "rank", "throughput-optimal")
SMOLLM2 = Path(__file__).with_name("smollm2")
BEAM = 4
STEP = 256
"""Columns of a step's rows, at least."""
SECONDS = 20.0
"""To profile in, at most."""


class StepLayer(CacheLayerMixin):
    """One layer of a :class:`KVCache` for one forward pass: new rows lie from ``begin`` on."""

    is_compileable, is_sliding = True, False

    def __init__(self, keys: Tensor, values: Tensor, lanes: slice | Tensor, begin: int) -> None:
        self.keys, self.values, self.lanes, self.begin = keys, values, lanes, begin
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs):
        end = self.begin + key_states.shape[2]
        self.keys[self.lanes, :, self.begin : end] = key_states
        self.values[self.lanes, :, self.begin : end] = value_states
        return self.keys[self.lanes, :, :end], self.values[self.lanes, :, :end]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None: ...

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.begin + query_length, 0

    def get_seq_length(self) -> int:
        return self.begin

    def get_max_length(self) -> int:
        return self.keys.shape[2]


class KVCache:
    """Keys and values of all requests, static: texts in columns from 0, a pass's rows behind.

    Shapes depend on the number of requests and rows only, so a compiled model is compiled once for
    each pair of them, and no pass copies a text.
    """

    def __init__(self, model, max_num_reqs: int, length: int) -> None:
        config, self.length = model.config.get_text_config(), length
        heads, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
        size = getattr(config, "head_dim", None) or size
        shape = config.num_hidden_layers, 2, max_num_reqs, heads, length + max(length, STEP), size
        self.kv = torch.zeros(shape, dtype=model.dtype, device=model.device)
        self.prefix_lens = torch.zeros(max_num_reqs, dtype=torch.int64, device=model.device)

    def run(
        self, model, req_indices: Tensor, ids: Tensor, positions: Tensor, mask: Tensor,
        begin: int = 0, **options,
    ):  # fmt: skip
        """Logits [B, R, V] of rows that lie behind ``begin`` others of this step.

        A compiled model gets all lanes in every pass, so that their number never changes.
        """
        num_lanes, inputs = self.kv.shape[2], (ids, positions, mask)
        every = req_indices.tolist() == list(range(num_lanes))
        widened = is_compiled(model) and not every
        if widened:
            wide = lambda x: x.new_zeros(num_lanes, *x.shape[1:]).index_copy_(0, req_indices, x)
            ids, positions, mask = map(wide, inputs)
        lanes = slice(None) if every or widened else req_indices
        layers = [StepLayer(*kv, lanes, self.length + begin) for kv in self.kv]
        logits = model(
            ids, position_ids=positions, attention_mask=mask,
            past_key_values=Cache(layers=layers), **options,
        ).logits  # fmt: skip
        return logits[req_indices] if widened else logits

    def visible(self, req_indices: Tensor, own: Tensor) -> Tensor:
        """Mask [B, 1, R, columns] of rows that see their text and ``own`` bool [B, R, rows]."""
        column = torch.arange(self.length, device=own.device)
        text = (column < self.prefix_lens[req_indices][:, None])[:, None].expand(
            -1, own.shape[1], -1
        )
        mask = torch.zeros(*own.shape[:2], self.length + own.shape[2], device=own.device)
        hidden = ~torch.cat([text, own], dim=2)
        return mask.to(self.kv.dtype).masked_fill(hidden, torch.finfo(self.kv.dtype).min)[:, None]

    def move(self, req_indices: Tensor, source: Tensor, target: Tensor) -> None:
        """Copies columns ``source`` [B, n] of the requests to columns ``target`` [B, n]."""
        where = req_indices[:, None]
        self.kv[:, :, where, :, target] = self.kv[:, :, where, :, source]

    def append(self, req_indices: Tensor, texts: Sequence[Tensor], model):
        """Runs ragged texts through the model in one pass; its logits are those after each text."""
        device = req_indices.device
        lengths = torch.tensor([len(text) for text in texts], device=device)
        ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        column = torch.arange(ids.shape[1], device=device)
        causal = (column <= column[:, None]).expand(len(texts), -1, -1)
        prefix_lens = self.prefix_lens[req_indices][:, None]
        mask, model = self.visible(req_indices, causal), getattr(model, "_orig_mod", model)
        ends, positions = (lengths - 1)[:, None], prefix_lens + column
        logits = self.run(model, req_indices, ids, positions, mask, logits_to_keep=ends)
        place = torch.minimum(column, lengths[:, None] - 1)  # padding copies the last column again
        self.move(req_indices, self.length + place, prefix_lens + place)
        self.prefix_lens[req_indices] += lengths
        return logits


def is_compiled(model) -> bool:
    """Whether the model is one of ``torch.compile``."""
    return hasattr(model, "_orig_mod")


class Sampler:
    """Greedy at temperature 0; else by inversion, a uniform number for each prompt and position.

    Whatever rows a step verifies, a token of a text is decided by the same number of the seed's.
    """

    def __init__(
        self, max_num_reqs: int, length: int, temperature: float = 0.0, seed: int = 0
    ) -> None:
        self.temperature, self.seed, self.admitted = temperature, seed, 0
        shape = max_num_reqs, length + 1
        self.uniform = torch.zeros(shape, dtype=torch.float64, device="cpu")

    def admit(self, req_indices: Tensor) -> None:
        """Draws the numbers of new requests; prompts are admitted in their order."""
        size, options = self.uniform.shape[1], {"dtype": torch.float64, "device": "cpu"}
        for index in req_indices.tolist():
            generator = torch.Generator().manual_seed((self.seed << 24) + self.admitted)
            self.uniform[index] = torch.rand(size, generator=generator, **options)
            self.admitted += 1

    def __call__(self, logits: Tensor, req_indices: Tensor, position: Tensor) -> Tensor:
        """Tokens int64 [n] of logits [n, V], for positions [n] of the requests' texts."""
        if self.temperature == 0:
            return kernels.argmax_tokens(logits)
        mass = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        u = self.uniform[req_indices.cpu(), position.cpu()].to(mass.device)[:, None]
        token = torch.searchsorted(mass, u * mass[:, -1:], right=True)[:, 0]
        return torch.where(mass[:, -1] > 0, token.clamp(max=logits.shape[-1] - 1), -1)


class Target:
    """A causal LM as :class:`echo.Target`.

    ``features`` are decoder layers whose outputs it keeps in ``hidden``, for a head.
    """

    def __init__(
        self, model, sampler: Sampler, max_num_reqs: int, length: int, features: Sequence[int] = ()
    ) -> None:
        self.model, self.sampler = model, sampler
        self.cache = KVCache(model, max_num_reqs, length)
        self.outputs: dict[int, Tensor] = dict.fromkeys(features)
        self.hidden = torch.empty(0)
        for layer in features:
            hook = functools.partial(self._keep, layer)
            decoder = getattr(model, "_orig_mod", model).get_decoder()
            decoder.layers[layer - 1].register_forward_hook(hook)

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        self.cache.prefix_lens[req_indices] = 0
        self.sampler.admit(req_indices)
        logits = self.cache.append(req_indices, prompts, self.model)[:, 0]
        if self.outputs:
            rows = zip(self._features(), prompts, strict=True)
            self.hidden = torch.cat([states[: len(prompt)] for states, prompt in rows])
        return self.sampler(logits, req_indices, self.cache.prefix_lens[req_indices])

    def verify(self, req_indices: Tensor, packed: echo.PackedTree) -> Tensor:
        prefix_lens = self.cache.prefix_lens[req_indices]
        n = self.padded(int(packed.indptr.diff().max()))
        inputs = echo.layouts.hugging_face(
            packed, n, prefix_lens, self.cache.length, left_padded=False, dtype=self.model.dtype
        )
        logits = self.cache.run(
            self.model, req_indices, inputs.input_ids, inputs.position_ids, inputs.attention_mask
        )
        positions = inputs.position_ids.flatten() + 1
        tokens = self.sampler(logits.flatten(0, 1), req_indices.repeat_interleave(n), positions)
        if self.outputs:
            self.hidden = echo.layouts.unpad(packed, self._features())
        return echo.layouts.unpad(packed, tokens.view(-1, n))

    def compact(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        prefix_lens = self.cache.prefix_lens[req_indices]
        moves = echo.compact(packed, accepted, prefix_lens, past_len=self.cache.length)
        self.cache.move(req_indices, moves.source, moves.target)
        self.cache.prefix_lens[req_indices] = moves.prefix_lens

    def padded(self, rows: int) -> int:
        """Rows of a pass: few numbers, if the model is compiled for each."""
        return 1 << (rows - 1).bit_length() if is_compiled(self.model) else rows

    def _keep(self, layer: int, module, inputs, output) -> None:
        self.outputs[layer] = output[0] if isinstance(output, tuple) else output

    def _features(self) -> Tensor:
        return torch.cat(list(self.outputs.values()), dim=-1)


class DraftModel:
    """A smaller causal LM as :class:`echo.Drafter`: drafts a tree layer by layer over one cache.

    Args:
        model: with the target's tokenizer.
        max_num_reqs, length: as of the target.
        k: candidates of each node.
    """

    def __init__(self, model, max_num_reqs: int, length: int, k: int = 4) -> None:
        self.model, self.k, self.cache = model, k, KVCache(model, max_num_reqs, length)
        self.unprocessed: dict[int, list[int]] = {}  # emitted, but not in the cache yet
        self.ancestors: Tensor | None = None  # of the frontier, among the step's nodes

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor) -> None:
        self.cache.prefix_lens[req_indices], self.ancestors = 0, None
        for index, prompt, token in zip(req_indices.tolist(), prompts, first.tolist(), strict=True):
            self.unprocessed[index] = [*prompt.tolist(), token]

    def extend(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        self.ancestors, rows = None, (req_indices, accepted.tokens, accepted.num_emitted)
        for index, tokens, count in zip(*(x.tolist() for x in rows), strict=True):
            self.unprocessed.setdefault(index, []).extend(tokens[:count])

    def draft(self, req_indices: Tensor, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
        batch, device = len(req_indices), req_indices.device
        if self.ancestors is None or frontier.depth == 0:  # the first layer may come from elsewhere
            candidates = self._extend(req_indices, frontier.active.any(dim=1))
            self.ancestors = torch.zeros(batch, 1, 0, dtype=torch.bool, device=device)
            if frontier.depth == 0:
                return candidates
        width, above = frontier.token.shape[1], self.ancestors.shape[2]
        itself = torch.eye(width, dtype=torch.bool, device=device).expand(batch, -1, -1)
        self.ancestors = torch.cat([frontier.inherit(self.ancestors), itself], dim=2)
        position = self.cache.prefix_lens[req_indices][:, None] + frontier.depth - 1
        mask, positions = (
            self.cache.visible(req_indices, self.ancestors),
            position.expand(-1, width),
        )
        inputs = self.model, req_indices, frontier.token, positions, mask
        return self._candidates(self.cache.run(*inputs, above))

    def _extend(self, req_indices: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Draft extend, which gives the first layer; requests that do not draft wait."""
        shape, device = (len(req_indices), 1, self.k), req_indices.device
        tokens = torch.zeros(shape, dtype=torch.int64, device=device)
        log_probs = torch.full(shape, -torch.inf, dtype=torch.float32, device=device)
        if active.any():
            mine = req_indices[active]
            texts = [torch.tensor(self.unprocessed.pop(i), device=device) for i in mine.tolist()]
            logits = self.cache.append(mine, texts, self.model)
            tokens[active], log_probs[active] = self._candidates(logits)
        return tokens, log_probs

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top = logits.float().log_softmax(dim=-1).topk(self.k, dim=-1)
        return top.indices, top.values


def load(folder: Path, dtype: str, device: str):
    """A causal LM in evaluation mode."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    window = getattr(model.config, "sliding_window", None)
    if window and getattr(model.config, "use_sliding_window", True):
        raise SystemExit(f"{folder}: expected full attention, got a sliding window of {window}")
    return model.eval().to(device)


def pair(model, draft, sampler: Sampler, length: int):
    """The target and its drafter: a model, "lookup", a head's file, or None."""
    sizes = len(sampler.uniform), length
    if draft is None:
        return Target(model, sampler, *sizes), None
    if draft == "lookup":
        return Target(model, sampler, *sizes), echo.PromptLookup(*sizes, device=model.device)
    if not isinstance(draft, Path):
        return Target(model, sampler, *sizes), DraftModel(draft, *sizes)
    sys.path.insert(0, str(SMOLLM2))
    from drafters import pooled
    from model import FEATURE_LAYERS

    target = Target(model, sampler, *sizes, FEATURE_LAYERS)
    return target, pooled(target, *sizes, weights=draft)


def warm_up(
    target: Target, drafter: echo.Drafter, prompts: Sequence[Tensor], depth: int, bar: Progress
) -> tuple[echo.WarmupLog, float]:
    """Drafts without a gate and verifies each layer's best: the log, seconds of a drafted layer."""
    max_num_reqs, total = len(target.cache.prefix_lens), 32 * len(prompts)
    budget = (BEAM * depth + 1) * max_num_reqs
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(BEAM, 0), budget=budget, max_depth=depth)
    task, logs, seconds, layers = bar.add_task("warm-up", total=total), [], 0.0, 0
    steps = echo.decode(
        scheduler, target, drafter, prompts, max_num_reqs=max_num_reqs, max_new_tokens=32,
        eos_token=target.model.generation_config.eos_token_id, device=target.model.device,
    )  # fmt: skip
    for step in steps:
        logs.append(step.log())
        seconds += step.seconds.draft + step.seconds.scheduling
        layers += step.tree.depth
        bar.advance(task, sum(map(len, step.emitted)))
    bar.update(task, completed=total)
    return echo.WarmupLog.concat(logs), seconds / layers


def measure(target: Target, layer: float, bar: Progress) -> echo.CostModel:
    """The cost of a forward pass, measured where decisions depend on it."""
    model, cache, begin = target.model, target.cache, time.perf_counter()
    task, max_num_reqs = bar.add_task("profile", total=SECONDS), len(cache.prefix_lens)

    def step(num_reqs: int, num_tokens: int, context_len: int) -> None:
        lanes, rows = torch.arange(num_reqs), target.padded(-(-num_tokens // num_reqs))
        own = torch.eye(rows, dtype=torch.bool).expand(num_reqs, -1, -1)
        ids = torch.ones(num_reqs, rows, dtype=torch.int64)
        cache.run(model, lanes, ids, torch.zeros_like(ids), cache.visible(lanes, own))

    def show(profile: echo.cost.SpeculationProfile, stake: float) -> None:
        text = "profile" if stake == math.inf else f"profile, {stake:.0%} of throughput at stake"
        bar.update(task, completed=time.perf_counter() - begin, description=text)

    identity = {
        "model": model.config.name_or_path,
        "device": str(model.device),
        "dtype": str(model.dtype),
    }
    profile = echo.cost.SpeculationProfile(identity, (), {"draft_layer": layer}).measure(
        step, max_num_reqs=max_num_reqs, max_num_tokens=16 * max_num_reqs, max_seconds=SECONDS,
        context_lens=[cache.length], device=model.device, on_sample=show,
    )  # fmt: skip
    bar.update(task, completed=SECONDS)
    return profile.cost()


def schedule(
    policy: str, target: Target, drafter, prompts: Sequence[Tensor], rows: int, depth: int,
    bar: Progress,
):  # fmt: skip
    """The policy's scheduler; those that need figures get them from a warm-up on the prompts."""
    make = echo.ElasticBudgetScheduler
    if policy == "plain":
        return make.autoregressive()
    if policy == "eagle":
        return make.eagle(max_verify_tokens_per_req=rows, beam=BEAM, max_depth=depth)
    if policy == "ddd":
        gate, limit = echo.BeamMassGate(tuple(range(2, depth)), -1.0, BEAM), max(64, rows)
        rule = echo.PerRequest(rows, BEAM)
        return make(rule, gate, None, depth, max_verify_tokens_per_req=limit)
    log, layer = warm_up(target, drafter, prompts, depth, bar)
    calibration, budget = echo.calibrate(log, min_rows=20), rows * len(target.cache.prefix_lens)
    if policy == "throughput-optimal":
        return make.throughput_optimal(calibration, measure(target, layer, bar), beam=BEAM)
    if policy == "echo":
        return make.paper(calibration, k_max=budget, beam=2)
    return make(echo.GlobalRank(BEAM, calibration), None, budget, depth)


def stream(steps, questions: Sequence[str], decode: Callable[[list[int]], str], console: Console):
    """Shows the answers as they grow; returns their tokens and the counters."""
    answers: list[list[int]] = [[] for _ in questions]
    stats, columns = None, (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), console=console)
    task = bar.add_task("answers", total=len(questions))

    def show() -> Group:
        pairs = [(text, tokens) for text, tokens in zip(questions, answers, strict=True) if tokens]
        title = lambda text: {"title": text.splitlines()[0][:70], "title_align": "left"}
        return Group(*(Panel(decode(tokens), **title(text)) for text, tokens in pairs), bar)

    with Live(console=console, get_renderable=show, refresh_per_second=8):
        for step in steps:
            stats = stats or echo.StepStats.empty(step.req_indices.device)
            stats = stats.observe(step.packed, step.accepted)
            for request, tokens in zip(step.requests, step.emitted, strict=True):
                answers[request] += tokens
            bar.advance(task, len(step.finished))
    return answers, stats.read()


def compare(model, assistant, prompts: Sequence[Tensor], new: int, console: Console) -> None:
    """Prints what transformers' own ``generate`` does, a prompt at a time, plain and assisted.

    ``assistant`` is a draft model; with none, it looks up n-grams in the prompt.
    """
    assisted = {"assistant_model": assistant} if assistant else {"prompt_lookup_num_tokens": 4}
    for name, options in (("generate", {}), (f"generate, {next(iter(assisted))}", assisted)):
        begin, total = time.perf_counter(), 0
        for prompt in prompts:
            ids = prompt[None]
            row = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, do_sample=False,
                **options,
            )  # fmt: skip
            total += row.shape[1] - len(prompt)
        rate = total / (time.perf_counter() - begin)
        console.print(f"{name}: {total} tokens, {rate:.1f} a second")


def answer(args: argparse.Namespace, questions: Sequence[str]) -> list[list[int]]:
    """Loads, warms up, decodes and shows."""
    console, model = Console(), load(args.target, args.dtype, args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts, folder = encode(tokenizer, questions), args.draft and Path(args.draft)
    max_num_reqs = min(args.batch, len(prompts))
    length = max(map(len, prompts)) + max(args.new, 32) + args.depth + 1
    sampler = lambda: Sampler(max_num_reqs, length, args.temperature, args.seed)
    assistant = load(folder, args.dtype, args.device) if folder and folder.is_dir() else None
    draft, whole = args.draft if args.draft == "lookup" else folder, model
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a step's shapes: rows, and layers of a draft
        whole = torch.compile(model, fullgraph=True)
        assistant = assistant and torch.compile(assistant, fullgraph=True)
    target, drafter = pair(whole, draft if assistant is None else assistant, sampler(), length)
    with Progress(console=console, transient=True) as bar:
        scheduler = schedule(args.policy, target, drafter, prompts, args.rows, args.depth, bar)
    target.sampler = sampler()  # the warm-up has used numbers up
    begin = time.perf_counter()
    steps = echo.decode(
        scheduler, target, drafter if scheduler.max_depth else None, prompts,
        max_num_reqs=max_num_reqs, max_new_tokens=args.new, device=args.device,
        eos_token=model.generation_config.eos_token_id,
    )  # fmt: skip
    decode = functools.partial(tokenizer.decode, skip_special_tokens=True)
    answers, counts = stream(steps, questions, decode, console)
    total, seconds = sum(map(len, answers)), time.perf_counter() - begin
    rates = f"{total / seconds:.1f} a second, {counts.tokens_per_step:.2f} a step"
    console.print(f"\n{args.policy}: {total} tokens, {rates}\n{counts}")
    if args.compare:
        compare(model, getattr(assistant, "_orig_mod", assistant), prompts, args.new, console)
    return answers


def main(arguments: Sequence[str] | None = None) -> list[list[int]]:
    """Answers the prompts; returns the answers' tokens."""
    text = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=text)
    add = parser.add_argument
    add("--target", type=Path, required=True, help="folder of a causal LM")
    add("--draft", help="one with the same tokenizer, a head's .safetensors, or 'lookup'")
    add("--prompt", action="append", default=[])
    add("--prompts", type=Path, help="file with a prompt on each line")
    add("--policy", choices=POLICIES, default="echo")
    add("--batch", type=int, default=8, help="prompts answered together")
    add("--new", type=int, default=96, help="tokens of an answer at most")
    add("--rows", type=int, default=6, help="verify tokens of a prompt and step, on average")
    add("--depth", type=int, default=4, help="layers drafted at most")
    add("--temperature", type=float, default=0.0)
    add("--seed", type=int, default=0)
    add("--dtype", default="float32")
    add("--device", default="cpu")
    add("--compile", action="store_true", help="torch.compile the models, over static shapes")
    add("--compare", action="store_true", help="with transformers' own generation, afterwards")
    args = parser.parse_args(arguments)
    if args.draft is None and args.policy != "plain":
        parser.error(f"--policy {args.policy} needs a --draft")
    if args.draft not in (None, "lookup") and not Path(args.draft).exists():
        parser.error(f"--draft: expected a folder, a file or 'lookup', got {args.draft}")
    if args.depth < 1:
        parser.error(
            f"--depth: expected at least 1, got {args.depth}; --policy plain drafts nothing"
        )
    questions = args.prompt + (args.prompts.read_text().splitlines() if args.prompts else [])
    default = ["Why is the sky blue?", "Write a Python function that adds two numbers."]
    questions = [text for text in questions if text.strip()] or default
    with torch.inference_mode(), torch.device(args.device):
        return answer(args, questions)


def encode(tokenizer, questions: Sequence[str]) -> list[Tensor]:
    """Token ids int64, through the chat template if the model has one."""
    special = not tokenizer.chat_template
    if tokenizer.chat_template:
        chats = [[{"role": "user", "content": text}] for text in questions]
        options = {"tokenize": False, "add_generation_prompt": True}
        questions = [tokenizer.apply_chat_template(chat, **options) for chat in chats]
    ids = [tokenizer(text, add_special_tokens=special)["input_ids"] for text in questions]
    return [torch.tensor(row) for row in ids]


if __name__ == "__main__":
    main()
