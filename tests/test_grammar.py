"""Structured output with the engines' own matchers, on SmolLM2 with its EAGLE head.

ECHO_PEERS=install pytest -m peers tests/test_grammar.py     # fetches XGrammar and LLGuidance
ECHO_PEERS=<folder> pytest -m peers tests/test_grammar.py    # a folder that they were installed to
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import echo
from echo import kernels
from echo.tree import sampling
from echo.tree.packed import unpack_bits

pytestmark = pytest.mark.peers
WHEELS = ("xgrammar==0.2.8", "apache-tvm-ffi==0.1.15.post2", "llguidance==1.9.1")
EOS, COUNT = 2, 72
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{1,9}$"},
        "age": {"type": "integer", "minimum": 1, "maximum": 99},
        "city": {"type": "string", "pattern": "^[A-Z][a-z]{1,11}$"},
        "hobbies": {
            "type": "array",
            "items": {"enum": ["reading", "hiking", "cooking", "painting"]},
            "minItems": 1,
            "maxItems": 3,
        },
    },
    "required": ["name", "age", "city", "hobbies"],
    "additionalProperties": False,
}
QUESTIONS = [
    f'Describe {who} as JSON with the keys "name", "age", "city" and "hobbies" (a list).'
    for who in ("a teacher from Paris", "a farmer", "a singer called Ada")
]


class LLGuidance:
    """``llguidance.LLMatcher`` in XGrammar's words."""

    def __init__(self, tokenizer):
        import llguidance

        grammar = llguidance.LLMatcher.grammar_from_json_schema(
            SCHEMA, defaults={"whitespace_pattern": "[ \n]{0,4}"}
        )
        self.matcher = llguidance.LLMatcher(tokenizer, grammar)
        assert not self.matcher.is_error()

    def accept_token(self, token):
        return self.matcher.try_consume_tokens([token]) == 1

    def rollback(self, count):
        self.matcher.rollback(count)

    def is_terminated(self):
        return self.matcher.is_stopped()

    def fill_next_token_bitmask(self, bitmask, index):
        import llguidance.torch

        llguidance.torch.fill_next_token_bitmask(self.matcher, bitmask, index)


@pytest.fixture(scope="module", params=["xgrammar", "llguidance"])
def pair(request, tmp_path_factory):
    """The model, and what makes a matcher at the beginning of an answer."""
    asked = os.environ.get("ECHO_PEERS")
    if asked:
        folder = tmp_path_factory.mktemp("matchers") if asked == "install" else Path(asked)
        if asked == "install":
            options = ["-q", "--no-deps", "--target", str(folder), *WHEELS]
            subprocess.run([sys.executable, "-m", "pip", "install", *options], check=False)
        sys.path.append(str(folder))
    module = pytest.importorskip(request.param, reason="set ECHO_PEERS to test with matchers")
    smollm2 = request.getfixturevalue("smollm2")  # slow to load: behind what may skip
    vocab = smollm2[0].config.vocab_size
    if request.param == "xgrammar":
        info = module.TokenizerInfo.from_huggingface(
            smollm2[1], vocab_size=vocab, stop_token_ids=[EOS]
        )
        grammar = module.GrammarCompiler(info, max_threads=1).compile_json_schema(
            SCHEMA, max_whitespace_cnt=4
        )
        return smollm2, lambda: module.GrammarMatcher(grammar)
    import llguidance.hf

    tokenizer = llguidance.hf.from_tokenizer(smollm2[1], n_vocab=vocab, eos_token=EOS)
    return smollm2, lambda: LLGuidance(tokenizer)


class Constrained:
    """SmolLM2 whose sampler masks each row's logits by its bits."""

    def __init__(self, smollm2, make):
        from drafters import Eagle
        from model import SmolLM2, encode

        model, tokenizer = smollm2
        batch, self.decode = len(QUESTIONS), tokenizer.decode
        self.target = SmolLM2(model, batch, 384, sample=self.sample)
        self.words = -(-model.config.vocab_size // 32)
        self.matchers, self.ids = [make() for _ in QUESTIONS], torch.arange(batch)
        self.bits = torch.full((batch, self.words), -1, dtype=torch.int32)
        for b, each in enumerate(self.matchers):
            each.fill_next_token_bitmask(self.bits, b)
        prompts = encode(tokenizer, QUESTIONS)
        self.drafter = Eagle(self.target, batch, 384)
        self.root_tokens = self.target.admit(self.ids, prompts)
        self.drafter.admit(self.ids, prompts, self.root_tokens)
        self.texts = [[] for _ in QUESTIONS]
        self.emit(self.root_tokens[:, None])
        self.forbidden = self.drafted = self.accepted = self.steps = 0

    def sample(self, logits):
        allowed = unpack_bits(self.bits[: len(logits)], logits.shape[1])
        return kernels.argmax_tokens(logits.masked_fill(~allowed, -torch.inf))

    def emit(self, tokens):
        """What was emitted goes to texts and matchers."""
        for text, each, row in zip(self.texts, self.matchers, tokens.tolist(), strict=True):
            for token in row:
                if token >= 0 and not each.is_terminated():
                    assert each.accept_token(token)
                    text.append(token)

    def allowed(self, paths, tokens):
        """bool [B, W, k]: what the grammar allows behind each node of a frontier."""
        found = torch.zeros(tokens.shape, dtype=torch.bool)
        bits = torch.zeros(1, self.words, dtype=torch.int32)
        for b, each in enumerate(self.matchers):
            for w, path in enumerate(paths[b]):
                done = 0
                while done < len(path) and each.accept_token(path[done]):
                    done += 1
                if done == len(path) and not each.is_terminated():
                    each.fill_next_token_bitmask(bits, 0)
                    found[b, w] = sampling.allows(bits[0], tokens[b, w])
                if done:
                    each.rollback(done)
        return found

    def draft(self, scheduler, prune):
        """A tree whose first ``prune`` layers have allowed candidates alone."""
        live = torch.tensor([not each.is_terminated() for each in self.matchers])
        tree = scheduler.begin(self.root_tokens, live=live)
        paths = [[[]] for _ in self.matchers]
        for depth in range(scheduler.max_depth):
            tokens, log_probs = self.drafter.draft(self.ids, tree.frontier)
            allowed = self.allowed(paths, tokens) if depth < prune else None
            tree = scheduler.grow(tree, tokens, log_probs, allowed=allowed)
            parent, token = tree.frontier.parent.tolist(), tree.frontier.token.tolist()
            paths = [
                [[*above[p], t] for p, t in zip(parent[b], token[b], strict=True)]
                for b, above in enumerate(paths)
            ]
        return tree

    def check_against_its_own_walk(self, packed):
        """XGrammar walks SGLang's links; ours and its rows agree wherever the grammar gets to."""
        n, indptr = packed.max_verify_tokens_per_req, packed.indptr.tolist()
        links = echo.layouts.sglang(packed, n, torch.zeros(packed.batch, dtype=torch.int64))
        for b, each in enumerate(self.matchers):
            rows = slice(*indptr[b : b + 2])
            if not hasattr(each, "traverse_draft_tree") or rows.start == rows.stop:
                continue
            theirs = torch.full((n, self.words), -1, dtype=torch.int32)
            walk = links.retrive_next_token[b], links.retrive_next_sibling[b]
            each.traverse_draft_tree(*walk, links.draft_tokens.view(-1, n)[b], theirs)
            ours, theirs = self.bits[rows], theirs[: rows.stop - rows.start]
            reached = (ours != -1).any(1)
            assert reached[0] and torch.equal(ours[reached], theirs[reached])

    def run(self, scheduler, prune=0):
        for _ in range(COUNT):
            if all(each.is_terminated() for each in self.matchers):
                break
            packed = scheduler.pack(self.draft(scheduler, prune))
            trees = sampling.to_host(packed)
            self.bits = torch.zeros(packed.num_rows, self.words, dtype=torch.int32)
            sampling.fill_bitmask(trees, self.matchers, self.bits)
            self.check_against_its_own_walk(packed)
            parents = packed.parent_row
            drafts = (parents >= 0).nonzero()[:, 0]
            allowed = sampling.allows(self.bits[parents[drafts]], packed.tokens[drafts, None])
            self.forbidden += int((~allowed).sum())
            self.drafted += len(drafts)
            accepted = echo.accept(
                packed, self.target.verify(self.ids, packed), eos_tokens=torch.tensor([EOS])
            )
            self.target.compact(self.ids, packed, accepted)
            self.drafter.extend(self.ids, packed, accepted)
            self.emit(accepted.tokens)
            moved = accepted.num_emitted > 0
            self.root_tokens = torch.where(moved, accepted.bonus, self.root_tokens)
            self.accepted += int(accepted.num_accepted_drafts.sum())
            self.steps += 1
        return self.texts


def test_json_always_parses_and_is_what_plain_constrained_decoding_writes(pair):
    plain = Constrained(*pair)
    expected = plain.run(echo.ElasticBudgetScheduler.autoregressive())
    tree = echo.ElasticBudgetScheduler(echo.GlobalRank(3), budget=24, max_depth=4)
    runs = {}
    for prune in (0, 1, 4):  # one after another: the newest has the model's hooks
        runs[prune] = Constrained(*pair)
        assert runs[prune].run(tree, prune) == expected
    for text in expected:
        found = json.loads(plain.decode(text, skip_special_tokens=True))
        assert list(found) == SCHEMA["required"] and 0 < found["age"] < 100
    for name, run in {"plain": plain, **runs}.items():
        counts = f"{run.drafted} drafts, {run.forbidden} forbidden, {run.accepted} accepted"
        print(f"{name}: {run.steps} steps, {counts}")
    free, first, pruned = runs.values()
    assert free.forbidden > first.forbidden > pruned.forbidden == 0
    assert pruned.accepted >= free.accepted and pruned.drafted < 0.6 * free.drafted
    assert pruned.steps < 0.8 * plain.steps
