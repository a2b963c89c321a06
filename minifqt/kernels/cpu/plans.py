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
def for_each(one, count):
    """A number, or one a channel, in float64 for each of so many channels."""
    out = np.empty(count)
    for i in range(count):
        out[i] = one[i % len(one)]
    return out


@compiled
def finish_wgrad(total, x1, g1, tasks, N, flip_g, flip_x, present, ends, out):
    """out (K, R, S, C) = reference.epilogue of the integer sums of those threads that had tasks.

    total .. g1  as in wgrad.wgrad_images, of codes moved by the flips; tasks (threads,)
    present      the first pixel that meets a tap, and the last + 1, of N images: (R, 2), (S, 2)
    ends         zeros of g and x, scales of g and x, one or one a channel
    """
    (K, R, S, C), moved_g, moved_x = out.shape, np.int64(flip_g), -np.int64(flip_x)
    zero_g, zero_x = for_each(ends[0], K), for_each(ends[1], C)
    scale_g, scale_x = for_each(ends[2], K), for_each(ends[3], C)
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
