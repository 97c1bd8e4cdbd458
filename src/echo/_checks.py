"""Checks of arguments. Shapes, dtypes and devices are host facts: checking them reads nothing back from a device."""

from __future__ import annotations

import math
import operator
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from numbers import Real
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = 2.0**-6
"""The most by which a log-probability may be above 0: half a step of float16 logits up to 64, whose log-softmax was taken in float16, and
more than the logarithm of a bfloat16 probability that is a step above 1. What is above was never a log-probability."""
INTEGERS = (torch.int64, torch.int32)
INT64 = torch.iinfo(torch.int64).max
HostInts = Sequence[int] | NDArray[Any] | Tensor
"""What :func:`integers` takes of several: a list, a numpy array or a CPU tensor."""

T = TypeVar("T")


class EchoError(ValueError):
    """Bad input. The message names the argument, what was expected and what came."""


def tensor(
    name: str,
    value: object,
    shape: Sequence[int | str],
    dtypes: torch.dtype | Sequence[torch.dtype],
    device: torch.device | None = None,
) -> Tensor:
    """``value`` if it is a tensor of that shape (a string stands for any size), of one of the dtypes, on the device.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    if isinstance(value, Tensor) and _matches(value, shape, dtypes):
        if device is not None and value.device != device:
            raise EchoError(f"{name}: expected a tensor on {device}, got one on {value.device}")
        return value
    wanted = (dtypes,) if isinstance(dtypes, torch.dtype) else dtypes
    text = f"{' or '.join(str(d).removeprefix('torch.') for d in wanted)} [{', '.join(str(s) for s in shape)}]"
    if isinstance(value, Tensor):
        raise EchoError(
            f"{name}: expected {text}, got {str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
        )
    raise EchoError(f"{name}: expected a tensor {text}, got {type(value).__name__}")


def _matches(
    value: Tensor, shape: Sequence[int | str], dtypes: torch.dtype | Sequence[torch.dtype]
) -> bool:
    if value.dtype is not dtypes and (isinstance(dtypes, torch.dtype) or value.dtype not in dtypes):
        return False
    sizes = value.shape
    if len(sizes) != len(shape):
        return False
    for size, n in zip(sizes, shape, strict=True):
        if size != n and not isinstance(n, str):
            return False
    return True


def instance(name: str, value: object, kind: type[T]) -> T:
    """``value`` if it is one.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    if not isinstance(value, kind):
        raise EchoError(
            f"{name}: expected {'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}, got {type(value).__name__}"
        )
    return value


def follows(name: str, value: object, protocol: type[object]) -> None:
    """Checks that ``value`` has all that the protocol asks for.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    wanted = [part for part in vars(protocol) if not part.startswith("_") or part == "__call__"]
    if isinstance(value, type) or not all(hasattr(value, part) for part in wanted):
        raise EchoError(
            f"{name}: expected a {protocol.__name__} ({', '.join(wanted)}), got {value!r}"
        )


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` as an int if it is one of any kind (Python's, numpy's, a tensor of no dimension on the host), within [low, high].

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    number = value if type(value) is int else _whole(value)
    if number is not None and number >= low and (high is None or number <= high):
        return number
    raise EchoError(f"{name}: expected an int {_range(low, high)}, got {value!r}")


def _whole(value: object) -> int | None:
    """An integer of any kind; None of what is none. A bool is none, and a tensor on a device must not be waited for."""
    if isinstance(value, bool) or (
        isinstance(value, Tensor) and (value.dtype == torch.bool or value.dim() or not value.is_cpu)
    ):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def integers(name: str, value: object, low: int, high: int | None = None) -> NDArray[np.int64]:
    """``value`` as int64 [n], or [] of a single one, if it is integers of any kind within [low, high], known to the host.

    Args:
        name: of the argument.
        value: an integer, a sequence or numpy array of them, or a tensor of no or one dimension on the host.
        low, high: what each must be within.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    expected = f"{name}: expected ints {_range(low, high)} on the host (one, a list, an array or a CPU tensor)"
    if isinstance(value, Tensor):
        if not value.is_cpu:
            raise EchoError(f"{expected}, got a tensor on {value.device}")
        value = value.detach().numpy()
    if isinstance(value, np.ndarray):
        if value.ndim > 1 or value.dtype.kind not in "iu":
            raise EchoError(f"{expected}, got {value.dtype} {list(value.shape)}")
        found = value
    else:
        several = isinstance(value, Iterable) and not isinstance(value, str | bytes)
        items: list[object] = list(value) if several else [value]  # type: ignore[call-overload]
        numbers = [item if type(item) is int else _whole(item) for item in items]
        if None in numbers:
            raise EchoError(f"{expected}, got {items[numbers.index(None)]!r}")
        found = np.array(numbers if several else numbers[0], dtype=None if items else np.int64)
    if found.size and not (low <= found.min() and found.max() <= (INT64 if high is None else high)):
        raise EchoError(f"{expected}, got numbers from {found.min()} to {found.max()}")
    return found.astype(np.int64)


def ints(name: str, values: object, low: int, high: int | None = None) -> tuple[int, ...]:
    """Several integers as Python's, from what :func:`integers` takes but for a single one.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    found = integers(name, values, low, high)
    if found.ndim == 0:
        raise EchoError(f"{name}: expected ints {_range(low, high)}, several, got {values!r}")
    return tuple(found.tolist())


def real(name: str, value: object, low: float, high: float | None = None) -> float:
    """``value`` as a float if it is a finite number of any kind, as in :func:`integer`, within [low, high].

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    scalar = (
        isinstance(value, Tensor)
        and value.is_cpu
        and value.dim() == 0
        and not value.is_complex()
        and value.dtype != torch.bool
    )
    if (isinstance(value, Real) or scalar) and not isinstance(value, bool):
        number = float(value)  # type: ignore[arg-type]
        if low <= number <= (sys.float_info.max if high is None else high):
            return number
    raise EchoError(f"{name}: expected a number {_range(low, high)}, got {value!r}")


def integer_field(owner: object, name: str, low: int, high: int | None = None) -> None:
    """Makes a field of a frozen dataclass an int, as :func:`integer` does."""
    object.__setattr__(owner, name, integer(name, getattr(owner, name), low, high))


def real_field(owner: object, name: str, low: float, high: float | None = None) -> None:
    """Makes a field of a frozen dataclass a float, as :func:`real` does."""
    object.__setattr__(owner, name, real(name, getattr(owner, name), low, high))


def instead(score: float, scores: Iterable[float]) -> str:
    """What ``scores`` that hold such a ``score`` are likely to be instead of log-probabilities; nothing where it might be one, or NaN."""
    if not ROUNDING < score < math.inf:
        return ""
    return (
        " (probabilities? take their logarithm)"
        if all(0 <= q <= 1 for q in scores)
        else " (logits? take their log-softmax)"
    )


@contextmanager
def reading(expected: str) -> Iterator[None]:
    """Whatever goes wrong in the block, where a file or a text is taken apart, says what was ``expected`` of it.

    Raises:
        EchoError: in place of every other error than itself and a missing file.
    """
    try:
        yield
    except (EchoError, FileNotFoundError):
        raise
    except Exception as error:
        raise EchoError(f"{expected}, got {type(error).__name__}: {error}") from error


def _range(low: float, high: float | None) -> str:
    return f">= {low}" if high is None else f"from {low} to {high}"
