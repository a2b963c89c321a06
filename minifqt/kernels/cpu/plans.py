"""Small arithmetic between kernels, compiled: in NumPy it is a hundred short calls a layer.

What is computed, and why, is said elsewhere, and tests compare the bits: `grid` in
quantizers/affine.py, `symmetric` as Symmetric in quantizers/ptq.py, `joined` in
kernels/rounding.py, `epilogue` in kernels/reference.py; the ranges of a batch norm are those of its
formed array. BHQ's own: householder.py.
"""
import math

import numpy as np

from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.codes import row_range
from minifqt.kernels.reference import UNIT

SMALLEST, TINY, NARROW, LARGE = (np.float32(2.0**e) for e in (-149, -76, -100, 119))   # affine.py
ZERO = np.float32(0)


@compiled
def odd(low, high):
    """Whether a row must be rescaled (affine.rescaled)."""
    largest = max(-low, high)
    return largest > LARGE or (high - low < NARROW and 0 < largest < TINY)


@compiled
def grid_row(least, most, bins, exponent):
    """inv, scale and zero of a row; scale 0 where it must be rescaled."""
    if odd(least, most):
        return ZERO, ZERO, ZERO
    width = most - least
    flat = width == 0
    scale = (np.float32(1) if least == 0 else abs(least)) if flat else width / np.float32(bins)
    scale = np.float32(max(math.ldexp(scale, exponent), SMALLEST))
    inv = ZERO if flat else np.float32(UNIT * bins) / width
    return inv, scale, np.float32(-least / math.ldexp(scale, -exponent))


@compiled
def grid(low, high, bins, exponent, out):
    """inv, scale and zero of rows (N, 1) into out (3, N, 1); False where a row must be rescaled.

    exponent  (N, 1), or (1, 1) for all rows
    """
    for i in range(len(low)):
        e = exponent[min(i, len(exponent) - 1), 0]
        inv, scale, zero = grid_row(low[i, 0], high[i, 0], bins, e)
        if scale == 0:
            return False
        out[0, i, 0], out[1, i, 0], out[2, i, 0] = inv, scale, zero
    return True


@compiled
def normalized_ranges(ranges, mean, inv_std, weight, bias, floor, out):
    """Ranges (2, N, C) of x → those of what batch norm and ReLU make of it."""
    _, N, C = ranges.shape
    for n in range(N):
        for c in range(C):
            one = weight[c] * ((ranges[0, n, c] - mean[c]) * inv_std[c]) + bias[c]
            two = weight[c] * ((ranges[1, n, c] - mean[c]) * inv_std[c]) + bias[c]
            low, high = (one, two) if one < two else (two, one)
            out[0, n, c] = floor if low < floor else low  # NaN stays
            out[1, n, c] = floor if high < floor else high


@compiled
def finish_wgrad(total, x1, g1, tasks, N, flip_g, flip_x, present, ends, out):
    """out (K, R, S, C) = reference.epilogue of the integer sums of those threads that had tasks.

    total .. g1  as in wgrad.wgrad_images, of codes moved by the flips; tasks (threads,)
    present      the first pixel that meets a tap, and the last + 1, of N images: (R, 2), (S, 2)
    ends         zeros of g and x, scales of g and x, float64, one or one a channel
    """
    (K, R, S, C), moved_g, moved_x = out.shape, np.int64(flip_g), -np.int64(flip_x)
    zero_g, zero_x, scale_g, scale_x = np.empty(K), np.empty(C), np.empty(K), np.empty(C)
    for each, one in zip((zero_g, zero_x, scale_g, scale_x), ends):  # noqa: B905 - numba has no strict
        for i in range(len(each)):
            each[i] = one[i if len(one) > 1 else 0]
    both, gs, row = np.empty(K, np.int64), np.empty(K, np.int64), np.empty(K, np.float32)
    for r in range(R):
        for s in range(S):
            (top, bottom), (left, right) = present[0][r], present[1][s]
            pixels = N * (bottom - top) * (right - left)
            gs[:] = -128 * pixels if len(g1) else 0
            for t in range(len(g1)):
                for p in range(top, bottom if tasks[t] else top):
                    for q in range(left, right):
                        for k in range(K):
                            gs[k] += g1[t, p, q, k]
            for c in range(C):
                xs, both[:] = np.int64(0), 0
                for t in range(len(total)):
                    if tasks[t]:
                        xs += x1[t, r, s, c]
                        part = total[t, r, s, c]
                        for k in range(K):
                            both[k] += part[k]
                centred = moved_g * xs + moved_g * moved_x * pixels
                b1, zero, scale = np.float64(xs + moved_x * pixels), zero_x[c], scale_x[c]
                for k in range(K):
                    y = np.float64(both[k] + (centred + moved_x * gs[k])) - zero_g[k] * b1
                    y = y - zero * np.float64(gs[k] + moved_g * pixels)
                    row[k] = (y + (zero_g[k] * zero) * np.float64(pixels)) * (scale_g[k] * scale)
                for k in range(K):
                    out[k, r, s, c] = row[k]


@compiled
def moments(sums, count, mean, var):
    """Mean and variance (C,) from Σ x and Σ x² in parts (2, parts, C), of so many numbers each."""
    for c in range(sums.shape[2]):
        s1, s2 = 0.0, 0.0
        for n in range(sums.shape[1]):
            s1, s2 = s1 + sums[0, n, c], s2 + sums[1, n, c]
        exact = s2 / count - (s1 / count) * (s1 / count)
        mean[c], var[c] = s1 / count, 0 if exact < 0 else exact               # NaN stays


@compiled
def slopes(sums, count, inv_std, weight, totals, runs):
    """Σ g and Σ g · x̂ in parts (2, parts, C) → totals (2, C), and their means and the gain as runs.

    runs (3, run), as norms.gradient takes them
    """
    C = sums.shape[2]
    for c in range(C):
        s1, s2 = 0.0, 0.0
        for n in range(sums.shape[1]):
            s1, s2 = s1 + sums[0, n, c], s2 + sums[1, n, c]
        totals[0, c], totals[1, c] = s1, s2
        gain = weight[c] * inv_std[c]
        for i in range(c, runs.shape[1], C):
            runs[0, i], runs[1, i], runs[2, i] = s1 / count, s2 / count, gain


@compiled
def momentum_step(w, grad, v, momentum, decay, lr, new_v, new_w):
    """v ← momentum · v + grad + decay · w; w ← w − lr · v.  Flat arrays, numbers float32."""
    for i in range(len(w)):
        new_v[i] = momentum * v[i] + grad[i] + decay * w[i]
        new_w[i] = w[i] - lr * new_v[i]


@compiled
def joined(parts, out):
    """Ranges of rows' parts (2, N, parts) → those of the rows, out (2, N, 1); whether finite."""
    finite = True
    for n in range(parts.shape[1]):
        low, _ = row_range(parts[0, n])
        _, high = row_range(parts[1, n])
        out[0, n, 0], out[1, n, 0] = low, high
        finite = finite and math.isfinite(low) and math.isfinite(high)
    return finite


@compiled
def symmetric(low, high, top, out):
    """shift, inv, code, scale and zero of `sym`, out (5, 1, 1); False where x must be rescaled."""
    least, most = low[0, 0], high[0, 0]
    if odd(least, most):
        return False
    largest = max(-least, most)
    scale = np.float32(1) if largest == 0 else largest / np.float32(top)
    out[:] = 0
    out[1, 0, 0], out[3, 0, 0] = np.float32(UNIT) / scale, max(scale, SMALLEST)
    return True
