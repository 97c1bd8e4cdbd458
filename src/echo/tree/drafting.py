"""From a drafter's logits to the candidates that ``grow``, ``begin`` or ``grow_positions`` take.

B requests, W nodes of a frontier, k candidates of a node, V tokens of the drafter's vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError


def candidates(logits: Tensor, k: int, *, d2t: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the k likeliest tokens and their log-probabilities, in the target's vocabulary.

    ==========================================  ==================================================
    logits                                      what takes the candidates
    ==========================================  ==================================================
    [B, W, V], of a frontier's nodes            ``scheduler.grow(tree, *candidates(logits, k))``
    [B, V], of the previous draft extend        ``scheduler.begin(roots, first_layer=...)``
    [B, D, V], of MTP heads, a block drafter    ``scheduler.grow_positions(tree, ...)``
    ==========================================  ==================================================

    Args:
        logits: float [..., V]; -inf excludes a token, such as one that a grammar forbids.
        k: at most V.
        d2t: int64 [V], for a drafter with a reduced vocabulary: the offset from each of its tokens
            to the target's, as stored in EAGLE-3 checkpoints. Tokens outside the vocabulary are
            missing from the softmax, so calibrate.

    Returns:
        Tokens int64 [..., k], likeliest first (ties in any order), and log-probabilities float32
        [..., k].

    Raises:
        EchoError: shapes or dtypes that do not fit, or k out of range.

    Example:
        >>> logits, d2t = torch.tensor([[0.0, 2.0, 1.0]]), torch.tensor([0, 10, 20])
        >>> tokens, log_probs = candidates(logits, 2, d2t=d2t)
        >>> tokens.tolist(), (100 * log_probs.exp()).int().tolist()
        ([[11, 22]], [[66, 24]])
    """
    tokens, values, total = _best(logits, k)
    if d2t is not None:
        checks.tensor("d2t", d2t, [logits.shape[-1]], torch.int64, logits.device)
        tokens = tokens + d2t[tokens]
    return tokens, torch.where(values == -torch.inf, values, values - total)


def sharded_candidates(
    logits: Tensor, k: int, first_token: int, all_gather: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """As :func:`candidates`, for a vocabulary that is sharded over tensor-parallel ranks.

    All ranks compute the same bits from the same gathered message, so each can plan by itself and
    no plan is broadcast. A rank sends 8k + 4 bytes per node instead of its logits.

    Args:
        logits: float [..., V / ranks], this rank's shard.
        k: at most the size of the shard.
        first_token: the shard's first token.
        all_gather: takes int32 [..., 2k + 1] and returns the messages of all ranks, [ranks, ...],
            in the same order on every rank. It may be part of a CUDA graph, as NCCL's is.

    Returns:
        Tokens int64 [..., k], likeliest first (ties alike on all ranks), and log-probabilities
        float32 [..., k].

    Raises:
        EchoError: shapes or dtypes that do not fit, or k out of range.

    Example:
        >>> parts = torch.tensor([[0.0, 2.0]]), torch.tensor([[3.0, 1.0]])
        >>> sent = []
        >>> for rank, part in enumerate(parts):  # one process here; in reality, one call per rank
        ...     keep = lambda message: (sent.append(message), torch.stack(sent))[1]
        ...     tokens, _ = sharded_candidates(part, 2, 2 * rank, keep)
        >>> tokens.tolist()
        [[2, 1]]
    """
    own, values, total = _best(logits, k)
    first_token = checks.integer("first_token", first_token, 0)
    bits = torch.cat([values, total], dim=-1).view(torch.int32)
    message = all_gather(torch.cat([bits, (own + first_token).int()], dim=-1))
    checks.tensor("all_gather()", message, ["ranks", *logits.shape[:-1], 2 * k + 1], torch.int32)
    by_rank = message.movedim(0, -2)
    numbers = by_rank[..., : k + 1].contiguous().view(torch.float32)
    whole = numbers[..., k].logsumexp(-1, keepdim=True)
    ids = by_rank[..., k + 1 :].flatten(-2).long()
    scores = numbers[..., :k].flatten(-2)
    order = ids.argsort(dim=-1)  # by token: ranks may hold shards in any order
    best = scores.gather(-1, order).argsort(dim=-1, descending=True, stable=True)[..., :k]
    place = order.gather(-1, best)
    scores = scores.gather(-1, place)
    return ids.gather(-1, place), torch.where(scores == -torch.inf, scores, scores - whole)


def _best(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k best tokens and their logits [..., k], and the log-sum-exp of all [..., 1]."""
    if not isinstance(logits, Tensor) or logits.dtype not in checks.FLOATS or not logits.dim():
        got = f"{logits.dtype} {list(logits.shape)}" if isinstance(logits, Tensor) else logits
        raise EchoError(f"logits: expected a float tensor [..., V], got {got}")
    k = checks.integer("k", k, 1, logits.shape[-1])
    exact = logits.detach().float()
    values, tokens = exact.topk(k, dim=-1)
    return tokens, values, exact.logsumexp(-1, keepdim=True)
