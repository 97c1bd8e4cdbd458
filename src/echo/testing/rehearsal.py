"""CUDA graphs rehearsed on the CPU: what a captured function did is done again, operation by operation, at the same addresses."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Hashable, Iterator
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from echo._checks import EchoError
from echo.kernels import reference
from echo.testing.kit import syncs
from echo.workspace import Captured, Graphs

T = TypeVar("T")
EMPTY = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")


class RecordedGraphs(Graphs):
    """In place of :class:`~echo.workspace.Graphs`, where there is no GPU: finds what would break, or go stale, in a captured function.

    A key's second call is recorded: every tensor operation and every launch of a Triton kernel (in its interpreter). From the third on
    nothing of the function's Python runs: the recorded operations run again on the recorded tensors, and what they return is copied to
    where it lay. A number of the host that should have changed, a branch on the host, an input at a new address show as wrong results,
    as with CUDA graphs; what a capture refuses is refused when it is recorded.

    Args:
        device: where the functions' tensors are.
        pool: as of :class:`~echo.workspace.Graphs`; not used.

    Attributes:
        runs: calls of each key that ran recorded operations.

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
        """Always."""
        return True

    def __call__(self, key: Hashable, function: Callable[[], T]) -> T:
        """As :meth:`Graphs.__call__`; recording runs the function, so nothing is run again in that call.

        Raises:
            EchoError: the function does what no graph can hold.
        """
        if key in self._seen and key not in self.captured:
            self.captured[key] = self.capture(function)
            result: T = self.captured[key].result
            return result
        if key in self.captured:
            self.runs[key] = self.runs.get(key, 0) + 1
        return super().__call__(key, function)

    def capture(self, function: Callable[[], Any]) -> Captured:
        """Runs the ``function`` and records it."""
        recording = Recording()
        with _launches(recording), recording:
            result = function()
        return Captured(recording.replay, result, 0)


class Recording(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records what runs within it; :meth:`replay` runs that again.

    Attributes:
        operations: names, in order; launches of kernels as ``"kernel name"``.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[str] = []
        self._steps: list[Callable[[], None]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, options = func.overloadpacket._qualified_op_name.split("::")[1], kwargs or {}
        if syncs(func) or name == "lift_fresh":  # the latter makes a tensor of what the host has
            raise EchoError(
                f"{name}: a captured function can neither look at a device's values nor bring constants from the host"
            )
        result = func(*args, **options)
        if name not in EMPTY and not (func.is_view and _alias(result, args)):
            self.operations.append(name)
            self._steps.append(lambda: _again(func, args, options, result))
        return result

    def launch(self, name: str, run: Callable[[], None]) -> None:
        """A kernel's launch, seen from outside: what its interpreter does inside is not recorded."""
        self.operations.append(name)
        self._steps.append(run)

    def replay(self) -> None:
        """Once more, at the same addresses."""
        for step in self._steps:
            step()


def _alias(result: Any, args: Any) -> bool:
    """Whether a view is one: some that are called so copy where they must, a cast for example."""
    first = result if isinstance(result, Tensor) else result[0]
    return bool(first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr())


def _again(func: Any, args: Any, options: Any, result: Any) -> None:
    new = func(*args, **options)
    pairs = (
        [(result, new)]
        if isinstance(result, Tensor)
        else list(zip(result or (), new or (), strict=True))
    )
    for old, value in pairs:
        if isinstance(old, Tensor) and old.data_ptr() != value.data_ptr():
            old.copy_(value)


@contextlib.contextmanager
def _launches(recording: Recording) -> Iterator[None]:
    """Within it every launch of a Triton kernel is recorded, and attention's reference, which looks at values, as if it were one."""
    attention = reference.tree_attention

    def attend(*args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        with _disable_current_modes():
            result = attention(*args, **options)

        def again() -> None:
            for old, new in zip(result, attention(*args, **options), strict=True):
                old.copy_(new)

        recording.launch("attention", again)
        return result

    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(reference, "tree_attention", attend))
        if importlib.util.find_spec("triton") is not None:
            from triton.runtime.interpreter import InterpretedFunction

            run = InterpretedFunction.run

            def recorded(kernel: Any, *args: Any, **options: Any) -> None:
                def again() -> None:
                    with _disable_current_modes():
                        run(kernel, *args, **options)

                again()
                recording.launch(f"kernel {kernel.fn.__name__.strip('_')}", again)

            patches.enter_context(mock.patch.object(InterpretedFunction, "run", recorded))
        yield
