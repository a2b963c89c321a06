"""Ranges and the one rounding, bit for bit reference.py: compiled, or in blocks that fit a cache.

Compiled, the noise is made where it is used. On a GPU the reference, which is plainer, itself runs:
whole arrays, no sync.
"""
from contextlib import contextmanager
from functools import cache
from threading import local

import numpy as np

from minifqt.backend import Array, array_module, empty, map_blocks, scratch
from minifqt.kernels import reference
from minifqt.kernels.cpu import choice
from minifqt.kernels.reference import UNIT
from minifqt.kernels.seen import Lazy, Seen, Summary, suits
from minifqt.rng import Stream

if choice.numba is not None:
    from minifqt.kernels.cpu import codes, scales
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
        self.x, self.job, self.alone = x, None, None

    def is_for(self, x):
        return x.size == self.x.size and np.may_share_memory(x, self.x)

    def take(self, x, rounding, out):
        """Whether this rounding of x will be done later; if so, it is remembered."""
        if self.alone or len(x) != 1 or not self.is_for(x):
            return False
        self.job = (*rounding, out.reshape(-1))
        self.alone = (x, codes.NOTHING_BESIDE, *rounding, out)
        return True


def rounding_of(x: np.ndarray) -> tuple:
    """What a pass over x does beside its own work (codes.round_beside); the caller then does it."""
    waiting = _now.waiting
    if not (waiting and waiting.job and waiting.is_for(x)):
        return codes.NOTHING_BESIDE
    job, waiting.job = waiting.job, None
    return job


def parts_of(x: Array, rows: int, matrix: Array) -> Array:
    """Minima and maxima of parts of each row, (2, rows, parts): those that x knows, or row_parts.

    matrix  (rows, D), the numbers of x
    """
    if isinstance(x, Seen) and x.summary is None and not suits(x):
        x.summary = Summary(row_parts(np.asarray(x).reshape(len(x), -1)), None)   # for all who ask
    known = getattr(x, "summary", None)
    if known is None or rows not in (1, known.ranges.shape[1]):
        return row_parts(matrix)
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
        return ranges, scales.joined(parts, ranges)
    xp, (low, high) = array_module(parts), parts
    if parts.shape[2] > 1:
        parts = xp.stack([low.min(axis=1, keepdims=True), high.max(axis=1, keepdims=True)])
    return parts, xp.isfinite(parts).all()


def round_rows(x: Array, maps: Array, stream: Stream, shape: tuple, limits: tuple,
               dtype=np.uint8) -> Array:
    """reference.anchored_codes as dtype (shape), with the stream's noise for it.

    x       (N, D) with as many elements, or what is not formed
    maps    shift, inv and code, (N, 1) each: (x − shift) · inv + code is fixed point
    limits  lowest and highest code. With code 0 and limits 0, bins it is reference.round_codes:
            limiting before the noise or the sum behind it gives one code
    """
    if array_module(x) is not np:
        h, (shift, inv, code) = stream.bits(shape, array_module(x)).reshape(x.shape), maps
        fixed = reference.anchored_fixed(x, shift, inv, code / UNIT, *limits)
        return reference.anchored_codes(fixed, h).astype(dtype).reshape(shape)
    source, direct = stream.source(), suits(x)
    maps, limits = np.asarray(maps, np.float32).reshape(3, -1), _in_fixed_point(limits)
    if not source or not (direct or isinstance(x, Lazy) and x.compiled):
        codes_of_blocks = _blockwise(x, stream, shape, source, *maps, *limits, dtype)
        return codes_of_blocks.reshape(shape)
    found, rounding = empty(shape, np.uint8), (maps, *limits, *source)
    out = found.reshape(len(x), -1)
    if not direct:                                        # not formed: it knows how
        end = x.rounded(rounding, out)
        end() if _now.ends is None else _now.ends.append(end)
    elif not (_now.waiting and _now.waiting.take(x, rounding, out)):
        run_for(x)(codes.round_rows, x, rounding_of(x), *rounding, out)
    return found.view(dtype)


@cache
def _in_fixed_point(limits):
    return tuple(np.float32(UNIT * limit) for limit in limits)


def _blockwise(x, stream, shape, source, shift, inv, code, lowest, highest, dtype):
    shifted, anchored, signed, single = shift.any(), code.any(), lowest < 0, len(shift) == 1
    N, D = size = len(x), x.size // len(x)
    formed = not isinstance(x, Lazy) or N == 1
    read = (lambda at, _: rows[at]) if formed else x.reader()
    rows, out = np.asarray(x).reshape(size) if formed else None, empty(size, dtype)
    given = None if source else stream.bits(shape).reshape(size)      # who knows in which way

    def noise(at):
        if not source:
            return given[at]
        first = sum(part.start * step for part, step in zip(at, (D, 1), strict=True) if part.start)
        return stream.bits(out[at].shape, offset=first) if source[2] < 0 else source[2]

    def block(at):
        of = slice(None) if single else at[0]
        v = scratch("fixed", out[at].shape)
        part = read(at, v)
        if shifted:
            part = np.subtract(part, shift[of, None], out=v)
        np.multiply(part, inv[of, None], out=v)
        np.rint(v, out=v)
        if anchored:
            v += code[of, None]
        np.clip(v, lowest, highest, out=v)
        v += noise(at)                                    # integers below 2²⁴: exact
        v *= np.float32(1 / UNIT)
        out[at] = np.floor(v, out=v) if signed else v     # the cast cuts what is behind the point

    _in_blocks(block, size)
    return out


def _in_blocks(function, shape):
    """function(index) for each block of so many rows, or of the one row that there is."""
    rows, D = shape
    if rows == 1:
        return map_blocks(lambda part: function((slice(None), part)), D, _BLOCK)
    return map_blocks(lambda part: function((part, slice(None))), rows, max(1, _BLOCK // D))
