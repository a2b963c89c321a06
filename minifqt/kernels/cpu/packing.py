"""Weights as the tiles read them, compiled: words of a few channels, taps in the order of pixels.

A kernel packs them itself, each of its threads its own: they are few, and then lie in its cache.
Next: sums.py.
"""
import numpy as np

from minifqt.kernels.cpu.choice import WORD, compiled
from minifqt.kernels.cpu.tiles import lanes_of, lined


@compiled
def prepared(w, turned, spread, kinds, vectors, flip, zero, K, down, right):
    """Weights `packed`, and their `sums_of_present_taps` or, if no zero asks for them, (kinds, 0).

    kinds, flip, zero  as in sums.correlate_images
    """
    b = packed(w, turned, spread, kinds[1], vectors)
    if flip or zero.any():
        return b, sums_of_present_taps(b, spread, K, down, right, kinds[3])
    return b, np.empty((len(down), 0), kinds[3].dtype)


@compiled
def rank(tap, spread, taps):
    """Where a tap stands if so many are sorted by their remainders, each remainder's in order.

    Where pixels lie `spread` apart, those that meet the same pixels stand side by side.
    """
    phase = tap % spread
    return phase * (taps // spread) + min(phase, taps % spread) + tap // spread


@compiled
def packed(w, turned, spread, like, vectors):
    """w (K, R, S, C) → (blocks of K, R, words of a filter row, lanes, group), absent codes 0.

    turned  w lies as (C, R, S, K), its taps from last to first, as dgrad reads it
    like, vectors  as tiles.tile takes them
    """
    (K, R, S, C), width, group = w.shape, lanes_of(vectors), WORD // like.itemsize
    if turned:
        K, C = C, K
    words = (C + group - 1) // group                      # of a tap
    shape = ((K + width - 1) // width, R, S * words, width, group)
    out = lined(shape[0] * R * S * words * width * group, like).reshape(shape)
    if K % width or C % group:
        out[:] = 0
    for first in range(0, K, width):
        count = min(width, K - first)
        for r in range(R):
            for s in range(S):
                tap = (w[:, R - 1 - r, S - 1 - s, first:first + count].T if turned else
                       w[first:first + count, r, s])
                place = out[first // width, rank(r, spread, R), rank(s, spread, S) * words:]
                for i in range(group):                    # short strides innermost
                    for word in range((C - i + group - 1) // group):
                        for lane in range(count):
                            place[word, lane, i] = tap[lane, word * group + i]
    return out


@compiled
def sums_of_present_taps(b, spread, K, down, right, number):
    """Σ of the taps of packed weights that meet a pixel, for each kind of rows: (kinds, Q · K).

    down (kinds, R), right (Q, S)  whether a row, a column, meets a tap;  number  of their dtype
    """
    (kinds, R), (Q, S), (blocks, _, words, width, group) = down.shape, right.shape, b.shape
    taps, rows, lanes = np.zeros((R, S, K)), np.empty((S, K)), np.empty(width * group)
    out = np.zeros((kinds, Q * K), number.dtype)
    for block in range(blocks):
        for r in range(R):
            for s in range(S):
                lanes[:] = 0
                first = rank(s, spread, S) * words // S
                for word in range(first, first + words // S):
                    vector = b[block, rank(r, spread, R), word].reshape(-1)
                    for i in range(len(lanes)):
                        lanes[i] += vector[i]
                for i in range(min(width, K - block * width) * group):
                    taps[r, s, block * width + i // group] += lanes[i]
    for kind in range(kinds):
        rows[:] = 0
        for r in range(R):
            if down[kind, r]:
                for s in range(S):
                    for k in range(K):
                        rows[s, k] += taps[r, s, k]
        for q in range(Q):
            row = out[kind, q * K:(q + 1) * K]
            for s in range(S):
                if right[q, s]:
                    for k in range(K):
                        row[k] += rows[s, k]
    return out
