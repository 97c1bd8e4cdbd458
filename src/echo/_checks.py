"""Argument checks. Each raises EchoError naming the argument, what was expected and what came.

Shapes, dtypes and devices are known to the host, so checking them is sync-free.
"""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.int64, torch.int32)
INT64 = torch.iinfo(torch.int64).max
ROUNDING = 2.0**-6
"""Greatest accepted log-probability. Rounding exceeds 0 by half a step of float16 logits up to 64
with a float16 log-softmax, or by a bfloat16 probability one step above 1."""
HostInts = Sequence[int] | NDArray[Any] | Tensor
"""Several integers for :func:`integers`: a list, a numpy array or a CPU tensor."""

T = TypeVar("T")


class EchoError(ValueError):
    """Bad input. The message names the argument, what was expected and what came."""


def tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: torch.dtype | Sequence[torch.dtype] = (),
    device: torch.device | None = None,
) -> Tensor:
    """Return ``value``, a tensor of that shape, dtype (Defaults to any) and device.

    A string in ``shape`` is any size; "..." at its end, any more dimensions.
    """
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    got = type(value).__name__
    if isinstance(value, Tensor):
        if (not wanted or value.dtype in wanted) and _fits(value.shape, shape):
            if device is None or value.device == device:
                return value
            raise EchoError(f"{name}: expected a tensor on {device}, got one on {value.device}")
        got = f"{value.dtype} {list(value.shape)}"
    kinds = " or ".join(map(str, wanted))
    if not kinds or not isinstance(value, Tensor):
        kinds = f"a tensor {kinds}".rstrip()
    text = f"{kinds} [{', '.join(map(str, shape))}]"
    raise EchoError(f"{name}: expected {text}, got {got}".replace("torch.", ""))


def _fits(sizes: Sequence[int], shape: Sequence[int | str]) -> bool:
    if shape and shape[-1] == "...":
        shape = shape[:-1]
        sizes = sizes[: len(shape)]
    return len(sizes) == len(shape) and all(
        isinstance(n, str) or size == n for size, n in zip(sizes, shape, strict=True)
    )


def copy_into(out: T | None, value: T) -> T:
    """Return ``value``, or ``out`` (a tensor or dataclass of tensors) after copying it there.

    Every buffer must have its value's shape, dtype and device; all are checked before the first is
    written. Where a field of ``out`` is None or no tensor, the value's field is passed on.
    """
    if out is None:
        return value
    new: Any = value
    old: Any = out
    if isinstance(new, Tensor):
        buffer: T = tensor("out", old, new.shape, new.dtype, new.device).copy_(new)  # type: ignore[assignment]
        return buffer
    host = {}
    pairs = []
    for name in [field.name for field in fields(instance("out", old, type(new)))]:
        part = getattr(new, name)
        into = getattr(old, name)
        if isinstance(part, Tensor) and into is not None:
            pairs.append((tensor(f"out.{name}", into, part.shape, part.dtype, part.device), part))
        else:
            host[name] = part
    for into, part in pairs:
        if into is not part:
            into.copy_(part)
    written: T = replace(old, **host)
    return written


def instance(name: str, value: object, kind: type[T]) -> T:
    """Return ``value`` if it is an instance of ``kind``."""
    if not isinstance(value, kind):
        article = "an" if kind.__name__[0] in "AEIOU" else "a"
        got = type(value).__name__
        raise EchoError(f"{name}: expected {article} {kind.__name__}, got {got}")
    return value


def follows(name: str, value: object, protocol: type[object]) -> None:
    """Check that ``value`` is an object with every member of the protocol."""
    wanted = [part for part in dir(protocol) if not part.startswith("_") or part == "__call__"]
    if isinstance(value, type) or not all(hasattr(value, part) for part in wanted):
        expected = f"{protocol.__name__} ({', '.join(wanted)})"
        raise EchoError(f"{name}: expected a {expected}, got {value!r}")


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """Return ``value`` as an int in [low, high]: Python's, numpy's, or a 0-d CPU tensor."""
    number = value if type(value) is int else _whole(value)
    if number is not None and number >= low and (high is None or number <= high):
        return number
    raise EchoError(f"{name}: expected an int {_range(low, high)}, got {value!r}")


def _whole(value: object) -> int | None:
    """An integer of any kind, else None."""
    try:
        return operator.index(_scalar(value))
    except TypeError:
        return None


def _scalar(value: object) -> Any:
    """A 0-d CPU tensor's value; None for a bool or another tensor, which might synchronize."""
    if isinstance(value, Tensor):
        value = value.item() if value.is_cpu and not value.dim() else None
    return None if isinstance(value, bool) else value


def integers(name: str, value: object, low: int, high: int | None = None) -> NDArray[np.int64]:
    """Return integers in [low, high], known to the host, as int64 [n], or [] for a single one.

    ``value`` is an integer, a sequence or array of them, or a CPU tensor of at most one dimension.
    """

    def refuse(got: str) -> EchoError:
        kinds = f"ints {_range(low, high)} on the host (one, a list, an array or a CPU tensor)"
        return EchoError(f"{name}: expected {kinds}, got {got}")

    if isinstance(value, Tensor):
        if not value.is_cpu:
            raise refuse(f"a tensor on {value.device}")
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        if value.ndim > 1 or value.dtype.kind not in "iu":
            raise refuse(f"{value.dtype} {list(value.shape)}")
        found = value
    else:
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
        items: list[object] = list(value) if several else [value]  # type: ignore[call-overload]
        numbers = [item if type(item) is int else _whole(item) for item in items]
        if None in numbers:
            raise refuse(f"{items[numbers.index(None)]!r}")
        found = np.array(numbers if several else numbers[0], dtype=None if items else np.int64)
    most = INT64 if high is None and found.dtype != np.int64 else high
    if found.size and not (low <= found.min() and (most is None or found.max() <= most)):
        raise refuse(f"numbers from {found.min()} to {found.max()}")
    return found.astype(np.int64)


def indices(name: str, value: object, high: int | None = None, low: int = 0) -> NDArray[np.int64]:
    """Return several integers, as :func:`integers`, int64 [n]."""
    found = integers(name, value, low, high)
    if found.ndim == 0:
        raise EchoError(f"{name}: expected ints {_range(low, high)}, several, got {found}")
    return found


def ints(name: str, value: object, low: int, high: int | None = None) -> tuple[int, ...]:
    """Return several integers, as :func:`integers`, but as Python's."""
    return tuple(indices(name, value, high, low).tolist())


def real(name: str, value: object, low: float, high: float | None = None) -> float:
    """Return ``value`` as a finite float in [low, high]; of any kind, as in :func:`integer`."""
    number = _scalar(value)
    if isinstance(number, Real):
        found = float(number)
        if low <= found <= (sys.float_info.max if high is None else high):
            return found
    raise EchoError(f"{name}: expected a number {_range(low, high)}, got {value!r}")


def integer_field(owner: object, name: str, low: int, high: int | None = None) -> None:
    """Make a field of a frozen dataclass an int, as :func:`integer` does."""
    object.__setattr__(owner, name, integer(name, getattr(owner, name), low, high))


def real_field(owner: object, name: str, low: float, high: float | None = None) -> None:
    """Make a field of a frozen dataclass a float, as :func:`real` does."""
    object.__setattr__(owner, name, real(name, getattr(owner, name), low, high))


def instead(score: float, scores: Iterable[float]) -> str:
    """Hint at what ``scores`` with such a ``score`` are instead of log-probabilities, or ""."""
    if not ROUNDING < score < math.inf:
        return ""
    if all(0 <= q <= 1 for q in scores):
        return " (probabilities? take their logarithm)"
    return " (logits? take their log-softmax)"


@contextmanager
def reading(expected: str) -> Iterator[None]:
    """Turn every error of the block, except EchoError and a missing file, into EchoError."""
    try:
        yield
    except (EchoError, FileNotFoundError):
        raise
    except Exception as error:
        raise EchoError(f"{expected}, got {type(error).__name__}: {error}") from error


def _range(low: float, high: float | None) -> str:
    if low == high:
        return f"equal to {low}"
    return f">= {low}" if high is None else f"from {low} to {high}"
