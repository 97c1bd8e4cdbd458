"""Every row is sampled as plain decoding would: penalties, seeds, grammars, adapters."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import echo
import tiny
from echo.testing import RecordedGraphs, RefuseSyncs
from echo.tree import sampling
from echo.tree.packed import unpack_bits
from forests import forest
from serving import Server, full, plain

PROMPTS, COUNT = ([5, 9, 9, 30], [1, 2, 3, 4, 5, 6], [40], [7, 7, 7]), 24
SCHEDULER = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=28, max_depth=4)


@st.composite
def cases(draw):
    seeds, batches = draw(st.integers(0, 100_000)), draw(st.integers(1, 4))
    return forest(seeds, batches, draw(st.sampled_from([1, 5, 40])), pads=draw(st.integers(0, 3)))


@given(cases())
def test_ancestors_are_the_oracles(case):
    packed = case.packed
    with RefuseSyncs():
        path, tokens = packed.ancestors(), sampling.path_tokens(packed)
        parents = packed.parent_row
    assert path.shape == (packed.num_rows, packed.max_depth + 1)
    row = 0
    for b in range(case.batch):
        begin, place = row, {tuple(r.path): i for i, r in enumerate(case.rows(b))}
        for local, expected in enumerate(case.rows(b)):
            above = [
                begin + place[tuple(expected.path[: d + 1])] for d in range(len(expected.path))
            ]
            assert path[row].tolist() == above + [-1] * (packed.max_depth + 1 - len(above))
            drafts = [case.tokens[b][column] for column in expected.path[1:]]
            assert tokens[row].tolist() == drafts + [-1] * (packed.max_depth - len(drafts))
            up = case.parent_rows(b)[local]
            assert int(parents[row]) == (begin + up if up >= 0 else -1)
            row += 1
    assert (path[row:] == -1).all() and (tokens[row:] == -1).all() and (parents[row:] == -1).all()


@given(cases())
def test_values_go_to_rows_by_request_and_by_node(case):
    packed = case.packed
    by_request = torch.arange(case.batch * 2).view(-1, 2)
    nodes = torch.arange(case.batch * sum(case.tree.sizes)).view(case.batch, -1)
    with RefuseSyncs():
        rows = sampling.by_request(packed, by_request, -7)
        own = sampling.by_node(packed, case.tree, nodes, -1)
        token = sampling.by_node(packed, case.tree, case.tree.forest.token, 0)
    owner = packed.request.tolist()
    assert rows[:, 0].tolist() == [2 * b if b < case.batch else -7 for b in owner]
    assert torch.equal(own, packed.node) and torch.equal(token, packed.tokens)


def uniform(seed, position, vocab):
    """(0, 1) [n, vocab] by request's seed and position alone: what engines hash."""
    x = seed[:, None] * 1_000_003 + position[:, None] * 7_919 + torch.arange(vocab) * 104_729
    for shift, factor in ((15, 73_244_475), (13, 295_559_667), (16, 1)):
        x = ((x ^ (x >> shift)) * factor) & 0x7FFFFFFF
    return (x.double() + 0.5) / 2**31


def sample(logits, seen, counts, params, position):
    """A sampler as vLLM orders it: bias, penalties, temperature, min-p, then the seeded draw."""
    repetition, presence, frequency, temperature, min_p = params["floats"].unbind(1)
    logits = logits + params["bias"]
    penalised = torch.where(logits > 0, logits / repetition[:, None], logits * repetition[:, None])
    logits = torch.where(seen | (counts > 0), penalised, logits)
    logits = logits - frequency[:, None] * counts - presence[:, None] * (counts > 0)
    probs = (logits / temperature[:, None]).softmax(-1)
    probs = probs.masked_fill(probs < min_p[:, None] * probs.amax(1, keepdim=True), 0)
    noise = -uniform(params["seed"], position, probs.shape[1]).log()
    return (probs / noise).argmax(-1)


def parameters(seed):
    generator = torch.Generator().manual_seed(seed)
    floats = torch.rand(len(PROMPTS), 5, generator=generator)
    floats *= torch.tensor([1.5, 1.5, 0.8, 1.2, 0.2])
    floats += torch.tensor([0.8, 0.0, 0.1, 0.1, 0.0])
    bias = torch.zeros(len(PROMPTS), tiny.VOCAB)
    bias[:, :3] = torch.randn(len(PROMPTS), 3, generator=generator)
    return {"floats": floats, "bias": bias, "seed": torch.arange(len(PROMPTS)) + 17 * seed}


def counted(tokens):
    return torch.bincount(torch.tensor(tokens, dtype=torch.int64), minlength=tiny.VOCAB)


def one(params, b):
    return {name: value[b : b + 1] for name, value in params.items()}


def draw(params, b, logits, prompt, emitted):
    """One token of plain decoding."""
    seen, counts = counted(prompt)[None] > 0, counted(emitted)[None]
    place = torch.tensor([len(prompt) + len(emitted)])
    return int(sample(logits[None], seen, counts, one(params, b), place))


@pytest.fixture(params=range(3))
def sampled(request):
    """The model, each request's parameters, and what plain decoding writes with them."""
    model, params = (
        tiny.Model(len(PROMPTS), pages=20, seed=request.param),
        parameters(request.param),
    )
    expected = [
        plain(model, prompt, COUNT, lambda x, e, b=b, p=prompt: draw(params, b, x, p, e))
        for b, prompt in enumerate(PROMPTS)
    ]
    return model, params, expected


def serve(model, params, *, drafts=True, graphs=None):
    """Speculative decoding with the same sampler; without ``drafts`` rows do not see their path."""
    seen = torch.stack([counted(prompt) > 0 for prompt in PROMPTS])

    def rows(packed, logits):
        emitted = torch.stack([counted(text) for text in server.texts])
        gathered = {name: sampling.by_request(packed, value, 1) for name, value in params.items()}
        counts = sampling.by_request(packed, emitted, 0)
        if drafts:
            path = sampling.path_tokens(packed)
            counts.scatter_add_(1, path.clamp(min=0), (path >= 0).long())
        place = packed.positions(server.prefix_lens) + 1
        return sample(logits, sampling.by_request(packed, seen, 0), counts, gathered, place)

    first = lambda b, logits: draw(params, b, logits, PROMPTS[b], [])
    server = Server(model, PROMPTS, SCHEDULER, rows, first=first)
    accepted = server.run(COUNT)
    return server.texts, accepted


def test_penalties_bias_min_p_and_seeds_are_lossless(sampled):
    model, params, expected = sampled
    texts, accepted = serve(model, params)
    assert texts == expected
    assert accepted > 5
    assert texts != [model.greedy(torch.tensor(prompt), COUNT) for prompt in PROMPTS]


def test_without_the_paths_tokens_the_text_is_another(sampled):
    model, params, expected = sampled
    assert serve(model, params, drafts=False)[0] != expected


def test_rows_are_gathered_inside_a_graph():
    case = forest(3, 3, 9, pads=2, empty=False)
    packed, graphs = case.packed, RecordedGraphs()
    temperature = torch.tensor([1.0, 2.0, 3.0])
    buffers = torch.full((packed.num_rows, packed.max_depth), 7), torch.zeros(packed.num_rows)

    def gather():
        sampling.path_tokens(packed, out=buffers[0])
        return sampling.by_request(packed, temperature, 1.0, out=buffers[1])

    for _ in range(3):
        result = graphs("gather", gather)
        temperature += 1
        packed.tokens.add_(1)
    assert result is buffers[1] and result[0] == 3.0
    packed.tokens.sub_(1)
    assert torch.equal(buffers[0], sampling.path_tokens(packed))


def test_lora_segments_cover_all_rows():
    packed = forest(5, 4, 9, pads=3).packed
    adapters = torch.tensor([3, 1, 3, 2])
    indptr, own = sampling.lora_segments(packed, adapters, pad_adapter=0)
    assert indptr.dtype == torch.int32 and indptr[-1] == packed.num_rows
    by_row = own.repeat_interleave(indptr.diff().long())
    assert torch.equal(by_row, sampling.by_request(packed, adapters, 0))


def test_log_probabilities_of_emitted_tokens_are_their_rows():
    """As plain decoding reports them: of the sampled token after the text before it."""
    model, kept = tiny.Model(len(PROMPTS), pages=20), {}

    def greedy(packed, logits):
        tokens = logits.argmax(-1)
        # [N], as samplers report them
        kept["log_probs"] = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        return tokens

    server, steps = Server(model, PROMPTS, SCHEDULER, greedy), 8
    texts = [[*prompt, *text] for prompt, text in zip(PROMPTS, server.texts, strict=True)]
    for _ in range(steps):
        packed, accepted = server.step()
        moves = echo.compact(packed, accepted, server.prefix_lens)
        reported = kept["log_probs"][moves.gather].masked_fill(~moves.valid, torch.nan)
        for b, text in enumerate(texts):
            for value, token in zip(reported[b].tolist(), accepted.tokens[b].tolist(), strict=True):
                if token < 0:
                    assert math.isnan(value)
                    continue
                expected = float(full(model, text).log_softmax(-1)[token])
                assert value == pytest.approx(expected, abs=1e-4)
                text.append(token)
    assert sum(map(len, server.texts)) > (steps + 1) * len(PROMPTS)


class Digits:
    """A matcher that allows token t behind a text whose sum is s where t % 3 == s % 3; ends by 0."""

    def __init__(self, text):
        self.text = list(text)

    def allows(self, token):
        return not self.is_terminated() and token % 3 == sum(self.text) % 3

    def accept_token(self, token):
        if allowed := self.allows(token):
            self.text.append(token)
        return allowed

    def rollback(self, count):
        del self.text[-count:]

    def is_terminated(self):
        return self.text[-1] == 0

    def fill_next_token_bitmask(self, bitmask, index):
        words = [0] * bitmask.shape[1]
        for token in range(32 * len(words)):
            words[token // 32] |= self.allows(token) << token % 32
        bitmask[index] = torch.tensor(words).int()


@given(cases(), st.integers(0, 5))
def test_a_bitmask_row_is_what_the_grammar_allows_behind_the_rows_path(case, constrained):
    packed = case.packed
    roots = [own[0] if own else 5 for own in case.tokens]
    matchers = [Digits([root]) if b != constrained else None for b, root in enumerate(roots)]
    bits = torch.full((packed.num_rows, 4), 7, dtype=torch.int32)
    trees = sampling.to_host(packed, out=sampling.to_host(packed))
    assert sampling.fill_bitmask(trees, matchers, bits) is bits
    row = 0
    for b in range(case.batch):
        for expected in case.rows(b):
            text = [case.tokens[b][column] for column in expected.path]
            walk = Digits(text[:1])
            reached = matchers[b] is not None and all(walk.accept_token(t) for t in text[1:])
            want = torch.full_like(bits[:1], -1)
            if reached and not walk.is_terminated():
                walk.fill_next_token_bitmask(want, 0)
            assert torch.equal(bits[row], want[0])
            row += 1
    assert (bits[row:] == -1).all()
    for matcher, root in zip(matchers, roots, strict=True):
        assert matcher is None or matcher.text == [root]
    tokens = torch.arange(128).expand(packed.num_rows, -1)
    with RefuseSyncs():
        allowed = sampling.allows(bits, tokens)
    assert torch.equal(allowed, unpack_bits(bits, 128))


def forbidden(tree, tokens):
    return tokens % 3 != 0


@pytest.mark.parametrize("rule", [echo.TwoLevel(2, 4), echo.GlobalRank(3)])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_forbidden_candidate_gets_no_budget_and_is_no_fault(rule, backend):
    scheduler = echo.ElasticBudgetScheduler(rule, budget=20, max_depth=3)
    space = echo.Workspace(scheduler, 3, k=4, num_verify_tokens=20)
    generator = torch.Generator().manual_seed(0)
    with echo.kernels.using(backend), RefuseSyncs():
        roots = torch.tensor([3, 6, 9])
        trees = [scheduler.begin(roots), space.begin(roots)]
        for depth in range(3):
            shape = (*trees[0].frontier.token.shape, 4)
            tokens = torch.randint(0, 90, shape, generator=generator)
            log_probs = torch.randn(shape, generator=generator).log_softmax(-1)
            allowed = ~forbidden(None, tokens)
            allowed[2] &= depth < 1  # the grammar leaves request 2 nothing at the second layer
            trees = [
                owner.grow(tree, tokens, log_probs, allowed=allowed)
                for owner, tree in zip((scheduler, space), trees, strict=True)
            ]
        packed, captured = scheduler.pack(trees[0]), space.pack(trees[1])
    drafted = packed.tokens[packed.depth > 0]
    assert len(drafted) and not forbidden(None, drafted).any()
    assert packed.depth[packed.request == 2].max() == 1
    assert packed.invalid.tolist() == [0, 0, 0] == captured.invalid.tolist()
    for name in ("tokens", "parent", "status"):
        assert torch.equal(getattr(packed, name), getattr(captured, name))


def test_a_captured_step_masks_prunes_and_counts():
    """Root masks, penalties and parameters inside the workspace's graphs: an eager step's, always."""
    batch, n, vocab = 3, 14, 64
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=n, max_depth=2)
    space, graphs = echo.Workspace(scheduler, batch, k=4, num_verify_tokens=n), RecordedGraphs()
    given = {
        "roots": torch.zeros(batch, dtype=torch.int64),
        "bits": torch.zeros(batch, vocab // 32, dtype=torch.int32),
        "tokens": torch.zeros(batch, 2, 4, dtype=torch.int64),
        "log_probs": torch.zeros(batch, 2, 4),
        "counts": torch.zeros(batch, vocab, dtype=torch.int64),
    }
    counts = torch.zeros(n, vocab, dtype=torch.int64)

    def draft(owner, inputs):
        tree = owner.begin(inputs["roots"])
        drafts = inputs["tokens"][:, :1], inputs["log_probs"][:, :1]
        allowed = sampling.allows(inputs["bits"][:, None], drafts[0])
        tree = owner.grow(tree, *drafts, allowed=allowed)
        return owner.grow(tree, inputs["tokens"], inputs["log_probs"])

    def gather(packed, inputs, out):
        sampling.by_request(packed, inputs["counts"], 0, out=out)
        path = sampling.path_tokens(packed)
        return out.scatter_add_(1, path.clamp(min=0), (path >= 0).long())

    for seed in range(5):
        generator = torch.Generator().manual_seed(seed)
        for name, buffer in given.items():
            new = torch.randint(0, vocab, buffer.shape, generator=generator)
            new = (
                torch.randint(-(2**31), 2**31, buffer.shape, generator=generator)
                if name == "bits"
                else new
            )
            buffer.copy_(-new / 9.0 if name == "log_probs" else new)
        tree = graphs("draft", lambda: draft(space, given))
        packed = graphs("plan", lambda tree=tree: space.pack(tree, n))
        found = graphs("sample", lambda packed=packed: gather(packed, given, counts))
        expected = scheduler.pack(draft(scheduler, given))
        assert torch.equal(packed.tokens, expected.tokens)
        assert torch.equal(packed.invalid, expected.invalid)
        assert torch.equal(found, gather(expected, given, torch.zeros_like(counts)))


def test_what_does_not_fit_is_named():
    packed = forest(1, 2, 5, empty=False).packed
    trees, bits = sampling.to_host(packed), torch.zeros(packed.num_rows, 2, dtype=torch.int32)
    other = forest(1, 2, 7, empty=False).tree
    tree = SCHEDULER.begin(torch.tensor([1]))
    token, score = torch.zeros(1, 1, 2, dtype=torch.int64), torch.zeros(1, 1, 2)
    for says, call in {
        r"values: expected a tensor \[2, \.\.\.\], got float32 \[3\]": lambda: sampling.by_request(
            packed, torch.zeros(3), 0
        ),
        r"values: expected a tensor \[2, \d+, \.\.\.\], got float32 \[2, 2\]": lambda: (
            sampling.by_node(packed, other, torch.zeros(2, 2), 0)
        ),
        "values: expected a tensor .*, got list": lambda: sampling.by_request(packed, [1, 2], 0),
        "adapters: expected": lambda: sampling.lora_segments(packed, torch.zeros(3).int(), 0),
        "matchers: expected one for each of 2 requests, got 1": lambda: sampling.fill_bitmask(
            trees, [None], bits
        ),
        "bitmask: expected int32": lambda: sampling.fill_bitmask(trees, [None, None], bits.long()),
        r"tokens: expected int64 \[3, k\]": lambda: sampling.allows(
            torch.zeros(3, 1).int(), torch.zeros(2, 1).long()
        ),
        r"bitmask: expected int32 \[3, V": lambda: sampling.allows(
            torch.zeros(3, 1), torch.zeros(3, 1).long()
        ),
        r"allowed: expected bool \[1, 1, 2\]": lambda: SCHEDULER.grow(
            tree, token, score, allowed=score
        ),
    }.items():
        with pytest.raises(echo.EchoError, match=says):
            call()


def test_pinned_buffers_serve_steps_of_any_size():
    """Tiers come and go: the largest step's buffers are kept."""
    trees, used = None, set()
    for rows in (8, 4, 8, 2, 8):
        packed = forest(1, 2, rows, empty=False).packed
        trees = sampling.to_host(packed, out=trees)
        assert torch.equal(trees.tokens, packed.tokens) and torch.equal(trees.parent, packed.parent)
        used.add(trees.tokens.data_ptr())
    assert len(used) == 1


def test_tokens_beyond_a_bitmask_are_not_allowed():
    bits = torch.full((2, 1), -1, dtype=torch.int32)
    tokens = torch.tensor([[-1, 0, 31], [32, 1 << 40, 5]])
    assert sampling.allows(bits, tokens).tolist() == [[False, True, True], [False, False, True]]
    assert sampling.allows(bits[:, :0], tokens).any().item() is False
