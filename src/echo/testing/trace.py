"""Recorded drafts of a real model, at every position of the text it wrote.

Under greedy decoding the text does not depend on the policy, so any policy that expands only
recorded nodes can be replayed exactly: one that expands, at each layer, the best b <= ``beam``
nodes of its own drafts, with a different b for each layer and request.
"""

from __future__ import annotations

import itertools
import lzma
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.rules import GlobalRank, order, top_k
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.gating.logs import write_atomically
from echo.loop import Drafter, Target, decode
from echo.tree.supertree import DEAD_SCORE, Frontier, Layer

VERSION = 2
END = -1
"""Past the end of a text; also: not expanded."""
COLUMNS = ("text", "token", "log_prob", "expanded")
"""Arrays with one entry per position."""


@dataclass(frozen=True)
class Trace:
    """P positions of R texts; at each, D layers of at most E expanded nodes with k children each.

    E is larger than ``beam``: the best nodes among the children of a narrow frontier need not be
    among those of a wide one.

    Attributes:
        text: int32 [P], the token emitted at each position: root of that position's tree. Texts are
            concatenated.
        indptr: int64 [R + 1], where each text begins; its last position has no draft.
        kind: str [R], the kind of prompt that each text answers.
        limit: int32 [R], max_new_tokens of each text; a shorter text ended on its own.
        token: int32 [P, D, E, k], children of the expanded nodes of layer d (layer 0: of the root,
            e = 0).
        log_prob: float16 [P, D, E, k], their log-probabilities given their parent; -inf: none.
        expanded: int8 [P, D, E * k], each child's index e among the next layer's expanded nodes;
            -1: not expanded.
        beam: widest frontier that replays without a miss.
        floor: path log-probability below which the drafter expanded no node.

    Raises:
        EchoError: shapes that do not fit, or the first value out of range with its position.

    Example: :func:`record`.
    """

    text: NDArray[np.int32]
    indptr: NDArray[np.int64]
    kind: NDArray[Any]
    limit: NDArray[np.int32]
    token: NDArray[np.int32]
    log_prob: NDArray[np.float16]
    expanded: NDArray[np.int8]
    beam: int
    floor: float

    def __post_init__(self) -> None:
        positions = self.positions
        requests = len(self.kind)
        ends = self.indptr[[0, -1]].tolist()
        if self.indptr.shape != (requests + 1,) or ends != [0, positions]:
            want = f"expected {requests + 1} values from 0 to {positions}"
            raise EchoError(f"indptr: {want}, got {self.indptr.tolist()[:8]}")
        lengths = np.diff(self.indptr)
        if self.limit.shape != (requests,) or (lengths < 1).any() or (lengths > self.limit).any():
            want = f"expected {requests} texts of 1 to limit tokens"
            raise EchoError(f"limit, indptr: {want}, got lengths {lengths.tolist()[:8]}")
        shape = self.token.shape
        if len(shape) != 4 or shape[0] != positions or shape != self.log_prob.shape:
            want = f"expected two arrays [{positions}, D, E, k]"
            raise EchoError(f"token, log_prob: {want}, got {shape} and {self.log_prob.shape}")
        _, depth, width, k = shape
        checks.integer_field(self, "beam", 1, width)
        if self.expanded.shape != (positions, depth, width * k):
            want = f"expected [{positions}, {depth}, {width * k}]"
            raise EchoError(f"expanded: {want}, got {self.expanded.shape}")
        outside = (self.expanded < END) | (self.expanded >= width)
        refused = {"text": self.text < 0, "log_prob": ~(self.log_prob <= 0.01), "expanded": outside}
        for name, bad in refused.items():
            if bad.any():
                at = tuple(int(i) for i in np.argwhere(bad)[0])
                got = f"{getattr(self, name)[at]} at position {at[0]}, index {at[1:]}"
                raise EchoError(f"{name}: expected a value in range, got {got}")

    @property
    def positions(self) -> int:
        """P, number of positions."""
        return len(self.text)

    @property
    def depth(self) -> int:
        """D, number of recorded layers."""
        return int(self.token.shape[1])

    @property
    def following(self) -> NDArray[np.int32]:
        """int32 [P, D + 1]: the target's next tokens after each position; -1 past its text."""
        ends = np.repeat(self.indptr[1:], np.diff(self.indptr))
        after = np.arange(self.positions)[:, None] + np.arange(1, self.depth + 2)
        tokens = self.text[np.minimum(after, self.positions - 1)]
        return np.where(after < ends[:, None], tokens, np.int32(END))

    @property
    def rank(self) -> NDArray[np.int8]:
        """int8 [P, D]: rank of the target's d-th next token among the drafts after those before it.

        -1: expanded, but the target's token was not among the k; -2: nothing was drafted there, or
        the text ends.
        """
        at = np.arange(self.positions)
        node = np.zeros(self.positions, np.int64)
        following = self.following
        k = self.token.shape[3]
        rank = np.full((self.positions, self.depth), -2, np.int8)
        for d in range(self.depth):
            log_prob = self.log_prob[at, d, node]
            known = np.isfinite(log_prob)
            drafted = (node >= 0) & known.any(axis=1) & (following[:, d] >= 0)
            hits = (self.token[at, d, node] == following[:, d, None]) & known & drafted[:, None]
            child = hits.argmax(axis=1)
            found = hits.any(axis=1)
            best_first = (-log_prob).argsort(axis=1, kind="stable")
            better = (best_first == child[:, None]).argmax(axis=1)
            rank[:, d] = np.where(found, better, np.where(drafted, -1, -2))
            node = np.where(found, self.expanded[at, d, np.maximum(node, 0) * k + child], -1)
        return rank

    def texts(self, chosen: Sequence[int]) -> Trace:
        """Return the trace of the ``chosen`` texts, indices from 0, in that order."""
        at = np.concatenate([np.arange(self.indptr[i], self.indptr[i + 1]) for i in chosen])
        columns: dict[str, Any] = {name: getattr(self, name)[at] for name in COLUMNS}
        columns |= {name: getattr(self, name)[list(chosen)] for name in ("kind", "limit")}
        lengths = np.diff(self.indptr)[list(chosen)]
        return replace(self, indptr=np.concatenate([[0], lengths.cumsum()]), **columns)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the npz file ``path`` atomically: recorded nodes only, LZMA-compressed."""
        recorded = np.isfinite(self.log_prob).any(axis=3)
        columns: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        columns |= {"version": VERSION, "shape": self.token.shape}
        columns |= {"recorded": np.packbits(recorded), "expanded": _compress(self.expanded)}
        pairs = self.log_prob[recorded][..., None].view(np.uint8)
        halves = np.moveaxis(pairs, -1, 0)  # bytes, which compress better apart
        columns |= {"token": _compress(self.token[recorded]), "log_prob": _compress(halves)}
        with write_atomically(path) as handle:
            np.savez_compressed(handle, **columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Read the ``path`` that :meth:`save` wrote.

        Raises:
            EchoError: not a trace, of another version, truncated, or a value out of range.
        """
        expected = checks.reading(f"path: expected a trace in {path}")
        with expected, open(path, "rb") as handle, np.load(handle) as file:
            if int(file["version"]) != VERSION:
                want = f"expected a trace of version {VERSION}"
                raise EchoError(f"path: {want}, got version {int(file['version'])}")
            columns: dict[str, Any] = {f.name: file[f.name] for f in fields(cls)}
            shape = tuple(int(n) for n in file["shape"])
            bits = np.unpackbits(file["recorded"], count=math.prod(shape[:3]))
            recorded = bits.astype(bool).reshape(shape[:3])
            nodes = int(recorded.sum()), shape[3]
            token = np.zeros(shape, np.int32)
            log_prob = np.full(shape, -np.inf, np.float16)
            token[recorded] = _decompress(columns["token"]).view(np.int32).reshape(nodes)
            pairs = np.moveaxis(_decompress(columns["log_prob"]).reshape(2, *nodes), 0, -1)
            log_prob[recorded] = np.ascontiguousarray(pairs).view(np.float16)[..., 0]
            expanded = _decompress(columns["expanded"]).view(np.int8)
        columns |= {"token": token, "log_prob": log_prob}
        columns["expanded"] = expanded.reshape(shape[0], shape[1], -1)
        columns |= {"beam": int(columns["beam"]), "floor": float(columns["floor"])}
        return cls(**columns)


def _compress(values: NDArray[Any]) -> NDArray[np.uint8]:
    data = np.ascontiguousarray(values).tobytes()
    return np.frombuffer(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME), np.uint8)


def _decompress(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    # writable, as torch wants it
    return np.frombuffer(bytearray(lzma.decompress(packed.tobytes())), np.uint8)


@dataclass(frozen=True)
class _Pool(GlobalRank):
    """A rule that expands every node that some narrower frontier would expand.

    Let M(v) be the smallest frontier that holds node v: the children of M(parent of v) that are no
    worse than v. A policy that expands the best b <= ``narrow`` of its drafts can reach v exactly
    if M(v) has at most ``narrow`` nodes.
    """

    narrow: int = 1
    floor: float = -math.inf
    smallest: list[Tensor] = field(default_factory=list)
    """M(v) of the last frontier, bool [B, W, W]."""

    def frontier(self, layer: Layer) -> tuple[Tensor, Tensor]:
        key = order(layer.score)
        better = key[:, None] <= key[:, :, None]  # [B, v, c]: c is no worse than v
        if layer.depth > 1:
            above = torch.arange(key.shape[1]) // (key.shape[1] // self.smallest[-1].shape[1])
            better &= self.smallest[-1][:, above][:, :, above]
        better &= torch.isfinite(layer.score)[:, None]
        reachable = (better.sum(dim=2) <= self.narrow) & (layer.score >= self.floor)
        index, active = top_k(torch.where(reachable, layer.score, DEAD_SCORE), self.beam)
        mine = better.gather(1, index[..., None].expand(-1, -1, better.shape[2]))
        mine = mine.gather(2, index[:, None].expand(-1, index.shape[1], -1))
        self.smallest[:] = [mine & active[:, None]]
        return index, active


class _Recorder:
    """A drafter that keeps a step's drafts: ``token``, ``log_prob`` and ``expanded`` by request."""

    def __init__(self, drafter: Drafter, depth: int, width: int) -> None:
        self.inner = drafter
        self.admit = drafter.admit
        self.extend = drafter.extend
        self.shape = depth, width
        self.k = 1

    def nothing(self, batch: int) -> tuple[NDArray[Any], ...]:
        """Return the columns of a step without drafts: [B, D, E, k] twice, [B, D, E * k]."""
        depth, width = self.shape
        token = np.zeros((batch, depth, width, self.k), dtype=np.int32)
        log_prob = np.full(token.shape, -np.inf, dtype=np.float16)
        return token, log_prob, np.full((batch, depth, width * self.k), END, dtype=np.int8)

    def draft(self, req_indices: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        tokens, log_probs = self.inner.draft(req_indices, frontier)
        if log_probs.dtype != torch.float16:
            want = "expected float16 log-probabilities, which a trace holds exactly"
            raise EchoError(f"drafter: {want}, got {log_probs.dtype}")
        batch, width, k = tokens.shape
        d = frontier.depth
        if d == 0:
            self.k = k
            self.columns = self.nothing(batch)
        if k != self.k:
            want = f"expected {self.k} candidates at every depth"
            raise EchoError(f"drafter: {want}, got {k} at depth {d + 1}")
        token, log_prob, expanded = self.columns
        live = frontier.active[..., None]
        token[:, d, :width] = torch.where(live, tokens, 0).numpy()
        log_prob[:, d, :width] = torch.where(live, log_probs, -torch.inf).numpy()
        if d:
            request, node = np.nonzero(frontier.active.numpy())
            expanded[request, d - 1, frontier.index.numpy()[request, node]] = node
        return tokens, log_probs


def record(
    target: Target,
    drafter: Drafter,
    prompts: Sequence[Tensor],
    kinds: Sequence[str],
    *,
    max_num_reqs: int,
    depth: int,
    beam: int,
    max_expanded: int = 24,
    floor: float = -math.inf,
    max_new_tokens: int,
    eos_token: int | None = None,
    max_verify_tokens_per_req: int | None = None,
) -> Iterator[Trace | int]:
    """Record a live greedy decode: the whole candidate pool at every position, one token a step.

    Args:
        target, drafter: a greedy pair. The drafter's state must depend only on the emitted text,
            its k must be the same at every depth, and its log-probabilities float16, so that live
            and replayed scores are the same numbers.
        prompts, kinds: int64 [length] each, and the kind of each.
        depth, beam: D, and the widest frontier to be replayed.
        max_expanded: E, maximum expanded nodes of a layer. If too small, replays have misses.
        floor: path log-probability below which the drafter expands no node; it must ensure this.
        max_num_reqs, max_new_tokens, eos_token, max_verify_tokens_per_req: as in
            :func:`echo.decode`.

    Yields:
        The number of positions recorded so far, after each step; at last the :class:`Trace`.

    Raises:
        EchoError: an argument out of range, or a drafter that violates the above.

    Example:
        >>> import tempfile
        >>> from echo.testing import TabularDrafter, TabularTarget, record, table
        >>> target, own = TabularTarget(table(9, seed=1)), table(9, seed=1)
        >>> pair = target, TabularDrafter(own, k=3, dtype=torch.float16)
        >>> options = {"max_num_reqs": 2, "depth": 2, "beam": 2, "max_new_tokens": 5}
        >>> prompts = [torch.tensor([1]), torch.tensor([2])]
        >>> *_, trace = record(*pair, prompts, ["one", "two"], **options)
        >>> trace.positions, trace.token.shape, trace.texts([1]).kind.tolist()
        (10, (10, 2, 24, 3), ['two'])
        >>> path = f"{tempfile.mkdtemp()}/trace.npz"
        >>> trace.save(path)
        >>> Trace.load(path).positions
        10
    """
    if len(kinds) != len(prompts):
        raise EchoError(f"kinds: expected one for each of {len(prompts)} prompts, got {len(kinds)}")
    depth = checks.integer("depth", depth, 1)
    beam = checks.integer("beam", beam, 1)
    widest = checks.integer("max_expanded", max_expanded, beam)
    rule = _Pool(widest, max_verify_tokens_per_req=1, narrow=beam, floor=floor)
    recorder = _Recorder(drafter, depth, widest)
    scheduler = ElasticBudgetScheduler(rule, budget=2 * max_num_reqs, max_depth=depth)
    texts: list[list[int]] = [[] for _ in prompts]
    drafts: list[list[tuple[NDArray[Any], ...]]] = [[] for _ in prompts]
    options: dict[str, Any] = {"max_num_reqs": max_num_reqs, "max_new_tokens": max_new_tokens}
    options |= {"eos_token": eos_token, "max_verify_tokens_per_req": max_verify_tokens_per_req}
    for step in decode(scheduler, target, recorder, prompts, **options):
        columns = recorder.columns if step.tree.depth else recorder.nothing(len(step.requests))
        rows = zip(step.requests, step.emitted, zip(*columns, strict=True), strict=True)
        for request, tokens, own in rows:
            texts[request] += tokens
            drafts[request].append(own)
        yield sum(map(len, texts))
    (nothing,) = zip(*recorder.nothing(1), strict=True)
    for text, steps in zip(texts, drafts, strict=True):
        steps[len(text) - 1 :] = [nothing]
    each = zip(*itertools.chain(*drafts), strict=True)
    token, log_prob, expanded = (np.stack(column) for column in each)
    whole = np.array([*itertools.chain(*texts)], dtype=np.int32)
    limit = np.full(len(texts), max_new_tokens, dtype=np.int32)
    indptr = np.cumsum([0, *map(len, texts)])
    yield Trace(whole, indptr, np.array(kinds), limit, token, log_prob, expanded, beam, floor)
