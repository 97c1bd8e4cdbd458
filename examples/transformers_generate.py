"""Speculative decoding for any LLaMA-like causal LM of transformers: ragged batches, greedy or sampled, text as it comes.

    python examples/transformers_generate.py --target LLM --draft SMALLER_LLM --prompt "Why is the sky blue?" --prompt "Hi!"
    python examples/transformers_generate.py --target LLM --draft eagle.safetensors --policy goodput --prompts questions.txt

It stands on transformers' public interface alone: a `DynamicCache` of what each request holds, a 4-D attention mask, `position_ids`.
The draft is a model with the same tokenizer, or a head as `examples/smollm2/train.py` makes them (for a target of its width).
Policies that need figures (echo, rank, goodput) warm up first, on the prompts themselves. Every token is the target's own: greedy text
is that of `generate`, and sampled text depends on the seed and the prompt's number, never on the policy.

A batch is padded to its largest tree here, and its cache is copied in every pass (see `echo.layouts.hugging_face`): this shows the
wiring, and is fast enough to use; `examples/engine.py` is how an engine does it.
"""

from __future__ import annotations

import argparse
import functools
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
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

import echo
from echo import kernels

POLICIES = ("plain", "eagle", "ddd", "echo", "rank", "goodput")
SMOLLM2 = Path(__file__).with_name("smollm2")


class SlotCache:
    """Keys and values of a causal LM by request slot, between its forward passes; each slot's text begins at column 0."""

    def __init__(self, slots: int, length: int, device: torch.device) -> None:
        self.length = length
        self.used = torch.zeros(slots, dtype=torch.int64, device=device)
        self.layers: list[
            tuple[Tensor, Tensor]
        ] = []  # [slots, heads, length, dim] each, made when the first pass shows their shapes

    def open(self, slots: Tensor) -> DynamicCache:
        """A transformers cache of what the slots hold, padded to the longest."""
        past = int(self.used[slots].max())
        return (
            DynamicCache([(k[slots, :, :past], v[slots, :, :past]) for k, v in self.layers])
            if past
            else DynamicCache()
        )

    def write(self, slots: Tensor, cache: DynamicCache, source: Tensor, target: Tensor) -> None:
        """Copies columns ``source`` [B, n] of the cache to columns ``target`` [B, n] of the slots, in every layer."""
        if not self.layers:
            shape = lambda x: (len(self.used), x.shape[1], self.length, x.shape[3])
            self.layers = [
                tuple(x.new_zeros(shape(x)) for x in (layer.keys, layer.values))
                for layer in cache.layers
            ]
        request = torch.arange(len(slots), device=slots.device)[:, None]
        for stored, layer in zip(self.layers, cache.layers, strict=True):
            for whole, new in zip(stored, (layer.keys, layer.values), strict=True):
                whole[slots[:, None], :, target] = new[request, :, source]

    def read(self, slots: Tensor, texts: Sequence[Tensor], model):
        """Appends ragged texts to the slots in one forward pass; its output, whose logits are those after each text's last token."""
        lengths = torch.tensor([len(text) for text in texts], device=slots.device)
        ids = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
        cache, used, column = (
            self.open(slots),
            self.used[slots],
            torch.arange(ids.shape[1], device=ids.device),
        )
        past = cache.get_seq_length()
        prefix = torch.arange(past, device=ids.device) < used[:, None]
        visible = torch.cat(
            [
                prefix[:, None].expand(-1, len(column), -1),
                (column <= column[:, None]).expand(len(slots), -1, -1),
            ],
            dim=2,
        )
        output = model(
            ids,
            position_ids=used[:, None] + column,
            attention_mask=additive(visible, model.dtype),
            past_key_values=cache,
            logits_to_keep=(lengths - 1)[:, None],
        )
        place = torch.minimum(
            column, lengths[:, None] - 1
        )  # beyond its end a text's last column is copied again
        self.write(slots, cache, past + place, used[:, None] + place)
        self.used[slots] = used + lengths
        return output


def additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """A 4-D mask [B, 1, R, columns] of bool [B, R, columns]: 0 where a row may look, the least number elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(
        ~visible, torch.finfo(dtype).min
    )[:, None]


class Sampler:
    """Greedy at temperature 0; else by inversion, with one uniform number for each prompt and position, drawn from the seed.

    Whatever rows a step verifies, the token at a place of a text is decided by the same number.
    """

    def __init__(self, slots: int, length: int, temperature: float = 0.0, seed: int = 0) -> None:
        self.temperature, self.seed, self.admitted = temperature, seed, 0
        self.uniform = torch.zeros(slots, length + 1, dtype=torch.float64, device="cpu")

    def admit(self, slots: Tensor) -> None:
        """Prompts are admitted in their order, so a prompt's number is how many were before it."""
        for slot in slots.tolist():
            generator = torch.Generator().manual_seed((self.seed << 24) + self.admitted)
            self.uniform[slot] = torch.rand(
                self.uniform.shape[1], generator=generator, dtype=torch.float64, device="cpu"
            )
            self.admitted += 1

    def __call__(self, logits: Tensor, slots: Tensor, place: Tensor) -> Tensor:
        """Tokens int64 [n] of logits [n, V], for places [n] of the texts in slots [n]."""
        if self.temperature == 0:
            return kernels.argmax_tokens(logits)
        mass = (logits.double() / self.temperature).softmax(dim=-1).cumsum(dim=-1)
        u = self.uniform[slots.cpu(), place.cpu()].to(mass.device)[:, None] * mass[:, -1:]
        token = torch.searchsorted(mass, u, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
        return torch.where(mass[:, -1] > 0, token, -1)  # no number: no token


class Target:
    """A causal LM as :class:`echo.Target`. With ``features`` (decoder layers) it keeps their outputs in ``hidden``, for a head."""

    def __init__(
        self, model, sampler: Sampler, slots: int, length: int, features: Sequence[int] = ()
    ) -> None:
        self.model, self.sampler, self.store = (
            model,
            sampler,
            SlotCache(slots, length, model.device),
        )
        self.features: dict[int, Tensor] = dict.fromkeys(features)
        self.hidden = torch.empty(0)
        for at in features:
            model.get_decoder().layers[at - 1].register_forward_hook(
                functools.partial(self._remember, at)
            )

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor]) -> Tensor:
        self.store.used[req_indices] = 0
        self.sampler.admit(req_indices)
        logits = self.store.read(req_indices, prompts, self.model).logits[:, 0]
        if self.features:
            self.hidden = torch.cat(
                [x[: len(p)] for x, p in zip(self._features(), prompts, strict=True)]
            )
        return self.sampler(logits, req_indices, self.store.used[req_indices])

    def verify(self, req_indices: Tensor, packed: echo.PackedTree) -> Tensor:
        n = int(packed.indptr.diff().max())
        self.step, context = self.store.open(req_indices), self.store.used[req_indices]
        self.past = self.step.get_seq_length()
        inputs = echo.layouts.hugging_face(
            packed, n, context, self.past, left_padded=False, dtype=self.model.dtype
        )
        logits = self.model(
            inputs.input_ids,
            position_ids=inputs.position_ids,
            attention_mask=inputs.attention_mask,
            past_key_values=self.step,
        ).logits
        tokens = self.sampler(
            logits.flatten(0, 1),
            req_indices.repeat_interleave(n),
            inputs.position_ids.flatten() + 1,
        )
        if self.features:
            self.hidden = echo.layouts.unpad(packed, self._features())
        return echo.layouts.unpad(packed, tokens.view(-1, n))

    def compact(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        lists = echo.compact(
            packed, accepted, self.store.used[req_indices], past_len=self.past
        )  # rows lie behind the longest text
        self.store.write(req_indices, self.step, lists.source, lists.target)
        self.store.used[req_indices] = lists.prefix_lens

    def _remember(self, at: int, layer, inputs, output) -> None:
        self.features[at] = output[0] if isinstance(output, tuple) else output

    def _features(self) -> Tensor:
        return torch.cat(list(self.features.values()), dim=-1)


class DraftModel:
    """A smaller causal LM as :class:`echo.Drafter`: it reads what was emitted, then drafts a tree layer by layer over one cache.

    Args:
        model: with the target's tokenizer.
        slots, length: as of the target.
        count: candidates at each node.
    """

    def __init__(self, model, slots: int, length: int, count: int = 4) -> None:
        self.model, self.count, self.store = model, count, SlotCache(slots, length, model.device)
        self.unread: dict[int, list[int]] = {}
        self.step: DynamicCache | None = None  # of the layers drafted in this step

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor) -> None:
        self.store.used[req_indices], self.step = 0, None
        self.unread.update(
            (s, [*p.tolist(), t])
            for s, p, t in zip(req_indices.tolist(), prompts, first.tolist(), strict=True)
        )

    def extend(
        self, req_indices: Tensor, packed: echo.PackedTree, accepted: echo.tree.Accepted
    ) -> None:
        self.step = None
        for slot, tokens, length in zip(
            req_indices.tolist(),
            accepted.tokens.tolist(),
            accepted.num_emitted.tolist(),
            strict=True,
        ):
            self.unread.setdefault(slot, []).extend(tokens[:length])

    def draft(self, req_indices: Tensor, frontier: echo.tree.Frontier) -> tuple[Tensor, Tensor]:
        if self.step is None or frontier.depth == 0:  # the first layer may come from elsewhere
            candidates = self._read(req_indices, frontier.active.any(dim=1))
            self.step, self.sees = (
                self.store.open(req_indices),
                torch.zeros(len(req_indices), 1, 0, dtype=torch.bool, device=req_indices.device),
            )
            if frontier.depth == 0:
                return candidates
        batch, width = frontier.token.shape
        used = self.store.used[req_indices]
        own = torch.eye(width, dtype=torch.bool, device=req_indices.device).expand(batch, -1, -1)
        self.sees = torch.cat(
            [frontier.inherit(self.sees), own], dim=2
        )  # ancestors among the drafted columns, and itself
        prefix = (
            torch.arange(
                self.step.get_seq_length() - self.sees.shape[2] + width, device=req_indices.device
            )
            < used[:, None]
        )
        visible = torch.cat([prefix[:, None].expand(-1, width, -1), self.sees], dim=2)
        position = (used + frontier.depth - 1)[:, None].expand(-1, width)
        mask = additive(visible, self.model.dtype)
        return self._candidates(
            self.model(
                frontier.token,
                position_ids=position,
                attention_mask=mask,
                past_key_values=self.step,
            ).logits
        )

    def _read(self, slots: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """Reads the text that came since the last time; what follows it is the first layer. Who does not draft is left for later."""
        tokens = torch.zeros(len(slots), 1, self.count, dtype=torch.int64, device=slots.device)
        log_probs, readers = (
            torch.full(tokens.shape, -torch.inf, dtype=torch.float32, device=slots.device),
            slots[active],
        )
        if len(readers):
            texts = [
                torch.tensor(self.unread[slot], device=slots.device) for slot in readers.tolist()
            ]
            self.unread.update((slot, []) for slot in readers.tolist())
            tokens[active], log_probs[active] = self._candidates(
                self.store.read(readers, texts, self.model).logits
            )
        return tokens, log_probs

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        top = logits.float().log_softmax(dim=-1).topk(self.count, dim=-1)
        return top.indices, top.values


def load(folder: Path, dtype: str, device: str):
    """A causal LM in evaluation mode."""
    model = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval().to(device)
    )
    if getattr(model.config, "sliding_window", None) and getattr(
        model.config, "use_sliding_window", True
    ):
        raise SystemExit(
            f"{folder}: its layers forget what is far behind (sliding window); expected full attention"
        )
    return model


def pair(
    target_model,
    draft: Path | None,
    slots: int,
    length: int,
    sampler: Sampler,
    dtype: str = "float32",
):
    """The target, and its drafter: a folder with a model, a file with a head, or None."""
    if draft is None:
        return Target(target_model, sampler, slots, length), None
    if draft.is_dir():
        return Target(target_model, sampler, slots, length), DraftModel(
            load(draft, dtype, target_model.device), slots, length
        )
    sys.path.insert(0, str(SMOLLM2))
    from drafters import pooled
    from model import FEATURE_LAYERS

    target = Target(target_model, sampler, slots, length, FEATURE_LAYERS)
    return target, pooled(target, slots, length, weights=draft)


def warm_up(
    target: Target, drafter: echo.Drafter, prompts: Sequence[Tensor], depth: int, bar: Progress
) -> tuple[echo.WarmupLog, float]:
    """Rows of some steps drafted without a gate, every layer's best verified; and the seconds of a drafted layer."""
    slots, total = len(target.store.used), 32 * len(prompts)
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(4, 0), budget=(4 * depth + 1) * slots, max_depth=depth
    )
    task, logs, drafting, layers = bar.add_task("warm-up", total=total), [], 0.0, 0
    options = {
        "max_num_reqs": slots,
        "max_new_tokens": 32,
        "eos_token": target.model.generation_config.eos_token_id,
    }
    for step in echo.decode(
        scheduler, target, drafter, prompts, **options, device=target.model.device
    ):
        logs.append(step.log())
        drafting, layers = (
            drafting + step.seconds.draft + step.seconds.scheduling,
            layers + step.tree.depth,
        )
        bar.advance(task, sum(map(len, step.emitted)))
    bar.update(task, completed=total)
    return echo.WarmupLog.concat(logs), drafting / layers


def measure(target: Target, bar: Progress) -> tuple:
    """Samples of the machine's curve: seconds of a forward pass by its rows."""
    counts = (1, 2, 4, 8, 16, 32, 64)
    task, model = bar.add_task("cost curve", total=4 * len(counts)), target.model
    heads = [(k[:1, :, :64], v[:1, :, :64]) for k, v in target.store.layers]

    def step(rows: int) -> None:
        ids = torch.full((1, rows), 1, device=model.device)
        model(ids, past_key_values=DynamicCache(heads))
        bar.advance(task)

    return echo.cost.profile(step, counts, repeats=3, device=model.device)


def schedule(
    policy: str,
    target: Target,
    drafter,
    prompts: Sequence[Tensor],
    rows: int,
    depth: int,
    bar: Progress,
):
    """The scheduler of a policy; those that need figures get them from a warm-up on the prompts."""
    beam = 4
    if policy == "plain":
        return echo.ElasticBudgetScheduler.autoregressive()
    if policy == "eagle":
        return echo.ElasticBudgetScheduler.eagle(
            max_verify_tokens_per_req=rows, beam=beam, max_depth=depth
        )
    if policy == "ddd":
        gate = echo.BeamMassGate(tuple(range(2, depth)), -1.0, beam)
        return echo.ElasticBudgetScheduler(
            echo.PerRequest(rows, beam), gate, None, depth, max_verify_tokens_per_req=max(64, rows)
        )
    log, layer = warm_up(target, drafter, prompts, depth, bar)
    calibration = echo.calibrate(log, min_rows=20)
    if policy == "goodput":
        cost = echo.CostModel.from_samples(*measure(target, bar), draft_layer=layer)
        return echo.ElasticBudgetScheduler.throughput_optimal(calibration, cost, beam=beam)
    budget = rows * len(target.store.used)
    if policy == "echo":
        return echo.ElasticBudgetScheduler.paper(calibration, k_max=budget, beam=2)
    return echo.ElasticBudgetScheduler(echo.GlobalRank(beam, calibration), None, budget, depth)


def stream(
    steps,
    questions: Sequence[str],
    decode: Callable[[list[int]], str],
    total: int,
    console: Console,
):
    """Shows the answers as they grow; returns their tokens and the counters."""
    answers: list[list[int]] = [[] for _ in questions]
    stats, done = None, 0
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )
    task = bar.add_task("answers", total=total)
    panel = lambda text, tokens: Panel(
        decode(tokens), title=text.splitlines()[0][:70], title_align="left"
    )
    show = lambda: Group(
        *(panel(*pair) for pair in zip(questions, answers, strict=True) if pair[1]), bar
    )
    with Live(console=console, get_renderable=show, refresh_per_second=8):
        for step in steps:
            stats = (stats or echo.StepStats.empty(step.req_indices.device)).observe(
                step.packed, step.accepted
            )
            for request, tokens in zip(step.requests, step.emitted, strict=True):
                answers[request] += tokens
            done += len(step.finished)
            bar.update(task, completed=done)
    return answers, stats.read()


def answer(args: argparse.Namespace, questions: Sequence[str]) -> list[list[int]]:
    """Loads, warms up, decodes and shows."""
    console, model = Console(), load(args.target, args.dtype, args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.target)
    prompts = encode(tokenizer, questions)
    slots, length = (
        min(args.batch, len(prompts)),
        max(map(len, prompts)) + max(args.new, 32) + args.depth + 1,
    )
    sampler = lambda: Sampler(slots, length, args.temperature, args.seed)
    target, drafter = pair(model, args.draft, slots, length, sampler(), args.dtype)
    with Progress(console=console, transient=True) as bar:
        scheduler = schedule(args.policy, target, drafter, prompts, args.rows, args.depth, bar)
    target.sampler = sampler()  # the warm-up has used numbers up
    begin = time.perf_counter()
    steps = echo.decode(
        scheduler, target, drafter if scheduler.max_depth else None, prompts, max_num_reqs=slots, max_new_tokens=args.new,
        eos_token=model.generation_config.eos_token_id, device=args.device,
    )  # fmt: skip
    answers, counts = stream(
        steps,
        questions,
        lambda tokens: tokenizer.decode(tokens, skip_special_tokens=True),
        len(prompts),
        console,
    )
    total, seconds = sum(map(len, answers)), time.perf_counter() - begin
    console.print(
        f"\n{args.policy}: {total} tokens, {total / seconds:.1f} a second, {counts.tokens_per_step:.2f} a step\n{counts}"
    )
    return answers


def main(arguments: Sequence[str] | None = None) -> list[list[int]]:
    """Answers the prompts; returns the answers' tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", type=Path, required=True, help="folder of a causal LM")
    parser.add_argument(
        "--draft",
        type=Path,
        help="folder of a smaller one with the same tokenizer, or a head's .safetensors",
    )
    parser.add_argument("--prompt", action="append", default=[])
    parser.add_argument("--prompts", type=Path, help="file with a prompt on each line")
    parser.add_argument("--policy", choices=POLICIES, default="echo")
    parser.add_argument("--batch", type=int, default=8, help="prompts answered together")
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer at most")
    parser.add_argument(
        "--rows",
        type=int,
        default=6,
        help="rows that a prompt gets in a step, on average where they are shared",
    )
    parser.add_argument("--depth", type=int, default=4, help="layers drafted at most")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    if args.draft is None and args.policy != "plain":
        parser.error(f"--policy {args.policy} needs a --draft")
    questions = args.prompt + (args.prompts.read_text().splitlines() if args.prompts else [])
    questions = [text for text in questions if text.strip()] or [
        "Why is the sky blue?",
        "Write a Python function that adds two numbers.",
    ]
    with torch.inference_mode(), torch.device(args.device):
        return answer(args, questions)


def encode(tokenizer, questions: Sequence[str]) -> list[Tensor]:
    """Token ids int64, through the chat template where the model has one."""
    if tokenizer.chat_template:
        chat = lambda text: tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return [
            torch.tensor(tokenizer(chat(text), add_special_tokens=False)["input_ids"])
            for text in questions
        ]
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in questions]


if __name__ == "__main__":
    main()
