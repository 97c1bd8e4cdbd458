"""The tier that pays best: how deep to draft and how many tokens to verify, chosen on the host.

D layers at most; n points at which numbers of tokens are compared.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from echo import _checks as checks
from echo._checks import EchoError, HostInts
from echo.budget.history import History
from echo.cost import CostModel

CURVE = 256
HEAD = 6
"""Maximum length of a rank's tier curve (1 kB), and of its head, before F."""
PROBE_COST = 0.005
PATIENCE = 16
"""Share of the time without speculation that a probe's draft extend may cost; and the probe
intervals after which a probe is made at any cost (no replay was long enough to judge it)."""
AMORTIZE = 20
"""Steps over which draft extend is amortized: about what a history remembers. On the measured curve
of two CPU cores, where speculation wins nothing at 256 requests, PROBE_COST and this raise 1,000
steps from 0.946 to 0.998 of plain decoding."""
ROUND_DOWN = 1 - 1e-5
"""Token counts are sums of float32; a rounding error above a whole number is not rounded up."""
DEPTHS = np.arange(1.0, 65.0)[:, None]
"""float64 [64, 1], all depths that a scheduler may have."""
TOKENS_PER_BEAM = 4
"""Verify tokens of a request, root included, per node of its beam. Wider layers cost draft time and
add little that is verified: worth 0.6% in the mean of four models measured on an H100 and up to
3.6% from 32 requests; the best number for each batch gains no more."""
SPREAD = 3
"""A tier to be trimmed has 1 + SPREAD / sqrt(B) times the expected verify tokens: room for the
deviation of a sum over B requests."""
FEW = 4
WORTH = 0.4
"""With ``trims``, up to FEW requests draft another layer while WORTH times the probability that a
node of the frontier is accepted exceeds the layer's seconds times the tier's rate. Trimmed steps of
three dense models measured on an H100 gain 2 to 6% at one request and 0 to 2% at four; WORTH from
0.33 to 0.5 is within 2%. With 8 requests nothing is gained: what a batch accepts varies less. More
than one layer beyond the tier's loses 1% on one half of the texts of a mixture of experts."""


@dataclass(frozen=True)
class Tier:
    """The host's decisions for a step, made before it.

    Attributes:
        depth: number of layers to draft; 0: no speculation in this step.
        num_verify_tokens: tokens of the target's forward pass, roots and pads included.
        beam: nodes of a layer to expand, for ``grow``; None: the rule's. The tier was priced with
            it, and a workspace's graphs are keyed by it.
        rate: tokens per second that the step promises, for :meth:`ElasticBudgetScheduler.deeper`
            and ``trim``; 0 if unknown, or in a probe.
    """

    depth: int
    num_verify_tokens: int
    beam: int | None = None
    rate: float = field(default=0.0, compare=False, repr=False)


@dataclass(frozen=True)
class ThroughputOptimal:
    """Chooses the depth d and verify tokens K that maximize (B + F_d(K)) / (T(K) + draft(d)).

    The beam follows from K: one node for every four verify tokens of a request. Depth 0 unless
    speculation beats plain decoding by ``margin``. K stays within what the cost model's samples
    cover (:meth:`~echo.CostModel.extrapolated`).

    Args:
        cost: seconds of a step.
        beam: maximum number of nodes that a request expands in a layer.
        max_depth, probe_interval, margin, trims: see :class:`~echo.ElasticBudgetScheduler`.
        max_verify_tokens_per_req: limit of one request, by the scheduler and by its rule.
    """

    cost: CostModel
    beam: int
    max_depth: int
    max_verify_tokens_per_req: int
    probe_interval: int
    margin: float
    trims: bool = False

    def choose_tier(
        self,
        history: History,
        req_indices: HostInts,
        num_other_tokens: int,
        context_tokens: float | None,
    ) -> Tier:
        """See :meth:`ElasticBudgetScheduler.choose_tier`."""
        seen = self._predict(history, req_indices)
        batch = len(req_indices)
        plain = num_other_tokens + batch
        if seen is None:
            choice = self._unknown(plain, batch, context_tokens)
        else:
            counts = history.num_steps, history.num_idle_steps, _unprocessed(history, req_indices)
            choice = self._best(*seen, batch, plain, batch, *counts, context_tokens)
        return self._tier(*choice, plain, batch, num_other_tokens, context_tokens)

    def tier_curve(
        self,
        history: History,
        req_indices: HostInts,
        num_other_tokens: int,
        context_tokens: float | None,
    ) -> NDArray[np.float32]:
        """See :meth:`ElasticBudgetScheduler.tier_curve`.

        Context, requests, other tokens, steps, idle steps and unprocessed tokens; then F by depth
        over the grid.
        """
        seen = self._predict(history, req_indices)
        batch = len(req_indices)
        grid = self._grid()
        if seen is None:
            accepts = np.full((self.max_depth, len(grid)), np.nan if batch else 0.0)
        else:
            x = grid - batch - num_other_tokens
            accepts = np.stack([np.interp(x, drafts, f) for drafts, f in zip(*seen, strict=True)])
        steps = history.num_steps % self.probe_interval
        idle = history.num_idle_steps
        context = context_tokens
        if context is None:
            context = self.cost.context_len * (batch if self.cost.num_reqs else 1)
        head = [context, batch, num_other_tokens, steps, idle, _unprocessed(history, req_indices)]
        return np.concatenate([head, accepts.ravel()]).astype(np.float32)

    def agree_on_tier(self, curves: NDArray[np.float32], rank: int) -> Tier:
        """See :meth:`ElasticBudgetScheduler.agree_on_tier`."""
        grid = self._grid()
        shape = list(checks.instance("curves", curves, np.ndarray).shape)
        size = HEAD + self.max_depth * len(grid)
        if len(shape) != 2 or shape[1] != size:
            raise EchoError(f"curves: expected float32 [ranks, {size}], got {shape}")
        rank = checks.integer("rank", rank, 0, len(curves) - 1)
        context, batch, other, *counts = curves[:, :HEAD].astype(np.int64).T
        accepts = curves[:, HEAD:].astype(np.float64).sum(axis=0).reshape(self.max_depth, len(grid))
        plain = int((batch + other).max())
        widest = int(batch.max())
        longest = float(context.max())
        if np.isnan(accepts).any():
            choice = self._unknown(plain, widest, longest)
        else:
            drafts = np.broadcast_to(np.maximum(grid - plain, 0.0), accepts.shape)
            steps, idle, unprocessed = (int(count.max()) for count in counts)
            load = int(batch.sum()), plain, widest, steps, idle, unprocessed, longest
            choice = self._best(drafts, accepts, *load)
        tier = self._tier(*choice, plain, widest, int(other[rank]), longest)
        return replace(tier, rate=0.0)  # drafts of one rank's own must not change the shape

    def trim(
        self,
        gains: NDArray[np.float32],
        tier: Tier,
        num_other_tokens: int,
        context_tokens: float | None,
    ) -> int:
        """Verify tokens that pay: see :meth:`ElasticBudgetScheduler.trim`."""
        live, committed, sure = gains[:3].tolist()
        batch = max(1, int(live))
        first = max(1, int(committed)) + num_other_tokens
        accepts = sure + np.concatenate([[0.0], gains[3:].cumsum(dtype=np.float64)])
        tokens = first + np.arange(len(accepts))
        seconds = self.cost(tokens, num_reqs=batch, context_tokens=context_tokens)
        if tier.rate:
            value = accepts - tier.rate * seconds
        else:
            drafting = self.cost.draft_seconds(tier.depth, batch, tier.beam or self.beam)
            value = accepts / (seconds + drafting)
        return int(self.cost.round_up(int(tokens[value.argmax()]))) - num_other_tokens

    def deeper(self, probability: float, depth: int, batch: int, tier: Tier) -> bool:
        """Whether layer ``depth`` pays: see :meth:`ElasticBudgetScheduler.deeper`."""
        beam = tier.beam or self.beam
        layers = self.cost.draft_seconds([depth - 1, depth], batch, beam)
        return bool(WORTH * probability > tier.rate * np.diff(layers)[0])

    def _predict(
        self, history: History, req_indices: HostInts
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """As :meth:`History.predict`, of a history of this depth."""
        seen = history.predict(req_indices)
        if seen is not None and len(seen[0]) != self.max_depth:
            expected = f"history: expected one of max_depth {self.max_depth}"
            raise EchoError(f"{expected}, got one of {len(seen[0])}")
        return seen

    def _best(
        self,
        drafts: NDArray[Any],
        accepts: NDArray[Any],
        batch: int,
        plain: int,
        widest: int,
        num_steps: int,
        num_idle_steps: int,
        num_unprocessed: int,
        context_tokens: float | None = None,
    ) -> tuple[int, int, float]:
        """Depth, tokens and rate of greatest throughput; depth 0 where none beats plain decoding.

        Args:
            drafts, accepts: float [D, n], draft tokens and how many are accepted; 0 in the first
                column.
            batch: requests, each of which emits one token more.
            plain: tokens of the pass without drafts.
            widest: requests of the rank that has the most.
            num_steps, num_idle_steps: of the history; they say whether it is time for a probe.
            num_unprocessed: tokens of draft extend before anything can be drafted.
            context_tokens: of the rank that has the most.
        """
        if not widest:  # no requests at all
            return 0, plain, 0.0
        # drafts beyond the requests' limits are not verified; the likeliest bring their share
        limit = widest * (self.max_verify_tokens_per_req - 1)
        if drafts.item(-1) > limit:  # the most of all: they rise by depth
            accepts = accepts * np.minimum(1.0, limit / np.maximum(drafts, 1.0))
            drafts = np.minimum(drafts, limit)
        # a trimmed step may take none at one time and two at another: one and a half in the mean
        whole = drafts if self.trims else np.ceil(drafts * ROUND_DOWN)
        most = self._most(plain, widest, context_tokens)
        if most < limit:
            whole = np.minimum(whole, most)
        # what whole tokens bring: all depths in one line, one behind another
        line = (limit + 1) * DEPTHS[: len(drafts)]
        at = np.minimum(whole, drafts[:, -1:]) + line
        accepts = np.interp(at, (drafts + line).ravel(), accepts.ravel())
        verify = self.cost(plain + whole, num_reqs=widest, context_tokens=context_tokens)
        depths = DEPTHS[: self.max_depth]
        node = self.cost.draft_token * widest
        seconds = verify + (self.cost.draft_layer + node) * depths
        if node:  # the first layer is the root's
            seconds += self._wider(whole, widest) * (node * (depths - 1))
        rate = (batch + accepts) / seconds
        rate *= whole > 0
        best = int(rate.argmax())
        alone = verify.item(0)
        idle = num_idle_steps
        extend = self.cost.extend_seconds(num_unprocessed)
        probe = (idle or num_steps) % self.probe_interval == 0
        due = idle % (PATIENCE * self.probe_interval) == 0
        needed = 1 + extend / (AMORTIZE * seconds.item(best))
        promised = rate.item(best)
        if promised <= (1 + self.margin) * batch / alone * needed and not (
            probe and batch and most and (due or extend <= PROBE_COST * idle * alone)
        ):
            return 0, plain, 0.0
        if probe:  # look at the deepest layers
            best = rate.size - rate.shape[1] + int(rate[-1].argmax())
        depth, column = divmod(best, rate.shape[1])
        tokens = plain + max(1, math.ceil(whole[depth, column] * ROUND_DOWN))
        free = self.cost.free_tokens(tokens, widest)
        useful = min(2 * tokens, plain + most)
        if free > useful:  # a tier of the cost model is launched whole
            free = self.cost.round_up(tokens) if self.cost.tiers else useful
        rate = 0.0 if probe else max(promised, batch / alone)
        return depth + 1, max(tokens, free), rate

    def _most(self, plain: int, widest: int, context_tokens: float | None = None) -> int:
        """Draft tokens at most: by the requests' limits, and by what samples speak for."""
        limit = widest * (self.max_verify_tokens_per_req - 1)
        cost = self.cost
        if not cost.measured or not widest:
            return limit
        reqs = widest if cost.num_reqs else 1
        context = cost.context_len if context_tokens is None else context_tokens / reqs
        reach = int(cost.reach(reqs, context))
        if cost.tiers and reach < cost.tiers[-1]:  # a tier is launched whole
            reach = max((tier for tier in cost.tiers if tier <= reach), default=0)
        return max(0, min(limit, reach - plain))

    def _wider(self, drafts: NDArray[Any], requests: int) -> NDArray[Any]:
        """Nodes of a layer worth expanding beside the first, where so many ``drafts`` are verified.

        ceil((drafts + requests) / (TOKENS_PER_BEAM * requests)) - 1, within the beam.
        """
        share = drafts / (TOKENS_PER_BEAM * requests)
        return np.minimum(np.ceil(share - (1 - 1 / TOKENS_PER_BEAM)), self.beam - 1)

    def _tier(
        self,
        depth: int,
        tokens: int,
        rate: float,
        plain: int,
        widest: int,
        other: int,
        context_tokens: float | None,
    ) -> Tier:
        """The tier of ``tokens`` in a pass that ``other`` tokens share."""
        if not depth:
            return Tier(0, tokens - other)
        beam = -(-(tokens - plain + widest) // (TOKENS_PER_BEAM * widest))
        if self.trims:
            useful = plain + self._most(plain, widest, context_tokens)
            most = min(useful, math.ceil(tokens * (1 + SPREAD / math.sqrt(widest))))
            tokens = max(tokens, min(self.cost.round_up(most), *self.cost.tiers[-1:] or [most]))
        return Tier(depth, tokens - other, min(beam, self.beam), rate)

    def _unknown(
        self, plain: int, widest: int, context_tokens: float | None
    ) -> tuple[int, int, float]:
        """Depth and tokens as long as too little was seen: full depth.

        At the knee, or with a draft token for every fourth request where that is more.
        """
        useful = plain + self._most(plain, widest, context_tokens)
        if useful == plain:
            return 0, plain, 0.0
        knee = self.cost.at(widest, context_tokens).knee.k_max
        tokens = min(useful, max(plain + -(-widest // 4), knee))
        return self.max_depth, self.cost.round_up(tokens), 0.0

    def _grid(self) -> NDArray[Any]:
        """Points at which ranks compare: the tiers, or evenly in the logarithm."""
        count = max(2, (CURVE - HEAD) // max(1, self.max_depth))
        widest = max(2, self.cost.num_tokens[-1])
        points = np.asarray(self.cost.tiers or np.geomspace(1, widest, count).round().astype(int))
        index = np.linspace(0, len(points) - 1, min(count, len(points))).round().astype(int)
        return np.unique(points[index])


def checked_load(num_other_tokens: int, context_tokens: float | None) -> tuple[int, float | None]:
    """Check what :meth:`ElasticBudgetScheduler.choose_tier` takes of a step's load."""
    other = checks.integer("num_other_tokens", num_other_tokens, 0)
    if context_tokens is None:
        return other, None
    return other, checks.real("context_tokens", context_tokens, 0.0)


def _unprocessed(history: History, req_indices: HostInts) -> int:
    """Tokens of draft extend before ``req_indices`` can draft; 0 after a step that drafted."""
    if not history.num_idle_steps:
        return 0
    requests = checks.indices("req_indices", req_indices)
    return int(history.num_unprocessed_tokens.numpy()[requests].sum())
