"""What each request slot remembers of its last steps, and what the host foresees from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import EchoError, HostInts
from echo.kernels.codes import Status
from echo.tree.accept import Accepted
from echo.tree.packed import PackedTree, copy_into
from echo.tree.supertree import DEAD_SCORE, SuperTree

KEEP = 0.95
"""What a slot's sums keep from step to step: a memory of about twenty steps. This, MEMORY and both priors were chosen by replay on the
calibration half of the shipped trace; half to four times each was tried, and the mean throughput moved by at most 0.6%."""
MEMORY = 512
"""Steps of single requests that the sums over all requests remember."""
LEARN = 8
"""Steps of single requests at full depth before anything is foreseen."""
PRIOR = 2.0
"""Steps that everybody's experience counts beside a slot's own."""
PRIOR_DRAFTS = 4.0
"""Expected drafts that everybody's ratio of accepted to expected ones counts beside a slot's own."""
BINS, SKIP = 32, 3
"""Bins of the probability of acceptance f in an outlook, equal in sqrt(f); below them, f < 1/136, are SKIP more that nobody counts. By
replay 32 equal bins of f cost 0.2 to 0.3% of the mean throughput beside 64, and up to 1.9% at one request; these cost 0.1%."""
DOWN = (np.arange(BINS)[:, None] + np.arange(BINS + 1) >= BINS).astype(np.float32)
DOWN = np.stack(
    [
        DOWN,
        DOWN * np.square((np.arange(BINS, dtype=np.float32) + SKIP + 0.5) / (BINS + SKIP))[:, None],
    ]
)
"""float32 [2, 32, 33]: sums over the likeliest bins, none to all, of their nodes and of their nodes' probabilities."""


@dataclass(frozen=True)
class History:
    """Decaying sums by request slot, and over all requests in place ``slots``; a value: every method returns a new one.

    A slot that drafted nothing in a step forgets as much as one that did: what was learnt of it fades towards what is known of
    everybody, so speculation comes back by itself.

    Attributes:
        generation: int32 [slots], how many requests the slot has been given.
        steps: float32 [depth, slots + 1], steps in which a layer of that depth was drafted.
        acceptance_histogram: float32 [depth, slots + 1, 32], sum of :attr:`PackedTree.acceptance_histogram`.
        expected: float32 [depth, slots + 1], drafts of each depth that were verified and expected to be accepted.
        accepted: float32 [depth, slots + 1], those that were: over ``steps``, the survival by depth.
        num_unprocessed_tokens: int64 [slots], tokens emitted since something was drafted: what the drafter has to read up on first.
        num_steps: steps of the batch so far; a host int.
        num_idle_steps: of these, those since something was drafted; a host int.
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
        """Of ``max_num_reqs`` slots on ``device`` without a past, for trees of up to ``max_depth`` layers.

        Raises:
            EchoError: slots below 1 or depth below 0.
        """
        max_num_reqs = checks.integer("max_num_reqs", max_num_reqs, 1)
        max_depth = checks.integer("depth", max_depth, 0)
        steps, expected, accepted = torch.zeros(
            3, max_depth, max_num_reqs + 1, dtype=torch.float32, device=device
        )
        return cls(
            torch.zeros(max_num_reqs, dtype=torch.int32, device=device),
            steps,
            torch.zeros(max_depth, max_num_reqs + 1, BINS, dtype=torch.float32, device=device),
            expected,
            accepted,
            torch.zeros(max_num_reqs, dtype=torch.int64, device=device),
        )

    def reset(self, req_indices: Tensor) -> History:
        """Forgets the ``req_indices`` int64 [n], to which new requests were admitted; others are an EchoError."""
        checks.tensor("req_indices", req_indices, ["n"], torch.int64, self.steps.device)
        given = torch.zeros_like(self.generation).index_fill(0, req_indices, 1)
        return replace(self._without(given > 0), generation=self.generation + given)

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> History:
        """A copy on ``device``: forecasts read one on the host, copied while later steps run (``non_blocking``)."""
        names = (
            "generation",
            "steps",
            "acceptance_histogram",
            "expected",
            "accepted",
            "num_unprocessed_tokens",
        )
        columns: dict[str, Any] = {
            name: getattr(self, name).to(device, non_blocking=non_blocking) for name in names
        }
        return replace(self, **columns)

    def without_stale(self, generation: Tensor) -> History:
        """A lagged copy without slots given to another request since: whose ``generation`` int32 [slots] differs. EchoError on misfits."""
        checks.tensor(
            "generation",
            generation,
            list(self.generation.shape),
            torch.int32,
            self.generation.device,
        )
        return self._without(self.generation != generation)

    def _without(self, slots: Tensor) -> History:
        """Of ``slots`` bool [slots] nothing is known."""
        gone = torch.nn.functional.pad(slots, (0, 1))  # everybody's sums stay
        names = ("steps", "expected", "accepted")
        columns: dict[str, Any] = {name: getattr(self, name).masked_fill(gone, 0) for name in names}
        return replace(
            self,
            **columns,
            acceptance_histogram=self.acceptance_histogram.masked_fill(gone[:, None], 0),
            num_unprocessed_tokens=self.num_unprocessed_tokens.masked_fill(slots, 0),
        )

    def advance(self, depth: int) -> History:
        """What the host counts of a step of ``depth`` layers: where a captured graph updates the sums, it is all that is left to do."""
        return replace(
            self,
            num_steps=self.num_steps + 1,
            num_idle_steps=0 if depth else self.num_idle_steps + 1,
        )

    def observe(
        self,
        req_indices: Tensor,
        packed: PackedTree,
        accepted: Accepted,
        *,
        out: History | None = None,
    ) -> History:
        """The history after a step. Requests that emitted nothing are left alone, and drafts that were not judged do not count
        (:attr:`Accepted.num_accepted_drafts`).

        Args:
            req_indices: int64 [B], where each request of the step lives.
            packed, accepted: the step.
            out: a history, this one too, to whose tensors is written.

        Raises:
            EchoError: slots of another shape, dtype or device.
        """
        checks.tensor("req_indices", req_indices, [packed.batch], torch.int64, self.steps.device)
        drafted: int | Tensor = 0
        if packed.acceptance_histogram is not None:
            drafted = packed.max_depth if packed.num_layers is None else packed.num_layers
        now: dict[str, Any] = {}
        if not packed.max_depth:
            now["num_unprocessed_tokens"] = self.num_unprocessed_tokens.index_add(
                0, req_indices, accepted.num_emitted
            )
        elif (
            packed.acceptance_histogram is not None
        ):  # a step that drafts has read what was emitted before; of a budget that is a number nothing asks
            now["num_unprocessed_tokens"] = (
                torch.zeros_like(self.num_unprocessed_tokens)
                if out is None
                else out.num_unprocessed_tokens.zero_()
            )
        sums, fused = (
            (self.steps, self.expected, self.accepted, self.acceptance_histogram),
            kernels.fused("packing", req_indices),
        )
        if fused is not None:
            more = (
                None
                if packed.expected is None or packed.acceptance_histogram is None
                else (packed.expected, packed.acceptance_histogram)
            )
            step, to = (req_indices, packed.status, accepted.num_emitted, accepted.cut_row), None
            if out is not None:
                to = out.steps, out.expected, out.accepted, out.acceptance_histogram
                to = (
                    to if all(buffer.is_contiguous() for buffer in to) else None
                )  # kernels write buffers without gaps
            new = fused.observe(*step, drafted, more, sums, KEEP, MEMORY, out=to)
        else:
            new = self._sums(req_indices, packed, accepted, drafted)
        names = ("steps", "expected", "accepted", "acceptance_histogram")
        value = replace(self.advance(packed.max_depth), **dict(zip(names, new, strict=True)), **now)
        return value if out is None else copy_into(out, value)

    def _sums(
        self, req_indices: Tensor, packed: PackedTree, accepted: Accepted, num_layers: int | Tensor
    ) -> tuple[Tensor, ...]:
        """Steps, expected, accepted and outlook after a step of ``num_layers`` layers, a number or int32 []."""
        (depth, places), drafts = self.steps.shape, accepted.num_accepted_drafts
        layers = torch.arange(depth, device=req_indices.device)[:, None]
        reached, judged = layers < num_layers, (layers < drafts) | (drafts < accepted.num_emitted)
        stopped = packed.status != int(Status.ACTIVE)  # requests that stopped have no deeper layers
        counted = ((reached | stopped & (num_layers > 0)) & judged).float()
        keeps = torch.full(
            (packed.batch,), KEEP, dtype=torch.float32, device=req_indices.device
        ).masked_fill_(accepted.num_emitted < 1, 1.0)
        ones = torch.ones(places, dtype=torch.float32, device=req_indices.device)
        fades = ones.scatter_reduce(0, req_indices, keeps, "amin").repeat(depth, 1)
        fades[:, -1] = torch.rsub(counted.sum(dim=1), 1, alpha=1 / MEMORY).clamp(min=0)
        all_requests = req_indices.new_full((1,), places - 1)

        def add(sums: Tensor, more: Tensor | None) -> Tensor:
            """The ``sums`` [depth, slots + 1, ...] faded; ``more`` [drafted, B, ...] to each slot's, and its sum to all requests'."""
            faded = sums * fades.view(*fades.shape, *[1] * (sums.dim() - 2))
            if more is not None:
                faded[: len(more)].index_add_(1, req_indices, more).index_add_(
                    1, all_requests, more.sum(dim=1, keepdim=True)
                )
            return faded

        if packed.acceptance_histogram is None or packed.expected is None:
            return (
                add(self.steps, counted),
                add(self.expected, None),
                add(self.accepted, None),
                add(self.acceptance_histogram, None),
            )
        count = packed.expected.shape[1]
        counts = (reached & judged)[
            :count
        ]  # of a workspace's buffers what lies below this step's layers is of another step
        expected = packed.expected.transpose(0, 1).masked_fill(~counts, 0)
        outlook = packed.acceptance_histogram.transpose(0, 1).masked_fill(~counts[..., None], 0)
        survived = (reached & (drafts > layers))[:count].float()
        return (
            add(self.steps, counted),
            add(self.expected, expected),
            add(self.accepted, survived),
            add(self.acceptance_histogram, outlook),
        )

    def predict(
        self, req_indices: HostInts
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]] | None:
        """What drafting would bring the requests in ``req_indices``: by depth d and number of drafted rows, expected accepted drafts.

        Each slot's mean is shrunk towards everybody's, and so is the ratio of accepted to expected drafts at each depth, by which
        expectations are scaled: a draft that is too sure of itself is believed less. Of a history on the host (:meth:`to`).

        Returns:
            ``rows`` and ``accepted`` float32 [depth, 33], both rising from 0 along the second axis: rows of probability down to
            each bin when ``depth`` layers are drafted, and how many of them will be accepted. None: too little was drafted yet.

        Raises:
            EchoError: a history on another device, or slots that it does not have.
        """
        if not self.steps.is_cpu:
            raise EchoError(
                f"history: expected one on cpu (see History.to), got one on {self.steps.device}"
            )
        steps, expected, accepted = self.steps.numpy(), self.expected.numpy(), self.accepted.numpy()
        depth, places = steps.shape
        found = checks.integers("req_indices", req_indices, 0, places - 2)
        if not depth or min(steps[:, -1].tolist()) < LEARN:
            return None
        ratio = (accepted[:, -1:] + 1.0) / (expected[:, -1:] + 1.0)
        scale = accepted + PRIOR_DRAFTS * ratio
        scale /= expected + PRIOR_DRAFTS
        weights = np.empty((depth, 2, places), np.float32)
        share, scaled = weights[:, 0], weights[:, 1]
        np.divide(np.bincount(found, minlength=places).astype(np.float32), steps + PRIOR, out=share)
        np.multiply(share, np.minimum(scale, 2.0, out=scale), out=scaled)
        weights[:, :, -1] = weights.sum(axis=2) * (PRIOR / steps[:, -1:])
        likely = torch.bmm(torch.from_numpy(weights), self.acceptance_histogram).cumsum(0).numpy()
        rows, brings = likely.transpose(1, 0, 2) @ DOWN
        return rows, brings


def summarize(tree: SuperTree, gain: Tensor, selected: Tensor) -> tuple[Tensor, Tensor]:
    """What a step is expected to bring, from each node's probability of acceptance ``gain`` [B, T].

    Returns:
        :attr:`PackedTree.acceptance_histogram`, float32 [B, depth, 32], how many scored nodes of each layer have a probability in each bin; and
        :attr:`PackedTree.expected`, float32 [B, depth], its sum over the ``selected`` nodes, bool [B, T].
    """
    fused = kernels.fused("packing", gain)
    if fused is not None:
        step: tuple[Tensor, Tensor] = fused.summarize(
            gain, tree.score, fused.as_selected(selected), tree.sizes, BINS, SKIP
        )
        return step
    batch, (roots, *sizes) = tree.batch, tree.sizes
    score, bins = tree.score[:, roots:], gain[:, roots:].sqrt() * (BINS + SKIP)
    begins = [
        torch.full((size,), d * BINS - SKIP, device=gain.device) for d, size in enumerate(sizes)
    ]
    place = torch.cat(begins) + bins.long().clamp(SKIP, BINS + SKIP - 1)
    counted = (score > DEAD_SCORE) & (bins >= SKIP)
    flat = torch.zeros(batch, tree.depth * BINS, dtype=torch.float32, device=gain.device)
    layers = torch.split(torch.where(selected, gain, 0.0)[:, roots:], sizes, dim=1)
    expected = torch.stack([layer.sum(dim=1) for layer in layers], dim=1)
    return flat.scatter_add_(1, place, counted.float()).view(batch, tree.depth, BINS), expected
