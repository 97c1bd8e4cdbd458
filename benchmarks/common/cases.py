"""The batches that tree attention is measured on: ragged trees as a scheduler drafts them."""

from __future__ import annotations

import ast
import functools
from dataclasses import dataclass

import torch

import echo

HEADS = {"llama-3.1-8b": (32, 8, 128), "llama-3.1-70b or qwen3-235b, tp8": (8, 1, 128)}
"""Query heads, KV heads, head dimension of a GPU; at tp8 Qwen3-235B's 4 KV heads are replicated."""


@dataclass(frozen=True)
class Case:
    """A batch of ``rows`` a request; ``elastic``: as many in all, selected over the batch."""

    model: str
    batch: int
    rows: int
    context: int
    elastic: bool = False
    page: int = 64
    cache: str = "bfloat16"


def cases(dry: bool) -> list[Case]:
    """The shapes: the first ones matter most, in case time runs out."""
    if dry:
        return [Case("tiny", 3, 4, 37, page=16), Case("tiny", 3, 5, 20, elastic=True, page=16)]
    name = "llama-3.1-8b"
    grid = [
        Case(name, batch, rows, context)
        for context in (2048, 8192)
        for batch in (32, 128)
        for rows in (4, 16)
    ]
    grid += [
        Case(name, 32, 16, 8192, elastic=True),
        Case(name, 128, 8, 2048, elastic=True),
        Case(name, 256, 4, 2048, elastic=True),
    ]
    grid += [Case(name, 1, rows, context) for rows in (1, 16, 64) for context in (512, 32768)]
    grid += [
        Case(name, 32, 64, 4096),
        Case(name, 64, 1, 4096),
        Case(name, 256, 1, 512),
        Case(name, 8, 64, 32768),
    ]
    grid += [
        Case(name, 32, 16, 8192, cache="float8_e4m3fn"),
        Case(name, 128, 4, 2048, cache="float8_e4m3fn"),
    ]
    return grid + [Case(other, batch, 16, 8192) for other in list(HEADS)[1:] for batch in (8, 64)]


@functools.lru_cache
def drafted(case: Case) -> echo.PackedTree:
    """Packed rows as our scheduler makes them from random draft scores."""
    rule: echo.budget.Rule = echo.GlobalRank(4) if case.elastic else echo.PerRequest(case.rows, 4)
    budget = case.rows * case.batch if case.elastic else None
    scheduler = echo.ElasticBudgetScheduler(
        rule, budget=budget, max_depth=6, max_verify_tokens_per_req=64
    )
    tree = scheduler.begin(torch.arange(case.batch))
    generator = torch.Generator().manual_seed(0)
    for _ in range(scheduler.max_depth):
        shape = (*tree.frontier.token.shape, 4)
        sharp = 0.5 + 3 * torch.rand(
            case.batch, 1, 1, generator=generator
        )  # some requests are easier than others
        scores = (sharp * torch.randn(shape, generator=generator)).log_softmax(-1)
        tree = scheduler.grow(tree, torch.randint(0, 1000, shape, generator=generator), scores)
    return scheduler.pack(tree)


def sizes(case: Case) -> tuple[list[int], list[int]]:
    """Rows and prefix lengths of the requests: contexts vary by a quarter around the case's."""
    spread = torch.rand(case.batch, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.75
    contexts = case.context * (spread if case.batch > 1 else torch.ones(1))
    return drafted(case).indptr.diff().tolist(), contexts.int().tolist()


def named(text: str) -> Case:
    """A case as files name it: its ``repr``, in the words of its day."""
    fields = ast.parse(text.replace("dealt=", "elastic="), mode="eval").body.keywords
    return Case(**{field.arg: ast.literal_eval(field.value) for field in fields})


def inputs(case: Case, device: torch.device, seed: int) -> dict[str, torch.Tensor]:
    """Arguments of tree attention by name; the seed changes data and order of pages, not shapes."""
    heads, kv_heads, dim = HEADS.get(case.model, (4, 2, 64))
    generator = torch.Generator(device).manual_seed(seed)
    packed = drafted(case)
    tree = {
        name: getattr(packed, name).to(device) for name in ("request", "indptr", "mask", "depth")
    }
    count = packed.num_rows
    context = torch.tensor(sizes(case)[1], dtype=torch.int32, device=device)
    # Room for the tree behind its context: peers want it in the cache.
    table_width = -(-(int(context.max()) + int(tree["indptr"].diff().max())) // case.page)
    pages = case.batch * table_width
    table = (
        torch.randperm(pages, generator=generator, device=device)
        .int()
        .view(case.batch, table_width)
    )
    dtype = torch.float32 if case.model == "tiny" else torch.bfloat16
    normal = lambda *shape: torch.randn(shape, generator=generator, device=device, dtype=dtype)
    caches = [normal(pages, case.page, kv_heads, dim) for _ in range(2)]
    if case.cache.startswith("float8"):
        caches = [cache.to(getattr(torch, case.cache)) for cache in caches]
    args = {
        "q": normal(count, heads, dim),
        "key_cache": caches[0],
        "value_cache": caches[1],
        "page_table": table,
        "prefix_lens": context,
    }
    return (
        args
        | {"tree_key": normal(count, kv_heads, dim), "tree_value": normal(count, kv_heads, dim)}
        | tree
    )
