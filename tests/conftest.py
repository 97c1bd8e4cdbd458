from __future__ import annotations

import os
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

# Triton reads it when it is imported: without a GPU the kernels run in its interpreter, on the CPU.
os.environ.setdefault("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1")

import echo
from echo._checks import ROUNDING


def hasten_interpreter():
    """Triton's interpreter patches its language whenever a function is called within a kernel, and
    makes a table of dtypes whenever it asks for one: half its time. Here both are done once.
    """
    from triton import language as tl
    from triton.runtime import interpreter

    if not {"_patch_lang", "_get_np_dtype"} <= vars(interpreter).keys():
        return  # of another Triton: the tests only take longer
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)
    found = {}
    find = interpreter._get_np_dtype

    def by_name(dtype):
        if dtype.name not in found:
            found[dtype.name] = find(dtype)
        return found[dtype.name]

    interpreter._get_np_dtype = by_name


if find_spec("triton") and os.environ["TRITON_INTERPRET"] == "1":
    hasten_interpreter()

CALIBRATION = echo.calibrate(
    echo.WarmupLog.from_arrays(
        [1 + i % 3 for i in range(900)],
        [(i % 97) / 97 for i in range(900)],
        [(i * 7 % 97) < i % 97 for i in range(900)],
    )
)

settings.register_profile(
    "echo", deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("echo")


def pytest_collection_modifyitems(items):
    """``ECHO_SHARE=i/n`` runs every n-th test: processes share them out."""
    share, count = map(int, os.environ.get("ECHO_SHARE", "0/1").split("/"))
    items[:] = items[share::count]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """On a GPU kernels are compiled, and refuse the tensors of tests that are on the CPU."""
    try:
        return (yield)
    except (echo.EchoError, ValueError) as refused:
        if "(or TRITON_INTERPRET=1)" in str(refused) or "cpu tensor?" in str(refused):
            pytest.skip("tensors of this test are on the CPU")
        raise


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def grow_all(scheduler, roots, *, k, seed, spoil=0.0, ties=False, **begin):
    """A full tree of random scores: a share ``spoil`` of NaN and extremes, ``ties`` coarse."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tree = scheduler.begin(roots, **begin)
    for _ in range(scheduler.max_depth):
        shape = (*tree.frontier.token.shape, k)
        drawn = {"generator": generator, "device": "cpu"}
        log_probs = (1.5 * torch.randn(shape, **drawn)).log_softmax(-1)
        if ties:
            log_probs = (log_probs * 2).round() / 2
        bad = torch.rand(shape, **drawn) < spoil
        kinds = torch.tensor(
            [torch.nan, torch.inf, -torch.inf, 0.9, 7.0, ROUNDING, ROUNDING * (1 + 2.0**-23)],
            device="cpu",
        )
        kinds = kinds[torch.randint(0, len(kinds), shape, **drawn)]
        tokens = torch.randint(0, 1000, shape, **drawn)
        layer = tokens, torch.where(bad, kinds, log_probs)
        tree = scheduler.grow(tree, *(value.to(roots.device) for value in layer))
    return tree


@st.composite
def policies(draw):
    """Any gate and rule with small sizes, and a batch it fits."""
    batch = draw(st.integers(1, 6))
    depth = draw(st.integers(1, 5))
    beam = draw(st.integers(1, 4))
    kind = draw(st.sampled_from(["two-level", "global", "per-request"]))
    budget: int | None = batch + draw(st.integers(0, 30))
    limit = draw(st.sampled_from([1, 3, 33, 70]))
    if kind == "two-level":
        rule = echo.TwoLevel(beam, draw(st.integers(0, 5)))
    elif kind == "global":
        rule = echo.GlobalRank(beam)
    else:
        rule = echo.PerRequest(draw(st.integers(1, min(12, limit))), beam)
        budget = None
    taus = st.floats(0, 1, width=32)
    gate = draw(
        st.one_of(
            st.none(),
            st.dictionaries(st.integers(1, depth), taus, min_size=1).map(echo.SparseGate),
            st.floats(-3, 0).map(lambda tau: echo.BeamMassGate((1, 3), tau, 2)),
        )
    )
    scheduler = echo.ElasticBudgetScheduler(
        rule, gate, budget, depth, max_verify_tokens_per_req=limit
    )
    return scheduler, batch


def one_graph(function, cases):
    """``function`` compiles whole and once, and equals itself uncompiled on all ``cases``."""
    graphs = []
    given = []

    def backend(module, _):
        graphs.append(module)
        return module

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=backend)
    for case in cases:
        given.append(function(*case))
        assert all(
            torch.equal(one, two) for one, two in zip(compiled(*case), given[-1], strict=True)
        )
    assert len(graphs) == 1
    return given


@pytest.fixture
def poisoned():
    """Uninitialised memory holds NaN, and integers their largest value."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def smollm2():
    """The real model pair's module: loaded once, 20 seconds."""
    pytest.importorskip("transformers", reason="needs the demo extra, on Python 3.11 or later")
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "smollm2"))
    import model

    return model.load()
