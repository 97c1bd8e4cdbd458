"""The drafter for CUDA graphs drafts what the eager head drafts: fixed shapes, sync-free."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import echo
from echo.testing import RecordedGraphs

pytest.importorskip(
    "transformers", reason="the eager head needs the demo extra, on Python 3.11 or later"
)
LANES, LENGTH, COUNT, BEAM, DEPTH, VOCAB, FLOOR = 4, 96, 4, 3, 4, 49152, -20.0


@pytest.fixture(scope="module")
def drafters():
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "smollm2"))
    import graph_eagle
    from drafters import Eagle

    torch.manual_seed(3)
    embedding = torch.randn(VOCAB, 576)
    model = SimpleNamespace(model=SimpleNamespace(embed_tokens=SimpleNamespace(weight=embedding)))

    def make(dtype=torch.float32):
        options = {"beam": BEAM, "depth": DEPTH, "floor": FLOOR, "max_backlog": 40, "dtype": dtype}
        return graph_eagle.GraphEagle(model, LANES, LENGTH, COUNT, **options)

    shared = {dtype: make(dtype) for dtype in (torch.float32, torch.bfloat16)}

    def graph(dtype=torch.float32, fused=False):
        """All buffers as they were at first, the weights shared."""
        made = object.__new__(graph_eagle.GraphEagle)
        weights = ("table", "vocab", "fuse", "qkv", "out", "down", "gate_up", "head")
        for name, value in vars(shared[dtype]).items():
            own = torch.is_tensor(value) and name not in weights
            setattr(made, name, value.clone() if own else value)
        made.fused = fused
        return made

    return SimpleNamespace(
        graph=graph,
        eager=lambda: Eagle(SimpleNamespace(model=model, hidden=None), LANES, LENGTH, COUNT, FLOOR),
    )


class Served:
    """Random texts and a target that accepts half of the drafts, on which both drafters agree."""

    def __init__(self, drafters, seed: int, fused: bool = False) -> None:
        self.eager, self.graph = drafters.eager(), drafters.graph(fused=fused)
        self.scheduler = echo.ElasticBudgetScheduler(
            echo.GlobalRank(BEAM), budget=6 * LANES, max_depth=DEPTH
        )
        self.draw = torch.Generator().manual_seed(seed)
        self.req_indices: list[int] = []  # of the eager head, by lane of the other
        self.roots = torch.zeros(LANES, dtype=torch.int64)
        self.compared, self.emitted = Counter(), 0

    def features(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, 1728, generator=self.draw)

    def random(self, low: int, high: int) -> int:
        return int(torch.randint(low, high, (), generator=self.draw))

    def admit(self) -> None:
        lane, index = (
            len(self.req_indices),
            next(s for s in range(LANES) if s not in self.req_indices),
        )
        prompt = torch.randint(0, VOCAB, (self.random(1, 20),), generator=self.draw)
        first = torch.randint(0, VOCAB, (1,), generator=self.draw)
        features = self.features(len(prompt))
        self.eager.target.hidden = features
        self.eager.admit(torch.tensor([index]), [prompt], first)
        self.graph.admit(lane, prompt, first, features)
        self.req_indices.append(index)
        self.roots[lane] = first[0]

    def leave(self, lane: int) -> None:
        """The last lane's request takes the place of the one that ends."""
        last = len(self.req_indices) - 1
        if lane != last:
            self.graph.move(last, lane)
            self.roots[lane] = self.roots[last]
            self.req_indices[lane] = self.req_indices[last]
        self.req_indices.pop()

    def step(self, depth: int, dead: tuple[int, ...] = ()) -> None:
        req_indices, batch = torch.tensor(self.req_indices), len(self.req_indices)
        live = torch.tensor([lane not in dead for lane in range(batch)])
        if depth and self.graph.num_unprocessed:
            self.graph.extend_backlog()
        tree = self.scheduler.begin(self.roots[:batch], live=live)
        for _ in range(depth):
            expected, found = (
                d.draft(req_indices, tree.frontier) for d in (self.eager, self.graph)
            )
            self.compare(tree.frontier, expected, found)
            tree = self.scheduler.grow(tree, *found)
        packed = self.scheduler.pack(tree)
        sampled = torch.randint(0, VOCAB, (packed.num_rows,), generator=self.draw)
        for row in range(packed.num_rows):
            siblings = packed.request == packed.request[row]
            children = (siblings & (packed.parent == packed.local_row[row])).nonzero()[:, 0]
            if len(children) and self.random(0, 4):
                sampled[row] = packed.tokens[children[self.random(0, len(children))]]
        accepted = echo.accept(packed, sampled)
        hidden = self.features(packed.num_rows)
        self.eager.target.hidden = hidden
        self.eager.extend(req_indices, packed, accepted)
        kept = hidden[accepted.rows.clamp(min=0)], accepted.tokens, accepted.num_emitted
        if depth:
            self.graph.extend(*kept)
        else:
            self.graph.defer(*kept)
            self.graph.num_unprocessed += 1
            if self.graph.num_unprocessed == self.graph.max_backlog:
                self.graph.extend_backlog()
        emits = accepted.num_emitted > 0
        self.roots[:batch] = torch.where(emits, accepted.bonus, self.roots[:batch])
        self.emitted += int(accepted.num_emitted.sum())

    def compare(self, frontier, expected, found) -> None:
        """To 1e-5 and the eager head's rounding to half; near tokens may change places."""
        use = frontier.active & (frontier.score >= self.eager.floor)
        pairs = ((t[use], q[use].float()) for t, q in (expected, found))
        (tokens, log_probs), (mine, mine_log_probs) = pairs
        assert found[0].dtype == torch.int64 and found[1].dtype == torch.float32
        assert bool(((mine_log_probs - log_probs).abs() <= 1e-5 + log_probs.abs() * 2**-11).all())
        near = torch.nn.functional.pad(mine_log_probs.diff(dim=1).abs() < 1e-4, (1, 1))
        assert bool(((tokens == mine) | near[:, 1:] | near[:, :-1]).all())
        if frontier.depth:
            assert bool((found[1][~use] == -torch.inf).all())
        self.compared[frontier.depth] += len(mine)


@pytest.mark.parametrize(("seed", "fused"), [(0, False), (1, False), (2, False), (3, True)])
def test_drafts_are_the_eager_heads(drafters, seed, fused):
    """Over admissions, ends, moves, rejections, empty lanes, and phases that fill the backlog."""
    if fused:
        pytest.importorskip("triton")
    served = Served(drafters, seed, fused)
    off = 0
    for _ in range(14 if fused else 90):
        used = served.graph.used[: len(served.req_indices)]
        if served.req_indices and (served.random(0, 6) == 0 or int(used.max()) > LENGTH - 50):
            served.leave(int(used.argmax()))
        while len(served.req_indices) < LANES and (not served.req_indices or served.random(0, 2)):
            served.admit()
        off = off - 1 if off else (served.random(3, 48) if served.random(0, 12) == 0 else 0)
        if off:
            served.step(0)
        else:
            count = len(served.req_indices)
            one = count > 1 and served.random(0, 3) == 0
            dead = (served.random(0, count),) if one else ()
            served.step(served.random(1, DEPTH + 1), dead)
    used = [int(served.eager.used[index]) for index in served.req_indices]
    assert all(served.compared[depth] > (5 if fused else 50) for depth in range(DEPTH))
    assert served.emitted > 30
    if not served.graph.num_unprocessed and not served.eager.backlog:
        assert used == served.graph.used[: len(used)].tolist()


def rounds(graph, seed, depth=DEPTH, lanes=LANES):
    """Gives the drafter text; arguments for :func:`step`, whose frontiers are of its own drafts."""
    draw = torch.Generator().manual_seed(seed)
    for lane in range(lanes):
        n = int(torch.randint(1, 20, (), generator=draw))
        prompt = torch.randint(0, VOCAB, (n + 1,), generator=draw)
        graph.admit(lane, prompt[:-1], prompt[-1], torch.randn(n, 1728, generator=draw))
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(BEAM), budget=6 * LANES, max_depth=DEPTH
    )
    roots, frontiers = torch.randint(0, VOCAB, (lanes,), generator=draw), []
    tree = scheduler.begin(roots, live=torch.arange(lanes) != 1)
    for _ in range(depth):
        frontiers.append(tree.frontier)
        tree = scheduler.grow(tree, *graph.draft(torch.arange(lanes), tree.frontier))
    lengths = torch.randint(0, DEPTH + 2, (lanes,), generator=draw)
    tokens = torch.randint(0, VOCAB, (lanes, DEPTH + 1), generator=draw)
    tokens = torch.where(torch.arange(DEPTH + 1) < lengths[:, None], tokens, -1)
    features = torch.randn(lanes, DEPTH + 1, 1728, generator=draw)
    return frontiers, features.to(graph.backlog_features.dtype), tokens, lengths


def step(graph, frontiers, features, tokens, lengths):
    """What an engine captures of the drafter: layers, draft extend, a step without speculation."""
    lanes, drafted = graph.lane[: len(tokens)], []
    for frontier in frontiers:
        drafted += graph.draft(lanes, frontier)
    graph.extend(features, tokens, lengths)
    graph.defer(features[:, :1], tokens[:, :1], lengths.clamp(max=1))
    graph.extend_chunk(0)
    candidates = graph.root[lanes], graph.tokens[lanes], graph.log_probs[lanes]
    return [*drafted, *candidates, graph.used, graph.backlog]


@pytest.mark.parametrize(
    ("dtype", "fused"), [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)]
)
def test_the_recorded_step_run_again_on_other_data_gives_what_a_step_gives(drafters, dtype, fused):
    """As a CUDA graph: no Python runs, inputs stay where they were. The third call is a replay."""
    if fused:
        pytest.importorskip("triton")
    size = {"lanes": 2, "depth": 2} if fused else {}
    graph, graphs = drafters.graph(dtype, fused), RecordedGraphs()
    frontiers, *rest = rounds(drafters.graph(dtype, fused), 9, **size)
    tensors = lambda found: (v for f in found for v in vars(f).values() if torch.is_tensor(v))
    inputs = [*rest, *tensors(frontiers)]
    for seed in range(3 if fused else 4):
        theirs = drafters.graph(dtype, fused)
        expected = step(theirs, *rounds(theirs, seed, **size))
        own, *more = rounds(graph, seed, **size)
        for mine, value in zip(inputs, [*more, *tensors(own)], strict=True):
            mine.copy_(value)
        found = graphs("step", lambda: step(graph, frontiers, *rest))
        assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
    assert graphs.runs["step"] == (1 if fused else 2)


def test_it_compiles_whole(drafters):
    graph, theirs, graphs = drafters.graph(), drafters.graph(), []

    def backend(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    for seed in (0, 1):
        expected, found = step(theirs, *rounds(theirs, seed)), compiled(graph, *rounds(graph, seed))
        assert all(torch.equal(one, two) for one, two in zip(expected, found, strict=True))
        theirs.backlog.zero_(), graph.backlog.zero_()
    assert len(graphs) == 1


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_layers_are_those_of_torchs_operations(drafters, dtype):
    """To rounding. What was never written is NaN here, and reaches nothing."""
    pytest.importorskip("triton")
    theirs, mine = drafters.graph(dtype), drafters.graph(dtype, fused=True)
    near = 1e-5 if dtype == torch.float32 else 0.05
    data = rounds(theirs, 0)
    rounds(mine, 0)
    for one, two in zip(step(theirs, *data), step(mine, *data), strict=True):
        if one.is_floating_point():
            assert torch.equal(one.isinf(), two.isinf())
            one, two = (x.float().nan_to_num(neginf=0) for x in (one, two))
            assert float((one - two).norm() / one.norm()) < near
        elif dtype == torch.float32:
            assert torch.equal(one, two)


def test_launches_of_a_fused_layer(drafters, monkeypatch):
    """Five products, seven kernels a layer; 13 and two sums for the text; nothing at the root."""
    pytest.importorskip("triton")
    import eagle_kernels

    launched = []

    class Counted:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, grid):
            return lambda *_, **__: launched.append(self.name)

    graph = drafters.graph(fused=True)
    frontiers, features, tokens, lengths = rounds(graph, 0)
    for name in ("_inherit", "_rotary", "_attend", "_add_norm", "_silu_mul", "_top_k"):
        monkeypatch.setattr(eagle_kernels, name, Counted(name))
    counts = []
    calls = [lambda f=f: graph.draft(graph.lane, f) for f in frontiers]
    for call in [*calls, lambda: graph.extend(features, tokens, lengths)]:
        launched.clear()
        with Operations() as operations:
            call()
        counts.append((len(launched), sum(operations.count.values())))
    assert counts == [(0, 0), (7, 5), (7, 5), (7, 5), (7, 8)]


def test_the_kernels_compile_for_a_gpu():
    """Without spills, few of them: layers and lanes share them."""
    pytest.importorskip("triton")
    options = {"env": ENVIRONMENT, "capture_output": True, "text": True}
    result = subprocess.run([sys.executable, "-c", COMPILE], check=False, **options)
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads(result.stdout)
    assert len(found) == 13
    assert all(entry["spills"] == 0 and entry["stack"] == 0 for entry in found)


ROOT = Path(__file__).parents[1]
PATHS = [str(ROOT / "benchmarks"), str(ROOT / "examples" / "smollm2")]
PATHS.append(os.environ.get("PYTHONPATH", ""))
ENVIRONMENT = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(PATHS)}
COMPILE = """
import json, torch, triton
from types import SimpleNamespace as Any
from triton.backends.compiler import GPUTarget
import compile_kernels, eagle_kernels, graph_eagle
from echo.tree import Frontier

compile_kernels.TYPES[torch.bool] = "*i1"
found = {}

class Record:
    def __init__(self, name):
        self.name, self.kernel = name, getattr(eagle_kernels, name)

    def __getitem__(self, grid):
        def launch(*args, **options):
            recorder = compile_kernels.Recorder(self.kernel)
            recorder.args, recorder.options = args, options
            source, options = compile_kernels.source(recorder)
            key = self.name, str(source.signature), str(source.constants), str(source.attrs)
            found[key] = source, options
        return launch

for name in ("_inherit", "_rotary", "_attend", "_add_norm", "_silu_mul", "_top_k"):
    setattr(eagle_kernels, name, Record(name))
embedding = torch.randn(64, 576, dtype=torch.bfloat16)
model = Any(model=Any(embed_tokens=Any(weight=embedding)))
head = graph_eagle.GraphEagle(model, 4, 256, 4, beam=4, depth=6, dtype=torch.bfloat16, fused=True)
for lanes in (2, 4):
    ints = [torch.zeros(lanes, 4, dtype=torch.int64) for _ in range(3)]
    for depth in (1, 2, 6):
        score, active = torch.zeros(lanes, 4), torch.zeros(lanes, 4, dtype=torch.bool)
        head.draft(None, Frontier(*ints, score, active, depth))
    for span in (5, 7, 16):
        tokens = torch.zeros(lanes, span, dtype=torch.int64)
        head.extend(torch.zeros(lanes, span, 1728), tokens, tokens[:, 0].contiguous())
entries = []
for source, options in list(found.values()):
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    found = compile_kernels.resources(compiled, 90, options.get("num_warps", 4))
    entries.append({"kernel": source.name} | found)
print(json.dumps(entries))
"""


class Operations(TorchDispatchMode):
    """Counts what runs on a device: operations that are no views."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        free = "empty", "new_empty", "empty_like", "empty_strided", "_unsafe_view", "detach"
        if not func.is_view and name not in free:
            self.count[name] += 1
        return func(*args, **(kwargs or {}))


def test_operations_of_a_step(drafters):
    """Few, and as many for two lanes as for all. A norm counts as five: one kernel on a GPU."""
    graph, seen = drafters.graph(), []
    for lanes in (2, LANES):
        frontiers, features, tokens, lengths = rounds(graph, 0, lanes=lanes)
        one = features[:, :1], tokens[:, :1], lengths.clamp(max=1)
        calls = [(graph.draft, (graph.lane[:lanes], f)) for f in frontiers]
        calls += [(graph.extend, (features, tokens, lengths)), (graph.defer, one)]
        seen.append([])
        for call, arguments in calls:
            with Operations() as operations:
                call(*arguments)
            seen[-1].append(sum(operations.count.values()))
    assert seen[0] == seen[1]
    limits = [5, 36, 38, 38, 52, 8]
    assert all(count <= limit for count, limit in zip(seen[0], limits, strict=True)), seen


def test_a_wide_or_deep_frontier_and_a_long_prompt_are_refused(drafters):
    graph = drafters.graph()
    frontiers, *_ = rounds(graph, 0)
    message = f"at most {BEAM} nodes of a depth up to {DEPTH}, got 3 of 9"
    with pytest.raises(echo.EchoError, match=message):
        graph.draft(graph.lane, replace(frontiers[-1], depth=9))
    used, prompt = graph.used.clone(), torch.zeros(97, dtype=torch.int64)
    with pytest.raises(echo.EchoError, match=f"prompt: expected at most {LENGTH} tokens, got 97"):
        graph.admit(0, prompt, prompt[:1], torch.zeros(97, 1728))
    assert torch.equal(graph.used, used)
