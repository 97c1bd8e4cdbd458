"""A step by the shipped rules as a few kernels: the integers of :class:`~echo.ElasticBudgetScheduler`'s operations.

Each function returns None where torch's operations are needed: no kernels here, a custom rule, weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo.budget.history import BINS, SKIP
from echo.budget.rules import GlobalRank, Rule, TwoLevel
from echo.gating.gates import Gate, SparseGate
from echo.kernels.codes import Status
from echo.tree.packed import PackedTree, copy_into
from echo.tree.supertree import Frontier, Layer, SuperTree

WRITTEN = ("tokens", "parent", "depth", "request", "indptr", "mask", "score", "node", "committed")


@dataclass(frozen=True)
class Scratch:
    """What the selection of a step computes on its way, at fixed addresses.

    Attributes:
        place: int32 [B, T].
        share: int32 [B].
        counts: int64 [B].
        key: int64 [B, most].
        cost: int32 [B, T], calibrated costs.
        gain: float32 [B, T], probabilities that are not calibrated.
    """

    place: Tensor
    share: Tensor
    counts: Tensor
    key: Tensor
    cost: Tensor
    gain: Tensor


def _fits(rule: Rule, tree: SuperTree) -> bool:
    return type(rule) in (GlobalRank, TwoLevel) and tree.request_weights is None


def grow(
    rule: Rule,
    gate: Gate | None,
    tree: SuperTree,
    tokens: Tensor,
    log_probs: Tensor,
    last: bool,
    out: SuperTree | None,
) -> SuperTree | None:
    """The grown tree.

    Args:
        rule, gate: the scheduler's.
        tree, tokens, log_probs, out: as in :meth:`ElasticBudgetScheduler.grow`, checked.
        last: nothing is drafted on this layer.
    """
    if not (kernels.use_triton(tokens) and _fits(rule, tree)):
        return None
    from echo.kernels import grow as step

    above, depth = tree.frontier, tree.depth + 1
    old = above.score, above.active, above.index, tokens, log_probs, tree.status
    state = tree.verify_limits, tree.num_committed, tree.num_remaining, tree.invalid
    tau, verdict = -math.inf, None
    if (
        type(gate) is SparseGate
    ):  # a threshold is compared where the scores are made; a subclass may ask something else
        tau = gate.log_tau.get(depth, tau)
    options: dict[str, Any] = {
        "beam": rule.beam,
        "commit": rule.beam if isinstance(rule, TwoLevel) else 0,
        "stop": int(Status.FINISHED if last else Status.ACTIVE),
    }
    if gate is not None and type(gate) is not SparseGate:
        seen = step.grow(*old, None, *state, log_tau=tau, **options)
        layer = Layer(
            depth,
            tokens.flatten(1),
            seen.parent,
            seen.score,
            torch.zeros_like(seen.committed),
            seen.drafted,
        )
        verdict = gate(layer)
    buffers = None
    if out is not None:
        mine, on = out.layers[-1], out.frontier
        buffers = step.Grown(
            mine.token, mine.parent, mine.score, mine.committed, mine.drafted,
            on.token, on.parent, on.index, on.score, on.active, out.status, out.num_committed, out.num_remaining, out.invalid,
        )  # fmt: skip
    new = step.grow(*old, verdict, *state, log_tau=tau, **options, out=buffers)
    if out is not None:
        return replace(
            out,
            num_verify_tokens=tree.num_verify_tokens,
            max_verify_tokens_per_req=tree.max_verify_tokens_per_req,
        )
    return SuperTree(
        layers=(
            *tree.layers,
            Layer(depth, new.token, new.parent, new.score, new.committed, new.drafted),
        ),
        frontier=Frontier(
            new.next_token, new.next_parent, new.next_index, new.next_score, new.next_active, depth
        ),
        status=new.status,
        verify_limits=tree.verify_limits,
        num_committed=new.num_committed,
        num_remaining=new.num_remaining,
        invalid=new.invalid,
        num_verify_tokens=tree.num_verify_tokens,
        max_verify_tokens_per_req=tree.max_verify_tokens_per_req,
    )


def pack(
    rule: Rule,
    tree: SuperTree,
    num_rows: int,
    words: int,
    max_verify_tokens_per_req: int,
    *,
    summarizes: bool,
    out: PackedTree | None,
    scratch: Scratch | None = None,
) -> PackedTree | None:
    """Selection, Flatten & Pack, and what the step is expected to bring where it ``summarizes``, in three to five launches.

    Args:
        rule, max_verify_tokens_per_req: the scheduler's.
        tree, num_rows, out: as in :meth:`ElasticBudgetScheduler.pack`, checked.
        words: mask words of a row.
        scratch: buffers.
    """
    if not (kernels.use_triton(tree.status) and _fits(rule, tree) and tree.batch):
        return None
    from echo.kernels import observe, select
    from echo.kernels import pack as packing

    rank = rule.ranking if isinstance(rule, TwoLevel) else rule
    if not isinstance(rank, GlobalRank):
        return None
    score, bought, sizes, most = (
        tree.score,
        tree.committed,
        tree.sizes,
        min(sum(tree.sizes), tree.num_verify_tokens, tree.max_verify_tokens_per_req),
    )
    cost, table = score, rank.cost_table(tree.status.device)
    if table is not None and tree.depth:
        cost = select.path_cost(
            score,
            tree.column("parent"),
            table,
            sizes,
            out=None if scratch is None else scratch.cost,
        )
    total = (
        max_verify_tokens_per_req
        if rank.max_verify_tokens_per_req is None
        else min(max_verify_tokens_per_req, rank.max_verify_tokens_per_req)
    )
    extra = rule.max_extra_tokens if isinstance(rule, TwoLevel) else max_verify_tokens_per_req
    kept = (
        None
        if scratch is None
        else select.Selected(scratch.place, scratch.share, scratch.counts, scratch.key)
    )
    if tree.depth:
        limits = tree.verify_limits, tree.num_committed, tree.num_remaining
        selected = select.select(
            cost,
            bought,
            *limits,
            tree.num_verify_tokens,
            most,
            sizes,
            total=total,
            extra=extra,
            out=kept,
        )
    else:  # nothing to select: a live request holds its root
        roots = (
            torch.zeros_like(tree.num_committed)[:, None]
            if scratch is None
            else scratch.place.zero_()
        )
        selected = select.Selected(roots, tree.num_committed, tree.num_committed, roots)
    columns = None if out is None else {name: getattr(out, name) for name in WRITTEN}
    if columns is not None and not all(column.is_contiguous() for column in columns.values()):
        columns = None
    made = packing.pack(
        selected,
        tree.column("token"),
        tree.column("parent"),
        score,
        bought,
        num_rows,
        words,
        sizes,
        out=columns,
    )
    outlook, expected = None, None
    if summarizes:
        gain = (
            cost
            if table is not None
            else torch.exp(score, out=None if scratch is None else scratch.gain)
        )
        buffers = None
        if not (out is None or out.acceptance_histogram is None or out.expected is None):
            buffers = out.acceptance_histogram, out.expected
        outlook, expected = observe.summarize(gain, score, selected, sizes, BINS, SKIP, out=buffers)
    packed = PackedTree(
        **made, status=tree.status, invalid=tree.invalid, max_depth=tree.depth, acceptance_histogram=outlook, expected=expected,
    )  # fmt: skip
    return copy_into(out, packed)


def check(out: PackedTree, batch: int, num_rows: int, words: int, device: torch.device) -> None:
    """Checks buffers before anything is written to them: the columns of a step of these sizes.

    Raises:
        EchoError: naming the buffer that does not fit.
    """
    checks.instance("out", out, PackedTree)
    shapes = {
        "indptr": [batch + 1],
        "mask": [num_rows, words],
        "status": [batch],
        "invalid": [batch],
    }
    kinds = {
        "tokens": torch.int64,
        "node": torch.int64,
        "score": torch.float32,
        "committed": torch.bool,
        "status": torch.int8,
    }
    for name in (*WRITTEN, "status", "invalid"):
        checks.tensor(
            f"out.{name}",
            getattr(out, name),
            shapes.get(name, [num_rows]),
            kinds.get(name, torch.int32),
            device,
        )
