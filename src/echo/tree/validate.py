"""Whether a packed step keeps the layout's contract: host work that copies every value from the device."""

from __future__ import annotations

from echo import _checks as checks
from echo._checks import EchoError
from echo.tree.packed import WORD, PackedTree


def validate(
    packed: PackedTree, *, max_verify_tokens_per_req: int | None = None, chain: bool = False
) -> None:
    """Checks every value of a packed step; see :meth:`~echo.tree.packed.PackedTree.validate`.

    Raises:
        EchoError: naming the request and the row (local to the request) of the first fault.
    """
    batch, n = packed.batch, packed.num_rows
    ends = packed.indptr.tolist()
    if ends[0] != 0 or ends != sorted(ends) or ends[-1] > n:
        raise EchoError(f"indptr: expected numbers rising from 0 to at most {n}, got {ends}")
    tokens, parent, depth, request = (
        x.tolist() for x in (packed.tokens, packed.parent, packed.depth, packed.request)
    )
    seen = [_bits(words) for words in packed.mask.tolist()]
    score = packed.score.tolist()
    drafted = [score[row] for row in range(n) if depth[row] > 0]
    limit = min(packed.max_verify_tokens_per_req, max_verify_tokens_per_req or n)
    for b in range(batch):
        first, size = ends[b], ends[b + 1] - ends[b]
        if size > limit:
            raise EchoError(
                f"rows: expected at most {limit} rows, request {b} has {size}: row {limit} does not fit"
            )
        siblings: set[tuple[int, int]] = set()
        for local in range(size):
            row = first + local
            up = parent[row]
            where = f"request {b}, row {local}"
            _expect(request[row] == b, "request", where, b, request[row])
            _expect(tokens[row] >= 0, "tokens", where, "a token >= 0", tokens[row])
            if local == 0:
                _expect(up == -1, "parent", where, "-1 for the root", up)
                _expect(depth[row] == 0, "depth", where, 0, depth[row])
                _expect(seen[row] == 1, "mask", where, "bit 0 alone", f"{seen[row]:#x}")
                continue
            _expect(
                0 <= up < size, "parent", where, f"a row of the same request, 0 to {size - 1}", up
            )
            _expect(up < local, "parent", where, "a row before its child", up)
            _expect(
                depth[row] == depth[first + up] + 1,
                "depth",
                where,
                depth[first + up] + 1,
                depth[row],
            )
            _expect(
                depth[row] <= packed.max_depth,
                "depth",
                where,
                f"at most max_depth = {packed.max_depth}",
                depth[row],
            )
            _expect(
                up >= parent[row - 1],
                "parent",
                where,
                f"rows by parent, at least {parent[row - 1]}",
                up,
            )
            _expect(
                (up, tokens[row]) not in siblings,
                "tokens",
                where,
                "siblings that differ",
                f"{tokens[row]} twice",
            )
            siblings.add((up, tokens[row]))
            mask = seen[first + up] | 1 << local
            _expect(
                seen[row] == mask,
                "mask",
                where,
                f"{mask:#x}, itself and its ancestors",
                f"{seen[row]:#x}",
            )
            instead = checks.instead(score[row], drafted)
            _expect(
                score[row] <= score[first + up],
                "score",
                where,
                f"at most its parent's {score[first + up]}",
                f"{score[row]}{instead}",
            )
            _expect(not chain or up == local - 1, "parent", where, f"{local - 1} (a chain)", up)
    for row in range(ends[-1], n):
        pad = (request[row], parent[row], depth[row], seen[row])
        _expect(
            pad == (batch, -1, 0, 1),
            "request, parent, depth, mask",
            f"pad row {row}",
            (batch, -1, 0, 1),
            pad,
        )


def _bits(words: list[int]) -> int:
    return sum((word & (1 << WORD) - 1) << WORD * place for place, word in enumerate(words))


def _expect(holds: bool, name: str, where: str, expected: object, got: object) -> None:
    if not holds:
        raise EchoError(f"{name}: {where}: expected {expected}, got {got}")
