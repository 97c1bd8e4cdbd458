"""Looking at a step from the host: pictures, validation, and importers that refuse what no tree
has.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

import echo
from echo.testing import importers
from echo.tree import layouts
from forests import forest


def test_the_picture():
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(1, 1), budget=4, max_depth=2)
    tree = scheduler.begin(torch.tensor([7]), num_verify_tokens=4)
    tree = scheduler.grow(tree, torch.tensor([[[12, 5]]]), torch.tensor([[[0.8, 0.15]]]).log())
    tree = scheduler.grow(tree, torch.tensor([[[301, 9]]]), torch.tensor([[[0.5, 0.1]]]).log())
    packed = scheduler.pack(tree)
    accepted = echo.accept(packed, torch.tensor([12, 301, 1, 2]))
    assert packed.render(0, accepted).splitlines() == [
        "7           1.000  root  accepted",
        "├─ 12       0.800  depth  accepted",
        "│  └─ 301   0.400  depth  accepted",
        "└─ 5        0.150  width",
    ]
    words = {7: "The", 12: " cat", 301: " sat", 5: " dog"}
    assert (
        packed.render(0, label=lambda token: words[token].strip()).splitlines()[2]
        == "│  └─ sat   0.400  depth"
    )
    with pytest.raises(echo.EchoError, match="request: expected an int equal to 0, got 1"):
        packed.render(1)


@pytest.mark.parametrize("seed", [0, 3])
def test_no_two_nodes_of_the_drawing_overlap_and_each_text_lies_in_its_node(seed):
    agg = pytest.importorskip("matplotlib.backends.backend_agg")
    case = forest(seed, 3, 16)
    accepted = echo.accept(case.packed, case.packed.tokens.roll(-1))
    figure = case.packed.plot(
        accepted=accepted, label=lambda token: "some_text"[: 1 + token % 9], titles=["a", "b", "c"]
    )
    canvas = agg.FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    legend = 4  # its own boxes
    boxes = [
        p.get_window_extent(renderer) for p in figure.axes[0].patches if hasattr(p, "get_boxstyle")
    ]
    assert len(boxes) - legend == int(case.packed.indptr[-1])
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:i])
        assert (
            figure.bbox.containsx(box.x0)
            and figure.bbox.containsx(box.x1)
            and figure.bbox.containsy(box.y0)
        )
    texts = [t.get_window_extent(renderer) for t in figure.axes[0].texts if t.get_text()]
    for i, text in enumerate(texts):
        assert not any(text.overlaps(other) for other in texts[:i])
        touched = [box for box in boxes if box.overlaps(text)]
        assert len(touched) <= 1 and all(box.x0 <= text.x0 and text.x1 <= box.x1 for box in touched)


def test_the_drawing_says_what_each_request_got():
    packed = two_requests()
    texts = {
        t.get_text()
        for t in packed.plot([1], echo.accept(packed, packed.tokens.roll(-1))).axes[0].texts
    }
    assert {
        "request 1",
        "drafted to the last layer; 3 rows: 0 by depth, 2 by width; 3 tokens emitted",
        "4",
        "5",
        "6",
        ".61",
        ".37",
    } <= texts
    with pytest.raises(echo.EchoError, match="requests: expected an int from 0 to 1, got 2"):
        packed.plot([0, 2])
    with pytest.raises(echo.EchoError, match="titles: expected one for each of 2 requests, got 1"):
        packed.plot(titles=["a"])


def two_requests():
    tokens, parents = torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([[-1, 0, 0], [-1, 0, 1]])
    tree = echo.SuperTree.from_arrays(
        tokens, parents, torch.full((2, 3), -0.5), num_verify_tokens=8
    )
    return echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=8).pack(tree)


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("parent", 5, 0, r"depth: request 1, row 2: expected 1, got 2"),
        ("parent", 4, 2, r"parent: request 1, row 1: expected a row before its child, got 2"),
        (
            "parent",
            4,
            3,
            r"parent: request 1, row 1: expected a row of the same request, 0 to 2, got 3",
        ),
        ("parent", 3, 0, r"parent: request 1, row 0: expected -1 for the root, got 0"),
        ("depth", 5, 1, r"depth: request 1, row 2: expected 2, got 1"),
        ("tokens", 4, -3, r"tokens: request 1, row 1: expected a token >= 0, got -3"),
        ("tokens", 2, 2, r"tokens: request 0, row 2: expected siblings that differ, got 2 twice"),
        ("request", 4, 0, r"request: request 1, row 1: expected 1, got 0"),
        (
            "mask",
            5,
            0b110,
            r"mask: request 1, row 2: expected 0x7, itself and its ancestors, got 0x6",
        ),
        ("mask", 7, 3, r"pad row 7"),
        ("score", 5, 0.0, r"score: request 1, row 2: expected at most its parent's -0.5, got 0.0"),
        ("indptr", 1, 9, r"indptr: expected numbers rising from 0"),
    ],
)
def test_validate_names_the_request_and_the_row(name, at, value, message):
    packed = two_requests()
    packed.validate(max_verify_tokens_per_req=3)
    getattr(packed, name)[at] = value
    with pytest.raises(echo.EchoError, match=message):
        packed.validate()


def test_validate_finds_what_an_export_cannot_hold():
    packed = two_requests()
    with pytest.raises(
        echo.EchoError, match="rows: expected at most 2 rows, request 0 has 3: row 2 does not fit"
    ):
        packed.validate(max_verify_tokens_per_req=2)
    with pytest.raises(
        echo.EchoError, match=r"parent: request 0, row 2: expected 1 \(a chain\), got 0"
    ):
        packed.validate(chain=True)


# Importers refuse what no tree has.


def links(token, sibling, n=4):
    rows = torch.arange(2 * n)
    good = torch.tensor([[1, -1, -1, -1], [-1] * 4])
    return layouts.SGLangLinks(
        rows,
        rows,
        rows.view(2, n),
        torch.stack([good[0], torch.tensor(token)]),
        torch.stack([good[1], torch.tensor(sibling)]),
    )


@pytest.mark.parametrize(
    ("token", "sibling", "message"),
    [
        (
            [1, 2, 1, -1],
            [-1] * 4,
            r"retrive_next_token: request 1, row 2: expected a row that no other link reaches, got 1 \(a cycle",
        ),
        (
            [1, -1, -1, -1],
            [-1, 2, 1, -1],
            r"retrive_next_sibling: request 1, row 2: expected a row that no other link reaches, got 1",
        ),
        (
            [2, -1, 1, -1],
            [-1] * 4,
            r"retrive_next_token: request 1, row 2: expected a row behind its parent 2, got 1",
        ),
        (
            [4, -1, -1, -1],
            [-1] * 4,
            r"retrive_next_token: request 1, row 0: expected -1 or a row from 0 to 3, got 4",
        ),
        (
            [1, -1, -1, -1],
            [-1, -2, -1, -1],
            r"retrive_next_sibling: request 1, row 1: expected -1 or a row from 0 to 3, got -2",
        ),
    ],
)
def test_bad_links(token, sibling, message):
    with pytest.raises(echo.EchoError, match=message):
        importers.from_sglang(links(token, sibling))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [[1, 0, 0], [1, 1, 1], [1, 0, 1]],
            r"mask: request 1, row 1: expected a row before its child, got row 2",
        ),
        (
            [[1, 0, 0], [1, 0, 0], [1, 0, 1]],
            r"mask: request 1, row 1: expected a row to see itself",
        ),
        (
            [[1, 0, 0], [1, 1, 0], [0, 1, 1]],
            r"mask: request 1, row 2: expected itself, a parent and that parent's ancestors, got \[1, 2\]",
        ),
        (
            [[1, 0, 0], [0, 1, 0], [1, 0, 1]],
            r"mask: request 1, row 2: expected a pad that sees itself alone, got \[0, 2\]",
        ),
    ],
)
def test_bad_masks(rows, message):
    good = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    mask = torch.tensor([good, rows]).bool()
    with pytest.raises(echo.EchoError, match=message):
        importers.from_sglang_mask(mask, torch.arange(6), 3, "QLEN_ONLY")
    with pytest.raises(
        echo.EchoError, match="token: request 0, row 1: expected a token >= 0, got -1"
    ):
        importers.from_sglang_mask(
            torch.tensor([good, good]).bool(), torch.tensor([1, -1, 2, 3, 4, 5]), 3, "QLEN_ONLY"
        )
    with pytest.raises(echo.EchoError, match=r"num_nodes: request 1: expected 0 to 3 rows, got 4"):
        importers.from_sglang_mask(
            torch.tensor([good, good]).bool(),
            torch.arange(6),
            3,
            "QLEN_ONLY",
            num_nodes=torch.tensor([3, 4]),
        )


def test_importers_refuse_indptrs_and_lengths_that_fit_no_mask():
    packed, context = two_requests(), torch.tensor([3, 4])
    mask, chain = layouts.flashinfer(packed, context, 99), layouts.chains(packed)
    wrong = torch.tensor([0, 4, 3]).int()
    xqa = layouts.flashinfer_xqa(packed)
    for call, message in [
        (lambda: importers.from_flashinfer(dataclasses.replace(mask, qo_indptr=wrong), packed.tokens), r"qo_indptr: expected numbers rising"),
        (lambda: importers.from_flashinfer(mask, packed.tokens[:5]), r"qo_indptr: expected .* at most 5, got \[0, 3, 6\]"),
        (lambda: importers.from_flashinfer(dataclasses.replace(mask, kv_lens=torch.tensor([6, 2])), packed.tokens),
         r"kv_lens: request 1: expected at least its 3 rows, got 2"),
        (lambda: importers.from_flashinfer(dataclasses.replace(mask, mask=mask.mask[:5]), packed.tokens),
         r"mask: request 1: expected at least 45 entries, got 40"),
        (lambda: importers.from_chains(dataclasses.replace(chain, qo_indptr=wrong)), r"qo_indptr: expected numbers rising"),
        (lambda: importers.from_flashinfer_xqa(xqa, wrong, packed.tokens), r"indptr: expected numbers rising"),
        (lambda: importers.from_flashinfer_xqa(xqa.int(), packed.indptr, packed.tokens), r"mask: expected uint16 \[8, halves\], got int32"),
        (lambda: importers.from_qq_bias(torch.zeros(8, 7), packed.tokens), r"bias: expected float32 \[8, 8\], got float32 \[8, 7\]"),
        (lambda: importers.from_sglang_mask(torch.ones(99).bool(), torch.arange(6), 3, "FULL_MASK", prefix_lens=torch.tensor([1, -1])),
         r"prefix_lens: request 1: expected tokens >= 0, got -1"),
    ]:  # fmt: skip
        with pytest.raises(echo.EchoError, match=message):
            call()
