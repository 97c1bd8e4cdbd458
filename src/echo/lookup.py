"""Prompt lookup as tensors: what followed the last longest occurrence of a text's end, alone or as a second opinion on a draft.

A model repeats itself and its prompt, and a small draft head does not see it: where the text's last eight tokens had occurred before,
SmolLM2 wrote the same ninth in almost nine of ten cases. The search is prompt lookup decoding (Saxena, 2023). Two opinions are pooled
linearly, ``q' = (1 - s) q + s [token = vote]``, so gates, rules, calibration and budgets see nothing new.
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

NOTHING = -1
"""No token: behind the end of a text, and: no vote."""
ALONE = (0.0, 0.2, 0.45, 0.7, 0.7, 0.7, 0.75, 0.8, 0.8)
"""How often the vote is the target's token, by length of the match. SmolLM2 on 32 prompts (`evaluate.py --warmup --new 64`, an example):
0, 0.21, 0.43, 0.84, 0.85, 0.47, 0.75, 0.79, 0.74; rounded, and smoothed from 3 on, of which it saw 40."""
BESIDE = (0.0, 0.1, 0.3, 0.45, 0.6, 0.6, 0.6, 0.7, 0.8)
"""The share of the vote that makes the target's text likeliest, beside SmolLM2's EAGLE head: round numbers, read off an earlier head's
drafts of 64 texts. The present one's chains of 5 on the 32 prompts: 0, 0.11, 0.29, 0.42, 0.64, 0.64, 0.73, 0.68, 0.79."""
PRIOR = 2.0
"""Steps that the present trust counts beside those seen."""


@dataclass(frozen=True)
class Texts:
    """The end of each request slot's text, prompt included; a value.

    Attributes:
        tokens: int64 [slots, L], the last L tokens of each; -1 behind the end.
        used: int64 [slots], how many there are.
    """

    tokens: Tensor
    used: Tensor

    @classmethod
    def empty(cls, max_num_reqs: int, max_len: int, device: torch.device | str = "cpu") -> Texts:
        """Of ``max_num_reqs`` slots for ``max_len`` tokens each.

        Raises:
            EchoError: a number below 1.
        """
        shape = (
            checks.integer("max_num_reqs", max_num_reqs, 1),
            checks.integer("max_len", max_len, 1),
        )
        return cls(
            torch.full(shape, NOTHING, device=device),
            torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
        )

    def admit(self, req_indices: Tensor, texts: Sequence[Tensor]) -> Texts:
        """New requests: ``texts`` int64 [n] each, in place of what was in ``req_indices`` int64 [B]. Copies nothing from the host.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        device, room = self.used.device, self.tokens.shape[1]
        checks.tensor("req_indices", req_indices, [len(texts)], torch.int64, device)
        ends = [
            checks.tensor(f"texts[{b}]", text, ["n"], torch.int64, device)[-room:]
            for b, text in enumerate(texts)
        ]
        if not ends:
            return self
        tokens = torch.stack([F.pad(end, (0, room - len(end)), value=NOTHING) for end in ends])
        used = torch.stack([end.new_full((), len(end)) for end in ends])
        return Texts(
            self.tokens.index_copy(0, req_indices, tokens),
            self.used.index_copy(0, req_indices, used),
        )

    def append(self, req_indices: Tensor, tokens: Tensor, num_tokens: Tensor) -> Texts:
        """The first ``num_tokens`` int64 [B] of ``tokens`` int64 [B, n] behind the text in each of ``req_indices`` int64 [B].

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.
        """
        batch = checks.tensor(
            "req_indices", req_indices, ["B"], torch.int64, self.used.device
        ).shape[0]
        checks.tensor("tokens", tokens, [batch, "n"], torch.int64, req_indices.device)
        checks.tensor("num_tokens", num_tokens, [batch], torch.int64, req_indices.device)
        room = self.tokens.shape[1]
        begin, end = self.used[req_indices], self.used[req_indices] + num_tokens
        place = (
            torch.arange(room, device=tokens.device) + (end - room).clamp(min=0)[:, None]
        )  # in the whole text, whose last are kept
        column = torch.where(
            place < begin[:, None], place, place - begin[:, None] + room
        )  # among what was and what comes
        whole = torch.cat([self.tokens[req_indices], tokens], dim=1)
        text = whole.gather(1, column.clamp(max=whole.shape[1] - 1)).masked_fill(
            place >= end[:, None], NOTHING
        )
        return Texts(
            self.tokens.index_copy(0, req_indices, text),
            self.used.index_copy(0, req_indices, end.clamp(max=room)),
        )

    def match(self, req_indices: Tensor, max_ngram: int = 8) -> Match:
        """Where the last ``max_ngram`` tokens of the texts in ``req_indices`` int64 [B] occur: the roots' :class:`Match`, W = 1.

        Raises:
            EchoError: slots of another shape, dtype or device, or longest below 1.
        """
        checks.tensor("req_indices", req_indices, ["B"], torch.int64, self.used.device)
        max_ngram = checks.integer("max_ngram", max_ngram, 1)
        text, used = self.tokens[req_indices], self.used[req_indices]
        back = used[:, None] - max_ngram + torch.arange(max_ngram, device=text.device)
        end = torch.where(
            back >= 0, text.gather(1, back.clamp(min=0)), NOTHING - 1
        )  # [B, longest], and what equals nothing before
        windows = F.pad(text, (max_ngram - 1, 0), value=NOTHING).unfold(
            1, max_ngram, 1
        )  # [B, L, longest], each ends at its place
        place = torch.arange(1, max_ngram + 1, dtype=torch.int32, device=text.device)
        run = max_ngram - ((windows != end[:, None]) * place).amax(
            dim=2
        )  # up to the last place that differs
        after = F.pad(text[:, 1:], (0, 1), value=NOTHING)
        return Match(
            torch.where(after >= 0, text, NOTHING),
            after,
            run.masked_fill(after < 0, 0)[:, None],
            max_ngram,
        )


@dataclass(frozen=True)
class Match:
    """How much of the end of each node's path, with the text before it, ends at each place of the text too.

    Attributes:
        text: int64 [B, L], but for its last token: nothing came after it yet. -1 from there on.
        after: int64 [B, L], the token after each place.
        run: int32 [B, W, L], that many tokens end there; at most ``max_ngram``.
        max_ngram: more is not looked at.
    """

    text: Tensor
    after: Tensor
    run: Tensor
    max_ngram: int

    def follow(self, frontier: Frontier) -> Match:
        """Of the nodes of the next ``frontier``, whose parents' this is. Its work is B * W * L comparisons."""
        before = F.pad(frontier.inherit(self.run)[..., :-1], (1, 0))
        same = self.text[:, None] == frontier.token[..., None]
        return replace(self, run=torch.where(same, (before + 1).clamp_(max=self.max_ngram), 0))

    def proposals(self) -> tuple[Tensor, Tensor]:
        """What followed the longest match, of several the last: int64 [B, W], -1 for nothing; and its length, int64 [B, W], 0 then."""
        length = self.text.shape[1]
        wide = torch.int32 if (self.max_ngram + 1) * length <= 1 << 31 else torch.int64
        best = (
            torch.add(
                torch.arange(length, dtype=wide, device=self.run.device), self.run, alpha=length
            )
            .amax(dim=2)
            .long()
        )
        run = best // length
        return torch.where(run > 0, self.after.gather(1, best % length), NOTHING), run


def blend(
    tokens: Tensor, log_probs: Tensor, proposal: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    """A second opinion on drafted candidates: ``q' = (1 - weight) q + weight [token = proposal]``.

    A vote that is not among the candidates takes the place of the least likely where it is likelier. Nodes without any candidate stay so.

    Args:
        tokens: int64 [B, W, k].
        log_probs: float [B, W, k].
        proposal: int64 [B, W]; -1: none.
        weight: float32 [B, W] in [0, 1), that of the vote.

    Returns:
        Candidates and log-probabilities of the same shapes and dtypes.

    Raises:
        EchoError: shapes or dtypes that do not fit.
    """
    batch, width, k = checks.tensor("tokens", tokens, ["B", "W", "k"], torch.int64).shape
    checks.tensor("log_probs", log_probs, [batch, width, k], checks.FLOATS, tokens.device)
    checks.tensor("vote", proposal, [batch, width], torch.int64, tokens.device)
    checks.tensor("share", weight, [batch, width], torch.float32, tokens.device)
    asked = (proposal >= 0) & (log_probs.amax(dim=2) > DEAD_SCORE)
    weight = torch.where(asked, weight.detach(), 0.0)[..., None]
    q, mine = log_probs.detach().float() + torch.log1p(-weight), weight.log()
    said = tokens == proposal[..., None]
    among = said.any(dim=2, keepdim=True)
    place = torch.where(among[..., 0], said.int().argmax(dim=2), q.argmin(dim=2))
    here = torch.arange(k, device=tokens.device) == place[..., None]
    better = here & ~among & (mine > q)
    pooled = torch.where(here & among, torch.logaddexp(q, mine), torch.where(better, mine, q))
    return torch.where(better, proposal[..., None], tokens), pooled.to(log_probs.dtype)


class PromptLookup:
    """Prompt lookup as a drafter (:class:`Drafter`): alone, or as a second opinion on every node that another drafts on.

    Args:
        slots, length: requests, and the last tokens of each that are remembered.
        drafter: the first opinion; None: a chain of votes.
        max_ngram: longest match that is looked for.
        mixing_weights: by length of the match, its vote's share, in [0, 1), ``max_ngram + 1`` of them; None: measured on SmolLM2, for 8.
        device: of the texts; making a lookup waits for a copy to it, using it does not.

    Raises:
        EchoError: an argument out of range.
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
        max_ngram = checks.integer("max_ngram", max_ngram, 1)
        mixing_weights = (
            (ALONE if drafter is None else BESIDE) if mixing_weights is None else mixing_weights
        )
        if len(mixing_weights) != max_ngram + 1 or not all(
            0 <= share < 1 for share in mixing_weights
        ):
            raise EchoError(
                f"trust: expected {max_ngram + 1} shares in [0, 1), for matches of 0 to {max_ngram} tokens, got {list(mixing_weights)}"
            )
        self.drafter, self.max_ngram = drafter, max_ngram
        self.texts = Texts.empty(max_num_reqs, max_len, device)
        self.mixing_weights = torch.tensor(mixing_weights, dtype=torch.float32, device=device)
        self.match: Match | None = None
        self._asked: tuple[Texts, Tensor, int] | None = (
            None  # of which texts, slots and depth that is
        )
        self._root: tuple[Tensor, ...] | None = None
        self._won = torch.zeros(2, max_ngram + 1, dtype=torch.float32, device=device)

    def admit(self, req_indices: Tensor, prompts: Sequence[Tensor], first: Tensor) -> None:
        """Remembers prompts and first tokens."""
        self.texts = self.texts.admit(
            req_indices, [torch.cat([p, t[None]]) for p, t in zip(prompts, first, strict=True)]
        )
        if self.drafter is not None:
            self.drafter.admit(req_indices, prompts, first)

    def draft(self, req_indices: Tensor, frontier: Frontier) -> tuple[Tensor, Tensor]:
        """What the drafter says, blended with the votes; or these alone, one a node.

        The first frontier of a step may be that of depth 1: a first layer that came from elsewhere (``begin(first_layer=...)``).

        Raises:
            EchoError: a frontier that is neither of these nor one below the last.
        """
        match = self._match(req_indices, frontier)
        self.match, self._asked = match, (self.texts, req_indices, frontier.depth)
        vote, run = match.proposals()
        share = self.mixing_weights[run]
        if self.drafter is None:
            said = vote.clamp(min=0)[..., None], share.log().half()[..., None]
            first = said[0], torch.full_like(said[1], DEAD_SCORE)
        else:
            first = self.drafter.draft(req_indices, frontier)
            said = blend(*first, vote, share)
        if frontier.depth == 0:
            self._root = (*(x[:, 0].detach() for x in first), vote[:, 0], run[:, 0])
        return said

    def _match(self, req_indices: Tensor, frontier: Frontier) -> Match:
        texts, of, depth = self._asked or (None, None, 0)
        if (
            self.match is not None
            and texts is self.texts
            and frontier.depth == depth + 1
            and (of is req_indices or depth)
        ):
            return self.match.follow(frontier)
        if frontier.depth > 1:
            raise EchoError(
                f"frontier: expected one of depth 0 or 1, or one below the last, got one of depth {frontier.depth}"
            )
        self._root = None
        roots = self.texts.match(req_indices, self.max_ngram)
        return roots.follow(frontier) if frontier.depth else roots

    def extend(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted) -> None:
        """Appends what was emitted, and sees who was right at the root."""
        if self._root is not None and packed.max_depth:
            tokens, log_probs, vote, run = self._root
            truth = accepted.tokens[:, :1]
            q = (
                torch.where((tokens == truth) & log_probs.isfinite(), log_probs.float().exp(), 0.0)
                .sum(dim=1)
                .clamp(min=1e-4)
            )
            share, counted = self.mixing_weights[run], (accepted.num_emitted > 0).float()
            mine = share * (vote == truth[:, 0])
            self._won = self._won.index_add(
                1, run, torch.stack([mine / ((1 - share) * q + mine) * counted, counted])
            )
        self._root = None
        self.texts = self.texts.append(req_indices, accepted.tokens, accepted.num_emitted)
        if self.drafter is not None:
            self.drafter.extend(req_indices, packed, accepted)

    def fit_weights(self) -> tuple[float, ...]:
        """The ``trust`` that the steps so far suggest: one step of expectation maximisation from the present one.

        The likelihood of the target's tokens rises with each such step, and has one maximum. Reads back from the device.
        """
        won, seen = self._won.tolist()
        return tuple(
            (w + PRIOR * t) / (n + PRIOR)
            for w, n, t in zip(won, seen, self.mixing_weights.tolist(), strict=True)
        )
