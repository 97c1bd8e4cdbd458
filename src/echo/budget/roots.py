"""The roots of a step: who takes part, and how many rows each may get."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from echo import checks, kernels
from echo.kernels.launch import Status
from echo.tree.supertree import Frontier, Layer, SuperTree, written


def plant(
    root_tokens: Tensor,
    live: Tensor | None,
    capacity: Tensor | None,
    weights: Tensor | None,
    *,
    rows: int,
    most: int,
    deep: bool,
    budget: Tensor | None = None,
    out: SuperTree | None = None,
) -> SuperTree:
    """As :meth:`echo.ElasticBudgetScheduler.plant`, of ``rows`` rows and at most ``most`` a request; ``deep``: anything is drafted.

    A workspace gives ``budget`` int64 [], the step's rows on the device, of which ``rows`` is a bound; and ``out``, a tree of roots to
    whose tensors is written.
    """
    (batch,), device = root_tokens.shape, root_tokens.device
    if live is not None:
        checks.tensor("live", live, [batch], torch.bool, device)
    if capacity is not None:
        checks.tensor("capacity", capacity, [batch], torch.int64, device)
    fused, root = kernels.fused("growing", root_tokens), root_tokens[:, None]
    if fused is not None and weights is None:
        buffers = None
        if out is not None:
            top = out.layers[0]
            state = out.status, out.row_limit, out.held, out.invalid, out.left
            buffers = fused.Roots(top.token, top.parent, top.score, top.bought, top.drafted, out.frontier.active, *state)
        new = fused.plant(root_tokens, live, capacity, rows if budget is None else budget, most, deep, buffers)
        if out is not None:
            return replace(out, rows=rows, most=most)
        return SuperTree(
            layers=(Layer(0, root, new.parent, new.score, new.bought, new.alive),),
            frontier=Frontier(root, new.parent, new.parent, new.score, new.drafts, 0),
            status=new.status,
            row_limit=new.limit,
            held=new.held,
            left=new.left,
            invalid=new.invalid,
            rows=rows,
            most=most,
        )
    present = torch.ones(batch, dtype=torch.bool, device=device) if live is None else live
    scarce = rows < batch or budget is not None
    alive = present & (present.cumsum(0) <= (rows if budget is None else budget)) if scarce else present
    room = torch.full((batch,), most, device=device)
    if capacity is not None:
        room = torch.minimum(room, capacity.clamp(min=1))
    if weights is not None:
        weights = checks.tensor("weights", weights, [batch], torch.float32, device).detach()
        weights = torch.where(alive & torch.isfinite(weights), weights, 0.0)  # what is no number is worth least, to its request alone
        weights = (weights / weights.amax()).nan_to_num(0.0).clamp(min=2.0**-24)
    zero, dead = torch.zeros_like(root), ~alive
    score = torch.zeros(batch, 1, dtype=torch.float32, device=device).masked_fill_(dead[:, None], -torch.inf)
    drafts = alive & (room > 1) if deep else torch.zeros_like(alive)
    status = torch.full((batch,), int(Status.EXHAUSTED if deep else Status.FINISHED), dtype=torch.int8, device=device)
    status.masked_fill_(dead, int(Status.EMPTY)).masked_fill_(drafts, int(Status.ACTIVE))
    if scarce:
        status.masked_fill_(present & dead, int(Status.STARVED))
    planted = SuperTree(
        layers=(Layer(0, root, zero, score, alive[:, None], alive, weights),),
        frontier=Frontier(root, zero, zero, score, drafts[:, None], 0),
        status=status,
        row_limit=room * alive,
        held=alive.long(),
        left=(rows if budget is None else budget) - alive.sum(),
        invalid=torch.zeros(batch, dtype=torch.int32, device=device),
        rows=rows,
        most=most,
    )
    return planted if out is None else written(out, planted)
