"""Checks of arguments. Shapes, dtypes and devices are host facts: checking them reads nothing back from a device."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from echo.errors import EchoError

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ROUNDING = 2.0**-6
"""The most by which a log-probability may be above 0: half a step of float16 logits up to 64, whose log-softmax was taken in float16, and
more than the logarithm of a bfloat16 probability that is a step above 1. What is above was never a log-probability."""
T = TypeVar("T")
INTEGERS = (torch.int64, torch.int32)


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
        raise EchoError(f"{name}: expected {text}, got {str(value.dtype).removeprefix('torch.')} {list(value.shape)}")
    raise EchoError(f"{name}: expected a tensor {text}, got {type(value).__name__}")


def _matches(value: Tensor, shape: Sequence[int | str], dtypes: torch.dtype | Sequence[torch.dtype]) -> bool:
    if value.dtype is not dtypes and (isinstance(dtypes, torch.dtype) or value.dtype not in dtypes):
        return False
    sizes = value.shape
    if len(sizes) != len(shape):
        return False
    for size, n in zip(sizes, shape, strict=True):  # noqa: SIM110 - half the time of a generator, and every call passes here
        if size != n and not isinstance(n, str):
            return False
    return True


def instance(name: str, value: object, kind: type[T]) -> T:
    """``value`` if it is one.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    if not isinstance(value, kind):
        raise EchoError(f"{name}: expected {'an' if kind.__name__[0] in 'AEIOU' else 'a'} {kind.__name__}, got {type(value).__name__}")
    return value


def follows(name: str, value: object, protocol: type[object]) -> None:
    """Checks that ``value`` has all that the protocol asks for.

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    wanted = [part for part in vars(protocol) if not part.startswith("_") or part == "__call__"]
    if isinstance(value, type) or not all(hasattr(value, part) for part in wanted):
        raise EchoError(f"{name}: expected a {protocol.__name__} ({', '.join(wanted)}), got {value!r}")


def integer(name: str, value: object, low: int, high: int | None = None) -> int:
    """``value`` if it is an int within [low, high].

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= low and (high is None or value <= high):
        return value
    raise EchoError(f"{name}: expected an int {_range(low, high)}, got {value!r}")


def ints(name: str, values: Iterable[Any]) -> tuple[int, ...]:
    """``values`` as Python's ints: whole numbers of any kind, numpy's and torch's too (a tensor's are read back).

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    with reading(f"{name}: expected ints"):
        given = values.tolist() if isinstance(values, Tensor) else list(values)
        found = tuple(int(value) for value in given)
    for value, whole in zip(given, found, strict=True):
        if value != whole:
            raise EchoError(f"{name}: expected ints, got {value!r}")
    return found


def real(name: str, value: object, low: float, high: float | None = None) -> float:
    """``value`` as a float if it is a finite number within [low, high].

    Raises:
        EchoError: naming the argument, what was expected and what came.
    """
    if isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= (sys.float_info.max if high is None else high):
        return float(value)
    raise EchoError(f"{name}: expected a number {_range(low, high)}, got {value!r}")


def instead(score: float, scores: Iterable[float]) -> str:
    """What ``scores`` that hold such a ``score`` are likely to be instead of log-probabilities; nothing where it might be one, or NaN."""
    if not ROUNDING < score < math.inf:
        return ""
    return " (probabilities? take their logarithm)" if all(0 <= q <= 1 for q in scores) else " (logits? take their log-softmax)"


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
