"""What SGLang's draft leaves to the plan: chains' probabilities, trees' candidates; then the plan.

Between SGLang's draft and its verify input a step is scored, gated and packed. B requests, k =
``topk``, n = ``draft_token_num``.
"""

from __future__ import annotations

from typing import Any

import echo_sglang_ragged as ragged
import torch
from torch import Tensor

import echo
from echo.tree import layouts

columns: list[Tensor] | None = None
"""Probabilities of a chain's drafts so far; None: no ``EagleDraftWorker`` drafts just now."""


def around_draft(original: Any, worker: Any, forward_batch: Any) -> Any:
    """Between SGLang's draft steps, which its draft graphs capture.

    A tree's come back as :func:`keep_candidates` has them. A chain's with float32 [B, depth]
    probabilities in place of score indices, which are 0, 1, ... for every chain.
    """
    global columns  # noqa: PLW0603
    if forward_batch.forward_mode.is_idle():
        return original(worker, forward_batch)
    columns = [forward_batch.spec_info.topk_p.float()]
    try:
        parents, scores, tokens, draft_probs = original(worker, forward_batch)
        if worker.topk == 1:
            scores = torch.cat(columns, dim=1)
            missing = scores.new_ones(len(scores), tokens.shape[1] - scores.shape[1])
            scores = torch.cat([scores, missing], dim=1)  # what no kernel said is sure
    finally:
        columns = None
    return parents, scores, tokens, draft_probs


def keep_probability(result: Any, next_token_logits: Tensor, *_: Any, **__: Any) -> None:
    """What SGLang leaves out where it takes a draft's likeliest token: how likely it is."""
    if columns is not None:
        columns.append(top_probability(next_token_logits))


def keep_first(result: Any, graphs: Any, *_: Any, **__: Any) -> None:
    """The same of the next chain's first token, from the captured draft extend.

    After prefill SGLang keeps it itself; without this graph it counts as sure.
    """
    if graphs.eagle_worker.topk == 1:
        graphs.echo_first = top_probability(result.next_token_logits)


def top_probability(logits: Tensor) -> Tensor:
    """Probability float32 [B, 1] of each row's likeliest token."""
    logits = logits.float()
    return (logits.amax(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).exp()


def keep_candidates(
    original: Any, score_list: Any, token_list: Any, parents_list: Any, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All candidates in place of EAGLE's best n - 1: ``plan``'s parents, scores, tokens.

    It runs inside the captured draft graph, so the selection waits until the graph is over.
    """
    if columns is None or score_list[0].shape[-1] == 1:  # another worker's, or a chain
        return original(score_list, token_list, parents_list, n)
    scores = torch.cat([layer.flatten(1) for layer in score_list], dim=1)
    above = parents_list[:-1] if len(parents_list) > 1 else [parents_list[0][:, :1]]
    return torch.cat(above, dim=1), scores, torch.cat(token_list, dim=1)


def plan(
    policy: echo.ElasticBudgetScheduler, bonus_tokens: Tensor, parents: Tensor, scores: Tensor,
    tokens: Tensor, depth: int, num_verify_tokens: int, n: int,
) -> tuple[echo.SuperTree, echo.PackedTree]:  # fmt: skip
    """Grows a tree from a beam that is drafted already, gates and commits included, and packs it.

    Args:
        policy: the scheduler.
        bonus_tokens: int64 [B], the roots.
        parents: int64 [B, blocks], the candidate that a block of k follows; -1: the root.
        scores, tokens: float and int64 [B, T], path probabilities and tokens, block after block.
        depth: layers to grow.
        num_verify_tokens, n: of the step, and of a request at most.
    """
    limits, total = torch.full_like(bonus_tokens, n), max(1, num_verify_tokens)
    tree = policy.begin(bonus_tokens, verify_limits=limits, num_verify_tokens=total)
    k = scores.shape[1] // parents.shape[1]
    path = scores.float().clamp(min=torch.finfo(torch.float32).tiny).log()
    node = torch.full_like(tree.frontier.token, -1)
    for _ in range(depth):
        follows = parents[:, None] == node[..., None]
        block = follows.int().argmax(dim=-1, keepdim=True)
        below = (block * k + torch.arange(k, device=block.device)).flatten(1)
        above = torch.where(node < 0, 0.0, path.gather(1, node.clamp(min=0)))
        log_probs = path.gather(1, below).view(*node.shape, k) - above[..., None]
        log_probs = torch.where(follows.any(dim=-1, keepdim=True), log_probs, -torch.inf)
        tree = policy.grow(tree, tokens.gather(1, below).view(log_probs.shape), log_probs)
        node = below.gather(1, tree.frontier.index)
    return tree, policy.pack(tree)


def after_draft(
    original: Any, batch: Any, draft_input: Any, parents: Tensor, scores: Tensor, tokens: Tensor,
    draft_probs: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """Packs the step; then SGLang's verify input of n rows a request, a chain's cut short."""
    target, n, chain = kwargs["target_worker"], kwargs["num_draft_tokens"], kwargs["topk"] == 1
    planner = getattr(target, "echo_planner", None)
    if planner is None or batch.forward_mode.is_idle():  # another worker's, or no requests
        return original(batch, draft_input, parents, scores, tokens, draft_probs, **kwargs)
    roots = draft_input.bonus_tokens.long()
    policy, rows = planner.scheduler, planner.num_rows(target, len(roots), n)
    total = len(roots) * n if rows is None else rows
    if chain:
        tree = policy.begin(roots, verify_limits=torch.full_like(roots, n), num_verify_tokens=total)
        layers = tokens.long()[..., None], scores.clamp(max=1.0).log()[..., None]
        tree = policy.grow_positions(tree, *layers)
        packed = of_rank_0(policy.pack(tree))
        indices = torch.arange(n - 1, device=tokens.device).expand(len(roots), -1).contiguous()
        spec_info = original(batch, draft_input, parents, indices, tokens, draft_probs, **kwargs)
        ragged.cut(spec_info, packed)
    else:
        depth = min(policy.max_depth, kwargs["num_steps"])
        tree, packed = plan(policy, roots, parents, scores, tokens, depth, total, n)
        packed = of_rank_0(packed)
        spec_info = verify_input(batch, packed, target, n, rows is None, kwargs)
    spec_info.echo_packed, spec_info.echo_tree = packed, tree
    spec_info.echo_narrows = rows is not None
    return spec_info


def verify_input(
    batch: Any, packed: echo.PackedTree, target: Any, n: int, whole: bool, drafted: dict[str, Any]
) -> Any:
    """SGLang's ``EagleVerifyInput``; a mask where a pass of B * n rows, or a watermark, reads
    one.
    """
    from sglang.srt.speculative.eagle_info import EagleVerifyInput

    runner = target.model_runner
    mask = None
    if whole or runner.watermark_state is not None:
        mask = tree_mask(batch, packed, runner.attn_backend, n, drafted["tree_mask_mode"])
    links = layouts.sglang(packed, n, batch.seq_lens)
    return EagleVerifyInput(
        draft_token=links.draft_tokens, custom_mask=mask, positions=links.positions,
        retrieve_index=links.retrive_index, retrieve_next_token=links.retrive_next_token,
        retrieve_next_sibling=links.retrive_next_sibling, retrieve_cum_len=None,
        spec_steps=drafted["num_steps"], topk=drafted["topk"], draft_token_num=n,
        capture_hidden_mode=None, seq_lens_sum=None, seq_lens_cpu=None,
    )  # fmt: skip


def tree_mask(batch: Any, packed: echo.PackedTree, backend: Any, n: int, mode: Any) -> Tensor:
    """The tree mask, in the attention backend's buffer if it has one that fits."""
    buffer = backend.verify_mask
    out = buffer.buffer if buffer is not None and buffer.fits(packed.batch) else None
    mode = (mode if buffer is None else buffer.mode).name
    if mode != "FULL_MASK":
        mask = layouts.sglang_mask(packed, n, mode).flatten()
        return mask if out is None else out[: mask.numel()].copy_(mask)
    total = batch.seq_lens_sum
    total = packed.batch * backend.max_context_len if total is None else total
    size = n * (total + n * packed.batch) if out is None else out.numel()
    return layouts.sglang_mask(packed, n, mode, prefix_lens=batch.seq_lens, size=size, out=out)


def of_rank_0(packed: echo.PackedTree) -> echo.PackedTree:
    """The plan that all tensor-parallel ranks follow."""
    from sglang.srt.runtime_context import get_parallel

    group = get_parallel().tp_group
    if group.world_size == 1:
        return packed
    return echo.PackedTree.from_buffer(
        group.broadcast(packed.to_buffer(), src=0), batch=packed.batch, num_rows=packed.num_rows,
        words=packed.mask.shape[1], max_depth=packed.max_depth,
    )  # fmt: skip
