"""Packing and every exporter against a slow oracle, and every importer against its exporter."""

from __future__ import annotations

import dataclasses
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
from echo.testing import RefuseSyncs, importers
from echo.tree import compact, layouts
from echo.tree.packed import pack
from forests import Case, forest, paths

WORDS = ("tokens", "parent", "depth", "request", "indptr")


@st.composite
def cases(draw, shape="any", batch=5, most=100):
    return forest(
        draw(st.integers(0, 100_000)),
        draw(st.integers(1, batch)),
        draw(st.sampled_from([1, 3, 9, 40, most])),
        shape=shape,
        pads=draw(st.sampled_from([0, 1, 5])),
    )


def contexts(case: Case) -> torch.Tensor:
    return torch.tensor([(7 * b + 3) % 11 for b in range(case.batch)])


def same(one: echo.PackedTree, two: echo.PackedTree) -> None:
    for name in WORDS:
        assert torch.equal(getattr(one, name), getattr(two, name)), name
    words = min(one.mask.shape[1], two.mask.shape[1])
    assert torch.equal(one.mask[:, :words], two.mask[:, :words])


@given(cases())
def test_packing_is_the_oracle(case):
    packed, row = case.packed, 0
    packed.validate()
    for b in range(case.batch):
        assert int(packed.indptr[b]) == row
        parents, seen = case.parent_rows(b), case.sees(b)
        for local, expected in enumerate(case.rows(b)):
            assert int(packed.tokens[row]) == expected.token
            assert int(packed.depth[row]) == len(expected.path) - 1
            assert int(packed.parent[row]) == parents[local]
            assert int(packed.request[row]) == b
            assert int(packed.local_row[row]) == local
            assert float(packed.score[row]) == expected.score
            assert packed.visible()[row].tolist()[: len(seen)] == seen[local]
            assert not packed.visible()[row, len(seen) :].any()
            row += 1
    assert int(packed.indptr[-1]) == row
    assert (
        (packed.request[row:] == case.batch).all()
        and (packed.mask[row:, 0] == 1).all()
        and (packed.node[row:] == -1).all()
    )
    assert packed.committed.tolist() == [bool(r == int(packed.indptr[q])) if (q := int(packed.request[r])) < case.batch else False
                                      for r in range(packed.num_rows)]  # fmt: skip


@given(st.integers(0, 10_000))
def test_a_request_alone_is_packed_as_in_the_batch(seed):
    scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=7, beam=3, max_depth=4)
    generator = torch.Generator().manual_seed(seed)
    layers = [
        (
            torch.randint(0, 99, (4, w, 3), generator=generator),
            -torch.rand(4, w, 3, generator=generator),
        )
        for w in (1, 3, 3, 3)
    ]

    def run(requests):
        tree = scheduler.begin(torch.arange(4)[requests])
        for tokens, log_probs in layers:
            tree = scheduler.grow(tree, tokens[requests], log_probs[requests])
        return scheduler.pack(tree)

    together = run(torch.arange(4))
    for b in range(4):
        alone = run(torch.tensor([b]))
        part = slice(int(together.indptr[b]), int(together.indptr[b + 1]))
        for name in ("tokens", "parent", "depth", "mask", "score", "committed"):
            assert torch.equal(getattr(together, name)[part], getattr(alone, name)), name


def square(case: Case, b: int, n: int) -> list[list[bool]]:
    """Who sees whom among n rows: pads see themselves."""
    seen = case.sees(b)
    return [
        [
            (i < len(seen) and j < len(seen) and seen[i][j]) or (i == j and i >= len(seen))
            for j in range(n)
        ]
        for i in range(n)
    ]


def children(case: Case, b: int, n: int) -> tuple[list[int], list[int]]:
    parents = case.parent_rows(b)[:n]
    first = [next((c for c, up in enumerate(parents) if up == row), -1) for row in range(n)]
    after = [
        next((c for c in range(row + 1, len(parents)) if 0 <= parents[c] == parents[row]), -1)
        for row in range(len(parents))
    ]
    return first, after + [-1] * (n - len(after))


@given(cases(), st.sampled_from([0, 1, 3]), st.booleans())
def test_sglang_links_are_the_oracle_and_come_back(case, more, cut):
    n, context = max(1, case.largest // 2) if cut else case.largest + more, contexts(case)
    links = layouts.sglang(case.packed, n, context)
    for b in range(case.batch):
        first, after = children(case, b, n)
        rows = case.rows(b)[:n]
        assert links.retrive_next_token[b].tolist() == first
        assert links.retrive_next_sibling[b].tolist() == after
        assert links.retrive_index[b].tolist() == list(range(b * n, b * n + n))
        assert links.draft_tokens[b * n : b * n + n].tolist() == [row.token for row in rows] + [
            0
        ] * (n - len(rows))
        depths = [len(row.path) - 1 for row in rows] + [0] * (n - len(rows))
        assert links.positions[b * n : b * n + n].tolist() == [int(context[b]) + d for d in depths]
    if not cut:
        same(
            importers.from_sglang(
                links, num_nodes=case.packed.indptr.diff(), num_rows=case.packed.num_rows
            ),
            case.packed,
        )


@given(cases(), st.integers(0, 1000))
def test_sglang_links_with_siblings_in_any_order_are_the_same_trees(case, seed):
    turn = random.Random(seed)
    n = case.largest
    links = layouts.sglang(case.packed, n, contexts(case))
    first, after = links.retrive_next_token.clone(), links.retrive_next_sibling.clone()
    for b in range(case.batch):
        parents = case.parent_rows(b)
        for up in range(n):
            mine = [row for row, parent in enumerate(parents) if parent == up]
            turn.shuffle(mine)
            for row, following in zip([up, *mine], [*mine, -1], strict=True):
                (first if row == up else after)[b, row] = following
    turned = dataclasses.replace(links, retrive_next_token=first, retrive_next_sibling=after)
    same(
        importers.from_sglang(
            turned, num_nodes=case.packed.indptr.diff(), num_rows=case.packed.num_rows
        ),
        case.packed,
    )


@given(cases(most=20), st.integers(0, 1000))
def test_masks_with_rows_in_any_order_are_the_same_trees(case, seed):
    """An engine that lists a tree's rows in another order, parents first: the same paths come
    back, in canonical order.
    """
    turn, n = random.Random(seed), case.largest
    mask, tokens = (
        torch.eye(n, dtype=torch.bool).repeat(case.batch, 1, 1),
        torch.zeros(case.batch, n, dtype=torch.int64),
    )
    for b in range(case.batch):
        parents, sees, order = case.parent_rows(b), case.sees(b), []
        while len(order) < len(parents):
            order.append(
                turn.choice(
                    [
                        row
                        for row, up in enumerate(parents)
                        if row not in order and (up < 0 or up in order)
                    ]
                )
            )
        for i, row in enumerate(order):
            tokens[b, i] = case.rows(b)[row].token
            mask[b, i, : len(order)] = torch.tensor([sees[row][other] for other in order])
    back = importers.from_sglang_mask(
        mask, tokens.flatten(), n, "QLEN_ONLY", num_nodes=case.packed.indptr.diff()
    )
    back.validate()
    for b in range(case.batch):
        assert paths(back, b) == sorted(
            [case.tokens[b][column] for column in row.path] for row in case.rows(b)
        )


@given(cases(), st.sampled_from([0, 2]))
def test_sglang_masks_are_the_oracle_and_come_back(case, more):
    n, context = case.largest + more, contexts(case)
    squares = [square(case, b, n) for b in range(case.batch)]
    links = layouts.sglang(case.packed, n, context)
    back = {"num_nodes": case.packed.indptr.diff(), "num_rows": case.packed.num_rows}
    short = layouts.sglang_mask(case.packed, n, "QLEN_ONLY")
    assert short.tolist() == squares
    same(importers.from_sglang_mask(short, links.draft_tokens, n, "QLEN_ONLY", **back), case.packed)
    flat = [
        on for b in range(case.batch) for row in squares[b] for on in [True] * int(context[b]) + row
    ]
    full = layouts.sglang_mask(
        case.packed, n, "FULL_MASK", prefix_lens=context, size=len(flat) + more
    )
    assert full.tolist() == flat + [True] * more
    same(
        importers.from_sglang_mask(
            full, links.draft_tokens, n, "FULL_MASK", prefix_lens=context, **back
        ),
        case.packed,
    )
    if n > 32:
        with pytest.raises(
            echo.EchoError,
            match=f"max_verify_tokens_per_req: expected an int from 1 to 32, got {n}",
        ):
            layouts.sglang_mask(case.packed, n, "QLEN_ONLY_BITPACKING")
        return
    bits = layouts.sglang_mask(case.packed, n, "QLEN_ONLY_BITPACKING")
    assert bits.dtype == (torch.uint8 if n <= 8 else torch.uint16 if n <= 16 else torch.uint32)
    assert bits.tolist() == [
        sum(on << j for j, on in enumerate(row)) for own in squares for row in own
    ]
    same(
        importers.from_sglang_mask(bits, links.draft_tokens, n, "QLEN_ONLY_BITPACKING", **back),
        case.packed,
    )


@given(cases())
def test_masks_of_fewer_rows_are_those_of_the_first_rows(case):
    n, context = max(1, case.largest // 2), contexts(case)
    squares = [[row[:n] for row in square(case, b, case.largest)[:n]] for b in range(case.batch)]
    assert layouts.sglang_mask(case.packed, n, "QLEN_ONLY").tolist() == squares
    flat = [
        on for b in range(case.batch) for row in squares[b] for on in [True] * int(context[b]) + row
    ]
    least = (
        case.packed.batch * n * n
    )  # a size too small cuts the mask off and spoils nothing before
    for size in {len(flat), max(len(flat) - 3, least)}:
        assert (
            layouts.sglang_mask(
                case.packed, n, "FULL_MASK", prefix_lens=context, size=size
            ).tolist()
            == flat[:size]
        )
    words = layouts.tensorrt_llm(case.packed, n)
    assert words.generation_lengths.tolist() == [min(n, len(own)) for own in case.selected]
    cut = importers.from_tensorrt_llm(words)
    cut.validate(max_verify_tokens_per_req=n)
    assert layouts.sglang_mask(cut, n, "QLEN_ONLY").tolist() == squares


@given(cases(), st.sampled_from([0, 2]))
def test_what_an_engine_computes_on_uniform_rows_comes_back_to_the_packed_rows(case, more):
    n = case.largest + more
    inputs = layouts.hugging_face(case.packed, n, contexts(case), 12, left_padded=False)
    real = case.packed.request < case.batch
    assert torch.equal(layouts.unpad(case.packed, inputs.input_ids)[real], case.packed.tokens[real])
    states = torch.stack([inputs.position_ids, inputs.input_ids], dim=-1)
    assert torch.equal(
        layouts.unpad(case.packed, states)[real, 0], case.packed.positions(contexts(case))[real]
    )
    assert (layouts.unpad(case.packed, inputs.input_ids)[~real] == -1).all()
    with pytest.raises(echo.EchoError, match="values: expected"):
        layouts.unpad(case.packed, torch.zeros(case.batch + 1, n))


@given(cases(), st.integers(1, 6))
def test_rows_that_an_engine_did_not_compute_have_no_token_and_no_number(case, n):
    """A target that depends on the last token and follows the tree: from fewer rows than a tree
    has comes a shorter text of its own.
    """
    packed, law = case.packed, torch.arange(1 + int(case.packed.tokens.max()))
    drafted = packed.parent >= 0
    law[packed.tokens[(packed.indptr[packed.request] + packed.parent)[drafted]]] = packed.tokens[
        drafted
    ]
    ids = layouts.hugging_face(packed, n, contexts(case), 12, left_padded=False).input_ids
    sampled = layouts.unpad(packed, law[ids])
    real = packed.request < case.batch
    beyond = ~real | (packed.local_row >= n)
    assert torch.equal(sampled == -1, beyond)
    assert layouts.unpad(packed, law[ids].half()[..., None])[beyond].isnan().all()
    assert not layouts.unpad(packed, torch.ones_like(ids, dtype=torch.bool))[beyond].any()
    assert layouts.unpad(packed, law[ids][:, :0]).tolist() == [-1] * packed.num_rows
    accepted = echo.accept(packed, sampled)
    for b, (tokens, rows) in enumerate(
        zip(accepted.tokens.tolist(), accepted.rows.tolist(), strict=True)
    ):
        root = (
            int(packed.tokens[packed.indptr[b]]) if packed.indptr[b] < packed.indptr[b + 1] else 0
        )
        for token, row in zip(tokens, rows, strict=True):
            if token >= 0:
                assert token == law[root]
                assert not beyond[row]
                root = token


@given(cases(), st.sampled_from([0, 7]))
def test_flashinfer_masks_are_the_oracle_and_come_back(case, more):
    """The bit formula of its kernels: bit (row * kv + column) of a request's own bytes, least
    significant first.
    """
    context = contexts(case)
    flat, packed_bits, ends, bytes_ = [], [], [0], [0]
    for b in range(case.batch):
        mine = [on for row in case.sees(b) for on in [True] * int(context[b]) + row]
        flat += mine
        own = [0] * -(-len(mine) // 8)
        for place, on in enumerate(mine):
            own[place // 8] |= on << place % 8
        packed_bits += own
        ends.append(len(flat))
        bytes_.append(len(packed_bits))
        assert own == np.packbits(np.array(mine, dtype=bool), bitorder="little").tolist()
    with pytest.raises(
        echo.EchoError, match="size: expected an int from 0 to 2147483647, got 2147483648"
    ):
        layouts.flashinfer(case.packed, context, 1 << 31)
    for bits, expected, begins in ((False, flat, ends), (True, packed_bits, bytes_)):
        mask = layouts.flashinfer(case.packed, context, len(expected) + more, bits=bits)
        assert mask.mask.tolist() == expected + [255 if bits else True] * more
        assert mask.indptr.tolist() == begins
        assert mask.qo_indptr.tolist() == case.packed.indptr.tolist()
        assert mask.kv_lens.tolist() == [
            (int(context[b]) + len(own)) * bool(own) for b, own in enumerate(case.selected)
        ]
        same(
            importers.from_flashinfer(mask, case.packed.tokens, num_rows=case.packed.num_rows),
            case.packed,
        )
        if len(expected) > 1:  # a buffer too small is never written beyond
            assert (
                layouts.flashinfer(
                    case.packed, context, len(expected) // 2, bits=bits
                ).mask.tolist()
                == expected[: len(expected) // 2]
            )
    halves = layouts.flashinfer_xqa(case.packed)
    whole = halves.int().view(case.packed.num_rows, -1, 2)
    assert torch.equal(whole[..., 0] | whole[..., 1] << 16, case.packed.mask)
    same(
        importers.from_flashinfer_xqa(
            halves, case.packed.indptr, case.packed.tokens, num_rows=case.packed.num_rows
        ),
        case.packed,
    )


@given(cases(), st.sampled_from([0, 2]))
def test_tensorrt_words_are_the_oracle_and_come_back(case, more):
    n = case.largest + more
    links = layouts.tensorrt_llm(case.packed, n)
    for b in range(case.batch):
        assert (links.next_token[b].tolist(), links.next_sibling[b].tolist()) == children(
            case, b, n
        )
        depths = [len(row.path) - 1 for row in case.rows(b)]
        assert links.position_offsets[b].tolist() == depths + [0] * (n - len(depths))
        for i, row in enumerate(square(case, b, n)):
            words = [word & 0xFFFFFFFF for word in links.packed_mask[b, i].tolist()]
            assert words == [
                sum(on << j for j, on in enumerate(row[w : w + 32])) for w in range(0, n, 32)
            ]
    same(importers.from_tensorrt_llm(links, num_rows=case.packed.num_rows), case.packed)


@given(cases(), st.sampled_from([torch.bool, torch.float32, torch.float16]))
def test_hugging_face_mask_is_the_oracle_and_comes_back(case, dtype):
    n, past, context = case.largest, 12, contexts(case)
    inputs = layouts.hugging_face(case.packed, n, context, past, left_padded=False, dtype=dtype)
    mask = inputs.attention_mask if dtype == torch.bool else inputs.attention_mask == 0
    for b in range(case.batch):
        pad, own = [False] * (past - int(context[b])), [True] * int(context[b])
        assert mask[b, 0].tolist() == [own + pad + row for row in square(case, b, n)]
    assert dtype == torch.bool or inputs.attention_mask.min() in (0, torch.finfo(dtype).min)
    same(
        importers.from_hugging_face(
            inputs, num_nodes=case.packed.indptr.diff(), num_rows=case.packed.num_rows
        ),
        case.packed,
    )


@given(st.integers(0, 100_000), st.integers(1, 4), st.data())
def test_a_padded_cache_holds_every_text_after_every_step(seed, batch, data):
    """Prompts padded on the left are moved once; then every pass appends behind the longest
    text, as a DynamicCache does.
    """
    texts = [
        data.draw(st.lists(st.integers(100, 999), min_size=1, max_size=9)) for _ in range(batch)
    ]
    past, context = max(map(len, texts)), torch.tensor([len(text) for text in texts])
    cache = torch.tensor([[0] * (past - len(text)) + text for text in texts])
    cache = cache.gather(1, (torch.arange(past) + past - context[:, None]).clamp(max=past - 1))
    for step in range(3):
        packed, past = forest(seed + step, batch, 9, pads=2).packed, cache.shape[1]
        n = data.draw(
            st.integers(packed.max_verify_tokens_per_req, packed.max_verify_tokens_per_req + 2)
        )
        inputs = layouts.hugging_face(packed, n, context, past, left_padded=False)
        cache = torch.cat([cache, inputs.input_ids], dim=1)
        target = torch.tensor(data.draw(st.permutations(packed.tokens.tolist())))
        drafted = packed.parent >= 0
        target[(packed.indptr[packed.request.clamp(max=batch - 1)] + packed.parent)[drafted]] = (
            packed.tokens[drafted]
        )
        accepted = echo.accept(packed, target)
        for b, rows in enumerate(accepted.rows.tolist()):
            kept = [row for row in rows if row >= 0]
            if kept:  # what the last accepted row sees is the text and its path
                texts[b] += packed.tokens[kept].tolist()
                assert (
                    cache[b][inputs.attention_mask[b, 0, int(packed.local_row[kept[-1]])]].tolist()
                    == texts[b]
                )
        lists = compact(packed, accepted, context, past_len=past)
        cache.scatter_(1, lists.target, cache.gather(1, lists.source))
        context, cache = lists.prefix_lens, cache[:, : int(lists.prefix_lens.max())]
        assert [
            row[:length] for row, length in zip(cache.tolist(), context.tolist(), strict=True)
        ] == texts


def test_a_left_padded_cache_is_refused():
    case = forest(1, 2, 9, empty=False)
    for padded in (None, True):
        with pytest.raises(
            echo.EchoError,
            match=f"left_padded: expected False, a cache whose texts begin at entry 0, got {padded}",
        ):
            layouts.hugging_face(case.packed, 9, torch.tensor([3, 4]), 5, left_padded=padded)
    alone = forest(1, 1, 9, empty=False).packed
    one, two = (
        layouts.hugging_face(alone, 9, torch.tensor([5]), 5, left_padded=padded).attention_mask
        for padded in (None, False)
    )
    assert torch.equal(one, two)


@given(cases())
def test_chains_are_the_rows_above_the_first_branch(case):
    chain = layouts.chains(case.packed)
    tokens, lens, drafts, targets, bonus = [], [], [], [], []
    for b in range(case.batch):
        rows = [row for local, row in enumerate(case.rows(b)) if len(row.path) == local + 1]
        lens.append(len(rows))
        drafts += [row.token for row in rows[1:]]
        targets += list(range(len(tokens), len(tokens) + len(rows) - 1))
        tokens += [row.token for row in rows]
        bonus.append(len(tokens) - 1 if rows else 0)
    n = case.packed.num_rows
    assert chain.tokens.tolist() == tokens + [0] * (n - len(tokens))
    assert chain.verify_lens.tolist() == lens
    assert chain.qo_indptr.tolist() == [sum(lens[:b]) for b in range(case.batch + 1)]
    assert chain.draft_token_ids.tolist() == drafts + [0] * (n - len(drafts))
    assert chain.target_logits_indices.tolist() == targets + [0] * (n - len(targets))
    assert chain.bonus_logits_indices.tolist() == bonus
    assert chain.num_draft_tokens.tolist() == [max(0, size - 1) for size in lens]
    assert (
        chain.cu_num_draft_tokens.tolist()
        == torch.tensor([max(0, size - 1) for size in lens]).cumsum(0).tolist()
    )
    assert torch.equal(case.packed.tokens[chain.rows[: len(tokens)]], chain.tokens[: len(tokens)])


@given(cases(shape="chain", most=40))
def test_chains_lose_nothing_of_chains(case):
    case.packed.validate(chain=True)
    whole = sum(len(own) for own in case.selected)
    chain = layouts.chains(case.packed)
    assert chain.rows[:whole].tolist() == list(range(whole))
    same(importers.from_chains(chain), case.packed)


def test_vllm_metadata_of_a_known_batch():
    """The example in vLLM's own comments: 3, 0, 2, 0 and 1 drafts."""
    drafts = [3, 0, 2, 0, 1]
    arrays = [
        torch.zeros(5, 4, dtype=torch.int64),
        torch.arange(-1, 3).expand(5, 4),
        torch.zeros(5, 4),
    ]
    tree = echo.SuperTree.from_arrays(*arrays, num_nodes=torch.tensor(drafts) + 1)
    chain = layouts.chains(echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=11).pack(tree))
    assert chain.cu_num_draft_tokens.tolist() == [3, 3, 5, 5, 6]
    assert chain.target_logits_indices[:6].tolist() == [0, 1, 2, 5, 6, 9]
    assert chain.bonus_logits_indices.tolist() == [3, 4, 7, 8, 10]
    assert chain.logits_indices.tolist() == list(range(11))


@given(cases(batch=1))
def test_qq_bias_is_the_oracle_and_comes_back(case):
    rows, real = case.packed.num_rows, len(case.selected[0])
    bias = layouts.qq_bias(case.packed)
    assert (bias == 0).tolist()[:real] == square(case, 0, rows)[:real]
    assert ((bias == 0) | (bias == -torch.inf)).all() and (bias == 0).any(1).all()
    if real:
        same(importers.from_qq_bias(bias, case.packed.tokens), case.packed)
    two = forest(0, 2, 4, empty=False).packed
    with pytest.raises(echo.EchoError, match="packed: expected one request"):
        layouts.qq_bias(two)


def poisoned(value):
    """An engine's buffers for a value: same shapes, other numbers, memory of their own."""
    if isinstance(value, torch.Tensor):
        return (
            torch.full_like(value, 77)
            if value.dtype not in (torch.uint16, torch.uint32)
            else torch.zeros_like(value)
        )
    return dataclasses.replace(
        value, **{f.name: poisoned(getattr(value, f.name)) for f in tensors(value)}
    )


def tensors(value):
    return [
        f for f in dataclasses.fields(value) if isinstance(getattr(value, f.name), torch.Tensor)
    ]


def test_out_writes_into_the_engines_buffers():
    case, context = forest(1, 4, 12, empty=False), torch.arange(4)
    accepted = echo.accept(case.packed, case.packed.tokens)
    selected = torch.isfinite(case.tree.forest.score)
    for call in (
        lambda out: pack(case.tree, selected, 48, 1, out),
        lambda out: compact(case.packed, accepted, context, out=out),
        lambda out: layouts.sglang(case.packed, 12, context, out=out),
        lambda out: layouts.sglang_mask(case.packed, 12, "QLEN_ONLY", out=out),
        lambda out: layouts.sglang_mask(case.packed, 12, "QLEN_ONLY_BITPACKING", out=out),
        lambda out: layouts.sglang_mask(
            case.packed, 12, "FULL_MASK", prefix_lens=context, size=900, out=out
        ),
        lambda out: layouts.chains(case.packed, out=out),
        lambda out: layouts.flashinfer(case.packed, context, 400, out=out),
        lambda out: layouts.flashinfer(case.packed, context, 900, bits=False, out=out),
        lambda out: layouts.tensorrt_llm(case.packed, 12, out=out),
        lambda out: layouts.hugging_face(case.packed, 12, context, 5, left_padded=False, out=out),
        lambda out: case.packed.to_buffer(out=out),
    ):
        value = call(None)
        buffer = poisoned(value)
        written = call(buffer)
        if isinstance(value, torch.Tensor):
            assert written.data_ptr() == buffer.data_ptr() and torch.equal(written, value)
            continue
        for f in tensors(value):
            assert getattr(written, f.name).data_ptr() == getattr(buffer, f.name).data_ptr()
            assert torch.equal(getattr(written, f.name), getattr(value, f.name)), f.name
    for call, name in (
        (lambda out: layouts.sglang(case.packed, 12, context, out=out), "retrive_next_sibling"),
        (
            lambda out: layouts.hugging_face(
                case.packed, 12, context, 5, left_padded=False, out=out
            ),
            "position_ids",
        ),
    ):
        buffer = poisoned(call(None))
        before = {f.name: getattr(buffer, f.name).clone() for f in tensors(buffer)}
        with pytest.raises(echo.EchoError, match=f"out.{name}: expected"):
            call(dataclasses.replace(buffer, **{name: before[name].flatten()[:3]}))
        assert all(
            torch.equal(getattr(buffer, name), old) for name, old in before.items()
        )  # nothing is half-written
    with pytest.raises(
        echo.EchoError, match=r"out.draft_tokens: expected int64 \[48\], got int64 \[52\]"
    ):
        layouts.sglang(case.packed, 12, context, out=layouts.sglang(case.packed, 13, context))
    larger = layouts.hugging_face(case.packed, 12, context, 6, left_padded=False)
    with pytest.raises(
        echo.EchoError,
        match=r"out.attention_mask: expected bool \[4, 1, 12, 17\], got bool \[4, 1, 12, 18\]",
    ):
        layouts.hugging_face(case.packed, 12, context, 5, left_padded=False, out=larger)
    with pytest.raises(echo.EchoError, match=r"out: expected a SGLangLinks, got Chains"):
        layouts.sglang(case.packed, 12, context, out=layouts.chains(case.packed))


def test_no_ragged_view_reads_back():
    """The rest of what test_device_rules.py runs under the same refusal."""
    one, case = forest(1, 1, 9, empty=False).packed, forest(1, 3, 12)
    with RefuseSyncs():
        layouts.qq_bias(one)
        layouts.flashinfer_xqa(case.packed)
        layouts.unpad(case.packed, torch.zeros(3, 12))


def test_bad_input_names_the_argument():
    case = forest(1, 2, 9, empty=False)
    packed, good = case.packed, torch.tensor([3, 4])
    context = r"prefix_lens: expected int64 or int32 \[2\], got float32 \[2\]"
    for call, message in [
        (lambda: layouts.sglang(packed, 0, good), r"max_verify_tokens_per_req: expected an int >= 1, got 0"),
        (lambda: layouts.sglang(packed, 9, good.float()), context),
        (lambda: layouts.sglang_mask(packed, 9, "FULL_MASK"), r"mode: expected .* FULL_MASK with prefix_lens and size, got 'FULL_MASK'"),
        (lambda: layouts.sglang_mask(packed, 9, "TREE"), r"mode: expected .* got 'TREE'"),
        (lambda: layouts.sglang_mask(packed, 9, "FULL_MASK", prefix_lens=good, size=5), r"size: expected an int >= 162, got 5"),
        (lambda: layouts.flashinfer(packed, good.float(), 9), context),
        (lambda: layouts.hugging_face(packed, 9, good, -1, left_padded=False), r"past_len: expected an int >= 0, got -1"),
        (lambda: compact(packed, echo.accept(packed, packed.tokens), good.float()), context),
        (lambda: compact(packed, echo.accept(packed, packed.tokens), good, page_table=torch.zeros(2, 3).int()),
         r"pad_slot_id: expected a slot that no request owns, to go with page_table, got None"),
        (lambda: compact(packed, echo.accept(packed, packed.tokens), good, page_table=torch.zeros(2, 3).int(), pad_slot_id=0, past_len=4),
         r"past_len: expected None, to go with page_table, got 4"),
        (lambda: compact(packed, echo.accept(packed, packed.tokens), good, past_len=-1), r"past_len: expected an int >= 0, got -1"),
        (lambda: packed.slot_mapping(good, torch.zeros(2, 3).int(), 0, 0), r"page_size: expected an int >= 1, got 0"),
        (lambda: importers.from_sglang_mask(torch.ones(2, 9, 9).bool(), torch.arange(18), 9, "FULL_MASK"), r"mode: expected"),
        (lambda: importers.from_sglang_mask(torch.ones(9).bool(), torch.arange(2), 1, "FULL_MASK", prefix_lens=torch.tensor([3, 20])),
         r"mask: request 1: expected at least 25 entries, got 9"),
    ]:  # fmt: skip
        with pytest.raises(echo.EchoError, match=message):
            call()
    mask = layouts.flashinfer(packed, good, 400, bits=False)
    mask.mask[1] = False
    with pytest.raises(
        echo.EchoError, match="mask: request 0, row 0: expected the whole prefix visible"
    ):
        importers.from_flashinfer(mask, packed.tokens)


def test_what_an_engines_kernels_do_not_verify_is_refused():
    packed = forest(0, 3, 4).packed
    for pages in (None, 16, 64, 128):
        layouts.flashinfer_xqa(packed, page_size=pages)
    with pytest.raises(echo.EchoError, match=r"page_size: expected one that XQA reads, .* got 1$"):
        layouts.flashinfer_xqa(packed, page_size=1)
    for limit in ({"window": 4096}, {"mla": True}):
        with pytest.raises(echo.EchoError, match="without a window or latents"):
            layouts.tensorrt_llm(packed, 12, **limit)


def test_importers_take_batches_without_requests():
    none = torch.zeros(0, 4, dtype=torch.int64)
    links = dataclasses.replace(
        layouts.tensorrt_llm(forest(1, 1, 3, empty=False).packed, 4),
        tokens=none, packed_mask=torch.zeros(0, 4, 1, dtype=torch.int32),
        generation_lengths=torch.zeros(0, dtype=torch.int32),
    )  # fmt: skip
    bits = torch.zeros(0, dtype=torch.uint8)
    for packed in (
        importers.from_tensorrt_llm(links),
        importers.from_sglang_mask(bits, none.flatten(), 4, "QLEN_ONLY_BITPACKING"),
    ):
        assert packed.batch == 0 and not int(packed.indptr[-1])


def test_a_mask_that_begins_before_its_buffer_is_named():
    packed, context = forest(1, 2, 6, empty=False).packed, torch.tensor([3, 4])
    mask = layouts.flashinfer(packed, context, size=4096)
    broken = dataclasses.replace(mask, indptr=mask.indptr - 1)
    with pytest.raises(echo.EchoError, match="mask: "):
        importers.from_flashinfer(broken, packed.tokens)
