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


def check_nodes(tokens: Array, parents: Array, scores: Array, there: NDArray[np.bool_]) -> None:
    """Check the tokens and log-probabilities of trees' nodes, all [B, T].

    Raises:
        EchoError: naming the first bad token or score, or the second of two equal siblings.
    """
    say: Callable[[int, int], str] = lambda b, i: f"expected a token >= 0, got {tokens[b, i]}"
    refuse("token", there & (tokens < 0), say)
    family = parents + np.arange(len(parents))[:, None] * parents.shape[1]
    keys = tokens.ravel(), family.ravel(), ~there.ravel()
    order = np.lexsort(keys)  # stable: equal siblings become adjacent, in order
    twice = np.zeros(there.size, dtype=bool)
    twice[order[1:]] = (np.diff(keys[1][order]) == 0) & (np.diff(keys[0][order]) == 0)
    say = lambda b, i: (
        f"expected siblings that differ, got {tokens[b, i]} twice under row {parents[b, i]}"
    )
    refuse("token", there & twice.reshape(there.shape), say)
    drafted = there.copy()
    drafted[:, :1] = False

    def hint(b: int, i: int) -> str:
        kind = checks.instead(float(scores[b, i]), scores[drafted].tolist())
        return f"expected a log-probability, got {scores[b, i]}{kind}"

    refuse("log_prob", drafted & ~(scores <= checks.ROUNDING), hint)


def validate(packed: PackedTree, max_verify_tokens_per_req: int | None, chain: bool) -> None:
    """Implement :meth:`~echo.tree.packed.PackedTree.validate`."""
    batch = packed.batch
    n = packed.num_rows
    ends = packed.indptr.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > n:
        raise EchoError(f"indptr: expected numbers rising from 0 to at most {n}, got {ends}")
    columns = packed.tokens, packed.parent, packed.depth, packed.request, packed.score
    tokens, parents, depth, request, score = (column.tolist() for column in columns)
    seen = [int.from_bytes(row.tobytes(), "little") for row in host(packed.mask)]
    drafted = [score[row] for row in range(n) if depth[row] > 0]
    limit = min(packed.max_verify_tokens_per_req, max_verify_tokens_per_req or n)
    where = ""

    def expect(name: str, holds: bool, expected: object, got: object) -> None:
        if not holds:
            raise EchoError(f"{name}: {where}: expected {expected}, got {got}")

    for b in range(batch):
        first = ends[b]
        size = ends[b + 1] - ends[b]
        siblings = set[tuple[int, int]]()
        if size > limit:
            says = f"request {b} has {size}: row {limit} does not fit"
            raise EchoError(f"rows: expected at most {limit} rows, {says}")
        for local, row in enumerate(range(first, first + size)):
            where = f"request {b}, row {local}"
            up = parents[row]
            token = tokens[row]
            above = first + up
            deep = depth[row]
            expect("request", request[row] == b, b, request[row])
            expect("tokens", token >= 0, "a token >= 0", token)
            if not local:
                expect("parent", up == -1, "-1 for the root", up)
                expect("depth", deep == 0, 0, deep)
                expect("mask", seen[row] == 1, "bit 0 alone", f"{seen[row]:#x}")
                continue
            same = f"a row of the same request, 0 to {size - 1}"
            expect("parent", 0 <= up < size, same, up)
            expect("parent", up < local, "a row before its child", up)
            expect("depth", deep == depth[above] + 1, depth[above] + 1, deep)
            bound = packed.max_depth
            expect("depth", deep <= bound, f"at most max_depth = {bound}", deep)
            least = parents[row - 1]
            expect("parent", up >= least, f"rows by parent, at least {least}", up)
            expect("tokens", (up, token) not in siblings, "siblings that differ", f"{token} twice")
            siblings.add((up, token))
            mask = seen[above] | 1 << local
            same = f"{mask:#x}, itself and its ancestors"
            expect("mask", seen[row] == mask, same, f"{seen[row]:#x}")
            best = score[above]
            got = f"{score[row]}{checks.instead(score[row], drafted)}"
            expect("score", score[row] <= best, f"at most its parent's {best}", got)
            expect("parent", not chain or up == local - 1, f"{local - 1} (a chain)", up)
    pad = batch, -1, 0, 1
    for row in range(ends[-1], n):
        where = f"pad row {row}"
        state = (request[row], parents[row], depth[row], seen[row])
        expect("request, parent, depth, mask", state == pad, pad, state)
