"""Drafts in pages: their own slots alone, shared pages never, and 8-bit caches as they read back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
import tiny
from echo import kernels
from echo.testing import RefuseSyncs
from echo.tree import cache
from forests import forest
from serving import Server

SCHEDULER = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=16, max_depth=4)
COUNT = 20


@given(st.integers(0, 100_000), st.integers(1, 4), st.integers(1, 5), st.integers(0, 20))
def test_branches_share_the_last_page_and_leave_the_prefix_alone(seed, batch, page, longest):
    """Rows of all branches lie one after another behind the prefix: no page of a branch's own."""
    case = forest(seed, batch, 12, pads=2)
    packed, generator = case.packed, torch.Generator().manual_seed(seed)
    lens = torch.randint(0, longest + 1, (batch,), generator=generator)
    pages = -(-(longest + 12) // page)
    table = 1 + torch.randperm(batch * pages, generator=generator).view(batch, pages)
    slots = packed.slot_mapping(lens, table, page, pad_slot_id=0)
    real = slots[packed.request < batch].tolist()
    assert len(set(real)) == len(real) and 0 not in real
    for b in range(batch):
        place = torch.arange(int(lens[b]) + len(case.rows(b)))
        own = (table[b][place // page] * page + place % page).tolist()
        assert slots[packed.request == b].tolist() == own[int(lens[b]) :]


def forked(prompt):
    """Two requests of one prompt in the same pages, and which pages they share."""
    model = tiny.Model(2, pages=16)
    refused = lambda packed, logits: torch.where(server.slots == 0, -1, logits.argmax(-1))
    server = Server(model, [prompt, prompt], SCHEDULER, refused)
    used = -(-len(prompt) // tiny.PAGE)
    model.page_table[1, :used] = model.page_table[0, :used]
    server.shared = torch.zeros(1 + 2 * 16, dtype=torch.bool)
    server.shared[model.page_table[0, :used].long()] = True
    behind = lambda packed: packed.slot_mapping(server.prefix_lens, **server.pages)

    def slots_of(packed):
        with RefuseSyncs():
            server.slots = cache.refuse_shared(behind(packed), server.shared, tiny.PAGE, 0)
        return server.slots

    server.slots_of = slots_of
    return server, used


def test_a_shared_page_is_never_written():
    prompt, page = [3, 1, 4, 1, 5, 9], torch.arange(tiny.PAGE)  # ends within a page
    expected = tiny.Model(2, pages=16).greedy(torch.tensor(prompt), COUNT)
    server, used = forked(prompt)
    model, slots = server.model, server.shared.repeat_interleave(tiny.PAGE)
    before = model.kv[:, :, slots].clone()
    _, accepted = server.step()  # the last page is not copied yet
    assert accepted.num_emitted.tolist() == [0, 0]
    assert torch.equal(model.kv[:, :, slots], before)
    old, new = int(model.page_table[1, used - 1]), int(model.page_table[1, -1])
    model.kv[:, :, new * tiny.PAGE + page] = model.kv[:, :, old * tiny.PAGE + page]
    model.page_table[1, used - 1] = new
    server.shared[old] = False  # one owner again
    slots = server.shared.repeat_interleave(tiny.PAGE)
    before = model.kv[:, :, slots].clone()
    assert server.run(COUNT) > 0
    assert server.texts == [expected, expected]
    assert slots.any() and torch.equal(model.kv[:, :, slots], before)


def test_a_page_that_ends_with_the_prefix_needs_no_copy():
    prompt = [3, 1, 4, 1, 5, 9, 2, 6]
    server, _ = forked(prompt)
    expected = tiny.Model(2, pages=16).greedy(torch.tensor(prompt), COUNT)
    server.run(COUNT)
    assert server.texts == [expected, expected]


class EightBits(Server):
    """Drafts beside a cache of 8 bits, ``rounded`` as the cache is, or not."""

    def __init__(self, *args, dtype, scale, rounded, **options):
        self.kind, self.scale, self.rounded = dtype, scale, rounded
        super().__init__(*args, **options)

    def attend(self, packed, layer, q, k, v):
        scale = self.scale[:, None]
        stored = (self.model.kv[layer] / scale).clamp(-240, 240).to(self.kind)
        keys, values = stored.unflatten(1, (-1, tiny.PAGE))
        if self.rounded:
            with RefuseSyncs():
                k, v = (cache.as_cached(x, self.kind, self.scale) for x in (k, v))
        tree = k, v, packed.request, packed.indptr, packed.mask
        prefix = keys, values, self.model.page_table, self.prefix_lens
        scales = {"key_scale": self.scale, "value_scale": self.scale}
        return kernels.tree_attention(q, *prefix, *tree, **scales, backend="torch")[0]


def read_back(text, dtype, scale):
    """Attention of a whole text to what its cache holds, its own keys included."""
    place = torch.arange(len(text))
    seen, own = place[:, None] >= place, lambda x: cache.as_cached(x, dtype, scale)
    return lambda _, q, k, v: tiny.attention(q, own(k), own(v), seen)


def plain_in_eight_bits(model, prompt, count, dtype, scale):
    text = list(prompt)
    for _ in range(count):
        place = torch.arange(len(text))
        attend = read_back(text, dtype, scale)
        logits, _ = model(torch.tensor(text), place, torch.zeros_like(place), attend)
        text.append(int(logits[-1].argmax()))
    return text[len(prompt) :]


def test_drafts_beside_an_eight_bit_cache_are_read_as_from_it():
    scale, prompts = torch.tensor([0.7, 1.3]), ([5, 9, 9, 30], [1, 2, 3, 4, 5, 6], [40])
    best, dtype, exact = lambda packed, logits: logits.argmax(-1), torch.float8_e5m2, []
    for seed in range(4):
        model = tiny.Model(3, pages=16, seed=seed)
        expected = [plain_in_eight_bits(model, p, COUNT, dtype, scale) for p in prompts]
        for rounded in (True, False):
            first = lambda b, _, e=expected: e[b][0]
            options = {"dtype": dtype, "scale": scale, "rounded": rounded, "first": first}
            server = EightBits(model, prompts, SCHEDULER, best, **options)
            for b, prompt in enumerate(prompts):  # the prefill of a model that reads its cache
                place = torch.arange(len(prompt))
                page = model.page_table[b].long()[place // tiny.PAGE]
                slots = page * tiny.PAGE + place % tiny.PAGE
                model(torch.tensor(prompt), place, slots, read_back(prompt, dtype, scale))
            server.run(COUNT)
            exact.append((rounded, server.texts == expected))
    assert all(same for rounded, same in exact if rounded)
    assert not all(same for rounded, same in exact if not rounded)


@given(st.integers(0, 1000), st.booleans())
def test_rounding_is_the_caches(seed, scaled):
    generator = torch.Generator().manual_seed(seed)
    values = 300 * torch.randn(5, 2, 8, generator=generator)
    scale = torch.rand(2, generator=generator) + 0.1 if scaled else None
    read = cache.as_cached(values, torch.float8_e4m3fn, scale)
    factor = torch.ones(2, 1) if scale is None else scale[:, None]
    stored = (values / factor).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(read, stored.float() * factor)
    assert torch.equal(cache.as_cached(read, torch.float8_e4m3fn, scale), read)


def test_memory_is_known_before_it_is_allocated():
    budget = echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0))
    for scheduler in (SCHEDULER, echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, budget, 3)):
        size = {"k": 4, "num_verify_tokens": 40, "max_num_reqs": 9}
        planned = echo.Workspace(scheduler, 4, **size, device="meta").nbytes
        assert planned == echo.Workspace(scheduler, 4, **size).nbytes > 1000


def test_what_does_not_fit_is_named():
    slots, shared, values = torch.zeros(3).long(), torch.zeros(2).bool(), torch.zeros(2, 3, 4)
    for says, call in {
        "slots: expected int64": lambda: cache.refuse_shared(slots.int(), shared, 4, 0),
        "shared_pages: expected bool": lambda: cache.refuse_shared(slots, slots, 4, 0),
        "values: expected": lambda: cache.as_cached(values[0], torch.float8_e5m2),
        "dtype: expected a float dtype": lambda: cache.as_cached(values, torch.int8),
        r"scale: expected float32 \[3\]": lambda: cache.as_cached(
            values, torch.float8_e5m2, values[0, 0]
        ),
    }.items():
        with pytest.raises(echo.EchoError, match=says):
            call()


def test_slots_of_no_page_go_to_the_pad_slot():
    slots, shared = torch.tensor([-1, 3, 8, 1 << 40, 0]), torch.tensor([False, False])
    assert cache.refuse_shared(slots, shared, 4, 2).tolist() == [2, 3, 2, 2, 0]


def test_a_tiers_memory_is_what_is_allocated():
    """By one call, before anything is: the workspace itself, the drafts, attention's own tensors."""
    from echo.memory import tier_memory

    model = {"num_layers": 3, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64}
    found = tier_memory(
        SCHEDULER, 4, k=3, num_verify_tokens=16, max_model_len=500, page_size=16,
        dtype=torch.float32, **model,
    )  # fmt: skip
    space = echo.Workspace(SCHEDULER, 4, k=3, num_verify_tokens=16)
    assert found.workspace == space.nbytes
    assert found.drafts == torch.zeros(3, 2, 16, 2, 64).nbytes
    q, kv = torch.zeros(16, 8, 64), torch.zeros(32, 16, 2, 64)
    table, lens = torch.zeros(4, 32, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    indptr = torch.tensor([0, 4, 8, 12, 16]).int()
    with kernels.using("triton"):
        plan = kernels.plan_attention(q, kv, table, lens, kv[0], indptr)
    listed = plan.work.nbytes + plan.programs.nbytes + plan.cuts.nbytes
    assert found.attention >= listed and (found.attention - listed) % (4 * 2 * 65) == 0
    assert found.total == found.workspace + found.drafts + found.attention
    with pytest.raises(echo.EchoError, match="num_heads: expected a multiple of 3"):
        tier_memory(
            SCHEDULER,
            4,
            k=3,
            num_verify_tokens=16,
            max_model_len=9,
            **(model | {"num_kv_heads": 3}),
        )
