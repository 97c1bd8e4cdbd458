"""Prompt lookup: n-gram proposals, from what followed the latest longest match of a text's end.

Models repeat themselves and their prompts, which a small draft head does not see: where the text's
last eight tokens had occurred before, SmolLM2 wrote the same ninth in about four of five cases.
This is prompt lookup decoding (Saxena, 2023), applied at every node of a tree. Proposal and draft
are mixed linearly, ``q' = (1 - w) q + w [token = proposal]``, so gates, rules, calibration and
budgets need no change.

B requests, W nodes of a frontier with k candidates each, texts of the last L tokens, n-grams of G
tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import EchoError, copy_into
from echo.loop import Drafter
from echo.tree.accept import Accepted
from echo.tree.packed import PackedTree
from echo.tree.supertree import DEAD_SCORE, Frontier

NO_TOKEN = -1
"""Padding after the end of a text; also: no proposal."""
ABSENT = -2
"""A tail's padding before the beginning of its text; equals no token."""
ALONE = (0.0, 0.2, 0.45, 0.7, 0.7, 0.7, 0.75, 0.8, 0.8)
"""How often the proposal is the target's token, by match length. SmolLM2 on 32 prompts
(``evaluate.py --warmup --new 64``, an example): 0, 0.21, 0.43, 0.84, 0.85, 0.47, 0.75, 0.79, 0.74;
rounded, and smoothed from length 3 on, where it had 40 samples."""
BESIDE = (0.0, 0.1, 0.3, 0.45, 0.6, 0.6, 0.6, 0.7, 0.8)
"""The mixing weights that maximise the likelihood of the target's text, beside SmolLM2's EAGLE
head: rounded, from an earlier head's drafts of 64 texts. The present head's chains of 5 on the 32
prompts: 0, 0.11, 0.29, 0.42, 0.64, 0.64, 0.73, 0.68, 0.79."""
MOST = 1 - 2.0**-24
"""Greatest mixing weight: the last float32 below 1."""
PRIOR = 2.0
"""Pseudo-count of the current mixing weights in :meth:`PromptLookup.fit_weights`."""


@dataclass(frozen=True)
class Texts:
    """The end of each request's text, prompt included.

    Attributes:
        tokens: int32 [max_num_reqs, L], ring buffers: token i of a text is in column ``i % L``.
        num_tokens: int64 [max_num_reqs], tokens written to each ring, overwritten ones included.

    Example:
        >>> from echo.tree import SuperTree
        >>> tokens, ids = torch.tensor([[5, 6, 7, 5]]), torch.tensor([0])
        >>> found = Texts.empty(1, 8).append(ids, tokens, torch.tensor([4])).propose(ids)
        >>> found.tokens.tolist(), found.match_lens.tolist()  # 6 followed the last 5
        ([[6]], [[1]])
        >>> tree = SuperTree.from_paths(torch.tensor([5]), [[[6], [8]]])
        >>> found.follow(tree.frontier).tokens.tolist()  # 7 followed 5, 6; nothing an 8
        [[7, -1]]
    """

    tokens: Tensor
    num_tokens: Tensor

    @classmethod
    def empty(cls, max_num_reqs: int, max_len: int, device: torch.device | str = "cpu") -> Texts:
        """Return empty texts of ``max_len`` tokens for ``max_num_reqs`` requests, on ``device``.

        Raises:
            EchoError: a number below 1.
        """
        requests = checks.integer("max_num_reqs", max_num_reqs, 1)
        length = checks.integer("max_len", max_len, 1, (1 << 31) // 128)
        tokens = torch.full((requests, length), NO_TOKEN, dtype=torch.int32, device=device)
        return cls(tokens, torch.zeros(requests, dtype=torch.int64, device=device))

    def admit(
        self, req_indices: Tensor, texts: Sequence[Tensor], *, out: Texts | None = None
    ) -> Texts:
        """Replace the texts of ``req_indices`` int64 [n] by ``texts``, int64 [length] each.

        ``out``: texts to write to, which may be these.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        device = self.num_tokens.device
        room = self.tokens.shape[1]
        checks.tensor("req_indices", req_indices, [len(texts)], torch.int64, device)
        for b, text in enumerate(texts):
            checks.tensor(f"texts[{b}]", text, ["n"], torch.int64, device)
        new = self._writable(out)
        if texts:
            ends = [text[-room:] for text in texts]
            rows = [F.pad(end, (0, room - len(end)), value=NO_TOKEN) for end in ends]
            new.tokens.index_copy_(0, req_indices, torch.stack(rows).int())
            held = torch.stack([end.new_full((), len(end)) for end in ends])
            new.num_tokens.index_copy_(0, req_indices, held)
        return new

    def append(
        self, req_indices: Tensor, tokens: Tensor, num_tokens: Tensor, *, out: Texts | None = None
    ) -> Texts:
        """Append to ``req_indices`` [B] the first ``num_tokens`` [B] of ``tokens`` [B, n], int64.

        ``out``: texts to write to; if these, only the new tokens move.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        device = self.num_tokens.device
        room = self.tokens.shape[1]
        batch = checks.tensor("req_indices", req_indices, ["B"], torch.int64, device).shape[0]
        count = checks.tensor("tokens", tokens, [batch, "n"], torch.int64, device).shape[1]
        checks.tensor("num_tokens", num_tokens, [batch], torch.int64, device)
        new = self._writable(out)
        if kernels.use_triton(tokens):
            from echo.kernels import ngram

            ngram.append(new.tokens, new.num_tokens, req_indices, tokens, num_tokens)
            return new
        more = num_tokens.clamp(max=count)[:, None]
        place = torch.arange(room, device=device)
        end = self.num_tokens[req_indices][:, None]
        turn = (place - end) % room  # index of the first new token that lands in each column
        last = turn + (more - 1 - turn).div(room, rounding_mode="floor") * room
        ring = self.tokens[req_indices]
        if count:
            ring = torch.where(turn < more, tokens.gather(1, last.clamp(0, count - 1)).int(), ring)
        new.tokens.index_copy_(0, req_indices, ring)
        new.num_tokens.index_copy_(0, req_indices, (end + more)[:, 0])
        return new

    def propose(self, req_indices: Tensor, max_ngram: int = 8) -> Proposals:
        """Propose for the roots (W = 1) of ``req_indices`` int64 [B], from ``max_ngram`` tokens.

        Raises:
            EchoError: req_indices of another shape, dtype or device, or max_ngram below 1.
        """
        checks.tensor("req_indices", req_indices, ["B"], torch.int64, self.num_tokens.device)
        return _propose(self, req_indices, checks.integer("max_ngram", max_ngram, 1, 64), None)

    def _writable(self, out: Texts | None) -> Texts:
        """Return ``out`` holding these texts, or a copy of them."""
        if out is None:
            return Texts(self.tokens.clone(), self.num_tokens.clone())
        return copy_into(out, self)


@dataclass(frozen=True)
class Proposals:
    """The n-gram proposal of each node of a frontier.

    Attributes:
        texts, req_indices: what was searched; int64 [B].
        tails: int32 [B, W, G], the last tokens of each node's path, continued into the text before
            it, newest first; -2 before the beginning.
        tokens: int64 [B, W], the token that followed the longest match of the tail in the text, the
            latest if there are several; -1 for none.
        match_lens: int64 [B, W], length of that match, at most G; 0 for none.
    """

    texts: Texts
    req_indices: Tensor
    tails: Tensor
    tokens: Tensor
    match_lens: Tensor

    def follow(self, frontier: Frontier) -> Proposals:
        """Return the proposals of the ``frontier`` below, with B * W * L * G comparisons.

        Raises:
            EchoError: a frontier that is not below these proposals' nodes.
        """
        shape = (len(self.req_indices), "W")
        checks.tensor("frontier.parent", frontier.parent, shape, torch.int64, self.tails.device)
        parents = self.tails, frontier.parent, frontier.token
        return _propose(self.texts, self.req_indices, self.tails.shape[2], parents)


def _propose(
    texts: Texts, req_indices: Tensor, max_ngram: int, parents: tuple[Tensor, Tensor, Tensor] | None
) -> Proposals:
    """Propose for the roots, or for the children (``parents``: tails, parent, token)."""
    if kernels.use_triton(req_indices):
        from echo.kernels import ngram

        found = ngram.propose(texts.tokens, texts.num_tokens, req_indices, max_ngram, parents)
        return Proposals(texts, req_indices, *found)
    device = req_indices.device
    length = texts.tokens.shape[1]
    end = texts.num_tokens[req_indices][:, None]
    first = (end - length).clamp(min=0)
    place = torch.arange(length, device=device)
    held = end - first
    text = texts.tokens[req_indices].gather(1, (first + place) % length)
    if parents is None:
        last = held - 1 - torch.arange(max_ngram, device=device)
        tails = torch.where(last >= 0, text.gather(1, last.clamp(min=0)), ABSENT)[:, None]
    else:
        above, parent, token = parents
        with checks.reading("frontier: expected the one below these proposals' nodes"):
            older = above.gather(1, parent[..., None].expand(-1, -1, max_ngram))
        tails = torch.cat([token.int()[..., None], older[..., :-1]], dim=2)
    before = text.masked_fill(place >= held - 1, NO_TOKEN)  # nothing follows the last token yet
    same = (place < held - 1)[:, None]
    run = torch.zeros(*tails.shape[:2], length, dtype=torch.int64, device=device)
    for back in range(max_ngram):
        seen = F.pad(before, (back, 0), value=NO_TOKEN)[:, :length]
        same = same & (seen[:, None] == tails[..., back, None])
        run += same
    best = torch.where(run > 0, run * length + place, 0).amax(dim=2)
    match_lens = best // length
    after = text.gather(1, (best % length + 1).clamp(max=length - 1)).long()
    tokens = torch.where(match_lens > 0, after, NO_TOKEN)
    return Proposals(texts, req_indices, tails, tokens, match_lens)


def blend(
    tokens: Tensor, log_probs: Tensor, proposal: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix a draft with a proposal: ``q' = (1 - weight) q + weight [token = proposal]``.

    A proposal that is not among the candidates replaces the least likely one if it is likelier.
    Nodes without candidates stay empty.

    Args:
        tokens: int64 [B, W, k].
        log_probs: float [B, W, k].
        proposal: int64 [B, W]; -1: none.
        weight: float32 [B, W] in [0, 1), the proposal's.

    Returns:
        Candidates and log-probabilities of the same shapes and dtypes.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Example:
        >>> draft = torch.tensor([[[3, 4]]]), torch.tensor([[[0.5, 0.25]]]).log()
        >>> tokens, log_probs = blend(*draft, torch.tensor([[7]]), torch.tensor([[0.5]]))
        >>> tokens.tolist(), log_probs.exp().tolist()
        ([[[3, 7]]], [[[0.25, 0.5]]])
    """
    batch, width, k = _check_draft(tokens, log_probs, "B", "W")
    checks.tensor("proposal", proposal, [batch, width], torch.int64, tokens.device)
    checks.tensor("weight", weight, [batch, width], torch.float32, tokens.device)
    asked = (proposal >= 0) & (log_probs.amax(dim=2) > DEAD_SCORE)
    weight = torch.where(asked, weight.detach(), 0.0)[..., None]
    q = log_probs.detach().float() + torch.log1p(-weight)
    own = weight.log()
    match = tokens == proposal[..., None]
    among = match.any(dim=2, keepdim=True)
    place = torch.where(among[..., 0], match.int().argmax(dim=2), q.argmin(dim=2))
    here = torch.arange(k, device=tokens.device) == place[..., None]
    better = here & ~among & (own > q)
    mixed = torch.where(here & among, torch.logaddexp(q, own), torch.where(better, own, q))
    return torch.where(better, proposal[..., None], tokens), mixed.to(log_probs.dtype)


def _check_draft(
    tokens: Tensor, log_probs: Tensor, batch: int | str, width: int | str
) -> tuple[int, int, int]:
    """Check a draft, int64 and float [B, W, k], and return its sizes."""
    found = checks.tensor("tokens", tokens, [batch, width, "k"], torch.int64).shape
    checks.tensor("log_probs", log_probs, found, checks.FLOATS, tokens.device)
    return found[0], found[1], found[2]


class PromptLookup:
    """Prompt lookup as a :class:`Drafter`, alone or blended with another drafter.

    Texts and counters keep their addresses, so CUDA graphs can capture ``draft`` and ``extend``;
    ``capturable`` is True if the other drafter's attribute is, or there is none. Call ``admit``
    outside.

    Args:
        max_num_reqs, max_len: maximum number of requests, and of tokens remembered of each.
        drafter: the drafter to blend with; None: draft chains of proposals.
        max_ngram: longest match to look for.
        mixing_weights: the proposal's weight in [0, 1) by match length, ``max_ngram + 1`` of them.
            Defaults to weights measured on SmolLM2, for 8.
        device: of the texts; the constructor waits for a copy to it, later calls do not.

    Raises:
        EchoError: an argument out of range.

    Example:
        >>> import echo
        >>> lookup, ids = PromptLookup(max_num_reqs=1, max_len=64), torch.tensor([0])
        >>> lookup.admit(ids, [torch.tensor([5, 6, 7])], torch.tensor([5]))
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=2, max_depth=1)
        >>> tree = scheduler.begin(torch.tensor([5]))
        >>> packed = scheduler.pack(scheduler.grow(tree, *lookup.draft(ids, tree.frontier)))
        >>> lookup.extend(ids, packed, echo.accept(packed, torch.tensor([6, 7])))  # it was right
        >>> packed.tokens.tolist(), [round(w, 2) for w in lookup.fit_weights()[:3]]
        ([5, 6], [0.0, 0.47, 0.45])
    """

    def __init__(
        self,
        max_num_reqs: int,
        max_len: int,
        drafter: Drafter | None = None,
        *,
        max_ngram: int = 8,
        mixing_weights: Sequence[float] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.max_ngram = count = checks.integer("max_ngram", max_ngram, 1, 64)
        if mixing_weights is None:
            mixing_weights = ALONE if drafter is None else BESIDE
        with checks.reading("mixing_weights: expected numbers"):
            mixing_weights = [float(weight) for weight in mixing_weights]
        if len(mixing_weights) != count + 1 or not all(0 <= w <= MOST for w in mixing_weights):
            expected = f"{count + 1} numbers in [0, 1), for matches of 0 to {count} tokens"
            raise EchoError(f"mixing_weights: expected {expected}, got {list(mixing_weights)}")
        if drafter is not None:
            checks.follows("drafter", drafter, Drafter)
        self.drafter = drafter
        self.capturable = drafter is None or bool(getattr(drafter, "capturable", False))
        self.texts = Texts.empty(max_num_reqs, max_len, device)
        self.mixing_weights = torch.tensor(mixing_weights, dtype=torch.float32, device=device)
        self._won = torch.zeros(2, count + 1, dtype=torch.float64, device=device)
        self._last: tuple[int, Proposals] | None = None  # of this step's last draft, with its depth
        self._root: tuple[Tensor, ...] | None = None
        self._judged = torch.zeros(self.texts.num_tokens.shape, dtype=torch.bool, device=device)

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor) -> None:
        """Store the ``prompts`` of new requests, and the ``first`` token sampled after each."""
        texts = [torch.cat([p, t[None]]) for p, t in zip(prompts, first, strict=True)]
        self.texts.admit(req_indices, texts, out=self.texts)
        self._last = None
        if self.drafter is not None:
            self.drafter.admit(req_indices, prompts, first)

    def draft(self, req_indices: Tensor, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """Return the other drafter's candidates blended with the proposals, or one proposal a node.

        A step's first frontier may have depth 1, if its first layer came from elsewhere
        (``begin(first_layer=...)``).

        Raises:
            EchoError: a frontier of other requests, or one that neither starts a step nor follows
                the previous one.
        """
        checks.tensor("req_indices", req_indices, [frontier.token.shape[0]], torch.int64)
        found = self._proposals(req_indices, frontier)
        self._last = frontier.depth, found
        if self.drafter is None:
            weight = self.mixing_weights[found.match_lens]
            drafted = found.tokens.clamp(min=0)[..., None], weight.log().half()[..., None]
            before = drafted[0], torch.full_like(drafted[1], DEAD_SCORE)
        else:
            before = self.drafter.draft(req_indices, frontier)
            _check_draft(*before, *found.tokens.shape)
            if kernels.use_triton(before[0]):
                from echo.kernels import ngram

                drafted = ngram.blend(*before, found.tokens, found.match_lens, self.mixing_weights)
            else:
                drafted = blend(*before, found.tokens, self.mixing_weights[found.match_lens])
        if frontier.depth == 0:
            self._remember(before[0][:, 0], before[1][:, 0].detach(), found)
        return drafted

    def _proposals(self, req_indices: Tensor, frontier: Frontier) -> Proposals:
        depth, last = self._last or (0, None)
        follows = last is not None and (last.req_indices is req_indices or depth)
        if last is not None and follows and frontier.depth == depth + 1:
            return last.follow(frontier)
        if frontier.depth > 1:
            expected = "one of depth 0 or 1, or one below the last"
            raise EchoError(f"frontier: expected {expected}, got one of depth {frontier.depth}")
        self._judged.zero_()
        roots = self.texts.propose(req_indices, self.max_ngram)
        return roots.follow(frontier) if frontier.depth else roots

    def _remember(self, tokens: Tensor, log_probs: Tensor, found: Proposals) -> None:
        """Keep the roots' drafts at fixed addresses until the target judges them."""
        batch, k = tokens.shape
        if self._root is None or self._root[0].shape[1] != k:
            count = len(self._judged)
            probs = log_probs.new_zeros(count, k, dtype=torch.float32)
            self._root = tokens.new_zeros(count, k), probs, *tokens.new_zeros(2, count)
        seen = tokens, log_probs, found.tokens[:, 0], found.match_lens[:, 0]
        for buffer, value in zip(self._root, seen, strict=True):
            buffer[:batch].copy_(value)
        self._judged[:batch].fill_(True)

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted) -> None:
        """Append the emitted tokens, and count whether draft or proposal was right at the root."""
        if self._root is not None and packed.max_depth:
            batch = packed.batch
            tokens, log_probs, proposal, run = (buffer[:batch] for buffer in self._root)
            truth = accepted.tokens[:, :1]
            q = torch.where((tokens == truth) & log_probs.isfinite(), log_probs.exp(), 0.0)
            weight = self.mixing_weights[run]
            own = weight * (proposal == truth[:, 0])
            share = own / ((1 - weight) * q.sum(dim=1).clamp(min=1e-4) + own)
            counted = (self._judged[:batch] & (accepted.num_emitted > 0)).double()
            self._won.index_add_(1, run, torch.stack([share * counted, counted]))
            self._judged.zero_()
        self._last = None
        self.texts.append(req_indices, accepted.tokens, accepted.num_emitted, out=self.texts)
        if self.drafter is not None:
            self.drafter.extend(req_indices, packed, accepted)

    def fit_weights(self) -> tuple[float, ...]:
        """Fit the mixing weights to the steps so far by one step of expectation maximisation.

        Each such step raises the likelihood of the target's tokens, which has one maximum. Waits
        for the device.
        """
        rows = zip(*self._won.tolist(), self.mixing_weights.tolist(), strict=True)
        return tuple(min((w + PRIOR * t) / (n + PRIOR), MOST) for w, n, t in rows)
