"""Ranges of rows, and the grids that they are rounded on, compiled: small arithmetic in few calls.

What is computed, and why, is said elsewhere, and tests compare the bits: `joined` in
kernels/rounding.py, `grid` in quantizers/affine.py, Symmetric in quantizers/ptq.py; the ranges of a
batch norm are those of its formed array.
"""
import math

import numpy as np

from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.codes import NOTHING_YET, round_run, row_range
from minifqt.kernels.cpu.noise import BLOCKS, CHUNK, noise_of
from minifqt.kernels.cpu.tiles import float_of, ordered
from minifqt.kernels.reference import UNIT

SMALLEST, TINY, NARROW, LARGE = (np.float32(2.0**e) for e in (-149, -76, -100, 119))   # affine.py
ZERO = np.float32(0)


@compiled
def part_range(parts, n):
    """row_range of row n of which the ranges of its parts (2, N, parts) are known."""
    return row_range(parts[0, n])[0], row_range(parts[1, n])[1]


@compiled
def joined(parts, out):
    """Ranges of rows' parts (2, N, parts) → those of the rows, out (2, N, 1); whether finite."""
    finite = True
    for n in range(parts.shape[1]):
        low, high = part_range(parts, n)
        out[0, n, 0], out[1, n, 0] = low, high
        finite = finite and math.isfinite(low) and math.isfinite(high)
    return finite


@compiled
def normalized_ranges(ranges, norm, floor, out):
    """Ranges (2, N, C) of x → those of what batch norm and ReLU make of all images, (2, 1, C).

    norm  (4, run), as codes.normalize_run takes it
    """
    (_, N, C), (lowest, highest) = ranges.shape, NOTHING_YET
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    lows, highs = np.full(C, lowest), np.full(C, highest)
    for n in range(N):
        for c in range(C):
            low, high = ordered(ranges[0, n, c]), ordered(ranges[1, n, c])
            lows[c] = low if low < lows[c] else lows[c]
            highs[c] = high if high > highs[c] else highs[c]
    for c in range(C):
        one = weight[c] * ((float_of(lows[c]) - mean[c]) * inv_std[c]) + bias[c]
        two = weight[c] * ((float_of(highs[c]) - mean[c]) * inv_std[c]) + bias[c]
        low, high = (one, two) if one < two else (two, one)
        out[0, 0, c] = floor if low < floor else low      # NaN stays
        out[1, 0, c] = floor if high < floor else high


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
def grid(parts, bins, exponent, out):
    """The Grid of rows from the ranges of their parts (2, N, parts), fields into out (7, N, 1).

    exponent  (N, 1), or (1, 1) for all rows
    False where a row is not finite or must be rescaled.
    """
    for n in range(parts.shape[1]):
        low, high = part_range(parts, n)
        inv, scale, zero = grid_row(low, high, bins, exponent[min(n, len(exponent) - 1), 0])
        if scale == 0 or not (math.isfinite(low) and math.isfinite(high)):
            return False
        out[0, n, 0], out[1, n, 0] = low, high
        out[2, n, 0], out[3, n, 0], out[4, n, 0] = low, inv, ZERO
        out[5, n, 0], out[6, n, 0] = scale, zero
    return True


@compiled
def symmetric(x, top, key, step, constant, ends, codes):
    """All of `sym` for x (D,) on this thread: lowest, highest, scale, zero and codes (D,).

    False where x is not finite or must be rescaled.
    """
    low, high = row_range(x)
    if not (math.isfinite(low) and math.isfinite(high)) or odd(low, high):
        return False
    largest = max(-low, high)
    scale = np.float32(1) if largest == 0 else largest / np.float32(top)
    inv, limit = np.float32(UNIT) / scale, np.float32(UNIT * top)
    words = np.empty(4 * BLOCKS, np.uint64)
    for start in range(0, len(x), CHUNK):
        stop = min(len(x), start + CHUNK)
        noise = noise_of(key, step, start, stop - start, constant, words)
        round_run(x[start:stop], noise, ZERO, inv, ZERO, -limit, limit, codes[start:stop])
    ends[0], ends[1], ends[2], ends[3] = low, high, max(scale, SMALLEST), ZERO
    return True
