"""Every public name says what it takes and raises, and stands in the API reference."""

from __future__ import annotations

import importlib
import inspect
import re
from collections import defaultdict
from dataclasses import replace
from enum import Enum
from pathlib import Path

import pytest
import torch

import echo

PARTS = (
    "tree tree.layouts tree.sampling tree.drafting tree.cache gating budget cost loop lookup stats "
    "workspace memory kernels testing report plot"
)
MODULES = [echo, *(importlib.import_module(f"echo.{name}") for name in PARTS.split())]
PROTOCOLS = (echo.Drafter, echo.gating.Gate, echo.budget.Rule, echo.Target)
REFERENCE = (Path(__file__).parents[1] / "docs" / "api.md").read_text()
ELSEWHERE = re.compile(r"(?:[Ss]ee|[Aa]s|[Aa]s in|[Aa]s of|what) :(?:meth|func|class|mod):`")


def names_of(module):
    """``__all__``, or without one what the module defines."""
    own = (n for n, x in vars(module).items() if getattr(x, "__module__", "") == module.__name__)
    return getattr(module, "__all__", None) or [name for name in own if not name.startswith("_")]


def public():
    """Every public item once, with the name by which it is found first."""
    found = {}
    for module in MODULES:
        for name in names_of(module):
            if not inspect.ismodule(item := getattr(module, name)):
                found.setdefault(id(item), (f"{module.__name__}.{name}", item))
    return list(found.values())


def methods(item):
    """A class's own public functions, by name."""
    fields = getattr(item, "__dataclass_fields__", ())
    return {
        name: getattr(item, name)
        for name in vars(item)
        if (not name.startswith("_") or name == "__call__")
        and inspect.isroutine(getattr(item, name))
        and name not in fields
    }


CLASSES = [(name, item) for name, item in public() if inspect.isclass(item)]
FUNCTIONS = [(name, item, "") for name, item in public() if inspect.isfunction(item)]
for owner, kind in CLASSES:
    kin = [
        p for p in PROTOCOLS if methods(p).keys() <= methods(kind).keys()
    ]  # an implementation need not say again what they say
    for name, method in methods(kind).items():
        said = [
            inspect.getdoc(text) or ""
            for p in kin
            if name in methods(p)
            for text in (p, methods(p)[name])
        ]
        FUNCTIONS.append((f"{owner}.{name}", method, "\n".join(said)))


def unsaid(doc, signature):
    """Parameters that ``doc`` neither lists (``name: ...``, ``one, name: ...``) nor quotes."""
    names = [n for n in signature.parameters if n not in ("self", "cls") and n[0] != "_"]
    return [
        n
        for n in names
        if not re.search(rf"^ *(\w+, )*{n}(, \w+)*: |``[^`\n]*\b{n}\b[^`\n]*``", doc, re.MULTILINE)
    ]


@pytest.mark.parametrize(
    ("item", "kin"), [pytest.param(item, kin, id=name) for name, item, kin in FUNCTIONS]
)
def test_functions_say_what_they_take_and_raise(item, kin):
    doc = inspect.getdoc(item) or ""
    assert doc
    assert ELSEWHERE.search(doc) or not unsaid(f"{doc}\n{kin}", inspect.signature(item))
    if re.search(r"\bEchoError\(|\bchecks\.\w+\(", inspect.getsource(item)):
        assert ELSEWHERE.search(doc) or "EchoError" in doc


@pytest.mark.parametrize("item", [pytest.param(item, id=name) for name, item in CLASSES])
def test_classes_say_what_they_hold(item):
    doc = inspect.getdoc(item) or ""
    assert doc
    for name, part in vars(item).items():
        if isinstance(part, property) and not name.startswith("_"):
            assert inspect.getdoc(part), name
    if (
        not issubclass(item, Exception | Enum)
        and item not in PROTOCOLS
        and not getattr(item, "_is_protocol", False)
    ):
        assert not unsaid(doc, inspect.signature(item))


def examples(doc):
    """The code of a docstring's examples."""
    return "\n".join(re.findall(r"^ *(?:>>>|\.\.\.) (.*)$", doc, re.MULTILINE))


def is_plain(kind):
    """A record, error, enum or protocol: nothing to call."""
    protocol = getattr(kind, "_is_protocol", False)
    return issubclass(kind, Exception | Enum) or protocol or not methods(kind)


def without_example():
    """Public callables without an example in their module, unless a protocol describes them."""
    shown = defaultdict(str)
    for item in [item for _, item in CLASSES] + [item for _, item, _ in FUNCTIONS]:
        shown[item.__module__] += "\n" + examples(inspect.getdoc(item) or "")
    named = lambda name, item: re.search(rf"\b{name}\b", shown[item.__module__])
    for name, item in public():
        if inspect.isfunction(item) and not named(item.__name__, item):
            yield name
    for name, kind in CLASSES:
        own = {} if is_plain(kind) else methods(kind)
        given = {m for base in (*PROTOCOLS, *kind.__mro__[1:]) for m in vars(base)}
        lacking = [m for m, method in own.items() if m not in given and not named(m, method)]
        if own and len(lacking) == len(own) and not named(kind.__name__, kind):
            yield name
        yield from (f"{name}.{method}" for method in lacking)


def test_every_callable_has_an_example():
    assert sorted(without_example()) == []


def test_the_top_is_small():
    assert len(echo.__all__) <= 25
    assert [name for name in echo.__all__ if not hasattr(echo, name)] == []


def test_all_stand_in_the_reference():
    listed = set(re.findall(r"auto(?:class|data|function):: (\S+)", REFERENCE))
    for name, options in re.findall(r"automodule:: (\S+)\n((?: +\S.*\n)*)", REFERENCE):
        members = re.search(r":members:((?:.*\n +[^:\s])*.*)", options)
        if members:
            every = names_of(importlib.import_module(name))
            listed |= {f"{name}.{one}" for one in re.findall(r"\w+", members[1]) or every}
    known = set()
    for entry in listed:
        module, _, name = entry.rpartition(".")
        known.add(id(getattr(importlib.import_module(module), name)))
    names = [name for name, item in public() if id(item) not in known]
    assert not [name for name in names if not name.startswith("echo.plot.")]  # behind .plot()


LOG = echo.WarmupLog.from_arrays([1] * 200, [0.9] * 100 + [0.2] * 100, [1] * 90 + [0] * 110)
SCHEDULER = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, 6, 1)
TREE = SCHEDULER.begin(torch.tensor([7, 9]))
OTHER = SCHEDULER.begin(torch.tensor([7, 9, 5]))
PACKED = SCHEDULER.pack(TREE)
ACCEPTED = echo.accept(PACKED, torch.zeros(6, dtype=torch.int64))
ROOT, NARROW, WIDE, DEEP = (
    echo.SuperTree.from_paths(torch.tensor([7]), [paths])
    for paths in ([], [[1]], [[1], [2], [3]], [[1, 2], [3, 4]])
)
LAYER = torch.tensor([[1]]), torch.tensor([[0]]), torch.tensor([[-0.5]])
TEXTS = echo.lookup.Texts.empty(1, 8)
STEP = (packed := SCHEDULER.pack(WIDE)), echo.accept(packed, torch.full((4,), 3))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (
            lambda: echo.ElasticBudgetScheduler("paper", None, 6),
            r"rule: expected a Rule \(",
        ),
        (lambda: echo.ElasticBudgetScheduler(echo.GlobalRank, None, 6), "rule: expected a Rule"),
        (
            lambda: echo.ElasticBudgetScheduler(echo.GlobalRank(2), echo.calibrate(LOG), 6),
            r"gate: expected a Gate \(__call__\)",
        ),
        (lambda: echo.SparseGate(0.5), "thresholds: expected a Mapping, got float"),
        (lambda: echo.calibrate(LOG.depth), "log: expected a WarmupLog, got ndarray"),
        (lambda: echo.calibrate([LOG, None]), "logs: expected a WarmupLog, got NoneType"),
        (
            lambda: echo.gating.ConfidenceHistograms.of([LOG, LOG.depth]),
            "logs: expected a WarmupLog, got ndarray",
        ),
        (lambda: echo.WarmupLog.concat(["a.npz"]), "logs: expected a WarmupLog, got str"),
        (
            lambda: echo.gating.ConfidenceHistograms.of(LOG).merge(LOG),
            "other: expected a ConfidenceHistograms, got WarmupLog",
        ),
        (
            lambda: echo.gating.DriftMonitor(LOG),
            "calibration: expected a Calibration, got WarmupLog",
        ),
        (
            lambda: echo.gating.DriftMonitor(echo.calibrate(LOG)).check(LOG),
            "live: expected a ConfidenceHistograms, got WarmupLog",
        ),
        (
            lambda: echo.accept(TREE, torch.zeros(6, dtype=torch.int64)),
            "packed: expected a PackedTree, got SuperTree",
        ),
        (
            lambda: echo.loop.warmup_log(PACKED, TREE, ACCEPTED),
            "tree: expected a SuperTree, got PackedTree",
        ),
        (
            lambda: echo.loop.warmup_log(OTHER, PACKED, ACCEPTED),
            "packed.batch: expected an int equal to 3, got 2",
        ),
        (
            lambda: echo.loop.warmup_log(OTHER, SCHEDULER.pack(OTHER), ACCEPTED),
            r"accepted.rows: expected int64 \[3, 1\], got int64 \[2, 1\]",
        ),
        (
            lambda: SCHEDULER.choose_tier(None, [0]),
            "history: expected a History, got NoneType",
        ),
        (
            lambda: SCHEDULER.choose_tier(SCHEDULER.history(4), [0, 4]),
            "req_indices: expected ints from 0 to 3 on the host .*, got numbers from 0 to 4",
        ),
        (
            lambda: echo.ElasticBudgetScheduler.paper(LOG, k_max=4),
            "calibration: expected a Calibration, got WarmupLog",
        ),
        (
            lambda: echo.ElasticBudgetScheduler.throughput_optimal(echo.calibrate(LOG), None),
            "cost: expected a CostModel, got NoneType",
        ),
        (
            lambda: echo.PromptLookup(1, 8, mixing_weights=0.5),
            "mixing_weights: expected numbers, got TypeError",
        ),
        (
            lambda: echo.PromptLookup(1, 8, mixing_weights=[0.0] * 8 + [1 - 1e-10]),
            r"mixing_weights: expected 9 numbers in \[0, 1\)",
        ),
        (
            lambda: echo.CostModel((1,), (1.0,), measured=((1, 1, float("nan"), 0, 0),)),
            "measured: expected five numbers .*not finite",
        ),
        (
            lambda: echo.loop.warmup_log(
                TREE, PACKED, replace(ACCEPTED, rows=ACCEPTED.tokens[:, :0])
            ),
            r"accepted.rows: expected int64 \[2, 1\], got int64 \[2, 0\]",
        ),
        (
            lambda: echo.PromptLookup(1, 8, drafter=lambda token, state: token),
            r"drafter: expected a Drafter \(admit, draft, extend\)",
        ),
        (
            lambda: TREE.frontier.inherit(torch.zeros(3, 1, 8)),
            r"state: expected a tensor \[2, nodes of the previous frontier, ...\], got float32 \[3, 1, 8\]",
        ),
        (
            lambda: DEEP.frontier.inherit(torch.zeros(1, 1, 8)),
            "state: expected one for each of the nodes of the previous frontier, got .*index 1",
        ),
        (
            lambda: echo.loop.draft_labels(NARROW, *STEP),
            "tree: expected the one that was packed, got IndexError",
        ),
        (
            lambda: echo.loop.draft_labels(NARROW, SCHEDULER.pack(NARROW), STEP[1]),
            "accepted.rows: expected rows of packed, got IndexError",
        ),
        (
            lambda: echo.tree.sampling.by_node(STEP[0], NARROW, torch.zeros(1, 2), -1),
            "tree: expected the one that was packed, got IndexError",
        ),
        (
            lambda: echo.tree.Accepted.of(STEP[1].tokens, STEP[1].rows, torch.tensor([[1]])),
            r"num_emitted: expected int64 \[1\], got int64 \[1, 1\]",
        ),
        (
            lambda: echo.tree.Accepted.of(STEP[1].tokens, STEP[1].rows, torch.tensor([9])),
            "num_emitted: expected at most 2 tokens, got .*index 8",
        ),
        (
            lambda: ROOT.attach([(ROOT.status.long(), *LAYER[1:])]),
            r"tokens: expected int64 \[1, M\], got int64 \[1\]",
        ),
        (
            lambda: ROOT.attach([(LAYER[0], LAYER[1] + 1, LAYER[2])]),
            "parents: expected indices into the layer above, got .*index 1",
        ),
        (
            lambda: TEXTS.propose(torch.tensor([0])).follow(TREE.frontier),
            r"frontier.parent: expected int64 \[1, W\], got int64 \[2, 1\]",
        ),
        (
            lambda: TEXTS.propose(torch.tensor([0])).follow(DEEP.frontier),
            "frontier: expected the one below these proposals' nodes, got .*index 1",
        ),
        (
            lambda: echo.PromptLookup(2, 8).draft(torch.tensor([0]), TREE.frontier),
            r"req_indices: expected int64 \[2\], got int64 \[1\]",
        ),
        (
            lambda: echo.compact(ACCEPTED, PACKED, torch.zeros(2, dtype=torch.int64)),
            "packed: expected a PackedTree, got Accepted",
        ),
        (
            lambda: echo.StepStats.empty().observe(PACKED, PACKED),
            "accepted: expected an Accepted, got PackedTree",
        ),
    ],
)
def test_arguments_that_are_mixed_up_are_named(call, says):
    with pytest.raises(echo.EchoError, match=says):
        call()
