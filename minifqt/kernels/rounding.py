"""Ranges and the one rounding, bit for bit reference.py: compiled, or in blocks that fit a cache.

Compiled, the noise is made where it is used. On a GPU the reference, which is plainer, itself runs:
whole arrays, no sync.
"""
from contextlib import contextmanager
from functools import cache
from threading import local

import numpy as np

from minifqt.backend import Array, array_module, empty, map_blocks
from minifqt.kernels import reference
from minifqt.kernels.cpu import choice
from minifqt.kernels.reference import UNIT
from minifqt.kernels.seen import Seen, Summary, suits
from minifqt.rng import Stream

if choice.numba is not None:
    from minifqt.kernels.cpu import codes, plans
    from minifqt.kernels.cpu.team import run_for, share

_BLOCK = 1 << 18                                          # float32s of a block of rows


class _Now(local):
    """Of each thread."""

    waiting = None                                        # inside `one_read`
    ends = None                                           # inside `begun`


_now = _Now()


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


@contextmanager
def begun():
    """Inside, other threads round what is not formed (norm.Normalized) while this one goes on.

    Its codes are there at the end, not before.
    """
    ends = _now.ends = []
    try:
        yield
    finally:
        _now.ends = None
        for end in ends:
            end()


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
    waiting = _now.waiting
    if not (waiting and waiting.job and waiting.is_for(x)):
        return codes.NOTHING_BESIDE
    job, waiting.job = waiting.job, None
    return job


def known_parts(x: Array, rows: int) -> Array | None:
    """Minima and maxima of x as so many rows, (2, rows, parts), if they were found before."""
    if isinstance(x, Seen) and x.summary is None and x.size and not suits(x):
        x.summary = Summary(row_parts(x.reshape(len(x), -1)), None)   # for all who ask
    known = getattr(x, "summary", None)
    if known is None or rows not in (1, len(x)):
        return None
    return known.ranges.reshape(2, rows, -1)


def row_parts(x: Array) -> Array:
    """Minima and maxima of parts of each row of x (N, D), (2, N, parts); NaN where NaN is."""
    xp = array_module(x)
    if xp is not np:
        return xp.stack([x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)])
    if suits(x):
        parts = np.empty((2, len(x), max(1, 64 // len(x))), np.float32)   # for threads to share
        run_for(x)(codes.row_ranges, np.ascontiguousarray(x), *parts)
        return parts
    x = np.asarray(x)                                     # a Seen costs Python time at each call

    def block(at):
        return x[at].min(axis=1, keepdims=True), x[at].max(axis=1, keepdims=True)

    return np.stack([np.concatenate(ends, axis=int(len(x) == 1))
                     for ends in zip(*_in_blocks(block, x.shape), strict=True)])


def joined(parts: Array) -> tuple[Array, Array | bool]:
    """Minimum and maximum of each row, (2, N, 1), from those of its parts; whether all are finite.

    A range that is not finite may be NaN.
    """
    if suits(parts[0]):
        ranges = np.empty((2, parts.shape[1], 1), np.float32)
        return ranges, plans.joined(parts, ranges)
    xp, (low, high) = array_module(parts), parts
    if parts.shape[2] > 1:
        parts = xp.stack([low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)])
    return parts, xp.isfinite(parts).all()


def row_ranges(x: Array) -> tuple[Array, Array]:
    """Minimum and maximum of each row of x (N, D), each (N, 1); NaN where a row holds one."""
    return tuple(joined(row_parts(x))[0])


def affine_codes(x: Array, low: Array, inv: Array, stream: Stream, shape: tuple,
                 bins: int) -> Array:
    """reference.round_codes of fixed_point with the stream's noise for `shape`.

    x (N, D) with as many elements; low, inv (N, 1) → uint8 (N, D)
    """
    if array_module(x) is not np:
        h = stream.bits(shape, array_module(x)).reshape(x.shape)
        return reference.round_codes(reference.fixed_point(x, low, inv), h, bins)
    return _codes(x, stream, shape, low, inv, np.zeros(len(low)), (0, bins), np.uint8)


def anchored_codes(x: Array, shift: Array, inv: Array, code: Array, stream: Stream, shape: tuple,
                   limits: tuple, dtype) -> Array:
    """reference.anchored_codes as dtype with the stream's noise for `shape`.

    x (N, D) with as many elements; shift, inv, code (N, 1); limits (lowest, highest)
    """
    if array_module(x) is not np:
        h = stream.bits(shape, array_module(x)).reshape(x.shape)
        return reference.anchored_codes(
            reference.anchored_fixed(x, shift, inv, code, *limits), h).astype(dtype)
    return _codes(x, stream, shape, shift, inv, UNIT * code, limits, dtype)


@cache
def _in_fixed_point(limits):
    return tuple(np.float32(UNIT * limit) for limit in limits)


def _codes(x, stream, shape, shift, inv, code, limits, dtype):
    """Both of the above: limiting fixed before the noise or the sum behind it gives one code."""
    lowest, highest = _in_fixed_point(limits)
    shift, inv, code = (np.asarray(v, np.float32).reshape(-1) for v in (shift, inv, code))
    source, direct = stream.source(), suits(x)
    if source and (direct or hasattr(x, "rounded")):      # not formed: it knows how
        out, rounding = empty(x.shape, np.uint8), (shift, inv, code, lowest, highest, *source)
        if direct:
            waiting = _now.waiting
            if not (waiting and waiting.take(x, rounding, out)):
                run_for(x)(codes.round_rows, x, rounding_of(x), *rounding, out)
        else:
            end = x.rounded(rounding, out.reshape(len(x), -1))
            end() if _now.ends is None else _now.ends.append(end)
        return out.view(dtype)
    x, out, D = np.asarray(x), empty(x.shape, dtype), x.shape[1]
    anchored, signed = code.any(), lowest < 0
    given = None if source else stream.bits(shape).reshape(x.shape)   # who knows in which way

    def noise(at):
        if not source:
            return given[at]
        first = sum(part.start * size for part, size in zip(at, (D, 1), strict=True) if part.start)
        return stream.bits(x[at].shape, offset=first) if source[2] < 0 else source[2]

    def block(at):
        part, rows = x[at], at[0]
        v = np.subtract(part, shift[rows, None], out=empty(part.shape))
        v *= inv[rows, None]
        np.rint(v, out=v)
        if anchored:
            v += code[rows, None]
        np.clip(v, lowest, highest, out=v)
        v += noise(at)                                    # integers below 2²⁴: exact
        v *= np.float32(1 / UNIT)
        out[at] = np.floor(v, out=v) if signed else v     # the cast cuts what is behind the point

    _in_blocks(block, x.shape)
    return out


def _in_blocks(function, shape):
    """function(index) for each block of so many rows, or of the one row that there is."""
    rows, D = shape
    if rows == 1:
        return map_blocks(lambda part: function((slice(None), part)), D, _BLOCK)
    return map_blocks(lambda part: function((part, slice(None))), rows, max(1, _BLOCK // D))
