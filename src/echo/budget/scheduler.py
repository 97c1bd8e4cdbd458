"""One scheduler, three questions: who drafts on (gate), which rows (rule), how many rows (budget)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError, HostInts
from echo.budget import fused
from echo.budget.goodput import ThroughputOptimal, Tier
from echo.budget.history import History, summarize
from echo.budget.roots import begin
from echo.budget.rules import GlobalRank, PerRequest, Rule, TwoLevel
from echo.cost import CostModel
from echo.gating.calibration import Calibration
from echo.gating.gates import Gate, SparseGate
from echo.kernels.codes import Status
from echo.tree.build import children
from echo.tree.packed import WORD, PackedTree, copy_into, pack
from echo.tree.supertree import (
    DEAD_SCORE,
    Frontier,
    Layer,
    SuperTree,
    check_size,
    path_score,
    write_layer,
)


@dataclass(frozen=True)
class ElasticBudgetScheduler:
    """Plants, grows and packs the super-tree of a step. A value: it holds no state.

    Between :meth:`plant` and the end of :meth:`pack` nothing is read back from the device and no shape depends on data.

    Args:
        rule: which rows: :class:`TwoLevel`, :class:`GlobalRank`, :func:`PerRequest`, or one's own.
        gate: who drafts on; None: everybody.
        budget: rows of a step, roots included (the paper's K_max counts drafted rows: ours is larger by the batch); or a
            :class:`CostModel`: the rows and the depth of greatest goodput, chosen before each step from the history; or
            None: what the rule asks for by itself.
        probe_interval: with a cost model, one step of this many drafts to full depth although less is planned, or although speculation is
            off, so that it comes back. It waits until what the drafter would read up on costs 0.5% of the time off, but no longer
            than sixteen times as many steps.
        margin: with a cost model, the share by which speculation must promise to be faster than plain decoding.
        max_depth: deepest layer; 0 drafts nothing.
        max_verify_tokens_per_req: rows of one request, root included; sets the width of the ancestor masks.

    Raises:
        EchoError: an argument out of range, no budget for a rule that needs one, or a rule that asks for more rows of a request than
            ``max_verify_tokens_per_req``.

    Example:
        >>> scheduler = ElasticBudgetScheduler(TwoLevel(beam=2, max_extra_tokens=4), budget=8, max_depth=3)
        >>> tree = scheduler.begin(torch.tensor([7, 9]))
        >>> tree = scheduler.grow(tree, torch.tensor([[[1, 2]], [[3, 4]]]), torch.log(torch.tensor([[[0.9, 0.1]], [[0.6, 0.3]]])))
        >>> scheduler.pack(tree).tokens.tolist()
        [7, 1, 2, 9, 3, 4, 0, 0]
    """

    rule: Rule
    gate: Gate | None = None
    budget: int | CostModel | None = None
    max_depth: int = 8
    max_verify_tokens_per_req: int = 64
    probe_interval: int = 100
    margin: float = 0.02

    def __post_init__(self) -> None:
        checks.follows("rule", self.rule, Rule)
        if self.gate is not None:
            checks.follows("gate", self.gate, Gate)
        checks.real_field(self, "margin", 0.0)
        for name, low, high in (
            ("probe_interval", 2, None),
            ("max_depth", 0, 64),
            ("max_verify_tokens_per_req", 1, 4096),
        ):
            checks.integer_field(self, name, low, high)
        if not isinstance(self.budget, CostModel) and self.budget is not None:
            checks.integer_field(self, "budget", 1)
        alone = self.rule.default_budget(1)
        if self.budget is None and alone is None:
            raise EchoError(f"budget: expected rows or a CostModel for {self.rule!r}, got None")
        if alone is not None and alone > self.max_verify_tokens_per_req:
            raise EchoError(
                f"max_tree_rows: expected at least the {alone} rows of a request that the rule asks for, got {self.max_verify_tokens_per_req}"
            )

    @classmethod
    def paper(
        cls, calibration: Calibration, *, k_max: int, beam: int = 4, max_extra_tokens: int = 8
    ) -> ElasticBudgetScheduler:
        """ECHO as published: ``calibration``'s gates, ``TwoLevel(beam, max_extra_tokens)``; ``k_max`` counts roots, as ``budget`` does.

        In the 84 modelled cells of ``benchmarks/paper.py``, thresholds calibrated with ``thresholds="throughput"`` and the cost model
        were faster than Youden's by 6.5% in the mean on the trace as recorded and 17% raised (-7 to +34%), by 20 and 33% at one request.
        """
        return cls(
            TwoLevel(beam, max_extra_tokens), SparseGate(calibration), k_max, calibration.max_depth
        )

    @classmethod
    def throughput_optimal(
        cls, calibration: Calibration, cost: CostModel, *, beam: int = 4
    ) -> ElasticBudgetScheduler:
        """The best use of this machine: ``GlobalRank(beam, calibration)``, rows and depth by ``cost``."""
        return cls(GlobalRank(beam, calibration), None, cost, calibration.max_depth)

    @classmethod
    def eagle(
        cls, *, max_verify_tokens_per_req: int, beam: int = 4, max_depth: int = 8
    ) -> ElasticBudgetScheduler:
        """EAGLE-2/3: each request verifies the ``max_verify_tokens_per_req`` best rows of a tree of ``beam`` nodes a layer down to ``max_depth``, root included."""
        return cls(
            PerRequest(max_verify_tokens_per_req, beam),
            max_depth=max_depth,
            max_verify_tokens_per_req=max(64, max_verify_tokens_per_req),
        )

    @classmethod
    def autoregressive(cls) -> ElasticBudgetScheduler:
        """No speculation: one row a request, nothing drafted."""
        return cls(PerRequest(1, 1), max_depth=0)

    def history(self, max_num_reqs: int, device: torch.device | str = "cpu") -> History:
        """A history for ``max_num_reqs`` request slots on ``device``, all without a past."""
        return History.empty(max_num_reqs, self.max_depth, device)

    def choose_tier(
        self, history: History, req_indices: HostInts, num_other_tokens: int = 0
    ) -> Tier:
        """How deep to draft and how many rows to launch, from what the host knows before the step: a row for each request at least.

        With a number as budget: ``max_depth`` and that many rows, or depth 0 and B rows where it leaves nothing to draft for.
        With a cost model: the depth d and the rows K that maximise (B + F_d(K)) / (T(K) + draft(d)); depth 0 unless that beats
        B / T(B) by ``margin``, or it is time for a probe. Up to as many rows again are taken where they are free. F is foreseen from the
        history; as long as that knows too little, the deepest tree is tried at the knee, or with a row for every fourth request.

        Args:
            history: what happened up to some step before this one, on the host (:meth:`History.to`).
            req_indices: ints [B], the live requests of the step: a list, a numpy array or a CPU tensor. Lanes without a request have no place.
            num_other_tokens: rows that prefill takes of the same forward pass.

        Raises:
            EchoError: an argument of the wrong kind, or one on a device.
        """
        where, base = _places(req_indices), checks.integer("num_other_tokens", num_other_tokens, 0)
        batch = len(where)
        if self.max_depth and isinstance(self.budget, CostModel):
            return self._throughput_optimal.choose_tier(history, where, base)
        rows = self._num_verify_tokens(batch) - base if self.max_depth else 0
        return Tier(self.max_depth, rows) if rows > batch else Tier(0, batch)

    def tier_curve(
        self, history: History, req_indices: HostInts, num_other_tokens: int = 0
    ) -> NDArray[np.float32]:
        """What drafting would bring this rank, for :meth:`agree`: data-parallel ranks that share layers must run one shape.

        Takes what :meth:`forecast` takes, and a cost model as budget; an idle rank takes part with ``req_indices`` of length 0. Returns
        float32 [n], at most 1 kB, the same n on every rank. Another budget is an EchoError.
        """
        return self._throughput_optimal.tier_curve(
            history, _places(req_indices), checks.integer("num_other_tokens", num_other_tokens, 0)
        )

    def agree_on_tier(self, curves: NDArray[np.float32], rank: int) -> Tier:
        """The depth that all ranks draft, and the rows that this one adds to its prefill so that all launch the same number.

        Chosen is what is best for all together: the sum of their tokens over the seconds of a step that is as wide for each.
        ``curves`` float32 [ranks, n]: every rank's :meth:`curve`, gathered, of one scheduler (else an EchoError); ``rank``: this one's.
        """
        return self._throughput_optimal.agree_on_tier(curves, rank)

    @property
    def _throughput_optimal(self) -> ThroughputOptimal:
        if not isinstance(self.budget, CostModel):
            raise EchoError(f"budget: expected a CostModel, got {self.budget!r}")
        return ThroughputOptimal(
            self.budget,
            self.rule.beam,
            self.max_depth,
            self.num_lookahead_slots(1),
            self.probe_interval,
            self.margin,
        )

    def num_lookahead_slots(self, batch: int) -> int:
        """The most key/value slots that one request of ``batch`` can take in a step: what an engine reserves before it drafts."""
        alone = self.rule.default_budget(1)
        step = (
            self.max_verify_tokens_per_req
            if isinstance(self.budget, CostModel)
            else self._num_verify_tokens(batch)
        )
        return min(
            self.max_verify_tokens_per_req,
            step,
            self.max_verify_tokens_per_req if alone is None else alone,
        )

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
        """The roots: each live request's last emitted token.

        Args:
            root_tokens: int64 [B].
            live: bool [B]; an empty lane of a padded batch costs no row. Of more live requests than rows the first get one each; the
                others emit nothing in this step, and :attr:`StepCounts.not_scheduled` counts them.
            verify_limits: int64 [B], the most rows a request may get now, root included (slots allocated, context left); values below
                1 count as 1.
            num_verify_tokens: rows of this step, where the forecast's differ from the budget.
            request_weights: float32 [B], what a token of each request is worth beside the others' (service levels); only their ratios count,
                down to 2^-24 of the greatest. Rows go where weight times probability is greatest.
            first_layer: tokens int64 [B, k] and log-probabilities float [B, k] of the first layer, where the previous step's
                draft-extend has scored it already; it is grown at once.

        Raises:
            EchoError: shapes or dtypes that do not fit, or fewer rows than requests where all are live.
        """
        batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64).shape[0]
        limit = (
            self._num_verify_tokens(batch)
            if num_verify_tokens is None
            else checks.integer("num_verify_tokens", num_verify_tokens, 0)
        )
        if limit < batch and live is None:
            raise EchoError(
                f"num_verify_tokens: expected at least one row for each of {batch} requests, got {limit}"
            )
        tree = begin(
            root_tokens,
            live,
            verify_limits,
            request_weights,
            num_verify_tokens=limit,
            max_verify_tokens_per_req=self.max_verify_tokens_per_req,
            deep=self.max_depth > 0,
        )
        if first_layer is None:
            return tree
        tokens, log_probs = first_layer
        checks.tensor("first_layer[0]", tokens, [batch, "k"], torch.int64, root_tokens.device)
        checks.tensor("first_layer[1]", log_probs, list(tokens.shape), checks.FLOATS, tokens.device)
        return self.grow(tree, tokens[:, None], log_probs[:, None])

    def grow(
        self, tree: SuperTree, tokens: Tensor, log_probs: Tensor, *, out: SuperTree | None = None
    ) -> SuperTree:
        """Scores a drafted layer, asks the gate, lets the rule buy, and finds the next frontier.

        S(v) = S(parent) + min(log q(v), 0). A score that is no log-probability makes its node unselectable: NaN, and what is above 0 by
        more than a rounding, as probabilities and logits are. Those, and layers of minus infinity alone, are counted in ``invalid``.

        Args:
            tree: with ``tree.depth < max_depth``.
            tokens: int64 [B, W, k], the candidates drafted on each node of ``tree.frontier``, in any order.
            log_probs: float [B, W, k], their log-probabilities given their parent; no gradient is kept.
            out: a tree of a layer more (a :class:`Workspace`'s), to whose last layer, frontier and state is written.

        Raises:
            EchoError: shapes or dtypes that do not fit, or a layer beyond ``max_depth``.
        """
        frontier = tree.frontier
        batch, width = frontier.token.shape
        k = checks.tensor(
            "tokens", tokens, [batch, width, "k"], torch.int64, frontier.token.device
        ).shape[2]
        checks.tensor(
            "log_probs", log_probs, [batch, width, k], checks.FLOATS, frontier.token.device
        )
        depth = tree.depth + 1
        if depth > self.max_depth:
            raise EchoError(
                f"tree: expected a tree of fewer than max_depth = {self.max_depth} layers, got one of {tree.depth}"
            )
        check_size(batch, sum(tree.sizes) + width * k, depth)
        quick = fused.grow(
            self.rule, self.gate, tree, tokens, log_probs, depth == self.max_depth, out
        )
        if quick is not None:
            return quick
        score, best, faulty = path_score(frontier.score, log_probs, frontier.active)
        layer = Layer(
            depth,
            tokens.flatten(1),
            frontier.index.repeat_interleave(k, dim=1),
            score,
            torch.zeros(batch, width * k, dtype=torch.bool, device=tokens.device),
            tree.status == int(Status.ACTIVE),
            tree.request_weights,
        )
        room = tree.verify_limits - tree.num_committed
        some = layer.drafted & (best > DEAD_SCORE) & (room > 0)
        verdict = None if self.gate is None else self.gate(layer)
        passed = some if verdict is None else some & verdict
        bought = self.rule.commit(layer, passed, room, tree.num_remaining)
        if bought is not None:
            layer = replace(layer, committed=bought)
        index, active = self.rule.frontier(layer)
        on = passed if bought is None else passed & bought.any(dim=1)
        status = tree.status.masked_fill(layer.drafted, int(Status.EXHAUSTED))
        if verdict is not None:
            status.masked_fill_(some, int(Status.TRUNCATED))
        if bought is not None:
            status.masked_fill_(passed, int(Status.STARVED))
        status.masked_fill_(on, int(Status.FINISHED if depth == self.max_depth else Status.ACTIVE))
        grown = SuperTree(
            layers=(*tree.layers, layer),
            frontier=Frontier(
                token=layer.token.gather(1, index),
                parent=index // k,
                index=index,
                score=layer.score.gather(1, index),
                active=active & on[:, None] if depth < self.max_depth else torch.zeros_like(active),
                depth=depth,
            ),
            status=status,
            verify_limits=tree.verify_limits,
            num_committed=tree.num_committed
            if bought is None
            else tree.num_committed + bought.sum(dim=1),
            num_remaining=tree.num_remaining
            if bought is None
            else tree.num_remaining - bought.sum(),
            invalid=tree.invalid + faulty,
            num_verify_tokens=tree.num_verify_tokens,
            max_verify_tokens_per_req=tree.max_verify_tokens_per_req,
        )
        return grown if out is None else write_layer(out, grown)

    def grow_positions(self, tree: SuperTree, tokens: Tensor, log_probs: Tensor) -> SuperTree:
        """Grows one layer for each position of a drafter that looks at no node, gates and purchases included.

        A chain is k = 1; MTP heads and block drafters (DFlash) give k candidates a position, and every node of a frontier gets them all.

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
            tree = self.grow(
                tree, *(x[:, d, None].expand(-1, width, -1) for x in (tokens, log_probs))
            )
        return tree

    def grow_from(self, tree: SuperTree, ready: SuperTree, k: int) -> SuperTree:
        """Grows a tree that exists already (of one's own, a template, a trie) layer by layer, gates and purchases included.

        It is grown as if its nodes were drafted, so what lies below a node that is not drafted on is no candidate. Without this, a
        ready-made tree goes straight to :meth:`pack`, and all its nodes are.

        Args:
            tree: just planted, with the same requests.
            ready: from :meth:`SuperTree.from_arrays`, :meth:`SuperTree.from_paths` or :meth:`Template.fill`; layers beyond
                ``max_depth`` are left out.
            k: most children of a node that are looked at, the first; bounds the work.

        Raises:
            EchoError: another batch, a tree that has layers, or fanout below 1.
        """
        k = checks.integer("k", k, 1)
        if tree.depth:
            raise EchoError(f"tree: expected a tree just planted, got one of {tree.depth} layers")
        checks.integer("ready.batch", ready.batch, tree.batch, tree.batch)
        forest = ready.forest
        table, node, grown = children(forest, k), torch.zeros_like(tree.frontier.token), tree
        for _ in range(min(ready.depth, self.max_depth)):
            kids = table.gather(1, node[..., None].expand(-1, -1, k))
            at = kids.clamp(min=0).flatten(1)
            score = (
                forest.score.gather(1, at).view(kids.shape)
                - forest.score.gather(1, node)[..., None]
            )
            grown = self.grow(
                grown,
                forest.token.gather(1, at).view(kids.shape),
                torch.where(kids >= 0, score, -torch.inf),
            )
            node = at.gather(1, grown.frontier.index)
        return replace(grown, invalid=tree.invalid + ready.invalid)

    def select(self, tree: SuperTree) -> Tensor:
        """The bare decision: bool [B, T] over ``tree.forest``, roots, bought rows and dealt rows."""
        if not tree.depth:  # nothing was drafted
            return tree.committed
        most = (
            tree.verify_limits
            if tree.max_verify_tokens_per_req <= self.max_verify_tokens_per_req
            else tree.verify_limits.clamp(max=self.max_verify_tokens_per_req)
        )
        return tree.committed | self.rule.select(
            tree, most - tree.num_committed, tree.num_remaining, tree.num_verify_tokens
        )

    def pack(
        self,
        tree: SuperTree,
        *,
        num_verify_tokens: int | None = None,
        sync: Callable[[Tensor], Tensor] | None = None,
        out: PackedTree | None = None,
    ) -> PackedTree:
        """Deals the rows that are left, and flattens the selected nodes into exactly ``num_verify_tokens`` rows.

        Args:
            tree: after the last :meth:`grow`.
            num_verify_tokens: N, at least the rows that the tree was planted with; beyond them, pads. Those rows where not given.
            sync: gets this rank's step as one int32 tensor and returns the one that all ranks follow (a broadcast).
            out: a step of the same shapes (an engine's persistent buffers), whose tensors are written to and returned.

        Raises:
            EchoError: fewer rows than the tree was planted with.
        """
        count = (
            tree.num_verify_tokens
            if num_verify_tokens is None
            else checks.integer("num_verify_tokens", num_verify_tokens, 0)
        )
        if count < tree.num_verify_tokens:
            raise EchoError(
                f"num_verify_tokens: expected at least the {tree.num_verify_tokens} rows that the tree was planted with, got {count}"
            )
        words, foresees = (
            -(-self.max_verify_tokens_per_req // WORD),
            isinstance(self.budget, CostModel) and tree.depth > 0,
        )
        packed = self._pack(tree, count, words, foresees, out if sync is None else None, None)
        if sync is None:
            return packed
        return copy_into(
            out,
            PackedTree.from_buffer(
                sync(packed.to_buffer()),
                batch=tree.batch,
                num_rows=count,
                words=words,
                max_depth=tree.depth,
            ),
        )

    def _pack(
        self,
        tree: SuperTree,
        num_rows: int,
        words: int,
        summarizes: bool,
        out: PackedTree | None,
        scratch: fused.Scratch | None,
    ) -> PackedTree:
        """The packed step, with what it is expected to bring where it ``summarizes``; ``scratch`` are a workspace's buffers."""
        if out is not None:
            fused.check(out, tree.batch, num_rows, words, tree.status.device)
        quick = fused.pack(
            self.rule,
            tree,
            num_rows,
            words,
            self.max_verify_tokens_per_req,
            summarizes=summarizes,
            out=out,
            scratch=scratch,
        )
        if quick is not None:
            return quick
        selected = self.select(tree)
        packed = pack(tree, selected, num_rows, words)
        if summarizes:
            outlook, expected = summarize(tree, self.rule.acceptance_probability(tree), selected)
            packed = replace(packed, acceptance_histogram=outlook, expected=expected)
        return copy_into(out, packed)

    def _num_verify_tokens(self, batch: int) -> int:
        if isinstance(self.budget, CostModel):
            return int(self.budget.round_up(self.budget.knee.k_max))
        return self.budget or self.rule.default_budget(batch) or batch


def _places(slots: HostInts) -> NDArray[np.int64]:
    """The requests of a step, as the host knows them."""
    where = checks.integers("req_indices", slots, 0)
    if where.ndim != 1:
        raise EchoError(f"req_indices: expected one int for each request, got {where}")
    return where
