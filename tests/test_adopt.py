"""The step of the README and ``docs/start.md``, run on a small transformer: greedy text."""

from __future__ import annotations

import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tiny

ROOT = Path(__file__).parents[1]
PROMPT_LENGTHS, COUNT = (3, 6, 9, 5), 40
COMMIT = "kv[:, :, moves.target] = kv[:, :, moves.source]"


def blocks(page):
    """The Python code of a Markdown page."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)


SETUP, STEP, FLASHINFER = blocks("docs/start.md")


def decode(step, *, attend=None, seed=0, spare=None):
    """What the blocks write for four prompts, what greedy decoding writes, and steps taken.

    ``spare``: pages of a request are those of its text and so many more, not all.
    """
    batch = len(PROMPT_LENGTHS)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(tiny.VOCAB, (n,), generator=generator) for n in PROMPT_LENGTHS]
    model = tiny.Model(batch, pages=20, seed=seed)
    greedy = [model.greedy(prompt, COUNT) for prompt in prompts]
    drafter = tiny.Drafter(model, batch, k=4)
    texts = []
    for request, prompt in enumerate(prompts):
        token, drafter.state[request] = model.prefill(request, prompt)
        texts.append([token])
    engine = {
        "target": lambda packed, positions, slots, attend: model(
            packed.tokens, positions, slots, lambda *args: attend(packed, *args)
        ),
        "drafter": drafter,
        "kv": model.kv,
        "page_table": model.page_table,
        "page_size": tiny.PAGE,
        "num_pages": torch.full((batch,), model.page_table.shape[1]),
        "max_num_reqs": batch,
        "ids": list(range(batch)),
        "req_indices": torch.arange(batch),
        "root_tokens": torch.tensor([text[0] for text in texts]),
        "prefix_lens": torch.tensor(PROMPT_LENGTHS, dtype=torch.int32),
    }
    exec(compile(SETUP, "setup", "exec"), engine)
    if attend is not None:
        engine |= {"attend": partial(attend, engine), "max_mask_bytes": 1 << 12}
    code, steps = compile(step, "step", "exec"), 0
    while min(map(len, texts)) < COUNT:
        if spare is not None:
            pages = engine["prefix_lens"].long() // tiny.PAGE + 1 + spare
            engine["num_pages"] = pages.clamp(max=model.page_table.shape[1])
            gone = torch.arange(model.page_table.shape[1]) >= engine["num_pages"][:, None]
            engine["page_table"] = model.page_table.masked_fill(gone, -1)
        exec(code, engine)
        steps += 1
        for text, emitted in zip(texts, engine["accepted"].tokens.tolist(), strict=True):
            text += [token for token in emitted if token >= 0]
    return [text[:COUNT] for text in texts], greedy, steps


@pytest.mark.parametrize("seed", range(3))
def test_the_step_writes_the_greedy_text_in_fewer_steps(seed):
    text, greedy, steps = decode(STEP, seed=seed)
    assert text == greedy
    assert steps < COUNT - 1


@pytest.mark.parametrize("seed", range(3))
def test_without_the_commit_the_text_is_another(seed):
    assert STEP.count(COMMIT) == 1
    text, greedy, _ = decode(STEP.replace(COMMIT, "pass"), seed=seed)
    assert text != greedy


def test_a_request_drafts_what_its_pages_hold():
    text, greedy, tight = decode(STEP, spare=0)
    assert text == greedy
    assert tight > decode(STEP)[2]
    assert STEP.count("verify_limits=limits, ") == 1
    assert decode(STEP.replace("verify_limits=limits, ", ""), spare=0)[0] != greedy


def test_a_state_that_is_not_inherited_costs_drafts_and_no_correctness():
    inherit = "state = tree.frontier.inherit(state)"
    assert STEP.count(inherit) == 1
    text, greedy, _ = decode(STEP.replace(inherit, "state = 0 * state[:, :1]"))
    assert text == greedy


def flashinfer(engine, _packed, layer, q, _k, _v):
    """Attention as FlashInfer reads its packed mask: over prefix and rows, all in pages."""
    exec(FLASHINFER, engine)
    begins, bits = engine["plan"]["qo_indptr"].tolist(), engine["plan"]["packed_custom_mask"]
    out = torch.zeros_like(q)
    for request, (begin, end) in enumerate(pairwise(begins)):
        place = torch.arange(int(engine["prefix_lens"][request]) + end - begin)
        entries = (end - begin) * len(place)
        own, bits = bits[: -(-entries // 8)], bits[-(-entries // 8) :]
        seen = (own[:, None] >> torch.arange(8) & 1).flatten()[:entries].view(-1, len(place))
        slots = engine["page_table"][request].long()[place // tiny.PAGE] * tiny.PAGE
        keys, values = engine["kv"][layer][:, slots + place % tiny.PAGE]
        out[begin:end] = tiny.attention(q[begin:end], keys, values, seen.bool())
    return out


def test_flashinfers_mask_says_the_same():
    text, greedy, _ = decode(STEP, attend=flashinfer)
    assert text == greedy


def test_the_readme_shows_the_same_step():
    assert blocks("README.md") == [STEP]
