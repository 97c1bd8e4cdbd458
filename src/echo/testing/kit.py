"""One call that tries a policy on thousands of steps, and shows the smallest one that it plans wrongly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from textwrap import shorten
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.kernels.codes import Status
from echo.testing import scenarios, selection, strategies
from echo.testing.scenarios import Plan, Scenario
from echo.testing.selection import Selection
from echo.tree.packed import PackedTree
from echo.tree.supertree import SuperTree

READS = (
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "item",
    "unique",
    "_unique2",
    "equal",
    "repeat_interleave",
    "is_nonzero",
)
"""Operators whose result the host waits for, or whose shape depends on data."""

DEFAULT = ("ties", "order", "slots", "reads")


class PlanError(AssertionError):
    """A plan that breaks an invariant; the message is the report.

    Attributes:
        invariant: its name.
        scenario: the step, to try again with ``scenario.plan(scheduler)``.
    """

    def __init__(self, invariant: str, report: str, scenario: Scenario) -> None:
        super().__init__(report)
        self.invariant: str = invariant
        self.scenario: Scenario = scenario


@dataclass(frozen=True)
class Fault:
    """What was expected and what came; and where, if at one node: request and place among its T nodes."""

    expected: str
    got: str
    where: tuple[int, int] | None = None


def syncs(func: Any) -> bool:
    """Whether an operator is one of READS. Repetition by a number of the host, seen whole in inference mode, is none."""
    return (
        func.overloadpacket._qualified_op_name.split("::")[1] in READS
        and func._overloadname != "self_int"
    )


class RefuseSyncs(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises on every operator that reads back from the device or makes a shape from data."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket._qualified_op_name.split("::")[1]
        if syncs(func):
            raise EchoError(f"{name} reads back from the device, or makes a shape from its data")
        return func(*args, **(kwargs or {}))


def check_scheduler(
    scheduler: ElasticBudgetScheduler,
    *,
    claims: Sequence[str] = DEFAULT,
    examples: int = 200,
    max_batch: int = 5,
) -> None:
    """Plans many steps, drawn by hypothesis and made by hand, and checks every invariant. The same steps in every call.

    Of every policy: the bare decision holds at most the step's ``rows``, each live request's ``root``, nothing whose parent is missing
    (``closed``), no more of a request than its ``limit``, nothing but ``finite`` scores, and all that was bought (``kept``); the same
    step is planned the same again (``repeat``), and packed as the layout says (``layout``); the rule's ``frontier`` and ``gain`` are what
    :class:`echo.budget.Rule` says.

    Of a policy that claims it:

    - ``ties``: among equal siblings the lower candidate comes first, among equal requests the lower one.
    - ``order``: where no two requests tie and none has a weight, permuting requests permutes the plan.
    - ``slots``: empty slots, wherever they are, change no plan.
    - ``reads``: nothing is read back from the device, and no shape depends on data.
    - ``depth_first``: nothing is dealt for width while a request that passed its gate found no rows.
    - ``full``: rows are left over only if no request may have one more.
    - ``best``: no other choice of as many rows has a greater sum of weight times ``rule.gain``.
    - ``alone``: each request gets the rows that it would get by itself.

    Args:
        scheduler: the policy.
        claims: what to check beyond the first paragraph; by default the first four.
        examples: steps drawn, as many of one slot at most as of two, and so on.
        max_batch: most slots of a drawn step.

    Raises:
        PlanError: with a table of the smallest plan found that breaks an invariant.
        EchoError: an unknown claim, or hypothesis is not installed.

    Example:
        >>> import echo
        >>> from echo.testing import check_scheduler
        >>> check_scheduler(echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=16, max_depth=2), examples=20)
    """
    for claim in claims:
        if claim not in (*selection.CLAIMS, *RELATIONS):
            raise EchoError(
                f"claims: expected some of {(*selection.CLAIMS, *RELATIONS)}, got {claim!r}"
            )
    examples = checks.integer("examples", examples, 1)
    broken = _search(scheduler, claims, max(1, examples // max_batch), max_batch)
    if broken is not None:
        check_step(
            scheduler, broken.scenario, claims=claims
        )  # once more, without hypothesis' notes
        raise broken  # of a policy that decides otherwise now


def _search(
    scheduler: ElasticBudgetScheduler, claims: Sequence[str], examples: int, max_batch: int
) -> PlanError | None:
    """The smallest broken plan that hypothesis finds, of the fewest slots that one is found with, or one made by hand."""
    package, found = strategies.hypothesis(), list[PlanError]()

    def check(scenario: Scenario, claims: Sequence[str]) -> None:
        try:
            check_step(scheduler, scenario, claims=claims)
        except PlanError as broken:
            if (
                not found or broken.invariant == found[0].invariant
            ):  # what is shrunk stays broken in the same way
                found.append(broken)
                raise

    options = package.settings(
        max_examples=examples,
        phases=(package.Phase.generate, package.Phase.shrink),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(package.HealthCheck),
        verbosity=package.Verbosity.quiet,
        report_multiple_bugs=False,
    )
    drawn = [
        claim for claim in claims if claim != "reads"
    ]  # does not depend on the values: the scenarios will do
    try:
        for batch in range(1, max_batch + 1):
            steps = strategies.batches(
                max_batch=batch,
                max_depth=min(scheduler.max_depth, 8),
                rows=scheduler.budget is not None,
            )
            options(package.given(steps)(lambda scenario: check(scenario, drawn)))()
        for make in (
            scenarios.all_equal,
            scenarios.burst,
            scenarios.one_confident_many_doubtful,
            scenarios.nan_storm,
        ):
            for batch, depth in ((1, 1), (4, 3)):
                made = make(batch, min(scheduler.max_depth, depth))
                check(
                    replace(made, num_verify_tokens=None) if scheduler.budget is None else made,
                    claims,
                )
    except Exception:  # of hypothesis too, where a plan that was broken is not any more
        if not found:
            raise
    return found[-1] if found else None


def check_step(
    scheduler: ElasticBudgetScheduler, scenario: Scenario, *, claims: Sequence[str] = DEFAULT
) -> None:
    """Plans one step and checks every invariant: :func:`check_scheduler` on a step of one's own.

    Args:
        scheduler: the policy.
        scenario: the step.
        claims: as in :func:`check_scheduler`.

    Raises:
        PlanError: with a table of the plan.
    """
    plan = _plan(scheduler, scenario)
    taken = Selection.of(plan.tree, plan.selected, scenario.live)
    invariants = selection.INVARIANTS | {
        name: check for name, check in selection.CLAIMS.items() if name in claims
    }
    for name, check in invariants.items():
        broken = check(taken)
        if broken.any():
            request, node = (int(i) for i in broken.nonzero()[0])
            _raise(
                name,
                scheduler,
                plan,
                Fault(_says(check), _got(name, plan, request, node), (request, node)),
            )
    relations = ALWAYS | {name: check for name, check in RELATIONS.items() if name in claims}
    for name, relation in relations.items():
        fault = relation(scheduler, plan)
        if fault is not None:
            _raise(name, scheduler, plan, fault)


def check_plan(tree: SuperTree, packed: PackedTree) -> None:
    """Checks the layout of a packed step (:meth:`PackedTree.validate`), and that it is a plan of this tree.

    Args:
        tree: what was packed.
        packed: what it was packed to.

    Raises:
        EchoError: naming the column that is not as the layout or the tree says.

    Example:
        >>> import torch, echo
        >>> from echo.testing import check_plan
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(beam=2), budget=6, max_depth=2)
        >>> tree = scheduler.begin(torch.tensor([3]))
        >>> tree = scheduler.grow(tree, torch.tensor([[[1, 2]]]), torch.tensor([[[-0.1, -2.4]]]))
        >>> check_plan(tree, scheduler.pack(tree))
    """
    packed.validate()
    forest, count, size = tree.forest, int(packed.indptr[-1]), packed.indptr.diff()
    nodes, request, node = forest.token.shape[1], packed.request[:count].long(), packed.node[:count]
    own = (node - nodes * request).clamp(0, nodes - 1)
    at, above = (
        nodes * request + own,
        node[packed.indptr[request] + packed.parent[:count].clamp(min=0)],
    )
    score, bought = forest.score.flatten()[at], forest.committed.flatten()[at]
    agrees = (
        ("rows", torch.tensor(count <= tree.num_verify_tokens <= packed.num_rows)),
        ("indptr", (size <= tree.verify_limits) & ((size > 0) == (tree.verify_limits > 0))),
        ("node", node == at),
        ("node", node.diff() > 0),
        ("node", packed.node[count:] == -1),
        ("tokens", packed.tokens[:count] == forest.token.flatten()[at]),
        ("depth", packed.depth[:count] == forest.depth[own]),
        ("score", (packed.score[:count] == score) & torch.isfinite(score)),
        ("parent", (own == 0) | (above == nodes * request + forest.parent.flatten()[at])),
        ("committed", packed.committed[:count] == bought),
        ("committed", forest.committed.sum() == bought.sum()),
    )
    for name, holds in agrees:
        if not holds.all():
            raise EchoError(
                f"packed.{name}: expected what the tree says, got {getattr(packed, name)}"
            )


def _plan(scheduler: ElasticBudgetScheduler, scenario: Scenario) -> Plan:
    """The plan; what the policy raises is a broken plan too."""
    tree = None
    try:
        tree = scenario.grow(scheduler)
        return Plan(scenario, tree, scheduler.select(tree), scheduler.pack(tree))
    except Exception as error:
        doing = "drafting" if tree is None else "dealing"
        lines = [
            f"runs: expected a plan, got {type(error).__name__} while {doing}: {error}",
            *_step(scheduler, scenario),
        ]
        raise PlanError("runs", "\n".join(lines), scenario) from error


def _layout(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    selected = plan.selected.flatten().nonzero()[:, 0].tolist()
    if sorted(plan.packed.node[plan.packed.node >= 0].tolist()) != selected:
        return Fault(
            "the rows that select said", f"nodes {plan.packed.node.tolist()}, selected {selected}"
        )
    try:
        check_plan(plan.tree, plan.packed)
    except EchoError as error:
        return Fault("a packed step that says what the tree says", str(error))
    return None


def _frontier(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    k = plan.scenario.log_probs.shape[2]
    for layer in plan.tree.layers[1:]:
        if layer.token.shape[1] > scheduler.rule.beam * k or bool(
            (layer.parent.diff(dim=1) < 0).any()
        ):
            got = f"{layer.token.shape[1] // k} at depth {layer.depth - 1}, parents {layer.parent.tolist()}"
            return Fault(f"a frontier of at most {scheduler.rule.beam} nodes, rising along W", got)
    return None


def _gain(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    gain = scheduler.rule.acceptance_probability(plan.tree)
    fits = (
        gain.dtype == torch.float32
        and gain.shape == plan.selected.shape
        and bool(((gain >= 0) & (gain <= 1)).all())
    )
    return (
        None
        if fits
        else Fault(f"probabilities float32 {list(plan.selected.shape)} from rule.gain", f"{gain}")
    )


def _repeat(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    again = _plan(scheduler, plan.scenario)
    if torch.equal(plan.packed.to_buffer(), again.packed.to_buffer()):
        return None
    expected = "the same plan when asked again"
    return _same(expected, plan, again, range(plan.scenario.batch)) or Fault(
        expected, "the same rows, and another packed step"
    )


def _equals(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    """Two requests that are the same: the lower one gets what the other gets, and perhaps more."""
    given = plan.scenario
    seen: dict[tuple[float, ...], int] = {}
    own = [
        x
        for x in (given.root_tokens, plan.tree.verify_limits, given.request_weights)
        if x is not None
    ]
    for b in (i for i in range(given.batch) if given.live[i]):
        a = seen.setdefault(tuple(float(x[b]) for x in own), b)
        before = plan.paths(a)
        for node in plan.rows(b) if b != a else ():
            if plan.path(b, node) not in before:
                return Fault(
                    "a row before a later request that is its equal",
                    f"request {a} without one, request {b} with it",
                    (b, node),
                )
    return None


def _slots(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    live = [b for b in range(plan.scenario.batch) if plan.scenario.live[b]]
    if not live or len(live) == plan.scenario.batch:
        return None
    return _same(
        "the same plan without the empty slots",
        plan,
        _plan(scheduler, plan.scenario.take(live)),
        live,
    )


def _order(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    tree, given = plan.tree, plan.scenario
    if given.request_weights is not None:
        return None  # what is equal in the end the kit cannot know
    for value in (tree.forest.score, scheduler.rule.acceptance_probability(tree)):
        drafted = torch.where(
            (tree.forest.depth > 0) & torch.isfinite(tree.forest.score), value, torch.nan
        )
        each = [set(row[~row.isnan()].tolist()) for row in drafted]
        if sum(map(len, each)) != len(set().union(*each)):
            return None  # requests tie
    turn = list(reversed(range(plan.scenario.batch)))
    return _same(
        "the same plan for the requests in reversed order",
        plan,
        _plan(scheduler, plan.scenario.take(turn)),
        turn,
    )


def _alone(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    if plan.scenario.request_weights is not None:
        return None
    for b in (i for i in range(plan.scenario.batch) if plan.scenario.live[i]):
        fault = _same(
            "the plan that the request gets by itself",
            plan,
            _plan(scheduler, plan.scenario.take([b])),
            [b],
        )
        if fault is not None:
            return fault
    return None


def _reads(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    try:
        with RefuseSyncs():  # type: ignore[no-untyped-call]
            scheduler.select(plan.scenario.grow(scheduler))
    except EchoError as error:
        return Fault("no read-back from plant to pack", str(error))
    return None


def _best(scheduler: ElasticBudgetScheduler, plan: Plan) -> Fault | None:
    """No node could be exchanged for one of greater gain: within limits and closed under parents that is the optimum."""
    tree, selected = plan.tree, plan.selected
    forest, gain = tree.forest, scheduler.rule.acceptance_probability(tree)
    gain = gain if tree.request_weights is None else gain * tree.request_weights[:, None]
    drafted = forest.depth > 0
    room = selected.sum(1) < tree.verify_limits
    above = torch.where(drafted & selected, forest.parent, 0)
    leaf = selected & drafted & ~torch.zeros_like(selected).scatter_(1, above, selected & drafted)
    for b, node in (
        (~selected & drafted & torch.isfinite(forest.score) & selected.gather(1, forest.parent))
        .nonzero()
        .tolist()
    ):
        given_up = leaf.clone() if room[b] else leaf & (torch.arange(tree.batch) == b)[:, None]
        given_up[b, forest.parent[b, node]] = False
        worth = torch.where(given_up, gain, torch.inf)
        if worth.min() < gain[b, node] * (1 - 1e-5) - 2.0**-22:
            other, leaving = divmod(int(worth.argmin()), selected.shape[1])
            better = f"token {int(forest.token[b, node])} of request {b} with {float(gain[b, node]):.6f} left out"
            return Fault(
                "the rows of greatest gain",
                f"one with {float(worth.min()):.6f}, and {better}",
                (other, leaving),
            )
    return None


Relation = Callable[[ElasticBudgetScheduler, Plan], Fault | None]
ALWAYS: dict[str, Relation] = {
    "frontier": _frontier,
    "gain": _gain,
    "layout": _layout,
    "repeat": _repeat,
}
RELATIONS: dict[str, Relation] = {
    "ties": _equals,
    "order": _order,
    "slots": _slots,
    "reads": _reads,
    "best": _best,
    "alone": _alone,
}


def _same(expected: str, plan: Plan, other: Plan, requests: Sequence[int]) -> Fault | None:
    """A fault unless request i of ``other`` has the rows of ``requests[i]``."""
    for i, b in enumerate(requests):
        mine, theirs = plan.paths(b), other.paths(i)
        if mine != theirs:
            extra = next((node for node in plan.rows(b) if plan.path(b, node) not in theirs), None)
            here, there = (
                ", ".join("-".join(map(str, path)) or "root" for path in sorted(paths))
                for paths in (mine, theirs)
            )
            return Fault(
                expected,
                f"for request {b} here {here}; there {there}",
                None if extra is None else (b, extra),
            )
    return None


def _says(check: Callable[..., Tensor]) -> str:
    return (check.__doc__ or "").split(": ", 1)[1].rstrip(".")


def _got(name: str, plan: Plan, request: int, node: int) -> str:
    """The offending node in words."""
    tree = plan.tree
    token, depth = int(tree.forest.token[request, node]), int(tree.forest.depth[node])
    where = f"token {token} at depth {depth} of request {request}"
    count = int(plan.selected[request].sum())
    return {
        "rows": f"{int(plan.selected.sum())} nodes for {tree.num_verify_tokens} rows",
        "root": f"{where} {'selected' if plan.selected[request, node] else 'missing'}",
        "closed": f"{where} without its parent, token {int(tree.forest.token[request, tree.forest.parent[request, node]])}",
        "limit": f"{count} rows of request {request}, whose limit is {int(tree.verify_limits[request])}",
        "finite": f"{where} selected with a score of {float(tree.forest.score[request, node])}",
        "kept": f"{where} bought and not selected",
        "ties": f"{where} selected, an equal sibling before it not",
        "depth_first": f"{where} dealt, and a request starved",
        "full": f"{tree.num_verify_tokens - int(plan.selected.sum())} rows left, and {where} not selected",
    }[name]


def _raise(name: str, scheduler: ElasticBudgetScheduler, plan: Plan, fault: Fault) -> NoReturn:
    lines = [
        f"{name}: expected {fault.expected}",
        f"{' ' * len(name)}  got {fault.got}",
        *_step(scheduler, plan.scenario),
        "",
    ]
    raise PlanError(name, "\n".join([*lines, *_table(name, plan, fault.where)]), plan.scenario)


def _step(scheduler: ElasticBudgetScheduler, scenario: Scenario) -> list[str]:
    rows = (
        "as many rows as it asks for"
        if scenario.num_verify_tokens is None
        else f"{scenario.num_verify_tokens} rows"
    )
    depth = scenario.log_probs.shape[0]
    words = f"{int(scenario.live.sum())} requests in {scenario.batch} slots, {rows}, {depth} layers drafted"
    rule, gate = (shorten(repr(part), 120) for part in (scheduler.rule, scheduler.gate))
    return ["", f"the step: {words}", f"the policy: {rule}, gate {gate}"]


def _table(name: str, plan: Plan, where: tuple[int, int] | None) -> list[str]:
    """A row for each selected node, and for the offending one; of the request concerned alone where there are many."""
    forest = plan.tree.forest
    members = [(b, node) for b in range(plan.tree.batch) for node in plan.rows(b)]
    if where is not None:
        members = sorted({*members, where})
        members = (
            members
            if len(members) <= 24
            else [member for member in members if member[0] == where[0]]
        )
    lines = ["request  row  token  parent  depth  path p  bought by  status"]
    for b, node in members:
        rows = plan.rows(b)
        place = {n: str(row) for row, n in enumerate(rows)}
        depth = int(forest.depth[node])
        parent = place.get(int(forest.parent[b, node]), "gone") if depth else "-"
        by = (
            "-"
            if node not in place
            else "root"
            if depth == 0
            else "depth"
            if forest.committed[b, node]
            else "width"
        )
        status = (
            Status(int(plan.tree.status[b])).name.lower()
            if node == (rows[0] if rows else node)
            else ""
        )
        cells = (
            b,
            place.get(node, "-"),
            int(forest.token[b, node]),
            parent,
            depth,
            float(forest.score[b, node].exp()),
            by,
        )
        mark = f"   <- {name}" if (b, node) == where else ""
        text = "{:>7}  {:>3}  {:>5}  {:>6}  {:>5}  {:6.3f}  {:<9}".format(*cells)
        lines.append(f"{text}  {status:<9}{mark}".rstrip())
    return lines if len(lines) <= 30 else [*lines[:30], f"... and {len(lines) - 30} more"]
