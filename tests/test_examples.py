"""The wiring examples: real transformers models, and text that is token for token what plain decoding writes."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import echo

transformers = pytest.importorskip("transformers")
sys.path[:0] = [
    str(Path(__file__).parents[1] / "examples"),
    str(Path(__file__).parents[1] / "examples" / "smollm2"),
]

VOCAB, EOS, NEW = 97, 93, 20
LENGTHS = (3, 11, 1, 7, 16)
WORDS = ["<pad>", "<unk>", *(f"w{i}" if i != EOS else "</s>" for i in range(2, VOCAB))]


def llama(seed, layers):
    """A random model whose next tokens are not all alike: sharp logits."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, bos_token_id=None, eos_token_id=EOS, pad_token_id=0, initializer_range=0.15,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    model.lm_head.weight.data *= 4
    return model


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A target and a draft that agrees with it often: the target's weights, disturbed; both with a tokenizer, as on a hub."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="</s>", pad_token="<pad>"
    )
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
    return [
        " ".join(WORDS[t] for t in torch.randint(2, 60, (n,), generator=generator)) for n in LENGTHS
    ]


@pytest.fixture(scope="module")
def expected(folders, texts):
    """What transformers' own ``generate`` writes, greedily."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["target"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["target"], padding_side="left")
    inputs = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    rows = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)[
        :, inputs["input_ids"].shape[1] :
    ].tolist()
    answers = [row[: row.index(EOS) + 1] if EOS in row else row for row in rows]
    assert (
        len({tuple(answer) for answer in answers}) == len(answers)
        and len({t for a in answers for t in a}) > 20
    )
    assert 1 < min(map(len, answers)) < NEW == max(map(len, answers))
    return answers


def generate(folders, texts, policy, *more):
    from transformers_generate import main

    pair = ["--target", str(folders["target"]), "--draft", str(folders["draft"])]
    prompts = [part for text in texts for part in ("--prompt", text)]
    return main([*pair, "--policy", policy, "--new", str(NEW), *prompts, *more])


@pytest.mark.parametrize("policy", ["plain", "eagle", "ddd", "echo", "rank", "goodput"])
def test_greedy_text_is_that_of_transformers(folders, texts, expected, policy, capsys):
    assert generate(folders, texts, policy, "--batch", "4") == expected
    assert f"{policy}:" in capsys.readouterr().out


@pytest.fixture(scope="module")
def sampled(folders, prompts):
    """One token at a time, without a cache, each by inversion with its own number of the seed's."""
    model, answers = transformers.AutoModelForCausalLM.from_pretrained(folders["target"]), []
    for number, prompt in enumerate(prompts):
        uniform = torch.rand(
            99, generator=torch.Generator().manual_seed((7 << 24) + number), dtype=torch.float64
        )
        ids = prompt.tolist()
        while len(ids) < len(prompt) + NEW and ids[len(prompt) :][-1:] != [EOS]:
            mass = (model(torch.tensor([ids])).logits[0, -1].double() / 0.8).softmax(-1).cumsum(-1)
            ids.append(int((mass <= uniform[len(ids)] * mass[-1]).sum()))
        answers.append(ids[len(prompt) :])
    return answers


@pytest.mark.parametrize("policy", ["plain", "eagle", "rank"])
def test_sampled_text_depends_on_the_seed_alone(folders, texts, sampled, policy):
    assert (
        generate(folders, texts, policy, "--temperature", "0.8", "--seed", "7", "--batch", "4")
        == sampled
    )


def test_the_sampler_has_the_models_law():
    from transformers_generate import Sampler

    sampler = Sampler(1, 1000, temperature=0.5)
    sampler.uniform[0] = torch.linspace(0, 1, 1002, dtype=torch.float64)[:-1]
    logits = torch.tensor([0.3, -torch.inf, 1.2, 0.0, -torch.inf])
    place = torch.arange(1001)
    share = (
        torch.bincount(
            sampler(logits.expand(1001, -1), torch.zeros_like(place), place), minlength=5
        )
        / 1001
    )
    assert torch.allclose(share, (logits / 0.5).softmax(-1), atol=2e-3)
    assert share[1] == share[4] == 0


def test_a_first_layer_may_come_from_elsewhere(folders):
    """What the draft model says after it is what it says where it drafted that layer itself."""
    from transformers_generate import DraftModel, load

    slots, prompts = torch.arange(2), [torch.tensor([5, 9, 2]), torch.tensor([7])]
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=9, max_depth=2)
    drafter, roots = (
        DraftModel(load(folders["draft"], "float32", "cpu"), 2, 32),
        torch.tensor([4, 8]),
    )
    said = []
    for elsewhere in (False, True, True):
        with torch.inference_mode():
            drafter.admit(slots, prompts, roots)
            tree = scheduler.begin(roots)
            first = said[0] if elsewhere else drafter.draft(slots, tree.frontier)
            tree = scheduler.grow(tree, *first)
            said += [first, drafter.draft(slots, tree.frontier)]
    for tokens, log_probs in said[3::2]:
        assert torch.equal(tokens, said[1][0]) and torch.equal(log_probs, said[1][1])


def test_a_draft_saves_steps(folders, texts, capsys):
    generate(folders, texts, "eagle")
    assert float(capsys.readouterr().out.split(" a step")[0].split()[-1]) > 1.3


def test_a_model_that_forgets_is_refused(folders, tmp_path):
    from transformers_generate import load

    config = transformers.MistralConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                                        num_key_value_heads=1, sliding_window=4)  # fmt: skip
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="sliding window"):
        load(tmp_path, "float32", "cpu")


PLAIN = echo.ElasticBudgetScheduler.autoregressive()
POLICIES = {
    "plain": PLAIN,
    "eagle": echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=6, beam=2, max_depth=3),
    "echo": echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), echo.SparseGate({1: 0.3}), 20, 3),
    "goodput": echo.ElasticBudgetScheduler(
        echo.GlobalRank(3), None, echo.CostModel((1, 8, 32), (1.0, 1.1, 2.0), draft_layer=0.05), 3
    ),
}


def engine(folders, scheduler, **options):
    """The paged engine, with the draft model as drafter."""
    from engine import Engine
    from transformers_generate import DraftModel, load

    drafter = (
        (lambda made: DraftModel(load(folders["draft"], "float32", "cpu"), len(made.lanes), 64))
        if scheduler.max_depth
        else None
    )
    return Engine(
        load(folders["target"], "float32", "cpu"), scheduler, drafter, length=64, **options
    )


@pytest.fixture(scope="module")
def prompts(folders, texts):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders["target"])
    return [torch.tensor(tokenizer(text)["input_ids"]) for text in texts]


@pytest.mark.parametrize("name", POLICIES)
def test_the_paged_engine_writes_what_transformers_writes(folders, prompts, expected, name):
    """Fewer lanes than prompts, pages for two or three requests only: admission waits for pages, and every page comes back."""
    made, answers = (
        engine(folders, POLICIES[name], lanes=4, pages=8, eos_token=EOS),
        [[] for _ in prompts],
    )
    for request, tokens in made.generate(prompts, NEW):
        answers[request] += tokens
    assert answers == expected
    assert sorted(made.cache.free) == list(range(1, 8)) and not made.cache.owned
    counts = made.stats.read()
    assert counts.emitted + len(prompts) == sum(map(len, expected))
    assert counts.tokens_per_step > (1.2 if name != "plain" else 0.99)


def test_the_paged_engine_runs_on_the_triton_kernels(folders, prompts, expected):
    """In Triton's interpreter, or compiled where there is a GPU."""
    pytest.importorskip("triton")
    made, answers = (
        engine(folders, POLICIES["echo"], lanes=2, pages=16, eos_token=EOS, backend="triton"),
        [[], []],
    )
    for request, tokens in made.generate(prompts[:2], 6):
        answers[request] += tokens
    assert answers == [answer[:6] for answer in expected[:2]]


@pytest.mark.parametrize("bad", [None, "prompt", "answer"])
def test_the_paged_engine_stops_where_the_model_has_no_number(folders, prompts, expected, bad):
    """After one token there is none: answers end with it, no other changes, and the error names them."""
    token = {None: -1, "prompt": int(prompts[1][-1]), "answer": expected[0][2]}[bad]
    made, answers = (
        engine(folders, POLICIES["eagle"], lanes=3, pages=16, eos_token=EOS),
        [[] for _ in prompts],
    )
    forward = made.forward

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
    assert (
        (f"prompts {sorted(broken)}" in error)
        if len(broken) == 1
        else all(str(number) in error for number in broken)
    )
    assert sorted(made.cache.free) == list(range(1, 16))


def test_the_engine_refuses_what_never_fits(folders):
    made = engine(folders, PLAIN, lanes=2, pages=3)
    with pytest.raises(ValueError, match="prompt 1: 40 tokens and the answer do not fit"):
        list(made.generate([torch.arange(3, 8), torch.arange(40)], 8))


def test_the_engines_pages_hold_the_text(folders, prompts):
    """After speculative steps the cache equals that of one pass over the emitted text."""
    from engine import PAGE

    made, text = engine(folders, POLICIES["echo"], lanes=2, pages=16), prompts[1].tolist()
    for _, tokens in made.generate(prompts[1:2], 24):
        text += tokens
    held = len(text) - 1
    assert (
        held <= int(made.cache.context[0]) <= held + made.scheduler.max_depth
    )  # what was accepted beyond the end
    place = torch.arange(held)
    slots = made.cache.table[0, place // PAGE].long() * PAGE + place % PAGE
    with torch.inference_mode():
        fresh = made.model(torch.tensor([text[:held]])).past_key_values
        for mine, layer in zip(made.cache.kv, fresh.layers, strict=True):
            both = torch.stack([layer.keys[0], layer.values[0]]).transpose(1, 2)
            assert torch.allclose(mine.flatten(1, 2)[:, slots], both, atol=1e-4)


def test_the_paged_engine_serves_the_real_model(smollm2):
    """SmolLM2 with its EAGLE head: the text of plain decoding, in fewer steps."""
    from model import encode
    from serve import engine as serving

    model, tokenizer = smollm2
    prompts = encode(
        tokenizer, ["Count from one to ten.", "Write a Python function that adds two numbers."]
    )

    def run(policy):
        made, answers = serving(model, tokenizer, policy, lanes=2), [[], []]
        for request, tokens in made.generate(prompts, 16):
            answers[request] += tokens
        return answers, made.stats.read()

    (plain, _), (text, counts) = run("plain"), run("echo")
    assert text == plain
    assert counts.tokens_per_step > 1.4


def test_the_real_engine_is_captured_whole(smollm2):
    """Every part is recorded and run again, with speculation and without: the text of plain decoding, and nothing read but the report."""
    from engine import Engine

    from echo.testing import RecordedGraphs, RefuseSyncs
    from echo.testing.graphs import Recording
    from graph_eagle import GraphEagle
    from model import FEATURE_LAYERS, encode

    model, tokenizer = smollm2
    prompts = encode(tokenizer, ["Count from one to ten.", "Name three colours.", "Say hello."])
    dear = echo.CostModel((1, 2, 64), (1.0, 2.0, 64.0))  # never worth it: only probes draft
    policies = {
        "plain": echo.ElasticBudgetScheduler.autoregressive(),
        "eagle": echo.ElasticBudgetScheduler.eagle(
            max_verify_tokens_per_req=6, beam=3, max_depth=3
        ),
        "off": echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, dear, 3, probe_interval=4),
    }

    def run(scheduler):
        drafts = scheduler.max_depth > 0
        make = (
            (lambda made: GraphEagle(made.model, 2, beam=3, depth=3, fused=False))
            if drafts
            else None
        )
        features, graphs = FEATURE_LAYERS if drafts else (), RecordedGraphs()
        made = Engine(
            model,
            scheduler,
            make,
            lanes=2,
            pages=32,
            features=features,
            eos_token=tokenizer.eos_token_id,
            graphs=graphs,
        )
        step, answers = made.step, [[] for _ in prompts]

        def refusing():
            with (
                Recording().launches(),
                RefuseSyncs(),
            ):  # the reference of attention looks at values, as no kernel does
                return step()

        made.step = refusing
        for request, tokens in made.generate(prompts, 12):
            answers[request] += tokens
        runs = {
            part: sum(n for key, n in graphs.runs.items() if key[0] == part)
            for part in {key[0] for key in graphs.runs}
        }
        return answers, runs, made

    text, runs, _ = run(policies["plain"])
    assert runs.keys() == {"plain"}
    answers, runs, made = run(policies["eagle"])
    assert (
        answers == text and min(runs[part] for part in ("draft", "plan", "target", "accept")) >= 3
    )
    assert made.stats.read().tokens_per_step > 1.2
    answers, runs, made = run(policies["off"])
    assert (
        answers == text
        and runs["plain"] >= 3
        and 0 < made.stats.read().layers < 3 * made.stats.read().steps
    )


def test_what_a_step_of_the_engine_launches(smollm2):
    """Operations and kernels of each captured part at depth 3, the target's own left out: what the host launched piece by piece before."""
    from engine import Engine

    from echo import kernels
    from echo.testing.graphs import Recording
    from graph_eagle import GraphEagle
    from model import FEATURE_LAYERS, encode

    pytest.importorskip("triton")
    model, tokenizer = smollm2
    scheduler = echo.ElasticBudgetScheduler(
        echo.TwoLevel(3, 4), echo.SparseGate({1: 0.1, 3: 0.05}), 12, 3
    )
    make = lambda made: GraphEagle(made.model, 1, beam=3, depth=3, fused=True)
    made = Engine(
        model,
        scheduler,
        make,
        lanes=1,
        pages=32,
        features=FEATURE_LAYERS,
        eos_token=tokenizer.eos_token_id,
    )
    made.cache.reserve(0, 200)
    counts = {}

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
                packed = count("plan", partial(made.space.pack, tree, 12))
                with kernels.using("torch"):
                    made.target(packed)
                count("accept", partial(made.accept, packed))
            plain = count("off: plan", lambda: made.space.pack(made.draft(1, 0), 1))
            with kernels.using("torch"):
                made.target(plain)
            count("off: accept", lambda: made.accept(plain))
    limits = {"draft": 40, "plan": 6, "accept": 45, "off: plan": 10, "off: accept": 30}
    assert all(counts[part] <= most for part, most in limits.items()), counts


def test_the_exporter_runs_on_the_real_engine(smollm2, monkeypatch, capsys):
    client = pytest.importorskip("prometheus_client")
    import prometheus_stats

    import model

    monkeypatch.setattr(model, "load", lambda: smollm2)
    monkeypatch.setattr(prometheus_stats, "REGISTRY", client.CollectorRegistry())
    monkeypatch.setattr(sys, "argv", ["prometheus_stats.py", "--port", "0", "--seconds", "0"])
    prometheus_stats.main()
    assert "StepCounts(" in capsys.readouterr().out
