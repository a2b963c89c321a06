"""The three products of a layer on the CPU's integer dot products; integers equal to reference.py's.

No columns are formed. A task places the rows of an image that it needs on a canvas in cache, with
zeros for absent pixels, and tiles read the taps from there: neighbouring pixels are neighbouring
words. The unsigned operand holds images or gradients, the signed one weights (in wgrad gradients);
codes of the other kind are moved by 128 privately. Next: passes.py.
"""
from itertools import product

import numpy as np
from numba import njit

from minifqt.backend import empty, share, threads
from minifqt.kernels import blas
from minifqt.kernels.cpu import choice
from minifqt.kernels.cpu.choice import WORD
from minifqt.kernels.cpu.tiles import take, tile, turn16, words16
from minifqt.kernels.reference import first_to_last, output_size
from minifqt.kernels.seen import Seen

TERMS = 2**31 // (255 * 128) - 1                          # that int32 holds: 65,792
STRIP = 1 << 17                                           # bytes of sums or codes kept in cache
IMAGES = 16                                               # of one task of wgrad, at most
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
    canvas[:] = 0
    first = max(0, -(offset[1] // spread))
    last = min(Q, (width - 1 - offset[1]) // spread + 1)
    for y in range(rows):
        p, rest = divmod(top + y - offset[0], spread)
        if rest != 0 or p < 0 or p >= P or last <= first:
            continue
        if spread == 1 and room == C:                     # one run of bytes
            source = a[p, first:last].reshape(-1)
            start = (offset[1] + first) * C
            target = canvas[y].reshape(-1)[start:start + source.size]
            for i in range(source.size):
                target[i] = source[i] ^ flip
        else:
            for q in range(first, last):
                for c in range(C):
                    canvas[y, offset[1] + spread * q, c] = a[p, q, c] ^ flip


@compiled
def correlate_images(counter, rows, lanes, a, flip, offset, spread, taps, b, stride,
                     y, strip, zero, b1, scale_a, scale_b):
    """y = float32(((Σ a·b − zero · b1) · (scale_a · scale_b))) for images a (N, P', Q', C).

    taps     (R, S) of the packed b: blocks of K, R, words of a filter row, block, group
    zero     (N,) float64; b1 (P, Q · K) float64, Σ b over the taps that are present
    scale_a  (N,), scale_b (Q · K,), float64;  y (N, P, Q, K);  strip  rows of y in one task
    """
    N, P, Q, K = y.shape
    R, S = taps
    blocks, _, words, width, group = b.shape
    room, M, item = words * group // S, len(rows), b.itemsize
    wide, padded = (Q + M - 1) // M * M, blocks * width
    canvas = np.empty(((strip - 1) * stride + R, (wide - 1) * stride + S, room), b.dtype)
    sums = np.empty((strip, wide * padded), np.int32)
    pixel, pitch = room * item, canvas.shape[1] * room * item
    strips = (P + strip - 1) // strip
    while True:
        task = take(counter)
        if task >= N * strips:
            break
        n, top = task // strips, task % strips * strip
        height = min(strip, P - top)
        place(canvas, a[n], flip, top * stride, offset, spread)
        for block in range(blocks):
            for p in range(height):
                for q in range(0, wide, M):
                    tile(rows, lanes, b,
                         canvas.ctypes.data + p * stride * pitch + q * stride * pixel,
                         stride * pixel, b.ctypes.data + block * R * words * width * WORD,
                         sums.ctypes.data + 4 * ((p * wide + q) * padded + block * width), padded,
                         ((1, 0, 0), (R, pitch, words * width * WORD),
                          (words, WORD, width * WORD)), ())
        for p in range(height):
            total, out, ones = sums[p], y[n, top + p].reshape(-1), b1[top + p]
            if padded != K:                               # close the gaps
                for q in range(Q):
                    for k in range(K):
                        total[q * K + k] = total[q * padded + k]
            if zero[n] == 0 and flip == 0:
                for i in range(Q * K):
                    out[i] = total[i] * (scale_a[n] * scale_b[i])
            else:
                for i in range(Q * K):
                    exact = total[i] - flip * ones[i]
                    out[i] = (exact - zero[n] * ones[i]) * (scale_a[n] * scale_b[i])


@compiled
def wgrad_images(counter, slot, rows, lanes, g, flip_g, x, flip_x, offset, stride, taps,
                 like, images, strip, total, x1, g1):
    """Adds Σ g·x over images and pixels to one thread's total[slot], Σ x to x1[slot], Σ g to g1.

    g (N, P, Q, K), x (N, H, W, C), moved to the signed and to the unsigned side by their flips
    total  (threads, R, S, C', K'), x1 (threads, R, S, C), int64; C', K' are multiples of a tile
    g1     (threads, P, Q, K) int64, Σ over images of g moved to 0..255; empty if not needed
    """
    N, P, Q, K = g.shape
    C, (R, S), M = x.shape[3], taps, len(rows)
    room, width = total.shape[3], len(lanes)
    padded, group = total.shape[4], WORD // like.itemsize
    quads = (Q + group - 1) // group
    # x as rows of channels, one for each phase of the stride; g as words of `group` pixels for each
    # k. A tap moves x by a pixel, that is by the size of a code.
    pitch = (quads * group + (S - 1) // stride + 15) // 16 * 16
    tall, row = (strip - 1) * stride + R, pitch * like.itemsize
    image, places = (np.empty((tall, pitch * stride, room), np.uint8),
                     np.empty((strip, quads * group, padded), np.uint8))
    left = np.empty((images, tall, stride, room, pitch), like.dtype)
    right = np.empty((images, strip, quads, padded), np.uint32)
    sums, seen = np.zeros((R, S, room, padded), np.int32), np.zeros(image.shape, np.uint16)
    strips, me = (P + strip - 1) // strip, take(slot)
    while True:
        task = take(counter)
        if task >= (N + images - 1) // images * strips:
            break
        start, top = task // strips * images, task % strips * strip
        height, count = min(strip, P - top), min(images, N - start)
        for n in range(count):
            place(image, x[start + n], flip_x, top * stride, offset, 1)
            add_codes(image, 0, seen)
            for y in range(tall):
                for phase in range(stride):
                    for q in range(0, pitch, 16):
                        for c in range(0, room, 16):
                            turn16(like, image[y, q * stride + phase:, c:].ctypes.data,
                                   stride * room, left[n, y, phase, c:, q:].ctypes.data, row)
            if g1.size:
                add_codes(g[start + n, top:top + height], 128 ^ flip_g, g1[me, top:top + height])
            place(places, g[start + n], flip_g, top, (0, 0), 1)
            for p in range(height):
                for quad in range(quads):
                    for k in range(0, padded, 16):
                        words16(like, places[p, quad * group:, k:].ctypes.data, padded,
                                right[n, p, quad, k:].ctypes.data)
        for r in range(R):
            for s in range(S):
                phase, shift = s % stride, s // stride * like.itemsize
                for block in range(0, padded, width):
                    for c in range(0, room, M):
                        tile(rows, lanes, like,
                             left.ctypes.data + ((r * stride + phase) * room + c) * row + shift,
                             row, right.ctypes.data + block * WORD,
                             sums.ctypes.data + 4 * (((r * S + s) * room + c) * padded + block),
                             padded, ((count, tall * stride * room * row, strip * quads * padded * WORD),
                                      (height, stride * stride * room * row, quads * padded * WORD),
                                      (quads, WORD, padded * WORD)), (0,))
        add_taps(seen, x1[me], stride, height, Q)
        target, source = total[me].reshape(-1), sums.reshape(-1)
        for i in range(source.size):                      # int32 holds the sums of one task
            target[i] += source[i]
        sums[:] = 0
        seen[:] = 0


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


# ---- what the layers call ------------------------------------------------------------------------


def conv_fprop(x, w, stride, padding):
    """x (N, H, W, C), w (K, R, S, C) → (N, P, Q, K), contracts R, S, C."""
    if not fits(w):
        return blas.conv_fprop(x, w, stride, padding)
    out = output_size(x.shape[1:3], w.shape[1:3], stride, padding)
    return correlate(x, w.codes, w.scale, (padding, padding), 1, out, stride)


def conv_dgrad(g, w, size, stride, padding):
    """g (N, P, Q, K), w (K, R, S, C) → (N, H, W, C), contracts R, S, K.

    g, spread by the stride, is correlated with the turned w.
    """
    if not fits(w):
        return blas.conv_dgrad(g, w, size, stride, padding)
    R, S = w.shape[1:3]
    turned = w.codes[:, ::-1, ::-1].swapaxes(0, 3)        # (C, R, S, K)
    return correlate(g, turned, w.scale, (R - 1 - padding, S - 1 - padding), stride, size, 1)


def fits(w):
    """Signed, zero 0 as `sym` makes them, and int32 holds any sum; else BLAS does it."""
    return w.codes.dtype == np.int8 and not w.zero.any() and w.codes[0].size <= TERMS >= w.codes[..., 0].size


def correlate(a, w, scale, offset, spread, out, stride):
    """Σ over taps and channels of w (K, R, S, C) times a (N, …, C) → (N, *out, K)."""
    isa, (K, R, S, _), (P, Q), N = choice.isa(), w.shape, out, len(a.codes)
    packed = pack(w, isa)
    scale_a, zero = (np.full(N, v.reshape(-1), "float64") for v in (a.scale, a.zero))
    scale_b = np.tile(np.full(K, scale.reshape(-1), "float64"), Q)
    flip = np.uint8(128 if a.codes.dtype == np.int8 else 0)
    strip = max(1, min(P, STRIP // (4 * Q * packed.shape[0] * isa.lanes)))

    def run(codes, flip, zero, scale_a, scale_b, b1):
        y = empty((len(codes), P, Q, K))
        share(correlate_images, ROWS, (0,) * isa.lanes, codes, flip, offset, spread, (R, S),
              packed, stride, y, strip, zero, b1, scale_a, scale_b)
        return y

    b1 = np.empty((P, 0))
    if flip or zero.any():                                # one image's work: where taps are present
        ones, one = np.ones((1, *a.shape[1:]), np.uint8), np.ones(1)
        b1 = run(ones, np.uint8(0), 0 * one, one, np.ones(Q * K), b1).reshape(P, -1)
        b1 = b1.astype("float64")                         # of integers below 2²⁴
    return run(codes_of(a), flip, zero, scale_a, scale_b, b1).view(Seen)


def conv_wgrad(g, x, kernel, stride, padding):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q."""
    isa, (N, P, Q, K), (_, H, W, C), (R, S) = choice.isa(), g.shape, x.shape, kernel
    padded, room = (-(-count // 16) * 16 for count in (K, C))
    strip = max(1, min(P, STRIP // (Q * max(C, K))))
    images = max(1, min(IMAGES, TERMS // (strip * Q), STRIP // (strip * Q * max(C, K))))
    flip_g, flip_x = (np.uint8(128 if t.codes.dtype == moved else 0)
                      for t, moved in ((g, np.uint8), (x, np.int8)))
    total = np.zeros((threads(), R, S, room, padded), np.int64)
    x1 = np.zeros((threads(), R, S, C), np.int64)
    needs_g1 = bool(flip_x or x.zero.any())
    g1 = np.zeros((threads() * needs_g1, P, Q, K), np.int64)
    share(wgrad_images, np.zeros(1, np.int64), ROWS, (0,) * isa.lanes, codes_of(g), flip_g,
          codes_of(x), flip_x, (padding, padding), stride, (R, S), np.empty(0, isa.dtype), images,
          strip, total, x1, g1)
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
