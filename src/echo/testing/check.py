"""Try a policy on hundreds of steps, and show the smallest one that it plans wrongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from textwrap import shorten

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.kernels.codes import Status
from echo.testing import scenarios
from echo.testing.invariants import ALWAYS, CLAIMED, INVARIANTS, RELATIONS, Check, Fault
from echo.testing.scenarios import Plan, Scenario

DEFAULT = ("ties", "permutation", "padding", "sync_free")
CLAIMS = tuple(dict.fromkeys((*CLAIMED, *RELATIONS)))
COLUMNS = "request  row  token  parent  depth  path p  during  status"
MAX_LINES = 30


class PlanError(AssertionError):
    """A plan that breaks an invariant; the message is the report.

    Attributes:
        invariant: its name.
        scenario: the step, to be planned again with ``scenario.plan(scheduler)``.
    """

    def __init__(self, invariant: str, report: str, scenario: Scenario) -> None:
        super().__init__(report)
        self.invariant: str = invariant
        self.scenario: Scenario = scenario


def check_scheduler(
    scheduler: ElasticBudgetScheduler,
    *,
    claims: Sequence[str] = DEFAULT,
    examples: int = 200,
    max_batch: int = 5,
) -> None:
    """Plan many steps, always the same, and check every invariant.

    Of every policy: at most ``num_verify_tokens`` nodes are selected (``budget``), the ``roots`` of
    live requests are, no node without its parent (``closed``), no more of a request than
    ``verify_limits`` allow (``limits``), only ``finite`` scores, and every ``committed`` node;
    planning the step again gives the same plan (``deterministic``), packed according to the layout
    (``layout``); the rule's ``frontier`` and ``acceptance_probability`` obey
    :class:`echo.budget.Rule`. Of a policy that claims it:

    - ``ties``: of equal siblings the lower candidate comes first, of equal requests the lower one.
    - ``permutation``: permuting requests, none tied or weighted, permutes the plan.
    - ``padding``: empty lanes change no plan, wherever they are.
    - ``sync_free``: no device-to-host sync, and no shape that depends on data.
    - ``depth_first``: only committed nodes are selected while a request that passed its gate is
      STARVED.
    - ``work_conserving``: verify tokens remain only if no request may have one more.
    - ``optimal``: no other choice of as many nodes has a greater sum of weight times
      ``rule.acceptance_probability``.
    - ``batch_invariant``: each request gets the plan that it would get alone.

    Args:
        scheduler: the policy.
        claims: names of the second list. Defaults to its first four.
        examples: steps drawn by hypothesis, divided evenly among batch sizes 1 to ``max_batch``;
            steps made by hand are checked too.
        max_batch: largest batch of a drawn step.

    Raises:
        PlanError: with a table of the smallest plan found that breaks an invariant.
        EchoError: an unknown claim, or hypothesis is not installed.

    Example:
        >>> import echo
        >>> from echo.testing import check_scheduler
        >>> scheduler = echo.ElasticBudgetScheduler(echo.TwoLevel(2, 4), budget=16, max_depth=2)
        >>> check_scheduler(scheduler, examples=20)
    """
    _chosen(claims)
    examples = checks.integer("examples", examples, 1)
    max_batch = checks.integer("max_batch", max_batch, 1)
    package = scenarios.hypothesis()
    options = package.settings(
        max_examples=max(1, examples // max_batch),
        phases=(package.Phase.generate, package.Phase.shrink),
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(package.HealthCheck),
        verbosity=package.Verbosity.quiet,
        report_multiple_bugs=False,
    )
    found = list[PlanError]()

    def check(scenario: Scenario, claims: Sequence[str]) -> None:
        try:
            check_step(scheduler, scenario, claims=claims)
        except PlanError as broken:
            if not found or broken.invariant == found[0].invariant:  # shrinks one fault, not two
                found.append(broken)
                raise

    of_values = [claim for claim in claims if claim != "sync_free"]  # syncs do not depend on values
    budget = scheduler.budget is not None
    most = min(scheduler.max_depth, 8)
    try:
        for batch in range(1, max_batch + 1):
            steps = scenarios.batches(max_batch=batch, max_depth=most, budget=budget)
            options(package.given(steps)(lambda step: check(step, of_values)))()
        for make in scenarios.MADE:
            for batch, depth in ((1, 1), (4, 3)):
                made = make(batch, min(scheduler.max_depth, depth))
                check(made if budget else replace(made, num_verify_tokens=None), claims)
    except Exception:  # also hypothesis's own, if a broken plan is no longer broken
        if not found:
            raise
    if found:
        check_step(scheduler, found[-1].scenario, claims=claims)  # again, without hypothesis' notes
        raise found[-1]  # the policy now decides otherwise


def check_step(
    scheduler: ElasticBudgetScheduler, scenario: Scenario, *, claims: Sequence[str] = DEFAULT
) -> None:
    """Plan one step, ``scenario``, and check it as :func:`check_scheduler` does.

    Raises:
        PlanError: with a table of the plan.
        EchoError: an unknown claim.

    Example:
        >>> import echo
        >>> from echo.testing import burst, check_step
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=9, max_depth=3)
        >>> check_step(scheduler, burst(8))
    """
    chosen = _chosen(claims)
    plan = None
    found: tuple[str, Fault] | None = None
    try:
        plan = scenario.plan(scheduler)
        faults = ((name, check(scheduler, plan)) for name, check in chosen)
        found = next(((name, fault) for name, fault in faults if fault is not None), None)
    except Exception as error:  # raised by the policy
        found = "runs", Fault("a plan", f"{type(error).__name__}: {error}", cause=error)
    if found is None:
        return
    name, fault = found
    num = scenario.num_verify_tokens
    budget = "default budget" if num is None else f"{num} verify tokens"
    step = f"batch {scenario.batch}, {len(scenario.live_requests)} live, {budget}"
    rule, gate = (shorten(repr(part), 120) for part in (scheduler.rule, scheduler.gate))
    lines = [
        f"{name}: expected {fault.expected}",
        f"{' ' * len(name)}  got {fault.got}",
        "",
        f"the step: {step}, {len(scenario.log_probs)} layers drafted",
        f"the policy: {rule}, gate {gate}",
    ]
    if plan is not None:
        table = _table(name, plan, fault.node)
        more = [f"... and {len(table) - MAX_LINES} more"] if len(table) > MAX_LINES else []
        lines += ["", COLUMNS, *table[:MAX_LINES], *more]
    raise PlanError(name, "\n".join(lines), scenario) from fault.cause


def _chosen(claims: Sequence[str]) -> list[tuple[str, Check]]:
    """Return what is checked, in order: masks of nodes first."""
    for claim in claims:
        if claim not in CLAIMS:
            raise EchoError(f"claims: expected some of {CLAIMS}, got {claim!r}")
    masks: dict[str, Check] = {**INVARIANTS, **{n: CLAIMED[n] for n in claims if n in CLAIMED}}
    others = ALWAYS | {n: RELATIONS[n] for n in claims if n in RELATIONS}
    return [*masks.items(), *others.items()]


def _table(name: str, plan: Plan, where: tuple[int, int] | None) -> list[str]:
    """Format each selected node and the faulty one; if there are many, only of its request."""
    forest = plan.tree.forest
    lines = list[str]()
    nodes = {(b, node) for b in range(plan.tree.batch) for node in plan.nodes(b)}
    if where is not None:
        many = len(nodes) > 24
        nodes = {where} | {node for node in nodes if not many or node[0] == where[0]}
    for b, node in sorted(nodes):
        rows = {n: row for row, n in enumerate(plan.nodes(b))}
        depth = int(forest.depth[node])
        parent = rows.get(int(forest.parent[b, node]), "missing") if depth else "-"
        call = "begin" if not depth else "grow" if forest.committed[b, node] else "pack"
        first = next(iter(rows), node) == node
        status = Status(int(plan.tree.status[b])).name.lower() if first else ""
        place = f"{b:>7}  {rows.get(node, '-'):>3}  {int(forest.token[b, node]):>5}  {parent:>6}"
        about = f"{depth:>5}  {float(forest.score[b, node].exp()):6.3f}"
        mark = f"   <- {name}" if (b, node) == where else ""
        call = call if node in rows else "-"
        lines.append(f"{place}  {about}  {call:<6}  {status:<9}{mark}".rstrip())
    return lines
