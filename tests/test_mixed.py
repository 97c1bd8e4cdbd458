"""Prefill beside trees in one pass: rows, positions, masks, attention, and its price."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
import tiny
from echo import kernels
from echo.testing import RefuseSyncs
from echo.tree import layouts
from forests import forest
from serving import Server

SCHEDULER = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 3), budget=24, max_depth=3)
GENERATOR = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(tiny.VOCAB, (n,), generator=GENERATOR).tolist() for n in (4, 7, 75, 38)]
COUNT, CHUNK, LONGEST = 20, 41, 32


@st.composite
def cases(draw):
    case = forest(
        draw(st.integers(0, 100_000)),
        draw(st.integers(1, 4)),
        draw(st.sampled_from([1, 9, 40])),
        pads=draw(st.integers(0, 3)),
    )
    lens = draw(st.lists(st.integers(0, 40), max_size=3))
    return case, lens, draw(st.integers(0, 4))


@given(cases())
def test_trees_stay_and_segments_are_chains(given):
    case, lens, spare = given
    packed, batch, n = case.packed, case.batch, case.packed.num_rows
    tokens = torch.arange(500, 500 + sum(lens) + spare)
    indptr = torch.tensor([0, *lens]).cumsum(0).int()
    with RefuseSyncs():
        mixed = layouts.mix(packed, tokens, indptr, max_segment_len=40)
    mixed.validate()
    assert mixed.num_rows == n + len(tokens) and mixed.batch == batch + len(lens)
    used = int(packed.indptr[-1])
    for name in ("tokens", "parent", "depth", "request", "score", "node", "committed"):
        assert torch.equal(getattr(mixed, name)[:used], getattr(packed, name)[:used]), name
    assert torch.equal(mixed.visible()[:used, : packed.visible().shape[1]], packed.visible()[:used])
    assert torch.equal(mixed.indptr[: batch + 1], packed.indptr)
    for s, length in enumerate(lens):
        begin, end = mixed.indptr[batch + s : batch + s + 2].tolist()
        own = slice(begin, end)
        assert mixed.tokens[own].tolist() == tokens[indptr[s] : indptr[s + 1]].tolist()
        assert mixed.depth[own].tolist() == list(range(length))
        assert torch.equal(mixed.visible()[own, :length], torch.ones(length, length).tril().bool())
        assert not mixed.visible()[own, length:].any()


@given(cases())
def test_attention_of_a_segment_is_causal_and_that_of_trees_unchanged(given):
    case, lens, spare = given
    packed, batch = case.packed, case.batch
    tokens, indptr = torch.zeros(sum(lens) + spare).long(), torch.tensor([0, *lens]).cumsum(0).int()
    mixed = layouts.mix(packed, tokens, indptr, max_segment_len=40)
    q, k, v = torch.randn(3, mixed.num_rows, 1, 16)
    links = lambda step, n: (k[:n], v[:n], step.request, step.indptr, step.mask)
    whole, _ = kernels.tree_attention(q, *[None] * 4, *links(mixed, None), mode="tree")
    n, used = packed.num_rows, int(packed.indptr[-1])
    alone, _ = kernels.tree_attention(q[:n], *[None] * 4, *links(packed, n), mode="tree")
    torch.testing.assert_close(whole[:used], alone[:used])
    for begin, end in zip(
        mixed.indptr[batch:].tolist(), mixed.indptr[batch + 1 :].tolist(), strict=False
    ):
        parts = (x[begin:end].transpose(0, 1) for x in (q, k, v))
        causal = torch.nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        torch.testing.assert_close(whole[begin:end], causal.transpose(0, 1), atol=1e-5, rtol=1e-5)


class Mixed(Server):
    """Its last two requests are prefilled chunk by chunk in the passes of the first two."""

    def __init__(self, model):
        greedy = lambda packed, logits: logits[: packed.num_rows].argmax(-1)
        super().__init__(model, PROMPTS, SCHEDULER, greedy)
        slots = model.page_table[2:].long()[..., None] * tiny.PAGE + torch.arange(tiny.PAGE)
        model.kv[:, :, slots] = torch.nan  # nothing of the prefill that Server has made
        self.prefix_lens[2:] = 0
        self.live[2:] = False
        self.texts[2:] = [[], []]
        self.rows, self.begun = [], []

    def verify(self, packed):
        """One pass: trees, and a chunk of each prompt that is not in the cache yet."""
        chunks = []  # request, first position, tokens
        for b in (2, 3):
            done = int(self.prefix_lens[b])
            rest = PROMPTS[b][done : done + CHUNK] if not self.live[b] else []
            chunks += [(b, done + i, rest[i : i + LONGEST]) for i in range(0, len(rest), LONGEST)]
        tokens = torch.tensor([t for _, _, part in chunks for t in part], dtype=torch.int64)
        indptr = torch.tensor([0, *(len(part) for _, _, part in chunks)]).cumsum(0).int()
        mixed = layouts.mix(packed, tokens, indptr, LONGEST)
        owner = torch.tensor([*range(4), *(b for b, _, _ in chunks)])
        prefix = torch.cat([self.prefix_lens, torch.tensor([p for _, p, _ in chunks]).int()])
        table = self.model.page_table[owner]
        pages = {"page_table": table, "page_size": tiny.PAGE, "pad_slot_id": 0}

        def attend(layer, q, k, v):
            keys, values = self.model.kv[layer].unflatten(1, (-1, tiny.PAGE))
            tree = k, v, mixed.request, mixed.indptr, mixed.mask
            return kernels.tree_attention(q, keys, values, table, prefix, *tree, backend="torch")[0]

        slots = mixed.slot_mapping(prefix, **pages)
        logits, hidden = self.model(mixed.tokens, mixed.positions(prefix), slots, attend)
        last = mixed.indptr[5:] - 1
        for (b, begin, part), row in zip(chunks, last.tolist(), strict=True):
            self.prefix_lens[b] = begin + len(part)
            if self.prefix_lens[b] == len(PROMPTS[b]):
                self.begun.append((b, int(logits[row].argmax()), hidden[row]))
        self.rows.append((packed.num_rows, mixed.num_rows))
        return logits[: packed.num_rows], hidden[: packed.num_rows]

    def finish(self, packed, accepted, hidden):
        done = super().finish(packed, accepted, hidden)
        for b, token, state in self.begun:
            self.live[b], self.root_tokens[b], self.drafter.state[b] = True, token, state
            self.texts[b] = [token]
        self.begun.clear()
        return done


def test_prompts_are_prefilled_beside_trees():
    """The text of plain decoding, of chunks of which one is two segments of a request."""
    model = tiny.Model(len(PROMPTS), pages=30)
    expected = [model.greedy(torch.tensor(prompt), COUNT) for prompt in PROMPTS]
    server = Mixed(model)
    assert server.run(COUNT) > 5
    assert server.texts == expected
    mixed = [(n, more) for n, more in server.rows if more > n]
    assert len(mixed) == 2 and mixed[0] == (24, 24 + CHUNK + 38)


def test_prefill_takes_its_price_from_the_drafts():
    cost = echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0))
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, cost, 3)
    history = scheduler.history(4)
    tokens = [
        scheduler.choose_tier(history, [0, 1], num_other_tokens=other).num_verify_tokens
        for other in (0, 8, 60)
    ]
    assert tokens[0] > tokens[1] >= 2 and tokens == sorted(tokens, reverse=True)


def test_what_does_not_fit_is_named():
    packed, token, indptr = (
        forest(1, 2, 5).packed,
        torch.zeros(3).long(),
        torch.tensor([0, 3]).int(),
    )
    for says, call in {
        "tokens: expected int64": lambda: layouts.mix(packed, token.int(), indptr, 3),
        "indptr: expected int32": lambda: layouts.mix(packed, token, indptr.long(), 3),
        "max_segment_len: expected an int >= 1": lambda: layouts.mix(packed, token, indptr, 0),
    }.items():
        with pytest.raises(echo.EchoError, match=says):
            call()
