"""What BHQ mixes with what, and how strongly, compiled: in NumPy it is a hundred short calls.

What is computed, and why, is said in quantizers/bhq.py, by `reflections`, `groups` and
`inverse_cube_root`; tests compare the bits.
"""
import math

import numpy as np

from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.scales import joined


@compiled
def plan(parts, order, starts, exponent, scales, rescaled, undo_scales):
    """bhq.reflections of rows whose parts have these ranges (2, N, parts).

    Returns how many groups there are and rows of the largest; 0, 0 where a range is not finite.
    """
    N = parts.shape[1]
    M, both, ranges, keys = N, np.empty((2, N, 1), np.float32), np.empty(N), np.empty(N)
    if not joined(parts, both):
        return 0, 0
    for n in range(N):
        low, high = np.float64(both[0, n, 0]), np.float64(both[1, n, 0])
        keys[n] = ranges[n] = high - low
        if high == low != 0:                              # it stays alone
            keys[n], M = -1, M - 1
    groups, largest = group(ranges, descending(keys), M, order, starts), 0
    for g in range(groups):
        first, last = starts[g], starts[g + 1]
        e, lead, others = scales_of(ranges[order[first]], ranges[order[min(first + 1, N - 1)]],
                                    last - first)
        largest = max(largest, last - first)
        for j in range(first, last):
            n, scale = order[j], lead if j == first else others
            exponent[j], scales[j], rescaled[j] = e, scale, math.ldexp(scale, -e)
            undo_scales[j] = 0.0 if both[0, n, 0] == both[1, n, 0] == 0 else 1 / scale
    return groups, largest


@compiled
def descending(keys):
    """The order of keys from the largest on, equal ones as they come: runs are merged in pairs."""
    N, width = len(keys), 1
    order, merged = np.empty(N, np.int64), np.empty(N, np.int64)
    for n in range(N):
        order[n] = n
    while width < N:
        for start in range(0, N, 2 * width):
            middle, end = min(start + width, N), min(start + 2 * width, N)
            i, j = start, middle
            for at in range(start, end):
                if j == end or (i < middle and keys[order[i]] >= keys[order[j]]):
                    merged[at], i = order[i], i + 1
                else:
                    merged[at], j = order[j], j + 1
        order, merged, width = merged, order, 2 * width
    return order


@compiled
def group(ranges, by_range, M, order, starts):
    """bhq.groups of rows in this order, of which the first M are mixed; how many there are."""
    N, largest = len(ranges), ranges[by_range[0]]
    values, sums, total = np.empty(N, np.int64), np.empty(N, np.int64), np.int64(0)
    for i in range(N):
        share = ranges[by_range[i]] / (largest if largest > 0 else 1.0)
        values[i] = np.int64(np.rint(share * 2.0**23))
        total += values[i]
        sums[i] = total
    small = 0
    for k in range(1, M):
        if k * values[M - k - 1] > sums[M - k - 1]:
            small = k
            break
    G, at, row = M - small, 0, M - small
    whole = max(sums[G - 1], 1) if G > 0 else 1
    for g in range(N + 1):
        starts[g] = at
        if g < N - small:                                 # leaders, then rows that stay alone
            order[at], at = by_range[g if g < G else M + g - G], at + 1
            end = G + np.int64(np.rint(sums[g] * small / whole)) if g < G - 1 else M
            while row < min(end, M):                      # its share of the small ones
                order[at], at, row = by_range[row], at + 1, row + 1
    return N - small


@compiled
def scales_of(large, small, n):
    """exponent, the leader's scale and the others' of a group of n rows: its two largest ranges."""
    exponent, lead, others = math.frexp(large)[1] if large > 0 else 0, 1.0, 1.0
    if n > 1:
        root, outside = math.sqrt(n), 1 / (n - math.sqrt(n))
        large, small = (math.ldexp(large, -exponent),
                        math.ldexp(max(small, 1e-30 * large), -exponent))
        highest = math.sqrt(0.5) if n == 2 else max(outside, abs(1 - outside), 1 / root)
        lead, others = inverse_cube_root(large / root), inverse_cube_root(small * highest / (n - 1))
    room = 32 if exponent > 118 else 0
    return exponent - room, math.ldexp(lead, -room), math.ldexp(others, -room)


@compiled
def inverse_cube_root(x):
    """x^(−1/3), as bhq.inverse_cube_root."""
    m, e = math.frexp(x)
    third = e // 3
    m = math.ldexp(m, e - 3 * third)
    y = 1.2 - 0.16 * m
    for _ in range(5):
        y = y + y / 3 * (1 - m * y * (y * y))
    return math.ldexp(y, -third)
