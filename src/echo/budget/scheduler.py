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
from echo.budget.rules import GlobalRank, PerRequest, Rule, TwoLevel, narrowed
from echo.budget.throughput import FEW, ThroughputOptimal, Tier, checked_load
from echo.cost import CostModel
from echo.gating.calibration import Calibration
from echo.gating.gates import Gate, SparseGate
from echo.tree.build import grow_from
from echo.tree.packed import WORD, PackedTree
from echo.tree.supertree import SuperTree, check_size


@dataclass(frozen=True)
class ElasticBudgetScheduler:
    """Begins, grows and packs the super-tree of a step. Immutable and stateless.

    From :meth:`begin` to the end of :meth:`pack` there is no device-to-host sync, and no shape
    depends on data.

    Args:
        rule: which tokens: :class:`TwoLevel`, :class:`GlobalRank`, :func:`PerRequest` or another.
        gate: which requests draft deeper. Defaults to all.
        budget: verify tokens of a step, roots included (the paper's K_max counts drafts only); or a
            :class:`CostModel`, for the tier of greatest throughput. Defaults to the rule's.
        max_depth: number of draft layers; 0 disables drafting.
        max_verify_tokens_per_req: limit of one request, root included, and width of the masks.
        probe_interval: with a cost model, steps from one that drafts to full depth to the next, so
            that speculation can resume. While it is off, a probe waits until its draft extend costs
            at most 0.5% of that time, at most sixteen intervals.
        margin: with a cost model, the relative gain over plain decoding that is required.
        trims: with a cost model, the host waits for drafts: :meth:`deeper` and :meth:`trim` read
            them; a tier's tokens are an upper bound.

    Raises:
        EchoError: an argument out of range, a missing budget that the rule needs, or a rule that
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
        (Tier(depth=8, num_verify_tokens=16, beam=None), 8)
        >>> ElasticBudgetScheduler.autoregressive().choose_tier(history, [0, 2])
        Tier(depth=0, num_verify_tokens=2, beam=None)
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
        >>> tree, tier = steep.begin(roots, num_verify_tokens=3), Tier(1, 3)
        >>> while steep.deeper(tree, tier):
        ...     tree = steep.grow(tree, heads[:, :1], q[:1].log())
        >>> steep.pack(steep.trim(tree, tier)).tokens.tolist()  # 2 is not worth its row
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
        if self.trims and not isinstance(self.budget, CostModel):
            raise EchoError(f"trims: expected a CostModel as budget, got {self.budget!r}")
        if alone is not None and alone > most:
            expected = f"max_verify_tokens_per_req: expected at least the {alone} of the rule"
            raise EchoError(f"{expected}, got {most}")

    @classmethod
    def paper(
        cls, calibration: Calibration, *, k_max: int, beam: int = 4, max_extra_tokens: int = 8
    ) -> ElasticBudgetScheduler:
        """ECHO as published: ``calibration``'s gates and ``TwoLevel(beam, max_extra_tokens)``.

        ``k_max`` includes roots. On step times measured on an H100, ``thresholds="throughput"``
        beats Youden's by 6% in the mean (-8 to +32%). EchoError: no calibration.
        """
        rule = TwoLevel(beam, max_extra_tokens)
        gate = SparseGate(checks.instance("calibration", calibration, Calibration))
        return cls(rule, gate, k_max, calibration.max_depth)

    @classmethod
    def throughput_optimal(
        cls, calibration: Calibration, cost: CostModel, *, beam: int = 4, trims: bool = False
    ) -> ElasticBudgetScheduler:
        """``GlobalRank(beam, calibration)``, tiers by ``cost``, and ``trims``: nothing to tune.

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

        ``beam`` nodes of a layer are expanded, down to ``max_depth``.
        """
        most = max_verify_tokens_per_req
        limit = max(64, most)
        return cls(PerRequest(most, beam), max_depth=max_depth, max_verify_tokens_per_req=limit)

    @classmethod
    def autoregressive(cls) -> ElasticBudgetScheduler:
        """No speculation: one verify token per request."""
        return cls(PerRequest(1, 1), max_depth=0)

    def history(self, max_num_reqs: int, device: torch.device | str = "cpu") -> History:
        """An empty history of ``max_num_reqs`` requests on ``device``."""
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

        Depth 0 means no speculation: one verify token per request. A fixed budget gives
        ``max_depth`` and the budget without ``num_other_tokens``, or depth 0 if that leaves no
        drafts. A cost model gives the depth d and tokens K that maximize
        (B + F_d(K)) / (T(K) + draft(d)), or depth 0 unless that beats B / T(B) by ``margin`` or a
        probe is due; tokens that cost nothing more are added, up to twice K. F is predicted from
        the history. Until that knows enough, full depth is tried at the knee, or with one draft
        token for every fourth request if that is more.

        Args:
            history: on the host (:meth:`History.to`); it may be a step or two old.
            req_indices: ints [B], the live requests: a list, a numpy array or a CPU tensor.
            num_other_tokens: prefill tokens, and whatever else shares the forward pass.
            context_tokens: tokens of all requests in the cache, a host number (SGLang's
                ``seq_lens_sum``, the sum of vLLM's ``num_computed_tokens``). Defaults to the
                context that the cost model was measured at.

        Raises:
            EchoError: an argument of the wrong kind, or on a device.
        """
        checks.instance("history", history, History)
        other, context = checked_load(num_other_tokens, context_tokens)
        if self.max_depth and isinstance(self.budget, CostModel):
            return self._throughput_optimal.choose_tier(history, req_indices, other, context)
        batch = len(checks.indices("req_indices", req_indices, len(history.generation) - 1))
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
        """Predict what drafting would bring this rank, for :meth:`agree_on_tier`.

        Data-parallel ranks that share layers must run one shape. Takes what :meth:`choose_tier`
        does, ``req_indices`` empty on an idle rank. Returns float32 [n], at most 1 kB. EchoError:
        no cost model as budget.
        """
        checks.instance("history", history, History)
        load = checked_load(num_other_tokens, context_tokens)
        return self._throughput_optimal.tier_curve(history, req_indices, *load)

    def agree_on_tier(self, curves: NDArray[np.float32], rank: int) -> Tier:
        """Choose one depth for all ranks, and this rank's verify tokens: all launch one shape.

        Maximizes the ranks' tokens over the seconds of a step that is equally wide on all.
        ``curves`` float32 [ranks, n] are their :meth:`tier_curve`, of one scheduler (else an
        EchoError); ``rank`` is this one.
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
        """KV slots to reserve for each of ``batch`` requests before drafting: a step's maximum."""
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
            live: bool [B]; False for an empty lane of a padded batch, which costs no token. If live
                requests outnumber the tokens, the first ones get one each; the others emit nothing
                in this step (:attr:`StepCounts.not_scheduled`). Defaults to all.
            verify_limits: int64 [B], of each request in this step, root included (KV slots, context
                left); values below 1 count as 1. Defaults to no limit.
            num_verify_tokens: of this step, from its tier. Defaults to the budget.
            request_weights: float32 [B], worth of each request's tokens (service levels): tokens go
                where weight times probability is greatest. Only ratios count, down to 2^-24.
            first_layer: tokens int64 [B, k] and log-probabilities float [B, k] of the first layer,
                if the previous step's draft extend has scored it.

        Raises:
            EchoError: shapes or dtypes that do not fit, or without ``live`` too few tokens.
        """
        batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64).shape[0]
        n = self._num_verify_tokens(batch) if num_verify_tokens is None else num_verify_tokens
        count = checks.integer("num_verify_tokens", n, 0)
        if count < batch and live is None:
            each = f"one for each of {batch} requests"
            raise EchoError(f"num_verify_tokens: expected at least {each}, got {count}")
        tree = step.begin(
            root_tokens, live, verify_limits, request_weights, num_verify_tokens=count,
            max_verify_tokens_per_req=self.max_verify_tokens_per_req, deep=self.max_depth > 0,
        )  # fmt: skip
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
        beam: int | None = None,
        out: SuperTree | None = None,
    ) -> SuperTree:
        """Score a drafted layer, ask the gate, let the rule commit, and find the next frontier.

        S(v) = S(parent) + min(log q(v), 0). NaN and values above 0 by more than a rounding error
        (probabilities, logits) are invalid: such nodes are never selected. ``invalid`` counts them,
        and layers without a finite score.

        Args:
            tree: with ``tree.depth < max_depth``.
            tokens: int64 [B, W, k], candidates of each node of ``tree.frontier``, in any order.
            log_probs: float [B, W, k], given their parent; no gradient is kept.
            allowed: bool [B, W, k], False for candidates that a grammar forbids: never selected,
                not counted as invalid. Defaults to all.
            beam: nodes to expand (:attr:`Tier.beam`), if the rule has one. Defaults to its own.
            out: a tree with one layer more (a :class:`Workspace`'s) whose buffers are written.

        Raises:
            EchoError: shapes or dtypes that do not fit, a layer beyond ``max_depth``, or a beam
                wider than the rule's.
        """
        rule = self.rule
        device = tree.frontier.token.device
        batch, width = tree.frontier.token.shape
        shape = checks.tensor("tokens", tokens, [batch, width, "k"], torch.int64, device).shape
        checks.tensor("log_probs", log_probs, list(shape), checks.FLOATS, device)
        if tree.depth >= self.max_depth:
            expected = f"fewer than max_depth = {self.max_depth} layers"
            raise EchoError(f"tree: expected {expected}, got {tree.depth}")
        check_size(batch, sum(tree.sizes) + width * shape[2], tree.depth + 1)
        if beam is not None:
            rule = narrowed(rule, checks.integer("beam", beam, 1, rule.beam))
        if allowed is not None:
            checks.tensor("allowed", allowed, list(shape), torch.bool, device)
        last = tree.depth + 1 == self.max_depth
        return step.grow(rule, self.gate, tree, tokens, log_probs, allowed, last, out)

    def grow_positions(self, tree: SuperTree, tokens: Tensor, log_probs: Tensor) -> SuperTree:
        """Grow one layer per position, for drafters that are not conditioned on nodes.

        k = 1 is a chain; MTP heads and block drafters (DFlash) give k candidates per position,
        which every node of the frontier gets: ``tokens`` int64 and ``log_probs`` float [B, D, k],
        given the position alone. ``tree.depth + D`` is at most ``max_depth``. EchoError: as
        :meth:`grow`.
        """
        checks.tensor("tokens", tokens, [tree.batch, "D", "k"], torch.int64)
        checks.tensor("log_probs", log_probs, list(tokens.shape), checks.FLOATS)
        for d in range(tokens.shape[1]):
            width = tree.frontier.token.shape[1]
            layer = (x[:, d, None].expand(-1, width, -1) for x in (tokens, log_probs))
            tree = self.grow(tree, *layer)
        return tree

    def grow_from(self, tree: SuperTree, ready: SuperTree, k: int) -> SuperTree:
        """Grow a ready-made tree (custom, a template, a trie) layer by layer.

        Gate and rule act as if its nodes were drafted: nodes below one that is not expanded are no
        candidates. Given to :meth:`pack` directly, all nodes are. ``tree`` is from :meth:`begin`;
        ``ready`` of the same requests, from :meth:`SuperTree.from_arrays`,
        :meth:`SuperTree.from_paths` or :meth:`Template.fill`, layers beyond ``max_depth`` ignored;
        of a node's children the first ``k`` count. EchoError: another batch, a tree that has
        layers, or k below 1.
        """
        k = checks.integer("k", k, 1)
        checks.integer("tree.depth", tree.depth, 0, 0)
        checks.integer("ready.batch", ready.batch, tree.batch, tree.batch)
        grown = grow_from(self.grow, tree, ready.forest, k, min(ready.depth, self.max_depth))
        return replace(grown, invalid=tree.invalid + ready.invalid)

    def select(self, tree: SuperTree) -> Tensor:
        """The selected nodes: bool [B, T] over ``tree.forest``, committed ones included."""
        return step.select(self.rule, tree, self.max_verify_tokens_per_req)

    def deeper(self, tree: SuperTree, tier: Tier) -> bool:
        """Whether to draft another layer: ``while scheduler.deeper(tree, tier)`` drafts a step.

        Down to the tier's depth. With ``trims`` and at most four requests to one layer more, and as
        long as a layer pays by the drafts above it: a sync of 4 bytes a layer, worth 2 to 6% at one
        request of a dense model. EchoError: ``tier`` is no :class:`Tier`.
        """
        checks.instance("tier", tier, Tier)
        if not (self.trims and tier.depth and tier.rate and tree.depth) or tree.batch > FEW:
            return tree.depth < tier.depth
        if tree.depth >= min(tier.depth + 1, self.max_depth):
            return False
        probability = step.frontier_probability(self.rule, tree).item()
        return self._throughput_optimal.deeper(probability, tree.depth + 1, tree.batch, tier)

    def trim(
        self,
        tree: SuperTree,
        tier: Tier,
        num_other_tokens: int = 0,
        *,
        context_tokens: float | None = None,
    ) -> SuperTree:
        """Keep only the verify tokens that pay, now that the drafts are known.

        A device-to-host sync of 4 bytes per verify token, worth it for few requests where rows are
        expensive (mixtures of experts). Maximizes F(N) - r T(N) over N, with F of these drafts and
        r the tier's rate; (B + F(N)) / (T(N) + draft) if the tier has no rate.

        Args:
            tree, tier: of the step, after the last :meth:`grow`.
            num_other_tokens, context_tokens: as in :meth:`choose_tier`.

        Returns the tree with N verify tokens, rounded up to the cost model's tiers. EchoError: a
        budget that is not a cost model, or an argument of the wrong kind.
        """
        optimal = self._throughput_optimal
        load = checked_load(num_other_tokens, context_tokens)
        checks.instance("tier", tier, Tier)
        if not tree.depth:
            return tree
        gains = step.gains(self.rule, tree, self.max_verify_tokens_per_req).cpu().numpy()
        n = min(optimal.trim(gains, tier, *load), tier.num_verify_tokens, tree.num_verify_tokens)
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
            num_verify_tokens: N, at least the tree's, which is the default; the rest are pads.
            sync: as in :meth:`PackedTree.agree`: a broadcast of one int32 tensor.
            out: persistent buffers of the same shapes, written to and returned.

        Raises:
            EchoError: fewer rows than the tree's verify tokens.
        """
        count = tree.num_verify_tokens
        if num_verify_tokens is not None:
            count = checks.integer("num_verify_tokens", num_verify_tokens, count)
        most = self.max_verify_tokens_per_req
        words = -(-most // WORD)
        summarizes = isinstance(self.budget, CostModel) and tree.depth > 0
        if out is not None:
            step.check(out, tree.batch, count, words, tree.status.device)
        to = out if sync is None else None
        packed = step.pack(self.rule, tree, count, words, most, summarizes=summarizes, out=to)
        return packed if sync is None else packed.agree(sync, out)

    def _num_verify_tokens(self, batch: int) -> int:
        if isinstance(self.budget, CostModel):
            return int(self.budget.round_up(self.budget.knee.k_max))
        return self.budget or self.rule.default_budget(batch) or batch
