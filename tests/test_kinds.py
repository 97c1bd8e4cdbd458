"""Integers are integers of any kind, wherever one is asked for; and what is none is refused."""

from __future__ import annotations

import threading
from dataclasses import fields, is_dataclass

import numpy as np
import pytest
import torch

import echo
import trees
from conftest import grow_all
from echo import _checks as checks
from echo import kernels
from echo.gating import ConfidenceHistograms
from echo.testing import TabularDrafter, TabularTarget, table
from echo.tree import layouts

KINDS = {
    "numpy int64": np.int64,
    "numpy uint16": np.uint16,
    "numpy array": np.array,
    "torch int64": torch.tensor,
    "torch int32": lambda value: torch.tensor(value, dtype=torch.int32),
}
WRONG = [
    True,
    np.True_,
    torch.tensor(True),
    2.0,
    np.float64(2),
    torch.tensor(2.0),
    "2",
    None,
    torch.tensor([2]),
    [2],
]

SCHEDULER = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=24, max_depth=2)
PACKED = SCHEDULER.pack(grow_all(SCHEDULER, torch.arange(3), k=2, seed=0))
CONTEXT, TABLE = torch.arange(3), torch.arange(60).view(3, 20).int()
ACCEPTED = echo.accept(PACKED, PACKED.tokens)
LINKS = PACKED.parent, PACKED.indptr, PACKED.tokens
COST = echo.CostModel((1, 8, 64), (1.0, 1.0, 4.0))
ATTENTION = trees.attention(
    [3, 2], [9, 4], page=4, heads=1, kv_heads=1, dim=16, dtype=torch.float32
)


def hashable(value):
    """A key of a mapping; numpy's arrays are none."""
    return int(value) if isinstance(value, np.ndarray) else value


CALLS = {
    "GlobalRank": lambda k: echo.GlobalRank(k(2), max_verify_tokens_per_req=k(9)),
    "PerRequest": lambda k: echo.PerRequest(k(5), k(2)),
    "TwoLevel": lambda k: echo.TwoLevel(k(2), k(4)),
    "scheduler": lambda k: echo.ElasticBudgetScheduler(
        echo.GlobalRank(2), None, k(8), k(3), k(40), k(5)
    ),
    "eagle": lambda k: echo.ElasticBudgetScheduler.eagle(
        max_verify_tokens_per_req=k(4), beam=k(2), max_depth=k(3)
    ),
    "SparseGate": lambda k: echo.SparseGate({hashable(k(1)): 0.2, hashable(k(3)): 0.4}).log_tau,
    "BeamMassGate": lambda k: echo.BeamMassGate((k(1), k(3)), -1.0, k(2)),
    "history": lambda k: SCHEDULER.history(k(5)).steps.shape,
    "forecast": lambda k: SCHEDULER.choose_tier(SCHEDULER.history(4), [k(1), k(2)], k(3)),
    "forecast, one kind": lambda k: SCHEDULER.choose_tier(
        SCHEDULER.history(4), torch.tensor([1, 2], dtype=torch.uint8), k(3)
    ),
    "begin": lambda k: SCHEDULER.begin(torch.arange(3), num_verify_tokens=k(9)).num_verify_tokens,
    "pack": lambda k: (
        SCHEDULER.pack(SCHEDULER.begin(torch.arange(3)), num_verify_tokens=k(30)).num_rows
    ),
    "slot": lambda k: PACKED.slot_mapping(CONTEXT, TABLE, k(2), k(0)),
    "compact": lambda k: (
        echo.compact(
            PACKED,
            echo.accept(PACKED, PACKED.tokens),
            CONTEXT,
            page_table=TABLE,
            page_size=k(2),
            pad_slot_id=k(0),
        ).target
    ),
    "compact, past": lambda k: echo.compact(PACKED, ACCEPTED, CONTEXT, past_len=k(9)).source,
    "workspace": lambda k: (
        echo.Workspace(SCHEDULER, k(3), k=k(2), num_verify_tokens=k(24), max_num_reqs=k(5)).nbytes
    ),
    "accept": lambda k: kernels.accept(*LINKS, PACKED.tokens.roll(-1), k(2))[0],
    "accept, kernel": lambda k: kernels.accept(
        *LINKS, PACKED.tokens.roll(-1), k(2), backend="triton"
    )[0],
    "attention": lambda k: kernels.tree_attention(**ATTENTION, window=k(3), splits=k(2))[0],
    "attention, kernel": lambda k: kernels.tree_attention(
        **ATTENTION, window=k(3), splits=k(2), backend="triton"
    )[0],
    "sglang": lambda k: layouts.sglang(PACKED, k(24), CONTEXT).positions,
    "hugging_face": lambda k: (
        layouts.hugging_face(PACKED, k(24), CONTEXT, k(9), left_padded=False).input_ids
    ),
    "flashinfer": lambda k: layouts.flashinfer(PACKED, CONTEXT, k(900)).mask,
    "render": lambda k: PACKED.render(k(1)),
    "validate": lambda k: PACKED.validate(max_verify_tokens_per_req=k(24)),
    "lookup": lambda k: echo.PromptLookup(k(3), k(9), max_ngram=k(8)).texts.tokens,
    "histograms": lambda k: ConfidenceHistograms.empty(k(3)).mass.shape,
    "at": lambda k: COST.at(k(4)),
    "learn": lambda k: COST.update(k(8), 2.0),
    "drafter": lambda k: TabularDrafter(table(9, 0), k(3)).draft(
        torch.arange(1), SCHEDULER.begin(torch.arange(1)).frontier
    )[0],
    "from_arrays": lambda k: (
        echo.SuperTree.from_arrays(
            torch.tensor([[1, 2]]),
            torch.tensor([[-1, 0]]),
            torch.zeros(1, 2),
            num_verify_tokens=k(2),
        ).num_verify_tokens
    ),
}
NEEDS_KERNELS = [name for name in CALLS if "kernel" in name]


def as_ints(value):
    """Whether all that a dataclass holds of integers are Python's."""
    return all(
        not isinstance(getattr(value, f.name), np.integer | torch.Tensor) for f in fields(value)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CALLS)
def test_every_integral_kind_is_an_int(name, kind):
    if name in NEEDS_KERNELS:
        pytest.importorskip("triton")
        from echo.kernels import tiles

        if not tiles.interpreted():
            pytest.skip("tensors of this test are on the CPU")
    expected, found = CALLS[name](int), CALLS[name](KINDS[kind])
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
        return
    assert found == expected and type(found) is type(expected)
    if is_dataclass(expected):
        assert hash(found) == hash(expected) and repr(found) == repr(expected) and as_ints(found)


@pytest.mark.parametrize("wrong", WRONG, ids=repr)
def test_what_is_no_integer_is_refused(wrong):
    for call in (
        lambda: echo.GlobalRank(wrong),
        lambda: SCHEDULER.begin(
            torch.arange(1), num_verify_tokens=wrong if wrong is not None else "none"
        ),
        lambda: SCHEDULER.choose_tier(SCHEDULER.history(4), [0], wrong),
        lambda: echo.SparseGate({str(wrong): 0.5}),
        lambda: kernels.accept(*LINKS, PACKED.tokens, wrong),
    ):
        with pytest.raises(echo.EchoError, match="expected an int"):
            call()


def test_a_number_on_a_device_is_no_host_integer():
    with pytest.raises(echo.EchoError, match="num_verify_tokens: expected an int"):
        SCHEDULER.begin(
            torch.arange(1), num_verify_tokens=torch.zeros((), dtype=torch.int64, device="meta")
        )
    with pytest.raises(
        echo.EchoError, match=r"x: expected ints >= 0 on the host .* got a tensor on meta"
    ):
        checks.integers("x", torch.zeros(2, dtype=torch.int64, device="meta"), 0)


LAW = table(50, seed=1)


def answer(**options):
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=2, max_depth=3)
    given = {"max_num_reqs": 1, "max_new_tokens": 20} | options
    steps = echo.decode(
        scheduler, TabularTarget(LAW), TabularDrafter(LAW, k=2), [torch.tensor([3])], **given
    )
    return [token for step in steps for token in step.emitted[0]]


@pytest.mark.parametrize(
    "eos",
    [27, [27], (27, 49), {27}, np.int64(27), np.array(27), np.array([27, 49]), torch.tensor(27), torch.tensor([27]), torch.tensor([27, 49]),
     [torch.tensor(27)], [np.int32(27), 49], range(27, 28)],
    ids=repr,
)  # fmt: skip
def test_an_answer_ends_whatever_kind_its_last_token_is(eos):
    text = answer(eos_token=eos)
    assert text == answer()[: len(text)] and text[-1] == 27 and len(text) == 5


@pytest.mark.parametrize(
    "eos",
    [
        True,
        27.0,
        "27",
        [27.0],
        [None],
        torch.tensor([27.0]),
        torch.tensor([[27]]),
        [-1],
        b"27",
        object(),
        torch.empty(1, device="meta"),
    ],
)
def test_an_end_that_is_no_token_is_refused(eos):
    with pytest.raises(echo.EchoError, match="eos_token: expected ints >= 0 on the host"):
        answer(eos_token=eos)


@pytest.mark.parametrize(
    "limit",
    [np.int64(7), torch.tensor(7), [7], [np.int64(7)], np.array([7]), torch.tensor([7])],
    ids=repr,
)
def test_limits_of_every_kind(limit):
    expected = answer(max_new_tokens=7)
    assert len(expected) == 7 and answer(max_new_tokens=limit) == expected
    assert (
        answer(
            max_new_tokens=7, max_num_reqs=np.int32(2), max_verify_tokens_per_req=torch.tensor(3)
        )
        == expected
    )
    for wrong in (0, [0], 2.5, [True], None, [7, 7]):
        with pytest.raises(echo.EchoError, match="max_new_tokens: expected"):
            answer(max_new_tokens=wrong)
    with pytest.raises(echo.EchoError, match="max_verify_tokens_per_req: expected an int"):
        answer(max_verify_tokens_per_req=1.5)


def test_no_end_is_none():
    assert answer(eos_token=None) == answer(eos_token=[]) == answer()
    assert answer(eos_token=0) == answer(eos_token=[0])


def test_each_thread_has_its_own_backend():
    """While one is inside ``using``, the other's choice is as it was; both leave in the other's
    order.
    """
    pytest.importorskip("triton")
    inside, seen, done = threading.Barrier(2, timeout=60), {}, threading.Event()
    logits = torch.tensor([[0.0, 2.0, 1.0]])

    def module():
        return "triton" if kernels.use_triton(logits) else "torch"

    def other():
        seen["other before"] = module()
        with kernels.using("torch"):
            inside.wait()
            inside.wait()
            seen["other inside"] = module()
        done.set()
        seen["other after"] = module()

    from echo.kernels import tiles

    if not tiles.interpreted():
        pytest.skip("tensors of this test are on the CPU")
    with kernels.using("triton"):
        thread = threading.Thread(target=other)
        thread.start()
        inside.wait()
        seen["mine inside"] = module()
        assert kernels.argmax_tokens(logits).tolist() == [1]
        inside.wait()
        assert done.wait(60)
        seen["mine still"] = module()
    thread.join()
    seen["mine after"] = module()
    assert seen == {
        "other before": "torch", "other inside": "torch", "other after": "torch",
        "mine inside": "triton", "mine still": "triton", "mine after": "torch",
    }  # fmt: skip
