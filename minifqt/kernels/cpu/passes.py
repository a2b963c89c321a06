"""The elementwise passes of a step, each one read of its input: sums, normalise, round, mix, add.

Arrays (N, D) are images of pixels with C channels innermost. Vectors of a channel each come tiled to
a `run` of a few hundred numbers, so that inner loops are long and plain; every sum is float64, image
by image. Float operations are those of reference.py and norm.py one by one, each rounded once
(nothing is contracted), so the numbers are the same bits. Next: norm.py and rounding.py, which call.
"""
import numpy as np
from numba import njit

from minifqt.kernels.cpu.team import leave, seat, take
from minifqt.kernels.cpu.tiles import float_of, ordered, rint, steps
from minifqt.rng import INCREMENTS, MULTIPLIERS

RUN = 512                                                 # numbers of a run of vectors: 2 kB each
SUMS = 128                                                # of accumulators
CHUNK = 2048                                              # elements rounded from one buffer of noise
BLOCKS = CHUNK // 16 + 1                                  # of Philox, 16 values each
M0_LOW, M1_LOW = (np.uint64(v & 0xFFFFFFFF) for v in MULTIPLIERS)
M0_HIGH, M1_HIGH = (np.uint64(v >> 32) for v in MULTIPLIERS)
W0, W1 = (np.uint64(v) for v in INCREMENTS)
ZERO, ONE = np.float32(0), np.float32(1)
compiled = njit(nogil=True, cache=True, error_model="numpy")


# ---- noise and rounding --------------------------------------------------------------------------


@compiled
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round on four words, by 32-bit multiplications, which vectorize."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b = c0 & low, c0 >> half
    t = a * M0_HIGH + (a * M0_LOW >> half)
    u = b * M0_LOW + (t & low)
    h0, l0 = b * M0_HIGH + (t >> half) + (u >> half), u << half | (a * M0_LOW & low)
    a, b = c2 & low, c2 >> half
    t = a * M1_HIGH + (a * M1_LOW >> half)
    u = b * M1_LOW + (t & low)
    h1, l1 = b * M1_HIGH + (t >> half) + (u >> half), u << half | (a * M1_LOW & low)
    return h1 ^ c1 ^ k0, l1, h0 ^ c3 ^ k1, l0


@compiled
def philox_blocks(key, step, first, count, state, words):
    """words[:4 · count] = blocks first .. of rng.philox; count ≤ BLOCKS.  state (4, BLOCKS).

    Round by round for all blocks side by side: faster than a core's one 64-bit multiplier.
    """
    k0, k1 = key[0], key[1]
    c0, c1, c2, c3 = state[0], state[1], state[2], state[3]
    for i in range(count):
        c0[i], c1[i], c2[i], c3[i] = first + i + 1, step, 0, 0
    for _ in range(5):                                    # two rounds a turn: half the memory traffic
        for i in range(count):
            d0, d1, d2, d3 = philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1)
            c0[i], c1[i], c2[i], c3[i] = philox_round(d0, d1, d2, d3, k0 + W0, k1 + W1)
        k0 += W0 + W0
        k1 += W1 + W1
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
    me = seat(counter)
    if me < 0:
        return
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
    leave(counter)


@compiled
def round_normalized(counter, x, norm, floor, shift, inv, code, lowest, highest, key, step,
                     constant, out):
    """round_rows of max(normalize_run(x), floor), all rows with the same shift, inv and code."""
    me = seat(counter)
    if me < 0:
        return
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
    leave(counter)


# ---- ranges and sums -----------------------------------------------------------------------------


@compiled
def row_range(row):
    """Minimum and maximum of a row, NaN twice where a number is not finite.

    By integers in the same order: a reduction of floats would not vectorize, for NaN's sake.
    """
    low = high = ordered(row[0])
    for i in range(len(row)):
        key = ordered(row[i])
        low = key if key < low else low
        high = key if key > high else high
    if high >= 0x7F800000 or low <= -0x7F800001:          # an infinity, or NaN beyond it
        return np.float32(np.nan), np.float32(np.nan)
    return float_of(low), float_of(high)


@compiled
def row_ranges(counter, x, low, high):
    """row_range of each row of x (N, D)."""
    me = seat(counter)
    if me < 0:
        return
    while True:
        n = take(counter)
        if n >= len(x):
            break
        low[n], high[n] = row_range(x[n])
    leave(counter)


@compiled
def run_of(C):
    """Length of the accumulators for C channels."""
    return max(1, SUMS // C) * C


@compiled
def summarize_run(x, run, s1, s2, low, high):
    """Adds x and its square to s1 and s2 (run,), and widens low .. high, place by place.

    Four runs at a time, or the accumulators' own loads and stores would take most of it.
    """
    whole = len(x) // (4 * run) * (4 * run)
    for start in range(0, whole, 4 * run):
        a, b = x[start:start + run], x[start + run:start + 2 * run]
        c, d = x[start + 2 * run:start + 3 * run], x[start + 3 * run:start + 4 * run]
        for i in range(run):
            p, q, r, s = np.float64(a[i]), np.float64(b[i]), np.float64(c[i]), np.float64(d[i])
            s1[i] += (p + q) + (r + s)
            s2[i] += (p * p + q * q) + (r * r + s * s)
        for i in range(run):
            one, other = (a[i] if a[i] < b[i] else b[i]), (c[i] if c[i] < d[i] else d[i])
            one = one if one < other else other
            low[i] = one if one < low[i] else low[i]
            one, other = (a[i] if a[i] > b[i] else b[i]), (c[i] if c[i] > d[i] else d[i])
            one = one if one > other else other
            high[i] = one if one > high[i] else high[i]
    for start in range(whole, len(x), run):
        part = x[start:start + run]
        for i in range(len(part)):
            v, d = part[i], np.float64(part[i])
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
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    run = run_of(C)
    s1, s2 = np.empty(run), np.empty(run)
    low, high = np.empty(run, np.float32), np.empty(run, np.float32)
    while True:
        n = take(counter)
        if n >= N:
            break
        s1[:], s2[:], low[:], high[:] = 0, 0, np.inf, -np.inf
        summarize_run(x[n], run, s1, s2, low, high)
        fold(s1, s2, low, high, C, n, sums, ranges)
    leave(counter)


@compiled
def add(counter, a, b, C, out, sums, ranges):
    """out = a + b, and what `summarize` finds in it."""
    me = seat(counter)
    if me < 0:
        return
    N, D = a.shape
    run = run_of(C)
    s1, s2 = np.empty(run), np.empty(run)
    low, high = np.empty(run, np.float32), np.empty(run, np.float32)
    while True:
        n = take(counter)
        if n >= N:
            break
        s1[:], s2[:], low[:], high[:] = 0, 0, np.inf, -np.inf
        for start in range(0, D, 16 * run):
            stop = min(D, start + 16 * run)
            left, right, total = a[n, start:stop], b[n, start:stop], out[n, start:stop]
            for i in range(len(total)):
                total[i] = left[i] + right[i]
            summarize_run(total, run, s1, s2, low, high)
        fold(s1, s2, low, high, C, n, sums, ranges)
    leave(counter)


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
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    while True:
        n = take(counter)
        if n >= N:
            break
        for start in range(0, D, norm.shape[1]):
            stop = min(D, start + norm.shape[1])
            normalize_run(x[n, start:stop], norm, floor, out[n, start:stop])
    leave(counter)


@compiled
def gated(dy, x, mean, inv_std, weight, bias, floor):
    """g = dy where weight · x̂ + bias is above floor, else 0; and g · x̂.  Numbers."""
    normal = (x - mean) * inv_std
    g = dy * (ONE if weight * normal + bias > floor else ZERO)
    return np.float64(g), np.float64(g * normal)


@compiled
def gradient_sums_rows(dy, x, norm, floor, run, s1, s2):
    """s1 += g, s2 += g · x̂, place by place, for flat dy, x of whole pixels; four runs at a time."""
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    whole = len(x) // (4 * run) * (4 * run)
    for start in range(0, whole, 4 * run):
        a, b = x[start:start + run], x[start + run:start + 2 * run]
        c, d = x[start + 2 * run:start + 3 * run], x[start + 3 * run:start + 4 * run]
        p, q = dy[start:start + run], dy[start + run:start + 2 * run]
        r, s = dy[start + 2 * run:start + 3 * run], dy[start + 3 * run:start + 4 * run]
        for i in range(run):
            g0, h0 = gated(p[i], a[i], mean[i], inv_std[i], weight[i], bias[i], floor)
            g1, h1 = gated(q[i], b[i], mean[i], inv_std[i], weight[i], bias[i], floor)
            g2, h2 = gated(r[i], c[i], mean[i], inv_std[i], weight[i], bias[i], floor)
            g3, h3 = gated(s[i], d[i], mean[i], inv_std[i], weight[i], bias[i], floor)
            s1[i] += (g0 + g1) + (g2 + g3)
            s2[i] += (h0 + h1) + (h2 + h3)
    for start in range(whole, len(x), run):
        for i in range(min(run, len(x) - start)):
            g0, h0 = gated(dy[start + i], x[start + i], mean[i], inv_std[i], weight[i], bias[i],
                           floor)
            s1[i] += g0
            s2[i] += h0


@compiled
def gradient_sums(counter, dy, x, norm, floor, C, sums):
    """gradient_sums_rows of each image.  dy, x (N, D) → sums (2, N, C)."""
    me = seat(counter)
    if me < 0:
        return
    run = run_of(C)
    s1, s2, unused = np.empty(run), np.empty(run), np.empty(run, np.float32)
    nothing = np.empty((2, 0, C), np.float32)
    while True:
        n = take(counter)
        if n >= len(x):
            break
        s1[:], s2[:] = 0, 0
        gradient_sums_rows(dy[n], x[n], norm, floor, run, s1, s2)
        fold(s1, s2, unused, unused, C, n, sums, nothing)
    leave(counter)


@compiled
def gradient(counter, dy, x, norm, floor, slopes, residual, dx, ranges):
    """dx = gain · (g − x̂ · mean_gx − mean_g) (+ residual); ranges (2, N, 1), its range.

    slopes  (3, run): mean_g, mean_gx, gain;  residual  (N, D) or empty
    """
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    run = norm.shape[1]
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    mean_g, mean_gx, gain = slopes[0], slopes[1], slopes[2]
    while True:
        n = take(counter)
        if n >= N:
            break
        low, high = np.float32(np.inf), np.float32(-np.inf)
        for start in range(0, D, run):
            stop = min(D, start + run)
            upstream, row, out = dy[n, start:stop], x[n, start:stop], dx[n, start:stop]
            for i in range(len(row)):
                normal = (row[i] - mean[i]) * inv_std[i]
                g = upstream[i] * (ONE if weight[i] * normal + bias[i] > floor else ZERO)
                out[i] = ((g - normal * mean_gx[i]) - mean_g[i]) * gain[i]
            if residual.size:
                other = residual[n, start:stop]
                for i in range(len(row)):
                    out[i] += other[i]
            least, most = row_range(out)
            low = least if not least >= low else low      # NaN stays
            high = most if not most <= high else high
        ranges[0, n, 0], ranges[1, n, 0] = low, high
    leave(counter)


# ---- block Householder ---------------------------------------------------------------------------


@compiled
def group_sum(y, root, gain, total):
    """total = (y₁ − Σy · root) · gain for the rows y (n, D) of a group, float64, row by row."""
    for i in range(len(total)):
        total[i] = y[0, i]
    for j in range(1, len(y)):
        row = y[j]
        for i in range(len(total)):
            total[i] += row[i]
    lead = y[0]
    for i in range(len(total)):
        total[i] = (lead[i] - total[i] * root) * gain


@compiled
def reflect_row(row, v, total, factor, out):
    """out = (row − v · total) · factor."""
    for i in range(len(out)):
        out[i] = (row[i] - v * total[i]) * factor


@compiled
def reflect(counter, scratch, x, source, before, starts, root, gain, v, target, after, out, ranges):
    """out[target[j]] = reflect_row of y_j = x[source[j]] · before_j, in groups between `starts`.

    scratch  (threads, rows of the largest group + 1, columns of a block) float64
    ranges   (2, blocks, N) of what was written; empty if nobody asks
    """
    me = seat(counter)
    if me < 0:
        return
    (_, D), columns = x.shape, scratch.shape[2]
    blocks, y, total = (D + columns - 1) // columns, scratch[me, 1:], scratch[me, 0]
    while True:
        block = take(counter)
        if block >= blocks:
            break
        left, right = block * columns, min(D, block * columns + columns)
        for group in range(len(starts) - 1):
            first, last = starts[group], starts[group + 1]
            for j in range(first, last):
                row, scaled, factor = x[source[j], left:right], y[j - first], before[j]
                for i in range(len(row)):
                    scaled[i] = row[i] * factor
            group_sum(y[:last - first], root[group], gain[group], total[:right - left])
            for j in range(first, last):
                result = out[target[j], left:right]
                reflect_row(y[j - first], v[j], total, after[j], result)
                if ranges.size:
                    ranges[0, block, target[j]], ranges[1, block, target[j]] = row_range(result)
    leave(counter)
