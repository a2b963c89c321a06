"""Arrays that know more than numbers: what was learned as they were written, or how to write them.

`Seen` remembers its ranges and sums, so that nobody reads it again to find out. `Lazy` is not
computed before somebody reads it, and who reads it may compute it on the way: rounded, added to
something, or gated. Everybody else sees arrays. Next: norm.py.
"""
import math
from functools import wraps
from typing import NamedTuple

import numpy as np

from minifqt.backend import array_module, empty
from minifqt.kernels import blocks
from minifqt.kernels.cpu import choice

if choice.numba is not None:
    from minifqt.kernels.cpu import norms
    from minifqt.kernels.cpu.team import share


class Summary(NamedTuple):
    """What an array (N, …, C) holds: lowest and highest of each image or of all, Σx and Σx²."""

    ranges: np.ndarray                                    # (2, N or 1, C or one number or more)
    sums: np.ndarray | None                               # (2, parts, C) float64, of any parts


class Seen(np.ndarray):
    """A float32 array that a kernel wrote, with its summary if that was found on the way.

    What may be written to has no summary any more: also what a view was taken of (np.asarray is
    for those who only read).
    """

    summary: Summary | None = None

    def __array_finalize__(self, source):
        if isinstance(source, Seen):                      # this is a view of it, perhaps
            source.summary = None

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        if any(isinstance(v, Lazy) for v in inputs):
            return NotImplemented
        for array in (*out, *(inputs[:1] if method == "at" else ())):
            if isinstance(array, Seen):
                array.summary = None                      # it is written to
        plain = [v.view(np.ndarray) if isinstance(v, Seen) else v for v in (*inputs, *out)]
        if out:
            options["out"] = tuple(plain[len(inputs):])
        result = getattr(ufunc, method)(*plain[:len(inputs)], **options)
        return out[0] if len(out) == 1 else result

    def __array_function__(self, function, types, arguments, options):
        for array in arguments:                           # np.copyto(x, …) and its like
            if isinstance(array, Seen) and function in _WRITERS:
                array.summary = None
        return super().__array_function__(function, types, arguments, options)

    def __add__(self, other):
        return NotImplemented if isinstance(other, Lazy) else add(self, other)

    __radd__ = __add__


def _forgetting(name):
    """The array's own method, of one that forgets its summary before it is written to."""
    method = getattr(np.ndarray, name)

    def forget(self, *arguments, **options):
        self.summary = None
        return method(self, *arguments, **options)

    return wraps(method)(forget)


for _name in ("__setitem__", "fill", "sort", "partition", "put", "byteswap", "setfield"):
    setattr(Seen, _name, _forgetting(_name))
_WRITERS = {np.copyto, np.putmask, np.put, np.place, np.put_along_axis, np.fill_diagonal,
            np.nan_to_num}


class Lazy(np.lib.mixins.NDArrayOperatorsMixin):
    """Looks like a float32 array of this shape, and is computed (`form`) when somebody reads it."""

    dtype = np.dtype("float32")

    def __init__(self, shape):
        self.shape, self._array = shape, None

    @property
    def ndim(self):
        """Axes."""
        return len(self.shape)

    @property
    def size(self):
        """Numbers."""
        return math.prod(self.shape)

    def form(self) -> np.ndarray:
        """Its numbers, computed now."""
        raise TypeError(f"{type(self).__name__} defines no form().")

    def plus(self, other: np.ndarray) -> np.ndarray:
        """Its numbers plus others; a subclass may do it in one pass."""
        return add(self.array(), other)

    def array(self) -> np.ndarray:
        """Its numbers, computed once."""
        if self._array is None:
            self._array = self.form()
        return self._array

    def astype(self, dtype, copy=True):
        """An array of this dtype."""
        return self.array().astype(dtype, copy=copy)

    def __getitem__(self, index):
        return self.array()[index]

    def __len__(self):
        return self.shape[0]

    def __add__(self, other):
        if self._array is not None:                       # then perhaps the other is not computed
            return other + self._array if isinstance(other, Lazy) else add(self._array, other)
        other = other.array() if isinstance(other, Lazy) else other
        fits = is_images(other) and other.shape == self.shape
        return self.plus(other) if fits else add(self.array(), other)

    __radd__ = __add__

    def __array__(self, dtype=None, copy=None):
        return np.array(self.array(), dtype, copy=copy)

    def __array_ufunc__(self, ufunc, method, *inputs, out=(), **options):
        formed, to = ([v.array() if isinstance(v, Lazy) else v for v in some]
                      for some in (inputs, out))
        if to:                                            # as p.grad *= 0.5 asks for
            options["out"] = tuple(to)
        return getattr(ufunc, method)(*formed, **options)

    def __setitem__(self, index, value):
        self.array()[index] = value

    def __getattr__(self, name):                          # max, mean, transpose, …
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.array(), name)


def is_images(x) -> bool:
    """Whether passes take it, compiled or by NumPy alone: (N, C) or images of float32 on a CPU."""
    return (isinstance(x, np.ndarray) and array_module(x) is np and x.dtype == np.float32
            and x.ndim in (2, 4) and x.size > 0)


def suits(x) -> bool:
    """Whether the compiled passes take it: numba is there and wanted."""
    return is_images(x) and choice.instructions() != "numpy"


def images(x: np.ndarray) -> np.ndarray:
    """x (N, …) as the passes read it: (N, D), contiguous."""
    return np.asarray(x, order="C").reshape(len(x), -1)


def blank(shape: tuple) -> Seen:
    """An array for a pass to write."""
    return empty(shape).view(Seen)


def add(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x + y; of images it is summarized too."""
    x = np.asarray(x)
    alike = isinstance(y, np.ndarray) and x.shape == y.shape and x.dtype == y.dtype == np.float32
    if not alike or x.ndim == 0:
        return np.add(x, y)
    z, C = blank(x.shape), x.shape[-1]
    if not is_images(x):
        np.add(x, y, out=z)
        return z
    if suits(x):
        sums, ranges = np.empty((2, len(x), C)), np.empty((2, len(x), C), np.float32)
        share(norms.add, images(x), images(y), C, images(z), sums, ranges)
    else:
        sums, ranges = blocks.add(images(x), images(y), C, images(z))
    z.summary = Summary(ranges, sums)
    return z


def summary(x: np.ndarray) -> Summary:
    """x's summary, read from x if it does not know it already; then it does."""
    known = getattr(x, "summary", None)
    if known is not None and known.sums is not None:
        return known
    C = x.shape[-1]
    if not suits(x):
        sums, ranges = blocks.summarize(images(x), C)
    else:
        sums, ranges = np.empty((2, len(x), C)), np.empty((2, len(x), C), np.float32)
        share(norms.summarize, images(x), C, sums, ranges)
    found = Summary(ranges, sums)
    if isinstance(x, Seen) and known is None:             # else it knows more of its ranges
        x.summary = found
    return found
