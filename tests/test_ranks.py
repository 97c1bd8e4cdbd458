"""Tensor-parallel ranks follow one plan: broadcast, or made alike from reduced log-probabilities."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

import echo
from echo.testing import RecordedGraphs, RefuseSyncs
from echo.tree import buffer_size, drafting

BATCH, K, VOCAB, RANKS = 5, 3, 40, 2
COST = echo.CostModel((1, 24, 99), (1.0, 1.0, 4.0))
SCHEDULER = echo.ElasticBudgetScheduler(echo.GlobalRank(2), None, COST, 3)


def logits_of(depth, width):
    """Whole logits of a layer, many of them close; no two ranks have the same rounding of them."""
    generator = torch.Generator().manual_seed(depth)
    return (torch.randn(BATCH, width, VOCAB, generator=generator) * 4).round() / 4


def drafted(owner, draft):
    tree = owner.begin(torch.arange(BATCH))
    for depth in range(3):
        tree = owner.grow(tree, *draft(depth, tree.frontier.token.shape[1]))
    return tree


def tensors(packed):
    return [x for f in fields(packed) if isinstance(x := getattr(packed, f.name), torch.Tensor)]


def rank(number, folder):
    """One process: what it plans alone, by broadcast, and from gathered candidates."""
    init = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=init, rank=number, world_size=RANKS)
    sent = []

    def broadcast(buffer):
        sent.append(buffer.nbytes)
        dist.broadcast(buffer, 0)
        return buffer

    def gather(message):
        parts = [torch.empty_like(message) for _ in range(RANKS)]
        dist.all_gather(parts, message)
        return torch.stack(parts)

    def noisy(depth, width):
        noise = torch.randn(BATCH, width, VOCAB, generator=torch.Generator().manual_seed(number))
        return drafting.candidates(logits_of(depth, width) + 1e-3 * noise, K)

    def sharded(depth, width):
        first = number * VOCAB // RANKS
        own = logits_of(depth, width)[..., first : first + VOCAB // RANKS]
        return drafting.sharded_candidates(own, K, first, gather)

    space = echo.Workspace(SCHEDULER, BATCH, k=K, num_verify_tokens=24)
    found = {
        "alone": SCHEDULER.pack(drafted(SCHEDULER, noisy)),
        "broadcast": SCHEDULER.pack(drafted(SCHEDULER, noisy), sync=broadcast),
        "workspace": space.pack(drafted(space, noisy), 24, sync=broadcast),
        "reduced": SCHEDULER.pack(drafted(SCHEDULER, sharded)),
    }
    parts = {name: [x.clone() for x in tensors(packed)] for name, packed in found.items()}
    torch.save((parts, sent), f"{folder}/{number}.pt")
    dist.destroy_process_group()


def test_ranks_follow_one_plan(tmp_path):
    torch.multiprocessing.spawn(rank, (str(tmp_path),), nprocs=RANKS)
    (one, sent), (two, _) = (torch.load(tmp_path / f"{number}.pt") for number in range(RANKS))
    alike = lambda name: all(map(torch.equal, one[name], two[name]))
    assert not alike("alone")  # else the rest proves nothing
    assert alike("broadcast") and alike("workspace") and alike("reduced")
    assert all(map(torch.equal, one["alone"], one["broadcast"]))  # rank 0's own
    summary = BATCH * 3 * (1 + 32)
    assert sent == [4 * (buffer_size(BATCH, 24, 2) + summary)] * 2


def test_a_captured_pack_takes_the_plan_that_it_is_given():
    space, graphs = echo.Workspace(SCHEDULER, BATCH, k=K, num_verify_tokens=24), RecordedGraphs()
    shift = torch.zeros((), dtype=torch.int64)
    draft = lambda depth, width: drafting.candidates(logits_of(depth, width), K)
    other = lambda depth, width: drafting.candidates(-logits_of(depth, width), K)
    theirs = SCHEDULER.pack(drafted(SCHEDULER, other), num_verify_tokens=24).to_buffer()
    buffer = torch.zeros_like(theirs)  # what a broadcast writes
    sync = lambda own: torch.where(shift == 0, own, buffer)
    for turn in range(4):
        shift.fill_(turn % 2)
        buffer.copy_(theirs)
        tree = drafted(space, draft)
        packed = graphs("plan", lambda tree=tree: space.pack(tree, 24, sync=sync))
        expected = SCHEDULER.pack(drafted(SCHEDULER, other if turn % 2 else draft))
        for name in ("tokens", "parent", "mask", "indptr", "expected"):
            assert torch.equal(getattr(packed, name), getattr(expected, name)), (turn, name)
        assert packed.tokens.data_ptr() == space.packed.tokens.data_ptr()
        assert int(packed.num_layers) == 3


@given(st.integers(0, 1000), st.integers(1, 4), st.booleans())
def test_sharded_candidates_are_those_of_the_whole_vocabulary(seed, ranks, ties):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 5 * ranks, generator=generator)
    logits = (2 * logits).round() if ties else logits
    parts, sent = logits.chunk(ranks, dim=-1), []

    def listen(message):
        sent.append(message)
        return torch.zeros(ranks, *message.shape, dtype=torch.int32)

    for r, part in enumerate(parts):
        drafting.sharded_candidates(part, 4, 5 * r, listen)
    everything = torch.stack(sent)
    found = [
        drafting.sharded_candidates(part, 4, 5 * r, lambda _: everything)
        for r, part in enumerate(parts)
    ]
    for tokens, log_probs in found:
        assert torch.equal(tokens, found[0][0]) and torch.equal(log_probs, found[0][1])
    expected = logits.log_softmax(-1)
    order = expected.argsort(dim=-1, descending=True, stable=True)[..., :4]
    torch.testing.assert_close(found[0][1], expected.gather(-1, order))
    if not ties:
        assert torch.equal(found[0][0], order)
    torch.testing.assert_close(expected.gather(-1, found[0][0]), found[0][1])


def test_a_reduced_vocabulary_is_the_targets():
    """As EAGLE-3 reads ``d2t``: the target's token is the draft's plus its offset."""
    kept = torch.tensor([2, 3, 7, 8, 30])
    logits, d2t = torch.randn(2, 4, 5), kept - torch.arange(5)
    with RefuseSyncs():
        tokens, log_probs = drafting.candidates(logits.bfloat16(), 3, d2t=d2t)
    own = drafting.candidates(logits.bfloat16(), 3)
    assert torch.equal(tokens, kept[own[0]]) and torch.equal(log_probs, own[1])
    expected = logits.bfloat16().float().log_softmax(-1)
    torch.testing.assert_close(log_probs, expected.topk(3).values)


def test_candidates_go_to_layers_positions_and_first_layers():
    scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=12, max_depth=3)
    roots, heads = torch.tensor([1, 2]), torch.randn(2, 3, VOCAB)
    first = drafting.candidates(heads[:, 0], 4)
    layer = scheduler.grow(scheduler.begin(roots), *drafting.candidates(heads[:, :1], 4))
    planted = scheduler.begin(roots, first_layer=first)
    positions = scheduler.grow_positions(scheduler.begin(roots), *drafting.candidates(heads, 4))
    assert torch.equal(layer.score, planted.score) and torch.equal(
        layer.score, positions.score[:, :5]
    )
    assert positions.depth == 3 and torch.equal(planted.layers[1].token, first[0])


def test_what_does_not_fit_is_named():
    logits, gather = torch.zeros(2, 5), lambda message: message
    for says, call in {
        r"logits: expected a float tensor \[\.\.\., V\], got torch.int64": lambda: (
            drafting.candidates(logits.long(), 2)
        ),
        "logits: expected a float tensor .* got None": lambda: drafting.candidates(None, 2),
        "k: expected an int from 1 to 5": lambda: drafting.candidates(logits, 6),
        r"d2t: expected int64 \[5\]": lambda: drafting.candidates(
            logits, 2, d2t=torch.zeros(4).long()
        ),
        r"all_gather\(\): expected int32 \[ranks, 2, 5\]": lambda: drafting.sharded_candidates(
            logits, 2, 0, gather
        ),
        "first_token: expected an int >= 0": lambda: drafting.sharded_candidates(
            logits, 2, -1, gather
        ),
    }.items():
        with pytest.raises(echo.EchoError, match=says):
            call()


def test_a_node_without_candidates_is_no_fault():
    """All of a node's tokens forbidden: -inf, never NaN, whole and sharded; NaN stays a fault."""
    logits = torch.zeros(2, 5)
    logits[0], logits[1, 3] = -torch.inf, -torch.inf
    for tokens, log_probs in (
        drafting.candidates(logits, 5),
        drafting.sharded_candidates(logits, 5, 0, lambda own: own[None]),
    ):
        assert (log_probs[0] == -torch.inf).all() and tokens.shape == (2, 5)
        assert log_probs[1].exp().sum().item() == pytest.approx(1.0)
    logits[0, 0] = torch.nan
    assert drafting.candidates(logits, 2)[1][0].isnan().any()
