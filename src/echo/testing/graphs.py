"""Emulation of CUDA graphs on a CPU: replay recorded operations at the same addresses."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from echo._checks import EchoError
from echo.kernels import reference
from echo.testing.invariants import RefuseSyncs, operator
from echo.workspace import Captured, Graphs

T = TypeVar("T")
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class RecordedGraphs(Graphs):
    """Stand-in for :class:`~echo.workspace.Graphs` without a GPU: finds what a capture would break.

    A key's second call is recorded: every tensor operation, and every launch of a Triton kernel (in
    its interpreter). Later calls run none of the function's Python, only the recorded operations on
    the recorded tensors. A host number that should have changed, a branch on the host, or an input
    at a new address therefore give wrong results, as with CUDA graphs.

    Args:
        device: of the functions' tensors.
        pool: not used.

    Attributes:
        runs: number of replays of each key.

    Example:
        >>> graphs, total = RecordedGraphs("cpu"), torch.zeros(())
        >>> for _ in range(5):
        ...     _ = graphs("count", lambda: total.add_(1))
        >>> total.item(), graphs.runs
        (5.0, {'count': 3})
    """

    def __init__(self, device: torch.device | str = "cpu", *, pool: Any = None) -> None:
        super().__init__(device, pool=pool)
        self.runs: dict[Hashable, int] = {}

    @property
    def captures(self) -> bool:
        """Always true."""
        return True

    def __call__(self, key: Hashable, function: Callable[[], T]) -> T:
        """As :meth:`Graphs.__call__`; EchoError: the function does what no graph can capture."""
        if key in self.captured:
            self.runs[key] = self.runs.get(key, 0) + 1
        return super().__call__(key, function)

    def capture(self, function: Callable[[], Any]) -> Captured:
        """Run ``function`` and record it; the first replay, of this call, does nothing."""
        recording = Recording()
        with recording.launches(), recording:
            result = function()
        replays = itertools.count()
        return Captured(lambda: recording.replay() if next(replays) else None, result, 0)


class Recording(RefuseSyncs):  # type: ignore[no-untyped-call]
    """Record the operations within the block; EchoError: one that no graph can capture.

    Attributes:
        operations: names, in order; kernel launches as ``"kernel name"``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self._steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operator(func)
        if name == "lift_fresh":
            raise EchoError(f"{name}: expected no constants from the host, got one")
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if name not in EMPTY and not (func.is_view and _alias(result, args)):
            self._add(name, lambda: _again(func, args, kwargs or {}, result))
        return result

    def _add(self, name: str, step: Callable[[], None]) -> None:
        self.operations.append(name)
        self._steps.append(step)

    def replay(self) -> None:
        """Run the recorded operations again, at the same addresses."""
        for step in self._steps:
            step()

    @contextlib.contextmanager
    def launches(self) -> Iterator[None]:
        """Record each launch of a Triton kernel, or of attention's reference, as one operation."""
        attention = reference.tree_attention

        def attend(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
            with _disable_current_modes():
                result = attention(*args, **options)
            self._add("attention", lambda: _again(attention, args, options, result))
            return result

        with contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(reference, "tree_attention", attend))
            if importlib.util.find_spec("triton") is not None:
                from triton.runtime.interpreter import InterpretedFunction

                run = InterpretedFunction.run

                def recorded(kernel: Any, *args: Any, **options: Any) -> None:
                    def launch() -> None:
                        with _disable_current_modes():
                            run(kernel, *args, **options)

                    launch()
                    self._add(f"kernel {kernel.fn.__name__.strip('_')}", launch)

                patches.enter_context(mock.patch.object(InterpretedFunction, "run", recorded))
            yield


def _alias(result: Any, args: Any) -> bool:
    """Whether a view really is one: some operators classified as views copy, such as a cast."""
    first = result if isinstance(result, Tensor) else result[0]
    return bool(first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr())


def _again(func: Any, args: Any, options: Any, result: Any) -> None:
    new = func(*args, **options)
    one = isinstance(result, Tensor)
    pairs = [(result, new)] if one else list(zip(result or (), new or (), strict=True))
    for old, value in pairs:
        if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
            old.copy_(value)
