"""What a sampler needs so that every packed row is sampled as plain decoding would sample it.

A row's token is the one that follows its path: the request's text up to the root, then the drafts
from the root's child down to the row. :meth:`PackedTree.ancestors` lists the path; penalties, masks
and states are gathers of it. All sync-free, but for :func:`fill_bitmask`, which is the host's part.

B requests, N rows, D the deepest layer, T nodes of a request's super-tree, V tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, copy_into
from echo.tree.packed import PackedTree
from echo.tree.supertree import SuperTree

__all__ = [
    "HostTrees",
    "Matcher",
    "allows",
    "by_node",
    "by_request",
    "fill_bitmask",
    "lora_segments",
    "path_tokens",
    "to_host",
]


def path_tokens(packed: PackedTree, *, out: Tensor | None = None) -> Tensor:
    """int64 [N, D]: what plain decoding has emitted since the root when it samples this row.

    The drafts from the root's child down to the row itself; -1 beyond. The root's own token was
    emitted by the step before: it is in the engine's state of the request.

    Args:
        packed: the step.
        out: persistent buffer.

    Raises:
        EchoError: a buffer that does not fit.

    Example:
        Counts of emitted tokens [B, V], by row, for repetition, presence and frequency penalties:

        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([0]), [[[1, 1], [2]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=4, words=1)
        >>> counts = by_request(packed, torch.tensor([[1, 0, 0]]), 0)
        >>> drafts = path_tokens(packed)
        >>> counts.scatter_add_(1, drafts.clamp(min=0), (drafts >= 0).long()).tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 2, 0]]
    """
    path = packed.ancestors()[:, 1:]
    tokens = F.pad(packed.tokens, (0, 1), value=-1)
    return copy_into(out, tokens[path])


def by_request(
    packed: PackedTree, values: Tensor, fill: float, *, out: Tensor | None = None
) -> Tensor:
    """[N, ...]: a request's sampling parameters, seed, counts or adapter, for each of its rows.

    Args:
        packed: the step.
        values: [B, ...], any dtype.
        fill: for pad rows.
        out: persistent buffer.

    Raises:
        EchoError: another batch size, or a buffer that does not fit.
    """
    if not values.dim() or values.shape[0] != packed.batch:
        raise EchoError(f"values: expected [{packed.batch}, ...], got {list(values.shape)}")
    return copy_into(out, _select(values, packed.request, fill))


def by_node(
    packed: PackedTree,
    tree: SuperTree,
    values: Tensor,
    fill: float,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """[N, ...]: what is known of the super-tree's nodes, such as grammar masks, in packed order.

    Args:
        packed: the step.
        tree: what it was packed from.
        values: [B, T, ...], any dtype, in the order of ``tree.forest``.
        fill: for pad rows; -1 of a bitmask allows all.
        out: persistent buffer.

    Raises:
        EchoError: values of other nodes, or a buffer that does not fit.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2], [3]]])
        >>> packed = pack(tree, tree.score > -1.2, num_rows=4, words=1)
        >>> values = torch.tensor([[40, 41, 42, 43]])
        >>> by_node(packed, tree, values, -1).tolist()  # of 7, 1, 3; 2 is out
        [40, 41, 42, -1]
    """
    nodes = [packed.batch, sum(checks.instance("tree", tree, SuperTree).sizes)]
    if list(values.shape[:2]) != nodes:
        raise EchoError(f"values: expected [{nodes[0]}, {nodes[1]}, ...], got {list(values.shape)}")
    flat = values.flatten(0, 1)
    return copy_into(out, _select(flat, torch.where(packed.node < 0, len(flat), packed.node), fill))


def _select(values: Tensor, index: Tensor, fill: float) -> Tensor:
    """Rows of ``values`` [M, ...]; ``fill`` for index M."""
    if not len(values):
        return values.new_full((len(index), *values.shape[1:]), fill)
    chosen = values.index_select(0, index.clamp(max=len(values) - 1))
    return chosen.masked_fill_((index == len(values)).view(-1, *[1] * (values.dim() - 1)), fill)


def lora_segments(packed: PackedTree, adapters: Tensor, pad_adapter: int) -> tuple[Tensor, Tensor]:
    """Segments of rows that share an adapter, as segmented LoRA kernels read them.

    Kernels that read an adapter for each row take ``by_request(packed, adapters, pad_adapter)``.

    Args:
        packed: the step.
        adapters: int32 or int64 [B], each request's adapter.
        pad_adapter: of pad rows: one of rank 0.

    Returns:
        Where segments begin, int32 [B + 2], and their adapters [B + 1]: the requests', then the
        pad rows'.

    Raises:
        EchoError: adapters of another shape or dtype.

    Source: ``LoRABatchInfo`` (``seg_indptr``, ``weight_indices``) of sglang 0.5.23.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([7, 9]), [[[1, 2]], [[3]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=8, words=1)
        >>> [x.tolist() for x in lora_segments(packed, torch.tensor([4, 2]), pad_adapter=0)]
        [[0, 3, 5, 8], [4, 2, 0]]
    """
    device = packed.tokens.device
    checks.tensor("adapters", adapters, [packed.batch], checks.INTEGERS, device)
    indptr = F.pad(packed.indptr, (0, 1), value=packed.num_rows)
    return indptr, F.pad(adapters, (0, 1), value=checks.integer("pad_adapter", pad_adapter, 0))


@dataclass(frozen=True)
class HostTrees:
    """Tokens and links of a step on the host, for matchers that walk trees while the target runs.

    Attributes:
        tokens: int64 [N], pinned where the step is on a GPU.
        parent: int32 [N], row within the request; -1 for a root and on pad rows.
        indptr: int32 [B + 1].
        done: the CUDA event behind the copy; None on a CPU.
        buffers: what a later, larger step is copied to; these are their beginning.
    """

    tokens: Tensor
    parent: Tensor
    indptr: Tensor
    done: Any = None
    buffers: dict[str, Tensor] = field(default_factory=dict)


def to_host(packed: PackedTree, *, out: HostTrees | None = None) -> HostTrees:
    """Start a step's asynchronous copy to the host; waits for nothing.

    Launch it behind ``pack``, before the target's pass. The copies may be part of a CUDA graph; the
    event is then recorded behind its replay.

    Args:
        packed: the step.
        out: what an earlier call returned, whose buffers are used where they are large enough:
            pinning memory takes far longer than the copy. Not while that copy is still read.
    """
    parts = {name: getattr(packed, name) for name in ("tokens", "parent", "indptr")}
    copies = {}
    pinned = packed.tokens.is_cuda
    buffers = {} if out is None else dict(out.buffers)
    for name, part in parts.items():
        if name not in buffers or len(buffers[name]) < len(part):
            new = torch.empty(part.shape, dtype=part.dtype, pin_memory=pinned, device="cpu")
            buffers[name] = new
        copies[name] = buffers[name][: len(part)].copy_(part, non_blocking=True)
    done: Any = None
    if pinned and not torch.cuda.is_current_stream_capturing():
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
    return HostTrees(**copies, done=done, buffers=buffers)


class Matcher(Protocol):
    """A grammar's state of one request, in XGrammar's words (``xgrammar.GrammarMatcher``)."""

    def accept_token(self, token_id: int, /) -> bool:
        """Go on by ``token_id``; False, and no change, where the grammar forbids it."""

    def rollback(self, num_tokens: int, /) -> None:
        """Take the last ``num_tokens`` back."""

    def is_terminated(self) -> bool:
        """Whether the grammar has ended: nothing follows."""

    def fill_next_token_bitmask(self, bitmask: Any, index: int, /) -> Any:
        """Write the tokens that may follow to row ``index`` of ``bitmask`` int32 [N, V / 32]."""


def fill_bitmask(trees: HostTrees, matchers: Sequence[Matcher | None], bitmask: Tensor) -> Tensor:
    """Walk the trees on the host: for each row, the tokens that its grammar allows behind it.

    Masking each row's logits with its bits before it is sampled is plain constrained decoding, row
    by row, so the emitted text is its text. Drafts that the grammar forbids are never accepted,
    because their parent's row cannot sample them; nothing is asked behind them. Matchers end where
    they began, at the root: then feed them what was emitted.

    Args:
        trees: from :func:`to_host`; waited for.
        matchers: one for each request, which has accepted the text up to the root, root included;
            None: not constrained.
        bitmask: int32 [N, ceil(V / 32)] on the host, written to: bit j % 32 of word j // 32 is
            token j. -1, all tokens, on rows that are not asked.

    Returns:
        ``bitmask``, to be copied to the device without waiting.

    Raises:
        EchoError: another number of matchers, or a bitmask of another shape or dtype.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([7]), [[[1, 2]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=3, words=1)
        >>> bitmask = torch.zeros(3, 1, dtype=torch.int32)
        >>> fill_bitmask(to_host(packed), [None], bitmask).tolist()
        [[-1], [-1], [-1]]
    """
    batch = len(trees.indptr) - 1
    rows = len(trees.tokens)
    checks.tensor("bitmask", bitmask, [rows, "V / 32"], torch.int32, torch.device("cpu"))
    if len(matchers) != batch:
        raise EchoError(f"matchers: expected one for each of {batch} requests, got {len(matchers)}")
    if trees.done is not None:
        trees.done.synchronize()
    bitmask.fill_(-1)
    tokens = trees.tokens.tolist()
    parent = trees.parent.tolist()
    indptr = trees.indptr.tolist()
    for matcher, begin, end in zip(matchers, indptr, indptr[1:], strict=False):
        if matcher is None or begin == end:
            continue
        children: dict[int, list[int]] = {}
        for row in range(begin + 1, end):
            children.setdefault(begin + parent[row], []).append(row)
        _fill(matcher, begin, tokens, children, bitmask)
    return bitmask


def allows(bitmask: Tensor, tokens: Tensor) -> Tensor:
    """bool [..., k]: whether a bitmask has the tokens: ``allowed`` of ``scheduler.grow``.

    With the roots' masks, known since the step before, forbidden drafts of the first layer are
    found without waiting for the host.

    Args:
        bitmask: int32 [..., ceil(V / 32)], as :func:`fill_bitmask` writes it; one for each node.
        tokens: int64 [..., k], the nodes' candidates; one beyond the bitmask is not allowed.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Example:
        >>> allows(torch.tensor([[0b1010]]).int(), torch.tensor([[0, 1, 3]])).tolist()
        [[False, True, True]]
    """
    checks.tensor("tokens", tokens, [*bitmask.shape[:-1], "k"], torch.int64, bitmask.device)
    words = checks.tensor("bitmask", bitmask, [*tokens.shape[:-1], "V / 32"], torch.int32).shape[-1]
    word = tokens >> 5
    bits = bitmask.gather(-1, word.clamp(0, max(words - 1, 0))) if words else torch.zeros_like(word)
    return (bits >> (tokens & 31) & 1).bool() & (word >= 0) & (word < words)


def _fill(
    matcher: Matcher, row: int, tokens: list[int], children: dict[int, list[int]], bitmask: Tensor
) -> None:
    """Fill ``row``, at which the matcher is, and all below it."""
    if matcher.is_terminated():
        return
    matcher.fill_next_token_bitmask(bitmask, row)
    for child in children.get(row, ()):
        if matcher.accept_token(tokens[child]):
            _fill(matcher, child, tokens, children, bitmask)
            matcher.rollback(1)
