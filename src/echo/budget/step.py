"""Begin, grow and pack: by a few kernels, or by PyTorch with the same integers.

Kernels serve the shipped rules without request weights. B requests; T nodes of a request's tree; N
rows; W words of a row's mask.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import copy_into
from echo.budget.history import BINS, SKIP, summarize
from echo.budget.rules import GlobalRank, Rule, TwoLevel
from echo.gating.gates import Gate, SparseGate
from echo.kernels.codes import Status
from echo.tree.packed import PackedTree
from echo.tree.packed import pack as flatten
from echo.tree.supertree import DEAD_SCORE, Frontier, Layer, SuperTree, path_score, write_layer

COLUMNS = (
    "tokens", "parent", "depth", "request", "indptr", "mask", "score", "node", "committed",
    "status", "invalid",
)  # fmt: skip
"""Tensors of a packed step, in the order that its kernel takes them."""
DTYPES = {
    "tokens": torch.int64,
    "node": torch.int64,
    "score": torch.float32,
    "committed": torch.bool,
    "status": torch.int8,
}


@dataclass(frozen=True)
class Scratch:
    """Buffers of the selection, at fixed addresses.

    Attributes:
        place: int32 [B, T].
        share: int32 [B].
        counts: int64 [B].
        key: int64 [B, maximum nodes selected of a request].
        cost: int32 [B, T], calibrated costs.
        gain: float32 [B, T], uncalibrated probabilities.
        num_layers: int32 [], number of layers drafted.
    """

    place: Tensor
    share: Tensor
    counts: Tensor
    key: Tensor
    cost: Tensor
    gain: Tensor
    num_layers: Tensor


def begin(
    root_tokens: Tensor,
    live: Tensor | None,
    verify_limits: Tensor | None,
    request_weights: Tensor | None,
    *,
    num_verify_tokens: int,
    max_verify_tokens_per_req: int,
    deep: bool,
    budget: Tensor | None = None,
    out: SuperTree | None = None,
) -> SuperTree:
    """Implement :meth:`echo.ElasticBudgetScheduler.begin`; ``deep``: whether anything is drafted.

    A workspace passes ``budget`` int64 [], verify tokens on the device with ``num_verify_tokens``
    as upper bound, and ``out``, a tree of roots to write to.
    """
    (batch,) = root_tokens.shape
    device = root_tokens.device
    if live is not None:
        checks.tensor("live", live, [batch], torch.bool, device)
    if verify_limits is not None:
        checks.tensor("verify_limits", verify_limits, [batch], torch.int64, device)
    root = root_tokens[:, None]
    bound = num_verify_tokens if budget is None else budget
    most = max_verify_tokens_per_req
    if kernels.use_triton(root_tokens) and request_weights is None:
        from echo.kernels import grow as kernel

        buffers = None
        if out is not None:
            top = out.layers[0]
            nodes = top.token, top.parent, top.score, top.committed, top.drafted
            state = out.status, out.verify_limits, out.num_committed, out.invalid, out.num_remaining
            buffers = kernel.Roots(*nodes, out.frontier.active, *state)
        new = kernel.begin(root_tokens, live, verify_limits, bound, most, deep, buffers)
        if out is not None:
            return _sized(out, num_verify_tokens, most)
        return SuperTree(
            layers=(Layer(0, root, new.parent, new.score, new.committed, new.drafted),),
            frontier=Frontier(root, new.parent, new.parent, new.score, new.active, 0),
            status=new.status,
            verify_limits=new.verify_limits,
            num_committed=new.num_committed,
            num_remaining=new.num_remaining,
            invalid=new.invalid,
            num_verify_tokens=num_verify_tokens,
            max_verify_tokens_per_req=most,
        )
    present = torch.ones(batch, dtype=torch.bool, device=device) if live is None else live
    scarce = num_verify_tokens < batch or budget is not None
    alive = present & (present.cumsum(0) <= bound) if scarce else present
    limits = torch.full((batch,), most, device=device)
    if verify_limits is not None:
        limits = torch.minimum(limits, verify_limits.clamp(min=1))
    weights = request_weights
    if weights is not None:
        checks.tensor("request_weights", weights, [batch], torch.float32, device)
        weights = weights.detach()
        # NaN and infinity weigh least, and leave other requests' weights unchanged
        weights = torch.where(alive & torch.isfinite(weights), weights, 0.0)
        greatest = F.pad(weights, (0, 1)).amax()  # 0 without requests
        weights = (weights / greatest).nan_to_num(0.0).clamp(min=2.0**-24)
    zero = torch.zeros_like(root)
    dead = ~alive
    score = torch.zeros(batch, 1, dtype=torch.float32, device=device)
    score.masked_fill_(dead[:, None], -torch.inf)
    drafts = alive & (limits > 1) if deep else torch.zeros_like(alive)
    done = int(Status.EXHAUSTED if deep else Status.FINISHED)
    status = torch.full((batch,), done, dtype=torch.int8, device=device)
    status.masked_fill_(dead, int(Status.EMPTY)).masked_fill_(drafts, int(Status.ACTIVE))
    if scarce:
        status.masked_fill_(present & dead, int(Status.STARVED))
    tree = SuperTree(
        layers=(Layer(0, root, zero, score, alive[:, None], alive, weights),),
        frontier=Frontier(root, zero, zero, score, drafts[:, None], 0),
        status=status,
        verify_limits=limits * alive,
        num_committed=alive.long(),
        num_remaining=bound - alive.sum(),
        invalid=torch.zeros(batch, dtype=torch.int32, device=device),
        num_verify_tokens=num_verify_tokens,
        max_verify_tokens_per_req=most,
    )
    return tree if out is None else write_layer(out, tree)


def grow(
    rule: Rule,
    gate: Gate | None,
    tree: SuperTree,
    tokens: Tensor,
    log_probs: Tensor,
    allowed: Tensor | None,
    last: bool,
    out: SuperTree | None,
) -> SuperTree:
    """Implement :meth:`ElasticBudgetScheduler.grow` with ``rule`` and ``gate``, arguments checked.

    ``last``: no node of this layer is expanded.
    """
    if allowed is not None:
        before = tree.invalid.clone()
        some = allowed & tree.frontier.active[..., None]
        log_probs = log_probs.masked_fill(~allowed, -torch.inf)
        grown = grow(rule, gate, tree, tokens, log_probs, None, last, out)
        # a layer whose candidates are all forbidden is not a faulty draft
        invalid = torch.where(some.flatten(1).any(dim=1), grown.invalid, before)
        return replace(grown, invalid=copy_into(None if out is None else grown.invalid, invalid))
    if kernels.use_triton(tokens) and _fits(rule, tree):
        return _grow_fused(rule, gate, tree, tokens, log_probs, last, out)
    batch, _, k = tokens.shape
    frontier = tree.frontier
    device = tokens.device
    score, best, faulty = path_score(frontier.score, log_probs, frontier.active)
    layer = Layer(
        tree.depth + 1,
        tokens.flatten(1),
        frontier.index[..., None].expand(-1, -1, k).flatten(1),
        score,
        torch.zeros(batch, score.shape[1], dtype=torch.bool, device=device),
        tree.status == int(Status.ACTIVE),
        tree.request_weights,
    )
    limits = tree.verify_limits - tree.num_committed
    able = layer.drafted & (best > DEAD_SCORE) & (limits > 0)
    verdict = None if gate is None else gate(layer)
    passed = able if verdict is None else able & verdict
    status = tree.status.masked_fill(layer.drafted, int(Status.EXHAUSTED))
    if verdict is not None:
        status.masked_fill_(able, int(Status.TRUNCATED))
    num_committed = tree.num_committed
    num_remaining = tree.num_remaining
    committed = rule.commit(layer, passed, limits, num_remaining)
    drafts = passed
    if committed is not None:
        layer = replace(layer, committed=committed)
        drafts = passed & committed.any(dim=1)
        status.masked_fill_(passed, int(Status.STARVED))
        num_committed = num_committed + committed.sum(dim=1)
        num_remaining = num_remaining - committed.sum()
    index, active = rule.frontier(layer)
    status.masked_fill_(drafts, int(Status.FINISHED if last else Status.ACTIVE))
    grown = replace(
        tree,
        layers=(*tree.layers, layer),
        frontier=Frontier(
            token=layer.token.gather(1, index),
            parent=index // k,
            index=index,
            score=layer.score.gather(1, index),
            active=torch.zeros_like(active) if last else active & drafts[:, None],
            depth=layer.depth,
        ),
        status=status,
        num_committed=num_committed,
        num_remaining=num_remaining,
        invalid=tree.invalid + faulty,
        nodes=None,
    )
    return grown if out is None else write_layer(out, grown)


def _grow_fused(
    rule: Rule,
    gate: Gate | None,
    tree: SuperTree,
    tokens: Tensor,
    log_probs: Tensor,
    last: bool,
    out: SuperTree | None,
) -> SuperTree:
    from echo.kernels import grow as kernel

    above = tree.frontier
    depth = tree.depth + 1
    old = above.score, above.active, above.index, tokens, log_probs, tree.status
    state = tree.verify_limits, tree.num_committed, tree.num_remaining, tree.invalid
    tau = -math.inf
    verdict = None
    commit = rule.beam if isinstance(rule, TwoLevel) else 0
    stop = int(Status.FINISHED if last else Status.ACTIVE)
    if type(gate) is SparseGate:  # fused with scoring; a subclass may do more
        tau = gate.log_tau.get(depth, tau)
    elif gate is not None:
        new = kernel.grow(*old, None, *state, log_tau=tau, beam=rule.beam, commit=commit, stop=stop)
        none = torch.zeros_like(new.committed)
        verdict = gate(Layer(depth, tokens.flatten(1), new.parent, new.score, none, new.drafted))
    buffers = None
    if out is not None:
        top = out.layers[-1]
        front = out.frontier
        buffers = kernel.Grown(
            top.token, top.parent, top.score, top.committed, top.drafted,
            front.token, front.parent, front.index, front.score, front.active,
            out.status, out.num_committed, out.num_remaining, out.invalid,
        )  # fmt: skip
    new = kernel.grow(
        *old, verdict, *state, log_tau=tau, beam=rule.beam, commit=commit, stop=stop, out=buffers
    )
    if out is not None:
        return _sized(out, tree.num_verify_tokens, tree.max_verify_tokens_per_req)
    layer = Layer(depth, new.token, new.parent, new.score, new.committed, new.drafted)
    nodes = new.next_token, new.next_parent, new.next_index, new.next_score, new.next_active
    return replace(
        tree,
        layers=(*tree.layers, layer),
        frontier=Frontier(*nodes, depth),
        status=new.status,
        num_committed=new.num_committed,
        num_remaining=new.num_remaining,
        invalid=new.invalid,
        nodes=None,
    )


def select(rule: Rule, tree: SuperTree, max_verify_tokens_per_req: int) -> Tensor:
    """As :meth:`ElasticBudgetScheduler.select`, by its ``rule`` and limit."""
    if not tree.depth:  # nothing was drafted
        return tree.committed
    limits = tree.verify_limits
    if tree.max_verify_tokens_per_req > max_verify_tokens_per_req:
        limits = limits.clamp(max=max_verify_tokens_per_req)
    bounds = limits - tree.num_committed, tree.num_remaining, tree.num_verify_tokens
    return tree.committed | rule.select(tree, *bounds)


def frontier_probability(rule: Rule, tree: SuperTree) -> Tensor:
    """Expected number of frontier nodes whose whole path is accepted: float32 []."""
    frontier = tree.frontier
    layer = rule.acceptance_probability(tree)[:, -tree.sizes[-1] :]
    return torch.where(frontier.active, layer.gather(1, frontier.index), 0.0).sum()


def gains(rule: Rule, tree: SuperTree, max_verify_tokens_per_req: int) -> Tensor:
    """What :meth:`ElasticBudgetScheduler.trim` reads of a drafted tree.

    Returns:
        float32 [3 + n], n at most the tree's verify tokens: live requests, committed tokens, and
        the sum of their probabilities of acceptance, roots included; then those of the selected
        nodes, in the order of the ranking.
    """
    selected = select(rule, tree, max_verify_tokens_per_req)
    probability = rule.acceptance_probability(tree)
    committed = tree.committed
    gain = torch.where(selected & ~committed, probability, 0.0)
    weights = tree.request_weights
    worth = gain if weights is None else gain * weights[:, None]
    ranking = worth.flatten().topk(min(gain.numel(), tree.num_verify_tokens)).indices
    sure = torch.where(committed, probability, 0.0).sum()
    counts = tree.layers[0].committed.sum(), tree.num_committed.sum(), sure
    return torch.cat([torch.stack([x.float() for x in counts]), gain.flatten()[ranking]])


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
) -> PackedTree:
    """Select, flatten, and summarize what the step is expected to bring if ``summarizes``.

    Args:
        rule, max_verify_tokens_per_req: the scheduler's.
        tree, out: as in :meth:`ElasticBudgetScheduler.pack`, checked.
        num_rows, words: N and W.
        scratch: buffers of the kernels.
    """
    most = max_verify_tokens_per_req
    sizes = num_rows, words, most
    fused = _pack_fused(rule, tree, *sizes, summarizes=summarizes, out=out, scratch=scratch)
    if fused is not None:
        return fused
    selected = select(rule, tree, most)
    packed = flatten(tree, selected, num_rows, words)
    if summarizes:
        found = summarize(tree, rule.acceptance_probability(tree), selected)
        packed = replace(packed, acceptance_histogram=found[0], expected=found[1])
    return copy_into(out, packed)


def _pack_fused(
    rule: Rule,
    tree: SuperTree,
    num_rows: int,
    words: int,
    max_verify_tokens_per_req: int,
    *,
    summarizes: bool,
    out: PackedTree | None,
    scratch: Scratch | None,
) -> PackedTree | None:
    """In three to five launches; None where PyTorch must do it.

    That is: no kernels for the device, a custom rule, or request weights.
    """
    if not (kernels.use_triton(tree.status) and _fits(rule, tree) and tree.batch):
        return None
    from echo.kernels import observe, select
    from echo.kernels import pack as packing

    ranking = rule.ranking if isinstance(rule, TwoLevel) else rule
    if not isinstance(ranking, GlobalRank):
        return None
    score = tree.score
    sizes = tree.sizes
    parent = tree.column("parent")
    cost = score
    table = ranking.cost_table(tree.status.device)
    if table is not None and tree.depth:
        to = None if scratch is None else scratch.cost
        cost = select.path_cost(score, parent, table, sizes, out=to)
    total = extra = max_verify_tokens_per_req
    if ranking.max_verify_tokens_per_req is not None:
        total = min(total, ranking.max_verify_tokens_per_req)
    if isinstance(rule, TwoLevel):
        extra = rule.max_extra_tokens
    committed = tree.committed
    num_committed = tree.num_committed
    if tree.depth:
        kept = None
        if scratch is not None:
            kept = select.Selected(scratch.place, scratch.share, scratch.counts, scratch.key)
        most = min(sum(sizes), tree.num_verify_tokens, tree.max_verify_tokens_per_req)
        limits = tree.verify_limits, num_committed, tree.num_remaining, tree.num_verify_tokens
        selected = select.select(
            cost, committed, *limits, most, sizes, total=total, extra=extra, out=kept
        )
    else:  # nothing to select: a live request keeps its root
        zero = (
            torch.zeros_like(num_committed)[:, None] if scratch is None else scratch.place.zero_()
        )
        selected = select.Selected(zero, num_committed, num_committed, zero)
    columns = None if out is None else {name: getattr(out, name) for name in COLUMNS}
    if columns is not None and not all(column.is_contiguous() for column in columns.values()):
        columns = None
    nodes = tree.column("token"), parent, score, committed, tree.status, tree.invalid
    layers = scratch.num_layers if scratch is not None and tree.depth else None
    made = packing.pack(selected, *nodes, num_rows, words, sizes, layers, out=columns)
    packed = PackedTree(**made, max_depth=tree.depth, num_layers=layers)
    if summarizes:
        gain = cost
        buffers: tuple[Tensor, Tensor] | None = None
        if table is None:
            gain = torch.exp(score, out=None if scratch is None else scratch.gain)
        if not (out is None or out.acceptance_histogram is None or out.expected is None):
            buffers = out.acceptance_histogram, out.expected
        found = observe.summarize(gain, score, selected, sizes, BINS, SKIP, out=buffers)
        packed = replace(packed, acceptance_histogram=found[0], expected=found[1])
    return copy_into(out, packed)


def check(out: PackedTree, batch: int, num_rows: int, words: int, device: torch.device) -> None:
    """Check the buffers of a step of these sizes before writing to any.

    Raises:
        EchoError: naming the buffer that does not fit.
    """
    checks.instance("out", out, PackedTree)
    requests = [batch]
    mask = [num_rows, words]
    shapes = {"indptr": [batch + 1], "mask": mask, "status": requests, "invalid": requests}
    for name in COLUMNS:
        shape = shapes.get(name, [num_rows])
        dtype = DTYPES.get(name, torch.int32)
        checks.tensor(f"out.{name}", getattr(out, name), shape, dtype, device)


def _fits(rule: Rule, tree: SuperTree) -> bool:
    return type(rule) in (GlobalRank, TwoLevel) and tree.request_weights is None


def _sized(out: SuperTree, num_verify_tokens: int, max_verify_tokens_per_req: int) -> SuperTree:
    """Return ``out``, whose tensors were written, with the host's numbers."""
    return replace(
        out,
        num_verify_tokens=num_verify_tokens,
        max_verify_tokens_per_req=max_verify_tokens_per_req,
    )
