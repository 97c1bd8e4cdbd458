"""The vLLM proposer (examples/vllm) with the engine's own code.

    ECHO_PEERS=install pytest -m peers tests/test_vllm_plugin.py

Real, from the wheel: ``create_custom_proposer``, ``GPUModelRunner._calc_spec_decode_metadata``,
``rejection_sample`` with its greedy Triton kernel, ``RejectionSampler.parse_output``, and
``AdaptiveVerificationManager``. Stand-ins: a toy target and the rows of a batch.
"""

from __future__ import annotations

import itertools
import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch

import echo
from echo.tree import layouts
from engines import around, definitions, sources
from forests import forest

VERSION = "0.33.0"
PLUGIN = Path(__file__).parents[1] / "examples" / "vllm"
REAL = (
    "vllm.v1.spec_decode.",
    "vllm.v1.worker.gpu.spec_decode.adaptive_verification",
    "vllm.v1.sample.rejection_sampler",
    "vllm.model_executor.warmup.jit_warmup",
)
VOCAB, WIDTH, DEPTH = 8, 260, 5
pytestmark = pytest.mark.peers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return sources("vllm", VERSION, tmp_path_factory.mktemp("vllm"))


@pytest.fixture
def engine(folder, monkeypatch):
    """vLLM's modules, without the engine around them."""
    triton = pytest.importorskip("triton")
    if not triton.knobs.runtime.interpret:
        pytest.skip("triton is imported without its interpreter: run this file by itself")
    monkeypatch.syspath_prepend(str(PLUGIN))
    with around(folder, ("vllm",), REAL):
        vars(import_module("vllm.triton_utils")).update(tl=triton.language, triton=triton)
        import_module("vllm.version").__version__ = f"{VERSION}+cu130"
        yield import_module("vllm.v1.sample.rejection_sampler")
        sys.modules.pop("echo_vllm", None)


def load(**more):
    """The proposer, through vLLM's loader."""
    name = {"model": "echo_vllm.EchoProposer", "num_speculative_tokens": DEPTH}
    config = SimpleNamespace(
        speculative_config=SimpleNamespace(**name),
        model_config=SimpleNamespace(max_model_len=WIDTH),
        scheduler_config=SimpleNamespace(max_num_seqs=8),
    )  # fmt: skip
    vars(config).update(more)
    return import_module("vllm.v1.spec_decode.custom_class_proposer").create_custom_proposer(config)


def metadata(folder, drafts, roots):
    """``GPUModelRunner._calc_spec_decode_metadata`` of a decode step, from its source."""
    scope = {"np": np, "async_tensor_h2d": lambda x, device: torch.from_numpy(x.copy())}
    scope["SpecDecodeMetadata"] = import_module("vllm.v1.spec_decode.metadata").SpecDecodeMetadata
    names = ("_calc_spec_decode_metadata", "_get_cumsum_and_arange")
    source = folder / "vllm/v1/worker/gpu_model_runner.py"
    definitions(source, names, scope, inside="GPUModelRunner")
    counts = np.array([len(own) for own in drafts], dtype=np.int32)
    rows = [token for root, own in zip(roots, drafts, strict=True) for token in (root, *own)]
    ids = torch.tensor(rows, dtype=torch.int32)
    arange = {"_arange_scratch": np.arange(4096), "arange_np": np.arange(4096)}
    self = SimpleNamespace(**arange, device="cpu", input_ids=SimpleNamespace(gpu=ids))
    self._get_cumsum_and_arange = partial(scope["_get_cumsum_and_arange"], self)
    ends = np.cumsum(counts + 1, dtype=np.int32)
    return scope["_calc_spec_decode_metadata"](self, counts, ends), ids


class Batch:
    """Rows of vLLM's batch, and a toy target whose greedy next token depends on the last two."""

    def __init__(self, sampler, folder, prompts, seed=0):
        self.table = torch.randn(VOCAB, VOCAB, VOCAB, generator=torch.Generator().manual_seed(seed))
        self.sampler, self.folder = sampler, folder
        self.texts = [[*prompt, self.next(prompt)] for prompt in prompts]
        self.emitted = [[text[-1]] for text in self.texts]
        self.counts = []

    def next(self, text):
        return int(self.table[text[-2], text[-1]].argmax())

    def greedy(self, prompt, count):
        text = list(prompt)
        for _ in range(count):
            text.append(self.next(text))
        return text

    def propose(self, proposer):
        ids = np.zeros((len(self.texts), WIDTH), dtype=np.int32)
        for row, text in enumerate(self.texts):
            ids[row, : len(text)] = text
        lengths = np.array([len(text) for text in self.texts])
        return proposer.propose(self.emitted, lengths, ids, slot_mappings=None)

    def step(self, proposer):
        drafts = self.propose(proposer)
        self.counts.append([len(own) for own in drafts])
        if not any(map(len, drafts)):  # vLLM samples without a rejection sampler then
            self.emitted = [[self.next(text)] for text in self.texts]
        else:
            info, ids = metadata(self.folder, drafts, [text[-1] for text in self.texts])
            before = [text[-2] for text in self.texts]
            parts = zip(before, self.texts, drafts, strict=True)
            above = [t for b, text, own in parts for t in [b, text[-1], *own][: 1 + len(own)]]
            logits = self.table[torch.tensor(above), ids.long()][info.logits_indices]
            bonus = logits[info.bonus_logits_indices].argmax(-1, keepdim=True).int()
            greedy = SimpleNamespace(all_greedy=True, all_random=False)
            out = self.sampler.rejection_sample(
                info.draft_token_ids, info.num_draft_tokens, info.max_spec_len,
                info.cu_num_draft_tokens, None, logits[info.target_logits_indices], bonus, greedy,
            )  # fmt: skip
            self.emitted, _ = self.sampler.RejectionSampler.parse_output(out, VOCAB)
        for text, own in zip(self.texts, self.emitted, strict=True):
            text.extend(own)


def prompts(count):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, VOCAB, (6 + b,), generator=generator).tolist() for b in range(count)]


@pytest.mark.parametrize("rows", ["", "9"])
def test_chains_of_chosen_lengths_write_the_targets_own_text(engine, folder, monkeypatch, rows):
    monkeypatch.setenv("ECHO_VERIFY_TOKENS", rows)
    given = prompts(4)
    batch, proposer = Batch(engine, folder, given), load()
    for _ in range(16):
        batch.step(proposer)
    for text, prompt in zip(batch.texts, given, strict=True):
        assert text == batch.greedy(prompt, len(text) - len(prompt))
    emitted = sum(map(len, batch.texts)) - sum(map(len, given))
    assert emitted > 1.4 * 16 * 4  # lookups found what repeats
    counts = np.array(batch.counts)
    if rows:
        assert (counts.sum(axis=1) <= 9 - 4).all() and (counts.sum(axis=1) == 9 - 4).any()
        assert any(len(set(own)) > 2 for own in batch.counts)  # lengths differ within a step
    else:
        assert counts.max() == DEPTH
    assert proposer.history.num_steps == 15
    assert proposer.history.generation.tolist() == [1, 1, 1, 1, 0, 0, 0, 0]


def test_requests_keep_their_memory_when_rows_move(engine, folder):
    batch, proposer = Batch(engine, folder, prompts(4)), load()
    for _ in range(3):
        batch.step(proposer)
    req_indices = proposer.req_indices.tolist()
    order = [3, 1, 2]  # the first request is over, the last moves into its row
    batch.texts, batch.emitted = [batch.texts[i] for i in order], [batch.emitted[i] for i in order]
    batch.texts.append([*prompts(5)[4], 0])
    batch.emitted.append([0])
    batch.propose(proposer)
    assert proposer.req_indices.tolist()[:3] == [req_indices[i] for i in order]
    new = int(proposer.req_indices[3])
    assert new not in [req_indices[i] for i in order] and proposer.history.generation.sum() == 5
    assert proposer.history.generation[proposer.req_indices[:3]].tolist() == [1, 1, 1]


def test_the_history_leaves_out_requests_that_have_ended(engine):
    """The others' sums do not depend on them."""
    plugin = import_module("echo_vllm")
    cost = echo.CostModel((1, 64), (1.0, 1.0))
    policy = echo.ElasticBudgetScheduler(
        echo.GlobalRank(1), budget=cost, max_depth=DEPTH, max_verify_tokens_per_req=DEPTH + 1
    )
    tree = policy.begin(torch.arange(4), num_verify_tokens=12)
    packed = policy.pack(
        policy.grow_positions(tree, torch.ones(4, DEPTH, 1).long(), torch.rand(4, DEPTH, 1).log())
    )
    req_indices, lengths, kept = torch.tensor([5, 0, 3, 6]), torch.tensor([2, 1, 3, 1]), [3, 0]
    whole = policy.history(8).observe(req_indices, packed, plugin.accepted(DEPTH, lengths))
    part = policy.history(8).observe(
        req_indices[kept], plugin.only(packed, kept), plugin.accepted(DEPTH, lengths[kept])
    )
    for name in ("steps", "acceptance_histogram", "expected", "accepted"):
        own, both = getattr(part, name), getattr(whole, name)
        assert torch.equal(own[:, [6, 5]], both[:, [6, 5]]) and not own[:, [0, 3]].any()
        assert torch.allclose(own[:, 8], both[:, [5, 6]].sum(dim=1))


def test_a_row_still_reading_its_prompt_gets_no_drafts(engine, folder):
    batch, proposer = Batch(engine, folder, [[1, 2, 3, 1, 2, 3, 1, 2], [1, 2, 1, 2, 1, 2]]), load()
    batch.emitted[0] = []
    drafts = batch.propose(proposer)
    assert drafts[0] == [] and len(drafts[1]) <= DEPTH
    batch.emitted = [[], []]
    assert batch.propose(proposer) == [[], []]


@pytest.mark.parametrize(("seconds", "most"), [((1.0, 64.0), 3 * DEPTH), ((1.0, 1.0), 1000)])
def test_a_cost_model_turns_drafting_off_where_tokens_cost_much(
    engine, folder, monkeypatch, tmp_path, seconds, most
):
    (tmp_path / "cost.json").write_text(echo.CostModel((1, 64), seconds).to_json())
    monkeypatch.setenv("ECHO_COST", str(tmp_path / "cost.json"))
    given = prompts(3)
    batch, proposer = Batch(engine, folder, given), load()
    for _ in range(12):
        batch.step(proposer)
    drafts = sum(map(sum, batch.counts[4:]))
    assert drafts <= most and (drafts > 3 * DEPTH) == (
        most > 3 * DEPTH
    )  # a probe at most, or every step
    for text, prompt in zip(batch.texts, given, strict=True):
        assert text == batch.greedy(prompt, len(text) - len(prompt))


@pytest.mark.parametrize(("each", "weak"), [(0.3, False), (0.01, True)])
def test_drafts_that_do_not_pay_are_left_out(engine, folder, monkeypatch, tmp_path, each, weak):
    """One text repeats itself seven times, of the other one token was seen once before."""
    cost = echo.CostModel((1, 2, 64), (1.0, 1.0 + each, 1.0 + 63 * each))
    (tmp_path / "cost.json").write_text(cost.to_json())
    monkeypatch.setenv("ECHO_COST", str(tmp_path / "cost.json"))
    texts = [[1, 2, 3] * 8, [4, 5, 6, 7, 0, 4]]
    batch, proposer = Batch(engine, folder, texts), load()
    batch.texts = texts
    strong, once = batch.propose(proposer)
    assert strong[:2] == [1, 2] and (once[:1] == [5]) is weak


@pytest.mark.parametrize("seed", range(4))
def test_our_chain_layout_is_its_step_metadata(engine, folder, seed):
    packed = forest(seed, 5, 6, shape="chain", empty=False).packed
    ours = layouts.chains(packed)
    ends, tokens = packed.indptr.tolist(), packed.tokens.tolist()
    trees = [tokens[first:end] for first, end in itertools.pairwise(ends)]
    theirs, _ = metadata(folder, [own[1:] for own in trees], [own[0] for own in trees])
    drafts = int(ours.cu_num_draft_tokens[-1])
    assert ours.num_draft_tokens.tolist() == theirs.num_draft_tokens
    for name in ("draft_token_ids", "target_logits_indices"):
        assert getattr(ours, name)[:drafts].tolist() == getattr(theirs, name).tolist()
    for name in ("cu_num_draft_tokens", "bonus_logits_indices"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert ours.logits_indices[: ends[-1]].tolist() == theirs.logits_indices.tolist()


class Buffer:
    """vLLM's pair of a host and a device tensor."""

    def __init__(self, *shape, dtype, device):
        self.gpu, self.cpu = torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)
        self.np = self.cpu.numpy()

    def copy_to_cpu(self):
        self.cpu.copy_(self.gpu)


@pytest.fixture
def manager(engine, monkeypatch):
    """vLLM's ``AdaptiveVerificationManager`` itself, of eight requests, streams and events aside."""
    module = import_module("vllm.v1.worker.gpu.spec_decode.adaptive_verification")
    for name in ("Stream", "Event", "current_stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    monkeypatch.setattr(module, "CpuGpuBuffer", Buffer)
    monkeypatch.setattr(
        module, "async_tensor_h2d", lambda x, out: out.copy_(torch.from_numpy(x.copy()))
    )
    own = module._assign_draft_token_budget
    monkeypatch.setattr(module, "_assign_draft_token_budget_compiled", own)
    ones, names = np.ones(8, dtype=np.int32), [f"r{i}" for i in range(8)]
    requests = SimpleNamespace(
        num_speculative_steps=DEPTH, device=torch.device("cpu"), max_num_reqs=8,
        max_num_batched_tokens=64, req_id_to_index={name: i for i, name in enumerate(names)},
        num_computed_tokens_np=ones, prefill_len=SimpleNamespace(np=ones),
    )  # fmt: skip
    made = module.AdaptiveVerificationManager(requests, torch.zeros(9, dtype=torch.int32), 1, 64)
    made.cost_tables = np.zeros(9), np.ones(65)
    return made


def admitted(manager, confidences, drafts, slots):
    """Drafts that each request in ``slots`` verifies, of so many that each has."""
    names = [f"r{slot}" for slot in slots]
    batch = SimpleNamespace(num_reqs=len(slots), idx_mapping=torch.tensor(slots).long())
    for _ in range(2):  # the host reads what the step before the last published
        manager.record_confidences(confidences.clone(), batch)
    tokens = {name: 1 + n for name, n in zip(names, drafts, strict=True)}
    listed = {name: [0] * n for name, n in zip(names, drafts, strict=True)}
    total = manager.get_num_tokens(tokens, listed)
    ends = manager.reallocate_drafts(names, batch.idx_mapping)[0]
    counts = (ends.diff() - 1).tolist()
    assert sum(counts) == total - len(slots) or not slots
    return counts


@pytest.mark.parametrize("seed", range(5))
def test_without_figures_adaptive_verification_is_its_own(manager, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(8, generator=generator)[:6].tolist()
    given = torch.rand(6, DEPTH, generator=generator)
    drafts = torch.randint(0, DEPTH + 1, (6,), generator=generator).tolist()
    manager.cost_tables = np.full(9, 0.5), np.linspace(1, 4, 65)
    theirs = admitted(manager, given, drafts, slots)
    import_module("echo_vllm").register()
    assert admitted(manager, given, drafts, slots) == theirs
    assert 0 < sum(theirs) < sum(drafts)


def test_a_calibration_changes_what_it_admits(manager, monkeypatch, tmp_path):
    """A draft too sure of its second token: calibrated, the other request's first goes first."""
    rng, size = np.random.default_rng(0), 4000
    depth = rng.integers(1, 3, size)
    truth = np.where(depth == 1, 0.5, 0.1)  # whatever the confidence was
    log = echo.WarmupLog.from_arrays(
        depth=depth, confidence=rng.random(size), accepted=rng.random(size) < truth
    )
    echo.calibrate(log).save(tmp_path / "calibration.json")
    confidences = torch.tensor([[0.9, 0.9], [0.4, 0.4]])
    confidences = torch.nn.functional.pad(confidences, (0, DEPTH - 2), value=0.1)
    monkeypatch.setenv("ECHO_VERIFY_TOKENS", "4")
    import_module("echo_vllm").register()
    assert admitted(manager, confidences, [2, 2], [0, 1]) == [2, 0]
    monkeypatch.setenv("ECHO_CALIBRATION", str(tmp_path / "calibration.json"))
    import_module("echo_vllm").register()
    assert admitted(manager, confidences, [2, 2], [0, 1]) == [1, 1]


def test_a_cost_model_sets_its_budget(manager, monkeypatch, tmp_path):
    """Tokens that are free are all verified; where each costs a step, none is."""
    given = torch.full((3, DEPTH), 0.8)
    plugin, counts = import_module("echo_vllm"), []
    for seconds in ((1.0, 1.0), (1.0, 64.0)):
        (tmp_path / "cost.json").write_text(echo.CostModel((1, 64), seconds).to_json())
        monkeypatch.setenv("ECHO_COST", str(tmp_path / "cost.json"))
        plugin.register()
        counts.append(admitted(manager, given, [DEPTH] * 3, [4, 0, 2]))
    assert counts == [[DEPTH] * 3, [0] * 3]
    draft, verify = plugin.cost_tables(plugin.scheduler(DEPTH), 3, manager.cost_tables)
    assert len(draft) == 9 and len(verify) == 65 and verify[64] == 64e3


def test_idle_and_empty_steps(manager, monkeypatch, tmp_path):
    (tmp_path / "cost.json").write_text(echo.CostModel((1, 64), (1.0, 2.0)).to_json())
    monkeypatch.setenv("ECHO_COST", str(tmp_path / "cost.json"))
    import_module("echo_vllm").register()
    assert admitted(manager, torch.zeros(0, DEPTH), [], []) == []
    assert admitted(manager, torch.full((2, DEPTH), 0.5), [0, 0], [3, 1]) == [0, 0]


def test_a_changed_signature_leaves_the_engine_as_it_was(manager, monkeypatch, caplog):
    kind = type(manager)

    def get_num_tokens(self, num_tokens_per_req, draft_tokens, lora=None):
        return 0

    monkeypatch.setattr(kind, "get_num_tokens", get_num_tokens)
    before = kind.record_confidences
    import_module("echo_vllm").register()
    assert kind.record_confidences is before and kind.get_num_tokens is get_num_tokens
    wanted = "expected (self, num_tokens_per_req, draft_tokens), got (self, num_tokens_per_req, dra"
    assert f"get_num_tokens: {wanted}" in caplog.text
    monkeypatch.delattr(kind, "record_confidences")
    import_module("echo_vllm").register()
    assert "input_batch), got None" in caplog.text


def test_another_release_leaves_the_engine_as_it_was(manager, monkeypatch, caplog):
    kind = type(manager)
    before = dict(vars(kind))
    monkeypatch.setattr(import_module("vllm.version"), "__version__", "0.34.0")
    import_module("echo_vllm").register()
    assert dict(vars(kind)) == before
    assert "vLLM stays as it is: version: expected 0.33.0, got 0.34.0" in caplog.text
