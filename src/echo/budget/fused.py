"""Growing a layer by the shipped rules as two kernels around the gate: the integers of :meth:`ElasticBudgetScheduler.grow`."""

from __future__ import annotations

from torch import Tensor

from echo import kernels
from echo.budget.rules import GlobalRank, Rule, TwoLevel
from echo.gating.gates import Gate
from echo.tree.supertree import Frontier, Layer, Status, SuperTree


def grow(rule: Rule, gate: Gate | None, tree: SuperTree, tokens: Tensor, log_probs: Tensor, last: bool) -> SuperTree | None:
    """The grown tree; or None where torch's operations are needed: no kernels here, a rule of one's own, weights, floors.

    Args:
        rule, gate: the scheduler's.
        tree, tokens, log_probs: as in :meth:`ElasticBudgetScheduler.grow`, checked.
        last: nothing is drafted on this layer.
    """
    step = kernels.fused("growing", tokens)
    if step is None or type(rule) not in (GlobalRank, TwoLevel) or tree.weight is not None or tree.reserve is not None:
        return None
    above, depth = tree.frontier, tree.depth + 1
    old = above.score, above.active, above.index, log_probs, tree.status, tree.invalid
    score, parent, bought, drafted, invalid, *found = step.score(*old)
    layer = Layer(depth, tokens.flatten(1), parent, score, bought, drafted)
    on = step.advance(
        score, tokens, *found, tree.status, None if gate is None else gate(layer), tree.row_limit, tree.held, tree.left,
        width=rule.width, buys=rule.width if isinstance(rule, TwoLevel) else 0, stop=int(Status.FINISHED if last else Status.ACTIVE),
    )  # fmt: skip
    if on.bought is not None:
        layer = Layer(depth, layer.token, parent, score, on.bought, layer.drafted)
    return SuperTree(
        layers=(*tree.layers, layer),
        frontier=Frontier(on.token, on.parent, on.place, on.score, on.active, depth),
        status=on.status,
        row_limit=tree.row_limit,
        held=on.held,
        left=on.left,
        invalid=invalid,
        rows=tree.rows,
        most=tree.most,
    )
