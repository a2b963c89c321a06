"""Compiled: sums over images, batch norm both ways with the ReLU behind it, sums, SGD.

Arrays (N, D) are images of pixels with C channels innermost. Vectors of a channel each come tiled
to a `run` of a few hundred numbers, so that inner loops are long and plain; every sum is float64,
image by image. Float operations are those of kernels/norm.py one by one. Next: mixing.py.
"""
from functools import partial

import numpy as np

from minifqt.kernels.cpu.board import leave, seat, take
from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.codes import normalize_run, row_range
from minifqt.kernels.cpu.noise import TURN
from minifqt.kernels.cpu.tiles import apart, fetch, multiply_add

RUN = 16 * TURN                                           # numbers of a run of vectors: 2 kB each
SUMS = 128                                                # of accumulators
ZERO, ONE = np.float32(0), np.float32(1)


@compiled
def run_of(C):
    """Length of the accumulators for C channels."""
    return max(1, SUMS // C) * C


@compiled
def summarize_run(x, run, s1, s2, low, high):
    """Adds x and its square to s1 and s2 (run,), and widens low .. high, place by place.

    Four runs at a time, or the accumulators' own loads and stores would take most of it.
    """
    apart()
    whole = len(x) // (4 * run) * (4 * run)
    for start in range(0, whole, 4 * run):
        a, b = x[start:start + run], x[start + run:start + 2 * run]
        c, d = x[start + 2 * run:start + 3 * run], x[start + 3 * run:start + 4 * run]
        for i in range(run):
            p, q, r, s = np.float64(a[i]), np.float64(b[i]), np.float64(c[i]), np.float64(d[i])
            s1[i] += (p + q) + (r + s)
            s2[i] += multiply_add(p, p, q * q) + multiply_add(r, r, s * s)
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
    """The places of a run → channels: sums[:, n], ranges[:, n], both (2, N, C), unless empty."""
    if sums.size:
        add_pieces(s1, sums[0, n])
        add_pieces(s2, sums[1, n])
    if ranges.size:
        least, most = ranges[0, n], ranges[1, n]
        least[:], most[:] = low[:C], high[:C]
        for start in range(C, len(low), C):               # no division: it would take longest
            for c in range(C):
                least[c] = min(least[c], low[start + c])
                most[c] = max(most[c], high[start + c])
        if sums.size:
            for c in range(C):                            # NaN escapes comparisons, not sums
                if not np.isfinite(sums[0, n, c]):
                    least[c] = most[c] = np.nan


@compiled
def add_pieces(run, total):
    """total (C,) = Σ of the pieces of a run, in their order."""
    total[:] = run[:len(total)]
    for start in range(len(total), len(run), len(total)):
        for c in range(len(total)):
            total[c] += run[start + c]


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
    leave(counter, me)


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
    leave(counter, me)


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
    leave(counter, me)


@compiled
def pixel_means(counter, x, norm, floor, out):
    """Means over pixels of normalize_run of x (N, D), added one after another: out (N, C)."""
    me = seat(counter)
    if me < 0:
        return
    (N, D), C, run = x.shape, out.shape[1], norm.shape[1]
    y, total = np.empty(run, np.float32), np.empty(C)
    while True:
        n = take(counter)
        if n >= N:
            break
        total[:] = 0
        for start in range(0, D, run):
            stop = min(D, start + run)
            normalize_run(x[n, start:stop], norm, floor, y)
            for left in range(0, stop - start, C):
                pixel = y[left:left + C]
                for c in range(C):
                    total[c] += pixel[c]
        for c in range(C):
            out[n, c] = total[c] / (D // C)
    leave(counter, me)


@partial(compiled, forceinline=True)
def gated(g, x, mean, inv_std, weight, bias, floor):
    """g where weight · x̂ + bias is above floor, else 0; and this · x̂.  Numbers."""
    x_hat = (x - mean) * inv_std
    g = g * (ONE if weight * x_hat + bias > floor else ZERO)
    return g, g * x_hat


@partial(compiled, forceinline=True)                      # its many arguments cost much
def gate_four(p, q, r, s, a, b, c, d, mean, inv_std, weight, bias, floor, s1, s2):
    """gate_rows of four runs p .. s of g, where x is a .. d."""
    apart()
    for i in range(len(s1)):
        g0, h0 = gated(p[i], a[i], mean[i], inv_std[i], weight[i], bias[i], floor)
        g1, h1 = gated(q[i], b[i], mean[i], inv_std[i], weight[i], bias[i], floor)
        g2, h2 = gated(r[i], c[i], mean[i], inv_std[i], weight[i], bias[i], floor)
        g3, h3 = gated(s[i], d[i], mean[i], inv_std[i], weight[i], bias[i], floor)
        p[i], q[i], r[i], s[i] = g0, g1, g2, g3
        s1[i] += (np.float64(g0) + np.float64(g1)) + (np.float64(g2) + np.float64(g3))
        s2[i] += (np.float64(h0) + np.float64(h1)) + (np.float64(h2) + np.float64(h3))


@partial(compiled, forceinline=True)
def gate_rows(g, x, norm, floor, s1, s2):
    """g, if weight · x̂ + bias is not above floor, becomes 0; s1 += g, s2 += g · x̂, place by place.

    g, x  flat, of whole pixels; four runs at a time, as in summarize_run
    """
    mean, inv_std, weight, bias, run = norm[0], norm[1], norm[2], norm[3], len(s1)
    whole = len(x) // (4 * run) * (4 * run)
    for i in range(0, whole, 4 * run):
        j, k, m, n = i + run, i + 2 * run, i + 3 * run, i + 4 * run
        gate_four(g[i:j], g[j:k], g[k:m], g[m:n], x[i:j], x[j:k], x[k:m], x[m:n], mean, inv_std,
                  weight, bias, floor, s1, s2)
    for start in range(whole, len(x), run):
        for i in range(min(run, len(x) - start)):
            g0, h0 = gated(g[start + i], x[start + i], mean[i], inv_std[i], weight[i], bias[i],
                           floor)
            g[start + i] = g0
            s1[i] += g0
            s2[i] += h0


@compiled
def gradient_sums(counter, dy, x, norm, floor, C, g, sums):
    """gate_rows of each image.  dy, x (N, D) → g (N, D), sums (2, N, C).

    dy  may be (N, C), that of all pixels alike
    """
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
        for start in range(0, x.shape[1], dy.shape[1]):
            part = g[n, start:start + dy.shape[1]]
            for i in range(len(part)):
                part[i] = dy[n, i]
        gate_rows(g[n], x[n], norm, floor, s1, s2)
        fold(s1, s2, unused, unused, C, n, sums, nothing)
    leave(counter, me)


@compiled
def slope(g, x, mean, inv_std, mean_g, mean_gx, gain):
    """gain · (g − x̂ · mean_gx − mean_g).  Numbers."""
    return ((g - (x - mean) * inv_std * mean_gx) - mean_g) * gain


@compiled
def gradient(counter, dx, x, norm, slopes, residual, ranges):
    """dx, which holds g, becomes `slope` of it (+ residual); ranges (2, N, 1), its range.

    slopes  (3, run): mean_g, mean_gx, gain;  residual  (N, D) or empty
    In place: an array for dx of its own, or for what is not added yet, costs a fifth more.
    """
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    run = norm.shape[1]
    mean, inv_std = norm[0], norm[1]
    mean_g, mean_gx, gain = slopes[0], slopes[1], slopes[2]
    while True:
        n = take(counter)
        if n >= N:
            break
        low, high, wrong = np.float32(np.inf), np.float32(-np.inf), ZERO
        for start in range(0, D, run):
            stop = min(D, start + run)
            row, out = x[n, start:stop], dx[n, start:stop]
            fetch(x[n, stop + run:stop + 2 * run])
            fetch(dx[n, stop + run:stop + 2 * run])
            if residual.size:
                other = residual[n, start:stop]
                for i in range(len(row)):
                    out[i] = slope(out[i], row[i], mean[i], inv_std[i], mean_g[i], mean_gx[i],
                                   gain[i]) + other[i]
            else:
                for i in range(len(row)):
                    out[i] = slope(out[i], row[i], mean[i], inv_std[i], mean_g[i], mean_gx[i],
                                   gain[i])
            least, most = row_range(out)
            low, high, wrong = min(low, least), max(high, most), wrong + (least - least)
        ranges[0, n, 0], ranges[1, n, 0] = low + wrong, high + wrong          # 0, or NaN
    leave(counter, me)


@compiled
def momentum_step(w, grad, ends, decay, momentum, lr, v, new_w):
    """v ← momentum · v + grad + decay · w, in its place; w ← w − lr · v.  All float32, flat.

    ends, decay  where each parameter ends, and its decay
    """
    start = 0
    for end, rate in zip(ends, decay):  # noqa: B905 - numba has no strict
        old, g, mean, new = w[start:end], grad[start:end], v[start:end], new_w[start:end]
        for i in range(len(g)):
            mean[i] = momentum * mean[i] + g[i] + rate * old[i]
            new[i] = old[i] - lr * mean[i]
        start = end
