"""Prompt lookup as tensors: n-gram proposals, alone or mixed into a draft.

A model repeats itself and its prompt, and a small draft head does not see it: where the text's last
eight tokens had occurred before, SmolLM2 wrote the same ninth in almost nine of ten cases. The
search is prompt lookup decoding (Saxena, 2023). Draft and proposal are pooled linearly,
``q' = (1 - s) q + s [token = proposal]``, so gates, rules, calibration and budgets see nothing new.

B requests of a step; R requests that are remembered, L tokens of each; W nodes of a frontier; k
candidates of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.loop import Drafter
from echo.tree.accept import Accepted
from echo.tree.packed import PackedTree
from echo.tree.supertree import DEAD_SCORE, Frontier

NO_TOKEN = -1
"""Behind the end of a text; and no proposal."""
WEIGHTS_ALONE = (0.0, 0.2, 0.45, 0.7, 0.7, 0.7, 0.75, 0.8, 0.8)
"""How often the proposal is the target's token, by length of the match. SmolLM2 on 32 prompts
(`evaluate.py --warmup --new 64`, an example): 0, 0.21, 0.43, 0.84, 0.85, 0.47, 0.75, 0.79, 0.74;
rounded, and smoothed from 3 on, of which it saw 40."""
WEIGHTS_BESIDE = (0.0, 0.1, 0.3, 0.45, 0.6, 0.6, 0.6, 0.7, 0.8)
"""The weight of the proposal that makes the target's text likeliest, beside SmolLM2's EAGLE head:
round numbers, read off an earlier head's drafts of 64 texts. The present one's chains of 5 on the
32 prompts: 0, 0.11, 0.29, 0.42, 0.64, 0.64, 0.73, 0.68, 0.79."""
PRIOR = 2.0
"""Steps that the present mixing weights count beside those seen."""


@dataclass(frozen=True)
class Texts:
    """The end of each request's text, prompt included; a value.

    Attributes:
        tokens: int64 [R, L], the last L tokens of each; -1 behind the end.
        used: int64 [R], how many there are.

    Example:
        >>> texts = Texts.empty(max_num_reqs=1, max_len=3)
        >>> texts.admit(torch.tensor([0]), [torch.tensor([5, 6, 7, 8])]).tokens.tolist()
        [[6, 7, 8]]
    """

    tokens: Tensor
    used: Tensor

    @classmethod
    def empty(cls, max_num_reqs: int, max_len: int, device: torch.device | str = "cpu") -> Texts:
        """Of R = ``max_num_reqs`` requests, L = ``max_len`` tokens each.

        Raises:
            EchoError: a number below 1.
        """
        reqs = checks.integer("max_num_reqs", max_num_reqs, 1)
        shape = reqs, checks.integer("max_len", max_len, 1)
        used = torch.zeros(reqs, dtype=torch.int64, device=device)
        return cls(torch.full(shape, NO_TOKEN, device=device), used)

    def admit(self, req_indices: Tensor, texts: Sequence[Tensor]) -> Texts:
        """Put ``texts``, int64 [n] each, in place of those at ``req_indices`` int64 [B]; sync-free.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        device, length = self.used.device, self.tokens.shape[1]
        checks.tensor("req_indices", req_indices, [len(texts)], torch.int64, device)
        ends = [
            checks.tensor(f"texts[{b}]", text, ["n"], torch.int64, device)[-length:]
            for b, text in enumerate(texts)
        ]
        if not ends:
            return self
        tokens = torch.stack([F.pad(end, (0, length - len(end)), value=NO_TOKEN) for end in ends])
        used = torch.stack([end.new_full((), len(end)) for end in ends])
        return self._write(req_indices, tokens, used)

    def append(self, req_indices: Tensor, tokens: Tensor, num_tokens: Tensor) -> Texts:
        """Append ``num_tokens`` [B] of ``tokens`` [B, n] at ``req_indices`` [B]; all int64.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        device, length = self.used.device, self.tokens.shape[1]
        (batch,) = checks.tensor("req_indices", req_indices, ["B"], torch.int64, device).shape
        checks.tensor("tokens", tokens, [batch, "n"], torch.int64, device)
        checks.tensor("num_tokens", num_tokens, [batch], torch.int64, device)
        start = self.used[req_indices]
        end = start + num_tokens
        # the last L positions of the whole text, and where each is in what was and what comes
        position = torch.arange(length, device=device) + (end - length).clamp(min=0)[:, None]
        known = position < start[:, None]
        column = torch.where(known, position, position - start[:, None] + length)
        whole = torch.cat([self.tokens[req_indices], tokens], dim=1)
        text = whole.gather(1, column.clamp(max=whole.shape[1] - 1))
        text = text.masked_fill(position >= end[:, None], NO_TOKEN)
        return self._write(req_indices, text, end.clamp(max=length))

    def _write(self, req_indices: Tensor, tokens: Tensor, used: Tensor) -> Texts:
        tokens = self.tokens.index_copy(0, req_indices, tokens)
        return Texts(tokens, self.used.index_copy(0, req_indices, used))

    def match(self, req_indices: Tensor, max_ngram: int = 8) -> Match:
        """Match the last ``max_ngram`` tokens at ``req_indices`` int64 [B]: of the roots, W = 1.

        Raises:
            EchoError: another shape, dtype or device, or ``max_ngram`` below 1.
        """
        checks.tensor("req_indices", req_indices, ["B"], torch.int64, self.used.device)
        n = checks.integer("max_ngram", max_ngram, 1)
        text, used = self.tokens[req_indices], self.used[req_indices]
        back = used[:, None] - n + torch.arange(n, device=text.device)
        # the last n tokens, and before the text what equals nothing
        end = torch.where(back >= 0, text.gather(1, back.clamp(min=0)), NO_TOKEN - 1)
        # [B, L, n]: the n tokens that end at each position
        windows = F.pad(text, (n - 1, 0), value=NO_TOKEN).unfold(1, n, 1)
        order = torch.arange(1, n + 1, dtype=torch.int32, device=text.device)
        length = n - ((windows != end[:, None]) * order).amax(dim=2)  # behind the last difference
        after = F.pad(text[:, 1:], (0, 1), value=NO_TOKEN)
        text = torch.where(after >= 0, text, NO_TOKEN)
        return Match(text, after, length.masked_fill(after < 0, 0)[:, None], n)


@dataclass(frozen=True)
class Match:
    """How many tokens before each position match the end of a node's path and its text.

    Attributes:
        text: int64 [B, L], without its last token, after which nothing came yet; -1 from there on.
        after: int64 [B, L], the token after each position.
        length: int32 [B, W, L], that many tokens match; at most ``max_ngram``.
        max_ngram: longest match that is looked for.
    """

    text: Tensor
    after: Tensor
    length: Tensor
    max_ngram: int

    def follow(self, frontier: Frontier) -> Match:
        """The match of the next ``frontier``, from that of its parents. B * W * L comparisons."""
        before = F.pad(frontier.inherit(self.length)[..., :-1], (1, 0))
        same = self.text[:, None] == frontier.token[..., None]
        length = torch.where(same, (before + 1).clamp_(max=self.max_ngram), 0)
        return replace(self, length=length)

    def proposals(self) -> tuple[Tensor, Tensor]:
        """What followed the longest match, the last of several: int64 [B, W], -1 for none.

        And the length of the match, int64 [B, W], 0 for none.
        """
        size = self.text.shape[1]
        wide = torch.int32 if (self.max_ngram + 1) * size <= 1 << 31 else torch.int64
        position = torch.arange(size, dtype=wide, device=self.length.device)
        best = torch.add(position, self.length, alpha=size).amax(dim=2).long()
        length = best // size
        return torch.where(length > 0, self.after.gather(1, best % size), NO_TOKEN), length


def blend(
    tokens: Tensor, log_probs: Tensor, proposal: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """Mix a proposal into drafted candidates: ``q' = (1 - weight) q + weight [token = proposal]``.

    A proposal that is no candidate takes the place of the least likely one where it is likelier.
    Nodes without any candidate stay so.

    Args:
        tokens: int64 [B, W, k].
        log_probs: float [B, W, k].
        proposal: int64 [B, W]; -1: none.
        weight: float32 [B, W] in [0, 1), of the proposal.

    Returns:
        Candidates and log-probabilities of the same shapes and dtypes.

    Raises:
        EchoError: shapes or dtypes that do not fit.

    Example:
        >>> q = torch.tensor([[[0.5, 0.2]]])
        >>> tokens = torch.tensor([[[5, 6]]])
        >>> tokens, log_probs = blend(tokens, q.log(), torch.tensor([[9]]), torch.tensor([[0.4]]))
        >>> tokens.tolist()
        [[[5, 9]]]
    """
    batch, width, k = checks.tensor("tokens", tokens, ["B", "W", "k"], torch.int64).shape
    device = tokens.device
    checks.tensor("log_probs", log_probs, [batch, width, k], checks.FLOATS, device)
    checks.tensor("proposal", proposal, [batch, width], torch.int64, device)
    checks.tensor("weight", weight, [batch, width], torch.float32, device)
    mixed = (proposal >= 0) & (log_probs.amax(dim=2) > DEAD_SCORE)
    weight = torch.where(mixed, weight.detach(), 0.0)[..., None]
    q, own = log_probs.detach().float() + torch.log1p(-weight), weight.log()
    same = tokens == proposal[..., None]
    among = same.any(dim=2, keepdim=True)
    place = torch.where(among[..., 0], same.int().argmax(dim=2), q.argmin(dim=2))
    here = torch.arange(k, device=device) == place[..., None]
    replaced = here & ~among & (own > q)
    pooled = torch.where(here & among, torch.logaddexp(q, own), torch.where(replaced, own, q))
    return torch.where(replaced, proposal[..., None], tokens), pooled.to(log_probs.dtype)


class PromptLookup:
    """Prompt lookup as a :class:`Drafter`: alone, or mixed into what another drafter proposes.

    Args:
        max_num_reqs, max_len: requests, and the last tokens of each that are remembered.
        drafter: whose candidates proposals are mixed into. Defaults to none: a chain of proposals.
        max_ngram: longest match that is looked for.
        mixing_weights: weight of the proposal by length of the match, ``max_ngram + 1`` numbers in
            [0, 1). Defaults to what was measured on SmolLM2, for 8.
        device: of the texts; making a lookup waits for a copy to it, using it does not.

    Raises:
        EchoError: an argument out of range.

    Example:
        >>> lookup, req_indices = PromptLookup(max_num_reqs=1, max_len=16), torch.tensor([0])
        >>> lookup.admit(req_indices, [torch.tensor([5, 6, 7, 5])], torch.tensor([6]))
        >>> texts = lookup.texts.match(req_indices)
        >>> [value.tolist() for value in texts.proposals()]
        [[[7]], [[2]]]
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
        size = checks.integer("max_ngram", max_ngram, 1) + 1
        if mixing_weights is None:
            mixing_weights = WEIGHTS_ALONE if drafter is None else WEIGHTS_BESIDE
        if len(mixing_weights) != size or not all(0 <= weight < 1 for weight in mixing_weights):
            expected = f"{size} numbers in [0, 1), for matches of 0 to {size - 1} tokens"
            raise EchoError(f"mixing_weights: expected {expected}, got {list(mixing_weights)}")
        self.drafter, self.max_ngram = drafter, size - 1
        self.texts = Texts.empty(max_num_reqs, max_len, device)
        self.mixing_weights = torch.tensor(mixing_weights, dtype=torch.float32, device=device)
        self.match: Match | None = None
        # the texts, indices and depth of that match; and the roots' candidates and proposals
        self._asked: tuple[Texts, Tensor, int] | None = None
        self._root: tuple[Tensor, ...] | None = None
        self._counts = torch.zeros(2, size, dtype=torch.float32, device=device)

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor) -> None:
        """As :meth:`echo.Drafter.admit`: remember prompts and first tokens."""
        texts = [torch.cat([p, t[None]]) for p, t in zip(prompts, first, strict=True)]
        self.texts = self.texts.admit(req_indices, texts)
        if self.drafter is not None:
            self.drafter.admit(req_indices, prompts, first)

    def draft(self, req_indices: Tensor, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """As :meth:`echo.Drafter.draft`: the drafter's candidates and the proposals, mixed.

        Raises:
            EchoError: a frontier of depth 2 or more that is not one below the last.
        """
        match = self._match(req_indices, frontier)
        self.match, self._asked = match, (self.texts, req_indices, frontier.depth)
        proposal, length = match.proposals()
        weight = self.mixing_weights[length]
        if self.drafter is None:
            found = proposal.clamp(min=0)[..., None], weight.log().half()[..., None]
            own = found[0], torch.full_like(found[1], DEAD_SCORE)
        else:
            own = self.drafter.draft(req_indices, frontier)
            found = blend(*own, proposal, weight)
        if frontier.depth == 0:
            self._root = (*(x[:, 0].detach() for x in own), proposal[:, 0], length[:, 0])
        return found

    def _match(self, req_indices: Tensor, frontier: Frontier) -> Match:
        texts, indices, depth = self._asked or (None, None, 0)
        below = texts is self.texts and frontier.depth == depth + 1
        if self.match is not None and below and (indices is req_indices or depth):
            return self.match.follow(frontier)
        if frontier.depth > 1:
            expected = "one of depth 0 or 1, or one below the last"
            raise EchoError(f"frontier: expected {expected}, got one of depth {frontier.depth}")
        self._root = None
        roots = self.texts.match(req_indices, self.max_ngram)
        return roots.follow(frontier) if frontier.depth else roots

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted) -> None:
        """As :meth:`echo.Drafter.extend`: append what was emitted, count what was right."""
        if self._root is not None and packed.max_depth:
            tokens, log_probs, proposal, length = self._root
            truth = accepted.tokens[:, :1]
            right = (tokens == truth) & log_probs.isfinite()
            q = torch.where(right, log_probs.float().exp(), 0.0).sum(dim=1).clamp(min=1e-4)
            weight, counted = self.mixing_weights[length], (accepted.num_emitted > 0).float()
            own = weight * (proposal == truth[:, 0])
            news = torch.stack([own / ((1 - weight) * q + own) * counted, counted])
            self._counts = self._counts.index_add(1, length, news)
        self._root = None
        self.texts = self.texts.append(req_indices, accepted.tokens, accepted.num_emitted)
        if self.drafter is not None:
            self.drafter.extend(req_indices, packed, accepted)

    def fit_weights(self) -> tuple[float, ...]:
        """Fit ``mixing_weights`` to the steps so far: one step of expectation maximisation.

        The likelihood of the target's tokens rises with each such step, and has one maximum. Waits
        for the device.
        """
        won, seen = self._counts.tolist()
        return tuple(
            (w + PRIOR * weight) / (n + PRIOR)
            for w, n, weight in zip(won, seen, self.mixing_weights.tolist(), strict=True)
        )
