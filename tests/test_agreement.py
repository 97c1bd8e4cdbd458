"""Four processes over gloo: tensor-parallel ranks share one plan, data-parallel ranks one shape."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import echo

RANKS = 4
BATCH = 6
DEPTH = 3
COST = echo.CostModel((1, 24, 256), (1.0, 1.0, 9.0), draft_layer=0.02)
SCHEDULER = echo.ElasticBudgetScheduler(echo.GlobalRank(3), None, COST, DEPTH)


def drafted(rank: int, seed: int) -> echo.SuperTree:
    """A tree of many equal scores, each rank's log-probabilities off by an ulp at random places."""
    shared = torch.Generator().manual_seed(seed)
    own = torch.Generator().manual_seed(1000 * seed + rank)
    tree = SCHEDULER.begin(torch.arange(BATCH), num_verify_tokens=24)
    for _ in range(DEPTH):
        shape = (*tree.frontier.token.shape, 3)
        log_probs = (
            (2 * torch.randn(shape, generator=shared)).log_softmax(-1) * 2
        ).round() / 2 - 0.25
        noisy = torch.where(
            torch.rand(shape, generator=own) < 0.5,
            torch.nextafter(log_probs, torch.tensor(-9.0)),
            log_probs,
        )
        tokens = torch.arange(3).expand(shape).contiguous()
        dist.broadcast(tokens, 0)
        tree = SCHEDULER.grow(tree, tokens, noisy)
    return tree


def broadcast(buffer: torch.Tensor) -> torch.Tensor:
    dist.broadcast(buffer, 0)
    return buffer


def serve(rank: int, store: str, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    alone = []
    together = []
    history = SCHEDULER.history(BATCH)
    for seed in range(5):
        tree = drafted(rank, seed)
        alone.append(SCHEDULER.pack(tree).to_buffer())
        packed = SCHEDULER.pack(tree, sync=broadcast)
        together.append(packed.to_buffer())
        accepted = echo.accept(packed, torch.zeros(packed.num_rows, dtype=torch.int64))
        history = history.observe(torch.arange(BATCH), packed, accepted)
    mine = torch.arange(BATCH if rank < RANKS - 1 else 0)  # the last rank is idle
    base = 7 * rank
    curve = torch.from_numpy(SCHEDULER.tier_curve(history, mine, base))
    gathered = [torch.empty_like(curve) for _ in range(RANKS)]
    dist.all_gather(gathered, curve)
    plan = SCHEDULER.agree_on_tier(torch.stack(gathered).numpy(), rank)
    histogram = history.acceptance_histogram.sum().item()
    np.savez(
        f"{out}/{rank}.npz",
        alone=torch.stack(alone),
        together=torch.stack(together),
        plan=[plan.depth, plan.num_verify_tokens + base, histogram],
    )
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    if not dist.is_available() or not dist.is_gloo_available():
        pytest.skip("this torch has no gloo")
    folder = tmp_path_factory.mktemp("ranks")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    mp.spawn(serve, (str(folder / "store"), str(folder)), nprocs=RANKS)
    return [dict(np.load(folder / f"{rank}.npz")) for rank in range(RANKS)]


def test_ranks_that_differ_by_an_ulp_share_one_plan_when_it_is_broadcast(ranks):
    for rank in ranks[1:]:
        assert (rank["together"] == ranks[0]["together"]).all()
    assert any(
        (rank["alone"][:, 24 : 2 * 24] != ranks[0]["alone"][:, 24 : 2 * 24]).any()
        for rank in ranks[1:]
    )  # parents of the rows


def test_data_parallel_ranks_launch_one_shape(ranks):
    plans = {tuple(rank["plan"]) for rank in ranks}
    assert len(plans) == 1  # depth, rows with prefill, and what is remembered
    depth, rows, _ = plans.pop()
    assert depth > 0
    assert rows > BATCH + 7 * (RANKS - 2)
