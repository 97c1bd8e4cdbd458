"""Chains in vLLM whose lengths ECHO chooses, request by request and step by step (docs/vllm.md). Two ways in:

``--speculative-config '{"method": "custom_class", "model": "echo_vllm.EchoProposer", "num_speculative_tokens": 8}'``: vLLM loads
:class:`EchoProposer` and asks it for drafts after every step; lists of any length are fine, and an empty one is plain decoding.
With its own drafters and ``"enable_adaptive_verification": true``, :func:`register` puts our ranking in the place of its own.

Environment (all optional): ``ECHO_CALIBRATION`` and ``ECHO_COST``, JSON files of an :class:`echo.Calibration` and an
:class:`echo.CostModel`; ``ECHO_ROWS``, rows of a step for the whole batch. With none of them every request gets all that was drafted.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import echo

LONGEST = 4  # tokens of the suffix that the lookup looks for, at most
PRIOR = 1.0  # weight of "something else follows" beside each earlier occurrence
TAIL = 64  # tokens by whose end a request is known again


class EchoProposer:
    """What ``vllm.v1.spec_decode.custom_class_proposer`` loads.

    It drafts chains by looking the text's end up in the text itself. A drafter of one's own is one method: :meth:`draft`.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.depth = vllm_config.speculative_config.num_speculative_tokens
        self.max_length = vllm_config.model_config.max_model_len
        self.scheduler = scheduler(self.depth)
        self.history = self.scheduler.history(vllm_config.scheduler_config.max_num_seqs)
        self.known: dict[
            tuple[int, bytes], list[int]
        ] = {}  # text of the last step -> places in its batch
        self.slots = torch.empty(0, dtype=torch.int64)
        self.packed: echo.PackedTree | None = None

    def draft(self, texts: Sequence[NDArray[np.int32]], depth: int) -> tuple[Tensor, Tensor]:
        """A chain after each text: tokens int64 and log-probabilities float32 [B, depth], -inf where it ends earlier."""
        tokens = np.zeros((len(texts), depth), dtype=np.int64)
        log_probs = np.full((len(texts), depth), -np.inf, dtype=np.float32)
        for b, text in enumerate(texts):
            for d, (token, probability) in enumerate(lookup(text, depth)):
                tokens[b, d], log_probs[b, d] = token, np.log(probability)
        return torch.from_numpy(tokens), torch.from_numpy(log_probs)

    def propose(
        self,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Drafts for the next step, after vLLM's bookkeeping of this one.

        Args:
            sampled_token_ids: for each row of vLLM's batch, the tokens that this step emitted; none while a prompt is being read.
            num_tokens_no_spec: int32 [rows], tokens of each text, the emitted ones included.
            token_ids_cpu: int32 [rows, max_model_len].
            slot_mappings: not read.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [i for i, emitted in enumerate(sampled_token_ids) if emitted]
        texts = [token_ids_cpu[i, : num_tokens_no_spec[i]] for i in rows]
        self.remember(texts, [sampled_token_ids[i] for i in rows])
        if not rows:
            return drafts
        shape = self.scheduler.choose_tier(self.history, self.slots)
        roots = torch.tensor([int(text[-1]) for text in texts])
        room = torch.tensor([self.max_length - len(text) for text in texts])
        tree = self.scheduler.begin(
            roots, num_verify_tokens=shape.num_verify_tokens, verify_limits=room
        )
        if shape.depth:
            tokens, log_probs = self.draft(texts, shape.depth)
            tree = self.scheduler.grow_positions(tree, tokens[..., None], log_probs[..., None])
        self.packed = self.scheduler.pack(tree)
        ends, chosen = self.packed.indptr.tolist(), self.packed.tokens.tolist()
        for place, i in enumerate(rows):
            drafts[i] = chosen[ends[place] + 1 : ends[place + 1]]
        return drafts

    def remember(self, texts: Sequence[NDArray[np.int32]], emitted: Sequence[list[int]]) -> None:
        """Finds each request's slot again, and puts what the last step accepted into the history.

        vLLM moves rows as requests come and go and names none of them, so a request is known by its text before the step.
        """
        places = [
            self.recognise(text[: len(text) - len(own)])
            for text, own in zip(texts, emitted, strict=True)
        ]
        kept = [place for place in places if place is not None]
        if self.packed is not None and kept:
            lengths = torch.tensor(
                [len(own) for place, own in zip(places, emitted, strict=True) if place is not None]
            )
            self.history = self.history.observe(
                self.slots[kept], only(self.packed, kept), accepted(self.packed.max_depth, lengths)
            )
        free = sorted(
            set(range(len(self.history.generation))) - set(self.slots[kept].tolist()), reverse=True
        )
        slots = [free.pop() if place is None else int(self.slots[place]) for place in places]
        self.history = self.history.reset(
            torch.tensor(
                [slot for slot, place in zip(slots, places, strict=True) if place is None]
            ).long()
        )
        self.slots = torch.tensor(slots, dtype=torch.int64)
        self.known, self.packed = {}, None
        for place, text in enumerate(texts):
            self.known.setdefault(key(text), []).append(place)

    def recognise(self, before: NDArray[np.int32]) -> int | None:
        """The place in the last step's batch of the request that had this text; None: a new one."""
        places = self.known.get(key(before))
        return places.pop() if places else None


def register() -> None:
    """Entry point of ``vllm.general_plugins``: which drafts adaptive verification admits is ranked by :class:`echo.GlobalRank`."""
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification

    policies: dict[int, echo.ElasticBudgetScheduler] = {}

    def assign(
        confidences: Tensor, slots: Tensor, capacities: Tensor, budget: int, steps: int
    ) -> None:
        if steps not in policies:
            policies[steps] = scheduler(steps)
        capacities.copy_(admit(policies[steps], confidences[slots], capacities, budget))

    adaptive_verification._assign_draft_token_budget_compiled = assign


def admit(
    policy: echo.ElasticBudgetScheduler, confidences: Tensor, capacities: Tensor, budget: int
) -> Tensor:
    """Drafts that each request may verify: the ``budget`` of greatest probability that the whole chain up to them is accepted.

    Args:
        policy: of chains, whose ranking and calibration count.
        confidences: float32 [B, depth], the chance of each draft given those before it.
        capacities: int [B], drafts that each request has.
        budget: drafts of the whole batch.

    Returns:
        int64 [B]. No read-back.
    """
    batch, depth = confidences.shape
    roots = torch.zeros(batch, dtype=torch.int64, device=confidences.device)
    tree = policy.begin(
        roots, num_verify_tokens=max(1, batch + budget), verify_limits=capacities.long() + 1
    )
    tree = policy.grow_positions(
        tree, roots[:, None, None].expand(-1, depth, 1), confidences.log()[..., None]
    )
    return policy.select(tree).sum(dim=1) - 1


def scheduler(depth: int) -> echo.ElasticBudgetScheduler:
    """The policy that the environment asks for: chains of at most ``depth`` drafts, ranked over the whole batch."""
    calibration, cost, rows = (
        os.environ.get(f"ECHO_{name}") for name in ("CALIBRATION", "COST", "ROWS")
    )
    learnt = echo.Calibration.load(calibration) if calibration else None
    budget = (
        echo.CostModel.from_json(Path(cost).read_text()) if cost else int(rows) if rows else None
    )
    rule = echo.PerRequest(depth + 1, 1, learnt) if budget is None else echo.GlobalRank(1, learnt)
    return echo.ElasticBudgetScheduler(
        rule, budget=budget, max_depth=depth, max_verify_tokens_per_req=depth + 1
    )


def lookup(text: NDArray[np.int32], depth: int) -> list[tuple[int, float]]:
    """What followed the text's longest suffix where it occurred before: the commonest token each time, and its share."""
    for size in range(min(LONGEST, len(text) - 1), 0, -1):
        windows = np.lib.stride_tricks.sliding_window_view(text[:-1], size)
        after = np.flatnonzero((windows == text[-size:]).all(axis=1)) + size
        if len(after):
            break
    else:
        return []
    chain: list[tuple[int, float]] = []
    while len(after) and len(chain) < depth:
        token, count = np.unique(text[after], return_counts=True)
        best = int(count.argmax())
        chain.append((int(token[best]), float(count[best]) / (PRIOR + len(after))))
        after = after[text[after] == token[best]] + 1
        after = after[after < len(text)]
    return chain


def only(packed: echo.PackedTree, places: list[int]) -> echo.PackedTree:
    """A step as the history reads it, of the requests in these places: of one that has ended, vLLM does not say what it accepted."""
    ends = torch.cat([packed.indptr[:1], packed.indptr.diff()[places].cumsum(0, dtype=torch.int32)])
    own = {
        name: None if (part := getattr(packed, name)) is None else part[places]
        for name in ("status", "outlook", "expected")
    }
    return replace(packed, indptr=ends, **own)


def accepted(depth: int, lengths: Tensor) -> echo.tree.Accepted:
    """``lengths`` int64 [B] tokens emitted after each root, which are vLLM's business: -1."""
    nothing = lengths.new_full((len(lengths), depth + 1), -1)
    return echo.tree.Accepted(nothing, nothing, lengths, nothing[:, 0])


def key(text: NDArray[np.int32]) -> tuple[int, bytes]:
    """A text's length and end."""
    return len(text), text[-TAIL:].tobytes()
