"""The row transform of BHQ, compiled: reflections of groups of rows by group sums, in cache."""
import numpy as np

from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.codes import NOTHING_YET, range_of, round_beside, round_run, widen
from minifqt.kernels.cpu.noise import BLOCKS, TURN, noise_of
from minifqt.kernels.cpu.team import leave, seat, take

CHUNK = 16 * 4 * TURN                                     # columns of a group at a time, in cache
# out, ranges and rounding of `reflect` where nobody asks for them
NOTHING = (np.empty((0, 0), np.float32), np.empty((2, 0, 1), np.float32),
           (*np.empty((3, 0), np.float32), np.float32(0), np.float32(0),
            np.frombuffer(bytes(16), np.uint64), 0, -1, np.empty((0, 0), np.uint8)))


@compiled
def group_sum(x, source, before, left, right, root, gain, total):
    """total = (y₁ − Σy · root) · gain over y_j = x[source[j], left:right] · before[j], float64."""
    n, lead, scale = len(source), x[source[0], left:right], before[0]
    if n == 2 or n == 3:                                  # most groups: the same in one loop
        one, other, p, q = (x[source[1], left:right], x[source[n - 1], left:right], before[1],
                            before[n - 1])
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
        p, q = before[j], before[j + 1]
        for i in range(len(total)):
            total[i] = (total[i] + one[i] * p) + other[i] * q
    if n % 2 == 0:
        one, p = x[source[n - 1], left:right], before[n - 1]
        for i in range(len(total)):
            total[i] += one[i] * p
    for i in range(len(total)):
        total[i] = (lead[i] * scale - total[i] * root) * gain


@compiled
def reflect_row(row, before, v, total, after, out):
    """out = (row · before − v · total) · after."""
    for i in range(len(out)):
        out[i] = (row[i] * before - v * total[i]) * after


@compiled
def reflect(counter, totals, x, beside, source, before, starts, root, gain, v, target, after, parts,
            out, ranges, shift, inv, code, lowest, highest, key, step, constant, codes):
    """y[target[j]] = reflect_row of x[source[j]], in groups of rows between `starts`.

    totals  (threads, CHUNK) float64, scratch
    parts   into which columns are cut, for the threads to share
    What is asked for, the rest being empty: out, y itself (N, D); ranges (2, N, parts) of y; codes
    (N, D) of y, as codes.round_rows takes shift .. constant. Nobody else sees y outside the cache.
    beside  another rounding, of x itself (codes.round_beside)
    """
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    low, high = np.empty(N, np.int32), np.empty(N, np.int32)
    y, state = np.empty(CHUNK, np.float32), np.empty((4, BLOCKS), np.uint64)
    words = np.empty(4 * BLOCKS, np.uint64)
    while True:
        task = take(counter)
        if task >= (len(starts) - 1) * parts:
            break
        group, part = task // parts, task % parts
        first, last = starts[group], starts[group + 1]
        low[:], high[:] = NOTHING_YET
        stop = (part + 1) * D // parts
        for left in range(part * D // parts, stop, CHUNK):
            right = min(stop, left + CHUNK)
            total = totals[me, :right - left]
            group_sum(x, source[first:last], before[first:last], left, right, root[group],
                      gain[group], total)
            for j in range(first, last):
                r = target[j]
                result = out[r, left:right] if out.size else y[:right - left]
                row = x[source[j], left:right]
                round_beside(row, source[j] * D + left, beside, state, words)
                reflect_row(row, before[j], v[j], total, after[j], result)
                if ranges.size:
                    low[j], high[j] = widen(result, low[j], high[j])
                if codes.size:
                    noise = noise_of(key, step, r * D + left, right - left, constant, state, words)
                    round_run(result, noise, shift[r], inv[r], code[r], lowest, highest,
                              codes[r, left:right])
        if ranges.size:
            for j in range(first, last):
                r = target[j]
                ranges[0, r, part], ranges[1, r, part] = range_of(low[j], high[j])
    leave(counter)
