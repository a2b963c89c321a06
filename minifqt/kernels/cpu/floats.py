"""The weight gradient of a convolution in float32, compiled, and codes as floats beside it.

fprop and dgrad are the kernels of sums.py, which take floats as they take codes. Here the taps of a
filter's row are one run of numbers, so that nothing is turned. Each sum is one chain of multiply-
adds, cut by shape alone: the same bits for any number of threads, any instructions, fused or not.
"""
import numpy as np

from minifqt.backend import empty, threads
from minifqt.kernels.cpu import choice
from minifqt.kernels.cpu.board import leave, seat, take
from minifqt.kernels.cpu.choice import WORD, compiled
from minifqt.kernels.cpu.sums import place
from minifqt.kernels.cpu.team import begin, share
from minifqt.kernels.cpu.tiles import lanes_of, panel

PARTS, PART = 16, 1 << 24                                 # partial sums, and numbers in all of them
CACHE = 1 << 17                                           # bytes of pixels, read once a tap
BLOCK = 1 << 14                                           # numbers of a task


def begin_wgrad(g, x, kernel, stride, padding):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q.  Bits of float32.

    Begun by the other threads while this one goes on; call what it returns.
    """
    isa, (N, P, Q, K), C, (R, S) = choice.floats(), g.shape, x.shape[3], kernel
    lanes, rows = isa.lanes, len(isa.tile[0])
    padded, words = -(-K // lanes) * lanes, -(-S * C // rows) * rows
    count = max(1, min(N, PARTS, PART // (R * words * padded)))
    strip = max(1, min(P, CACHE // (4 * Q * (padded + stride * stride * C))))
    tall, wide = (strip - 1) * stride + R, (Q - 1) * stride + S
    canvases = empty((threads(), tall * wide * C + words), "uint32")          # read to its end
    parts = empty((count, R, words, padded))
    end = begin(wgrad_parts, canvases, empty((threads(), strip, Q, padded), "uint32"),
                *isa.tile, g, x, wide, (padding, padding), stride, kernel, parts)

    def sum_of_parts():
        end()
        total = empty((R, S * C, K))
        share(add_parts, parts, total)
        return np.ascontiguousarray(total.reshape(R, S, C, K).transpose(3, 0, 1, 2))

    return sum_of_parts


@compiled
def wgrad_parts(counter, canvases, places, rows, vectors, g, x, wide, offset, stride, taps, parts):
    """parts[i] (R, words, K') = Σ g·x over the i-th share of the images, in float32.

    g (N, P, Q, K), x (N, H, W, C)  uint32 bits;  words  S · C numbers of a filter row, or more
    canvases, places  scratch of each thread: strips of x, `wide` pixels, and of g
    """
    me = seat(counter)
    if me < 0:
        return
    (N, P, Q, _), C, R, none = g.shape, x.shape[3], taps[0], np.uint32(0)
    spots, (count, _, words, padded) = places[me], parts.shape
    strip, zero, lanes = spots.shape[0], np.int64(0), lanes_of(vectors)
    tall = (strip - 1) * stride + R
    image = canvases[me, :tall * wide * C].reshape(tall, wide, C)
    line = wide * C * WORD
    while True:
        task = take(counter)
        if task >= count:
            break
        sums = parts[task]
        sums[:] = 0
        for n in range(task * N // count, (task + 1) * N // count):
            for top in range(0, P, strip):
                place(image, x[n], none, top * stride, offset)
                place(spots, g[n], none, top, (zero, zero))
                loops = ((1, 0, 0), (min(strip, P - top), stride * line, Q * padded * WORD),
                         (Q, stride * C * WORD, padded * WORD))
                for r in range(R):
                    panel(rows, vectors, parts, (image.ctypes.data + r * line, WORD, words, 0, 1),
                          (spots.ctypes.data, lanes * WORD, padded // lanes),
                          (sums[r].ctypes.data, padded, 0), loops, (0,))
    leave(counter, me)


@compiled
def add_parts(counter, parts, total):
    """total (R, S · C, K) = Σ of the parts, in float64, in their order."""
    me = seat(counter)
    if me < 0:
        return
    R, words, K = total.shape
    exact = np.empty(K)
    while True:
        task = take(counter)
        if task >= R * words:
            break
        r, word = divmod(task, words)
        exact[:] = 0
        for i in range(len(parts)):
            part = parts[i, r, word]
            for k in range(K):
                exact[k] += part[k]
        for k in range(K):
            total[r, word, k] = exact[k]
    leave(counter, me)


@compiled
def dequantize(counter, codes, zero, scale, out):
    """out = scale · (codes − zero), in float64 and rounded once.  Flat arrays."""
    me = seat(counter)
    if me < 0:
        return
    while True:
        start = take(counter) * BLOCK
        if start >= len(codes):
            break
        source, target = codes[start:start + BLOCK], out[start:start + BLOCK]
        for i in range(len(source)):
            target[i] = (source[i] - zero) * scale
    leave(counter, me)
