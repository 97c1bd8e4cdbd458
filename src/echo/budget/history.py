"""Acceptance history of requests, and what it predicts for the next step.

B requests of a step; R requests that a history holds; D layers at most.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import EchoError, HostInts, copy_into
from echo.kernels.codes import Status
from echo.tree.accept import Accepted
from echo.tree.packed import PackedTree
from echo.tree.supertree import DEAD_SCORE, SuperTree

KEEP = 0.95
"""Decay of a request's sums per step: a memory of about twenty steps. KEEP, MEMORY and both priors
were chosen by replay on the calibration half of the shipped trace; from half to four times each,
the mean throughput moved by at most 0.6%."""
MEMORY = 512
"""Request-steps that the sums over all requests remember."""
LEARN = 8
"""Request-steps at full depth before anything is predicted."""
PRIOR = 2.0
"""Pseudo-steps of the mean over all requests beside a request's own."""
PRIOR_DRAFTS = 4.0
"""Pseudo-count of expected drafts, at the accepted-to-expected ratio over all requests, beside a
request's own."""
BINS = 32
SKIP = 2
"""Bins of an acceptance-probability histogram, equal in sqrt(f), above SKIP uncounted ones (f <
1/289). By replay they cost 0.1% of the mean throughput compared with 64 equal bins of f; 32 equal
bins of f cost 0.2 to 0.3%, and up to 1.9% at one request. SKIP = 3 costs 2% at one request of the
dense models measured on an H100, where the last tokens are nearly free; below 2 nothing changes."""
LIKELIEST = (np.arange(BINS)[:, None] + np.arange(BINS + 1) >= BINS).astype(np.float32)
CENTERS = np.square((np.arange(BINS, dtype=np.float32) + SKIP + 0.5) / (BINS + SKIP))
TAILS = np.stack([LIKELIEST, LIKELIEST * CENTERS[:, None]])
"""float32 [2, 32, 33]: sums over the 0 to 32 likeliest bins, of their nodes and of the nodes'
probabilities."""
SUMS = ("steps", "expected", "accepted", "acceptance_histogram")


@dataclass(frozen=True)
class History:
    """Decaying sums per request, and over all at index R; immutable: methods return a new one.

    A step without drafting decays a request's sums as well: they fade toward the mean over all
    requests, so that speculation can resume.

    Attributes:
        generation: int32 [R], number of requests that each index was given to.
        steps: float32 [D, R + 1], steps in which a layer of that depth was drafted.
        acceptance_histogram: float32 [D, R + 1, 32], sum of
            :attr:`PackedTree.acceptance_histogram`.
        expected: float32 [D, R + 1], accepted drafts expected among the verified ones, by depth.
        accepted: float32 [D, R + 1], accepted drafts; over ``steps``, the survival rate by depth.
        num_unprocessed_tokens: int64 [R], tokens emitted since the last draft, to be processed by
            draft extend first.
        num_steps: steps of the batch so far; a host int.
        num_idle_steps: steps since the last one that drafted; a host int.

    Example:
        >>> history = History.empty(max_num_reqs=4, max_depth=2)
        >>> history.reset(torch.tensor([1])).generation.tolist()
        [0, 1, 0, 0]

        Nine requests with one accepted draft each:

        >>> import echo
        >>> cost, ids = echo.CostModel((1, 64), (1.0, 1.0)), torch.arange(9)
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(1), None, cost, max_depth=1)
        >>> tree = scheduler.begin(ids, num_verify_tokens=18)
        >>> tree = scheduler.grow(tree, ids[:, None, None], torch.full((9, 1, 1), -0.1))
        >>> packed = scheduler.pack(tree)
        >>> history = scheduler.history(9).observe(ids, packed, echo.accept(packed, packed.tokens))
        >>> known = history.to("cpu")
        >>> drafts, accepts = known.predict([0, 1])
        >>> drafts[0, -1].item(), round(accepts[0, -1].item(), 2)  # a draft each, both accepted
        (2.0, 2.0)
        >>> now = history.reset(ids[:1]).advance(depth=0)  # a new request, a step without drafts
        >>> now.num_idle_steps, known.without_stale(now.generation).accepted[0, :3].tolist()
        (1, [0.0, 1.0, 1.0])
    """

    generation: Tensor
    steps: Tensor
    acceptance_histogram: Tensor
    expected: Tensor
    accepted: Tensor
    num_unprocessed_tokens: Tensor
    num_steps: int = 0
    num_idle_steps: int = 0

    @classmethod
    def empty(
        cls, max_num_reqs: int, max_depth: int, device: torch.device | str = "cpu"
    ) -> History:
        """Return an empty history of R = ``max_num_reqs`` and D = ``max_depth`` on ``device``.

        Raises:
            EchoError: ``max_num_reqs`` below 1 or ``max_depth`` below 0.
        """
        reqs = checks.integer("max_num_reqs", max_num_reqs, 1)
        depth = checks.integer("max_depth", max_depth, 0)
        f32 = torch.float32
        steps, expected, accepted = torch.zeros(3, depth, reqs + 1, dtype=f32, device=device)
        return cls(
            torch.zeros(reqs, dtype=torch.int32, device=device),
            steps,
            torch.zeros(depth, reqs + 1, BINS, dtype=f32, device=device),
            expected,
            accepted,
            torch.zeros(reqs, dtype=torch.int64, device=device),
        )

    def reset(self, req_indices: Tensor, *, out: History | None = None) -> History:
        """Forget ``req_indices`` int64 [n], given to new requests. EchoError: other tensors.

        ``out``: a history to write to, which may be this one, as captured graphs need
        (``space.history = space.history.reset(ids, out=space.history)``).
        """
        checks.tensor("req_indices", req_indices, ["n"], torch.int64, self.steps.device)
        given = torch.zeros_like(self.generation).index_fill(0, req_indices, 1)
        fresh = replace(self._without(given > 0), generation=self.generation + given)
        return copy_into(out, fresh)

    def export(self, req_indices: Tensor) -> Tensor:
        """Export the history of requests that move to another index, engine or disk. Sync-free.

        Rows are plain sums: rows of several requests may be added, and :meth:`prior` turns them
        into one for new requests of their kind.

        Args:
            req_indices: int64 [n].

        Returns:
            float32 [n, 35 * D + 1], one row per request, for :meth:`restore`.

        Raises:
            EchoError: ``req_indices`` of another dtype or device.
        """
        checks.tensor("req_indices", req_indices, ["n"], torch.int64, self.steps.device)
        sums = [sums.flatten(2) if sums.dim() > 2 else sums[..., None] for sums in self._sums]
        rows = torch.cat(sums, dim=2).index_select(1, req_indices).transpose(0, 1).flatten(1)
        unprocessed = self.num_unprocessed_tokens.index_select(0, req_indices)
        return torch.cat([rows, unprocessed[:, None].float()], dim=1)

    def restore(self, req_indices: Tensor, rows: Tensor, *, out: History | None = None) -> History:
        """Give ``req_indices`` to requests with exported history; otherwise as :meth:`reset`.

        Args:
            req_indices: int64 [n].
            rows: float32 [n, 35 * D + 1], from :meth:`export`, or :meth:`prior`'s, expanded. A row
                with a negative or non-finite entry counts as empty.
            out: as in :meth:`reset`.

        Raises:
            EchoError: shapes, dtypes or devices that do not fit.

        Example:
            >>> history, ids = History.empty(max_num_reqs=4, max_depth=2), torch.tensor([1])
            >>> history.restore(torch.tensor([3]), history.export(ids)).generation.tolist()
            [0, 0, 0, 1]
        """
        fresh = self.reset(req_indices)
        depth = len(self.steps)
        n = len(req_indices)
        widths = [sums.shape[2:].numel() for sums in self._sums]
        shape = [n, depth * sum(widths) + 1]
        device = self.steps.device
        checks.tensor("rows", rows, shape, torch.float32, device)
        sound = (rows >= 0) & (rows < torch.inf)
        rows = torch.where(sound.all(dim=1, keepdim=True), rows, 0.0)
        by_depth = rows[:, :-1].view(n, depth, sum(widths)).transpose(0, 1)
        parts = torch.split(by_depth, widths, dim=2)
        columns: dict[str, Any] = {
            name: sums.index_copy(1, req_indices, part.reshape(depth, n, *sums.shape[2:]))
            for name, sums, part in zip(SUMS, fresh._sums, parts, strict=True)
        }
        unprocessed = fresh.num_unprocessed_tokens.index_copy(0, req_indices, rows[:, -1].long())
        restored = replace(fresh, **columns, num_unprocessed_tokens=unprocessed)
        return copy_into(out, restored)

    def prior(self, rows: Tensor, num_steps: float = 4.0) -> Tensor:
        """Summarize earlier requests of a kind (code, chat, a tenant) in a row for new ones.

        Args:
            rows: float32 [n, 35 * D + 1], from :meth:`export`, such as those of ended requests.
            num_steps: pseudo-steps that they count for beside the new request's own.

        Returns:
            float32 [35 * D + 1], to be expanded for :meth:`restore`: the mean of their steps by
            depth, counting for no more steps than they have.

        Raises:
            EchoError: rows of another shape or dtype, or ``num_steps`` below 0.

        Example:
            >>> history, ids = History.empty(max_num_reqs=4, max_depth=2), torch.tensor([0, 2])
            >>> code = history.prior(history.export(ids))  # by kind, kept by the engine
            >>> history = history.restore(torch.tensor([1]), code.expand(1, -1))
        """
        depth = len(self.steps)
        device = self.steps.device
        width = sum(sums.shape[2:].numel() for sums in self._sums)
        checks.tensor("rows", rows, ["n", depth * width + 1], torch.float32, device)
        sums = rows[:, :-1].sum(dim=0).view(depth, width)
        share = checks.real("num_steps", num_steps, 0.0) / sums[:, :1].clamp(min=num_steps or 1.0)
        return F.pad((sums * share).flatten(), (0, 1))

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> History:
        """Copy to ``device``; ``non_blocking`` for a copy that the host reads a step later."""
        names = ("generation", *SUMS, "num_unprocessed_tokens")
        tensors = {name: getattr(self, name) for name in names}
        copies: dict[str, Any] = {
            name: value.to(device, non_blocking=non_blocking) for name, value in tensors.items()
        }
        return replace(self, **copies)

    def without_stale(self, generation: Tensor) -> History:
        """Clear from a lagged copy the requests whose ``generation`` int32 [R] has changed since.

        Raises:
            EchoError: another shape, dtype or device.
        """
        shape = list(self.generation.shape)
        device = self.generation.device
        checks.tensor("generation", generation, shape, torch.int32, device)
        return self._without(self.generation != generation)

    def _without(self, requests: Tensor) -> History:
        """Clear ``requests`` bool [R]."""
        cleared = F.pad(requests, (0, 1))  # the sums over all requests stay
        columns: dict[str, Any] = {
            name: sums.masked_fill(cleared if sums.dim() == 2 else cleared[:, None], 0)
            for name, sums in zip(SUMS, self._sums, strict=True)
        }
        unprocessed = self.num_unprocessed_tokens.masked_fill(requests, 0)
        return replace(self, **columns, num_unprocessed_tokens=unprocessed)

    def advance(self, depth: int) -> History:
        """Count a step of ``depth`` layers on the host, if a captured graph updates the sums."""
        idle = 0 if depth else self.num_idle_steps + 1
        return replace(self, num_steps=self.num_steps + 1, num_idle_steps=idle)

    def observe(
        self,
        req_indices: Tensor,
        packed: PackedTree,
        accepted: Accepted,
        *,
        out: History | None = None,
    ) -> History:
        """Return the history after a step.

        Requests that emitted nothing are unchanged, and drafts that the target did not judge are
        not counted (:attr:`Accepted.num_accepted_drafts`).

        Args:
            req_indices: int64 [B], the index of each request of the step.
            packed, accepted: the step.
            out: a history to write to, which may be this one.

        Raises:
            EchoError: ``req_indices`` of another shape, dtype or device.
        """
        checks.tensor("req_indices", req_indices, [packed.batch], torch.int64, self.steps.device)
        histogram = packed.acceptance_histogram
        expected = packed.expected
        num_layers: int | Tensor = 0
        if histogram is not None:
            num_layers = packed.max_depth if packed.num_layers is None else packed.num_layers
        unprocessed = self.num_unprocessed_tokens
        if not packed.max_depth:
            unprocessed = unprocessed.index_add(0, req_indices, accepted.num_emitted)
        elif histogram is not None:  # a step that drafts has processed the tokens emitted before
            zero = None if out is None else out.num_unprocessed_tokens.zero_()
            unprocessed = torch.zeros_like(unprocessed) if zero is None else zero
        new: tuple[Tensor, ...]
        if kernels.use_triton(req_indices):
            from echo.kernels import observe

            step = req_indices, packed.status, accepted.num_emitted, accepted.cut_row
            more = None if expected is None or histogram is None else (expected, histogram)
            to = None if out is None else out._sums
            if to is not None and not all(buffer.is_contiguous() for buffer in to):
                to = None  # kernels write only contiguous buffers
            new = observe.observe(*step, num_layers, more, self._sums, KEEP, MEMORY, out=to)
        else:
            new = self._observe(req_indices, packed, accepted, num_layers)
        columns: dict[str, Any] = dict(zip(SUMS, new, strict=True))
        after = self.advance(packed.max_depth)
        value = replace(after, **columns, num_unprocessed_tokens=unprocessed)
        return value if out is None else copy_into(out, value)

    @property
    def _sums(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.steps, self.expected, self.accepted, self.acceptance_histogram

    def _observe(
        self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, num_layers: int | Tensor
    ) -> tuple[Tensor, ...]:
        """Compute the sums after a step of ``num_layers`` layers, an int or int32 []."""
        depth, places = self.steps.shape
        drafts = accepted.num_accepted_drafts
        device = req_indices.device
        f32 = torch.float32
        layers = torch.arange(depth, device=device)[:, None]
        reached = layers < num_layers
        judged = (layers < drafts) | (drafts < accepted.num_emitted)
        stopped = packed.status != int(Status.ACTIVE)  # requests that stopped have no deeper layers
        counted = ((reached | stopped & (num_layers > 0)) & judged).float()
        keeps = torch.full((packed.batch,), KEEP, dtype=f32, device=device)
        keeps.masked_fill_(accepted.num_emitted < 1, 1.0)
        ones = torch.ones(places, dtype=f32, device=device)
        fades = ones.scatter_reduce(0, req_indices, keeps, "amin").repeat(depth, 1)
        fades[:, -1] = torch.rsub(counted.sum(dim=1), 1, alpha=1 / MEMORY).clamp(min=0)
        all_requests = req_indices.new_full((1,), places - 1)

        def add(sums: Tensor, more: Tensor | None) -> Tensor:
            """Fade ``sums`` [D, R + 1, ...], then add ``more`` [layers, B, ...]."""
            faded = sums * fades.view(*fades.shape, *[1] * (sums.dim() - 2))
            if more is not None:
                part = faded[: len(more)].index_add_(1, req_indices, more)
                part.index_add_(1, all_requests, more.sum(dim=1, keepdim=True))
            return faded

        expected = accepts = histogram = None
        if packed.acceptance_histogram is not None and packed.expected is not None:
            count = packed.expected.shape[1]
            # a workspace's buffers hold other steps' values below this step's layers
            counts = (reached & judged)[:count]
            expected = packed.expected.transpose(0, 1).masked_fill(~counts, 0)
            accepts = (reached & (drafts > layers))[:count].float()
            histogram = packed.acceptance_histogram.transpose(0, 1)
            histogram = histogram.masked_fill(~counts[..., None], 0)
        news = counted, expected, accepts, histogram
        return tuple(add(sums, more) for sums, more in zip(self._sums, news, strict=True))

    def predict(
        self, req_indices: HostInts
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """Predict accepted drafts by depth and by number of draft tokens.

        The mean of each of ``req_indices`` is shrunk toward that over all requests, and so is the
        ratio of accepted to expected drafts at each depth, which scales expectations: an
        overconfident draft is believed less. For a history on the host (:meth:`to`).

        Returns:
            Draft tokens and accepted drafts, float32 [D, 33] each, rising from 0 along the second
            axis: tokens with probability down to each bin if that many layers are drafted, and how
            many of them will be accepted. None: too little was drafted so far.

        Raises:
            EchoError: a history on another device, or an index that it does not have.
        """
        if not self.steps.is_cpu:
            device = self.steps.device
            raise EchoError(f"history: expected one on cpu (see History.to), got one on {device}")
        steps = self.steps.numpy()
        expected = self.expected.numpy()
        accepted = self.accepted.numpy()
        depth, places = steps.shape
        found = checks.indices("req_indices", req_indices, places - 2)
        if not depth or min(steps[:, -1].tolist()) < LEARN:
            return None
        ratio = (accepted[:, -1:] + 1.0) / (expected[:, -1:] + 1.0)
        scale = accepted + PRIOR_DRAFTS * ratio
        scale /= expected + PRIOR_DRAFTS
        weights = np.empty((depth, 2, places), np.float32)
        plain = weights[:, 0]
        scaled = weights[:, 1]
        np.divide(np.bincount(found, minlength=places).astype(np.float32), steps + PRIOR, out=plain)
        np.multiply(plain, np.minimum(scale, 2.0, out=scale), out=scaled)
        weights[:, :, -1] = np.add.reduce(weights, axis=2) * (PRIOR / steps[:, -1:])
        likely = torch.bmm(torch.from_numpy(weights), self.acceptance_histogram).cumsum(0).numpy()
        drafts, accepts = likely.transpose(1, 0, 2) @ TAILS
        return drafts, accepts


def summarize(tree: SuperTree, probability: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """Summarize the acceptance probabilities of a step's nodes.

    Args:
        tree: the scored forest, T nodes a request.
        probability: float32 [B, T], acceptance probability.
        selected: bool [B, T].

    Returns:
        :attr:`PackedTree.acceptance_histogram`, float32 [B, depth, 32], scored nodes by layer and
        bin of their probability; and :attr:`PackedTree.expected`, float32 [B, depth], the sum of
        the probabilities of the selected nodes.
    """
    if kernels.use_triton(probability):
        from echo.kernels import observe, select

        nodes = select.as_selected(selected)
        return observe.summarize(probability, tree.score, nodes, tree.sizes, BINS, SKIP)
    roots, *sizes = tree.sizes
    device = probability.device
    bins = probability[:, roots:].sqrt() * (BINS + SKIP)
    starts = [torch.full((n,), d * BINS - SKIP, device=device) for d, n in enumerate(sizes)]
    index = torch.cat(starts) + bins.long().clamp(SKIP, BINS + SKIP - 1)
    counted = (tree.score[:, roots:] > DEAD_SCORE) & (bins >= SKIP)
    flat = torch.zeros(tree.batch, tree.depth * BINS, dtype=torch.float32, device=device)
    layers = torch.split(torch.where(selected, probability, 0.0)[:, roots:], sizes, dim=1)
    expected = torch.stack([layer.sum(dim=1) for layer in layers], dim=1)
    histogram = flat.scatter_add_(1, index, counted.float())
    return histogram.view(tree.batch, tree.depth, BINS), expected
