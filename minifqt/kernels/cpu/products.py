"""The three products of a layer by the CPU's dot products: reference.py's integers, and floats.

Here operands are packed, scratch is cut and zeros and scales are prepared; the sums are in sums.py.
What int32 could not hold, weights with a zero and a linear layer's floats go to blas.py.
"""
from functools import cache

import numpy as np

from minifqt.backend import empty, threads
from minifqt.kernels import blas
from minifqt.kernels.cpu import choice, floats, plans
from minifqt.kernels.cpu.choice import ROWS
from minifqt.kernels.cpu.sums import correlate_gated, correlate_images, gemm_rows
from minifqt.kernels.cpu.team import begin, share
from minifqt.kernels.cpu.wgrad import wgrad_images
from minifqt.kernels.reference import first_to_last, output_size
from minifqt.kernels.seen import Seen, Summary
from minifqt.qtensor import QTensor

TERMS = 2**31 // (255 * 128) - 1                          # that int32 holds: 65,792
STRIP = 1 << 17                                           # bytes of sums or codes kept in cache
IMAGES = 16                                               # of one task of wgrad, at most
NOTHING, FLOOR = np.empty((1, 0, 0), np.float32), np.float32(0)
# Arrays whose dtypes tell a kernel what its codes, by the bytes of a packed one, and its sums are.
KINDS = {key: np.empty(0, dtype) for key, dtype in (
    (1, "uint8"), (2, "int16"), (4, "uint32"), ("int32", "int32"), ("float32", "float32"))}


def conv_fprop(x, w, stride, padding):
    """x (N, H, W, C), w (K, R, S, C) → (N, P, Q, K), contracts R, S, C."""
    if not fits(w):
        return blas.conv_fprop(x, w, stride, padding)
    return fprop(x, w, stride, padding).form()


def fprop(x, w, stride, padding):
    """conv_fprop, set up."""
    out = output_size(x.shape[1:3], w.shape[1:3], stride, padding)
    return Correlation(x, w.codes, w.scale, (padding, padding), 1, out, stride)


def conv_dgrad(g, w, size, stride, padding):
    """g (N, P, Q, K), w (K, R, S, C) → (N, H, W, C), contracts R, S, K.

    g, its pixels `stride` apart, is correlated with the turned w.
    """
    if not fits(w):
        return blas.conv_dgrad(g, w, size, stride, padding)
    return dgrad(g, w, size, stride, padding).form()


def dgrad(g, w, size, stride, padding):
    """conv_dgrad, set up."""
    R, S = w.shape[1:3]
    turned = w.codes[:, ::-1, ::-1].swapaxes(0, 3)        # (C, R, S, K)
    return Correlation(g, turned, w.scale, (R - 1 - padding, S - 1 - padding), stride, size, 1)


def fits(w):
    """Signed, zero 0 as `sym` makes them, and int32 holds any sum; or floats. Else BLAS does it."""
    longest = max(w.codes[0].size, w.codes[..., 0].size)  # of fprop, of dgrad
    signed = w.codes.dtype == np.int8 and not w.zero.any() and longest <= TERMS
    return signed or w.codes.dtype == np.float32


class Correlation:
    """A correlation that is set up and not yet computed: its result can be asked for in three ways.

    a (N, …, C) codes at `offset`, `spread` apart; w (K, R, S, C) int8 or float32, its scale
    """

    def __init__(self, a, w, scale, offset, spread, out, stride):
        (K, R, S, C), (P, Q), N, exact = w.shape, out, len(a.codes), a.is_integer
        isa = choice.isa() if exact else choice.floats()
        packed = pack(w, isa, spread)
        self.shape, self.mix = (N, P, Q, K), a.mix
        self._kinds = KINDS[packed.itemsize], KINDS["int32" if exact else "float32"]
        dtype = "float64" if exact else "float32"         # of the epilogue
        scale_a, zero = np.empty((2, N), dtype)           # an image's
        scale_a[:], zero[:] = a.scale.reshape(-1), a.zero.reshape(-1)
        scale_b, codes = scale.reshape(-1).astype(dtype), codes_of(a)
        flip = codes.dtype.type(128 if a.codes.dtype == np.int8 else 0)
        self._tile, self._packed = (ROWS, (0,) * isa.lanes), packed
        self._stride, self._spread = stride, spread
        self.strip = self._strip(STRIP // (stride * Q * stride * C))
        self._taps, b1 = (R, S), np.empty((P, 0), dtype)
        if flip or zero.any():
            b1 = empty((P, Q, K), "float64")
            plans.sums_of_present_taps(*lying(w), a.shape[1:3], offset, spread, stride, b1)
        self._image = codes, flip, offset, spread, (R, S), packed, stride
        self._scales = zero, b1.reshape(P, -1), scale_a, scale_b

    def form(self, residual=None):
        """The result as it is, plus a residual (N, D) float32 if there is one, summarized."""
        N, P, Q, K = self.shape
        residual = NOTHING if residual is None else residual.reshape(N, P, Q * K)
        y, sums, ranges = empty(self.shape), np.empty((2, N, K)), np.empty((2, N, K), np.float32)
        share(correlate_images, *self._kinds, self._sizes(self.strip), *self._tile, *self._image,
              self.strip, *self._scales, residual, y, sums, ranges)
        y = y.view(Seen)
        y.summary = Summary(ranges, sums)
        return y

    def form_unmixed(self, residual=None, x=NOTHING[0], norm=NOTHING[0], floor=FLOOR):
        """Its rows unmixed, and Σ g, Σ g · x̂ gated (norms.gradient_sums), in parts: (2, …, C).

        x  (N, D); without it no sums
        """
        N, P, Q, K = self.shape
        residual = NOTHING[0] if residual is None else residual
        largest, *mix = alone(N) if self.mix is None else (self.mix.largest, *self.mix.plan)
        strip = self._strip(2 * STRIP // (4 * largest * Q * K))           # a group's lie in cache
        y, sums = empty(self.shape), np.empty((2, (len(mix[0]) - 1) * -(-P // strip), K))
        share(correlate_gated, *self._kinds, self._sizes(strip), *self._tile, *self._image, strip,
              *self._scales, largest, *mix, residual, x, norm, floor, y, sums)
        return y, sums

    def _strip(self, rows):
        """About so many rows of the result, each strip beginning with the same phase of taps."""
        return min(self.shape[1], max(rows // self._spread, 1) * self._spread)

    def _sizes(self, strip):
        """Of a thread's canvas under a strip of rows, and of a row of sums, whole tiles wide."""
        (_, _, Q, _), (blocks, _, words, lanes, group) = self.shape, self._packed.shape
        tiles = len(ROWS) * self._spread
        wide, room = -(-Q // tiles) * tiles, words * group // self._taps[1]
        canvas = (((count - 1) * self._stride + taps - 1) // self._spread + 1
                  for count, taps in zip((strip, wide), self._taps, strict=True))
        return *canvas, room, wide * blocks * lanes


@cache
def alone(N):
    """`largest` and `plan`, as Householder has them, of N rows that are not mixed."""
    rows, ones = np.arange(N), np.ones(N)
    return 1, np.arange(N + 1), ones, ones, np.zeros(N), rows, ones


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
    sizes, present = wgrad_plan(isa.group, g.shape, x.shape, kernel, stride, padding)
    needs_g1 = bool(flip_x or x.zero.any())
    totals = [empty((threads(), *shape), "int64") for shape in
              ((*kernel, *(-(-count // 16) * 16 for count in (C, K))), (*kernel, C))]
    g1 = np.zeros((threads() * needs_g1, *g.shape[1:]), np.int64)
    ends = tuple(v.reshape(-1).astype("float64") for v in (g.zero, x.zero, g.scale, x.scale))
    dw = empty((K, *kernel, C))
    end = begin(wgrad_images, np.empty(0, isa.dtype), ROWS, (0,) * isa.lanes, codes_of(g), flip_g,
                codes_of(x), flip_x, (padding, padding), stride, kernel, sizes, *totals, g1,
                np.zeros(threads() + 1, np.int64), present, ends, dw)

    def finish():
        end()
        return dw

    return finish


@cache
def wgrad_plan(group, out, image, kernel, stride, padding):
    """What follows from shapes alone: (images, strip, quads, pitch), and where taps meet pixels.

    so many images fit a cache, `strip` rows of each, in words of `group` pixels
    """
    (_, P, Q, K), (_, H, W, C), (R, S) = out, image, kernel
    strip = max(1, min(P, STRIP // (Q * max(C, K)), TERMS // Q))
    images = max(1, min(IMAGES, TERMS // (strip * Q), STRIP // (strip * Q * max(C, K))))
    quads = -(-Q // group)
    pitch = -(-(quads * group + (S - 1) // stride) // 16) * 16
    present = tuple(np.array([blas.inside(length, side, tap - padding, stride)
                              for tap in range(taps)])
                    for length, side, taps in ((P, H, R), (Q, W, S)))
    return (images, strip, quads, pitch), present


def matmul(a, b):
    """a bᵀ.  a (M, K), b (J, K) → (M, J), contracts K."""
    isa, (M, K), J = choice.isa(), a.shape, len(b.codes)
    if K > TERMS or not a.is_integer:
        return blas.matmul(a, b)
    flip_b, flip_a = flips_of(b, a)
    left = np.zeros((-(-M // 8) * 8, -(-K // isa.group), isa.group), isa.dtype)
    left.reshape(len(left), -1)[:M, :K] = codes_of(a) ^ flip_a
    signed = (codes_of(b) ^ flip_b).view(np.int8)
    right = pack(signed.reshape(J, 1, 1, K), isa)[:, 0]         # (blocks, words, lanes, group)
    out = np.empty((len(left), len(right) * isa.lanes), np.int32)
    share(gemm_rows, ROWS, (0,) * isa.lanes, left, right, out)
    a1 = (codes_of(a) ^ flip_a).sum(axis=1, dtype="float64")[:, None]
    b1 = signed.sum(axis=1, dtype="float64")
    terms = blas.Terms(a, b, turn_b=first_to_last, centres=(-int(flip_a), int(flip_b)))
    return terms.finish(out[:M, :J].astype("float64"), b1, a1, K).astype("float32")


def flips_of(signed, unsigned):
    """What moves codes of the other kind: to the signed side, to the unsigned one."""
    return (np.uint8(128 if signed.codes.dtype == np.uint8 else 0),
            np.uint8(128 if unsigned.codes.dtype == np.int8 else 0))


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


def pack(w, isa, spread=1):
    """w (K, R, S, C) → (blocks of K, R, words of a filter row, lanes, group).

    Packed by the taps' remainders: those that meet the same pixels stand side by side.
    """
    (K, R, S, C), lanes = w.shape, isa.lanes
    words = -(-C // isa.group) * S
    packed = empty((-(-K // lanes), R, words, lanes, isa.group), isa.dtype)
    plans.pack(*lying(w), by_remainder(R, spread), by_remainder(S, spread), packed)
    return packed


def lying(w):
    """w as it lies in memory, and whether dgrad has turned it: one kind of array to compile for."""
    return (w, False) if w.flags.c_contiguous else (w.swapaxes(0, 3)[:, ::-1, ::-1], True)


@cache
def by_remainder(taps, spread):
    """The order of so many taps by remainders, each remainder's in their order."""
    return np.argsort(np.arange(taps) % spread, kind="stable")
