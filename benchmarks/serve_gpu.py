"""A real model on examples/engine.py, with speculation and without, and a LLaMA-3.1-8B shape.

    python benchmarks/serve_gpu.py                                   # CUDA: results/serve-<card>.*
    python benchmarks/serve_gpu.py --device cpu --lanes 1 2 --new 8  # a rehearsal, graphs too
    python benchmarks/serve_gpu.py --device cpu --tiny               # random models of a few layers

First panel: SmolLM2 with its EAGLE head, greedy. All policies of a load share one cache, buffers
and graphs, and each begins where prefill ended. A run counts from its first output until
``--new`` tokens a lane are written, and no request ends before: all lanes are busy. Policies take
turns; figures are medians, intervals smallest and largest. Times of parts and waits are a run of
their own, between CUDA events. Text is compared with plain decoding's of the same load; in
float32 it may differ where that one's two best logits are within 1e-4.

Second panel: the shape's weights are random, so nothing is decoded: recorded drafts (SmolLM2's) are
replayed, and a step is charged what its verify pass, drafted layers and scheduling took here.

The file is written as the run goes; what the time limit cuts is missing from the end. Network:
none.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import echo
from common.replays import calibrate, halves
from common.replays import run as replayed
from echo import kernels, plot
from echo.testing import RecordedGraphs, Trace

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "smollm2")]
from engine import PAGE_SIZE, Engine, causal  # noqa: E402

import llama  # noqa: E402
from graph_eagle import GraphEagle  # noqa: E402
from head import FEATURE_LAYERS  # noqa: E402

NEAR = 1e-4
"""In float32, sums in another order may choose the other of two logits that are closer."""
LENGTH, CANDIDATES, BEAM, DEPTH = 320, 4, 4, 6
SLACK = 2
"""Times ``--new`` that a request may write: those that accept more are ahead when a run is over."""
MAX_ROWS = 2048
"""Of a step, and 32 a lane: a tree that asks for more is left out."""
QUICK = (1, 8)
STEPS = {1: 200, 4: 120, 16: 80, 64: 50, 256: 30}
Scheduler = echo.ElasticBudgetScheduler


def cap(lanes: int) -> int:
    """Rows of a step at most."""
    return max(2 * lanes, min(32 * lanes, MAX_ROWS))


def fits(scheduler: Scheduler, lanes: int) -> bool:
    """Whether the policy's rows are no more than :func:`cap`."""
    return (scheduler.rule.default_budget(lanes) or 0) <= cap(lanes)


def tiers(lanes: int, few: bool = False) -> list[int]:
    """Rows to measure: 1, 2, 3, 4, 6, 8, 12, ... a lane; with ``few`` every third of them."""
    each = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    return [lanes * n for n in each[:: 3 if few else 1] if lanes * n <= cap(lanes)]


def policies(
    lanes: int, calibration: echo.Calibration, cost: echo.CostModel
) -> dict[str, Scheduler]:
    """By name; the last two are one configuration for all loads, other budgets are this load's."""
    budget = min(max(cost.at(lanes).knee.k_max, 2 * lanes), cap(lanes))
    ranking, eagle = (
        echo.GlobalRank(BEAM, calibration),
        functools.partial(Scheduler.eagle, beam=BEAM),
    )
    made = {
        "plain": Scheduler.autoregressive(),
        "EAGLE tree, 8 rows": eagle(max_verify_tokens_per_req=8, max_depth=4),
        "EAGLE tree, 32 rows": eagle(max_verify_tokens_per_req=32, max_depth=DEPTH),
        "ECHO": replace(Scheduler.paper(calibration, k_max=budget), max_depth=DEPTH),
        "global ranking": Scheduler(ranking, None, budget, DEPTH),
        "throughput-optimal": Scheduler(ranking, None, cost, DEPTH),
        "throughput-optimal, trimmed": Scheduler(ranking, None, cost, DEPTH, trims=True),
    }
    return {name: scheduler for name, scheduler in made.items() if fits(scheduler, lanes)}


class Clock:
    """Seconds since the start, and whether time is up."""

    def __init__(self, limit: float) -> None:
        self.start, self.limit = time.perf_counter(), limit

    def __call__(self) -> float:
        return time.perf_counter() - self.start

    def over(self, share: float = 1.0) -> bool:
        """Whether that share of the limit is spent."""
        return self() > share * self.limit

    def say(self, text: str) -> None:
        """Prints it with the time."""
        print(f"[{self():5.1f} s] {text}", flush=True)


class Out:
    """The result file, written anew after every addition."""

    def __init__(self, path: Path, **head: Any) -> None:
        self.path, self.found = path, head
        path.parent.mkdir(parents=True, exist_ok=True)
        self.write()

    def add(self, key: str, value: Any) -> None:
        """Appends to the list ``key``."""
        self.found.setdefault(key, []).append(value)
        self.write()

    def write(self) -> None:
        """A whole file at any time."""
        fresh = self.path.with_suffix(".part")
        fresh.write_text(json.dumps(self.found, indent=1))
        fresh.replace(self.path)


def timed(call: Callable[[], Any], device: torch.device, repeats: int = 20) -> float:
    """Median seconds of a call between CUDA events, after calls that compile and capture.

    On a CPU once, on the host's clock.
    """
    for _ in range(3 if device.type == "cuda" else 1):
        call()
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    for mark in marks[:-1]:
        mark.record()
        call()
    marks[-1].record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


@dataclass
class Run:
    """What a run wrote and how fast.

    Attributes:
        answers: tokens by lane.
        tokens, seconds, steps: while all of them wrote.
    """

    answers: list[list[int]]
    tokens: int
    seconds: float
    steps: int

    @property
    def rate(self) -> float:
        """Tokens a second of all lanes together."""
        return self.tokens / self.seconds

    @property
    def tokens_per_step(self) -> float:
        """Tokens a request and step."""
        return self.tokens / self.steps / len(self.answers)


class Load:
    """Lanes of one model: a cache, prefilled once, and an engine for each policy that shares it.

    Args:
        model: from :mod:`llama`.
        prompts: int64 token ids of each lane.
        new: tokens of each answer.
        feature_layers: as of :class:`Engine`.
        fused: as of :class:`GraphEagle`.
    """

    def __init__(
        self, model: Any, prompts: Sequence[Tensor], new: int, feature_layers: Sequence[int],
        fused: bool | None = None,
    ) -> None:  # fmt: skip
        self.model, self.lanes, self.prompts, self.new = model, len(prompts), prompts, new
        self.feature_layers, self.fused, self.device = tuple(feature_layers), fused, model.device
        cuda = self.device.type == "cuda"
        self.graphs = echo.workspace.Graphs(self.device) if cuda else RecordedGraphs()
        self.first: Engine | None = None
        self.drafter: GraphEagle | None = None
        self.engines: dict[str, Engine] = {}

    def engine(self, scheduler: Scheduler) -> Engine:
        """The policy's engine; the first one's cache, buffers and graphs are all engines'."""
        key = repr(scheduler)
        if key not in self.engines:
            drafts = scheduler.max_depth > 0
            self.engines[key] = Engine(
                self.model, scheduler, self._drafter if drafts else None, max_num_reqs=self.lanes,
                num_pages=self.lanes * -(-LENGTH // PAGE_SIZE) + 1, max_model_len=LENGTH,
                max_verify_tokens=cap(self.lanes), k=CANDIDATES, shared=self.first,
                feature_layers=self.feature_layers if drafts else (), graphs=self.graphs,
            )  # fmt: skip
            if self.first is None:
                self._prefill(self.engines[key])
        return self.engines[key]

    def _drafter(self, engine: Engine) -> GraphEagle:
        if self.drafter is None:
            options = {"beam": BEAM, "depth": DEPTH, "dtype": self.model.dtype, "fused": self.fused}
            self.drafter = GraphEagle(self.model, self.lanes, LENGTH, CANDIDATES, **options)
        return self.drafter

    @torch.inference_mode()
    def _prefill(self, engine: Engine) -> None:
        """All prompts, once; keeps what :meth:`begin` restores."""
        cache, drafter = engine.cache, engine.drafter
        for lane, prompt in enumerate(self.prompts):
            assert len(prompt) + SLACK * self.new + DEPTH < LENGTH and cache.allocate(lane, LENGTH)
            engine.admit(lane, prompt, SLACK * self.new)
        synchronize(self.device)
        self.first = engine
        self.first_tokens = [int(engine.first_tokens[lane]) for lane in range(self.lanes)]
        self.pages = list(cache.free_pages), dict(cache.pages)
        head = drafter.used, drafter.root, drafter.tokens, drafter.log_probs, drafter.backlog
        self.saved = [(x, x.clone()) for x in (cache.page_table, cache.prefix_lens, *head)]
        self.roots = engine.root_tokens.clone()

    @torch.inference_mode()
    def begin(self, engine: Engine) -> None:
        """The engine right after prefill: what was written beyond the prompts is written again."""
        for tensor, value in self.saved:
            tensor.copy_(value)
        engine.cache.free_pages, engine.cache.pages = list(self.pages[0]), dict(self.pages[1])
        engine.root_tokens.copy_(self.roots)
        engine.num_remaining.fill_(SLACK * self.new - 1)
        engine.req_indices.copy_(torch.arange(self.lanes))
        engine.running, engine.first_tokens = list(range(self.lanes)), {}
        engine.host_req_indices = list(range(self.lanes))
        engine.host_history = engine.scheduler.history(self.lanes, "cpu")
        for name, value in vars(engine.scheduler.history(self.lanes, self.device)).items():
            if isinstance(value, Tensor):
                getattr(engine.workspace.history, name).copy_(value)
        if engine.drafter is not None:
            engine.drafter.num_unprocessed = 0
        engine.timed, engine.times = False, {}
        synchronize(self.device)

    @torch.inference_mode()
    def run(self, engine: Engine, timed: bool = False) -> Run:
        """Answers all prompts."""
        self.begin(engine)
        engine.timed = timed
        answers, marks, last, written = [[token] for token in self.first_tokens], [], None, 0
        goal = self.new * self.lanes
        while len(engine.running) == self.lanes and not (marks and written - marks[0][1] >= goal):
            output = engine.step()
            if last is not None:
                for lane, tokens in engine.update_from_output(last):
                    answers[lane] += tokens
                    written += len(tokens)
                marks.append((time.perf_counter(), written))
            last = output
        synchronize(self.device)
        (begin, before), (end, after) = marks[0], marks[-1]
        return Run(answers, after - before, end - begin, len(marks) - 1)

    @torch.inference_mode()
    def bare(self, engine: Engine) -> float:
        """Tokens a second of plain decoding's graph in a loop, and the tokens' copy to the host."""
        self.begin(engine)
        steps, cuda = self.new - 2, self.device.type == "cuda"
        host = [torch.zeros(self.lanes, dtype=torch.int64, pin_memory=cuda) for _ in range(2)]
        events = [torch.cuda.Event() for _ in range(2)] if cuda else []
        begin = 0.0
        for step in range(steps):
            engine.run("plain", (self.lanes,), lambda: engine.decode(self.lanes))
            host[step % 2].copy_(engine.root_tokens, non_blocking=True)
            if cuda:
                events[step % 2].record()
                if step:
                    events[1 - step % 2].synchronize()
            if step == 1:
                begin = time.perf_counter()
        synchronize(self.device)
        return self.lanes * (steps - 2) / (time.perf_counter() - begin)

    @torch.inference_mode()
    def costs(self, engine: Engine, rows: Sequence[int]) -> dict[str, Any]:
        """Seconds of each part of a step, of a plain one, of a layer and what is beside it."""
        self.begin(engine)
        engine.num_remaining.fill_(1 << 20)
        lanes, workspace, deep = self.lanes, engine.workspace, engine.scheduler.max_depth
        measure = lambda call: timed(call, self.device)

        def draft(depth: int) -> echo.SuperTree:
            return engine.run("draft", (lanes, depth), lambda: engine.draft(lanes, depth))

        def pack(n: int) -> echo.PackedTree:
            return engine.run("pack", (lanes, deep, n), lambda: workspace.pack(tree, n))

        def verify(n: int) -> None:
            engine.run("verify", (lanes, n), lambda: engine.verify(packed))

        def accept(n: int) -> None:
            engine.run("accept", (lanes, n), lambda: engine.accept(packed))

        drafting, seconds = {d: measure(lambda d=d: draft(d)) for d in (1, deep)}, {}
        for n in rows:
            workspace.set_num_verify_tokens(n)
            tree = draft(deep)
            packed = pack(n)
            seconds[n] = measure(functools.partial(verify, n))
        packing, accepting = (measure(functools.partial(part, n)) for part in (pack, accept))
        self.begin(engine)
        plain = measure(lambda: engine.run("plain", (lanes,), lambda: engine.decode(lanes)))
        found = {"lanes": lanes, "verify": seconds, "draft": drafting, "pack": packing}
        beside = drafting[1] + packing + accepting - (plain - seconds[rows[0]])
        layer = (drafting[deep] - drafting[1]) / (deep - 1)
        found |= {"accept": accepting, "plain": plain}
        return found | {"draft_layer": max(layer, 0.0), "beside": max(beside, 0.0)}

    @torch.inference_mode()
    def differences(
        self, answers: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]
    ) -> dict[str, int]:
        """How many answers are plain decoding's as far as both go, part at a tie, or otherwise."""
        counts = {"same": 0, "ties": 0, "different": 0}
        assert self.first is not None
        for prompt, mine, theirs in zip(self.prompts, answers, plain, strict=True):
            pairs = enumerate(zip(mine, theirs, strict=False))
            at = next((i for i, (a, b) in pairs if a != b), None)
            if at is None:
                counts["same"] += 1
                continue
            text = torch.cat([prompt, prompt.new_tensor(theirs[:at])])
            positions = torch.arange(len(text), device=self.device)
            states = self.first.forward(text, positions, causal)[0]
            best = self.model.lm_head(states[-1:]).float().topk(2).values[0]
            counts["ties" if float(best[0] - best[1]) < NEAR else "different"] += 1
        return counts


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parts(engine: Engine) -> dict[str, Any]:
    """Milliseconds a step of each part and between them; the share of time without a part."""
    synchronize(engine.device)
    origin = next(iter(engine.times.values()))[0][0]
    spans = sorted(
        (origin.elapsed_time(a), origin.elapsed_time(b), name)
        for name, pairs in engine.times.items()
        for a, b in pairs
    )
    steps = max(sum(len(engine.times.get(name, ())) for name in ("verify", "plain")), 1)
    total, ms = spans[-1][1] - spans[0][0], dict.fromkeys(engine.times, 0.0)
    for begin, end, name in spans:
        ms[name] += (end - begin) / steps
    rest = total / steps - sum(ms.values())
    ms |= {"rest": rest, "step": total / steps}
    return {"ms": ms, "waits": rest * steps / total, "steps": steps}


def one_cost(found: Sequence[dict[str, Any]]) -> echo.CostModel:
    """One cost model of all loads' measurements."""
    samples = [(n, load["lanes"], spent) for load in found for n, spent in load["verify"].items()]
    rows, lanes, seconds = zip(*samples, strict=True)
    # What a speculative step costs beside its layers is spread over four of them.
    layers = [max(load["draft_layer"] + load["beside"] / 4, 1e-9) for load in found]
    layer, node = echo.cost.line([load["lanes"] * BEAM for load in found], layers)
    drafting = {"draft_layer": layer, "draft_token": node}
    return echo.CostModel.from_samples(rows, seconds, num_reqs=lanes, **drafting)


def smollm2(args: argparse.Namespace, clock: Clock, out: Out, trace: Trace) -> None:
    """The first panel."""
    device = torch.device(args.device)
    models = {"float32": tiny(device) if args.tiny else llama.load(args.device)}
    models["bfloat16"] = llama.cast(models["float32"], torch.bfloat16)
    feature_layers = (1, 2, 3) if args.tiny else FEATURE_LAYERS
    kinds = json.loads((EXAMPLES / "smollm2" / "prompts.json").read_text())["evaluation"]
    rows = itertools.chain(*zip(*kinds.values(), strict=True))
    texts = [torch.tensor(ids, device=device) for ids in rows]
    if args.tiny:
        texts = [ids[:12] % models["float32"].config.vocab_size for ids in texts]
    calibration = calibrate(halves(trace)[0])
    clock.say("the models and prompts are loaded, the calibration made")

    def load(kind: str, lanes: int) -> Load:
        prompts = (texts * -(-lanes // len(texts)))[:lanes]
        return Load(models[kind], prompts, args.new, feature_layers, args.fused)

    first_ratios(args.quick, load, calibration, clock, out)
    for turn, kind in enumerate(args.dtypes):
        share_of_time = 0.05 + (0.75 if args.shape else 0.95) * (turn + 1) / len(args.dtypes)
        over = functools.partial(clock.over, share_of_time)
        sweep(
            kind,
            {lanes: load(kind, lanes) for lanes in args.lanes},
            calibration,
            args,
            over,
            clock,
            out,
        )


def first_ratios(quick: Sequence[int], load: Any, calibration: Any, clock: Clock, out: Out) -> None:
    """Trees of EAGLE against plain decoding in float32, before anything is measured."""
    flat = echo.CostModel((1, MAX_ROWS), (1.0, 1.0))
    for lanes in quick:
        made, rates, answers = load("float32", lanes), {}, {}
        chosen = policies(lanes, calibration, flat)
        wide = ["EAGLE tree, 32 rows"] if lanes == 1 else []
        names = ["EAGLE tree, 8 rows", *wide, "plain"]  # a drafting engine prefills
        for _, name in itertools.product(range(3), names):
            run = made.run(made.engine(chosen[name]))
            rates.setdefault(name, []).append(run.rate)
            answers[name] = run.answers
        plain = statistics.median(rates["plain"][1:])
        for name in names[:-1]:
            rate = statistics.median(rates[name][1:])
            same = made.differences(answers[name], answers["plain"])
            row = {"lanes": lanes, "policy": name, "tokens_per_s": rate, "plain": plain}
            out.add("quick", row | {"ratio": rate / plain, "text": same})
            against = f"plain {plain:.0f}, ratio {rate / plain:.2f}, text {same}"
            clock.say(f"float32, {lanes} lanes, {name}: {rate:.0f} tokens/s, {against}")


def sweep(
    kind: str, loads: dict[int, Load], calibration: echo.Calibration, args: argparse.Namespace,
    over: Callable[[], bool], clock: Clock, out: Out,
) -> None:  # fmt: skip
    """All policies at all loads in one type of weights."""
    found = []
    for lanes, made in loads.items():
        ranking = Scheduler(echo.GlobalRank(BEAM, calibration), None, cap(lanes), DEPTH)
        found.append(made.costs(made.engine(ranking), tiers(lanes, args.tiny)))
        out.add("costs", {"dtype": kind, **found[-1]})
        clock.say(f"{kind}, {described(found[-1])}")
        if over():
            break
    cost = one_cost(found)
    out.add("cost_models", {"dtype": kind, "model": json.loads(cost.to_json())})
    loads = {lanes: made for lanes, made in loads.items() if made.first is not None}
    chosen = {lanes: policies(lanes, calibration, cost) for lanes in loads}
    for lanes, made in loads.items():
        for scheduler in chosen[lanes].values():
            if over():
                break
            made.run(made.engine(scheduler))  # compiles and captures
    cells: dict[tuple[int, str], dict[str, Any]] = {}
    for number in range(args.runs):
        for lanes, made in loads.items():
            if over():
                break
            turns = list(chosen[lanes].items())
            for name, scheduler in turns[number % len(turns) :] + turns[: number % len(turns)]:
                run = made.run(made.engine(scheduler))
                fresh = {"dtype": kind, "lanes": lanes, "policy": name, "rates": []}
                cell = cells.setdefault((lanes, name), fresh)
                cell["rates"].append(run.rate)
                cell |= {"answers": run.answers, "tokens_per_step": run.tokens_per_step}
            plain = made.engine(chosen[lanes]["plain"])
            cells[lanes, "plain"].setdefault("bare", []).append(made.bare(plain))
        summarize(out, kind, cells)
    for (lanes, name), cell in cells.items():
        made, scheduler = loads[lanes], chosen[lanes][name]
        cell["text"] = made.differences(cell["answers"], cells[lanes, "plain"]["answers"])
        if made.device.type == "cuda":
            engine = made.engine(scheduler)
            made.run(engine, timed=True)
            cell.update(parts(engine))
    summarize(out, kind, cells)
    for cell in out.found["cells"]:
        if cell["dtype"] == kind:
            clock.say(line(cell))
    for lanes, made in loads.items():
        count, size = len(made.graphs.captured), made.graphs.nbytes
        out.add("graphs", {"dtype": kind, "lanes": lanes, "graphs": count, "bytes": size})
        pool = f"{size / 2**20:.1f} MiB in their pool"
        clock.say(f"{kind} {lanes} lanes: {count} graphs of all policies, {pool}")


def described(cost: dict[str, Any]) -> str:
    """Measured costs in words."""
    verify = ", ".join(f"{rows}: {1e3 * seconds:.2f}" for rows, seconds in cost["verify"].items())
    layer, beside = (f"{1e3 * cost[name]:.3f} ms" for name in ("draft_layer", "beside"))
    rest = f"a drafted layer {layer}, scheduling and the rest {beside}"
    return f"{cost['lanes']} lanes: verify by rows {verify} ms; {rest}"


def summarize(out: Out, kind: str, cells: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Puts the cells so far into the file, without texts, with medians and ratios."""
    kept = [cell for cell in out.found.get("cells", []) if cell["dtype"] != kind]
    for (lanes, _), cell in cells.items():
        plain = cells.get((lanes, "plain"))
        rate = statistics.median(cell["rates"])
        row = {name: value for name, value in cell.items() if name != "answers"}
        row |= {"tokens_per_s": rate, "user": rate / lanes}
        if plain is not None:
            row["ratio"] = rate / statistics.median(plain["rates"])
        if "bare" in cell:
            row["library_over_bare"] = rate / statistics.median(cell["bare"])
        kept.append(row)
    out.found["cells"] = kept
    out.write()


def line(cell: dict[str, Any]) -> str:
    """A cell in words."""
    low, high = min(cell["rates"]), max(cell["rates"])
    text = f"{cell['dtype']}, {cell['lanes']} lanes, {cell['policy']}: "
    text += f"{cell['tokens_per_s']:.0f} tokens/s [{low:.0f}, {high:.0f}]"
    if "ratio" in cell:
        text += f", ratio {cell['ratio']:.2f}"
    if "library_over_bare" in cell:
        text += f", {cell['library_over_bare']:.3f} of the bare loop"
    if "ms" in cell:
        ms = {name: round(value, 3) for name, value in cell["ms"].items()}
        text += f", ms {ms}, waits {cell['waits']:.1%}"
    return text + (f", text {cell['text']}" if "text" in cell else "")


def tiny(device: torch.device) -> llama.Llama:
    """A random model of three layers that the head's weights fit."""
    config = SimpleNamespace(
        hidden_size=576, intermediate_size=64, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, head_dim=64, vocab_size=49152, rms_norm_eps=1e-5, rope_theta=1e5,
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    return llama.Llama(config).to(device).requires_grad_(False).eval()


@dataclass(frozen=True)
class Shape:
    """Sizes of a LLaMA-like model."""

    layers: int = 32
    width: int = 4096
    heads: int = 32
    kv_heads: int = 8
    size: int = 128
    hidden: int = 14336
    vocab: int = 128256
    context: int = 1024
    page: int = 64
    distinct: int = 8
    """Layers with keys and values of their own, which the others share: far beyond the L2 cache."""
    draft_vocab: int = 32000


class Random:
    """A model of a shape with random weights: what its passes take does not depend on them."""

    def __init__(self, shape: Shape, lanes: int, device: torch.device) -> None:
        self.shape, self.device, s = shape, device, shape
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        kind = {"device": device, "dtype": self.dtype}
        weight = lambda *sizes: torch.empty(*sizes, **kind).normal_(0, 0.02)
        heads = (s.heads + 2 * s.kv_heads) * s.size, s.heads * s.size
        self.layers = [
            {
                "qkv": weight(heads[0], s.width), "out": weight(s.width, heads[1]),
                "up": weight(2 * s.hidden, s.width), "down": weight(s.width, s.hidden),
                "norms": weight(2, s.width),
            }
            for _ in range(s.layers)
        ]  # fmt: skip
        self.embed, self.head = (weight(s.vocab, s.width) for _ in range(2))
        self.norm, pages = weight(s.width), lanes * s.context // s.page
        shape = 2, pages, s.page, s.kv_heads, s.size
        self.kv = [torch.randn(shape, **kind) for _ in range(s.distinct)]
        self.table = torch.arange(pages, device=device, dtype=torch.int32).view(lanes, -1)

    def inputs(self, lanes: int, rows: int) -> SimpleNamespace:
        """Rows shared evenly, each lane's a chain."""
        each = torch.full((lanes,), rows // lanes)
        each[: rows % lanes] += 1
        indptr = F.pad(each.cumsum(0), (1, 0))
        request = torch.repeat_interleave(torch.arange(lanes), each)
        local = torch.arange(rows) - indptr[request]
        bits = local[:, None] + 1 - 32 * torch.arange(-(-int(each.max()) // 32))
        mask = (1 << bits.clamp(0, 32)) - 1
        mask = torch.where(mask >= 2**31, mask - 2**32, mask)
        tokens = torch.randint(0, self.shape.vocab, (rows,), device=self.device)
        parts = {"request": request, "indptr": indptr, "mask": mask}
        ints = {name: x.int().to(self.device) for name, x in parts.items()}
        context = torch.full((lanes,), self.shape.context - self.shape.page).int().to(self.device)
        return SimpleNamespace(tokens=tokens, table=self.table[:lanes], context=context, **ints)

    def forward(self, rows: SimpleNamespace, layers: int, vocab: int) -> Tensor:
        """A pass through so many layers and so much of the output layer."""
        s, x = self.shape, self.embed[rows.tokens]
        norm = lambda x, weight: F.rms_norm(x, (s.width,), weight)
        q, k = (x.new_empty(len(x), n, s.size) for n in (s.heads, s.kv_heads))
        plan = kernels.plan_attention(q, self.kv[0][0], rows.table, rows.context, k, rows.indptr)
        for index, layer in enumerate(self.layers[:layers]):
            qkv = F.linear(norm(x, layer["norms"][0]), layer["qkv"]).view(len(x), -1, s.size)
            q, k, v = qkv.split([s.heads, s.kv_heads, s.kv_heads], 1)
            prefix = *self.kv[index % s.distinct], rows.table, rows.context
            tree = k, v, rows.request, rows.indptr, rows.mask
            attended = kernels.tree_attention(q, *prefix, *tree, plan=plan)[0]
            x = x + F.linear(attended.flatten(1), layer["out"])
            gate, up = F.linear(norm(x, layer["norms"][1]), layer["up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return kernels.argmax_tokens(F.linear(norm(x, self.norm), self.head[:vocab]))


def eight_billion(args: argparse.Namespace, clock: Clock, out: Out, trace: Trace) -> None:
    """The second panel."""
    device = torch.device(args.device)
    large = device.type == "cuda" and not args.tiny
    shape = Shape() if large else Shape(2, 64, 4, 2, 16, 96, 256, 64, 16, 2, 128)
    model = Random(shape, max(args.lanes), device)
    graphs, (tune, test) = echo.workspace.Graphs(device), halves(trace)
    calibration = calibrate(tune)

    @torch.inference_mode()
    def seconds(*key: int) -> float:
        lanes, rows, layers, vocab = key
        given = model.inputs(lanes, rows)
        call = lambda: graphs(key, lambda: model.forward(given, layers, vocab))
        return timed(call, device, 10)

    found = []
    for lanes in args.lanes:
        if clock.over(0.95):
            break
        counts = tiers(lanes, args.tiny)
        verify = {rows: seconds(lanes, rows, shape.layers, shape.vocab) for rows in counts}
        layer = seconds(lanes, BEAM * lanes, 1, shape.draft_vocab)  # a head of one layer
        of_small = [cost for cost in out.found.get("costs", []) if cost["lanes"] == lanes]
        beside = of_small[-1]["pack"] + of_small[-1]["accept"] if of_small else 0.0
        found.append({"lanes": lanes, "verify": verify, "draft_layer": layer, "beside": beside})
        out.add("shape_costs", found[-1])
        clock.say(f"8B shape, {described(found[-1])}")
    if not found:
        return
    one = one_cost(found)
    for load in found:
        lanes = load["lanes"]
        rows, spent = zip(*load["verify"].items(), strict=True)
        spent, layer = tuple(itertools.accumulate(spent, max)), load["draft_layer"]
        cost = echo.CostModel(rows, spent, draft_layer=layer + load["beside"] / 4, tiers=rows)
        for name, scheduler in policies(lanes, calibration, one).items():
            if scheduler.max_depth == 0:
                rate, ratio, low, high = lanes / cost(lanes), 1.0, 1.0, 1.0
            else:
                steps = replayed(test, scheduler, cost, lanes, STEPS.get(lanes, 40), lag=1)
                rate, ratio, (low, high) = steps.rate(cost), steps.ratio(cost), steps.interval(cost)
            row = {"lanes": lanes, "policy": name, "tokens_per_s": rate, "user": rate / lanes}
            out.add("shape", row | {"ratio": ratio, "low": low, "high": high})
            text = f"{rate:.0f} tokens/s, ratio {ratio:.2f} [{low:.2f}, {high:.2f}]"
            clock.say(f"8B shape with recorded drafts, {lanes} lanes, {name}: {text}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Tokens a second of a user against those of the GPU, a line a policy."""
    panels = [
        (f"SmolLM2-135M, {kind}", [c for c in found.get("cells", []) if c["dtype"] == kind])
        for kind in found["dtypes"]
    ]
    panels.append(("LLaMA-3.1-8B shape, recorded drafts", found.get("shape", [])))
    panels = [(title, cells) for title, cells in panels if cells]
    if not panels:
        return
    with plot.figure(3.6 * len(panels), 3.6) as figure:
        axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axis, (title, cells) in zip(axes, panels, strict=True):
            for name in dict.fromkeys(cell["policy"] for cell in cells):
                own = [cell for cell in cells if cell["policy"] == name]
                own.sort(key=lambda cell: cell["lanes"])
                colour = plot.of(name)
                dash = "o--" if name in ("plain", "EAGLE tree, 32 rows") else "o-"
                points = [c["user"] for c in own], [c["tokens_per_s"] for c in own]
                axis.plot(*points, dash, ms=3, color=colour, label=name)
                for cell in own:
                    ends = [end(cell["rates"]) for end in (min, max) if cell.get("rates")]
                    users = [rate / cell["lanes"] for rate in ends]
                    axis.plot(users, ends, color=colour, lw=3, alpha=0.3)
            axis.set(title=title, xlabel="tokens/s of a user", ylabel="tokens/s of the GPU")
            axis.set_yscale("log")
        axes[-1].legend()
        figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """From the command line."""
    text = argparse.RawDescriptionHelpFormatter
    add = (
        parser := argparse.ArgumentParser(description=__doc__, formatter_class=text)
    ).add_argument
    add("--device", default="cuda")
    add("--lanes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    add("--quick", type=int, nargs="*", help=f"loads of the first ratios; {QUICK} by default")
    add("--new", type=int, default=96, help="tokens of an answer")
    add("--runs", type=int, default=5)
    add("--dtypes", nargs="*", default=["float32", "bfloat16"])
    add("--limit", type=float, default=285, help="seconds of all")
    add("--tiny", action="store_true", help="random models of a few layers: a test of the script")
    unfused = {"dest": "fused", "action": "store_false", "default": None}
    add("--unfused", **unfused, help="the drafter in torch's operations")
    add("--no-shape", dest="shape", action="store_false", help="without the second panel")
    add("--trace", type=Path, default=HERE / "traces" / "smollm2-head.npz")
    add("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if args.quick is None:
        cuda = args.device == "cuda"
        args.quick = list(QUICK) if cuda else sorted({args.lanes[0], args.lanes[-1]})
    return args


def main() -> int:
    """Both panels, the file, the figure."""
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu rehearses")
        return 2
    clock = Clock(args.limit)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    python = sys.version.split()[0]
    versions = {"torch": torch.__version__, "cuda": torch.version.cuda, "python": python}
    names = ("lanes", "new", "runs", "tiny", "limit", "fused")
    head = {"card": card, "versions": versions, "dtypes": args.dtypes}
    head["settings"] = {name: getattr(args, name) for name in names}
    name = card.lower().replace(" ", "-")
    out = Out(args.out / f"serve-{name}.json", **head)
    trace = Trace.load(args.trace)
    smollm2(args, clock, out, trace)
    if args.shape:
        eight_billion(args, clock, out, trace)
    out.found["seconds"] = clock()
    out.write()
    try:
        draw(out.found, args.out / f"serve-{name}.png")
    except echo.EchoError as missing:
        print(missing)
    clock.say(f"{out.path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
