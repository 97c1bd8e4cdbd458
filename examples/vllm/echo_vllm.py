"""Chains in vLLM whose lengths ECHO chooses, request by request and step by step (docs/wiring.md).

Two ways in:

- ``--speculative-config '{"method": "custom_class", "model": "echo_vllm.EchoProposer",
  "num_speculative_tokens": 8}'``: vLLM loads :class:`EchoProposer` and asks it for drafts after
  every step, lists of any length; an empty one is plain decoding.
- With vLLM's drafters and ``"enable_adaptive_verification": true``, :func:`register` gives its
  ranking and its budget calibrated confidences and our cost model.

Environment, all optional; with none of them every draft is verified: ``ECHO_CALIBRATION`` and
``ECHO_COST``, JSON of an :class:`echo.Calibration` and an :class:`echo.CostModel`;
``ECHO_VERIFY_TOKENS``, verify tokens of a step, roots included (vLLM counts drafts only).
"""

from __future__ import annotations

import functools
import inspect
import logging
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

MAX_NGRAM = 4  # tokens of the longest suffix that is looked up
PRIOR = 1.0  # weight of "something else follows" beside each earlier occurrence
TAIL = 64  # tokens by whose end a request is recognised


class EchoProposer:
    """What ``vllm.v1.spec_decode.custom_class_proposer`` loads: n-gram chains of chosen lengths.

    A custom drafter overrides :meth:`draft`.

    Args:
        vllm_config: vLLM's ``VllmConfig``.
    """

    def __init__(self, vllm_config: Any) -> None:
        self.num_speculative_tokens = vllm_config.speculative_config.num_speculative_tokens
        self.max_model_len = vllm_config.model_config.max_model_len
        self.scheduler = scheduler(self.num_speculative_tokens)
        self.history = self.scheduler.history(vllm_config.scheduler_config.max_num_seqs)
        # Of the last step: places in the batch by text, each history index, tree.
        self.places: dict[tuple[int, bytes], list[int]] = {}
        self.req_indices = torch.empty(0, dtype=torch.int64)
        self.packed: echo.PackedTree | None = None

    def draft(self, texts: Sequence[NDArray[np.int32]], depth: int) -> tuple[Tensor, Tensor]:
        """Chains: tokens int64 and log-probabilities float32 [B, depth], -inf where one ends."""
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
            sampled_token_ids: by row of vLLM's batch, tokens that this step emitted; none during
                prefill.
            num_tokens_no_spec: int32 [rows], tokens of each text, the emitted ones included.
            token_ids_cpu: int32 [rows, max_model_len].
            slot_mappings: not used.
        """
        drafts: list[list[int]] = [[] for _ in sampled_token_ids]
        rows = [i for i, emitted in enumerate(sampled_token_ids) if emitted]
        texts = [token_ids_cpu[i, : num_tokens_no_spec[i]] for i in rows]
        self.observe(texts, [sampled_token_ids[i] for i in rows])
        if not rows:
            return drafts
        context = sum(map(len, texts))
        tier = self.scheduler.choose_tier(self.history, self.req_indices, context_tokens=context)
        roots = torch.tensor([int(text[-1]) for text in texts])
        limits = torch.tensor([self.max_model_len - len(text) for text in texts])
        tree = self.scheduler.begin(
            roots, num_verify_tokens=tier.num_verify_tokens, verify_limits=limits
        )
        if tier.depth:
            tokens, log_probs = self.draft(texts, tier.depth)
            tree = self.scheduler.grow_positions(tree, tokens[..., None], log_probs[..., None])
        if self.scheduler.trims:  # drafts are on the host anyway
            tree = self.scheduler.trim(tree, tier, context_tokens=context)
        self.packed = self.scheduler.pack(tree)
        ends, tokens = self.packed.indptr.tolist(), self.packed.tokens.tolist()
        for place, i in enumerate(rows):
            drafts[i] = tokens[ends[place] + 1 : ends[place + 1]]
        return drafts

    def observe(self, texts: Sequence[NDArray[np.int32]], emitted: Sequence[list[int]]) -> None:
        """Updates the history with what the last step accepted.

        vLLM moves rows as requests come and go and names none of them: a request is recognised by
        its text before the step.
        """
        pairs = zip(texts, emitted, strict=True)
        places = [self.recognise(text[: len(text) - len(own)]) for text, own in pairs]
        kept = [place for place in places if place is not None]
        before = self.req_indices[kept]
        if self.packed is not None and kept:
            known = zip(emitted, places, strict=True)
            counts = torch.tensor([len(own) for own, place in known if place is not None])
            step = accepted(self.packed.max_depth, counts)
            self.history = self.history.observe(before, only(self.packed, kept), step)
        free = set(range(len(self.history.generation))) - set(before.tolist())
        free = sorted(free, reverse=True)
        indices = [free.pop() if p is None else int(self.req_indices[p]) for p in places]
        new = [index for index, p in zip(indices, places, strict=True) if p is None]
        self.history = self.history.reset(torch.tensor(new).long())
        self.req_indices = torch.tensor(indices, dtype=torch.int64)
        self.places, self.packed = {}, None
        for place, text in enumerate(texts):
            self.places.setdefault(key(text), []).append(place)

    def recognise(self, before: NDArray[np.int32]) -> int | None:
        """The place in the last step's batch of the request with this text; None: a new one."""
        places = self.places.get(key(before))
        return places.pop() if places else None


VERSION = "0.33.0"
EXPECTED = {
    "record_confidences": "(self, confidence_probs, input_batch)",
    "get_num_tokens": "(self, num_tokens_per_req, draft_tokens)",
}
"""Methods of its ``AdaptiveVerificationManager`` that are wrapped, all public."""


def register() -> None:
    """Entry point of ``vllm.general_plugins``: our figures in its adaptive verification.

    Confidences are calibrated as they enter, so that vLLM's choice of how many drafts a step
    verifies and its ranking of which both read them; step costs are those of ``ECHO_COST``. In
    another release, or where its methods have changed, the engine stays as it was, and the log
    says why.
    """
    from vllm.v1.worker.gpu.spec_decode import adaptive_verification

    manager = adaptive_verification.AdaptiveVerificationManager
    changed = unsupported(manager)
    if changed:
        logging.getLogger("echo_vllm").error("vLLM stays as it is: %s", "; ".join(changed))
        return
    record, budget = map(inspect.unwrap, (manager.record_confidences, manager.get_num_tokens))
    policies: dict[int, echo.ElasticBudgetScheduler] = {}

    @functools.wraps(record)
    def record_confidences(self: Any, confidence_probs: Tensor, input_batch: Any) -> Any:
        steps = confidence_probs.shape[1]
        policy = policies.setdefault(steps, scheduler(steps))
        return record(self, calibrated(policy, confidence_probs), input_batch)

    @functools.wraps(budget)
    def get_num_tokens(self: Any, num_tokens_per_req: Any, draft_tokens: Any) -> int:
        steps = self.num_speculative_steps
        policy = policies.setdefault(steps, scheduler(steps))
        self.cost_tables = cost_tables(policy, len(num_tokens_per_req), self.cost_tables)
        return budget(self, num_tokens_per_req, draft_tokens)

    manager.record_confidences, manager.get_num_tokens = record_confidences, get_num_tokens


def unsupported(manager: Any) -> list[str]:
    """What :func:`register` needs and vLLM or its ``manager`` does not have as expected."""
    from vllm.version import __version__ as version

    release = version.partition("+")[0].partition(".post")[0]
    changed = [] if release == VERSION else [f"version: expected {VERSION}, got {version}"]
    found = {name: getattr(manager, name, None) for name in EXPECTED}
    got = {
        name: None if method is None else f"({', '.join(inspect.signature(method).parameters)})"
        for name, method in found.items()
    }
    return changed + [
        f"{name}: expected {wanted}, got {got[name]}"
        for name, wanted in EXPECTED.items()
        if got[name] != wanted
    ]


def calibrated(policy: echo.ElasticBudgetScheduler, confidences: Tensor) -> Tensor:
    """Probabilities of each draft given those before it, as measured. Sync-free.

    Args:
        policy: of chains, whose rule's calibration counts.
        confidences: float32 [B, depth], as the drafter says.
    """
    if getattr(policy.rule, "reliability", None) is None:
        return confidences
    batch, depth = confidences.shape
    roots = confidences.new_zeros(batch, dtype=torch.int64)
    tree = policy.begin(roots, num_verify_tokens=max(1, batch * (depth + 1)))
    tokens = roots[:, None, None].expand(-1, depth, 1)
    tree = policy.grow_positions(tree, tokens, confidences.log()[..., None])
    path = policy.rule.acceptance_probability(tree)
    return (path[:, 1:] / path[:, :-1]).nan_to_num(0.0).clamp(0.0, 1.0)


def cost_tables(
    policy: echo.ElasticBudgetScheduler, num_reqs: int, measured: tuple[Any, Any]
) -> tuple[Any, Any]:
    """Milliseconds of drafting by requests and of verifying by tokens, of this batch.

    The cost model's; with a fixed budget no token beyond it pays; else those that vLLM measured.
    """
    draft, verify = measured
    tokens = np.arange(1, len(verify))
    if isinstance(policy.budget, echo.CostModel):
        seconds = policy.budget(tokens, num_reqs=max(1, num_reqs))
        each = [
            policy.budget.draft_seconds(policy.max_depth, n) if n else 0.0
            for n in range(len(draft))
        ]
        return 1e3 * np.array(each), 1e3 * np.concatenate([seconds[:1], seconds])
    if policy.budget is not None:
        wall = np.where(np.arange(len(verify)) > policy.budget, 1e12, 1.0)
        return np.zeros(len(draft)), wall
    return measured


def scheduler(depth: int) -> echo.ElasticBudgetScheduler:
    """The policy of the environment: chains of at most ``depth`` drafts, ranked over the batch."""
    names = "CALIBRATION", "COST", "VERIFY_TOKENS"
    calibration, cost, tokens = (os.environ.get(f"ECHO_{name}") for name in names)
    fitted = echo.Calibration.load(calibration) if calibration else None
    budget = int(tokens) if tokens else None
    if cost:
        budget = echo.CostModel.from_json(Path(cost).read_text())
    limit = depth + 1
    rule = echo.PerRequest(limit, 1, fitted) if budget is None else echo.GlobalRank(1, fitted)
    limits = {"max_depth": depth, "max_verify_tokens_per_req": limit}
    return echo.ElasticBudgetScheduler(rule, budget=budget, trims=bool(cost), **limits)


def lookup(text: NDArray[np.int32], depth: int) -> list[tuple[int, float]]:
    """What followed the text's longest suffix earlier: the commonest token at a time, its share."""
    for size in range(min(MAX_NGRAM, len(text) - 1), 0, -1):
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
    """A step as the history reads it, of the requests in these places.

    vLLM does not say what a request that has ended accepted.
    """
    ends = torch.cat([packed.indptr[:1], packed.indptr.diff()[places].cumsum(0, dtype=torch.int32)])
    names = "status", "acceptance_histogram", "expected"
    parts = {name: getattr(packed, name) for name in names}
    own = {name: None if part is None else part[places] for name, part in parts.items()}
    return replace(packed, indptr=ends, **own)


def accepted(depth: int, num_emitted: Tensor) -> echo.tree.Accepted:
    """``num_emitted`` int64 [B] tokens after each root; which ones is vLLM's business: -1."""
    nothing = num_emitted.new_full((len(num_emitted), depth + 1), -1)
    return echo.tree.Accepted(nothing, nothing, num_emitted, nothing[:, 0])


def key(text: NDArray[np.int32]) -> tuple[int, bytes]:
    """A text's length and end."""
    return len(text), text[-TAIL:].tobytes()
