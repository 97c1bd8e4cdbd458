"""Recorded drafts of a real model, at every position of the text it wrote.

Under greedy decoding the text does not depend on the policy. So if at every output position the drafted pool and the text are
recorded, any policy that drafts on no more than what was recorded can be replayed exactly.

What is recorded is closed under narrower frontiers: a policy may draft, at each layer, on the best b <= ``beam`` of the nodes that
it has drafted itself, with another b for each layer and request, and never meets a node without a record.
"""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.rules import order, top_k
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.gating.logs import write_atomically
from echo.loop import Drafter, Target, decode
from echo.tree.supertree import DEAD_SCORE, Frontier, Layer, SuperTree

VERSION = 2
END = -1
"""Beyond the end of a text, and: not expanded."""


@dataclass(frozen=True)
class Trace:
    """P positions of R texts; at each, D layers of at most E expanded nodes with k drafted children each.

    E is larger than ``beam``: the best nodes among the children of a narrow frontier need not be among those of a wide one.

    Attributes:
        text: int32 [P], the token emitted at each position: root of that position's tree. Texts lie one after another.
        indptr: int64 [R + 1], where each text begins; its last position is its last token and has no draft.
        kind: str [R], what kind of prompt each text answers.
        limit: int32 [R], tokens that each answer might have had; a shorter text ended by itself.
        token: int32 [P, D, E, k], children of the expanded nodes of layer d (layer 0: of the root, in place e = 0).
        log_prob: float16 [P, D, E, k], their log-probabilities given their parent; -inf: none.
        expanded: int8 [P, D, E * k], for each child its place e among the next layer's expanded nodes; -1: it was not drafted on.
        beam: widest frontier that replays without a miss.
        floor: path log-probability below which the drafter drafted on no node.
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
        positions, requests = len(self.text), len(self.kind)
        if (
            self.indptr.shape != (requests + 1,)
            or self.indptr[0] != 0
            or self.indptr[-1] != positions
        ):
            raise EchoError(
                f"indptr: expected {requests + 1} values from 0 to {positions}, got {self.indptr.tolist()[:8]}"
            )
        lengths = np.diff(self.indptr)
        if self.limit.shape != (requests,) or (lengths < 1).any() or (lengths > self.limit).any():
            raise EchoError(
                f"limit, indptr: expected {requests} texts of 1 to limit tokens, got lengths {lengths.tolist()[:8]}"
            )
        if (
            self.token.ndim != 4
            or self.token.shape[0] != positions
            or self.token.shape != self.log_prob.shape
        ):
            raise EchoError(
                f"token, log_prob: expected two arrays [{positions}, D, E, k], got {self.token.shape} and {self.log_prob.shape}"
            )
        _, depth, places, k = self.token.shape
        checks.integer_field(self, "beam", 1, places)
        if self.expanded.shape != (positions, depth, places * k):
            raise EchoError(
                f"expanded: expected [{positions}, {depth}, {places * k}], got {self.expanded.shape}"
            )
        for name, bad in {
            "text": self.text < 0,
            "log_prob": ~(self.log_prob <= 0.01),
            "expanded": (self.expanded < END) | (self.expanded >= places),
        }.items():
            if bad.any():
                place = tuple(int(i) for i in np.argwhere(bad)[0])
                raise EchoError(
                    f"{name}: expected a value in range, got {getattr(self, name)[place]} at position {place[0]}, index {place[1:]}"
                )

    @property
    def positions(self) -> int:
        """P."""
        return len(self.text)

    @property
    def depth(self) -> int:
        """D, layers recorded."""
        return int(self.token.shape[1])

    @property
    def following(self) -> NDArray[np.int32]:
        """int32 [P, D + 1]: the target's next tokens after each position; -1 beyond the end of its text."""
        ends = np.repeat(self.indptr[1:], np.diff(self.indptr))
        after = np.arange(self.positions)[:, None] + np.arange(1, self.depth + 2)
        return np.where(
            after < ends[:, None], self.text[np.minimum(after, self.positions - 1)], np.int32(END)
        )

    @property
    def rank(self) -> NDArray[np.int8]:
        """int8 [P, D]: the place of the target's d-th next token among the drafts after the d - 1 before it, by probability.

        -1: drafted on, and the target's token was not among the k; -2: nothing was drafted there, or the text ends. So
        ``(rank[:, d] == 0).sum() / (rank[:, d] >= -1).sum()`` is the draft's conditional acceptance on the target's path at depth d + 1.
        """
        at, place = np.arange(self.positions), np.zeros(self.positions, np.int64)
        following, k = self.following, self.token.shape[3]
        rank = np.full((self.positions, self.depth), -2, np.int8)
        for d in range(self.depth):
            log_prob = self.log_prob[at, d, place]
            drafted = (place >= 0) & np.isfinite(log_prob).any(axis=1) & (following[:, d] >= 0)
            hits = (
                (self.token[at, d, place] == following[:, d, None])
                & np.isfinite(log_prob)
                & drafted[:, None]
            )
            child, found = hits.argmax(axis=1), hits.any(axis=1)
            best_first = (-log_prob).argsort(axis=1, kind="stable")
            better = (best_first == child[:, None]).argmax(axis=1)
            rank[:, d] = np.where(found, better, np.where(drafted, -1, -2))
            place = np.where(found, self.expanded[at, d, np.maximum(place, 0) * k + child], -1)
        return rank

    def texts(self, chosen: Sequence[int]) -> Trace:
        """The trace of the ``chosen`` texts, numbers from 0, in that order."""
        rows = np.concatenate([np.arange(self.indptr[i], self.indptr[i + 1]) for i in chosen])
        columns: dict[str, Any] = {
            name: getattr(self, name)[rows] for name in ("text", "token", "log_prob", "expanded")
        }
        columns |= {name: getattr(self, name)[list(chosen)] for name in ("kind", "limit")}
        return replace(
            self,
            indptr=np.concatenate([[0], np.diff(self.indptr)[list(chosen)].cumsum()]),
            **columns,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the npz ``path`` in one atomic move. Recorded nodes alone are stored, and the large arrays LZMA-compressed."""
        recorded = np.isfinite(self.log_prob).any(axis=3)
        names = ("kind", "indptr", "text", "limit", "beam", "floor")
        columns: dict[str, Any] = {
            "version": np.array(VERSION),
            **{name: np.asarray(getattr(self, name)) for name in names},
        }
        columns |= {
            "recorded": np.packbits(recorded),
            "shape": np.array(self.token.shape),
            "expanded": _shrink(self.expanded),
        }
        columns |= {
            "token": _shrink(self.token[recorded]),
            "log_prob": _shrink(_planes(self.log_prob[recorded])),
        }
        with write_atomically(path) as handle:
            np.savez_compressed(handle, **columns)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Trace:
        """Reads the ``path`` that :meth:`save` wrote.

        Raises:
            EchoError: not a trace, of another version, truncated, or the first value out of range with its position.
        """
        with (
            checks.reading(f"path: expected a trace in {path}"),
            open(path, "rb") as handle,
            np.load(handle) as file,
        ):
            if int(file["version"]) != VERSION:
                raise EchoError(
                    f"path: expected a trace of version {VERSION}, got version {int(file['version'])}"
                )
            columns: dict[str, Any] = {f.name: file[f.name] for f in fields(cls)}
            shape = tuple(int(n) for n in file["shape"])
            recorded = (
                np.unpackbits(file["recorded"], count=math.prod(shape[:3]))
                .astype(bool)
                .reshape(shape[:3])
            )
            nodes = int(recorded.sum()), shape[3]
            token, log_prob = np.zeros(shape, np.int32), np.full(shape, -np.inf, np.float16)
            token[recorded] = _grow(columns["token"]).view(np.int32).reshape(nodes)
            planes = _grow(columns["log_prob"]).reshape(2, *nodes)
            log_prob[recorded] = np.ascontiguousarray(np.moveaxis(planes, 0, -1)).view(np.float16)[
                ..., 0
            ]
            columns["expanded"] = (
                _grow(columns["expanded"]).view(np.int8).reshape(shape[0], shape[1], -1)
            )
        columns |= {
            "beam": int(columns["beam"]),
            "floor": float(columns["floor"]),
            "token": token,
            "log_prob": log_prob,
        }
        return cls(**columns)


def _planes(values: NDArray[np.float16]) -> NDArray[np.uint8]:
    """High bytes apart from low bytes, [2, ...]: they compress better so."""
    return np.moveaxis(values.view(np.uint8).reshape(*values.shape, 2), -1, 0)


def _shrink(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(
        lzma.compress(np.ascontiguousarray(values).tobytes(), preset=9 | lzma.PRESET_EXTREME),
        np.uint8,
    )


def _grow(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.frombuffer(
        bytearray(lzma.decompress(packed.tobytes())), np.uint8
    )  # writable, as torch wants it


class _Pool:
    """Drafts on every node that some narrower frontier would draft on, and verifies none.

    Let M(v) be the smallest frontier that holds node v: of the children of M(parent of v), those no worse than v. A policy that keeps
    the best b <= beam of what it drafted can come to v exactly where M(v) has at most ``beam`` nodes.
    """

    def __init__(self, beam: int, places: int, floor: float) -> None:
        self.beam, self.beam, self.floor = (
            checks.integer("beam", beam, 1),
            checks.integer("places", places, beam),
            floor,
        )
        self.smallest = torch.empty(0)

    def frontier(self, layer: Layer) -> tuple[Tensor, Tensor]:
        key = order(layer.score)
        better = key[:, None] <= key[:, :, None]  # [B, v, c]: c is no worse than v
        if layer.depth > 1:
            width = self.smallest.shape[1]
            above = torch.arange(layer.score.shape[1]).div(
                layer.score.shape[1] // width, rounding_mode="floor"
            )
            better &= self.smallest[:, above][:, :, above]
        better &= torch.isfinite(layer.score)[:, None]
        reachable = (better.sum(dim=2) <= self.beam) & (layer.score >= self.floor)
        index, active = top_k(torch.where(reachable, layer.score, DEAD_SCORE), self.beam)
        rows = better.gather(1, index[..., None].expand(-1, -1, better.shape[2]))
        self.smallest = (
            rows.gather(2, index[:, None].expand(-1, index.shape[1], -1)) & active[:, None]
        )
        return index, active

    def commit(
        self, layer: Layer, passed: Tensor, limits: Tensor, num_remaining: Tensor
    ) -> Tensor | None:
        return None

    def select(
        self, tree: SuperTree, limits: Tensor, num_remaining: Tensor, num_verify_tokens: int
    ) -> Tensor:
        return torch.zeros_like(tree.forest.committed)

    def default_budget(self, batch: int) -> int | None:
        return None

    def acceptance_probability(self, tree: SuperTree) -> Tensor:
        return tree.forest.score.exp()


class _Watch:
    """A drafter that keeps what it drafted in the step under way."""

    def __init__(self, drafter: Drafter) -> None:
        self.inner = drafter
        self.admit, self.extend = drafter.admit, drafter.extend
        self.layers: list[tuple[Frontier, Tensor, Tensor]] = []
        self.k = 1

    def draft(self, slots: Tensor, frontier: Frontier, /) -> tuple[Tensor, Tensor]:
        tokens, log_probs = self.inner.draft(slots, frontier)
        if log_probs.dtype != torch.float16:
            raise EchoError(
                f"drafter: expected float16 log-probabilities, which a trace holds exactly, got {log_probs.dtype}"
            )
        self.layers = [*(self.layers if frontier.depth else []), (frontier, tokens, log_probs)]
        self.k = tokens.shape[2]
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
    places: int = 24,
    floor: float = -math.inf,
    max_new_tokens: int,
    eos_token: int | None = None,
    max_verify_tokens_per_req: int | None = None,
) -> Iterator[Trace | int]:
    """Records a live greedy decode: the whole pool is drafted at every position, and one token a step is emitted.

    Args:
        target, drafter: a greedy pair. The drafter's state must depend on the emitted text alone, its k must be the same at every
            depth, and its log-probabilities float16, so that live and replayed scores are the same numbers.
        prompts: int64 [length] each.
        kinds: what kind each prompt is.
        max_num_reqs: requests decoded together.
        depth, beam: layers drafted, and the widest frontier that is to be replayed.
        places: E, nodes of a layer that are drafted on at most. Too few, and replays miss some.
        floor: path log-probability below which the drafter drafts on no node (it must do so by itself).
        max_new_tokens, eos_token, max_verify_tokens_per_req: as in :func:`echo.decode`.

    Yields:
        The positions recorded so far, an int after each step; at last the :class:`Trace`.

    Raises:
        EchoError: an argument out of range, or a drafter that does not keep to the above.
    """
    if len(kinds) != len(prompts):
        raise EchoError(f"kinds: expected one for each of {len(prompts)} prompts, got {len(kinds)}")
    depth = checks.integer("depth", depth, 1)
    pool, watch = (
        ElasticBudgetScheduler(
            _Pool(beam, places, floor), budget=2 * max_num_reqs, max_depth=depth
        ),
        _Watch(drafter),
    )
    texts: list[list[int]] = [[] for _ in prompts]
    drafts: list[list[tuple[NDArray[Any], ...]]] = [[] for _ in prompts]
    options: dict[str, Any] = {
        "max_num_reqs": max_num_reqs,
        "max_new_tokens": max_new_tokens,
        "eos_token": eos_token,
        "max_verify_tokens_per_req": max_verify_tokens_per_req,
    }
    for step in decode(pool, target, watch, prompts, **options):
        columns = _columns(
            watch.layers[: step.tree.depth], len(step.requests), depth, places, watch.k
        )
        for b, (request, tokens) in enumerate(zip(step.requests, step.emitted, strict=True)):
            texts[request] += tokens
            drafts[request].append(tuple(column[b] for column in columns))
        yield sum(map(len, texts))
    nothing = _columns([], 1, depth, places, watch.k)
    rows = [
        row
        for text, steps in zip(texts, drafts, strict=True)
        for row in [*steps[: len(text) - 1], tuple(c[0] for c in nothing)]
    ]
    token, log_prob, expanded = (np.stack(column) for column in zip(*rows, strict=True))
    yield Trace(
        text=np.array([token for text in texts for token in text], dtype=np.int32),
        indptr=np.concatenate([[0], np.cumsum([len(text) for text in texts])]),
        kind=np.array(kinds),
        limit=np.full(len(texts), max_new_tokens, dtype=np.int32),
        token=token,
        log_prob=log_prob,
        expanded=expanded,
        beam=beam,
        floor=floor,
    )


def _columns(
    layers: list[tuple[Frontier, Tensor, Tensor]], batch: int, depth: int, places: int, k: int
) -> tuple[NDArray[Any], ...]:
    """``token``, ``log_prob`` and ``expanded`` of one step: [B, D, E, k] twice, [B, D, E * k]."""
    token = np.zeros((batch, depth, places, k), dtype=np.int32)
    log_prob = np.full(token.shape, -np.inf, dtype=np.float16)
    expanded = np.full((batch, depth, places * k), END, dtype=np.int8)
    for d, (frontier, tokens, log_probs) in enumerate(layers):
        if tokens.shape[2] != k:
            raise EchoError(
                f"drafter: expected {k} candidates at every depth, got {tokens.shape[2]} at depth {d + 1}"
            )
        live = frontier.active[..., None]
        token[:, d, : tokens.shape[1]] = torch.where(live, tokens, 0).numpy()
        log_prob[:, d, : tokens.shape[1]] = torch.where(live, log_probs, -torch.inf).numpy()
        if d:
            request, place = np.nonzero(frontier.active.numpy())
            expanded[request, d - 1, frontier.index.numpy()[request, place]] = place
    return token, log_prob, expanded
