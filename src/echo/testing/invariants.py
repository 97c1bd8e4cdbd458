"""What must hold of a plan: masks of nodes that break an invariant, comparisons of plans, syncs.

B requests of T nodes, root first; leading dimensions [...] are for batches of plans.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from echo._checks import EchoError
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.kernels.codes import Status
from echo.testing.scenarios import Plan
from echo.tree.packed import PackedTree
from echo.tree.supertree import SuperTree

SYNCS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select"}
SYNCS |= {"unique", "_unique2", "repeat_interleave"}
"""Operators whose result the host waits for, or whose output shape depends on data."""


def operator(func: Any) -> str:
    """Name of a dispatched operator, without its namespace."""
    return str(func.overloadpacket._qualified_op_name.split("::")[1])


class RefuseSyncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raise EchoError on operators that sync device to host, or make a shape from data.

    Example:
        >>> with RefuseSyncs():
        ...     torch.ones(2).sum().item()
        Traceback (most recent call last):
        echo._checks.EchoError: _local_scalar_dense: expected no device-to-host sync, got one
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        repeats = func._overloadname == "self_int"  # by a host integer, and does not wait
        if operator(func) in SYNCS and not repeats:
            raise EchoError(f"{operator(func)}: expected no device-to-host sync, got one")
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class Selection:
    """What a scheduler selected, with the nodes that it selected from.

    Attributes:
        selected: bool [..., B, T].
        committed: bool [..., B, T], whether committed while drafting.
        parent: int64 [..., B, T]; a root's is its own index.
        score: float32 [..., B, T], path log-probability.
        depth: int64 [T].
        live: bool [..., B].
        verify_limits: int64 [..., B].
        status: int8 [..., B], a :class:`echo.tree.Status`.
        num_verify_tokens: int64 [...].
    """

    selected: Tensor
    committed: Tensor
    parent: Tensor
    score: Tensor
    depth: Tensor
    live: Tensor
    verify_limits: Tensor
    status: Tensor
    num_verify_tokens: Tensor

    @classmethod
    def of(cls, plan: Plan) -> Selection:
        """Return the selection of one ``plan``."""
        tree = plan.tree
        forest = tree.forest
        of_nodes = forest.committed, forest.parent, forest.score, forest.depth
        of_requests = plan.scenario.live, tree.verify_limits, tree.status
        return cls(plan.selected, *of_nodes, *of_requests, torch.tensor(tree.num_verify_tokens))

    @property
    def selectable(self) -> Tensor:
        """bool [..., B, T]: drafted with a finite score, not selected, below a selected parent."""
        free = ~self.selected & (self.depth > 0) & torch.isfinite(self.score)
        return free & self.selected.gather(-1, self.parent)


class Fault(NamedTuple):
    """What was expected and what came; ``node``: (request, node), if it concerns one."""

    expected: str
    got: str
    node: tuple[int, int] | None = None
    cause: Exception | None = None


Check = Callable[[ElasticBudgetScheduler, Plan], Fault | None]


@dataclass(frozen=True)
class Invariant:
    """A check; ``broken`` returns bool [..., B, T], the nodes that are not as ``expected``."""

    expected: str
    broken: Callable[[Selection], Tensor]

    def __call__(self, scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
        """Find the first broken node."""
        broken = self.broken(Selection.of(plan)).nonzero().tolist()
        if not broken:
            return None
        b, node = broken[0]
        forest = plan.tree.forest
        where = f"depth {int(forest.depth[node])} of request {b}"
        chosen = "selected" if plan.selected[b, node] else "not selected"
        own = f"{int(plan.selected[b].sum())} tokens of at most {int(plan.tree.verify_limits[b])}"
        total = f"{int(plan.selected.sum())} of {plan.tree.num_verify_tokens} in all"
        got = f"token {int(forest.token[b, node])} at {where} {chosen}: {own}, {total}"
        return Fault(self.expected, got, (b, node))


def _over_budget(s: Selection) -> Tensor:
    count = s.selected.flatten(-2).cumsum(-1).view(s.selected.shape)
    return s.selected & (count > s.num_verify_tokens[..., None, None])


def _roots(s: Selection) -> Tensor:
    live = s.live[..., None]
    return torch.where(s.depth == 0, s.selected != live, s.selected & ~live)


def _sibling_ties(s: Selection) -> Tensor:
    index = torch.arange(len(s.depth))
    earlier = (index < index[:, None]) & (s.depth > 0)  # [..., v, u]: u equals v, and is before it
    for value in (s.depth, s.parent, s.score):
        earlier = earlier & (value[..., None] == value[..., None, :])
    return s.selected & (earlier & ~s.selected[..., None, :]).any(-1)


def _starved(s: Selection) -> Tensor:
    starved = (s.status == int(Status.STARVED)).any(-1)
    return s.selected & ~s.committed & starved[..., None, None]


def _idle(s: Selection) -> Tensor:
    below = s.selected.sum(-1) < s.verify_limits
    remain = s.selected.sum((-1, -2)) < s.num_verify_tokens
    return s.selectable & below[..., None] & remain[..., None, None]


# fmt: off
INVARIANTS: dict[str, Invariant] = {
    "budget": Invariant("at most num_verify_tokens nodes selected", _over_budget),
    "roots": Invariant("the root of each live request selected, nothing of others", _roots),
    "closed": Invariant("the parent of every selected node selected", lambda s:
                        s.selected & ~s.selected.gather(-1, s.parent)),
    "limits": Invariant("no request above its verify_limits", lambda s:
                        s.selected & (s.selected.cumsum(-1) > s.verify_limits[..., None])),
    "finite": Invariant("no node selected with a NaN or infinite score on its path", lambda s:
                        s.selected & ~torch.isfinite(s.score)),
    "committed": Invariant("every committed node selected", lambda s: s.committed & ~s.selected),
}
"""For every policy."""

CLAIMED: dict[str, Invariant] = {
    "ties": Invariant("of siblings with equal scores the lower candidate first", _sibling_ties),
    "depth_first": Invariant("only committed nodes selected while a request is STARVED", _starved),
    "work_conserving": Invariant("no token of the budget unused while a node could take it", _idle),
}
"""For policies that claim them."""
# fmt: on


def check_plan(tree: SuperTree, packed: PackedTree) -> None:
    """Check the layout of a packed step, and that it is a plan of its tree.

    As :meth:`echo.PackedTree.validate`, then checks every column against the tree.

    Args:
        tree: what was packed.
        packed: the step.

    Raises:
        EchoError: naming the column that contradicts the layout or the tree.

    Example:
        >>> import torch, echo
        >>> from echo.testing import check_plan
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(beam=2), budget=6, max_depth=2)
        >>> tree = scheduler.begin(torch.tensor([3]))
        >>> tree = scheduler.grow(tree, torch.tensor([[[1, 2]]]), torch.tensor([[[-0.1, -2.4]]]))
        >>> check_plan(tree, scheduler.pack(tree))
    """
    packed.validate()
    forest = tree.forest
    count = int(packed.indptr[-1])
    size = packed.indptr.diff()
    nodes = forest.token.shape[1]
    request = packed.request[:count].long()
    node = packed.node[:count]
    own = (node - nodes * request).clamp(0, nodes - 1)
    above = node[packed.indptr[request] + packed.parent[:count].clamp(min=0)]
    columns = forest.token, forest.score, forest.committed, forest.parent
    token, score, committed, parent = (column[request, own] for column in columns)
    agrees = (
        ("num_rows", torch.tensor(count <= tree.num_verify_tokens <= packed.num_rows)),
        ("indptr", (size <= tree.verify_limits) & ((size > 0) == (tree.verify_limits > 0))),
        ("node", node == nodes * request + own),
        ("node", node.diff() > 0),
        ("node", packed.node[count:] == -1),
        ("tokens", packed.tokens[:count] == token),
        ("depth", packed.depth[:count] == forest.depth[own]),
        ("score", (packed.score[:count] == score) & torch.isfinite(score)),
        ("parent", (own == 0) | (above == nodes * request + parent)),
        ("committed", packed.committed[:count] == committed),
        ("committed", forest.committed.sum() == committed.sum()),
    )
    for name, holds in agrees:
        if not holds.all():
            got = getattr(packed, name)
            raise EchoError(f"packed.{name}: expected what the tree says, got {got}")


def _layout(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    selected = plan.selected.flatten().nonzero()[:, 0].tolist()
    packed = plan.packed.node[plan.packed.node >= 0].tolist()
    if sorted(packed) != selected:
        return Fault(f"the selected nodes packed, {selected}", f"nodes {packed}")
    try:
        check_plan(plan.tree, plan.packed)
    except EchoError as error:
        return Fault("a packed step that says what the tree says", str(error))
    return None


def _frontier(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    k = plan.scenario.log_probs.shape[2]
    beam = scheduler.rule.beam
    for layer in plan.tree.layers[1:]:
        width = layer.token.shape[1] // k
        falls = (layer.parent.diff(dim=1) < 0).any()
        if width > beam or bool(falls):
            got = f"{width} at depth {layer.depth - 1}, parents {layer.parent.tolist()}"
            return Fault(f"a frontier of at most {beam} nodes, rising along W", got)
    return None


def _probability(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    p = scheduler.rule.acceptance_probability(plan.tree)
    shape = plan.selected.shape
    if p.dtype == torch.float32 and p.shape == shape and bool(((p >= 0) & (p <= 1)).all()):
        return None
    return Fault(f"rule.acceptance_probability: float32 {list(shape)} in [0, 1]", f"{p}")


def _deterministic(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    again = plan.scenario.plan(scheduler)
    if torch.equal(plan.packed.to_buffer(), again.packed.to_buffer()):
        return None
    expected = "the same plan when asked again"
    fault = _compare(expected, plan, again, range(plan.scenario.batch))
    return fault or Fault(expected, "the same nodes, and another packed step")


def _request_ties(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    """Of two identical requests the lower one gets at least what the other gets."""
    given = plan.scenario
    seen = dict[tuple[float, ...], int]()
    own = given.root_tokens, plan.tree.verify_limits, given.request_weights
    for b in given.live_requests:
        a = seen.setdefault(tuple(float(x[b]) for x in own if x is not None), b)
        before = plan.paths(a)
        for node in plan.nodes(b):
            if plan.path(b, node) not in before:
                got = f"request {a} without a node, its equal {b} with it"
                return Fault("of equal requests the lower one first", got, (b, node))
    return None


def _permutation(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    if plan.scenario.request_weights is not None:
        return None  # only the rule knows which weighted scores tie
    tree = plan.tree
    for value in (tree.forest.score, scheduler.rule.acceptance_probability(tree)):
        drafted = (tree.forest.depth > 0) & torch.isfinite(tree.forest.score)
        each = [set(row[mine].tolist()) for row, mine in zip(value, drafted, strict=True)]
        if sum(map(len, each)) != len(set().union(*each)):
            return None  # requests tie
    expected = "the same plan for the requests in reversed order"
    turn = range(plan.scenario.batch)[::-1]
    return _compare(expected, plan, plan.scenario.take(turn).plan(scheduler), turn)


def _padding(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    live = plan.scenario.live_requests
    if not live or len(live) == plan.scenario.batch:
        return None
    expected = "the same plan without the empty lanes"
    return _compare(expected, plan, plan.scenario.take(live).plan(scheduler), live)


def _batch_invariant(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    expected = "the plan that the request gets alone"
    for b in plan.scenario.live_requests if plan.scenario.request_weights is None else ():
        alone = plan.scenario.take([b]).plan(scheduler)
        if fault := _compare(expected, plan, alone, [b]):
            return fault
    return None


def _sync_free(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    try:
        with RefuseSyncs():  # type: ignore[no-untyped-call]
            scheduler.select(plan.scenario.grow(scheduler))
    except EchoError as error:
        return Fault("no device-to-host sync from begin to select", str(error))
    return None


def _optimal(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    """No exchange of a leaf for another node gains: with parents closed, that is the optimum."""
    tree = plan.tree
    s = Selection.of(plan)
    gain = scheduler.rule.acceptance_probability(tree)
    if tree.request_weights is not None:
        gain = gain * tree.request_weights[:, None]
    leaf = s.selected & (s.depth > 0)
    leaf = leaf & ~torch.zeros_like(leaf).scatter_(1, torch.where(leaf, s.parent, 0), leaf)
    below = s.selected.sum(1) < s.verify_limits
    index = torch.arange(tree.batch)[:, None]
    for b, node in s.selectable.nonzero().tolist():
        given_up = leaf.clone() if below[b] else leaf & (index == b)
        given_up[b, s.parent[b, node]] = False
        worth = torch.where(given_up, gain, torch.inf)
        if worth.min() < gain[b, node] * (1 - 1e-5) - 2.0**-22:
            better = f"token {int(tree.forest.token[b, node])} of request {b}"
            got = f"{float(worth.min()):.6f} selected; {better}, {float(gain[b, node]):.6f}, not"
            where = divmod(int(worth.argmin()), s.selected.shape[1])
            return Fault("the nodes of greatest weight times acceptance_probability", got, where)
    return None


ALWAYS: dict[str, Check] = {
    "frontier": _frontier,
    "acceptance_probability": _probability,
    "layout": _layout,
    "deterministic": _deterministic,
}
RELATIONS: dict[str, Check] = {
    "ties": _request_ties,
    "permutation": _permutation,
    "padding": _padding,
    "sync_free": _sync_free,
    "optimal": _optimal,
    "batch_invariant": _batch_invariant,
}


def _compare(expected: str, plan: Plan, other: Plan, requests: Sequence[int]) -> Fault | None:
    """Return a fault unless request i of ``other`` has the nodes of ``requests[i]``."""
    for i, b in enumerate(requests):
        mine = plan.paths(b)
        theirs = other.paths(i)
        if mine != theirs:
            here, there = (
                ", ".join("-".join(map(str, path)) or "root" for path in sorted(paths))
                for paths in (mine, theirs)
            )
            extra = ((b, node) for node in plan.nodes(b) if plan.path(b, node) not in theirs)
            return Fault(expected, f"for request {b} here {here}; there {there}", next(extra, None))
    return None
