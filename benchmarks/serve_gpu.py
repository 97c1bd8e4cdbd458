"""A real model on the engine of examples/engine.py, with speculation and without, and a shape of eight billion weights. No network.

    python benchmarks/serve_gpu.py                                   on a CUDA device, into benchmarks/results/serve-<card>.json and .png
    python benchmarks/serve_gpu.py --device cpu --lanes 1 2 --new 8  a rehearsal, graphs too; --tiny takes random models of a few layers

First panel: SmolLM2 with its EAGLE head, greedy. All policies of a load share the target's cache, buffers and graphs, and each begins
where prefill ended. A run counts from its first report until ``--new`` tokens a lane are written, and no request ends before: all lanes
are busy. Runs of the policies take turns; figures are medians, intervals smallest and largest. Times of parts and waits are a run of
their own, between events of the device. Text is compared with plain decoding's of the same load; in float32 it may differ from where
that one's two best logits are within 1e-4.

Second panel: a LLaMA-3.1-8B shape. Its weights are random, so nothing is decoded: recorded drafts (SmolLM2's) are replayed, and each
step is charged what its target pass, drafted layers and planning took on this device.

The file is written as the run goes. Every tier of rows is capped, and what the time limit cuts is missing from the end.
"""

from __future__ import annotations

import argparse
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
from echo.testing import Trace
from echo.testing.rehearsal import RecordedGraphs

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "smollm2")]
from engine import Engine, causal  # noqa: E402

import llama  # noqa: E402
from graph_eagle import GraphEagle  # noqa: E402
from head import FEATURE_LAYERS  # noqa: E402

NEAR = 1e-4
"""In float32, sums in another order may choose the other of two logits that are closer."""
LENGTH, CANDIDATES, BEAM, DEPTH = 320, 4, 4, 6
ROOM = 2
"""Times the tokens of a run that a request may write: those that accept more than others are ahead when it is over."""
MOST = 2048
"""Rows of a step at most, and 32 a lane: a tree that asks for more is left out."""
QUICK = (1, 8)
STEPS = {1: 200, 4: 120, 16: 80, 64: 50, 256: 30}
Scheduler = echo.ElasticBudgetScheduler


def cap(lanes: int) -> int:
    """Rows of a step at most."""
    return max(2 * lanes, min(32 * lanes, MOST))


def fits(scheduler: Scheduler, lanes: int) -> bool:
    """Whether the policy's rows are no more than :func:`cap`."""
    return (scheduler.rule.default_budget(lanes) or 0) <= cap(lanes)


def tiers(lanes: int, few: bool = False) -> list[int]:
    """Rows that are measured: 1, 2, 3, 4, 6, 8, 12, ... for each lane; with ``few`` every third of them."""
    each = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
    return [lanes * n for n in each[:: 3 if few else 1] if lanes * n <= cap(lanes)]


def policies(
    lanes: int, calibration: echo.Calibration, cost: echo.CostModel
) -> dict[str, Scheduler]:
    """By name; the last is one configuration for all loads, the others' budgets are what a step of this load holds for little."""
    budget = min(max(cost.at(lanes).knee.k_max, 2 * lanes), cap(lanes))
    made = {
        "plain": Scheduler.autoregressive(),
        "EAGLE tree, 8 rows": Scheduler.eagle(max_verify_tokens_per_req=8, beam=BEAM, max_depth=4),
        "EAGLE tree, 32 rows": Scheduler.eagle(
            max_verify_tokens_per_req=32, beam=BEAM, max_depth=DEPTH
        ),
        "ECHO": replace(Scheduler.paper(calibration, k_max=budget), max_depth=DEPTH),
        "global ranking": Scheduler(echo.GlobalRank(BEAM, calibration), None, budget, DEPTH),
        "throughput-optimal": Scheduler(echo.GlobalRank(BEAM, calibration), None, cost, DEPTH),
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
    """Median seconds of a call, between events of the device; the first calls compile and capture. Once on the host's clock elsewhere."""
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
    """A number of lanes of one model: its cache, prefilled once, and an engine for each policy over the same buffers and graphs.

    Args:
        model: from :mod:`llama`.
        lanes: requests at once.
        prompts: int64 token ids of each lane.
        new: tokens of each answer.
        features: layers that the drafter reads.
        fused: see :class:`GraphEagle`.
    """

    def __init__(
        self,
        model: Any,
        lanes: int,
        prompts: Sequence[Tensor],
        new: int,
        features: Sequence[int],
        fused: bool | None = None,
    ) -> None:
        self.model, self.lanes, self.prompts, self.new, self.features, self.fused = (
            model,
            lanes,
            prompts,
            new,
            tuple(features),
            fused,
        )
        self.device = model.device
        self.graphs = (
            echo.workspace.Graphs(self.device) if self.device.type == "cuda" else RecordedGraphs()
        )
        self.first: Engine | None = None
        self.drafter: GraphEagle | None = None
        self.engines: dict[str, Engine] = {}

    def engine(self, scheduler: Scheduler) -> Engine:
        """The policy's engine; the first one's cache, buffers and graphs are all engines'."""
        key = repr(scheduler)
        if key not in self.engines:
            drafts = scheduler.max_depth > 0
            self.engines[key] = Engine(
                self.model, scheduler, self._drafter if drafts else None, lanes=self.lanes, pages=self.lanes * -(-LENGTH // 16) + 1,
                length=LENGTH, rows=cap(self.lanes), candidates=CANDIDATES, features=self.features if drafts else (), like=self.first,
                graphs=self.graphs,
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
            assert len(prompt) + ROOM * self.new + DEPTH < LENGTH and cache.reserve(lane, LENGTH)
            engine.admit(lane, prompt, ROOM * self.new)
        synchronize(self.device)
        self.first, self.firsts = engine, [int(engine.first[lane]) for lane in range(self.lanes)]
        self.pool = list(cache.free), dict(cache.owned)
        state = [
            cache.table,
            cache.context,
            drafter.used,
            drafter.root,
            drafter.tokens,
            drafter.log_probs,
            drafter.pending,
        ]
        self.saved, self.roots = [(tensor, tensor.clone()) for tensor in state], engine.root.clone()

    @torch.inference_mode()
    def begin(self, engine: Engine) -> None:
        """The engine right after prefill: what was written beyond the prompts is written again."""
        for tensor, value in self.saved:
            tensor.copy_(value)
        engine.cache.free, engine.cache.owned = list(self.pool[0]), dict(self.pool[1])
        engine.root.copy_(self.roots)
        engine.left.fill_(ROOM * self.new - 1)
        engine.slot.copy_(engine.lanes)
        engine.running, engine.places, engine.first = (
            list(range(self.lanes)),
            list(range(self.lanes)),
            {},
        )
        engine.known = engine.scheduler.history(self.lanes, "cpu")
        for name, value in vars(engine.scheduler.history(self.lanes, self.device)).items():
            if isinstance(value, Tensor):
                getattr(engine.space.history, name).copy_(value)
        if engine.drafter is not None:
            engine.drafter.num_unprocessed_tokens = 0
        engine.timed, engine.times = False, {}
        synchronize(self.device)

    @torch.inference_mode()
    def run(self, engine: Engine, timed: bool = False) -> Run:
        """Answers all prompts."""
        self.begin(engine)
        engine.timed = timed
        answers, marks, last, written = [[token] for token in self.firsts], [], None, 0
        while len(engine.running) == self.lanes and (
            not marks or written - marks[0][1] < self.new * self.lanes
        ):
            now = engine.step()
            if last is not None:
                for lane, tokens in engine.read(last):
                    answers[lane] += tokens
                    written += len(tokens)
                marks.append((time.perf_counter(), written))
            last = now
        synchronize(self.device)
        (begin, before), (end, after) = marks[0], marks[-1]
        return Run(answers, after - before, end - begin, len(marks) - 1)

    @torch.inference_mode()
    def bare(self, engine: Engine) -> float:
        """Tokens a second of a loop around plain decoding's graph and nothing else but the tokens' way to the host."""
        self.begin(engine)
        steps, cuda = self.new - 2, self.device.type == "cuda"
        host = [torch.zeros(self.lanes, dtype=torch.int64, pin_memory=cuda) for _ in range(2)]
        events = [torch.cuda.Event() for _ in range(2)] if cuda else []
        begin = 0.0
        for step in range(steps):
            engine.run("plain", (self.lanes,), lambda: engine.without(self.lanes))
            host[step % 2].copy_(engine.root, non_blocking=True)
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
        """Seconds of each part of a step: the target by rows, drafting by layers, planning and acceptance, and the plain step."""
        self.begin(engine)
        engine.left.fill_(1 << 20)
        lanes, space, deep = self.lanes, engine.space, engine.scheduler.max_depth

        def draft(depth: int) -> echo.SuperTree:
            return engine.run("draft", (lanes, depth), lambda: engine.draft(lanes, depth))

        def pack(count: int) -> echo.PackedTree:
            return engine.run("plan", (lanes, deep, count), lambda: space.pack(tree, count))

        seconds, drafting = (
            {},
            {depth: timed(lambda depth=depth: draft(depth), self.device) for depth in (1, deep)},
        )
        for count in rows:
            space.set_num_verify_tokens(count)
            tree = draft(deep)
            packed = pack(count)
            target = lambda: engine.run("target", (lanes, count), lambda: engine.target(packed))  # noqa: B023
            seconds[count] = timed(target, self.device)
        planning = timed(lambda: pack(count), self.device)
        accepting = timed(
            lambda: engine.run("accept", (lanes, count), lambda: engine.accept(packed)), self.device
        )
        self.begin(engine)
        plain = timed(
            lambda: engine.run("plain", (lanes,), lambda: engine.without(lanes)), self.device
        )
        return {
            "lanes": lanes,
            "target": seconds,
            "draft": drafting,
            "draft_layer": max((drafting[deep] - drafting[1]) / (deep - 1), 0.0),
            "plan": planning,
            "accept": accepting,
            "plain": plain,
            "beside": max(drafting[1] + planning + accepting - (plain - seconds[rows[0]]), 0.0),
        }

    @torch.inference_mode()
    def differences(
        self, answers: Sequence[Sequence[int]], plain: Sequence[Sequence[int]]
    ) -> dict[str, int]:
        """How many answers are plain decoding's as far as both go, part from it at a tie, or otherwise."""
        counts = {"same": 0, "ties": 0, "different": 0}
        assert self.first is not None
        for prompt, mine, theirs in zip(self.prompts, answers, plain, strict=True):
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, theirs, strict=False)) if a != b), None
            )
            if at is None:
                counts["same"] += 1
                continue
            text = torch.cat([prompt, prompt.new_tensor(theirs[:at])])
            states = self.first.forward(text, torch.arange(len(text), device=self.device), causal)[
                0
            ]
            best = self.model.lm_head(states[-1:]).float().topk(2).values[0]
            counts["ties" if float(best[0] - best[1]) < NEAR else "different"] += 1
        return counts


def synchronize(device: torch.device) -> None:
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def parts(engine: Engine) -> dict[str, Any]:
    """Milliseconds a step of each part, the rest between them, and the share of the time in which the device had no part to run."""
    synchronize(engine.device)
    origin = next(iter(engine.times.values()))[0][0]
    spans = sorted(
        (origin.elapsed_time(a), origin.elapsed_time(b), name)
        for name, pairs in engine.times.items()
        for a, b in pairs
    )
    steps = max(len(engine.times.get("target", ())) + len(engine.times.get("plain", ())), 1)
    total = spans[-1][1] - spans[0][0]
    busy = sum(end - begin for begin, end, _ in spans)
    by_part = {
        name: sum(end - begin for begin, end, part in spans if part == name) / steps
        for name in engine.times
    }
    return {
        "ms": by_part | {"rest": (total - busy) / steps, "step": total / steps},
        "waits": (total - busy) / total,
        "steps": steps,
    }


def one_cost(found: Sequence[dict[str, Any]]) -> echo.CostModel:
    """What all loads' measurements say together: one configuration."""
    samples = [
        (rows, each["lanes"], seconds) for each in found for rows, seconds in each["target"].items()
    ]
    rows, lanes, seconds = zip(*samples, strict=True)
    # What a speculating step costs beside its layers is spread over four of them.
    layer, row = echo.cost.line(
        [each["lanes"] * BEAM for each in found],
        [max(each["draft_layer"] + each["beside"] / 4, 1e-9) for each in found],
    )
    return echo.CostModel.from_samples(
        rows, seconds, num_reqs=lanes, draft_layer=layer, draft_token=row
    )


def smollm2(args: argparse.Namespace, clock: Clock, out: Out, trace: Trace) -> None:
    """The first panel."""
    device = torch.device(args.device)
    models = {"float32": tiny(device) if args.tiny else llama.load(args.device)}
    models["bfloat16"] = llama.cast(models["float32"], torch.bfloat16)
    features = (1, 2, 3) if args.tiny else FEATURE_LAYERS
    kinds = json.loads((EXAMPLES / "smollm2" / "prompts.json").read_text())["evaluation"]
    texts = [
        torch.tensor(ids, device=device)
        for rows in zip(*kinds.values(), strict=True)
        for ids in rows
    ]
    if args.tiny:
        texts = [ids[:12] % models["float32"].config.vocab_size for ids in texts]
    calibration = calibrate(halves(trace)[0])
    clock.say("the models and prompts are loaded, the calibration made")

    def load(kind: str, lanes: int) -> Load:
        return Load(
            models[kind],
            lanes,
            (texts * -(-lanes // len(texts)))[:lanes],
            args.new,
            features,
            args.fused,
        )

    flat = echo.CostModel((1, MOST), (1.0, 1.0))
    for lanes in args.quick:
        made, rates = load("float32", lanes), {}
        chosen = policies(lanes, calibration, flat)
        names = [
            "EAGLE tree, 8 rows",
            *(["EAGLE tree, 32 rows"] if lanes == 1 else []),
            "plain",
        ]  # a drafting engine prefills
        answers = {}
        for _ in range(3):
            for name in names:
                found = made.run(made.engine(chosen[name]))
                rates.setdefault(name, []).append(found.rate)
                answers[name] = found.answers
        plain = statistics.median(rates["plain"][1:])
        for name in names[:-1]:
            rate = statistics.median(rates[name][1:])
            same = made.differences(answers[name], answers["plain"])
            out.add(
                "quick",
                {
                    "lanes": lanes,
                    "policy": name,
                    "tokens_per_s": rate,
                    "plain": plain,
                    "ratio": rate / plain,
                    "text": same,
                },
            )
            clock.say(
                f"float32, {lanes} lanes, {name}: {rate:.0f} tokens/s, plain {plain:.0f}, ratio {rate / plain:.2f}, text {same}"
            )
        del made

    for turn, kind in enumerate(args.dtypes):
        share_of_time = 0.05 + (0.75 if args.shape else 0.95) * (turn + 1) / len(args.dtypes)
        loads = {lanes: load(kind, lanes) for lanes in args.lanes}
        found = []
        for lanes, made in loads.items():
            engine = made.engine(
                Scheduler(echo.GlobalRank(BEAM, calibration), None, cap(lanes), DEPTH)
            )
            found.append(made.costs(engine, tiers(lanes, args.tiny)))
            out.add("costs", {"dtype": kind, **found[-1]})
            clock.say(f"{kind}, {described(found[-1])}")
            if clock.over(share_of_time):
                break
        cost = one_cost(found)
        out.add("cost_models", {"dtype": kind, "model": json.loads(cost.to_json())})
        loads = {lanes: made for lanes, made in loads.items() if made.first is not None}
        chosen = {lanes: policies(lanes, calibration, cost) for lanes in loads}
        for lanes, made in loads.items():
            for scheduler in chosen[lanes].values():
                if clock.over(share_of_time):
                    break
                made.run(made.engine(scheduler))  # compiles and captures
        cells: dict[tuple[int, str], dict[str, Any]] = {}
        for number in range(args.runs):
            for lanes, made in loads.items():
                if clock.over(share_of_time):
                    break
                turns = list(chosen[lanes].items())
                for name, scheduler in turns[number % len(turns) :] + turns[: number % len(turns)]:
                    run = made.run(made.engine(scheduler))
                    cell = cells.setdefault(
                        (lanes, name), {"dtype": kind, "lanes": lanes, "policy": name, "rates": []}
                    )
                    cell["rates"].append(run.rate)
                    cell["answers"] = run.answers
                    cell["tokens_per_step"] = run.tokens_per_step
                plain = made.engine(chosen[lanes]["plain"])
                cells[lanes, "plain"].setdefault("bare", []).append(made.bare(plain))
            summarize(out, kind, cells)
        for (lanes, name), cell in cells.items():
            made, scheduler = loads[lanes], chosen[lanes][name]
            cell["text"] = made.differences(cell["answers"], cells[lanes, "plain"]["answers"])
            if device.type == "cuda":
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
            clock.say(
                f"{kind} {lanes} lanes: {count} graphs of all policies, {size / 2**20:.1f} MiB in their pool"
            )
        del loads, found


def described(cost: dict[str, Any]) -> str:
    """Measured costs in words."""
    target = ", ".join(f"{rows}: {seconds * 1e3:.2f}" for rows, seconds in cost["target"].items())
    layer, beside = (1e3 * cost[name] for name in ("draft_layer", "beside"))
    return f"{cost['lanes']} lanes: target by rows {target} ms; a drafted layer {layer:.3f} ms, planning and the rest {beside:.3f} ms"


def summarize(out: Out, kind: str, cells: dict[tuple[int, str], dict[str, Any]]) -> None:
    """Puts the cells so far into the file, without texts, with medians and ratios."""
    kept = [cell for cell in out.found.get("cells", []) if cell["dtype"] != kind]
    for (lanes, _), cell in cells.items():
        plain = cells.get((lanes, "plain"))
        rate = statistics.median(cell["rates"])
        row = {name: value for name, value in cell.items() if name != "answers"} | {
            "tokens_per_s": rate,
            "user": rate / lanes,
        }
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
    text = f"{cell['dtype']}, {cell['lanes']} lanes, {cell['policy']}: {cell['tokens_per_s']:.0f} tokens/s [{low:.0f}, {high:.0f}]"
    text += f", ratio {cell['ratio']:.2f}" if "ratio" in cell else ""
    text += (
        f", {cell['library_over_bare']:.3f} of the bare loop" if "library_over_bare" in cell else ""
    )
    text += (
        f", ms { ({k: round(v, 3) for k, v in cell['ms'].items()}) }, waits {cell['waits']:.1%}"
        if "ms" in cell
        else ""
    )
    return text + (f", text {cell['text']}" if "text" in cell else "")


def tiny(device: torch.device) -> llama.Llama:
    """A random model of three layers that the head's weights fit."""
    config = SimpleNamespace(
        hidden_size=576, intermediate_size=64, num_hidden_layers=3, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
        vocab_size=49152, rms_norm_eps=1e-5, rope_theta=1e5, eos_token_id=2,
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
    """Layers with a cache of their own, the others' in turn: together far beyond the device's cache."""
    draft_vocab: int = 32000


class Random:
    """A model of a shape with random weights: what its passes take does not depend on them."""

    def __init__(self, shape: Shape, lanes: int, device: torch.device) -> None:
        self.shape, self.device, s = shape, device, shape
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        weight = lambda *sizes: torch.empty(*sizes, device=device, dtype=self.dtype).normal_(
            0, 0.02
        )
        self.layers = [
            {
                "qkv": weight((s.heads + 2 * s.kv_heads) * s.size, s.width), "out": weight(s.width, s.heads * s.size),
                "up": weight(2 * s.hidden, s.width), "down": weight(s.width, s.hidden), "norms": weight(2, s.width),
            }
            for _ in range(s.layers)
        ]  # fmt: skip
        self.embed, self.head, self.norm = (
            weight(s.vocab, s.width),
            weight(s.vocab, s.width),
            weight(s.width),
        )
        pages = lanes * s.context // s.page
        self.kv = [
            torch.randn(2, pages, s.page, s.kv_heads, s.size, device=device, dtype=self.dtype)
            for _ in range(s.distinct)
        ]
        self.table = torch.arange(pages, device=device, dtype=torch.int32).view(lanes, -1)

    def inputs(self, lanes: int, rows: int) -> SimpleNamespace:
        """Rows shared evenly, each lane's a chain."""
        each = torch.full((lanes,), rows // lanes)
        each[: rows % lanes] += 1
        indptr = F.pad(each.cumsum(0), (1, 0))
        request = torch.repeat_interleave(torch.arange(lanes), each)
        bits = (
            (torch.arange(rows) - indptr[request])[:, None]
            + 1
            - 32 * torch.arange(-(-int(each.max()) // 32))
        )
        mask = (1 << bits.clamp(0, 32)) - 1
        mask = torch.where(mask >= 2**31, mask - 2**32, mask)
        tokens = torch.randint(0, self.shape.vocab, (rows,), device=self.device)
        ints = [x.int().to(self.device) for x in (request, indptr, mask)]
        context = torch.full(
            (lanes,), self.shape.context - self.shape.page, device=self.device, dtype=torch.int32
        )
        return SimpleNamespace(
            tokens=tokens,
            request=ints[0],
            indptr=ints[1],
            mask=ints[2],
            table=self.table[:lanes],
            context=context,
        )

    def forward(self, rows: SimpleNamespace, layers: int, vocab: int) -> Tensor:
        """A pass through so many layers and so much of the output layer."""
        s, x, norm = (
            self.shape,
            self.embed[rows.tokens],
            lambda x, weight: F.rms_norm(x, (self.shape.width,), weight),
        )
        q, k = (x.new_empty(len(x), n, s.size) for n in (s.heads, s.kv_heads))
        plan = kernels.plan_attention(q, self.kv[0][0], rows.table, rows.context, k, rows.indptr)
        for index, layer in enumerate(self.layers[:layers]):
            keys, values = self.kv[index % s.distinct]
            q, k, v = (
                F.linear(norm(x, layer["norms"][0]), layer["qkv"])
                .view(len(x), -1, s.size)
                .split([s.heads, s.kv_heads, s.kv_heads], 1)
            )
            tree = k, v, rows.request, rows.indptr, rows.mask
            x = x + F.linear(
                kernels.tree_attention(q, keys, values, rows.table, rows.context, *tree, plan=plan)[
                    0
                ].flatten(1),
                layer["out"],
            )
            gate, up = F.linear(norm(x, layer["norms"][1]), layer["up"]).chunk(2, dim=-1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        return kernels.argmax_tokens(F.linear(norm(x, self.norm), self.head[:vocab]))


def eight_billion(args: argparse.Namespace, clock: Clock, out: Out, trace: Trace) -> None:
    """The second panel."""
    device = torch.device(args.device)
    small = Shape(2, 64, 4, 2, 16, 96, 256, 64, 16, 2, 128)
    model = Random(
        Shape() if device.type == "cuda" and not args.tiny else small, max(args.lanes), device
    )
    graphs, tune, test = echo.workspace.Graphs(device), *halves(trace)
    calibration = calibrate(tune)

    @torch.inference_mode()
    def seconds(lanes: int, rows: int, layers: int, vocab: int) -> float:
        given = model.inputs(lanes, rows)
        return timed(
            lambda: graphs(
                (lanes, rows, layers, vocab), lambda: model.forward(given, layers, vocab)
            ),
            device,
            10,
        )

    found = []
    for lanes in args.lanes:
        if clock.over(0.95):
            break
        target = {
            rows: seconds(lanes, rows, model.shape.layers, model.shape.vocab)
            for rows in tiers(lanes, args.tiny)
        }
        layer = seconds(lanes, BEAM * lanes, 1, model.shape.draft_vocab)  # a head of one layer
        of_small = [cost for cost in out.found.get("costs", []) if cost["lanes"] == lanes]
        beside = of_small[-1]["plan"] + of_small[-1]["accept"] if of_small else 0.0
        found.append({"lanes": lanes, "target": target, "draft_layer": layer, "beside": beside})
        out.add("shape_costs", found[-1])
        clock.say(f"8B shape, {described(found[-1])}")
    if not found:
        return
    one = one_cost(found)
    for each in found:
        lanes = each["lanes"]
        rows, spent = zip(*each["target"].items(), strict=True)
        spent = tuple(max(spent[: i + 1]) for i in range(len(spent)))
        here = echo.CostModel(
            rows, spent, draft_layer=each["draft_layer"] + each["beside"] / 4, tiers=rows
        )
        for name, scheduler in policies(lanes, calibration, one).items():
            if scheduler.max_depth == 0:
                rate, ratio, low, high = lanes / here(lanes), 1.0, 1.0, 1.0
            else:
                steps = replayed(test, scheduler, here, lanes, STEPS.get(lanes, 40), lag=1)
                rate, ratio, (low, high) = steps.rate(here), steps.ratio(here), steps.interval(here)
            row = {
                "lanes": lanes,
                "policy": name,
                "tokens_per_s": rate,
                "user": rate / lanes,
                "ratio": ratio,
                "low": low,
                "high": high,
            }
            out.add("shape", row)
            clock.say(
                f"8B shape with recorded drafts, {lanes} lanes, {name}: {rate:.0f} tokens/s, ratio {ratio:.2f} [{low:.2f}, {high:.2f}]"
            )


def draw(found: dict[str, Any], path: Path) -> None:
    """Tokens a second of a user against those of the GPU, a line a policy."""
    panels = [
        (
            f"SmolLM2-135M, {kind}",
            [cell for cell in found.get("cells", []) if cell["dtype"] == kind],
        )
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
                own = sorted(
                    (cell for cell in cells if cell["policy"] == name),
                    key=lambda cell: cell["lanes"],
                )
                colour = plot.of(name)
                dash = "o--" if name in ("plain", "EAGLE tree, 32 rows") else "o-"
                axis.plot(
                    [c["user"] for c in own],
                    [c["tokens_per_s"] for c in own],
                    dash,
                    ms=3,
                    color=colour,
                    label=name,
                )
                for cell in own:
                    rates = cell.get("rates", [])
                    if rates:
                        axis.plot(
                            [min(rates) / cell["lanes"], max(rates) / cell["lanes"]],
                            [min(rates), max(rates)],
                            color=colour,
                            lw=3,
                            alpha=0.3,
                        )
            axis.set(
                title=title, xlabel="tokens/s of a user", ylabel="tokens/s of the GPU", yscale="log"
            )
        axes[-1].legend()
        figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--lanes", type=int, nargs="+", default=[1, 4, 16, 64, 256])
    parser.add_argument(
        "--quick",
        type=int,
        nargs="*",
        default=None,
        help=f"loads of the first ratios; {QUICK} where not given",
    )
    parser.add_argument("--new", type=int, default=96, help="tokens of an answer")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--limit", type=float, default=285, help="seconds of all")
    parser.add_argument(
        "--tiny",
        action="store_true",
        help="random models of a few layers: the script alone is tried",
    )
    parser.add_argument(
        "--unfused",
        dest="fused",
        action="store_false",
        default=None,
        help="the drafter in torch's operations",
    )
    parser.add_argument(
        "--no-shape", dest="shape", action="store_false", help="without the second panel"
    )
    parser.add_argument("--trace", type=Path, default=HERE / "traces" / "smollm2-head.npz")
    parser.add_argument("--out", type=Path, default=HERE / "results")
    args = parser.parse_args()
    if args.quick is None:
        args.quick = (
            list(QUICK) if args.device == "cuda" else sorted({args.lanes[0], args.lanes[-1]})
        )
    return args


def main() -> int:
    """Both panels, the file, the figure."""
    args = arguments()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: --device cpu rehearses")
        return 2
    clock = Clock(args.limit)
    card = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": sys.version.split()[0],
    }
    settings = {
        name: getattr(args, name) for name in ("lanes", "new", "runs", "tiny", "limit", "fused")
    }
    name = card.lower().replace(" ", "-")
    out = Out(
        args.out / f"serve-{name}.json",
        card=card,
        versions=versions,
        dtypes=args.dtypes,
        settings=settings,
    )
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
