"""The elementwise passes of a step, each one read of its input: sums, normalise, round, mix, add.

Arrays (N, D) are images of pixels with C channels innermost. Vectors of a channel each come tiled to
a `run` of a few hundred numbers, so that inner loops are long and plain; every sum is float64, image
by image. Float operations are those of reference.py and norm.py one by one, each rounded once
(nothing is contracted), so the numbers are the same bits. Next: norm.py and rounding.py, which call.
"""
import numpy as np
from numba import njit

from minifqt.kernels.cpu.tiles import rint, steps, take
from minifqt.rng import INCREMENTS, MULTIPLIERS

RUN = 512                                                 # numbers of a run: 2 kB each vector
CHUNK = 2048                                              # elements rounded from one buffer of noise
BLOCKS = CHUNK // 16 + 1                                  # of Philox, 16 values each
M0_LOW, M1_LOW = (np.uint64(v & 0xFFFFFFFF) for v in MULTIPLIERS)
M0_HIGH, M1_HIGH = (np.uint64(v >> 32) for v in MULTIPLIERS)
W0, W1 = (np.uint64(v) for v in INCREMENTS)
compiled = njit(nogil=True, cache=True, error_model="numpy")


# ---- noise and rounding --------------------------------------------------------------------------


@compiled
def philox_blocks(key, step, first, count, state, words):
    """words[:4 · count] = blocks first .. of rng.philox; count ≤ BLOCKS.  state (4, BLOCKS).

    Round by round for all blocks side by side, with 32-bit multiplications, which vectorize: twice
    as fast as the one 64-bit multiplier of a core.
    """
    k0, k1, low, half = key[0], key[1], np.uint64(0xFFFFFFFF), np.uint64(32)
    c0, c1, c2, c3 = state[0], state[1], state[2], state[3]
    for i in range(count):
        c0[i], c1[i], c2[i], c3[i] = first + i + 1, step, 0, 0
    for _ in range(10):
        for i in range(count):
            a, b = c0[i] & low, c0[i] >> half
            t = a * M0_HIGH + (a * M0_LOW >> half)
            u = b * M0_LOW + (t & low)
            h0, l0 = b * M0_HIGH + (t >> half) + (u >> half), u << half | (a * M0_LOW & low)
            a, b = c2[i] & low, c2[i] >> half
            t = a * M1_HIGH + (a * M1_LOW >> half)
            u = b * M1_LOW + (t & low)
            h1, l1 = b * M1_HIGH + (t >> half) + (u >> half), u << half | (a * M1_LOW & low)
            c0[i], c1[i], c2[i], c3[i] = h1 ^ c1[i] ^ k0, l1, h0 ^ c3[i] ^ k1, l0
        k0 += W0
        k1 += W1
    for i in range(count):
        words[4 * i], words[4 * i + 1], words[4 * i + 2], words[4 * i + 3] = c0[i], c1[i], c2[i], c3[i]


@compiled
def noise_of(key, step, first, count, constant, state, words):
    """The 16-bit noise of elements first .. first + count − 1, in a buffer; constant −1: random."""
    noise = words.view(np.uint16)
    if constant >= 0:
        noise[:] = constant
        return noise[:count]
    skip = first % 16
    philox_blocks(key, step, first // 16, (skip + count + 15) // 16, state, words)
    return noise[skip:skip + count]


@compiled
def round_run(x, noise, shift, inv, code, lowest, highest, out):
    """(clip(rint((x − shift) · inv) + code, lowest, highest) + noise) >> 16, in fixed point."""
    for i in range(len(x)):
        fixed = rint((x[i] - shift) * inv) + code
        fixed = lowest if fixed < lowest else fixed
        fixed = highest if fixed > highest else fixed
        out[i] = steps(fixed, noise[i])


@compiled
def round_rows(counter, x, shift, inv, code, lowest, highest, key, step, constant, out):
    """Codes of x (N, D) with one shift, inv and code a row; noise of flat elements."""
    N, D = x.shape
    parts = (D + CHUNK - 1) // CHUNK
    state, words = np.empty((4, BLOCKS), np.uint64), np.empty(4 * BLOCKS, np.uint64)
    while True:
        task = take(counter)
        if task >= N * parts:
            break
        n, start = task // parts, task % parts * CHUNK
        stop = min(D, start + CHUNK)
        noise = noise_of(key, step, n * D + start, stop - start, constant, state, words)
        round_run(x[n, start:stop], noise, shift[n], inv[n], code[n], lowest, highest,
                  out[n, start:stop])


@compiled
def round_normalized(counter, x, norm, floor, shift, inv, code, lowest, highest, key, step,
                     constant, out):
    """round_rows of max(normalize_run(x), floor), all rows with the same shift, inv and code."""
    N, D = x.shape
    run = norm.shape[1]
    y, state = np.empty(run, np.float32), np.empty((4, BLOCKS), np.uint64)
    words = np.empty(4 * BLOCKS, np.uint64)
    while True:
        n = take(counter)
        if n >= N:
            break
        for start in range(0, D, run):
            stop = min(D, start + run)
            normalize_run(x[n, start:stop], norm, floor, y)
            noise = noise_of(key, step, n * D + start, stop - start, constant, state, words)
            round_run(y[:stop - start], noise, shift, inv, code, lowest, highest,
                      out[n, start:stop])


# ---- ranges and sums -----------------------------------------------------------------------------


@compiled
def row_range(row, lanes):
    """Minimum and maximum of a row, NaN where a number is not finite.  lanes (3, 64), scratch."""
    least, most, bad = lanes[0], lanes[1], lanes[2]
    least[:], most[:], bad[:] = row[0], row[0], 0
    whole = len(row) // 64 * 64
    for start in range(0, whole, 64):
        part = row[start:start + 64]
        for i in range(64):
            v = part[i]
            least[i] = v if v < least[i] else least[i]
            most[i] = v if v > most[i] else most[i]
            bad[i] += v - v
    for i in range(whole, len(row)):
        least[0], most[0] = min(least[0], row[i]), max(most[0], row[i])
        bad[0] += row[i] - row[i]
    wrong = bad.sum()                                     # 0, or NaN
    return least.min() + wrong, most.max() + wrong


@compiled
def row_ranges(counter, x, low, high):
    """row_range of each row of x (N, D)."""
    lanes = np.empty((3, 64), np.float32)
    while True:
        n = take(counter)
        if n >= len(x):
            break
        low[n], high[n] = row_range(x[n], lanes)


@compiled
def summarize_run(x, s1, s2, low, high):
    """Adds x and its square to s1 and s2, and widens low .. high, place by place."""
    for i in range(len(x)):
        v = x[i]
        d = np.float64(v)
        s1[i] += d
        s2[i] += d * d
        low[i] = v if v < low[i] else low[i]
        high[i] = v if v > high[i] else high[i]


@compiled
def fold(s1, s2, low, high, C, n, sums, ranges):
    """The places of a run → channels: sums[:, n] (2, N, C), ranges[:, n] (2, N, C), unless empty."""
    if sums.size:
        for c in range(C):
            sums[0, n, c], sums[1, n, c] = s1[c], s2[c]
        for i in range(C, len(s1)):
            sums[0, n, i % C] += s1[i]
            sums[1, n, i % C] += s2[i]
    if ranges.size:
        for c in range(C):
            ranges[0, n, c], ranges[1, n, c] = low[c], high[c]
        for i in range(C, len(low)):
            ranges[0, n, i % C] = min(ranges[0, n, i % C], low[i])
            ranges[1, n, i % C] = max(ranges[1, n, i % C], high[i])


@compiled
def summarize(counter, x, C, sums, ranges):
    """Σ x, Σ x² and range of each image and channel.  x (N, D)."""
    N, D = x.shape
    run = max(1, RUN // C) * C
    s1, s2 = np.empty(run), np.empty(run)
    low, high = np.empty(run, np.float32), np.empty(run, np.float32)
    while True:
        n = take(counter)
        if n >= N:
            break
        s1[:], s2[:], low[:], high[:] = 0, 0, np.inf, -np.inf
        for start in range(0, D, run):
            summarize_run(x[n, start:min(D, start + run)], s1, s2, low, high)
        fold(s1, s2, low, high, C, n, sums, ranges)


@compiled
def add(counter, a, b, C, out, sums, ranges):
    """out = a + b, and what `summarize` finds in it."""
    N, D = a.shape
    run = max(1, RUN // C) * C
    s1, s2 = np.empty(run), np.empty(run)
    low, high = np.empty(run, np.float32), np.empty(run, np.float32)
    while True:
        n = take(counter)
        if n >= N:
            break
        s1[:], s2[:], low[:], high[:] = 0, 0, np.inf, -np.inf
        for start in range(0, D, run):
            stop = min(D, start + run)
            left, right, total = a[n, start:stop], b[n, start:stop], out[n, start:stop]
            for i in range(len(total)):
                total[i] = left[i] + right[i]
            summarize_run(total, s1, s2, low, high)
        fold(s1, s2, low, high, C, n, sums, ranges)


# ---- batch normalisation, with ReLU --------------------------------------------------------------


@compiled
def normalize_run(x, norm, floor, out):
    """max(weight · ((x − mean) · inv_std) + bias, floor).  norm (4, run): mean, inv_std, weight, bias."""
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    for i in range(len(x)):
        y = weight[i] * ((x[i] - mean[i]) * inv_std[i]) + bias[i]
        out[i] = y if y > floor else floor


@compiled
def normalize(counter, x, norm, floor, out):
    """normalize_run of x (N, D) → out (N, D)."""
    N, D = x.shape
    while True:
        n = take(counter)
        if n >= N:
            break
        for start in range(0, D, norm.shape[1]):
            stop = min(D, start + norm.shape[1])
            normalize_run(x[n, start:stop], norm, floor, out[n, start:stop])


@compiled
def gradient_sums_run(dy, x, norm, floor, s1, s2):
    """s1 += g, s2 += g · x̂, place by place; g = dy where the output was above floor, else 0."""
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    for i in range(len(x)):
        normal = (x[i] - mean[i]) * inv_std[i]
        g = dy[i] * np.float32(weight[i] * normal + bias[i] > floor)
        s1[i] += np.float64(g)
        s2[i] += np.float64(g * normal)


@compiled
def gradient_sums(counter, dy, x, norm, floor, C, sums):
    """gradient_sums_run of each image and channel.  dy, x (N, D) → sums (2, N, C)."""
    N, D = x.shape
    run = norm.shape[1]
    s1, s2, unused = np.empty(run), np.empty(run), np.zeros(run, np.float32)
    while True:
        n = take(counter)
        if n >= N:
            break
        s1[:], s2[:] = 0, 0
        for start in range(0, D, run):
            stop = min(D, start + run)
            gradient_sums_run(dy[n, start:stop], x[n, start:stop], norm, floor, s1, s2)
        fold(s1, s2, unused, unused, C, n, sums, np.empty((2, 0, C), np.float32))


@compiled
def gradient(counter, dy, x, norm, floor, slopes, C, residual, dx, ranges):
    """dx = gain · (g − x̂ · mean_gx − mean_g) (+ residual), and its range.

    slopes  (3, run): mean_g, mean_gx, gain;  residual  (N, D) or empty
    """
    N, D = x.shape
    run = norm.shape[1]
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    mean_g, mean_gx, gain = slopes[0], slopes[1], slopes[2]
    low, high, unused = np.empty(run, np.float32), np.empty(run, np.float32), np.zeros(run)
    while True:
        n = take(counter)
        if n >= N:
            break
        low[:], high[:] = np.inf, -np.inf
        for start in range(0, D, run):
            stop = min(D, start + run)
            upstream, row, out = dy[n, start:stop], x[n, start:stop], dx[n, start:stop]
            for i in range(len(row)):
                normal = (row[i] - mean[i]) * inv_std[i]
                passes = np.float32(weight[i] * normal + bias[i] > floor)
                out[i] = ((upstream[i] * passes - normal * mean_gx[i]) - mean_g[i]) * gain[i]
            if residual.size:
                other = residual[n, start:stop]
                for i in range(len(row)):
                    out[i] += other[i]
            for i in range(len(row)):
                v = out[i]
                low[i] = v if v < low[i] else low[i]
                high[i] = v if v > high[i] else high[i]
        fold(unused, unused, low, high, C, n, np.empty((2, 0, C)), ranges)


# ---- block Householder ---------------------------------------------------------------------------


@compiled
def reflect_rows(y, root, gain, v, after, total):
    """y_j ← (y_j − v_j · c) · after_j for the rows of one group, c = (y₁ − Σy · root) · gain.

    y (n, D) float32; float64 inside, sums row by row; total (D,) is scratch
    """
    for i in range(len(total)):
        total[i] = y[0, i]
    for j in range(1, len(y)):
        row = y[j]
        for i in range(len(total)):
            total[i] += row[i]
    lead = y[0]
    for i in range(len(total)):
        total[i] = (lead[i] - total[i] * root) * gain
    for j in range(len(y)):
        row, w, factor = y[j], v[j], after[j]
        for i in range(len(total)):
            row[i] = (row[i] - w * total[i]) * factor


@compiled
def scale_one(row, factor):
    """A group of one row: nothing to reflect."""
    for i in range(len(row)):
        row[i] = row[i] * factor


@compiled
def reflect(counter, x, source, before, starts, root, gain, v, target, after, out, columns, ranges):
    """out[target[j]] = reflect_rows of y_j = x[source[j]] · before_j, in groups between `starts`.

    y is float64 here.  ranges  (2, blocks of columns, N) of what was written; empty if nobody asks
    """
    N, D = x.shape
    blocks, largest = (D + columns - 1) // columns, 1
    for group in range(len(starts) - 1):
        largest = max(largest, starts[group + 1] - starts[group])
    y, total = np.empty((largest, columns)), np.empty(columns)
    lanes = np.empty((3, 64), np.float32)
    while True:
        block = take(counter)
        if block >= blocks:
            break
        left, right = block * columns, min(D, block * columns + columns)
        for group in range(len(starts) - 1):
            first, last = starts[group], starts[group + 1]
            total[:] = 0
            for j in range(first, last):
                row, scaled, factor = x[source[j], left:right], y[j - first], before[j]
                for i in range(len(row)):
                    scaled[i] = row[i] * factor
                    total[i] += scaled[i]
            lead = y[0]
            for i in range(right - left):
                total[i] = (lead[i] - total[i] * root[group]) * gain[group]
            for j in range(first, last):
                result, scaled, w, factor = out[target[j], left:right], y[j - first], v[j], after[j]
                for i in range(len(result)):
                    result[i] = (scaled[i] - w * total[i]) * factor
                if ranges.size:
                    ranges[0, block, target[j]], ranges[1, block, target[j]] = row_range(
                        result, lanes)
