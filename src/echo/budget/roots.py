"""The roots of a step: who takes part, and how many rows each may get."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo.kernels.codes import Status
from echo.tree.supertree import Frontier, Layer, SuperTree, write_layer


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
    """As :meth:`echo.ElasticBudgetScheduler.begin`, of ``num_verify_tokens`` rows and at most ``max_verify_tokens_per_req`` a request; ``deep``: anything is drafted.

    A workspace gives ``budget`` int64 [], the step's rows on the device, of which ``num_verify_tokens`` is a bound; and ``out``, a tree of roots to
    whose tensors is written.
    """
    (batch,), device = root_tokens.shape, root_tokens.device
    if live is not None:
        checks.tensor("live", live, [batch], torch.bool, device)
    if verify_limits is not None:
        checks.tensor("verify_limits", verify_limits, [batch], torch.int64, device)
    root = root_tokens[:, None]
    if request_weights is None and kernels.use_triton(root_tokens):
        from echo.kernels import grow

        buffers = None
        if out is not None:
            top = out.layers[0]
            state = out.status, out.verify_limits, out.num_committed, out.invalid, out.num_remaining
            buffers = grow.Roots(
                top.token,
                top.parent,
                top.score,
                top.committed,
                top.drafted,
                out.frontier.active,
                *state,
            )
        new = grow.begin(
            root_tokens,
            live,
            verify_limits,
            num_verify_tokens if budget is None else budget,
            max_verify_tokens_per_req,
            deep,
            buffers,
        )
        if out is not None:
            return replace(
                out,
                num_verify_tokens=num_verify_tokens,
                max_verify_tokens_per_req=max_verify_tokens_per_req,
            )
        return SuperTree(
            layers=(Layer(0, root, new.parent, new.score, new.committed, new.drafted),),
            frontier=Frontier(root, new.parent, new.parent, new.score, new.active, 0),
            status=new.status,
            verify_limits=new.verify_limits,
            num_committed=new.num_committed,
            num_remaining=new.num_remaining,
            invalid=new.invalid,
            num_verify_tokens=num_verify_tokens,
            max_verify_tokens_per_req=max_verify_tokens_per_req,
        )
    present = torch.ones(batch, dtype=torch.bool, device=device) if live is None else live
    scarce = num_verify_tokens < batch or budget is not None
    alive = (
        present & (present.cumsum(0) <= (num_verify_tokens if budget is None else budget))
        if scarce
        else present
    )
    room = torch.full((batch,), max_verify_tokens_per_req, device=device)
    if verify_limits is not None:
        room = torch.minimum(room, verify_limits.clamp(min=1))
    if request_weights is not None:
        request_weights = checks.tensor(
            "request_weights", request_weights, [batch], torch.float32, device
        ).detach()
        request_weights = torch.where(
            alive & torch.isfinite(request_weights), request_weights, 0.0
        )  # what is no number is worth least, to its request alone
        request_weights = (
            (request_weights / request_weights.amax()).nan_to_num(0.0).clamp(min=2.0**-24)
        )
    zero, dead = torch.zeros_like(root), ~alive
    score = torch.zeros(batch, 1, dtype=torch.float32, device=device).masked_fill_(
        dead[:, None], -torch.inf
    )
    drafts = alive & (room > 1) if deep else torch.zeros_like(alive)
    status = torch.full(
        (batch,),
        int(Status.EXHAUSTED if deep else Status.FINISHED),
        dtype=torch.int8,
        device=device,
    )
    status.masked_fill_(dead, int(Status.EMPTY)).masked_fill_(drafts, int(Status.ACTIVE))
    if scarce:
        status.masked_fill_(present & dead, int(Status.STARVED))
    planted = SuperTree(
        layers=(Layer(0, root, zero, score, alive[:, None], alive, request_weights),),
        frontier=Frontier(root, zero, zero, score, drafts[:, None], 0),
        status=status,
        verify_limits=room * alive,
        num_committed=alive.long(),
        num_remaining=(num_verify_tokens if budget is None else budget) - alive.sum(),
        invalid=torch.zeros(batch, dtype=torch.int32, device=device),
        num_verify_tokens=num_verify_tokens,
        max_verify_tokens_per_req=max_verify_tokens_per_req,
    )
    return planted if out is None else write_layer(out, planted)
