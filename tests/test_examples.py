"""The wiring examples: real transformers models, whose text is plain decoding's, token by token."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

import echo

transformers = pytest.importorskip("transformers")
EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "smollm2")]

VOCAB, EOS, NEW = 97, 93, 20
LENGTHS = (3, 11, 1, 7, 16)
WORDS = ["<pad>", "<unk>", *(f"w{i}" if i != EOS else "</s>" for i in range(2, VOCAB))]


def llama(seed, layers):
    """A random model whose next tokens are not all alike: sharp logits."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, bos_token_id=None,
        eos_token_id=EOS, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target, and a draft model that often agrees: disturbed weights; both with a tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"eos_token": "</s>", "pad_token": "<pad>"}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, **special)
    where = {}
    for name, noise in (("target", 0.0), ("draft", 0.01)):
        model = llama(0, 3)
        for weight in model.parameters():
            weight.data += noise * torch.randn_like(weight)
        where[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(where[name])
        tokenizer.save_pretrained(where[name])
    return where


@pytest.fixture(scope="module")
def texts():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(2, 60, (n,), generator=generator) for n in LENGTHS]
    return [" ".join(WORDS[t] for t in row) for row in ids]


@pytest.fixture(scope="module")
def expected(folders, texts):
    """What transformers' own ``generate`` writes, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["target"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["target"], padding_side="left")
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    rows = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
    rows = rows[:, inputs["input_ids"].shape[1] :].tolist()
    answers = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
    assert len({tuple(answer) for answer in answers}) == len(answers)
    assert len({t for a in answers for t in a}) > 20
    assert 1 < min(map(len, answers)) < NEW == max(map(len, answers))
    return answers


def generate(folders, texts, policy, *more):
    from transformers_generate import main

    pair = ["--target", str(folders["target"]), "--draft", str(folders["draft"])]
    prompts = [part for text in texts for part in ("--prompt", text)]
    return main([*pair, "--policy", policy, "--new", str(NEW), *prompts, *more])


@pytest.mark.filterwarnings("ignore:CostModel")  # of so small a step the machine's noise is large
@pytest.mark.parametrize("policy", ["plain", "eagle", "ddd", "echo", "rank", "throughput-optimal"])
def test_greedy_text_is_that_of_transformers(folders, texts, expected, policy, capsys):
    assert generate(folders, texts, policy, "--batch", "4") == expected
    assert f"{policy}:" in capsys.readouterr().out


def test_compiled_models_write_the_same(folders, texts, expected, monkeypatch):
    """Whole graphs over a static cache; requests come and go, the compiled batch stays as it is."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    assert generate(folders, texts, "eagle", "--batch", "4", "--compile") == expected
    assert 2 <= len(graphs) <= 16


@pytest.mark.parametrize("draft", ["lookup", None])
def test_beside_transformers_own_generation(folders, texts, expected, draft, capsys):
    more = ("--draft", draft) if draft else ()
    assert generate(folders, texts, "eagle", "--compare", *more) == expected
    own = sum(map(len, expected))
    assisted = "prompt_lookup_num_tokens" if draft else "assistant_model"
    printed = capsys.readouterr().out
    assert f"generate: {own} tokens" in printed and f"generate, {assisted}: {own} tok" in printed


@pytest.mark.parametrize("more", [("--draft", "nowhere"), ("--depth", "0")])
def test_bad_options_are_named(folders, texts, more, capsys):
    with pytest.raises(SystemExit):
        generate(folders, texts, "echo", *more)
    assert f"{more[0]}: expected" in capsys.readouterr().err


@pytest.fixture(scope="module")
def sampled(folders, prompts):
    """One token at a time, without a cache, each by inversion with its own number of the seed's."""
    model, answers = transformers.AutoModelForCausalLM.from_pretrained(folders["target"]), []
    for number, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed((7 << 24) + number)
        uniform = torch.rand(99, generator=generator, dtype=torch.float64)
        ids = prompt.tolist()
        while len(ids) < len(prompt) + NEW and ids[len(prompt) :][-1:] != [EOS]:
            mass = (model(torch.tensor([ids])).logits[0, -1].double() / 0.8).softmax(-1).cumsum(-1)
            ids.append(int((mass <= uniform[len(ids)] * mass[-1]).sum()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize("policy", ["plain", "eagle", "rank"])
def test_sampled_text_depends_on_the_seed_alone(folders, texts, sampled, policy):
    options = "--temperature", "0.8", "--seed", "7", "--batch", "4"
    assert generate(folders, texts, policy, *options) == sampled


def test_the_sampler_has_the_models_law():
    from transformers_generate import Sampler

    sampler = Sampler(1, 1000, temperature=0.5)
    sampler.uniform[0] = torch.linspace(0, 1, 1002, dtype=torch.float64)[:-1]
    logits = torch.tensor([0.3, -torch.inf, 1.2, 0.0, -torch.inf])
    place = torch.arange(1001)
    tokens = sampler(logits.expand(1001, -1), torch.zeros_like(place), place)
    share = torch.bincount(tokens, minlength=5) / 1001
    assert torch.allclose(share, (logits / 0.5).softmax(-1), atol=2e-3)
    assert share[1] == share[4] == 0


def test_a_first_layer_may_come_from_elsewhere(folders):
    """The draft model's second layer is the same as after a first layer of its own."""
    from transformers_generate import DraftModel, load

    req_indices, prompts = torch.arange(2), [torch.tensor([5, 9, 2]), torch.tensor([7])]
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=9, max_depth=2)
    drafter = DraftModel(load(folders["draft"], "float32", "cpu"), 2, 32)
    roots, layers = torch.tensor([4, 8]), []
    for elsewhere in (False, True, True):
        with torch.inference_mode():
            drafter.admit(req_indices, prompts, roots)
            tree = scheduler.begin(roots)
            first = layers[0] if elsewhere else drafter.draft(req_indices, tree.frontier)
            tree = scheduler.grow(tree, *first)
            layers += [first, drafter.draft(req_indices, tree.frontier)]
    for tokens, log_probs in layers[3::2]:
        assert torch.equal(tokens, layers[1][0]) and torch.equal(log_probs, layers[1][1])


def test_a_draft_saves_steps(folders, texts, capsys):
    generate(folders, texts, "eagle")
    assert float(capsys.readouterr().out.split(" a step")[0].split()[-1]) > 1.3


def test_sliding_windows_are_refused(folders, tmp_path):
    from transformers_generate import load

    config = transformers.MistralConfig(
        vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="sliding window"):
        load(tmp_path, "float32", "cpu")


PLAIN = echo.ElasticBudgetScheduler.autoregressive()
COST = echo.CostModel((1, 8, 32), (1.0, 1.1, 2.0), draft_layer=0.05)
POLICIES = {
    "plain": PLAIN,
    "eagle": echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=6, beam=2, max_depth=3),
    "echo": echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), echo.SparseGate({1: 0.3}), 20, 3),
    "throughput-optimal": echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, COST, 3),
    "trimmed": echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, COST, 3, trims=True),
}


def engine(folders, scheduler, **options):
    """The paged engine, with the draft model as drafter."""
    from engine import Engine
    from transformers_generate import DraftModel, load

    def draft(made):
        return DraftModel(load(folders["draft"], "float32", "cpu"), made.max_num_reqs, 64)

    target, drafter = load(folders["target"], "float32", "cpu"), scheduler.max_depth and draft
    return Engine(target, scheduler, drafter or None, max_model_len=64, **options)


def run(made, prompts, new):
    """The answers' tokens."""
    answers = [[] for _ in prompts]
    for request, tokens in made.generate(prompts, new):
        answers[request] += tokens
    return answers


@pytest.fixture(scope="module")
def prompts(folders, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["target"])
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("name", POLICIES)
def test_the_paged_engine_writes_what_transformers_writes(folders, prompts, expected, name):
    """Fewer lanes than prompts, pages for two or three: admission waits, pages come back."""
    made = engine(folders, POLICIES[name], max_num_reqs=4, num_pages=8, eos_token=EOS)
    assert run(made, prompts, NEW) == expected
    assert sorted(made.cache.free_pages) == list(range(1, 8)) and not made.cache.pages
    counts = made.stats.read()
    assert counts.emitted_tokens + len(prompts) == sum(map(len, expected))
    assert counts.tokens_per_step > (1.2 if name != "plain" else 0.99)


def test_the_paged_engine_runs_on_the_triton_kernels(folders, prompts, expected):
    """In Triton's interpreter, or compiled where there is a GPU."""
    pytest.importorskip("triton")
    options = {"max_num_reqs": 2, "num_pages": 16, "eos_token": EOS, "backend": "triton"}
    answers = run(engine(folders, POLICIES["echo"], **options), prompts[:2], 6)
    assert answers == [answer[:6] for answer in expected[:2]]


@pytest.mark.parametrize("bad", [None, "prompt", "answer"])
def test_the_paged_engine_stops_where_the_model_has_no_number(folders, prompts, expected, bad):
    """After one token there is none: these answers end, no other changes, the error names them."""
    token = {None: -1, "prompt": int(prompts[1][-1]), "answer": expected[0][2]}[bad]
    made = engine(folders, POLICIES["eagle"], max_num_reqs=3, num_pages=16, eos_token=EOS)
    forward, answers = made.forward, [[] for _ in prompts]

    def spoiled(tokens, *rest):
        states, *kept = forward(tokens, *rest)
        return states.masked_fill((tokens == token)[:, None], torch.nan), *kept

    made.forward, error = spoiled, ""
    try:
        for request, tokens in made.generate(prompts, NEW):
            answers[request] += tokens
    except ValueError as raised:
        error = str(raised)
    whole = [[int(prompt[-1]), *text] for prompt, text in zip(prompts, expected, strict=True)]
    cut = [text[1 : text.index(token) + 1] if token in text[:-1] else text[1:] for text in whole]
    assert answers == cut and (cut != expected) == (bad is not None)
    broken = [number for number, text in enumerate(whole) if token in text[:-1]]
    assert all(str(number) in error for number in broken) and ("prompts" in error) == bool(broken)
    assert sorted(made.cache.free_pages) == list(range(1, 16))


def test_the_engine_refuses_what_never_fits(folders):
    made = engine(folders, PLAIN, max_num_reqs=2, num_pages=3)
    with pytest.raises(ValueError, match="prompt 1: 40 tokens and the answer do not fit"):
        list(made.generate([torch.arange(3, 8), torch.arange(40)], 8))


def test_the_engines_pages_hold_the_text(folders, prompts):
    """After speculative steps the cache equals that of one pass over the emitted text."""
    from engine import PAGE_SIZE

    made = engine(folders, POLICIES["echo"], max_num_reqs=2, num_pages=16)
    text = prompts[1].tolist() + run(made, prompts[1:2], 24)[0]
    size = len(text) - 1  # what was accepted beyond the end may lie behind
    assert size <= int(made.cache.prefix_lens[0]) <= size + made.scheduler.max_depth
    place = torch.arange(size)
    slots = made.cache.page_table[0, place // PAGE_SIZE].long() * PAGE_SIZE + place % PAGE_SIZE
    with torch.inference_mode():
        fresh = made.model(torch.tensor([text[:size]])).past_key_values
        for mine, layer in zip(made.cache.kv, fresh.layers, strict=True):
            both = torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2)
            assert torch.allclose(mine.flatten(1, 2)[:, slots], both, atol=1e-4)


def test_the_paged_engine_serves_the_real_model(smollm2):
    """SmolLM2 with its EAGLE head: the text of plain decoding, in fewer steps."""
    from model import encode
    from serve import engine as serving

    model, tokenizer = smollm2
    texts = ["Count from one to ten.", "Write a Python function that adds two numbers."]
    made = {name: serving(model, tokenizer, name, lanes=2) for name in ("plain", "echo")}
    answers = [run(each, encode(tokenizer, texts), 16) for each in made.values()]
    assert answers[0] == answers[1]
    assert made["echo"].stats.read().tokens_per_step > 1.4


def real(model, tokenizer, scheduler, lanes, **options):
    """SmolLM2 and its head at fixed shapes, on the paged engine."""
    from engine import Engine

    from graph_eagle import GraphEagle
    from model import FEATURE_LAYERS

    drafts, fused = scheduler.max_depth > 0, options.pop("fused", False)
    drafter = lambda made: GraphEagle(made.model, lanes, beam=3, depth=3, fused=fused)
    return Engine(
        model, scheduler, drafter if drafts else None, max_num_reqs=lanes, num_pages=32,
        feature_layers=FEATURE_LAYERS if drafts else (), eos_token=tokenizer.eos_token_id,
        **options,
    )  # fmt: skip


def test_the_real_engine_is_captured_whole(smollm2):
    """Every part is captured and replayed, with speculation and without, sync-free."""
    from engine import Engine

    from echo.testing import RecordedGraphs, RefuseSyncs
    from echo.testing.graphs import Recording
    from model import encode

    model, tokenizer = smollm2
    prompts = encode(tokenizer, ["Count from one to ten.", "Name three colours.", "Say hello."])
    steep = echo.CostModel((1, 2, 64), (1.0, 2.0, 64.0))  # drafting never pays: only probes draft
    off = echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, steep, 3, probe_interval=4)
    eagle = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=6, beam=3, max_depth=3)

    def decode(scheduler, drafter=None, waits=False):
        graphs = RecordedGraphs()
        if drafter is None:
            made = real(model, tokenizer, scheduler, 2, graphs=graphs)
        else:
            options = {"max_num_reqs": 2, "num_pages": 32, "k": 1}
            options["eos_token"] = tokenizer.eos_token_id
            made = Engine(model, scheduler, drafter, **options, graphs=graphs)
        step = made.step

        def refusing():  # the reference of attention looks at values, as no kernel does
            with Recording().launches(), nullcontext() if waits else RefuseSyncs():
                return step()

        made.step, answers = refusing, run(made, prompts, 12)
        runs = Counter()
        for (part, *_), count in graphs.runs.items():
            runs[part] += count
        return answers, runs, made.stats.read()

    text, runs, _ = decode(PLAIN)
    assert runs.keys() == {"plain"}
    answers, runs, counts = decode(eagle)
    assert answers == text and counts.tokens_per_step > 1.2
    assert min(runs[part] for part in ("draft", "pack", "verify", "accept")) >= 3
    lookup = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=4, beam=1, max_depth=3)
    answers, runs, counts = decode(lookup, lambda made: echo.PromptLookup(2, 128))
    assert answers == text and counts.draft_tokens
    assert min(runs[part] for part in ("draft", "pack", "verify", "accept")) >= 3
    answers, runs, counts = decode(off)
    assert answers == text and runs["plain"] >= 3
    assert 0 < counts.layers < 3 * counts.steps
    cost = echo.CostModel((1, 8, 64), (1.0, 1.1, 9.0), draft_layer=0.2)
    reads = echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, cost, 3, trims=True)
    answers, runs, counts = decode(reads, waits=True)
    assert answers == text and counts.layers < 3 * counts.steps
    assert min(runs[part] for part in ("begin", "layer", "pack", "verify", "accept")) >= 3


def test_what_a_step_of_the_engine_launches(smollm2):
    """Operations and kernels of each captured part at depth 3, without the target's."""
    from echo import kernels
    from echo.testing.graphs import Recording
    from model import encode

    pytest.importorskip("triton")
    model, tokenizer = smollm2
    gate = echo.SparseGate({1: 0.1, 3: 0.05})
    scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(3, 4), gate, 12, 3)
    made, counts = real(model, tokenizer, scheduler, 1, fused=True), {}
    made.cache.allocate(0, 200)

    def count(part, function):
        recording = Recording()
        with recording.launches(), recording:
            result = function()
        counts[part] = len(recording.operations)
        return result

    with torch.inference_mode():
        made.admit(0, encode(tokenizer, ["Say hello."])[0], 64)
        with kernels.using("triton"):
            for _ in range(2):  # tables are made once
                tree = count("draft", lambda: made.draft(1, 3))
                packed = count("pack", partial(made.workspace.pack, tree, 12))
                with kernels.using("torch"):
                    made.verify(packed)
                count("accept", partial(made.accept, packed))
            plain = count("off: pack", lambda: made.workspace.pack(made.draft(1, 0), 1))
            with kernels.using("torch"):
                made.verify(plain)
            count("off: accept", lambda: made.accept(plain))
    limits = {"draft": 40, "pack": 6, "accept": 45, "off: pack": 10, "off: accept": 30}
    assert all(counts[part] <= limit for part, limit in limits.items()), counts


def test_the_exporter_runs_on_the_real_engine(smollm2, monkeypatch, capsys):
    client = pytest.importorskip("prometheus_client")
    import prometheus_stats

    import model

    monkeypatch.setattr(model, "load", lambda: smollm2)
    monkeypatch.setattr(prometheus_stats, "REGISTRY", client.CollectorRegistry())
    monkeypatch.setattr(sys, "argv", ["prometheus_stats.py", "--port", "0", "--seconds", "0"])
    prometheus_stats.main()
    assert "StepCounts(" in capsys.readouterr().out
