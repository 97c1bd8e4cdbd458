"""What does it cost tensor-parallel ranks to follow one plan?

*Broadcast*: rank 0's packed step once a step. *Reduced*: each layer, every rank's best candidates,
from which all plan alike. Medians, and bytes that one rank sends.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from echo.tree import buffer_size, drafting

DEPTH, BEAM, K, WORDS, REPEATS = 6, 4, 4, 2, 200
SIZES = ((1, 16), (16, 128), (256, 1024))
"""Requests, and verify tokens of a step."""


def table(counts: Sequence[int], nccl: bool = False) -> None:
    """Prints the table for so many ranks each."""
    print("| ranks | requests | tokens | broadcast | us | reduced | us |")
    print("|---|---|---|---|---|---|---|")
    for ranks in counts:
        with tempfile.TemporaryDirectory() as folder:
            run = (f"file://{folder}/store", ranks, nccl)
            torch.multiprocessing.spawn(rank, run, nprocs=ranks)


def rank(number: int, init: str, ranks: int, nccl: bool) -> None:
    """One process of a group."""
    device = torch.device("cuda", number) if nccl else torch.device("cpu")
    if nccl:
        torch.cuda.set_device(device)
    backend = "nccl" if nccl else "gloo"
    dist.init_process_group(backend, init_method=init, rank=number, world_size=ranks)
    for batch, tokens in SIZES:
        size = buffer_size(batch, tokens, WORDS) + batch * DEPTH * 33  # with its histogram
        plan = torch.zeros(size, dtype=torch.int32, device=device)
        logits = torch.randn(batch, BEAM, 64, device=device)  # reading them is the drafter's time
        message = torch.zeros(batch, BEAM, 2 * K + 1, dtype=torch.int32, device=device)
        everyone = message.new_zeros(ranks, *message.shape)

        def gather(own: torch.Tensor, everyone: torch.Tensor = everyone) -> torch.Tensor:
            dist.all_gather(list(everyone), own)
            return everyone

        def layers(logits: torch.Tensor = logits, gather=gather) -> None:
            for _ in range(DEPTH):
                drafting.sharded_candidates(logits, K, 64 * number, gather)

        broadcast = timed(lambda plan=plan: dist.broadcast(plan, 0), nccl)
        reduced = timed(layers, nccl)
        if number == 0:
            sent = f"{plan.nbytes:,} B", f"{broadcast:.0f}", f"{DEPTH * message.nbytes:,} B"
            print(f"| {ranks} | {batch} | {tokens} | {' | '.join(sent)} | {reduced:.0f} |")
    dist.destroy_process_group()


def timed(function, nccl: bool) -> float:
    """Median microseconds of a call; on cards of a replay."""
    for _ in range(10):
        function()
    if nccl:
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        function = lambda: (graph.replay(), torch.cuda.synchronize())
    found = []
    for _ in range(REPEATS):
        dist.barrier()
        start = time.perf_counter()
        function()
        found.append(1e6 * (time.perf_counter() - start))
    return statistics.median(found)
