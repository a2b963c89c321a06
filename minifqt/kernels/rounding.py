"""Ranges and the one rounding, bit for bit reference.py: compiled, or in blocks that fit a cache.

Compiled, the noise is made where it is used. On a GPU the reference, which is plainer, itself runs:
whole arrays, no sync.
"""
from contextlib import contextmanager
from threading import local

import numpy as np

from minifqt.backend import Array, array_module, empty, map_blocks
from minifqt.kernels import reference
from minifqt.kernels.cpu import choice
from minifqt.kernels.reference import UNIT
from minifqt.kernels.seen import Seen, Summary, suits
from minifqt.rng import Stream

if choice.numba is not None:
    from minifqt.kernels.cpu import codes
    from minifqt.kernels.cpu.team import run_for, share

_BLOCK = 1 << 18                                          # float32s of a block of rows
_now = local()                                            # .waiting, in a thread inside `one_read`


@contextmanager
def one_read(x: Array):
    """Inside, the first rounding of x with one scale is done in the next compiled pass over x.

    Its codes are there at the end, not before.
    """
    waiting = _now.waiting = _Waiting(x) if suits(x) else None
    try:
        yield
        if waiting and waiting.job:                       # nobody came by
            share(codes.round_rows, *waiting.alone)
    finally:
        _now.waiting = None


class _Waiting:
    """For x, contiguous: the rounding that waits, as it is done beside another and alone."""

    def __init__(self, x):
        self.memory, self.size, self.job, self.alone = x.ctypes.data, x.size, None, None

    def is_for(self, x):
        return x.size == self.size and x.ctypes.data == self.memory

    def take(self, x, rounding, out):
        """Whether this rounding of x will be done later; if so, it is remembered."""
        if self.alone or len(x) != 1 or not self.is_for(x):
            return False
        shift, inv, code, *rest = rounding
        self.job = (shift[0], inv[0], code[0], *rest, out.reshape(-1))
        self.alone = (x, codes.NOTHING_BESIDE, *rounding, out)
        return True


def rounding_of(x: np.ndarray) -> tuple:
    """What a pass over x does beside its own work (codes.round_beside); the caller then does it."""
    waiting = getattr(_now, "waiting", None)
    if not (waiting and waiting.job and waiting.is_for(x)):
        return codes.NOTHING_BESIDE
    job, waiting.job = waiting.job, None
    return job


def known_ranges(x: Array, rows: int) -> tuple[Array, Array] | None:
    """Minimum and maximum of x as so many rows, (rows, 1) each, if they were found before."""
    if isinstance(x, Seen) and x.summary is None and x.size and not suits(x):
        ranges = np.stack(row_ranges(x.reshape(len(x), -1)))          # for all who ask
        x.summary = Summary(ranges, None)
    known = getattr(x, "summary", None)
    if known is None or rows not in (1, len(x)):
        return None
    low, high = known.ranges.reshape(2, rows, -1)         # each of a row's parts
    return low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)


def row_ranges(x: Array) -> tuple[Array, Array]:
    """Minimum and maximum of each row of x (N, D), each (N, 1); NaN where a row holds one."""
    if array_module(x) is not np:
        return x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    if suits(x):
        parts = max(1, 64 // len(x))                      # of a row, for the threads to share
        low, high = np.empty((2, len(x), parts), x.dtype)
        run_for(x)(codes.row_ranges, np.ascontiguousarray(x), low, high)
        return low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)

    def block(at):
        return x[at].min(axis=1, keepdims=True), x[at].max(axis=1, keepdims=True)

    low, high = (np.concatenate(ends, axis=int(len(x) == 1))
                 for ends in zip(*_in_blocks(block, x.shape), strict=True))
    return low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)


def affine_codes(x: Array, low: Array, inv: Array, stream: Stream, shape: tuple,
                 bins: int) -> Array:
    """reference.round_codes of fixed_point with the stream's noise for `shape`.

    x (N, D) with as many elements; low, inv (N, 1) → uint8 (N, D)
    """
    if array_module(x) is not np:
        h = stream.bits(shape, array_module(x)).reshape(x.shape)
        return reference.round_codes(reference.fixed_point(x, low, inv), h, bins)
    return _codes(x, stream, shape, low, inv, np.zeros_like(low), (0, bins), np.uint8)


def anchored_codes(x: Array, shift: Array, inv: Array, code: Array, stream: Stream, shape: tuple,
                   limits: tuple, dtype) -> Array:
    """reference.anchored_codes as dtype with the stream's noise for `shape`.

    x (N, D) with as many elements; shift, inv, code (N, 1); limits (lowest, highest)
    """
    if array_module(x) is not np:
        h = stream.bits(shape, array_module(x)).reshape(x.shape)
        return reference.anchored_codes(
            reference.anchored_fixed(x, shift, inv, code, *limits), h).astype(dtype)
    return _codes(x, stream, shape, shift, inv, code, limits, dtype)


def _codes(x, stream, shape, shift, inv, code, limits, dtype):
    """Both of the above: limiting fixed before the noise or the sum behind it gives one code."""
    lowest, highest = (np.float32(UNIT * limit) for limit in limits)
    shift, inv, code = (v.astype("float32", copy=False) for v in (shift, inv, UNIT * code))
    source = stream.source()
    if source and (suits(x) or hasattr(x, "rounded")):    # not formed: it knows how
        out = empty(x.shape, dtype)
        rounding = *(v.reshape(-1) for v in (shift, inv, code)), lowest, highest, *source
        if suits(x):
            waiting = getattr(_now, "waiting", None)
            if not (waiting and waiting.take(x, rounding, out.view(np.uint8))):
                run_for(x)(codes.round_rows, x, rounding_of(x), *rounding, out.view(np.uint8))
        else:
            x.rounded(rounding, out.view(np.uint8).reshape(len(x), -1))
        return out
    x, h = np.asarray(x), stream.bits(shape).reshape(x.shape)

    out = empty(x.shape, dtype)

    def block(at):
        part, rows = x[at], at[0]
        v = np.subtract(part, shift[rows], out=empty(part.shape))
        v *= inv[rows]
        np.rint(v, out=v)
        v += code[rows]
        np.clip(v, lowest, highest, out=v)
        v += h[at]                                        # integers below 2²⁴: exact
        v *= np.float32(1 / UNIT)
        out[at] = np.floor(v, out=v)

    _in_blocks(block, x.shape)
    return out


def _in_blocks(function, shape):
    """function(index) for each block of so many rows, or of the one row that there is."""
    rows, D = shape
    if rows == 1:
        return map_blocks(lambda part: function((slice(None), part)), D, _BLOCK)
    return map_blocks(lambda part: function((part, slice(None))), rows, max(1, _BLOCK // D))
