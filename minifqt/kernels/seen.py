"""What was learned of an array while it was written, so that nobody reads it again to find out.

`Seen` is a float32 array with such a summary; sums of two are added by the compiled pass, which
summarizes the result. Any other operation gives an array that knows nothing. Next: norm.py.
"""
from typing import NamedTuple

import numpy as np

from minifqt.backend import empty, share
from minifqt.kernels.cpu import choice

passes = None
if choice.numba is not None:
    from minifqt.kernels.cpu import passes


class Summary(NamedTuple):
    """Of an array (N, …, C): what each image and channel holds."""

    ranges: np.ndarray                                    # (2, N, C) lowest and highest
    sums: np.ndarray | None                               # (2, N, C) float64 Σ(x − pivot), squared
    pivot: np.ndarray | None                              # (C,) float64, some pixel of x


class Seen(np.ndarray):
    """A float32 array of a compiled kernel, with its summary if that was found on the way."""

    summary: Summary | None = None

    def __add__(self, other):
        if not (suits(self) and suits(other) and self.shape == other.shape):
            return super().__add__(other)
        return total(self, other)

    __radd__ = __add__


def suits(x) -> bool:
    """Whether the compiled passes take it: images of float32 on a CPU, numba there and wanted."""
    return (isinstance(x, np.ndarray) and x.dtype == np.float32 and x.ndim in (2, 4)
            and choice.instructions() != "numpy")


def images(x: np.ndarray) -> np.ndarray:
    """x (N, …) as the passes read it: (N, D), contiguous."""
    return np.ascontiguousarray(x.view(np.ndarray)).reshape(len(x), -1)


def runs(*vectors: np.ndarray) -> np.ndarray:
    """Vectors (C,) tiled to the length of a run: (count, run)."""
    return np.tile(np.stack(vectors), (1, max(1, passes.RUN // len(vectors[0]))))


def blank(x: np.ndarray) -> Seen:
    """An array like x for a pass to write."""
    return empty(x.shape).view(Seen)


def total(x: np.ndarray, y: np.ndarray) -> Seen:
    """x + y, summarized."""
    z, C = blank(x), x.shape[-1]
    pivot = (x.reshape(-1, C)[0] + y.reshape(-1, C)[0]).astype("float64")
    sums, ranges = np.empty((2, len(x), C)), np.empty((2, len(x), C), np.float32)
    share(passes.add, images(x), images(y), runs(pivot)[0], C, images(z), sums, ranges)
    z.summary = Summary(ranges, sums, pivot)
    return z


def summary(x: np.ndarray) -> Summary:
    """x's summary, read from x if it does not know it already."""
    known = getattr(x, "summary", None)
    if known is not None and known.sums is not None:
        return known
    C = x.shape[-1]
    pivot = x.reshape(-1, C)[0].astype("float64").view(np.ndarray)
    sums, ranges = np.empty((2, len(x), C)), np.empty((2, len(x), C), np.float32)
    share(passes.summarize, images(x), runs(pivot)[0], C, sums, ranges)
    return Summary(ranges, sums, pivot)
