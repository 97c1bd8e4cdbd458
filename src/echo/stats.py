"""What a server counts of its steps: added up on the device, read when somebody asks."""

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

    A *share* is what an even split would give a request of a step: N rows over its live requests, rounded down.

    Attributes:
        steps: steps observed.
        layers: depths of their trees, summed: layers / steps is the mean draft depth, and 0 says that speculation was off.
        requests: requests verified in each step, summed; each has one root row, and emits one token of the target's own unless silent.
        verify_tokens: rows verified for requests, roots included.
        pad_tokens: rows launched and given to nobody.
        accepted_drafts: drafted rows accepted, whose own token was emitted too.
        truncated: requests of a step that failed a gate.
        starved: requests of a step that passed and found no row left to buy.
        released: rows that truncated requests hold less than their share.
        reassigned: those of them that other requests hold beyond their shares. What was released and not re-dealt was launched as pads:
            never more than ``pad_tokens``. A rule with a budget for each request re-deals nothing.
        invalid: faulty draft scores, as :attr:`SuperTree.invalid` counts them.
        no_output: verified requests of a step that emitted nothing: the target had no number for the root, or their answer was over.
        not_scheduled: live requests of a step that got no row, because more were live than it has rows; they keep their root.
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
        """Drafted rows verified: rows without roots."""
        return self.verify_tokens - self.requests

    @property
    def emitted_tokens(self) -> int:
        """Tokens emitted: accepted drafts, and one of the target's own for each verified request of a step that was not silent."""
        return self.accepted_drafts + self.requests - self.no_output

    @property
    def tokens_per_step(self) -> float:
        """Tokens that a request emits in a step, on average; 0 before the first step."""
        return self.emitted_tokens / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class StepStats:
    """Counters of a serving loop; a value: :meth:`observe` returns the next one, and nothing is read back before :meth:`read`.

    Counters of several ranks or loops add up: ``StepStats(a.counts + b.counts)``.

    Attributes:
        counts: int64 [13], in the order of :class:`StepCounts`.

    Example:
        >>> import echo
        >>> scheduler = echo.ElasticBudgetScheduler.eagle(max_verify_tokens_per_req=3, beam=2, max_depth=1)
        >>> first_layer = torch.tensor([[1, 2]]), torch.tensor([[-0.2, -2.0]])
        >>> packed = scheduler.pack(scheduler.begin(torch.tensor([7]), first_layer=first_layer))
        >>> stats = StepStats.empty().observe(packed, echo.accept(packed, torch.tensor([1, 5, 6])))
        >>> stats.read().rows, stats.read().emitted
        (3, 2)
    """

    counts: Tensor

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> StepStats:
        """Nothing counted yet; the counters live on ``device``."""
        return cls(torch.zeros(len(fields(StepCounts)), dtype=torch.int64, device=device))

    def observe(
        self, packed: PackedTree, accepted: Accepted, *, out: StepStats | None = None
    ) -> StepStats:
        """After a step, on the device: one launch on a GPU, fixed shapes, sync-free.

        Args:
            packed, accepted: the step.
            out: counters, these too, to which is written.

        Raises:
            EchoError: another batch, or counters on another device.
        """
        checks.instance("packed", packed, PackedTree)
        lengths = checks.instance("accepted", accepted, Accepted).num_emitted
        checks.tensor("accepted.lengths", lengths, [packed.batch], torch.int64, self.counts.device)
        layers = packed.max_depth if packed.num_layers is None else packed.num_layers
        fused = kernels.fused("packing", lengths)
        if fused is not None:
            state = packed.indptr, packed.status, lengths, packed.invalid
            to = out.counts if out is not None and out.counts.is_contiguous() else None
            return copy_into(
                out,
                StepStats(
                    fused.count(*state, packed.num_rows, layers, self.counts.contiguous(), out=to)
                ),
            )
        rows = packed.indptr.diff().long()
        live = rows > 0
        real, requests = rows.sum(), live.sum()
        share = packed.num_rows // requests.clamp(min=1)
        truncated = live & (packed.status == int(Status.TRUNCATED))
        released = ((share - rows).clamp(min=0) * truncated).sum()
        odd = (
            packed.num_rows - share * requests
        )  # what an even split leaves over: beyond the shares, but released by nobody
        beyond = ((rows - share).clamp(min=0) * live).sum() - odd
        step = [
            real.new_ones(()),
            layers.long() if isinstance(layers, Tensor) else real.new_full((), layers),
            requests,
            real,
            packed.num_rows - real,
            (lengths - 1).clamp(min=0).sum(),
            truncated.sum(),
            (live & (packed.status == int(Status.STARVED))).sum(),
            released,
            torch.minimum(released, beyond.clamp(min=0)),
            packed.invalid.sum(dtype=torch.int64),
            (live & (lengths == 0)).sum(),
            (~live & (packed.status != int(Status.EMPTY))).sum(),
        ]
        return copy_into(out, StepStats(self.counts + torch.stack(step)))

    def read(self) -> StepCounts:
        """The totals on the host: waits for the device once."""
        return StepCounts(*self.counts.tolist())
