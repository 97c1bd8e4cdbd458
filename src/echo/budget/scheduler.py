"""One scheduler, three questions: who drafts deeper (gate), which tokens (rule), how many (budget).

B requests; W nodes of a frontier; k candidates of a node; T nodes of a request's tree; N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, HostInts
from echo.budget import step
from echo.budget.history import History
from echo.budget.rules import GlobalRank, PerRequest, Rule, TwoLevel
from echo.budget.throughput import ThroughputOptimal, Tier
from echo.cost import CostModel
from echo.gating.calibration import Calibration
from echo.gating.gates import Gate, SparseGate
from echo.tree.build import grow_from
from echo.tree.packed import WORD, PackedTree
from echo.tree.supertree import SuperTree, check_size


@dataclass(frozen=True)
class ElasticBudgetScheduler:
    """Begins, grows and packs the super-tree of a step. A value: it holds no state.

    Between :meth:`begin` and the end of :meth:`pack` there is no device-to-host sync, and no shape
    depends on data.

    Args:
        rule: which tokens: :class:`TwoLevel`, :class:`GlobalRank`, :func:`PerRequest` or another.
        gate: who drafts deeper. Defaults to all requests.
        budget: verify tokens of a step, roots included (the paper's K_max counts drafts: ours is
            larger by the batch); or a :class:`CostModel`: the tier of greatest throughput, chosen
            before each step from the history. Defaults to what the rule asks for.
        max_depth: deepest layer; 0 drafts nothing.
        max_verify_tokens_per_req: of one request, root included; sets the width of the ancestor
            masks.
        probe_interval: with a cost model, every so many steps one drafts to full depth although
            less is planned or speculation is off, so that speculation can resume. It waits until
            draft extend costs 0.5% of the time off, but at most sixteen intervals.
        margin: with a cost model, by what share speculation must promise to beat plain decoding.
        trims: with a cost model, :meth:`trim` follows drafting: a tier's tokens are only a bound.

    Raises:
        EchoError: an argument out of range, no budget for a rule that needs one, or a rule that
            asks for more than ``max_verify_tokens_per_req``.

    Example:
        >>> scheduler = ElasticBudgetScheduler(TwoLevel(beam=2, max_extra_tokens=4), budget=8)
        >>> tree = scheduler.begin(torch.tensor([7, 9]))
        >>> q = torch.tensor([[[0.9, 0.1]], [[0.6, 0.3]]])
        >>> tree = scheduler.grow(tree, torch.tensor([[[1, 2]], [[3, 4]]]), torch.log(q))
        >>> scheduler.pack(tree).tokens.tolist()
        [7, 1, 2, 9, 3, 4, 0, 0]
        >>> roots, heads = torch.tensor([7]), torch.tensor([[[1, 2], [3, 4]]])
        >>> begun, ready = scheduler.begin(roots), SuperTree.from_paths(roots, [[[1, 2], [3]]])
        >>> tree = scheduler.grow_positions(begun, heads, torch.zeros(1, 2, 2))
        >>> tree.sizes, scheduler.pack(scheduler.grow_from(begun, ready, k=2)).tokens.tolist()
        ([1, 2, 4], [7, 1, 3, 2, 0, 0, 0, 0])
        >>> history = scheduler.history(max_num_reqs=4)
        >>> eagle = ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=8)
        >>> eagle.choose_tier(history, [0, 2]), eagle.num_lookahead_slots(batch=2)
        (Tier(depth=8, num_verify_tokens=16, beam=0), 8)
        >>> ElasticBudgetScheduler.autoregressive().choose_tier(history, [0, 2])
        Tier(depth=0, num_verify_tokens=2, beam=0)
        >>> from echo.gating import WarmupLog, calibrate
        >>> made = calibrate(WarmupLog.from_arrays([1] * 200, [0.9, 0.2] * 100, [1, 0] * 100))
        >>> ElasticBudgetScheduler.paper(made, k_max=16).gate.depths
        (1,)
        >>> cost = CostModel((1, 64, 128), (0.02, 0.02, 0.04))  # free up to 64 tokens
        >>> best = ElasticBudgetScheduler.throughput_optimal(made, cost)
        >>> curve = best.tier_curve(best.history(4), [0, 2])
        >>> best.agree_on_tier(np.stack([curve, curve]), rank=0)
        Tier(depth=1, num_verify_tokens=64, beam=4)
        >>> steep = replace(best, budget=CostModel((1, 2, 3), (1.0, 1.4, 1.8)), trims=True)
        >>> tree = steep.grow(steep.begin(roots, num_verify_tokens=3), heads[:, :1], q[:1].log())
        >>> steep.pack(steep.trim(tree, Tier(1, 3))).tokens.tolist()  # 2 is not worth its row
        [7, 1]
    """

    rule: Rule
    gate: Gate | None = None
    budget: int | CostModel | None = None
    max_depth: int = 8
    max_verify_tokens_per_req: int = 64
    probe_interval: int = 100
    margin: float = 0.02
    trims: bool = False

    def __post_init__(self) -> None:
        checks.follows("rule", self.rule, Rule)
        if self.gate is not None:
            checks.follows("gate", self.gate, Gate)
        checks.real_field(self, "margin", 0.0)
        checks.integer_field(self, "probe_interval", 2)
        checks.integer_field(self, "max_depth", 0, 64)
        checks.integer_field(self, "max_verify_tokens_per_req", 1, 4096)
        if not isinstance(self.budget, CostModel) and self.budget is not None:
            checks.integer_field(self, "budget", 1)
        alone, most = self.rule.default_budget(1), self.max_verify_tokens_per_req
        if self.budget is None and alone is None:
            raise EchoError(f"budget: expected an int or a CostModel for {self.rule!r}, got None")
        if alone is not None and alone > most:
            expected = f"max_verify_tokens_per_req: expected at least the {alone} of the rule"
            raise EchoError(f"{expected}, got {most}")

    @classmethod
    def paper(
        cls, calibration: Calibration, *, k_max: int, beam: int = 4, max_extra_tokens: int = 8
    ) -> ElasticBudgetScheduler:
        """ECHO as published: ``calibration``'s gates and ``TwoLevel(beam, max_extra_tokens)``.

        ``k_max`` counts roots, as ``budget`` does. Over 24 cells of step times measured on an H100,
        thresholds calibrated with ``thresholds="throughput"`` and the cost model were faster than
        Youden's by 6% in the mean (-8 to +32%), by 26 to 32% at one request of dense models.
        EchoError: no calibration.
        """
        rule = TwoLevel(beam, max_extra_tokens)
        gate = SparseGate(checks.instance("calibration", calibration, Calibration))
        return cls(rule, gate, k_max, calibration.max_depth)

    @classmethod
    def throughput_optimal(
        cls, calibration: Calibration, cost: CostModel, *, beam: int = 4, trims: bool = False
    ) -> ElasticBudgetScheduler:
        """Best on a machine: ``GlobalRank(beam, calibration)``, tiers by ``cost``, and ``trims``.

        EchoError: no calibration, or no cost model.
        """
        checks.instance("calibration", calibration, Calibration)
        budget = checks.instance("cost", cost, CostModel)
        return cls(GlobalRank(beam, calibration), None, budget, calibration.max_depth, trims=trims)

    @classmethod
    def eagle(
        cls, *, max_verify_tokens_per_req: int, beam: int = 4, max_depth: int = 8
    ) -> ElasticBudgetScheduler:
        """EAGLE-2/3: the best ``max_verify_tokens_per_req`` tokens of each request, root included.

        Its trees expand ``beam`` nodes in a layer, down to ``max_depth``.
        """
        most = max_verify_tokens_per_req
        rule = PerRequest(most, beam)
        return cls(rule, max_depth=max_depth, max_verify_tokens_per_req=max(64, most))

    @classmethod
    def autoregressive(cls) -> ElasticBudgetScheduler:
        """No speculation: one verify token a request, nothing drafted."""
        return cls(PerRequest(1, 1), max_depth=0)

    def history(self, max_num_reqs: int, device: torch.device | str = "cpu") -> History:
        """A history of ``max_num_reqs`` requests on ``device``, all without a past."""
        return History.empty(max_num_reqs, self.max_depth, device)

    def choose_tier(
        self,
        history: History,
        req_indices: HostInts,
        num_other_tokens: int = 0,
        *,
        context_tokens: float | None = None,
    ) -> Tier:
        """Choose depth and verify tokens from what the host knows before the step.

        Depth 0 means: do not speculate, one verify token a request. With a number as budget it is
        ``max_depth`` and what the budget leaves, or depth 0 where that is no draft token. With a
        cost model it is the depth d and the tokens K that maximise
        (B + F_d(K)) / (T(K) + draft(d)); depth 0 unless that beats B / T(B) by ``margin``, or a
        probe is due. If more tokens cost nothing, up to twice K are verified. F is predicted from
        the history; as long as that knows too little, full depth is tried at the knee, or with a
        draft token for every fourth request.

        Args:
            history: up to some step before this one, on the host (:meth:`History.to`).
            req_indices: ints [B], the live requests of the step: a list, a numpy array or a CPU
                tensor.
            num_other_tokens: tokens of prefill, and whatever else shares the forward pass.
            context_tokens: that the requests have in the cache together, for a cost model that
                knows what they cost: a host number (SGLang's ``seq_lens_sum``, the sum of vLLM's
                ``num_computed_tokens``). Defaults to the context that the model was measured at.

        Raises:
            EchoError: an argument of the wrong kind, or one on a device.
        """
        last = len(checks.instance("history", history, History).generation) - 1
        other, context = _load(num_other_tokens, context_tokens)
        if self.max_depth and isinstance(self.budget, CostModel):
            return self._throughput_optimal.choose_tier(history, req_indices, other, context)
        batch = len(checks.indices("req_indices", req_indices, last))
        tokens = self._num_verify_tokens(batch) - other if self.max_depth else 0
        return Tier(self.max_depth, tokens) if tokens > batch else Tier(0, batch)

    def tier_curve(
        self,
        history: History,
        req_indices: HostInts,
        num_other_tokens: int = 0,
        *,
        context_tokens: float | None = None,
    ) -> NDArray[np.float32]:
        """What drafting would bring this rank, for :meth:`agree_on_tier`.

        Data-parallel ranks that share layers must run one shape. ``history``, ``req_indices``,
        ``num_other_tokens`` and ``context_tokens`` as in :meth:`choose_tier`, with a cost model as
        budget (else an EchoError); an idle rank takes part with ``req_indices`` of length 0.
        Returns float32 [n], at most 1 kB, the same n on every rank.
        """
        checks.instance("history", history, History)
        load = _load(num_other_tokens, context_tokens)
        return self._throughput_optimal.tier_curve(history, req_indices, *load)

    def agree_on_tier(self, curves: NDArray[np.float32], rank: int) -> Tier:
        """The depth that all ranks draft, and this one's verify tokens: all launch one shape.

        Chosen is what is best for all together: the sum of their tokens over the seconds of a step
        that is as wide for each. ``curves`` float32 [ranks, n]: every rank's :meth:`tier_curve`,
        gathered, of one scheduler (else an EchoError); ``rank``: this one.
        """
        return self._throughput_optimal.agree_on_tier(curves, rank)

    @cached_property
    def _throughput_optimal(self) -> ThroughputOptimal:
        if not isinstance(self.budget, CostModel):
            raise EchoError(f"budget: expected a CostModel, got {self.budget!r}")
        limits = self.rule.beam, self.max_depth, self.num_lookahead_slots(1)
        options = self.probe_interval, self.margin, self.trims
        return ThroughputOptimal(self.budget, *limits, *options)

    def num_lookahead_slots(self, batch: int) -> int:
        """KV slots that one request of ``batch`` can take in a step, to reserve before drafting."""
        most = self.max_verify_tokens_per_req
        alone = self.rule.default_budget(1)
        tokens = most if isinstance(self.budget, CostModel) else self._num_verify_tokens(batch)
        return min(most, tokens, most if alone is None else alone)

    def begin(
        self,
        root_tokens: Tensor,
        *,
        live: Tensor | None = None,
        verify_limits: Tensor | None = None,
        num_verify_tokens: int | None = None,
        request_weights: Tensor | None = None,
        first_layer: tuple[Tensor, Tensor] | None = None,
    ) -> SuperTree:
        """Begin a step with its roots: each live request's last emitted token.

        Args:
            root_tokens: int64 [B].
            live: bool [B]; an empty lane of a padded batch costs no token. If live requests
                outnumber the tokens, the first ones get one each; the others emit nothing in this
                step, and :attr:`StepCounts.not_scheduled` counts them.
            verify_limits: int64 [B], verify tokens that a request may get now, root included (KV
                slots, context left); values below 1 count as 1.
            num_verify_tokens: of this step, from its tier. Defaults to the budget.
            request_weights: float32 [B], worth of each request's tokens (service levels) relative
                to the greatest, down to 2^-24: they go where weight times probability is greatest.
            first_layer: tokens int64 [B, k] and log-probabilities float [B, k] of the first layer,
                where the previous step's draft extend has scored it; it is grown at once.

        Raises:
            EchoError: shapes or dtypes that do not fit, or fewer tokens than requests where all are
                live.
        """
        batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64).shape[0]
        n = self._num_verify_tokens(batch) if num_verify_tokens is None else num_verify_tokens
        count = checks.integer("num_verify_tokens", n, 0)
        if count < batch and live is None:
            each = f"one for each of {batch} requests"
            raise EchoError(f"num_verify_tokens: expected at least {each}, got {count}")
        given = root_tokens, live, verify_limits, request_weights
        most, deep = self.max_verify_tokens_per_req, self.max_depth > 0
        tree = step.begin(
            *given, num_verify_tokens=count, max_verify_tokens_per_req=most, deep=deep
        )
        if first_layer is None:
            return tree
        tokens, log_probs = first_layer
        checks.tensor("first_layer[0]", tokens, [batch, "k"], torch.int64, root_tokens.device)
        checks.tensor("first_layer[1]", log_probs, list(tokens.shape), checks.FLOATS, tokens.device)
        return self.grow(tree, tokens[:, None], log_probs[:, None])

    def grow(
        self,
        tree: SuperTree,
        tokens: Tensor,
        log_probs: Tensor,
        *,
        allowed: Tensor | None = None,
        beam: int = 0,
        out: SuperTree | None = None,
    ) -> SuperTree:
        """Score a drafted layer, ask the gate, let the rule commit, and find the next frontier.

        S(v) = S(parent) + min(log q(v), 0). NaN, and what is above 0 by more than a rounding (a
        probability or a logit), is no log-probability: such a node is never selected. Those, and
        layers of minus infinity alone, are counted in ``invalid``.

        Args:
            tree: with ``tree.depth < max_depth``.
            tokens: int64 [B, W, k], candidates of each node of ``tree.frontier``, in any order.
            log_probs: float [B, W, k], given their parent; no gradient is kept.
            allowed: bool [B, W, k]; False: a candidate that a grammar forbids, so that the target
                cannot sample it: never selected, and no fault. Defaults to all.
            beam: nodes to expand, :attr:`Tier.beam`, where the rule has a field of that name, as
                shipped ones do. Defaults to the rule's.
            out: a tree of one layer more (a :class:`Workspace`'s), to whose last layer, frontier
                and state is written.

        Raises:
            EchoError: shapes or dtypes that do not fit, a layer beyond ``max_depth``, or a beam
                wider than the rule's.
        """
        frontier, depth = tree.frontier, tree.depth + 1
        (batch, width), device = frontier.token.shape, frontier.token.device
        shape = checks.tensor("tokens", tokens, [batch, width, "k"], torch.int64, device).shape
        checks.tensor("log_probs", log_probs, list(shape), checks.FLOATS, device)
        most, rule = self.max_depth, self.rule
        if depth > most:
            raise EchoError(f"tree: expected fewer than max_depth = {most} layers, got {depth - 1}")
        check_size(batch, sum(tree.sizes) + width * shape[2], depth)
        if beam != 0:
            beam = checks.integer("beam", beam, 1, rule.beam)
            rule = rule if beam == rule.beam else replace(rule, beam=beam)  # type: ignore[type-var]
        if allowed is not None:
            checks.tensor("allowed", allowed, list(shape), torch.bool, device)
        return step.grow(rule, self.gate, tree, tokens, log_probs, allowed, depth == most, out)

    def grow_positions(self, tree: SuperTree, tokens: Tensor, log_probs: Tensor) -> SuperTree:
        """Grow a layer for each position of a drafter that is not conditioned on nodes.

        A chain is k = 1; MTP heads and block drafters (DFlash) give k candidates a position, and
        every node of a frontier gets them all. Gate and rule act as in :meth:`grow`.

        Args:
            tree: with ``tree.depth + D <= max_depth``.
            tokens: int64 [B, D, k].
            log_probs: float [B, D, k], given the position alone.

        Raises:
            EchoError: as :meth:`grow`.
        """
        checks.tensor("tokens", tokens, [tree.batch, "D", "k"], torch.int64)
        checks.tensor("log_probs", log_probs, list(tokens.shape), checks.FLOATS)
        for d in range(tokens.shape[1]):
            width = tree.frontier.token.shape[1]
            layer = (x[:, d, None].expand(-1, width, -1) for x in (tokens, log_probs))
            tree = self.grow(tree, *layer)
        return tree

    def grow_from(self, tree: SuperTree, ready: SuperTree, k: int) -> SuperTree:
        """Grow a tree that exists already (custom, a template, a trie) layer by layer.

        Gate and rule act as if its nodes were drafted, so what lies below a node that is not
        expanded is no candidate. Given to :meth:`pack` directly, all its nodes are.

        Args:
            tree: just begun, with the same requests.
            ready: from :meth:`SuperTree.from_arrays`, :meth:`SuperTree.from_paths` or
                :meth:`Template.fill`; layers beyond ``max_depth`` are left out.
            k: children of a node that are looked at, the first; bounds the work.

        Raises:
            EchoError: another batch, a tree that has layers, or k below 1.
        """
        k = checks.integer("k", k, 1)
        if tree.depth:
            raise EchoError(f"tree: expected one just begun, got one of {tree.depth} layers")
        checks.integer("ready.batch", ready.batch, tree.batch, tree.batch)
        grown = grow_from(self.grow, tree, ready.forest, k, min(ready.depth, self.max_depth))
        return replace(grown, invalid=tree.invalid + ready.invalid)

    def select(self, tree: SuperTree) -> Tensor:
        """The bare decision: bool [B, T] over ``tree.forest``, committed nodes included."""
        return step.select(self.rule, tree, self.max_verify_tokens_per_req)

    def trim(
        self,
        tree: SuperTree,
        tier: Tier,
        num_other_tokens: int = 0,
        *,
        context_tokens: float | None = None,
    ) -> SuperTree:
        """Keep only the verify tokens that pay, now that the drafts are known.

        A step's one device-to-host sync, of 4 bytes per verify token: the host waits for the
        drafter and cannot run ahead. Worth it for few requests where rows are expensive (mixtures
        of experts). Maximizes F(N) - r T(N) over N, with F of these drafts and r the tier's rate;
        (B + F(N)) / (T(N) + draft) if the tier has no rate.

        Args:
            tree, tier: of the step, after the last :meth:`grow`.
            num_other_tokens, context_tokens: as in :meth:`choose_tier`.

        Returns:
            The tree with N verify tokens, rounded up to a tier of the cost model if it has any.

        Raises:
            EchoError: a budget that is not a cost model, or an argument of the wrong kind.
        """
        load = _load(num_other_tokens, context_tokens)
        optimal = self._throughput_optimal
        tier = checks.instance("tier", tier, Tier)
        if not tree.depth:
            return tree
        gains = step.gains(self.rule, tree, self.max_verify_tokens_per_req).cpu().numpy()
        n = min(optimal.trim(gains, tier, *load), tree.num_verify_tokens)
        remaining = tree.num_remaining.clamp(max=n - int(gains[1]))
        return replace(tree, num_verify_tokens=n, num_remaining=remaining)

    def pack(
        self,
        tree: SuperTree,
        *,
        num_verify_tokens: int | None = None,
        sync: Callable[[Tensor], Tensor] | None = None,
        out: PackedTree | None = None,
    ) -> PackedTree:
        """Select what remains of the budget, and flatten into exactly ``num_verify_tokens`` rows.

        Args:
            tree: after the last :meth:`grow`.
            num_verify_tokens: N, at least that of :meth:`begin`; beyond it, pads. Defaults to it.
            sync: as in :meth:`PackedTree.agree`: a broadcast of one int32 tensor.
            out: persistent buffers of the same shapes, written to and returned.

        Raises:
            EchoError: fewer rows than the tree was begun with.
        """
        n, least = num_verify_tokens, tree.num_verify_tokens
        count = least if n is None else checks.integer("num_verify_tokens", n, 0)
        if count < least:
            raise EchoError(f"num_verify_tokens: expected at least begin's {least}, got {count}")
        words = -(-self.max_verify_tokens_per_req // WORD)
        summarizes = isinstance(self.budget, CostModel) and tree.depth > 0
        if out is not None:
            step.check(out, tree.batch, count, words, tree.status.device)
        most, to = self.max_verify_tokens_per_req, out if sync is None else None
        packed = step.pack(self.rule, tree, count, words, most, summarizes=summarizes, out=to)
        return packed if sync is None else packed.agree(sync, out)

    def _num_verify_tokens(self, batch: int) -> int:
        if isinstance(self.budget, CostModel):
            return int(self.budget.round_up(self.budget.knee.k_max))
        return self.budget or self.rule.default_budget(batch) or batch


def _load(num_other_tokens: int, context_tokens: float | None) -> tuple[int, float | None]:
    """Check what :meth:`ElasticBudgetScheduler.choose_tier` takes of a step's load."""
    other = checks.integer("num_other_tokens", num_other_tokens, 0)
    if context_tokens is None:
        return other, None
    return other, checks.real("context_tokens", context_tokens, 0.0)
