"""Helpers for a sampler, so that it samples every packed row as plain decoding would.

A row's token follows the row's path: the request's text up to the root, then the drafts from the
root's child down to the row. :meth:`PackedTree.ancestors` lists the path; penalties, masks and
states are gathers along it. All are sync-free except :func:`fill_bitmask`, which runs on the host.

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
from echo.tree.packed import PackedTree, select_rows
from echo.tree.supertree import SuperTree


def path_tokens(packed: PackedTree, *, out: Tensor | None = None) -> Tensor:
    """int64 [N, D]: the tokens that plain decoding would have emitted since the root, for each row.

    These are the drafts from the root's child down to the row itself, then -1. The root itself was
    emitted by the previous step and is already in the engine's state of the request.

    Args:
        packed, out: the step, and a persistent buffer.

    Raises:
        EchoError: a buffer that does not fit.

    Example:
        >>> from echo.tree import SuperTree, pack
        >>> tree = SuperTree.from_paths(torch.tensor([0]), [[[1, 1], [2]]])
        >>> packed = pack(tree, tree.score > -torch.inf, num_rows=5, words=1)  # 0, 1, 2, 1, a pad
        >>> by_node(packed, tree, torch.tensor([[40, 41, 42, 43]]), -1).tolist()
        [40, 41, 42, 43, -1]
        >>> [x.tolist() for x in lora_segments(packed, torch.tensor([4]), pad_adapter=0)]
        [[0, 4, 5], [4, 0]]
        >>> bitmask = torch.zeros(5, 1, dtype=torch.int32)
        >>> fill_bitmask(to_host(packed), [None], bitmask)[:, 0].tolist()  # all tokens allowed
        [-1, -1, -1, -1, -1]

        Token counts of each row, for penalties, from each request's counts [B, V]:

        >>> counts, drafts = by_request(packed, torch.tensor([[1, 0, 0]]), 0), path_tokens(packed)
        >>> counts.scatter_add_(1, drafts.clamp(min=0), (drafts >= 0).long())[:4].tolist()
        [[1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 2, 0]]
    """
    tokens = F.pad(packed.tokens, (0, 1), value=-1)
    return copy_into(out, tokens[packed.ancestors()[:, 1:]])


def by_request(
    packed: PackedTree, values: Tensor, fill: float, *, out: Tensor | None = None
) -> Tensor:
    """[N, ...]: each row's value of its request: sampling parameters, seed, counts or adapter.

    Args:
        packed, out: the step, and a persistent buffer.
        values: [B, ...], any dtype.
        fill: for pad rows.

    Raises:
        EchoError: another batch size, or a buffer that does not fit.
    """
    checks.tensor("values", values, [packed.batch, "..."])
    there = packed.request < packed.batch
    return copy_into(out, select_rows(values, packed.request, there, fill))


def by_node(
    packed: PackedTree, tree: SuperTree, values: Tensor, fill: float, *, out: Tensor | None = None
) -> Tensor:
    """[N, ...]: values of the super-tree's nodes, such as grammar masks, in packed order.

    Args:
        packed, out: the step, and a persistent buffer.
        tree: the super-tree that it was packed from.
        values: [B, T, ...], any dtype, in the order of ``tree.forest``.
        fill: for pad rows; -1 in a bitmask allows all tokens.

    Raises:
        EchoError: another tree or other shapes, or a buffer that does not fit.
    """
    nodes = sum(checks.instance("tree", tree, SuperTree).sizes)
    flat = checks.tensor("values", values, [packed.batch, nodes, "..."]).flatten(0, 1)
    with checks.reading("tree: expected the one that was packed"):
        chosen = select_rows(flat, packed.node, packed.node >= 0, fill)
    return copy_into(out, chosen)


def lora_segments(packed: PackedTree, adapters: Tensor, pad_adapter: int) -> tuple[Tensor, Tensor]:
    """Group rows into segments that share an adapter, for segmented LoRA kernels.

    Kernels that read an adapter per row take ``by_request(packed, adapters, pad_adapter)``.

    Args:
        packed: the step.
        adapters: int32 or int64 [B], each request's adapter.
        pad_adapter: adapter of pad rows, one of rank 0.

    Returns:
        Offsets of the segments int32 [B + 2], and their adapters [B + 1]: the requests', then the
        pad rows'.

    Raises:
        EchoError: adapters of another shape or dtype.

    Source: ``LoRABatchInfo`` (``seg_indptr``, ``weight_indices``) of sglang 0.5.23.
    """
    device = packed.tokens.device
    checks.tensor("adapters", adapters, [packed.batch], checks.INTEGERS, device)
    indptr = F.pad(packed.indptr, (0, 1), value=packed.num_rows)
    return indptr, F.pad(adapters, (0, 1), value=checks.integer("pad_adapter", pad_adapter, 0))


@dataclass(frozen=True)
class HostTrees:
    """A step's tokens and links on the host, for matchers that walk trees while the target runs.

    Attributes:
        tokens: int64 [N], pinned if the step is on a GPU.
        parent: int32 [N], row within the request; -1 for a root and on pad rows.
        indptr: int32 [B + 1].
        done: CUDA event recorded after the copy; None on a CPU, or while a graph is captured.
        buffers: full host buffers, of which the tensors are prefixes, for later steps.
    """

    tokens: Tensor
    parent: Tensor
    indptr: Tensor
    done: Any = None
    buffers: dict[str, Tensor] = field(default_factory=dict)


def to_host(packed: PackedTree, *, out: HostTrees | None = None) -> HostTrees:
    """Start an asynchronous copy of a step to the host.

    Launch it after ``pack`` and before the target's forward pass. A CUDA graph may capture the
    copies; then record the event after its replay.

    Args:
        packed: the step.
        out: an earlier result that is no longer read; its buffers are reused if they are large
            enough, since pinning memory takes far longer than the copy.
    """
    copies = {}
    pinned = packed.tokens.is_cuda
    buffers = {} if out is None else dict(out.buffers)
    for name in ("tokens", "parent", "indptr"):
        part = getattr(packed, name)
        if name not in buffers or len(buffers[name]) < len(part):
            kind = {"dtype": part.dtype, "device": "cpu", "pin_memory": pinned}
            buffers[name] = torch.empty(part.shape, **kind)
        copies[name] = buffers[name][: len(part)].copy_(part, non_blocking=True)
    done: Any = None
    if pinned and not torch.cuda.is_current_stream_capturing():
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
    return HostTrees(**copies, done=done, buffers=buffers)


class Matcher(Protocol):
    """A request's grammar state, with XGrammar's methods (``xgrammar.GrammarMatcher``)."""

    def accept_token(self, token_id: int, /) -> bool:
        """Advance by ``token_id``; return False, without change, if the grammar forbids it."""

    def rollback(self, num_tokens: int, /) -> None:
        """Undo the last ``num_tokens`` tokens."""

    def is_terminated(self) -> bool:
        """Return whether the grammar has ended, so that nothing may follow."""

    def fill_next_token_bitmask(self, bitmask: Any, index: int, /) -> Any:
        """Write the allowed next tokens to row ``index`` of ``bitmask`` int32 [N, V / 32]."""


def fill_bitmask(trees: HostTrees, matchers: Sequence[Matcher | None], bitmask: Tensor) -> Tensor:
    """Walk the trees on the host, and write the next tokens that each row's grammar allows.

    Masking each row's logits with these bits before sampling is plain constrained decoding, row by
    row, so the emitted text is the same. Forbidden drafts are never accepted, because their
    parent's row cannot sample them; matchers do not visit them or their descendants. Matchers end
    where they began, at the root: then feed them the emitted tokens.

    Args:
        trees: from :func:`to_host`; waited for.
        matchers: one per request, after the text up to its root, root included; None:
            unconstrained.
        bitmask: int32 [N, ceil(V / 32)] on the host, written to: bit j % 32 of word j // 32 is
            token j. Rows that no matcher visits allow all tokens (-1).

    Returns:
        ``bitmask``, to be copied to the device asynchronously.

    Raises:
        EchoError: another number of matchers, or a bitmask of another shape or dtype.
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
    children: dict[int, list[int]] = {}
    for matcher, begin, end in zip(matchers, indptr, indptr[1:], strict=False):
        for row in range(begin + 1, end):
            children.setdefault(begin + parent[row], []).append(row)
        if matcher is not None and begin < end:
            _fill(matcher, begin, tokens, children, bitmask)
    return bitmask


def allows(bitmask: Tensor, tokens: Tensor) -> Tensor:
    """bool [..., k]: whether a bitmask allows the tokens, for ``allowed`` of ``scheduler.grow``.

    The roots' masks are known from the previous step, so forbidden drafts of the first layer are
    found without waiting for the host.

    Args:
        bitmask: int32 [..., ceil(V / 32)], as :func:`fill_bitmask` writes it, one per node.
        tokens: int64 [..., k], the nodes' candidates; tokens past the bitmask are not allowed.

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
    """Fill ``row``, where the matcher stands, and all rows below it."""
    if matcher.is_terminated():
        return
    matcher.fill_next_token_bitmask(bitmask, row)
    for child in children.get(row, ()):
        if matcher.accept_token(tokens[child]):
            _fill(matcher, child, tokens, children, bitmask)
            matcher.rollback(1)
