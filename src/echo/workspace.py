"""A step's buffers at fixed addresses, and the CUDA graphs that capture it.

Launched one by one, a step's kernels cost the host 2.4 to 2.9 ms for 0.13 ms of device work (256
requests, H100). :class:`Workspace` owns the buffers of a captured step; :class:`Graphs` captures.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.history import BINS
from echo.budget.rules import GlobalRank, narrowed
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.budget.step import Scratch, begin, check
from echo.budget.step import pack as pack_step
from echo.budget.throughput import Tier
from echo.cost import CostModel
from echo.stats import StepStats
from echo.tree.accept import Accepted, Compaction, accept, compact
from echo.tree.packed import WORD, PackedTree
from echo.tree.supertree import Frontier, Layer, Nodes, SuperTree

T = TypeVar("T")


class Workspace:
    """The buffers of a step, at addresses that never change.

    Each method takes and returns what the scheduler's does, bit for bit; the tensors are views of
    these buffers, valid until the next call of that method. With Triton kernels, a shipped rule and
    a :class:`SparseGate` or no gate, a step allocates nothing. A step may use any prefix of the
    lanes and up to ``num_verify_tokens`` verify tokens: a smaller tier is a view.

    Capture a step in three parts, because an engine's grammar, penalties and sampler run between
    them, each keyed by what changes it: *draft* (lanes, depth, beam): :meth:`begin`, then the
    drafter and :meth:`grow` in turn; *plan* (those, verify tokens): :meth:`pack`; *accept* (lanes,
    verify tokens): :meth:`accept`, :meth:`compact`, :meth:`observe`, and the engine's own part.
    Between replays the host sets the budget and updates the inputs of :meth:`begin`.

    Args:
        scheduler: the policy, without request weights.
        lanes: maximum number of requests of a step, empty lanes included.
        k: candidates of each node: one number, or one per depth.
        num_verify_tokens: maximum of a step, roots included.
        max_num_reqs: requests in the history. Defaults to ``lanes``.
        device: of the buffers; "meta" to compute only their ``nbytes``.
        packed: another workspace's ``packed``, with as many rows and mask words, to pack into, so
            that the target's graphs serve several policies.

    Attributes:
        packed: the buffers of the largest step; smaller steps are prefixes of them.
        history: :class:`History`, updated in place by :meth:`observe`; its host counters advance
            outside the graphs, by :meth:`History.advance`.
        stats: :class:`StepStats`, updated in place by :meth:`observe`.

    Raises:
        EchoError: an argument of the wrong kind or out of range.

    Example:
        >>> import echo
        >>> cost = echo.CostModel((1, 3, 4), (1.0, 1.0, 9.0))  # the fourth row is expensive
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=cost, max_depth=1)
        >>> space = Workspace(scheduler, lanes=2, k=2, num_verify_tokens=4)
        >>> space.set_num_verify_tokens(4)  # this step may use all 4
        >>> tree = space.begin(torch.tensor([7, 9]))
        >>> tokens = torch.tensor([[[1, 2]], [[3, 4]]])
        >>> tree = space.grow(tree, tokens, torch.log(torch.tensor([[[0.9, 0.1]], [[0.6, 0.3]]])))
        >>> packed = space.pack(space.trim(tree, echo.budget.Tier(1, 4)))
        >>> accepted = space.accept(packed, torch.tensor([1, 5, 4]))
        >>> packed.tokens.tolist(), accepted.tokens.tolist()
        ([7, 1, 9], [[1, 5], [4, -1]])
        >>> space.observe(torch.tensor([0, 1]), packed, accepted)
        >>> space.stats.read().emitted_tokens
        3
    """

    def __init__(
        self,
        scheduler: ElasticBudgetScheduler,
        lanes: int,
        *,
        k: int | Sequence[int],
        num_verify_tokens: int,
        max_num_reqs: int | None = None,
        device: torch.device | str = "cpu",
        packed: PackedTree | None = None,
    ) -> None:
        self.scheduler = checks.instance("scheduler", scheduler, ElasticBudgetScheduler)
        self.lanes = lanes = checks.integer("lanes", lanes, 1)
        self.num_verify_tokens = n = checks.integer("num_verify_tokens", num_verify_tokens, 1)
        self.device, depth = torch.device(device), scheduler.max_depth
        given = checks.integers("k", k, 1)
        self._k: list[int] = (given.repeat(depth) if given.ndim == 0 else given).tolist()
        if len(self._k) != depth:
            got = f"{len(self._k)} numbers"
            raise EchoError(f"k: expected one number, or one for each of {depth} depths, got {got}")
        widths, sizes = self._layout(scheduler.rule.beam)
        self._words = -(-scheduler.max_verify_tokens_per_req // WORD)
        reqs = lanes if max_num_reqs is None else max_num_reqs
        self.history = scheduler.history(reqs, self.device)
        self.stats = StepStats.empty(self.device)

        def new(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        i8, i32, f32, yes = torch.int8, torch.int32, torch.float32, torch.bool
        total, layers = sum(sizes), range(depth + 1)
        keys = min(total, n, scheduler.max_verify_tokens_per_req)
        node = new(lanes, total, dtype=f32), new(lanes, total, dtype=yes)
        self._nodes = Nodes(new(lanes, total), new(lanes, total), *node)
        kinds = torch.int64, torch.int64, torch.int64, f32, yes  # of a frontier's columns
        self._frontiers = [[new(lanes * w, dtype=kind) for kind in kinds] for w in widths]
        self._drafted = [new(lanes, dtype=yes) for _ in layers]
        self._status = [new(lanes, dtype=i8) for _ in layers]
        self._limits, self._invalid = new(lanes), new(lanes, dtype=i32)
        once = type(scheduler.rule) is GlobalRank  # only the end selects: all depths share them
        self._committed = [new(lanes)] * (depth + 1) if once else [new(lanes) for _ in layers]
        self._remaining = [new()] * (depth + 1) if once else [new() for _ in layers]
        self._budget = torch.full((), n, dtype=torch.int64, device=self.device)
        self._num_layers = new(dtype=i32)
        self._scratch = {
            "place": new(lanes * total, dtype=i32), "share": new(lanes, dtype=i32),
            "counts": new(lanes), "key": new(lanes * keys),
            "cost": new(lanes * total, dtype=i32), "gain": new(lanes * total, dtype=f32),
        }  # fmt: skip
        self.packed = packed or PackedTree(
            tokens=new(n), parent=new(n, dtype=i32), depth=new(n, dtype=i32),
            request=new(n, dtype=i32), indptr=new(lanes + 1, dtype=i32),
            mask=new(n, self._words, dtype=i32), score=new(n, dtype=f32), node=new(n),
            committed=new(n, dtype=yes), status=new(lanes, dtype=i8),
            invalid=new(lanes, dtype=i32), max_depth=0,
        )  # fmt: skip
        check(self.packed, lanes, n, self._words, self.device)
        self._summaries: dict[str, Tensor] = {}
        if isinstance(scheduler.budget, CostModel) and depth:
            shape = lanes, depth
            self._summaries["acceptance_histogram"] = new(*shape, BINS, dtype=f32)
            self._summaries["expected"] = new(*shape, dtype=f32)
        steps = lanes * (depth + 1)
        self._paths = [new(steps), new(steps)]  # tokens and rows accepted
        self._ends_of_paths = [new(lanes) for _ in range(3)]  # num_emitted, bonus, cut_row
        self._lists = {"accept_index": new(steps, dtype=i32), "valid": new(steps, dtype=yes)}
        self._lists |= {name: new(steps) for name in ("gather", "positions", "source", "target")}
        self._prefix_lens = new(lanes)
        self._trees: dict[tuple[int, int, int], SuperTree] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, the history's included; on device "meta", before they are there."""
        storages = [t.untyped_storage() for t in _tensors(list(vars(self).values()))]
        return sum({storage._cdata: storage.nbytes() for storage in storages}.values())

    def set_num_verify_tokens(self, num_verify_tokens: int) -> None:
        """Set the next step's budget, roots included; the captured draft graph reads it.

        Raises:
            EchoError: ``num_verify_tokens`` above the workspace's.
        """
        n = checks.integer("num_verify_tokens", num_verify_tokens, 1, self.num_verify_tokens)
        self._budget.fill_(n)

    def begin(
        self,
        root_tokens: Tensor,
        *,
        live: Tensor | None = None,
        verify_limits: Tensor | None = None,
    ) -> SuperTree:
        """As :meth:`ElasticBudgetScheduler.begin`, for the first lanes and the budget set before.

        Raises:
            EchoError: shapes or dtypes that do not fit, or more requests than lanes.
        """
        batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64, self.device).shape[0]
        checks.integer("len(root_tokens)", batch, 0, self.lanes)
        return begin(
            root_tokens, live, verify_limits, None, num_verify_tokens=self.num_verify_tokens,
            max_verify_tokens_per_req=self.scheduler.max_verify_tokens_per_req,
            deep=self.scheduler.max_depth > 0, budget=self._budget, out=self.tree(batch, 0),
        )  # fmt: skip

    def grow(
        self,
        tree: SuperTree,
        tokens: Tensor,
        log_probs: Tensor,
        *,
        allowed: Tensor | None = None,
        beam: int | None = None,
    ) -> SuperTree:
        """As :meth:`ElasticBudgetScheduler.grow`, with the workspace's k and one beam per step.

        Raises:
            EchoError: shapes or dtypes that do not fit, a layer beyond ``max_depth``, or a beam
                that differs from the layer's before.
        """
        depth = tree.depth + 1
        most = self.scheduler.rule.beam
        beam = most if beam is None else checks.integer("beam", beam, 1, most)
        beam = narrowed(self.scheduler.rule, beam).beam
        out = self.tree(tree.batch, min(depth, len(self._k)), beam)
        if depth <= len(self._k):
            if out.sizes[:depth] != tree.sizes:
                raise EchoError(f"beam: expected that of the layers before, got {beam}")
            shape = [tree.batch, tree.frontier.token.shape[1], self._k[tree.depth]]
            checks.tensor("tokens", tokens, shape, torch.int64, self.device)
        return self.scheduler.grow(tree, tokens, log_probs, allowed=allowed, beam=beam, out=out)

    def trim(self, tree: SuperTree, tier: Tier, *load: Any, **options: Any) -> SuperTree:
        """As :meth:`ElasticBudgetScheduler.trim`, between the graphs: it is a sync."""
        trimmed = self.scheduler.trim(tree, tier, *load, **options)
        return replace(trimmed, num_remaining=tree.num_remaining.copy_(trimmed.num_remaining))

    def pack(
        self,
        tree: SuperTree,
        num_verify_tokens: int | None = None,
        *,
        sync: Callable[[Tensor], Tensor] | None = None,
    ) -> PackedTree:
        """As :meth:`ElasticBudgetScheduler.pack`, ``sync`` captured with it.

        If a layer was drafted, ``max_depth`` of the result is the scheduler's, and ``num_layers``
        says on the device how many were, so that one graph serves acceptance at every depth.

        Raises:
            EchoError: more verify tokens than the workspace has.
        """
        n = tree.num_verify_tokens if num_verify_tokens is None else num_verify_tokens
        n = checks.integer("num_verify_tokens", n, 1, self.num_verify_tokens)
        batch, depth, total = tree.batch, tree.depth, sum(tree.sizes)
        key = batch, min(total, n, tree.max_verify_tokens_per_req)
        shapes: dict[str, Sequence[int]] = {"share": (batch,), "counts": (batch,), "key": key}
        shapes |= dict.fromkeys(("place", "cost", "gain"), (batch, total))
        buffers = {name: _view(self._scratch[name], shape) for name, shape in shapes.items()}
        names = ("tokens", "parent", "depth", "request", "mask", "score", "node", "committed")
        columns = {name: getattr(self.packed, name)[:n] for name in names}
        columns |= {name: getattr(self.packed, name)[:batch] for name in ("status", "invalid")}
        if depth:
            columns |= {name: x[:batch, :depth] for name, x in self._summaries.items()}
        out = replace(self.packed, indptr=self.packed.indptr[: batch + 1], **columns)
        step, summarizes = replace(tree, num_verify_tokens=n), bool(self._summaries and depth)
        scratch = Scratch(**buffers, num_layers=self._num_layers)
        sizes = n, self._words, self.scheduler.max_verify_tokens_per_req
        options: dict[str, Any] = {"summarizes": summarizes, "out": out, "scratch": scratch}
        packed = pack_step(self.scheduler.rule, step, *sizes, **options)
        if not depth:  # plain decoding: the roots, on every rank
            return packed
        if packed.num_layers is None:
            self._num_layers.fill_(depth)
        whole: dict[str, Any] = {name: x[:batch] for name, x in self._summaries.items()}
        deepest = self.scheduler.max_depth
        packed = replace(packed, max_depth=deepest, num_layers=self._num_layers, **whole)
        return packed if sync is None else packed.agree(sync, packed)

    def accept(
        self, packed: PackedTree, target_tokens: Tensor | None = None, **options: Any
    ) -> Accepted:
        """As :func:`echo.accept`, with its ``options`` except ``out``.

        Raises:
            EchoError: as there.
        """
        shape = packed.batch, packed.max_depth + 1
        ends = (each[: packed.batch] for each in self._ends_of_paths)
        out = Accepted(*(_view(each, shape) for each in self._paths), *ends)
        return accept(packed, target_tokens, **options, out=out)

    def compact(
        self, packed: PackedTree, accepted: Accepted, prefix_lens: Tensor, **options: Any
    ) -> Compaction:
        """As :func:`echo.compact`, with its ``options`` except ``out``.

        Raises:
            EchoError: as there.
        """
        shape = accepted.rows.shape
        lists = {name: _view(buffer, shape) for name, buffer in self._lists.items()}
        lens = checks.tensor("prefix_lens", prefix_lens, [packed.batch], checks.INTEGERS)
        out = Compaction(**lists, prefix_lens=self._prefix_lens.view(lens.dtype)[: packed.batch])
        return compact(packed, accepted, prefix_lens, **options, out=out)

    def observe(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted) -> None:
        """Update ``history`` and ``stats`` in place; ``req_indices`` int64 [B], of each lane.

        Raises:
            EchoError: as :meth:`History.observe`.
        """
        self.history.observe(req_indices, packed, accepted, out=self.history)
        self.stats.observe(packed, accepted, out=self.stats)

    def _layout(self, beam: int) -> tuple[list[int], list[int]]:
        """Nodes of a request's frontier, and of its layer, at each depth."""
        widths, sizes = [1], [1]
        for count in self._k:
            sizes.append(widths[-1] * count)
            widths.append(min(beam, sizes[-1]))
        return widths, sizes

    def tree(self, batch: int, depth: int, beam: int | None = None) -> SuperTree:
        """View the buffers as a tree, such as one that a replayed draft graph has written.

        Args:
            batch: number of lanes, the first ones.
            depth: number of draft layers.
            beam: that it was grown with. Defaults to the rule's.
        """
        beam = beam or self.scheduler.rule.beam
        if (known := self._trees.get((batch, depth, beam))) is not None:
            return known
        widths, sizes = self._layout(beam)
        ends = list(accumulate(sizes))
        nodes = Nodes(**{name: column[:batch] for name, column in vars(self._nodes).items()})
        layers = []
        for d in range(depth + 1):
            part = slice(ends[d] - sizes[d], ends[d])
            columns = {name: column[:, part] for name, column in vars(nodes).items()}
            layers.append(Layer(d, **columns, drafted=self._drafted[d][:batch]))
        shape = batch, widths[depth]
        token, parent, index, score, active = (_view(x, shape) for x in self._frontiers[depth])
        if not depth:  # the roots themselves
            root = layers[0]
            token, parent, index, score = root.token, root.parent, root.parent, root.score
        made = SuperTree(
            layers=tuple(layers),
            frontier=Frontier(token, parent, index, score, active, depth),
            status=self._status[depth][:batch],
            verify_limits=self._limits[:batch],
            num_committed=self._committed[depth][:batch],
            num_remaining=self._remaining[depth],
            invalid=self._invalid[:batch],
            num_verify_tokens=self.num_verify_tokens,
            max_verify_tokens_per_req=self.scheduler.max_verify_tokens_per_req,
            nodes=nodes,
        )
        return self._trees.setdefault((batch, depth, beam), made)


def _view(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of a flat buffer in a shape, without gaps."""
    return buffer[: math.prod(shape)].view(*shape)


def _tensors(value: object) -> list[Tensor]:
    """All tensors in nested values; trees are views of the rest."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return _tensors(list(value.values()))
    if isinstance(value, (list, tuple)):
        return [t for part in value for t in _tensors(part)]
    if is_dataclass(value) and not isinstance(value, (ElasticBudgetScheduler, SuperTree)):
        return _tensors([getattr(value, field.name) for field in fields(value)])
    return []


class Captured(NamedTuple):
    """A captured function.

    Attributes:
        replay: runs the function again.
        result: what the function returned; every replay overwrites its tensors.
        nbytes: device memory that the graph keeps.
    """

    replay: Callable[[], None]
    result: Any
    nbytes: int


class Graphs:
    """CUDA graphs by key: run the function the first time, capture it the second, then replay.

    The first run compiles kernels and fills caches; nothing runs twice in one step. A replay runs
    no Python: a captured function must not read device values on the host, must find its inputs at
    the addresses of its capture, and must leave its outputs in fixed-address buffers. All graphs
    share one memory pool: replay them one after another on one stream. On a device without graphs,
    each call runs the function.

    Args:
        device: of the functions' tensors.
        pool: an engine's graph memory pool (``torch.cuda.graph_pool_handle()``). Defaults to a new
            one.

    Attributes:
        captured: the captured functions, by key.

    Example:
        >>> graphs = Graphs("cpu")
        >>> graphs("add", lambda: torch.ones(()) + 1).item()
        2.0
        >>> graphs.captures and graphs.capture(lambda: torch.ones(()) + 1)  # not on a CPU
        False
        >>> graphs.table().split()
        ['0', 'KiB', '0', 'graphs']
    """

    def __init__(self, device: torch.device | str, *, pool: Any = None) -> None:
        self.device, self.pool = torch.device(device), pool
        self.captured: dict[Hashable, Captured] = {}
        self._seen: set[Hashable] = set()

    def __call__(self, key: Hashable, function: Callable[[], T]) -> T:
        """Run or replay ``function``; a replay of ``key`` returns the same tensors, new values."""
        if not self.captures:
            return function()
        if (known := self.captured.get(key)) is None:
            if key not in self._seen:
                self._seen.add(key)
                return function()
            known = self.captured[key] = self.capture(function)
        known.replay()
        result: T = known.result
        return result

    @property
    def captures(self) -> bool:
        """Whether this device has graphs."""
        return self.device.type == "cuda"

    def capture(self, function: Callable[[], Any]) -> Captured:
        """Capture ``function`` without running it."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(self.device)
        with torch.cuda.graph(graph, pool=self.pool):
            result = function()
        return Captured(graph.replay, result, torch.cuda.memory_reserved(self.device) - before)

    @property
    def nbytes(self) -> int:
        """Bytes by which torch's reserved memory grew; a graph's nodes are the driver's."""
        return sum(entry.nbytes for entry in self.captured.values())

    def table(self) -> str:
        """A line for each captured graph: its bytes and its key."""
        lines = [f"{entry.nbytes / 1024:10,.0f} KiB  {key}" for key, entry in self.captured.items()]
        return "\n".join([*lines, f"{self.nbytes / 1024:10,.0f} KiB  {len(self.captured)} graphs"])


__all__ = ["Captured", "Graphs", "Workspace"]
