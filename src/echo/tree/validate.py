"""Check on the host that values make a tree, copying every value from the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError

if TYPE_CHECKING:
    from echo.tree.packed import PackedTree

Array = NDArray[Any]


def host(value: Tensor) -> Array:
    """Copy a tensor's values to the host."""
    array: Array = value.detach().cpu().numpy()
    return array


def refuse(name: str, bad: NDArray[np.bool_], say: Callable[..., str]) -> None:
    """Raise EchoError at the first True of ``bad``, [B] or [B, n], with ``say(request, row)``."""
    if bad.any():
        at = [int(i) for i in np.unravel_index(bad.argmax(), bad.shape)]
        where = ", ".join(f"{kind} {i}" for kind, i in zip(("request", "row"), at, strict=False))
        raise EchoError(f"{name}: {where}: {say(*at)}")


def depths(parents: Array, sizes: Array, there: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Depth of each node, [B, T], by pointer doubling.

    Args:
        parents: [B, T], index into the same request's nodes; -1 for the root, which is first.
        sizes: [B], number of nodes of each request.
        there: bool [B, T], whether the node exists.

    Raises:
        EchoError: naming the first node whose parent is not a row before it.
    """
    column = np.arange(parents.shape[1])
    root = column == 0
    outside = (parents < 0) | (parents >= sizes[:, None])

    def say(b: int, row: int) -> str:
        at = int(parents[b, row])
        own = parents[b, : sizes[b]].tolist()
        seen = {row}
        if row == 0:
            return f"expected -1 for the root, got {at}"
        if outside[b, row]:
            return f"expected a row of the same request, 0 to {sizes[b] - 1}, got {at}"
        while 0 <= at < len(own) and at not in seen:
            seen.add(at)
            at = own[at]
        cycle = ", a cycle" if at in seen else ""
        return f"expected a row before its child, got {parents[b, row]}{cycle}"

    refuse("parent", there & np.where(root, parents != -1, outside | (parents >= column)), say)
    jump = np.where(there & ~root, parents, 0)
    depth: NDArray[np.int64] = (there & ~root).astype(np.int64)
    while jump.any():
        depth += np.take_along_axis(depth, jump, 1)
        jump = np.take_along_axis(jump, jump, 1)
    return depth


def check_tokens(name: str, tokens: Array, parents: Array, there: NDArray[np.bool_]) -> None:
    """Refuse the first negative token, and the second of two equal siblings; all [B, T]."""
    refuse(name, there & (tokens < 0), lambda b, i: f"expected a token >= 0, got {tokens[b, i]}")
    family = parents + np.arange(len(parents))[:, None] * parents.shape[1]
    keys = tokens.ravel(), family.ravel(), ~there.ravel()
    order = np.lexsort(keys)  # stable: equal siblings become adjacent, in order
    twice = np.zeros(there.size, dtype=bool)
    twice[order[1:]] = (np.diff(keys[1][order]) == 0) & (np.diff(keys[0][order]) == 0)
    say: Callable[[int, int], str] = lambda b, i: (
        f"expected siblings that differ, got {tokens[b, i]} twice under row {parents[b, i]}"
    )
    refuse(name, there & twice.reshape(there.shape), say)


def check_scores(
    name: str, scores: Array, most: Array, drafted: NDArray[np.bool_], noun: str
) -> None:
    """Refuse the first drafted score [B, T] above ``most``, which ``noun`` describes."""

    def say(b: int, i: int) -> str:
        hint = checks.instead(float(scores[b, i]), scores[drafted].tolist())
        return f"expected {noun.format(most[b, i])}, got {scores[b, i]}{hint}"

    refuse(name, drafted & ~(scores <= most), say)


def validate(packed: PackedTree, max_verify_tokens_per_req: int | None, chain: bool) -> None:
    """Implement :meth:`~echo.tree.packed.PackedTree.validate`."""
    n = packed.num_rows
    ends = host(packed.indptr).astype(np.int64)
    sizes = np.diff(ends)
    if ends[0] != 0 or (sizes < 0).any() or ends[-1] > n:
        expected = f"numbers rising from 0 to at most {n}"
        raise EchoError(f"indptr: expected {expected}, got {ends.tolist()}")
    limit = min(packed.max_verify_tokens_per_req, max_verify_tokens_per_req or n)
    if (sizes > limit).any():
        b = int((sizes > limit).argmax())
        says = f"request {b} has {sizes[b]}: row {limit} does not fit"
        raise EchoError(f"rows: expected at most {limit} rows, {says}")
    masks = [int.from_bytes(words.tobytes(), "little") for words in host(packed.mask)]
    columns = packed.tokens, packed.parent, packed.depth, packed.request, packed.score
    flat = *map(host, columns), np.array(masks, dtype=object)
    row = np.arange(sizes.max(initial=0))
    there = row < sizes[:, None]
    drafted = there & (row > 0)
    at = np.where(there, ends[:-1, None] + row, 0)
    tokens, parents, depth, request, score, seen = (column[at] for column in flat)

    def expect(name: str, holds: Array, expected: Callable[[int, int], object], got: Array) -> None:
        refuse(name, there & ~holds, lambda b, i: f"expected {expected(b, i)}, got {got[b, i]}")

    expect("request", request == np.arange(packed.batch)[:, None], lambda b, _: b, request)
    deep = depths(parents, sizes, there)
    above = np.where(drafted, parents, 0)
    before = np.where(row > 0, np.roll(parents, 1, axis=1), -1)
    least = lambda b, i: f"rows by parent, at least {before[b, i]}"
    expect("parent", parents >= before, least, parents)
    expect("parent", (parents == row - 1) | (not chain), lambda _, i: f"{i - 1} (a chain)", parents)
    expect("depth", depth == deep, lambda b, i: deep[b, i], depth)
    bound = packed.max_depth
    expect("depth", depth <= bound, lambda *_: f"at most max_depth = {bound}", depth)
    check_tokens("tokens", tokens, parents, there)
    mask = np.where(drafted, np.take_along_axis(seen, above, 1), 0) | 1 << row.astype(object)
    own = lambda b, i: f"{mask[b, i]:#x}, itself and its ancestors"
    expect("mask", seen == mask, own, np.vectorize(hex, otypes=[object])(seen))
    best = np.take_along_axis(score, above, 1)
    check_scores("score", score, best, drafted, "at most its parent's {}")
    pad = packed.batch, -1, 0, 1
    for i in range(ends[-1], n):
        state = tuple(int(flat[column][i]) for column in (3, 1, 2, 5))
        if state != pad:
            names = "request, parent, depth, mask"
            raise EchoError(f"{names}: pad row {i}: expected {pad}, got {state}")
