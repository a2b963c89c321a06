"""Arithmetic of one number a row, compiled: in NumPy it is a hundred small calls a layer.

Each function has its plain twin, which says what is computed and why: reflections and groups in
quantizers/bhq.py, Normalized.summary in kernels/norm.py, grid in quantizers/affine.py. Same bits.
"""
import math

import numpy as np

from minifqt.kernels.cpu.choice import compiled


@compiled
def groups(ranges, alone):
    """order, group: which rows are mixed with which."""
    N, largest = len(ranges), ranges.max()
    unit = largest if largest > 0 else 1.0
    key = np.empty(N)
    for i in range(N):
        key[i] = 1 if alone[i] else -ranges[i]
    order, M = np.argsort(key, kind="mergesort"), N - alone.sum()
    v = np.empty(N, np.int64)
    for i in range(N):
        v[i] = np.int64(np.rint(ranges[order[i]] / unit * 2.0**23))
    sums, small = np.cumsum(v), 0
    for k in range(1, M):
        if k * v[M - k - 1] > sums[M - k - 1]:
            small = k
            break
    G, group, total = M - small, np.empty(N, np.int64), 1
    if G > 0:
        total = max(sums[G - 1], 1)
    i = 0
    for row in range(N):
        if row < G:
            group[row] = row
        elif row >= M:
            group[row] = G + row - M
        else:                                             # the first group whose end lies behind it
            while i < G and np.int64(np.rint(sums[i] * small / total)) <= row - G:
                i += 1
            group[row] = i
    leader_first = np.argsort(group, kind="mergesort")
    return order[leader_first], group[leader_first]


@compiled
def householder(low, high):
    """What Householder is made of: order, group, starts, count, v, cube, exponent, outside."""
    N, ranges = len(low), high - low
    order, group = groups(ranges, (ranges == 0) & (low != 0))
    starts, count = np.full(N, N), np.zeros(N, np.int64)
    for j in range(N - 1, -1, -1):
        starts[group[j]] = j
        count[group[j]] += 1
    v, cube, exponent, outside = np.empty(N), np.empty(N), np.empty(N, np.int32), np.empty(N)
    for j in range(N):
        first, n = starts[group[j]], count[group[j]]
        root, large = 1 / math.sqrt(n), ranges[order[first]]
        small = max(ranges[order[min(first + 1, N - 1)]], 1e-30 * large)
        v[j] = (1.0 if j == first else 0.0) - root
        exponent[j] = math.frexp(large)[1] if large > 0 else 0
        large, small = math.ldexp(large, -exponent[j]), math.ldexp(small, -exponent[j])
        outside[j] = 1 / (n - math.sqrt(n)) if n > 1 else 1.0
        highest = (math.sqrt(0.5) if n == 2 else
                   max(outside[j], abs(1 - outside[j]), 1 / math.sqrt(n)))
        cube[j] = large / math.sqrt(n) if j == first else small * highest / max(n - 1, 1)
        cube[j] = cube[j] if n > 1 and cube[j] > 0 else 1.0
    return order, group, starts, count, v, cube, exponent, outside
