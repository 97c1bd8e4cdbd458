"""Layers that are not full attention: sliding windows by depth, latent attention, state spaces."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
import tiny
from echo.testing import RefuseSyncs
from echo.tree import layouts
from forests import forest
from serving import Server, plain

PROMPTS, COUNT = ([5, 9, 9, 30], [1, 2, 3, 4, 5, 6, 7, 8, 9], [40]), 24
TREES = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=24, max_depth=4)
CHAINS = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=15, max_depth=4)
best = lambda packed, logits: logits.argmax(-1)


@st.composite
def cases(draw):
    seed, batch = draw(st.integers(0, 100_000)), draw(st.integers(1, 4))
    return forest(seed, batch, draw(st.sampled_from([1, 9, 40])), pads=draw(st.integers(0, 3)))


@given(cases(), st.integers(1, 9))
def test_a_window_is_counted_in_depths(case, size):
    with RefuseSyncs():
        packed = case.packed.windowed(size)
    seen, row = packed.visible(), 0
    for b in range(case.batch):
        rows = case.rows(b)
        for own in rows:
            depth = len(own.path)
            expected = [
                own.path[: len(other.path)] == other.path and depth - len(other.path) < size
                for other in rows
            ]
            assert seen[row, : len(rows)].tolist() == expected
            row += 1
    assert torch.equal(seen[row:], case.packed.visible()[row:])


@pytest.mark.parametrize("window", [2, 4, 9])
def test_sliding_windows_write_the_greedy_text(window):
    model = tiny.Model(len(PROMPTS), pages=20)
    greedy = lambda logits, emitted: int(logits.argmax())
    expected = [plain(model, prompt, COUNT, greedy, window) for prompt in PROMPTS]
    first = lambda b, logits: int(logits.argmax())
    rotated, model.prefill = model.prefill, lambda b, prompt: prefill(model, b, prompt, window)
    server = Server(model, PROMPTS, TREES, best, window=window, first=first)
    assert server.run(COUNT) > 3
    assert server.texts == expected
    model.prefill = rotated
    if window < 9:
        assert expected != [model.greedy(torch.tensor(prompt), COUNT) for prompt in PROMPTS]


def prefill(model, b, prompt, window):
    """A prompt's keys behind layers of a window."""
    place = torch.arange(len(prompt))
    slots = model.page_table[b].long()[place // tiny.PAGE] * tiny.PAGE + place % tiny.PAGE
    seen = (place[:, None] >= place) & (place[:, None] - place < window)
    attend = lambda _, q, k, v: tiny.attention(q, k, v, seen)
    logits, hidden = model(prompt, place, slots, attend)
    return int(logits[-1].argmax()), hidden[-1]


@given(cases(), st.integers(1, 9), st.sampled_from([torch.bool, torch.float32]))
def test_transformers_masks_have_the_same_window(case, window, dtype):
    """As plain decoding, row by row: a key is seen at most ``window - 1`` positions back."""
    packed, n, past_len = case.packed, case.largest, 12
    lens = torch.tensor([(5 * b + 3) % 11 for b in range(case.batch)])
    made = layouts.hugging_face(
        packed, n, lens, past_len, left_padded=False, window=window, dtype=dtype
    )
    mask = made.attention_mask if dtype == torch.bool else made.attention_mask == 0
    for b in range(case.batch):
        for i, own in enumerate(case.rows(b)):
            position = int(lens[b]) + len(own.path) - 1
            past = [k < int(lens[b]) and position - k < window for k in range(past_len)]
            assert mask[b, 0, i, :past_len].tolist() == past
            width = len(case.rows(b))
            row = int(packed.indptr[b]) + i
            tree = packed.windowed(window).visible()[row, :width]
            assert torch.equal(mask[b, 0, i, past_len : past_len + width], tree)


def test_a_transformers_model_of_sliding_layers_sees_each_path_as_its_own_text():
    """Logits of every row of a tree, against the model's own forward pass over the row's text."""
    transformers = pytest.importorskip("transformers", reason="needs the demo extra")
    config = transformers.MistralConfig(
        vocab_size=48, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=5,
        attn_implementation="eager",
    )  # fmt: skip
    model = transformers.MistralForCausalLM(config).eval()
    prompt = torch.randint(48, (1, 9))
    paths = [[[1, 2, 3, 4, 5, 6], [1, 2, 9], [7, 8]]]
    tree = echo.SuperTree.from_paths(torch.tensor([11]), paths)
    packed = echo.ElasticBudgetScheduler(echo.GlobalRank(3), budget=10).pack(tree)
    with torch.inference_mode():
        cache = transformers.DynamicCache()  # without the config: it keeps what slides out
        model(prompt, past_key_values=cache)
        inputs = layouts.hugging_face(
            packed, 10, torch.tensor([9]), 9, window=5, dtype=torch.float32
        )
        step = {"position_ids": inputs.position_ids, "attention_mask": inputs.attention_mask}
        logits = model(inputs.input_ids, **step, past_key_values=cache).logits[0]
        texts = packed.tokens[packed.ancestors().clamp(min=0)].tolist()
        for row, depth in enumerate(packed.depth.tolist()):
            text = torch.tensor([prompt[0].tolist() + texts[row][: depth + 1]])
            torch.testing.assert_close(logits[row], model(text).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_latent_attention_gets_chains():
    """Attention that is causal from the end, over pages that hold the drafts too."""
    model = tiny.Model(len(PROMPTS), pages=20)
    expected = [model.greedy(torch.tensor(prompt), COUNT) for prompt in PROMPTS]

    def attend(packed, layer, q, k, v):
        with RefuseSyncs():
            chains = layouts.mla(packed, server.tree, server.prefix_lens)
        out = torch.zeros_like(q)
        for b, (begin, end) in enumerate(pairwise(chains.qo_indptr.tolist())):
            place = torch.arange(int(chains.kv_lens[b]))
            slots = model.page_table[b].long()[place // tiny.PAGE] * tiny.PAGE + place % tiny.PAGE
            causal = torch.arange(begin - end, 0)[:, None] + len(place) >= place
            keys, values = model.kv[layer][:, slots]
            out[begin:end] = tiny.attention(q[begin:end], keys, values, causal)
        return out

    class Chained(Server):
        def draft(self):
            self.tree = super().draft()
            return self.tree

    server = Chained(model, PROMPTS, CHAINS, best, k=1)
    server.attend = attend
    assert server.run(COUNT) > 3
    assert server.texts == expected


def test_latent_attention_refuses_trees():
    tree = echo.SuperTree.from_paths(torch.tensor([7]), [[[1, 2], [3]]])
    packed = TREES.pack(tree)
    with pytest.raises(echo.EchoError, match=r"tree: expected a chain.*got layers of \[1, 2, 1\]"):
        layouts.mla(packed, tree, torch.tensor([4]))
    chain = echo.SuperTree.from_paths(torch.tensor([7]), [[[1, 2]]])
    with pytest.raises(echo.EchoError, match="prefix_lens: expected"):
        layouts.mla(TREES.pack(chain), chain, torch.tensor([4.0]))


class Recurrent:
    """A state-space model: one state a request, and a row's state from its parent's."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.embed = 2 * torch.randn(tiny.VOCAB, 24, generator=generator)
        self.decay = torch.rand(24, generator=generator)
        self.head = torch.randn(24, tiny.VOCAB, generator=generator)

    def step(self, state, tokens):
        """[..., 24]: one token further."""
        return torch.tanh(self.decay * state + self.embed[tokens])

    def logits(self, state):
        return state @ self.head

    def greedy(self, prompt, count):
        text, state = list(prompt), torch.zeros(24)
        for token in text:
            state = self.step(state, token)
        for _ in range(count):
            text.append(int(self.logits(state).argmax()))
            state = self.step(state, text[-1])
        return text[len(prompt) :]


@pytest.mark.parametrize("seed", range(3))
def test_state_spaces_keep_the_state_of_the_last_accepted_row(seed):
    """Rows read their parent's state; a cache of ``cap`` states a request holds all of a tree."""
    model, batch, cap = Recurrent(seed), len(PROMPTS), 6
    scheduler = echo.ElasticBudgetScheduler(
        echo.GlobalRank(3), budget=16, max_depth=3, max_verify_tokens_per_req=cap
    )
    texts, state = [], torch.zeros(batch, 24)
    for b, prompt in enumerate(PROMPTS):
        for token in prompt:
            state[b] = model.step(state[b], token)
        texts.append([int(model.logits(state[b]).argmax())])
    roots, steps = torch.tensor([text[0] for text in texts]), 0
    while min(map(len, texts)) < COUNT:
        tree, drafter = scheduler.begin(roots), model.step(state, roots)[:, None]
        for depth in range(3):
            if depth:
                drafter = model.step(tree.frontier.inherit(drafter), tree.frontier.token)
            noisy = model.logits(drafter + 0.1 * torch.sin(17.0 * drafter))
            drafts = noisy.log_softmax(-1).topk(3)
            tree = scheduler.grow(tree, drafts.indices, drafts.values)
        packed = scheduler.pack(tree)
        cache = torch.full((batch + 1, cap, 24), torch.nan)  # the engine's, by request and row
        with RefuseSyncs():
            request, local = packed.request.long(), packed.local_row
            parent = packed.parent_row
            above = torch.where(parent < 0, 0, local[parent])
            first = torch.cat([state, torch.zeros(1, 24)])[request]
            for depth in range(packed.max_depth + 1):
                before = torch.where((parent < 0)[:, None], first, cache[request, above])
                after = model.step(before, packed.tokens)
                old, at = cache[request, local], (packed.depth == depth)[:, None]
                cache = cache.index_put((request, local), torch.where(at, after, old))
            accepted = echo.accept(packed, model.logits(cache[request, local]).argmax(-1))
            row = accepted.last_row
            state = cache[torch.arange(batch), local[row]]
        roots, steps = accepted.bonus, steps + 1
        for text, emitted in zip(texts, accepted.tokens.tolist(), strict=True):
            text += [token for token in emitted if token >= 0]
    assert [text[:COUNT] for text in texts] == [model.greedy(p, COUNT) for p in PROMPTS]
    assert steps < COUNT - 1


def test_a_request_that_emits_nothing_has_no_last_row():
    packed = forest(3, 3, 5, empty=False).packed
    accepted = echo.accept(packed, torch.full((packed.num_rows,), -1))
    assert accepted.last_row.tolist() == [-1, -1, -1]


def test_a_window_beyond_all_depths_hides_nothing():
    packed = forest(0, 2, 9).packed
    for size in (32 * packed.mask.shape[1], 1 << 40, (1 << 63) - 1):
        assert torch.equal(packed.windowed(size).mask, packed.mask)
