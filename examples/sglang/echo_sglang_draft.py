"""A step's plan, made inside SGLang's draft: its draft graph where it has one.

SGLang's draft steps leave chains' probabilities and trees' candidates; what follows them is scored,
gated and packed in the same captured region, into a workspace. B requests, L lanes, k = ``topk``,
n = ``draft_token_num``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import echo_sglang_ragged as ragged
import torch
from torch import Tensor

import echo
from echo.tree import layouts

ROWS = "tokens", "parent", "depth", "request", "mask", "score", "node", "committed"
columns: list[Tensor] | None = None
"""Probabilities of a chain's drafts so far; None: no ``EagleDraftWorker`` drafts just now."""


class Plan:
    """The step's plan at fixed addresses, as SGLang's draft graphs of every size write it.

    :meth:`start` sets what the graphs read, :meth:`draw` is what they capture, :meth:`packed` cuts
    the step out of what they have written.
    """

    def __init__(
        self, policy: echo.ElasticBudgetScheduler, max_num_reqs: int, n: int, device: Any
    ) -> None:
        lanes = -(-max_num_reqs // 64) * 64  # captured sizes are multiples of the ranks
        self.space = echo.Workspace(
            policy, lanes, k=policy.rule.beam, num_verify_tokens=lanes * n,
            max_num_reqs=max_num_reqs, device=device,
        )  # fmt: skip
        self.roots = torch.zeros(lanes, dtype=torch.int64, device=device)
        self.lane, self.batch = torch.arange(lanes, device=device), self.roots.new_zeros(())
        self.drawn: dict[int, echo.PackedTree] = {}  # by depth, the largest: views of the workspace

    def start(self, bonus_tokens: Tensor, num_verify_tokens: int) -> None:
        """Before the draft: roots [B], and the step's verify tokens."""
        self.roots[: len(bonus_tokens)].copy_(bonus_tokens)
        self.batch.fill_(len(bonus_tokens))
        self.space.set_num_verify_tokens(max(1, num_verify_tokens))

    def draw(
        self, parents: Tensor | None, scores: Tensor, tokens: Tensor, depth: int, n: int,
        sync: Callable[[Tensor], Tensor] | None = None,
    ) -> None:  # fmt: skip
        """Grows and packs what is drafted already, gates and commits included.

        Lanes beyond the step's requests are empty.

        Args:
            parents: int64 [L, blocks], the candidate that a block of k follows, -1: the root; None:
                chains.
            scores, tokens: float and int64 [L, T], path probabilities and tokens, block by block;
                of chains each draft's own, given those before it.
            depth: layers to grow.
            n: rows of a request at most.
            sync: brings rank 0's plan, which all tensor-parallel ranks follow.
        """
        space, roots = self.space, self.roots[: len(tokens)]
        live, limits = self.lane[: len(roots)] < self.batch, torch.full_like(roots, n)
        tree = space.begin(roots, live=live, verify_limits=limits)
        log = scores.float().clamp(min=torch.finfo(torch.float32).tiny).log()
        if parents is None:
            for token, log_prob in zip(tokens.unbind(1), log.unbind(1), strict=True):
                tree = space.grow(tree, token[:, None, None], log_prob[:, None, None])
        else:
            k = scores.shape[1] // parents.shape[1]
            node = torch.full_like(tree.frontier.token, -1)
            for _ in range(depth):
                follows = parents[:, None] == node[..., None]
                block = follows.int().argmax(dim=-1, keepdim=True)
                below = (block * k + torch.arange(k, device=block.device)).flatten(1)
                above = torch.where(node < 0, 0.0, log.gather(1, node.clamp(min=0)))
                log_probs = log.gather(1, below).view(*node.shape, k) - above[..., None]
                log_probs = torch.where(follows.any(dim=-1, keepdim=True), log_probs, -torch.inf)
                tree = space.grow(tree, tokens.gather(1, below).view(log_probs.shape), log_probs)
                node = below.gather(1, tree.frontier.index)
        packed = space.pack(tree, len(roots) * n, sync=sync)
        if depth not in self.drawn or packed.batch > self.drawn[depth].batch:
            self.drawn[depth] = packed

    def packed(self, batch: int, depth: int, num_rows: int) -> echo.PackedTree:
        """The first requests and rows of what was drawn."""
        drawn = self.drawn[depth]
        cut = {name: getattr(drawn, name)[:num_rows] for name in ROWS}
        cut |= {name: getattr(drawn, name)[:batch] for name in ("status", "invalid")}
        if drawn.expected is not None:
            names = "acceptance_histogram", "expected"
            cut |= {name: getattr(drawn, name)[:batch, :depth] for name in names}
        cut["request"] = cut["request"].clamp(max=batch)  # pads say how many lanes were captured
        return replace(drawn, **cut, indptr=drawn.indptr[: batch + 1], max_depth=depth)


def start(original: Any, worker: Any, batch: Any, **kwargs: Any) -> Any:
    """SGLang's draft of a step, whose inputs are written first."""
    planner = getattr(worker.target_worker, "echo_planner", None)
    if planner is not None and not batch.forward_mode.is_idle():
        roots, n = batch.spec_info.bonus_tokens, worker.speculative_num_draft_tokens
        rows = planner.num_rows(worker.target_worker, len(roots), n)
        planner.plan.start(roots, len(roots) * n if rows is None else rows)
    return original(worker, batch, **kwargs)


def around_draft(original: Any, worker: Any, forward_batch: Any) -> Any:
    """Between SGLang's draft steps and its verify input, in its draft graph: the plan."""
    global columns  # noqa: PLW0603
    from sglang.srt.runtime_context import get_parallel

    planner = getattr(worker.target_worker, "echo_planner", None)
    if planner is None or forward_batch.forward_mode.is_idle():
        return original(worker, forward_batch)
    own = columns = [forward_batch.spec_info.topk_p.float()]
    try:
        drafted = original(worker, forward_batch)
    finally:
        columns = None
    parents, scores, tokens = drafted[:3]
    if worker.topk == 1:
        parents, scores = None, torch.cat(own, dim=1).clamp(max=1.0)
        missing = tokens.shape[1] - scores.shape[1]
        scores = torch.nn.functional.pad(scores, (0, missing), value=1.0)  # unsaid: sure
    depth, n = worker.speculative_num_steps, worker.speculative_num_draft_tokens
    group = get_parallel().tp_group
    sync = None if group.world_size == 1 else partial(group.broadcast, src=0)
    planner.plan.draw(parents, scores, tokens, depth, n, sync)
    return drafted


def keep_probability(result: Any, next_token_logits: Tensor, *_: Any, **__: Any) -> None:
    """What SGLang leaves out where it takes a draft's likeliest token: how likely it is."""
    if columns is not None:
        columns.append(top_probability(next_token_logits))


def capture_first(original: Any, graphs: Any, size: int, *args: Any, **kwargs: Any) -> Any:
    """The same of the next chain's first token, in the captured draft extend.

    After prefill SGLang keeps it itself; without this graph it counts as sure.
    """
    model = graphs.model_runner.model
    forward = model.forward
    if not hasattr(graphs, "echo_buffer"):
        graphs.echo_buffer = torch.ones(graphs.max_bs, 1, device=graphs.device)

    def scored(*given: Any, **named: Any) -> Any:
        output = forward(*given, **named)
        graphs.echo_buffer[:size].copy_(top_probability(output.next_token_logits))
        return output

    try:
        model.forward = scored if graphs.eagle_worker.topk == 1 else forward
        return original(graphs, size, *args, **kwargs)
    finally:
        model.forward = forward


def keep_first(result: Any, graphs: Any, *_: Any, **__: Any) -> None:
    """After a replay of that graph, which has written it."""
    if graphs.eagle_worker.topk == 1:
        graphs.echo_first = graphs.echo_buffer[: len(result.next_token_logits)].clone()


def top_probability(logits: Tensor) -> Tensor:
    """Probability float32 [B, 1] of each row's likeliest token."""
    logits = logits.float()
    return (logits.amax(-1, keepdim=True) - logits.logsumexp(-1, keepdim=True)).exp()


def keep_candidates(
    original: Any, score_list: Any, token_list: Any, parents_list: Any, n: int
) -> tuple[Tensor, Tensor, Tensor]:
    """All candidates in place of EAGLE's best n - 1: what :meth:`Plan.draw` takes."""
    if columns is None or score_list[0].shape[-1] == 1:  # another worker's, or a chain
        return original(score_list, token_list, parents_list, n)
    scores = torch.cat([layer.flatten(1) for layer in score_list], dim=1)
    above = parents_list[:-1] if len(parents_list) > 1 else [parents_list[0][:, :1]]
    return torch.cat(above, dim=1), scores, torch.cat(token_list, dim=1)


def after_draft(
    original: Any, batch: Any, draft_input: Any, parents: Tensor, scores: Tensor, tokens: Tensor,
    draft_probs: Any, **kwargs: Any,
) -> Any:  # fmt: skip
    """SGLang's verify input of the drawn step: n rows a request, a chain's cut short."""
    target, n = kwargs["target_worker"], kwargs["num_draft_tokens"]
    planner = getattr(target, "echo_planner", None)
    if planner is None or batch.forward_mode.is_idle():  # another worker's, or no requests
        return original(batch, draft_input, parents, scores, tokens, draft_probs, **kwargs)
    count, depth = len(draft_input.bonus_tokens), kwargs["num_steps"]
    rows = planner.num_rows(target, count, n)
    packed = planner.plan.packed(count, depth, count * n if rows is None else rows)
    if kwargs["topk"] == 1:
        spec_info = original(batch, draft_input, parents, scores, tokens, draft_probs, **kwargs)
        ragged.cut(spec_info, packed)
    else:
        spec_info = verify_input(batch, packed, target, n, rows is None, kwargs)
    spec_info.echo_packed, spec_info.echo_tree = packed, planner.plan.space.tree(count, depth)
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
