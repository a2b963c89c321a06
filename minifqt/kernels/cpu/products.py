"""The three products of a layer on the CPU's integer dot products; integers equal to reference.py's.

No columns are formed. A task places the rows of an image that it needs on a canvas in cache, with
zeros for absent pixels, and tiles read the taps from there: neighbouring pixels are neighbouring
words. The unsigned operand holds images or gradients, the signed one weights (in wgrad gradients);
codes of the other kind are moved by 128 privately. Next: passes.py.
"""
from itertools import product

import numpy as np
from numba import njit

from minifqt.backend import empty, threads
from minifqt.kernels import blas
from minifqt.kernels.cpu import choice
from minifqt.kernels.cpu.choice import WORD
from minifqt.kernels.cpu.passes import (
    fold,
    gradient_sums_rows,
    group_sum,
    reflect_row,
    run_of,
    summarize_run,
)
from minifqt.kernels.cpu.team import leave, seat, share, take
from minifqt.kernels.cpu.tiles import tile, turn16, words16
from minifqt.kernels.reference import first_to_last, output_size
from minifqt.kernels.seen import Seen, Summary

TERMS = 2**31 // (255 * 128) - 1                          # that int32 holds: 65,792
STRIP = 1 << 17                                           # bytes of sums or codes kept in cache
IMAGES = 16                                               # of one task of wgrad, at most
NOTHING = np.empty((0, 0, 0), np.float32)
ROWS = (0,) * 8                                           # of a tile: as many sums in registers
compiled = njit(nogil=True, cache=True)


# ---- compiled ------------------------------------------------------------------------------------


@compiled
def place(canvas, a, flip, top, offset, spread):
    """Codes a (P, Q, C) on a canvas (rows, width, C') whose first row is row `top` of the whole.

    Pixel (p, q) at offset + spread · (p, q); the rest is 0. flip 128 moves int8 codes to 0..255.
    """
    rows, width, room = canvas.shape
    P, Q, C = a.shape
    flat, source = canvas.reshape(rows, width * room), a.reshape(P, Q * C)
    first = max(0, -(offset[1] // spread))
    last = max(first, min(Q, (width - 1 - offset[1]) // spread + 1))
    left, right = (offset[1] + first) * room, (offset[1] + last) * room
    for y in range(rows):
        p, rest = divmod(top + y - offset[0], spread)
        row = flat[y]
        if rest != 0 or p < 0 or p >= P:
            row[:] = 0
        elif spread == 1 and room == C:                   # one run of bytes
            codes, target = source[p, first * C:last * C], row[left:right]
            row[:left] = 0
            for i in range(len(codes)):
                target[i] = codes[i] ^ flip
            row[right:] = 0
        else:
            row[:] = 0
            for q in range(first, last):
                for c in range(C):
                    canvas[y, offset[1] + spread * q, c] = a[p, q, c] ^ flip


@compiled
def correlate_row(rows, lanes, canvas, top, stride, b, taps, sums):
    """Integer sums of one row of pixels whose first tap row is canvas[top]: sums (pixels, K').

    b, packed: blocks of K, filter rows, words of a filter row, lanes, group
    """
    (R, _), (blocks, _, words, width, _), M = taps, b.shape, len(rows)
    pixel = canvas.shape[2] * b.itemsize
    pitch, padded = canvas.shape[1] * pixel, sums.shape[1]
    for block in range(blocks):
        for q in range(0, len(sums), M):
            tile(rows, lanes, b, canvas.ctypes.data + top * pitch + q * stride * pixel,
                 stride * pixel, b.ctypes.data + block * R * words * width * WORD,
                 sums.ctypes.data + 4 * (q * padded + block * width), padded,
                 ((1, 0, 0), (R, pitch, words * width * WORD), (words, WORD, width * WORD)), ())


@compiled
def scale_row(sums, K, zero, flip, ones, scale_a, scale_b, out):
    """out (Q · K,) = float32((Σ − zero · Σb) · (scale_a · scale_b)); Σ of codes moved by flip."""
    total, padded = sums.reshape(-1), sums.shape[1]
    if padded != K:                                       # close the gaps
        for q in range(len(out) // K):
            for k in range(K):
                total[q * K + k] = total[q * padded + k]
    if zero == 0 and flip == 0 and len(scale_b) == 1:     # the usual case: after a ReLU
        scale = scale_a * scale_b[0]
        for i in range(len(out)):
            out[i] = total[i] * scale
    elif flip == 0 and len(scale_b) == 1:                 # a gradient
        scale = scale_a * scale_b[0]
        for i in range(len(out)):
            out[i] = (total[i] - zero * ones[i]) * scale
    else:
        for i in range(len(out)):
            scale = scale_a * scale_b[i % len(scale_b)]
            exact = total[i] - flip * ones[i] if len(ones) else np.float64(total[i])
            out[i] = (exact - zero * ones[i] if len(ones) else exact) * scale


@compiled
def correlate_images(counter, canvases, accs, rows, lanes, a, flip, offset, spread, taps, b,
                     stride, strip, zero, b1, scale_a, scale_b, residual, y, sums, ranges):
    """y (N, P, Q, K) = scaled Σ a·b (+ residual) for images a, summarized if `sums` is not empty.

    canvases, accs  scratch of each thread: a strip of codes, integer sums of a row
    taps     (R, S) of the packed b;  strip  rows of y that share a canvas
    zero     (N,) float64; b1 (P, Q · K) float64, Σ b over the taps that are present
    scale_a  (N,), scale_b (K or 1,), float64; residual (N, P, Q · K) float32 or empty
    """
    me = seat(counter)
    if me < 0:
        return
    N, P, Q, K = y.shape
    canvas, acc, run = canvases[me], accs[me], run_of(K)
    s1, s2 = np.empty(run), np.empty(run)
    low, high = np.empty(run, np.float32), np.empty(run, np.float32)
    while True:
        n = take(counter)
        if n >= N:
            break
        s1[:], s2[:], low[:], high[:] = 0, 0, np.inf, -np.inf
        for top in range(0, P, strip):
            place(canvas, a[n], flip, top * stride, offset, spread)
            for p in range(top, min(P, top + strip)):
                out = y[n, p].reshape(-1)
                correlate_row(rows, lanes, canvas, (p - top) * stride, stride, b, taps, acc)
                scale_row(acc, K, zero[n], flip, b1[p], scale_a[n], scale_b, out)
                if residual.size:
                    other = residual[n, p]
                    for i in range(len(out)):
                        out[i] += other[i]
                if sums.size:
                    summarize_run(out, run, s1, s2, low, high)
        if sums.size:
            fold(s1, s2, low, high, K, n, sums, ranges)
    leave(counter)


@compiled
def correlate_gated(counter, canvases, accs, mixes, totals, rows, lanes, a, flip, offset, spread,
                    taps, b, stride, strip, zero, b1, scale_a, scale_b, starts, root, gain, v,
                    target, after, x, norm, floor, y, sums):
    """The same for rows that are mixed in groups: unmixed in cache, and gated sums of the result.

    mixes (threads, rows of the largest group, strip · Q · K) float32, totals (threads, …) float64
    starts .. after  as in passes.reflect, where before and source are none
    x, norm, floor   as in passes.gradient_sums; x (N, P, Q · K)
    sums     (2, strips, K) of each strip of rows
    """
    me = seat(counter)
    if me < 0:
        return
    N, P, Q, K = y.shape
    canvas, acc, mixed, total, run = canvases[me], accs[me], mixes[me], totals[me], run_of(K)
    s1, s2, unused = np.empty(run), np.empty(run), np.empty(run, np.float32)
    nothing, flat_y, flat_x = np.empty((2, 0, K), np.float32), y.reshape(N, -1), x.reshape(N, -1)
    while True:
        task = take(counter)
        if task * strip >= P:
            break
        top, height = task * strip, min(strip, P - task * strip)
        s1[:], s2[:], D = 0, 0, height * Q * K
        for group in range(len(starts) - 1):
            first, last = starts[group], starts[group + 1]
            for j in range(first, last):
                place(canvas, a[j], flip, top * stride, offset, spread)
                for p in range(height):
                    correlate_row(rows, lanes, canvas, p * stride, stride, b, taps, acc)
                    scale_row(acc, K, zero[j], flip, b1[top + p], scale_a[j], scale_b,
                              mixed[j - first, p * Q * K:(p + 1) * Q * K])
            if last - first > 1:
                group_sum(mixed[:last - first], root[group], gain[group], total[:D])
            for j in range(first, last):
                out, at = flat_y[target[j]], top * Q * K
                out, row, factor = out[at:at + D], mixed[j - first], after[j]
                if last - first > 1:
                    reflect_row(row, v[j], total, factor, out)
                else:
                    for i in range(D):
                        out[i] = row[i] * factor
                gradient_sums_rows(out, flat_x[target[j], at:at + D], norm, floor, run, s1, s2)
        fold(s1, s2, unused, unused, K, task, sums, nothing)
    leave(counter)


@compiled
def wgrad_images(counter, canvases, places, lefts, rights, partials, seens, rows, lanes, g, flip_g,
                 x, flip_x, offset, stride, taps, strip, total, x1, g1):
    """Adds Σ g·x over images and pixels to a thread's total, Σ x to its x1, Σ g to its g1.

    g (N, P, Q, K), x (N, H, W, C), moved to the signed and to the unsigned side by their flips
    canvases .. seens  scratch of each thread, shapes in `wgrad_scratch`
    total  (threads, R, S, C', K'), x1 (threads, R, S, C), int64; C', K' are multiples of 16
    g1     (threads, P, Q, K) int64, Σ over images of g moved to 0..255; empty if not needed
    """
    me = seat(counter)
    if me < 0:
        return
    (N, P, Q, _), (R, S) = g.shape, taps
    image, spots, left, right = canvases[me], places[me], lefts[me], rights[me]
    sums, seen, mine = partials[me], seens[me], total[me].reshape(-1)
    images, tall, _, room, pitch = left.shape
    quads, padded, item = right.shape[2], right.shape[3], left.itemsize
    group, width, line = WORD // item, len(lanes), pitch * left.itemsize
    strips, flat = (P + strip - 1) // strip, sums.reshape(-1)
    sums[:], seen[:] = 0, 0
    while True:
        task = take(counter)
        if task >= (N + images - 1) // images * strips:
            break
        start, top = task // strips * images, task % strips * strip
        height, count = min(strip, P - top), min(images, N - start)
        for n in range(count):
            # x as rows of channels, one for each phase of the stride; g as words of a few pixels
            place(image, x[start + n], flip_x, top * stride, offset, 1)
            add_codes(image, 0, seen)
            for y in range(tall):
                for phase in range(stride):
                    for q in range(0, pitch, 16):
                        a = image.ctypes.data + (y * image.shape[1] + q * stride + phase) * room
                        b = left[n, y, phase].ctypes.data + q * item
                        for c in range(0, room, 16):
                            turn16(left, a + c, stride * room, b + c * line, line)
            if g1.size:
                add_codes(g[start + n, top:top + height], 128 ^ flip_g, g1[me, top:top + height])
            place(spots, g[start + n], flip_g, top, (0, 0), 1)
            for p in range(height):
                for quad in range(quads):
                    a = spots[p].ctypes.data + quad * group * padded
                    b = right[n, p, quad].ctypes.data
                    for k in range(0, padded, 16):
                        words16(left, a + k, padded, b + k * WORD)
        for r in range(R):
            for s in range(S):                            # a tap moves x by the size of a code
                a = left.ctypes.data + (r * stride + s % stride) * room * line + s // stride * item
                for k in range(0, padded, width):
                    for c in range(0, room, len(rows)):
                        tile(rows, lanes, left, a + c * line, line, right.ctypes.data + k * WORD,
                             sums[r, s, c].ctypes.data + k * 4, padded,
                             ((count, tall * stride * room * line, strip * quads * padded * WORD),
                              (height, stride * stride * room * line, quads * padded * WORD),
                              (quads, WORD, padded * WORD)), (0,))
        add_taps(seen, x1[me], stride, height, Q)
        for i in range(len(flat)):                        # int32 holds the sums of one task
            mine[i] += flat[i]
        sums[:], seen[:] = 0, 0
    leave(counter)


@compiled
def add_codes(codes, flip, total):
    """total += codes ^ flip, element by element."""
    for y in range(codes.shape[0]):
        source, target = codes[y].reshape(-1), total[y].reshape(-1)
        for i in range(source.size):
            target[i] += source[i] ^ np.uint8(flip)


@compiled
def add_taps(image, x1, stride, height, Q):
    """x1[r, s, c] += Σ over output pixels of what tap (r, s) reads.  image (tall, wide, C)."""
    R, S, C = x1.shape
    row = np.empty(C, np.int64)
    for y in range(image.shape[0]):
        for s in range(S):
            row[:] = 0
            for q in range(Q):
                for c in range(C):
                    row[c] += image[y, s + q * stride, c]
            for r in range(R):
                p, rest = divmod(y - r, stride)
                if rest == 0 and 0 <= p < height:
                    for c in range(C):
                        x1[r, s, c] += row[c]


@compiled
def gemm_rows(counter, rows, lanes, a, b, out):
    """out (M, J) = a bᵀ for a (M, words of K), b in blocks of J (blocks, words, lanes).  int32."""
    me = seat(counter)
    if me < 0:
        return
    M, words = a.shape[:2]
    while True:
        task = take(counter)
        if task >= M // len(rows):
            break
        for block in range(b.shape[0]):
            tile(rows, lanes, b, a.ctypes.data + task * len(rows) * words * WORD, words * WORD,
                 b.ctypes.data + block * words * len(lanes) * WORD,
                 out.ctypes.data + 4 * (task * len(rows) * out.shape[1] + block * len(lanes)),
                 out.shape[1], ((1, 0, 0), (1, 0, 0), (words, WORD, len(lanes) * WORD)), ())
    leave(counter)


# ---- what the layers call ------------------------------------------------------------------------


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

    g, spread by the stride, is correlated with the turned w.
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
    """Signed, zero 0 as `sym` makes them, and int32 holds any sum; else BLAS does it."""
    return w.codes.dtype == np.int8 and not w.zero.any() and w.codes[0].size <= TERMS >= w.codes[..., 0].size


class Correlation:
    """A correlation that is set up and not yet computed: its result can be asked for in three ways.

    a (N, …, C) codes on a canvas at `offset`, `spread` apart; w (K, R, S, C) int8 with its scale
    """

    def __init__(self, a, w, scale, offset, spread, out, stride):
        isa, (K, R, S, C), (P, Q), N = choice.isa(), w.shape, out, len(a.codes)
        packed, self.shape, self.mix = pack(w, isa), (N, P, Q, K), a.mix
        scale_a, zero = (np.full(N, v.reshape(-1), "float64") for v in (a.scale, a.zero))
        scale_b = scale.reshape(-1).astype("float64")
        flip = np.uint8(128 if a.codes.dtype == np.int8 else 0)
        self.strip = max(1, min(P, STRIP // (stride * Q * stride * C)))
        self._shape, self._packed, self._stride = (ROWS, (0,) * isa.lanes), packed, stride
        self._taps, place = (R, S), (offset, spread, (R, S), packed, stride)
        b1 = np.empty((P, 0))
        if flip or zero.any():                            # one image's work: where taps are present
            ones, one = np.ones((1, *a.shape[1:]), np.uint8), np.ones(1)
            self._image = (ones, np.uint8(0), *place)
            self._scales = 0 * one, b1, one, one
            b1 = self._formed(1, NOTHING, False).reshape(P, -1).astype("float64")    # below 2²⁴
        self._image = (codes_of(a), flip, *place)
        self._scales = zero, b1, scale_a, scale_b

    def form(self, residual=None):
        """The result, plus a residual (N, P, Q, K) float32 if there is one, summarized."""
        N, P, Q, K = self.shape
        return self._formed(N, NOTHING if residual is None else residual.reshape(N, P, Q * K), True)

    def _formed(self, N, residual, summarized):
        _, P, Q, K = self.shape
        y = empty((N, P, Q, K)).view(Seen)
        sums, ranges = np.empty((2, N * summarized, K)), np.empty((2, N, K), np.float32)
        share(correlate_images, *self._scratch(self.strip), *self._shape, *self._image, self.strip,
              *self._scales, residual, y, sums, ranges)
        y.summary = Summary(ranges, sums) if summarized else None
        return y

    def form_gated(self, x, norm, floor):
        """The result with its rows unmixed, and Σ g, Σ g · x̂ of it gated, (2, strips, C)."""
        N, P, Q, K = self.shape
        strip, y = max(1, P // 8), empty(self.shape)
        rows = np.arange(N)
        mix = (self.mix.plan() if self.mix is not None else
               (np.arange(N + 1), np.ones(N), np.ones(N), np.zeros(N), rows, np.ones(N)))
        mixes = empty((threads(), np.diff(mix[0]).max(), strip * Q * K))
        totals = empty((threads(), strip * Q * K), "float64")
        sums = np.empty((2, -(-P // strip), K))
        share(correlate_gated, *self._scratch(strip), mixes, totals, *self._shape, *self._image,
              strip, *self._scales, *mix, x, norm, floor, y, sums)
        return y, sums

    def _scratch(self, strip):
        """For each thread a canvas under a strip of rows, and a row of sums, whole tiles wide."""
        (_, _, Q, _), (blocks, R, words, lanes, group) = self.shape, self._packed.shape
        wide, S = -(-Q // len(ROWS)) * len(ROWS), self._taps[1]
        canvas = ((strip - 1) * self._stride + R, (wide - 1) * self._stride + S, words * group // S)
        return (empty((threads(), *canvas), self._packed.dtype),
                empty((threads(), wide, blocks * lanes), "int32"))


def conv_wgrad(g, x, kernel, stride, padding):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q."""
    isa, (N, P, Q, K), (_, H, W, C), (R, S) = choice.isa(), g.shape, x.shape, kernel
    flip_g, flip_x = (np.uint8(128 if t.codes.dtype == moved else 0)
                      for t, moved in ((g, np.uint8), (x, np.int8)))
    strip = max(1, min(P, STRIP // (Q * max(C, K))))
    scratch = wgrad_scratch(isa, (P, Q, K), C, kernel, stride, strip)
    total = np.zeros((threads(), *scratch[4].shape[1:]), np.int64)
    x1 = np.zeros((threads(), R, S, C), np.int64)
    needs_g1 = bool(flip_x or x.zero.any())
    g1 = np.zeros((threads() * needs_g1, P, Q, K), np.int64)
    share(wgrad_images, *scratch, ROWS, (0,) * isa.lanes, codes_of(g), flip_g, codes_of(x), flip_x,
          (padding, padding), stride, kernel, strip, total, x1, g1)
    total, x1 = total.sum(axis=0)[..., :C, :K].transpose(3, 0, 1, 2), x1.sum(axis=0)
    present = [[blas.inside(length, side, tap - padding, stride) for tap in range(taps)]
               for length, side, taps in ((P, H, R), (Q, W, S))]
    n, g1 = np.empty((R, S, 1)), g1.sum(axis=0) - 128 * N  # (P, Q, K), moved to the signed side
    a1 = np.zeros((K, R, S, 1))
    for (r, (top, bottom)), (s, (left, right)) in product(*map(enumerate, present)):
        n[r, s] = N * (bottom - top) * (right - left)
        if needs_g1:
            a1[:, r, s, 0] = g1[top:bottom, left:right].sum(axis=(0, 1))
    terms = blas.Terms(g, x, turn_a=first_to_last, centres=(int(flip_g), -int(flip_x)))
    return terms.finish(total, x1, a1, n)


def wgrad_scratch(isa, out, C, kernel, stride, strip):
    """What a thread of wgrad_images needs for so many images that they fit a cache."""
    (_, Q, K), (R, S), T = out, kernel, threads()
    padded, room = (-(-count // 16) * 16 for count in (K, C))
    images = max(1, min(IMAGES, TERMS // (strip * Q), STRIP // (strip * Q * max(C, K))))
    quads = -(-Q // isa.group)
    pitch = -(-(quads * isa.group + (S - 1) // stride) // 16) * 16
    tall, wide = (strip - 1) * stride + R, pitch * stride
    return (empty((T, tall, wide, room), "uint8"), empty((T, strip, quads * isa.group, padded), "uint8"),
            empty((T, images, tall, stride, room, pitch), isa.dtype),
            empty((T, images, strip, quads, padded), "uint32"),
            empty((T, R, S, room, padded), "int32"), empty((T, tall, wide, room), "uint16"))


def matmul(a, b):
    """a bᵀ.  a (M, K), b (J, K) → (M, J), contracts K."""
    isa, (M, K), J = choice.isa(), a.shape, len(b.codes)
    if K > TERMS:
        return blas.matmul(a, b)
    flip_a, flip_b = (np.uint8(128 if t.codes.dtype == moved else 0)
                      for t, moved in ((a, np.int8), (b, np.uint8)))
    left = np.zeros((-(-M // 8) * 8, -(-K // isa.group), isa.group), isa.dtype)
    left.reshape(len(left), -1)[:M, :K] = codes_of(a) ^ flip_a
    signed = (codes_of(b) ^ flip_b).view(np.int8)
    right = pack(signed.reshape(J, 1, 1, K), isa)[:, 0]   # (blocks, words, lanes, group)
    out = np.empty((len(left), len(right) * isa.lanes), np.int32)
    share(gemm_rows, ROWS, (0,) * isa.lanes, left, right, out)
    a1 = (codes_of(a) ^ flip_a).sum(axis=1, dtype="float64")[:, None]
    b1 = signed.sum(axis=1, dtype="float64")
    terms = blas.Terms(a, b, turn_b=first_to_last, centres=(-int(flip_a), int(flip_b)))
    return terms.finish(out[:M, :J].astype("float64"), b1, a1, K)


def codes_of(t):
    """Its codes as they lie in memory: contiguous, uint8."""
    return np.ascontiguousarray(t.codes).view(np.uint8)


def pack(w, isa):
    """w (K, R, S, C) int8 → (blocks of K, R, words of a filter row, lanes, group)."""
    K, R, S, C = w.shape
    room = -(-C // isa.group) * isa.group
    full = np.zeros((-(-K // isa.lanes) * isa.lanes, R, S, room), isa.dtype)
    full[:K, ..., :C] = w
    full = full.reshape(-1, isa.lanes, R, S * room // isa.group, isa.group)
    return np.ascontiguousarray(full.transpose(0, 2, 3, 1, 4))
