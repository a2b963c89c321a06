"""The released BHQ, written once more from its description: dense, float64, group after group.

It shares no line with minifqt, so that an error must be made twice to go unseen. No absolute 1e-8
is added to the ranges, as the released code does: it spoils small gradients.
"""
import numpy as np


def groups(ranges):
    """The rows of each group, the large row first.  ranges (N,), N ≥ 3, not all zero."""
    N = len(ranges)
    order = sorted(range(N), key=lambda i: -ranges[i])
    v = [ranges[i] for i in order]
    k = 1
    while k * v[N - k - 1] <= sum(v[:N - k]):
        k += 1
    leaders, total, taken, found = N - k, sum(v[:N - k]), 0, []
    for i in range(leaders):
        end = round(sum(v[:i + 1]) * k / total)
        found.append([order[i]] + [order[leaders + t] for t in range(taken, end)])
        taken = end
    return found


def reflection(n):
    """(n, n): 1/√n in the first row and column, δ − 1/(n − √n) elsewhere."""
    Q = np.full((n, n), n**-0.5)
    if n > 1:
        Q[1:, 1:] = np.eye(n - 1) - 1 / (n - n**0.5)
    return Q


def transform(ranges):
    """The dense T (N, N); its rows are the mixed rows, group by group."""
    T = np.zeros((len(ranges), len(ranges)))
    row = 0
    for members in groups(ranges):
        n = len(members)
        Q = reflection(n)
        large = ranges[members[0]]
        s = [1.0]
        if n > 1:
            small = max(ranges[members[1]], 1e-30 * large)
            s = [(small * abs(Q).max() / (n - 1)) ** (-1 / 3)] * n
            s[0] = (large / n**0.5) ** (-1 / 3)
        for j, member in enumerate(members):
            T[row:row + n, member] = Q[:, j] * s[j]
        row += n
    return T


def variance(x, bits):
    """Exact element variance (T⁻¹)² · step² p(1 − p), a range for each mixed row.  x (N, D)."""
    x = x.astype(np.float64)
    T = transform(x.max(axis=1) - x.min(axis=1))
    y = T @ x
    low, high = y.min(axis=1, keepdims=True), y.max(axis=1, keepdims=True)
    step = (high - low) / (2**bits - 1)
    p = (y - low) / step % 1
    return np.linalg.inv(T) ** 2 @ (step**2 * p * (1 - p))
