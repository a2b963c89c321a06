"""The three products of a layer by the CPU's dot products: reference.py's integers, and floats.

Here operands are made ready for the kernels of sums.py and wgrad.py, which pack them.
What int32 could not hold, weights with a zero and a linear layer's floats go to blas.py.
"""
import logging
from functools import cache

import numpy as np

from minifqt.backend import empty, threads
from minifqt.kernels import blas
from minifqt.kernels.cpu import choice, floats
from minifqt.kernels.cpu.sums import correlate_gated, correlate_images, gemm_rows
from minifqt.kernels.cpu.team import begin, share
from minifqt.kernels.cpu.wgrad import wgrad_images
from minifqt.kernels.reference import first_to_last, output_size
from minifqt.kernels.seen import Seen, Summary
from minifqt.qtensor import QTensor

TERMS = 2**31 // (255 * 128) - 1                          # that int32 holds: 65,792
STRIP = 1 << 17                                           # bytes of codes in cache; twice of sums
IMAGES = 16                                               # of one task of wgrad, at most
FLIPS = {"B": np.uint8(0), "b": np.uint8(128), "f": np.uint32(0)}   # moves codes to 0..255
NOTHING, FLOOR = np.empty((1, 0, 0), np.float32), np.float32(0)
# By packed weights: arrays of the dtypes of a canvas, of these, of sums and of their epilogue.
KINDS = {dtypes[1]: tuple(np.empty(0, dtype) for dtype in dtypes) for dtypes in (
    ("uint8", "int8", "int32", "float64"), ("int16", "int16", "int32", "float64"),
    ("uint32", "float32", "float32", "float32"))}


def conv_fprop(x, w, stride, padding):
    """x (N, H, W, C), w (K, R, S, C) → (N, P, Q, K), contracts R, S, C."""
    if not fits(w):
        _tell(w.name)
        return blas.conv_fprop(x, w, stride, padding)
    return fprop(x, w, stride, padding).form()


def fprop(x, w, stride, padding):
    """conv_fprop, set up."""
    out = output_size(x.shape[1:3], w.shape[1:3], stride, padding)
    return Correlation(x, w, False, (padding, padding), 1, stride, out)


def conv_dgrad(g, w, size, stride, padding):
    """g (N, P, Q, K), w (K, R, S, C) → (N, H, W, C), contracts R, S, K.

    g, its pixels `stride` apart, is correlated with w turned: (C, R, S, K), its last tap first.
    """
    if not fits(w):
        return blas.conv_dgrad(g, w, size, stride, padding)
    return dgrad(g, w, size, stride, padding).form()


def dgrad(g, w, size, stride, padding):
    """conv_dgrad, set up."""
    R, S = w.shape[1:3]
    return Correlation(g, w, True, (R - 1 - padding, S - 1 - padding), stride, 1, size)


def fits(w):
    """Signed, zero 0 as `sym` makes them, and int32 holds any sum; or floats. Else BLAS does it."""
    K, R, S, C = w.shape
    longest = R * S * max(C, K)                           # of fprop, of dgrad
    signed = w.codes.dtype == np.int8 and not np.count_nonzero(w.zero) and longest <= TERMS
    return signed or w.codes.dtype == np.float32


_told = []                                                # a process says it once


def _tell(name):
    if not _told:
        _told.append(name)
        logging.getLogger("minifqt").warning(
            "%s: BLAS multiplies it, which takes longer than this CPU's integer instructions. "
            "They take int8 weights whose zero is 0, as sym8 makes them, and 65,792 terms.", name)


class Correlation:
    """A correlation that is set up and not yet computed: its result can be asked for in three ways.

    a (N, …, C) at `offset`, `spread` apart; w (K, R, S, C), or turned (C, R, S, K)
    """

    def __init__(self, a, w, turned, offset, spread, stride, out):
        self.shape, self.mix = (len(a.codes), *out, w.shape[3 if turned else 0]), a.mix
        isa = choice.isa() if a.is_integer else choice.floats()
        present = present_taps(a.shape[1:3], w.shape[1:3], offset, spread, stride, out)
        codes, flip = codes_of(a), FLIPS[a.codes.dtype.char]
        self._operands = (KINDS[isa.dtype.__name__], *isa.tile, codes, flip,
                          *(v.reshape(-1) for v in (a.zero, a.scale)),
                          np.ascontiguousarray(w.codes), turned, w.scale.reshape(-1),
                          offset, spread, stride, *present)
        self._spread = spread
        self.strip = self._strip(min(STRIP // (stride * out[1] * stride * a.shape[3]),
                                     2 * STRIP // (4 * out[1] * self.shape[3])))

    def form(self, residual=None):
        """The result as it is, plus a residual (N, D) float32 if there is one, summarized."""
        N, P, Q, K = self.shape
        residual = NOTHING if residual is None else residual.reshape(N, P, Q * K)
        y, sums, ranges = empty(self.shape), np.empty((2, N, K)), np.empty((2, N, K), np.float32)
        share(correlate_images, *self._operands, self.strip, residual, y, sums, ranges)
        y = y.view(Seen)
        y.summary = Summary(ranges, sums)
        return y

    def form_unmixed(self, residual=None, x=NOTHING[0], norm=NOTHING[0], floor=FLOOR):
        """Its rows unmixed, and Σ g, Σ g · x̂ gated (norms.gradient_sums), in parts: (2, …, C).

        x  (N, D); without it no sums
        """
        N, P, Q, K = self.shape
        residual = NOTHING[0] if residual is None else residual
        largest, *mix = alone(N) if self.mix is None else self.mix.plan
        strip = self._strip(2 * STRIP // (4 * largest * Q * K))           # a group's lie in cache
        y, sums = empty(self.shape), np.empty((2, (len(mix[0]) - 1) * -(-P // strip), K))
        share(correlate_gated, *self._operands, strip, largest, *mix, residual, x, norm, floor, y,
              sums)
        return y, sums

    def _strip(self, rows):
        """About so many rows of the result, each strip beginning with the same phase of taps."""
        return min(self.shape[1], max(rows // self._spread, 1) * self._spread)


@cache
def present_taps(size, taps, offset, spread, stride, out):
    """Which taps meet pixels of an image of this size: what packing.sums_of_present_taps adds up.

    Returns down (kinds, R) for each kind of rows, the kind (P,) of each row, and right (Q, S).
    """
    down, right = ((rest == 0) & (0 <= pixel) & (pixel < side) for side, (pixel, rest) in (
        (side, np.divmod(stride * np.arange(count)[:, None] + np.arange(width) - first, spread))
        for side, width, first, count in zip(size, taps, offset, out, strict=True)))
    down, row_kind = np.unique(down, axis=0, return_inverse=True)
    return down, row_kind.reshape(-1), right


@cache
def alone(N):
    """Householder's `plan` of N rows that are not mixed."""
    return 1, np.arange(N + 1), np.arange(N), np.ones(N)


def conv_wgrad(g, x, kernel, stride, padding):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q."""
    return begin_wgrad(g, x, kernel, stride, padding)()


def begin_wgrad(g, x, kernel, stride, padding):
    """conv_wgrad, begun by the other threads while this one goes on; call what it returns."""
    if not g.is_integer:
        return floats.begin_wgrad(codes_of(g), codes_of(x), kernel, stride, padding)
    isa, (_, _, Q, K), C, (flip_g, flip_x) = choice.isa(), g.shape, x.shape[3], flips_of(g, x)
    if Q > TERMS:
        return lambda: blas.conv_wgrad(g, x, kernel, stride, padding)
    sizes, *shapes, present = wgrad_plan(isa.group, g.shape, x.shape, kernel, stride, padding)
    total, x1 = (empty((threads(), *shape), "int64") for shape in shapes)
    g1 = np.empty((threads() if flip_x or np.count_nonzero(x.zero) else 0, *g.shape[1:]), np.int64)
    ends = tuple(v.reshape(-1) for v in (g.zero, x.zero, g.scale, x.scale))
    dw = empty((K, *kernel, C))
    end = begin(wgrad_images, KINDS[isa.dtype.__name__][1], *isa.tile, codes_of(g), flip_g,
                codes_of(x), flip_x, (padding, padding), stride, kernel, sizes, total, x1, g1,
                np.zeros(threads() + 1, np.int64), present, ends, dw)

    def finish():
        end()
        return dw

    return finish


@cache
def wgrad_plan(group, out, image, kernel, stride, padding):
    """What follows from shapes alone: (images, strip, quads, pitch), and where taps meet pixels.

    so many images fit a cache, `strip` rows of each, in `quads` words of `group` pixels, `pitch`
    pixels from row to row; between them the shapes of a thread's sums, total and x1
    """
    (_, P, Q, K), (_, H, W, C), (R, S) = out, image, kernel
    strip = max(1, min(P, STRIP // (Q * max(C, K)), TERMS // Q))
    images = max(1, min(IMAGES, TERMS // (strip * Q), STRIP // (strip * Q * max(C, K))))
    pitch = -(-(Q + (S - 1) // stride) // group) * group
    quads = (Q + group - 1) // group
    present = tuple(np.array([blas.inside(length, side, tap - padding, stride)
                              for tap in range(taps)])
                    for length, side, taps in ((P, H, R), (Q, W, S)))
    wide = (*kernel, *(-(-count // 16) * 16 for count in (C, K)))
    return (images, strip, quads, pitch), wide, (*kernel, C), present


def matmul(a, b):
    """a bᵀ.  a (M, K), b (J, K) → (M, J), contracts K."""
    isa, (M, K), J = choice.isa(), a.shape, len(b.codes)
    if K > TERMS or not a.is_integer:
        return blas.matmul(a, b)
    flip_b, flip_a = flips_of(b, a)
    left = np.zeros((-(-M // isa.rows) * isa.rows, -(-K // isa.group), isa.group), isa.dtype)
    left.reshape(len(left), -1)[:M, :K] = codes_of(a) ^ flip_a
    signed = (codes_of(b) ^ flip_b).view(np.int8)
    out = np.empty((len(left), -(-J // isa.lanes) * isa.lanes), np.int32)
    share(gemm_rows, *isa.tile, left, signed.reshape(J, 1, 1, K), False, 1, out)
    a1 = (codes_of(a) ^ flip_a).sum(axis=1, dtype="float64")[:, None]
    b1 = signed.sum(axis=1, dtype="float64")
    terms = blas.Terms(a, b, (-int(flip_a), int(flip_b)), turn_b=first_to_last)
    return terms.finish(out[:M, :J], b1, a1, K, np.empty((M, J), np.float32))


def flips_of(signed, unsigned):
    """What moves codes of the other kind: to the signed side, to the unsigned one."""
    return (np.uint8(128 if signed.codes.dtype == np.uint8 else 0),
            FLIPS[unsigned.codes.dtype.char])


def codes_of(t):
    """Its codes as they lie in memory: contiguous, uint8, or floats as uint32."""
    return np.ascontiguousarray(t.codes).view(f"u{t.codes.itemsize}")


def dequantized(t):
    """The same rows as float32 codes, if they are integers with one scale; else t."""
    if not t.is_integer or t.scale.size * t.zero.size > 1:
        return t
    codes, rows = np.ascontiguousarray(t.codes), empty(t.shape)
    share(floats.dequantize, codes.reshape(-1), float(t.zero.item()), float(t.scale.item()),
          rows.reshape(-1))
    return QTensor(rows, t.scale, t.zero, t.mix, t.name)
