"""Counters of a serving loop's steps: summed on the device, copied to the host on request."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from echo import _checks as checks
from echo import kernels
from echo._checks import copy_into
from echo.kernels.codes import Status
from echo.tree.accept import Accepted
from echo.tree.packed import PackedTree


@dataclass(frozen=True)
class StepCounts:
    """Totals on the host since :meth:`StepStats.empty`.

    A request's *share* is the step's verify tokens over its live requests, rounded down.

    Attributes:
        steps, layers: steps observed, and layers drafted (none where speculation was off).
        requests: requests verified, summed over steps; each has one root.
        verify_tokens: tokens verified for requests, roots included.
        pad_tokens: pad rows launched.
        accepted_drafts: accepted drafts whose own sampled token was emitted too.
        truncated: requests that failed a gate, summed over steps.
        starved: requests that passed but found no verify token remaining, summed over steps.
        released: verify tokens of their shares that truncated requests did not get.
        reassigned: released tokens that other requests got beyond their shares; the rest became
            pads. A rule with a budget for each request reassigns none.
        invalid: faulty draft scores, as :attr:`SuperTree.invalid`.
        no_output: verified requests that emitted nothing, summed over steps: the target had no
            token for the root, or the answer was over.
        not_scheduled: live requests that wait, summed over steps: there were fewer verify tokens.
    """

    steps: int = 0
    layers: int = 0
    requests: int = 0
    verify_tokens: int = 0
    pad_tokens: int = 0
    accepted_drafts: int = 0
    truncated: int = 0
    starved: int = 0
    released: int = 0
    reassigned: int = 0
    invalid: int = 0
    no_output: int = 0
    not_scheduled: int = 0

    @property
    def draft_tokens(self) -> int:
        """Draft tokens verified: verify tokens minus roots."""
        return self.verify_tokens - self.requests

    @property
    def emitted_tokens(self) -> int:
        """Accepted drafts, plus a bonus token for each verified request with output."""
        return self.accepted_drafts + self.requests - self.no_output

    @property
    def tokens_per_step(self) -> float:
        """Mean number of tokens that a request emits in a step; 0 before the first."""
        return self.emitted_tokens / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class StepStats:
    """Counters of a serving loop, immutable: :meth:`observe` returns the next value.

    Add those of several ranks or loops: ``StepStats(a.counts + b.counts)``.

    Attributes:
        counts: int64 [13], in the order of :class:`StepCounts`.

    Example:
        >>> import echo
        >>> tree = echo.SuperTree.from_paths(torch.tensor([7]), [[[1, 2]]])
        >>> packed = echo.ElasticBudgetScheduler(echo.GlobalRank(1), budget=3).pack(tree)
        >>> accepted = echo.accept(packed, torch.tensor([1, 5, 6]))
        >>> counts = StepStats.empty().observe(packed, accepted).read()
        >>> counts.verify_tokens, counts.emitted_tokens
        (3, 2)
    """

    counts: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> StepStats:
        """Return zero counters on ``device``."""
        return cls(torch.zeros(len(fields(StepCounts)), dtype=torch.int64, device=device))

    def observe(
        self, packed: PackedTree, accepted: Accepted, *, out: StepStats | None = None
    ) -> StepStats:
        """Count a step: one launch on a GPU, fixed shapes, sync-free.

        Args:
            packed, accepted: the step.
            out: counters to write to, which may be these.

        Raises:
            EchoError: another batch, or counters on another device.
        """
        batch = checks.instance("packed", packed, PackedTree).batch
        device = self.counts.device
        emitted = checks.instance("accepted", accepted, Accepted).num_emitted
        checks.tensor("accepted.num_emitted", emitted, [batch], torch.int64, device)
        status = packed.status
        layers = packed.max_depth if packed.num_layers is None else packed.num_layers
        if kernels.use_triton(emitted):
            from echo.kernels import observe

            state = packed.indptr, status, emitted, packed.invalid, packed.num_rows, layers
            to = out.counts if out is not None and out.counts.is_contiguous() else None
            counts = observe.count(*state, self.counts.contiguous(), out=to)
            return copy_into(out, StepStats(counts))
        tokens = packed.indptr.diff().long()
        live = tokens > 0
        total = tokens.sum()
        requests = live.sum()
        share = packed.num_rows // requests.clamp(min=1)
        truncated = live & (status == int(Status.TRUNCATED))
        released = ((share - tokens).clamp(min=0) * truncated).sum()
        rest = packed.num_rows - share * requests  # remainder of the split, released by no request
        beyond = ((tokens - share).clamp(min=0) * live).sum() - rest
        step = [
            total.new_ones(()),
            layers.long() if isinstance(layers, Tensor) else total.new_full((), layers),
            requests,
            total,
            packed.num_rows - total,
            (emitted - 1).clamp(min=0).sum(),
            truncated.sum(),
            (live & (status == int(Status.STARVED))).sum(),
            released,
            torch.minimum(released, beyond.clamp(min=0)),
            packed.invalid.sum(dtype=torch.int64),
            (live & (emitted == 0)).sum(),
            (~live & (status != int(Status.EMPTY))).sum(),
        ]
        return copy_into(out, StepStats(self.counts + torch.stack(step)))

    def read(self) -> StepCounts:
        """Copy the totals to the host: one device-to-host sync."""
        return StepCounts(*self.counts.tolist())
