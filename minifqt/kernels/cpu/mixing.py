"""The row transform of BHQ, compiled: reflections of groups of rows by group sums, in cache."""
import math
from functools import partial

import numpy as np

from minifqt.kernels.cpu.board import leave, seat, take
from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.codes import NOTHING_YET, range_of, round_beside, round_run, widen
from minifqt.kernels.cpu.noise import BLOCKS, TURN, noise_of
from minifqt.kernels.cpu.scales import grid_row
from minifqt.kernels.cpu.tiles import apart, fetch
from minifqt.kernels.reference import UNIT

CHUNK = 16 * 2 * TURN                                     # columns of a group at a time, in cache


@compiled
def factor(before, j):
    """before[j], or 1 where there is None."""
    if before is None:
        return 1.0
    return before[j]


@compiled
def group_sum(x, source, before, left, right, root, total):
    """total = (y₁ − Σy · root) · gain over y_j = x[source[j], left:right] · before[j], float64.

    before  None: of ones;  root  1/√n;  gain = 1 / (1 − root)
    """
    apart()
    n, lead, scale = len(source), x[source[0], left:right], factor(before, 0)
    gain = 1 / (1 - root) if n > 1 else 1.0
    if n == 2 or n == 3:                                  # most groups: the same in one loop
        one, other, p, q = (x[source[1], left:right], x[source[n - 1], left:right],
                            factor(before, 1), factor(before, n - 1))
        if n == 2:
            for i in range(len(total)):
                y = lead[i] * scale
                total[i] = (y - (y + one[i] * p) * root) * gain
        else:
            for i in range(len(total)):
                y = lead[i] * scale
                total[i] = (y - ((y + one[i] * p) + other[i] * q) * root) * gain
        return
    for i in range(len(total)):
        total[i] = lead[i] * scale
    for j in range(1, n - 1, 2):                          # in order, two rows a turn
        one, other = x[source[j], left:right], x[source[j + 1], left:right]
        p, q = factor(before, j), factor(before, j + 1)
        for i in range(len(total)):
            total[i] = (total[i] + one[i] * p) + other[i] * q
    if n % 2 == 0:
        one, p = x[source[n - 1], left:right], factor(before, n - 1)
        for i in range(len(total)):
            total[i] += one[i] * p
    for i in range(len(total)):
        total[i] = (lead[i] * scale - total[i] * root) * gain


@partial(compiled, forceinline=True)
def reflect_row(row, before, v, total, after, out):
    """out = (row · before − v · total) · after."""
    apart()
    for i in range(len(out)):
        out[i] = (row[i] * before - v * total[i]) * after


@compiled
def reflect(counter, x, source, before, starts, target, after, parts, out, ranges):
    """out[target[j]] = reflect_row of x[source[j]], in groups of rows between `starts`.

    x, out (N, D);  parts  into which columns are cut, for the threads to share
    ranges  (2, N, parts) of out
    """
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    low, high, totals = np.empty(N, np.int32), np.empty(N, np.int32), np.empty(CHUNK)
    while True:
        task = take(counter)
        if task >= (len(starts) - 1) * parts:
            break
        group, part = task // parts, task % parts
        first, last = starts[group], starts[group + 1]
        root = 1 / math.sqrt(last - first)
        low[first:last], high[first:last] = NOTHING_YET
        stop = (part + 1) * D // parts
        for left in range(part * D // parts, stop, CHUNK):
            right = min(stop, left + CHUNK)
            total = totals[:right - left]
            group_sum(x, source[first:last], before[first:last], left, right, root, total)
            for j in range(first, last):
                y = out[target[j], left:right]
                reflect_row(x[source[j], left:right], before[j], (j == first) - root, total,
                            after[j], y)
                low[j], high[j] = widen(y, low[j], high[j])
        for j in range(first, last):
            r = target[j]
            ranges[0, r, part], ranges[1, r, part] = range_of(low[j], high[j])
    leave(counter, me)


@compiled
def reflect_and_round(counter, x, beside, source, before, starts, largest, bins, exponent, key,
                      step, constant, grids, codes):
    """Codes (N, D) of the mixed rows, each on the grid of its own range: a group stays in cache.

    largest  rows of a group, at most
    beside  another rounding, of x itself (codes.round_beside)
    exponent, grids  (N,), (3, N) as in scales.grid; a row that must be rescaled gets no codes
    """
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    low, high, totals = np.empty(N, np.int32), np.empty(N, np.int32), np.empty(CHUNK)
    rows, words = np.empty((largest, D), np.float32), np.empty(4 * BLOCKS, np.uint64)
    top, nothing = np.float32(UNIT * bins), np.float32(0)
    while True:
        group = take(counter)
        if group >= len(starts) - 1:
            break
        first, last = starts[group], starts[group + 1]
        root = 1 / math.sqrt(last - first)
        low[first:last], high[first:last] = NOTHING_YET
        for left in range(0, D, CHUNK):
            right = min(D, left + CHUNK)
            total = totals[:right - left]
            group_sum(x, source[first:last], before[first:last], left, right, root, total)
            for j in range(first, last):
                row, y = x[source[j], left:right], rows[j - first, left:right]
                fetch(x[source[j], right:right + CHUNK])
                round_beside(row, source[j] * D + left, beside, words)
                reflect_row(row, before[j], (j == first) - root, total, 1.0, y)
                low[j], high[j] = widen(y, low[j], high[j])
        for j in range(first, last):
            least, most = range_of(low[j], high[j])
            inv, scale, zero = grid_row(least, most, bins, exponent[j])
            grids[0, j], grids[1, j], grids[2, j] = inv, scale, zero
            for left in range(0, D if scale > 0 else 0, CHUNK):
                right = min(D, left + CHUNK)
                noise = noise_of(key, step, j * D + left, right - left, constant, words)
                round_run(rows[j - first, left:right], noise, least, inv, nothing, nothing, top,
                          codes[j, left:right])
    leave(counter, me)
