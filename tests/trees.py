"""Random ragged trees over a paged cache; every cache slot that must not be read holds NaN."""

from __future__ import annotations

import torch

from echo.tree.packed import ancestor_masks


def links(rows, pads, generator, device="cpu"):
    """parent (local, -1), depth, request, indptr and mask of random trees, then pads."""
    count, batch = sum(rows) + pads, len(rows)
    indptr = torch.tensor([0, *rows]).cumsum(0)
    parent, depth = torch.full((count,), -1), torch.zeros(count, dtype=torch.int64)
    request, local = torch.full((count,), batch), torch.zeros(count, dtype=torch.int64)
    for b, number in enumerate(rows):
        for i in range(number):
            row = int(indptr[b]) + i
            request[row], local[row] = b, i
            if i:
                parent[row] = int(torch.randint(max(0, i - 6), i, (1,), generator=generator))
                depth[row] = depth[int(indptr[b]) + int(parent[row])] + 1
    first = indptr[request.clamp(max=max(batch - 1, 0))]
    above = torch.where(parent >= 0, first + parent, count)
    mask = ancestor_masks(above, local, -(-max([*rows, 1]) // 32), int(depth.max()) if count else 0)
    return tuple(x.int().to(device) for x in (parent, depth, request, indptr, mask))


def attention(
    rows, contexts, *, page, heads, kv_heads, dim, dtype, pads=2, seed=0, cache=None, device="cpu"
):
    """Arguments of tree attention by name; depth too."""
    generator = torch.Generator().manual_seed(seed)
    _, depth, request, indptr, mask = links(rows, pads, generator, device)
    count = sum(rows) + pads
    normal = lambda *shape: torch.randn(shape, generator=generator)
    used = [-(-c // page) for c in contexts]
    pages = sum(used) + 2
    order = torch.randperm(pages, generator=generator)
    table = order[-1].repeat(
        len(rows), max([*used, 1])
    )  # past its context, a row of the table points to a page of NaN
    caches = torch.full((2, pages, page, kv_heads, dim), torch.nan)
    at = 0
    for b, length in enumerate(contexts):
        for j in range(used[b]):
            table[b, j] = order[at]
            filled = min(page, length - j * page)
            caches[:, order[at], :filled] = normal(2, filled, kv_heads, dim)
            at += 1
    fused = normal(count, heads + 2 * kv_heads, dim).to(
        device, dtype
    )  # q, k, v as slices of one projection: not contiguous
    caches = caches.to(device, cache or dtype)
    return {
        "q": fused[:, :heads],
        "key_cache": caches[0],
        "value_cache": caches[1],
        "page_table": table.int().to(device),
        "prefix_lens": torch.tensor(contexts, dtype=torch.int32, device=device),
        "tree_key": fused[:, heads : heads + kv_heads],
        "tree_value": fused[:, heads + kv_heads :],
        "request": request,
        "indptr": indptr,
        "mask": mask,
        "depth": depth,
    }


def alone(args, b):
    """Request ``b`` of a batch as a batch of one."""
    first, end = int(args["indptr"][b]), int(args["indptr"][b + 1])
    rows = slice(first, end)
    single = args | {
        name: args[name][rows] for name in ("q", "tree_key", "tree_value", "mask", "depth")
    }
    single["request"] = torch.zeros_like(args["request"][rows])
    single["indptr"] = (args["indptr"][b : b + 2] - first).int()
    return single | {name: args[name][b : b + 1] for name in ("page_table", "prefix_lens")}, rows
