"""Sums of codes, compiled: correlation of images, its use in backward, plain GEMM.

No columns are formed. A task places the rows of an image that it needs on a canvas in cache, with
zeros for absent pixels, and tiles read the taps from there: neighbouring pixels are neighbouring
words. The unsigned operand holds images or gradients, the signed one weights, which each thread
packs for itself (packing.py); codes of the other kind are moved by 128 privately. float32 passes as
its bits, and its epilogue is float32. Who calls, and with what: products.py. Next: wgrad.py.
"""
import math

import numpy as np

from minifqt.kernels.cpu.amx import configure
from minifqt.kernels.cpu.board import leave, seat, take
from minifqt.kernels.cpu.choice import WORD, compiled
from minifqt.kernels.cpu.mixing import group_sum, reflect_row
from minifqt.kernels.cpu.norms import fold, gate_rows, run_of, summarize_run
from minifqt.kernels.cpu.packing import packed, prepared, rank
from minifqt.kernels.cpu.tiles import (
    apart,
    fetch,
    lanes_of,
    lined,
    multiply_add,
    panel,
    rows_of,
)


@compiled
def place(canvas, a, flip, top, offset):
    """Codes a (P, Q, C) on a canvas (rows, width, C') whose first row is row `top` of the whole.

    Pixel (p, q) at offset + (p, q); the rest is 0. flip 128 moves int8 codes to 0..255.
    """
    rows, width, room = canvas.shape
    P, Q, C = a.shape
    flat, source = canvas.reshape(rows, width * room), a.reshape(P, Q * C)
    first = max(0, -offset[1])
    last = max(first, min(Q, width - offset[1]))
    left, right = (offset[1] + first) * room, (offset[1] + last) * room
    for y in range(rows):
        p, row = top + y - offset[0], flat[y]
        if p < 0 or p >= P:
            row[:] = 0
        elif room == C:                                   # one run of bytes
            codes, target = source[p, first * C:last * C], row[left:right]
            row[:left] = 0
            for i in range(len(codes)):
                target[i] = codes[i] ^ flip
            row[right:] = 0
        else:
            row[:] = 0
            for q in range(first, last):
                for c in range(C):
                    canvas[y, offset[1] + q, c] = a[p, q, c] ^ flip


@compiled
def taps_at(y, offset, spread, taps):
    """Which taps meet a pixel at y, where pixels lie `spread` apart from `offset` on.

    Taps are sorted (`rank`): the first of y's, how many, its first pixel.
    """
    phase = (offset - y) % spread
    return (rank(phase, spread, taps), taps // spread + (phase < taps % spread),
            (y + phase - offset) // spread + offset // spread)


@compiled
def scratch(kinds, images, strip, Q, taps, spread, stride, b, M):
    """A canvas under a strip of rows of pixels, (tall, wide, C'), and its sums, whole tiles.

    Sums of so many images: (images, strip, Q or more pixels · K')
    """
    (R, S), (blocks, _, words, width, group) = taps, b.shape
    count, room = (Q + M * spread - 1) // (M * spread) * M * spread, words * group // S
    tall = ((strip - 1) * stride + R - 1) // spread + 1
    wide = ((count - 1) * stride + S - 1) // spread + 1
    sums = lined(images * strip * count * blocks * width, kinds[2])
    return (lined(tall * wide * room, kinds[0]).reshape(tall, wide, room),
            sums.reshape(images, strip, count * blocks * width))


@compiled
def correlate_rows(rows, vectors, canvas, height, offset, spread, stride, b, taps, Q, sums):
    """Sums of rows of the pixels under a canvas: sums (height or more, Q or more pixels · K').

    b, packed: blocks of K, filter rows, words of a filter row, lanes, group; taps as in taps_at
    """
    (R, S), (blocks, _, words, width, _) = taps, b.shape
    pixel, padded = canvas.shape[2] * b.itemsize, blocks * width
    pitch, line, count = canvas.shape[1] * pixel, words * width * WORD, (Q + spread - 1) // spread
    for above in range(min(spread, height)):
        r, tall, p = taps_at(above, offset[0], spread, R)
        for before in range(spread):
            s, wide, q = taps_at(before, offset[1], spread, S)
            if S % spread:                                # phases differ in their taps
                configure(rows, count, wide * words // S)
            panel(rows, vectors, b, (canvas.ctypes.data + (p * pitch + q * pixel) * stride,
                                     stride * pixel, count, stride * pitch,
                                     (height - above + spread - 1) // spread),
                  (b.ctypes.data + r * line + s * line // S, R * line, blocks),
                  (sums[above].ctypes.data + 4 * before * padded, spread * padded,
                   spread * sums.shape[1]),
                  ((1, 0, 0), (tall, pitch, line), (wide * words // S, WORD, width * WORD)), ())


@compiled
def scale_row(total, padded, K, zero, flip, ones, scale_a, scale_b, out):
    """out (Q · K,) = float32((Σ − zero · Σb) · (scale_a · scale_b)); Σ of codes moved by flip.

    In the precision of `ones`, Σb;  zero, scale_a of an image, scale_b (K or 1,)
    """
    apart()
    number = ones.dtype.type
    zero, scale_a = number(zero), number(scale_a)
    if padded != K:                                       # close the gaps
        for q in range(len(out) // K):
            for k in range(K):
                total[q * K + k] = total[q * padded + k]
    if zero == 0 and flip == 0 and len(scale_b) == 1:     # the usual case: after a ReLU
        scale = scale_a * number(scale_b[0])
        for i in range(len(out)):
            out[i] = total[i] * scale
    elif flip == 0 and len(scale_b) == 1:                 # a gradient
        scale = scale_a * number(scale_b[0])
        for i in range(len(out)):                         # zero · Σb is exact: 24 bits each
            out[i] = multiply_add(-zero, ones[i], np.float64(total[i])) * scale
    else:
        for i in range(len(out)):
            scale = scale_a * number(scale_b[i % len(scale_b)])
            exact = total[i] - flip * ones[i] if len(ones) else number(total[i])
            out[i] = (exact - zero * ones[i] if len(ones) else exact) * scale


@compiled
def correlate_images(counter, kinds, rows, vectors, a, flip, zero, scale_a, w, turned, scale_b,
                     offset, spread, stride, down, row_kind, right, strip, residual, y, sums,
                     ranges):
    """y (N, P, Q, K) = scaled Σ a·w (+ residual) for images a, summarized if `sums` is not empty.

    kinds    arrays of the dtypes of a canvas, of packed weights, of sums and of their epilogue
    zero     (N or 1,), scale_a (N or 1,), scale_b (K or 1,) float32
    w, turned  as in `packed`;  down, right  as in `sums_of_present_taps`, row_kind (P,) of each row
    strip    rows of y that share a canvas;  residual (N, P, Q · K) float32 or empty
    """
    me = seat(counter)
    if me < 0:
        return
    (N, P, Q, K), taps = y.shape, (down.shape[1], right.shape[1])
    b, b1 = prepared(w, turned, spread, kinds, vectors, flip, zero, K, down, right)
    canvas, acc = scratch(kinds, 1, strip, Q, taps, spread, stride, b, rows_of(rows))
    run, padded = run_of(K), b.shape[0] * b.shape[3]
    corner = (offset[0] // spread, offset[1] // spread)   # of the pixels, side by side
    flat_y, width = y.reshape(N, P * Q * K), Q * K
    s1, s2 = np.empty(run), np.empty(run)
    low, high = np.empty(run, np.float32), np.empty(run, np.float32)
    while True:
        n = take(counter)
        if n >= N:
            break
        configure(rows, (Q + spread - 1) // spread, b.shape[2] // spread)
        s1[:], s2[:], low[:], high[:] = 0, 0, np.inf, -np.inf
        for top in range(0, P, strip):
            place(canvas, a[n], flip, top * stride // spread, corner)
            stop = min(P, top + strip)
            correlate_rows(rows, vectors, canvas, stop - top, offset, spread, stride, b, taps, Q,
                           acc[0])
            for p in range(top, stop):
                if residual.size:
                    fetch(residual[n, p + 1:p + 2])
                out = flat_y[n, p * width:(p + 1) * width]
                scale_row(acc[0, p - top], padded, K, zero[n % len(zero)], flip, b1[row_kind[p]],
                          scale_a[n % len(scale_a)], scale_b, out)
                if residual.size:
                    other = residual[n, p]
                    for i in range(len(out)):
                        out[i] += other[i]
                if sums.size:
                    summarize_run(out, run, s1, s2, low, high)
        if sums.size:
            fold(s1, s2, low, high, K, n, sums, ranges)
    leave(counter, me)


@compiled
def correlate_gated(counter, kinds, rows, vectors, a, flip, zero, scale_a, w, turned, scale_b,
                    offset, spread, stride, down, row_kind, right, strip, largest, starts, target,
                    after, residual, x, norm, floor, y, sums):
    """The same for rows that are mixed in groups: unmixed in cache, and gated sums of the result.

    largest  rows of a group, at most
    starts .. after  as in mixing.reflect, where before and source are none
    residual, x  (N, P · Q · K), or empty: nothing is added, nothing gated and summed
    norm, floor  as in norms.gradient_sums;  sums (2, groups · strips, K) of groups and strips
    """
    me = seat(counter)
    if me < 0:
        return
    (N, P, Q, K), taps = y.shape, (down.shape[1], right.shape[1])
    b, b1 = prepared(w, turned, spread, kinds, vectors, flip, zero, K, down, right)
    canvas, acc = scratch(kinds, largest, strip, Q, taps, spread, stride, b, rows_of(rows))
    width, run = Q * K, run_of(K)
    mixed, total = np.empty((largest, width), np.float32), np.empty(width)
    padded, corner = b.shape[0] * b.shape[3], (offset[0] // spread, offset[1] // spread)
    s1, s2, unused = np.empty(run), np.empty(run), np.empty(run, np.float32)
    nothing, flat_y = np.empty((2, 0, K), np.float32), y.reshape(N, P * Q * K)
    order = np.arange(largest)
    strips = (P + strip - 1) // strip
    while True:
        task = take(counter)
        if task >= (len(starts) - 1) * strips:
            break
        group, top = task // strips, task % strips * strip
        height, first, last = min(strip, P - top), starts[group], starts[group + 1]
        root = 1 / math.sqrt(last - first)
        configure(rows, (Q + spread - 1) // spread, b.shape[2] // spread)
        s1[:], s2[:] = 0, 0
        for j in range(first, last):
            place(canvas, a[j], flip, top * stride // spread, corner)
            correlate_rows(rows, vectors, canvas, height, offset, spread, stride, b, taps, Q,
                           acc[j - first])
        for p in range(height):
            here = slice((top + p) * width, (top + p + 1) * width)
            ahead = slice(here.stop, here.stop + width)
            for j in range(first, last):
                fetch(x[target[j], ahead])
                fetch(residual[target[j], ahead])
                scale_row(acc[j - first, p], padded, K, zero[j % len(zero)], flip,
                          b1[row_kind[top + p]], scale_a[j % len(scale_a)], scale_b,
                          mixed[j - first])
            group_sum(mixed, order[:last - first], None, 0, width, root, total)
            for j in range(first, last):
                out = flat_y[target[j], here]
                reflect_row(mixed[j - first], 1.0, (j == first) - root, total, after[j], out)
                if residual.size:
                    more = residual[target[j], here]
                    for i in range(width):
                        out[i] += more[i]
                if x.size:
                    gate_rows(out, x[target[j], here], norm, floor, s1, s2)
        fold(s1, s2, unused, unused, K, task, sums, nothing)
    leave(counter, me)


@compiled
def gemm_rows(counter, rows, vectors, a, w, turned, spread, out):
    """out (M, J') = a wᵀ for a (M, words of K, group), w (J, 1, 1, K), J' whole vectors.  int32.

    turned, spread  False and 1: constants here would compile `packed` once more
    """
    me = seat(counter)
    if me < 0:
        return
    b, lanes = packed(w, turned, spread, a.reshape(-1), vectors), lanes_of(vectors)
    M, words, height = *a.shape[:2], rows_of(rows)
    while True:
        task = take(counter)
        if task >= M // height:
            break
        configure(rows, height, words)
        panel(rows, vectors, b,
              (a.ctypes.data + task * height * words * WORD, words * WORD, height, 0, 1),
              (b.ctypes.data, words * lanes * WORD, b.shape[0]),
              (out.ctypes.data + 4 * task * height * out.shape[1], out.shape[1], 0),
              ((1, 0, 0), (1, 0, 0), (words, WORD, lanes * WORD)), ())
    leave(counter, me)
