"""Triton's interpreter with every address checked: lanes touch elements of their own tensors
only."""

from __future__ import annotations

import contextlib
import mmap
from unittest import mock

import numpy as np
import pytest
import torch

MIDDLE, WINDOW = 1 << 51, 1 << 52
"""A launch sees its n-th tensor ``n * WINDOW + MIDDLE`` bytes above its place: no offset leads from
one to another."""


class _Tensor:
    """Addresses of a tensor's own elements: not those between them, nor the rest of its storage."""

    def __init__(self, name, value):
        self.name, self.value, self.size = name, value, value.element_size()
        self.low, self.whole = value.data_ptr(), value.is_contiguous()
        offsets = np.zeros(1, np.int64) if value.numel() else np.zeros(0, np.int64)
        for size, stride in () if self.whole else zip(value.shape, value.stride(), strict=True):
            offsets = (offsets[:, None] + np.arange(size) * stride).ravel()
        self.offsets = np.unique(offsets)

    def holds(self, offset):
        """Whether bytes ``offset`` from the first element are where an element begins."""
        place, rest = np.divmod(offset, self.size)
        if self.whole:
            return (rest == 0) & (place >= 0) & (place < self.value.numel())
        at = np.searchsorted(self.offsets, place).clip(max=max(len(self.offsets) - 1, 0))
        return (rest == 0) & (self.offsets[at] == place if len(self.offsets) else False)


class Checked:
    """What was checked: launches, and lanes that touched memory."""

    def __init__(self):
        self.launches, self.lanes, self.kernel, self.names, self.tensors = 0, 0, "", [], []

    def real(self, pointers, mask):
        """The addresses of ``pointers``; an AssertionError of one under the mask elsewhere."""
        pointers, mask = np.broadcast_arrays(pointers.astype(np.int64), mask.astype(bool))
        number = np.unique(pointers[mask] // WINDOW)
        for n in number:
            assert 1 <= n <= len(self.tensors), f"{self.kernel}: {n} is no tensor"
            tensor = self.tensors[n - 1]
            offset = pointers[mask & (pointers // WINDOW == n)] - (n * WINDOW + MIDDLE + tensor.low)
            outside = offset[~tensor.holds(offset)]
            what = f"{tensor.name} {list(tensor.value.shape)}, strides {tensor.value.stride()}"
            assert not len(outside), f"{self.kernel}: {what}, bytes {outside[:4].tolist()}"
        self.lanes += int(mask.sum())
        return np.where(mask, pointers % WINDOW - MIDDLE, 0).astype(np.uint64)


@contextlib.contextmanager
def checked():
    """Interpreted kernels touch elements of their arguments only; else an InterpreterError."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    seen = Checked()
    builder, convert, launch = (
        interpreter.InterpreterBuilder,
        interpreter._implicit_cvt,
        interpreter.GridExecutor.__call__,
    )
    load, store = builder.create_masked_load, builder.create_masked_store

    def started(self, *args, **options):
        seen.launches, seen.kernel, seen.tensors = seen.launches + 1, self.fn.__name__, []
        seen.names = [name for name in self.arg_names if name not in self.constexprs]
        return launch(self, *args, **options)

    def converted(arg):
        name, value = seen.names.pop(0), convert(arg)
        if isinstance(arg, torch.Tensor):
            seen.tensors.append(_Tensor(name, arg))
            value.handle.data = value.handle.data + np.uint64(len(seen.tensors) * WINDOW + MIDDLE)
        return value

    def at(pointers, mask):
        return interpreter.TensorHandle(seen.real(pointers.data, mask.data), pointers.dtype)

    with contextlib.ExitStack() as patches:
        for holder, name, value in (
            (interpreter.GridExecutor, "__call__", started),
            (interpreter, "_implicit_cvt", converted),
            (
                builder,
                "create_masked_load",
                lambda self, pointers, mask, *more: load(self, at(pointers, mask), mask, *more),
            ),
            (
                builder,
                "create_masked_store",
                lambda self, pointers, new, mask, *more: store(
                    self, at(pointers, mask), new, mask, *more
                ),
            ),
        ):
            patches.enter_context(mock.patch.object(holder, name, value))
        yield seen


def apart(value, strides):
    """A copy of ``value`` with those ``strides``, in memory whose unused pages do not exist."""
    last = (
        0
        if not value.numel()
        else sum((size - 1) * stride for size, stride in zip(value.shape, strides, strict=True))
    )
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    try:
        memory = mmap.mmap(-1, (last + 1) * value.element_size(), flags=flags)
    except OSError:
        pytest.skip("no room in the address space")
    flat = torch.from_numpy(np.frombuffer(memory, np.uint8)).view(value.dtype)
    return flat.as_strided(value.shape, strides).copy_(value)
