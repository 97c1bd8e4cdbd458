"""A step's planning at fixed addresses, and the CUDA graphs that hold it.

Launched one by one, the kernels of a step cost the host far more than they cost the device: 2.4 to 2.9 ms of launches for 0.13 ms of
work at 256 requests on an H100. :class:`Workspace` owns the buffers that a step writes to, so that a CUDA graph can hold the step;
:class:`Graphs` captures and replays. Its calls are those of :class:`~echo.ElasticBudgetScheduler`, with the same bits.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from echo import _checks as checks
from echo._checks import EchoError
from echo.budget.history import BINS
from echo.budget.rules import GlobalRank
from echo.budget.scheduler import ElasticBudgetScheduler
from echo.budget.step import Scratch, begin, check
from echo.cost import CostModel
from echo.stats import StepStats
from echo.tree.accept import Accepted, Compaction, accept, compact
from echo.tree.packed import WORD, PackedTree
from echo.tree.supertree import Frontier, Layer, Nodes, SuperTree

T = TypeVar("T")


class Workspace:
    """The buffers of a step: what is computed between two passes of the target lies at addresses that never change.

    Each call below takes and returns the values that the scheduler's own call takes and returns; the tensors in them are views of these
    buffers, valid until the same call is made again. With a GPU's kernels, a shipped rule and a :class:`SparseGate` or none, planning and
    accepting a drafted step allocate nothing. Any prefix of the lanes can be planned, and any number of rows up to ``num_verify_tokens``:
    a tier is a view.

    Three captures hold a step, each keyed by what alone changes it, because an engine's grammar, penalties and sampler run between them:
    *draft* (lanes, depth): :meth:`begin`, then the drafter and :meth:`grow` by turns; *plan* (lanes, depth, rows): :meth:`pack`; *accept*
    (lanes, rows): :meth:`accept`, :meth:`compact`, :meth:`observe`, and what the engine and its drafter do with what was accepted. What
    they need of the host changes between replays in two buffers: the rows of the step (:meth:`set_rows`) and what the caller gives to
    :meth:`begin`.

    Args:
        scheduler: the policy; with weights it plans without a workspace.
        lanes: the most requests of a step, empty lanes included.
        k: candidates that the drafter returns after each node; one number, or one for each depth.
        num_verify_tokens: the most rows of a step, roots included.
        max_num_reqs: request slots of the history; as many as lanes where not given.
        device: where all of it lies.
        packed: another workspace's ``packed``, of as many rows and mask words, to pack into: the graphs of one target serve several policies.

    Attributes:
        packed: the widest step's columns; a step is their beginning.
        history: :class:`History` of ``max_num_reqs`` slots, updated in place by :meth:`observe`. What the host counts (``tick``, ``idle``)
            is counted outside: :meth:`History.advance`.
        stats: :class:`StepStats`, updated in place likewise.

    Raises:
        EchoError: an argument of the wrong kind or out of range.

    Example:
        >>> import echo
        >>> scheduler = echo.ElasticBudgetScheduler(echo.GlobalRank(2), budget=4, max_depth=1)
        >>> space = Workspace(scheduler, lanes=2, k=2, num_verify_tokens=4)
        >>> tree = space.begin(torch.tensor([7, 9]))
        >>> tree = space.grow(tree, torch.tensor([[[1, 2]], [[3, 4]]]), torch.log(torch.tensor([[[0.9, 0.1]], [[0.6, 0.3]]])))
        >>> space.pack(tree).tokens.tolist()
        [7, 1, 9, 3]
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
        counts: list[int] = (given.repeat(depth) if given.ndim == 0 else given).tolist()
        if len(counts) != depth:
            raise EchoError(
                f"k: expected one number, or one for each of {depth} depths, got {len(counts)} numbers"
            )
        self._widths, self._sizes = [1], [1]
        for each in counts:
            self._sizes.append(self._widths[-1] * each)
            self._widths.append(min(scheduler.rule.beam, self._sizes[-1]))
        self._ends = list(itertools.accumulate(self._sizes))
        self._words, self._buys = (
            -(-scheduler.max_verify_tokens_per_req // WORD),
            type(scheduler.rule) is not GlobalRank,
        )
        self.history = scheduler.history(
            lanes if max_num_reqs is None else max_num_reqs, self.device
        )
        self.stats = StepStats.empty(self.device)
        total = self._ends[-1]
        i8, i32, i64, f32, yes = torch.int8, torch.int32, torch.int64, torch.float32, torch.bool
        self._nodes = Nodes(*(self._new(lanes, total, dtype=kind) for kind in (i64, i64, f32, yes)))
        self._frontiers = [
            tuple(self._new(lanes * width, dtype=kind) for kind in (i64, i64, i64, f32, yes))
            for width in self._widths
        ]
        self._drafted = [self._new(lanes, dtype=yes) for _ in self._sizes]
        self._status = [self._new(lanes, dtype=i8) for _ in self._sizes]
        self._limit, self._invalid = self._new(lanes, dtype=i64), self._new(lanes, dtype=i32)
        self._held = self._by_depth(lambda: self._new(lanes, dtype=i64))
        self._left = self._by_depth(lambda: self._new(dtype=i64))
        self._budget = torch.full((), n, dtype=i64, device=self.device)
        self._layers = torch.zeros((), dtype=i32, device=self.device)
        most = min(total, n, scheduler.max_verify_tokens_per_req)
        wide = lanes * total
        self._scratch = {
            "place": self._new(wide, dtype=i32), "share": self._new(lanes, dtype=i32), "counts": self._new(lanes, dtype=i64),
            "key": self._new(lanes * most, dtype=i64), "cost": self._new(wide, dtype=i32), "gain": self._new(wide, dtype=f32),
        }  # fmt: skip
        self.packed = self._packed(n) if packed is None else packed
        check(self.packed, lanes, n, self._words, self.device)
        self._foresees = isinstance(scheduler.budget, CostModel) and depth > 0
        self._outlook = self._new(lanes, depth, BINS, dtype=f32) if self._foresees else None
        self._expected = self._new(lanes, depth, dtype=f32) if self._foresees else None
        steps = lanes * (depth + 1)
        self._emitted, self._walked = self._new(steps, dtype=i64), self._new(steps, dtype=i64)
        self._ends_of = [
            self._new(lanes, dtype=i64) for _ in range(3)
        ]  # lengths, bonus tokens, where walks were cut
        kinds = {
            "accept_index": i32,
            "gather": i64,
            "valid": yes,
            "positions": i64,
            "source": i64,
            "target": i64,
        }
        self._lists = {name: self._new(steps, dtype=kind) for name, kind in kinds.items()}
        self._context = self._new(lanes, dtype=i64)
        self._trees: dict[tuple[int, int], SuperTree] = {}

    def _packed(self, n: int) -> PackedTree:
        new, ints = self._new, torch.int32
        return PackedTree(
            tokens=new(n, dtype=torch.int64), parent=new(n, dtype=ints), depth=new(n, dtype=ints), request=new(n, dtype=ints),
            indptr=new(self.lanes + 1, dtype=ints), mask=new(n, self._words, dtype=ints), score=new(n, dtype=torch.float32),
            node=new(n, dtype=torch.int64), committed=new(n, dtype=torch.bool), status=new(self.lanes, dtype=torch.int8),
            invalid=new(self.lanes, dtype=ints), max_depth=0,
        )  # fmt: skip

    def _new(self, *shape: int, dtype: torch.dtype) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=self.device)

    def _by_depth(self, make: Callable[[], Tensor]) -> list[Tensor]:
        """A buffer for each depth where layers are bought one after another; one for all where only the end selects."""
        return [make() for _ in self._sizes] if self._buys else [make()] * len(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all buffers, the history's included."""
        seen = {t.data_ptr(): t.nbytes for t in _tensors(list(vars(self).values()))}
        return sum(seen.values())

    def set_num_verify_tokens(self, num_verify_tokens: int) -> None:
        """Makes ``num_verify_tokens`` the budget of the next step, outside of the captured graphs: the draft graph reads it when it buys.

        Raises:
            EchoError: more rows than ``num_verify_tokens``.
        """
        self._budget.fill_(
            checks.integer("num_verify_tokens", num_verify_tokens, 1, self.num_verify_tokens)
        )

    def begin(
        self,
        root_tokens: Tensor,
        *,
        live: Tensor | None = None,
        verify_limits: Tensor | None = None,
    ) -> SuperTree:
        """As :meth:`ElasticBudgetScheduler.begin`, of the first ``len(root_tokens)`` lanes and as many rows as were last set.

        Args:
            root_tokens: int64 [B].
            live: bool [B].
            verify_limits: int64 [B].

        Raises:
            EchoError: shapes or dtypes that do not fit, or more requests than lanes.
        """
        batch = checks.tensor("root_tokens", root_tokens, ["B"], torch.int64, self.device).shape[0]
        checks.integer("len(root_tokens)", batch, 0, self.lanes)
        options: dict[str, Any] = {
            "num_verify_tokens": self.num_verify_tokens,
            "max_verify_tokens_per_req": self.scheduler.max_verify_tokens_per_req,
            "budget": self._budget,
        }
        return begin(
            root_tokens,
            live,
            verify_limits,
            None,
            deep=self.scheduler.max_depth > 0,
            out=self.tree(batch, 0),
            **options,
        )

    def grow(self, tree: SuperTree, tokens: Tensor, log_probs: Tensor) -> SuperTree:
        """As :meth:`ElasticBudgetScheduler.grow`; ``tokens`` int64 and ``log_probs`` float [B, W, k], k as the workspace was made for.

        Raises:
            EchoError: shapes or dtypes that do not fit, or a layer beyond ``max_depth``.
        """
        if tree.depth + 1 < len(self._sizes):
            width = self._widths[tree.depth]
            checks.tensor(
                "tokens",
                tokens,
                [tree.batch, width, self._sizes[tree.depth + 1] // width],
                torch.int64,
                self.device,
            )
        return self.scheduler.grow(
            tree,
            tokens,
            log_probs,
            out=self.tree(tree.batch, min(tree.depth + 1, len(self._sizes) - 1)),
        )

    def pack(self, tree: SuperTree, num_verify_tokens: int | None = None) -> PackedTree:
        """As :meth:`ElasticBudgetScheduler.pack`, into so many rows (those of the workspace where not given).

        Where anything was drafted, ``max_depth`` of what it returns is the scheduler's: how many layers were is known on the device
        (``drafted``), so that one graph serves acceptance for every depth. Without a layer it is plain decoding, and nothing is planned.

        Raises:
            EchoError: more rows than the workspace has.
        """
        given = self.num_verify_tokens if num_verify_tokens is None else num_verify_tokens
        n = checks.integer("num_verify_tokens", given, 1, self.num_verify_tokens)
        batch, depth = tree.batch, tree.depth
        if depth:
            self._layers.fill_(depth)
        total = self._ends[depth]
        most = min(total, n, tree.max_verify_tokens_per_req)
        shapes = {
            "place": (batch, total),
            "share": (batch,),
            "counts": (batch,),
            "key": (batch, most),
            "cost": (batch, total),
        }
        shapes["gain"] = (batch, total)
        scratch = Scratch(
            **{name: _view(self._scratch[name], shape) for name, shape in shapes.items()}
        )
        out = self._columns(batch, n, depth)
        packed = self.scheduler._pack(
            replace(tree, num_verify_tokens=n),
            n,
            self._words,
            self._foresees and depth > 0,
            out,
            scratch,
        )
        if not depth:
            return packed
        if self._outlook is not None and self._expected is not None:
            packed = replace(
                packed, acceptance_histogram=self._outlook[:batch], expected=self._expected[:batch]
            )
        return replace(packed, max_depth=self.scheduler.max_depth, num_layers=self._layers)

    def accept(
        self,
        packed: PackedTree,
        target_tokens: Tensor | None = None,
        *,
        logits: Tensor | None = None,
        max_new_tokens: Tensor | None = None,
        eos_tokens: Tensor | None = None,
        backend: str = "auto",
    ) -> Accepted:
        """As :func:`echo.verify`.

        Raises:
            EchoError: as there.
        """
        shape, lanes = (packed.batch, packed.max_depth + 1), slice(0, packed.batch)
        buffers = (
            _view(self._emitted, shape),
            _view(self._walked, shape),
            *(each[lanes] for each in self._ends_of),
        )
        ends: dict[str, Any] = {"max_new_tokens": max_new_tokens, "eos_tokens": eos_tokens}
        return accept(
            packed, target_tokens, logits=logits, **ends, backend=backend, out=Accepted(*buffers)
        )

    def compact(
        self,
        packed: PackedTree,
        accepted: Accepted,
        prefix_lens: Tensor,
        *,
        page_table: Tensor | None = None,
        page_size: int = 1,
        pad_slot_id: int | None = None,
    ) -> Compaction:
        """As :func:`echo.compact`.

        Raises:
            EchoError: as there.
        """
        shape = accepted.rows.shape
        lists = {name: _view(buffer, shape) for name, buffer in self._lists.items()}
        out = Compaction(**lists, prefix_lens=self._context[: packed.batch])
        pages: dict[str, Any] = (
            {}
            if page_table is None
            else {"page_table": page_table, "page_size": page_size, "pad_slot_id": pad_slot_id}
        )
        return compact(packed, accepted, prefix_lens, out=out, **pages)

    def observe(self, req_indices: Tensor, packed: PackedTree, accepted: Accepted) -> None:
        """Updates ``history`` and ``stats`` in place after a step; ``req_indices`` int64 [B], each lane's slot of the history.

        Raises:
            EchoError: as :meth:`History.observe`.
        """
        self.history.observe(req_indices, packed, accepted, out=self.history)
        self.stats.observe(packed, accepted, out=self.stats)

    def tree(self, batch: int, depth: int) -> SuperTree:
        """The buffers of the first ``batch`` lanes as a tree of ``depth`` layers: what a replayed draft graph has written."""
        known = self._trees.get((batch, depth))
        if known is not None:
            return known
        whole = self._nodes
        nodes = Nodes(
            whole.token[:batch], whole.parent[:batch], whole.score[:batch], whole.committed[:batch]
        )
        layers = []
        for d, (end, size) in enumerate(zip(self._ends[: depth + 1], self._sizes, strict=False)):
            columns = (
                column[:, end - size : end]
                for column in (nodes.token, nodes.parent, nodes.score, nodes.committed)
            )
            token, parent, score, bought = columns
            layers.append(Layer(d, token, parent, score, bought, self._drafted[d][:batch]))
        shape = batch, self._widths[depth]
        token, parent, index, score, active = (
            _view(buffer, shape) for buffer in self._frontiers[depth]
        )
        if not depth:  # the roots themselves
            token, parent, index, score = (
                layers[0].token,
                layers[0].parent,
                layers[0].parent,
                layers[0].score,
            )
        made = SuperTree(
            layers=tuple(layers),
            frontier=Frontier(token, parent, index, score, active, depth),
            status=self._status[depth][:batch],
            verify_limits=self._limit[:batch],
            num_committed=self._held[depth][:batch],
            num_remaining=self._left[depth],
            invalid=self._invalid[:batch],
            num_verify_tokens=self.num_verify_tokens,
            max_verify_tokens_per_req=self.scheduler.max_verify_tokens_per_req,
            nodes=nodes,
        )
        self._trees[batch, depth] = made
        return made

    def _columns(self, batch: int, num_rows: int, depth: int) -> PackedTree:
        """The rows of a step of that size."""
        names = ("tokens", "parent", "depth", "request", "mask", "score", "node", "committed")
        columns: dict[str, Any] = {name: getattr(self.packed, name)[:num_rows] for name in names}
        columns |= {name: getattr(self.packed, name)[:batch] for name in ("status", "invalid")}
        if self._outlook is not None and self._expected is not None and depth:
            columns |= {
                "acceptance_histogram": self._outlook[:batch, :depth],
                "expected": self._expected[:batch, :depth],
            }
        return replace(self.packed, **columns, indptr=self.packed.indptr[: batch + 1])


def _view(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    """The beginning of a flat buffer in a shape, without gaps."""
    count = 1
    for size in shape:
        count *= size
    return buffer[:count].view(*shape)


def _tensors(value: object) -> list[Tensor]:
    """All tensors in nested values, each storage once."""
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
    """A captured function: how to run it again, what it returned, and the bytes that it keeps."""

    replay: Callable[[], None]
    result: Any
    nbytes: int


class Graphs:
    """CUDA graphs by key: a function runs as it is the first time, is captured the second time, and replayed from then on.

    The first run compiles kernels and fills caches; nothing runs twice in one step. A captured function runs no Python when it is
    replayed: it must not look at a device's values, must find its inputs at the addresses that it was captured with, and leave what others
    read in buffers of a fixed address (:class:`Workspace`, and an engine's own). All graphs share one memory pool, so they are to be
    replayed one after another on one stream. On a device without graphs every call just calls the function.

    Args:
        device: where the functions' tensors are.
        pool: an engine's own graph memory pool (``torch.cuda.graph_pool_handle()``); a new one where not given.

    Attributes:
        captured: what was captured, by key.

    Example:
        >>> graphs = Graphs("cpu")
        >>> graphs("add", lambda: torch.ones(()) + 1).item()
        2.0
    """

    def __init__(self, device: torch.device | str, *, pool: Any = None) -> None:
        self.device, self.pool = torch.device(device), pool
        self.captured: dict[Hashable, Captured] = {}
        self._seen: set[Hashable] = set()

    def __call__(self, key: Hashable, function: Callable[[], T]) -> T:
        """What ``function`` returns: the same tensors on every replay of its ``key``, with new values."""
        if not self.captures:
            return function()
        known = self.captured.get(key)
        if known is None:
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
        """Captures ``function`` without running it."""
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.memory_reserved(self.device)
        with torch.cuda.graph(graph, pool=self.pool):
            result = function()
        return Captured(graph.replay, result, torch.cuda.memory_reserved(self.device) - before)

    @property
    def nbytes(self) -> int:
        """Bytes by which the graphs' common pool has grown, as torch counts them; a graph's own nodes are the driver's and not in it."""
        return sum(entry.nbytes for entry in self.captured.values())

    def table(self) -> str:
        """A line for each captured graph: its key and its bytes."""
        lines = [f"{entry.nbytes / 1024:10,.0f} KiB  {key}" for key, entry in self.captured.items()]
        return "\n".join([*lines, f"{self.nbytes / 1024:10,.0f} KiB  {len(self.captured)} graphs"])


__all__ = ["Captured", "Graphs", "Workspace"]
