"""Small arithmetic between kernels, compiled: in NumPy it is a hundred short calls a layer.

What is computed, and why, is said elsewhere, and tests compare the bits: `reflections` and `groups`
in quantizers/bhq.py, `epilogue` in kernels/reference.py. Ranges and grids: scales.py.
"""
import math

import numpy as np

from minifqt.kernels.cpu.choice import compiled


@compiled
def groups(low, high, by_range, order, group, starts, count):
    """bhq.groups of rows in the order of bhq.by_size, and where each group starts and how many."""
    N, M, largest = len(low), 0, 0.0
    for n in range(N):
        largest = max(largest, high[n] - low[n])
        M += not (high[n] == low[n] and low[n] != 0)      # the others stay alone
    unit, total = largest if largest > 0 else 1.0, np.int64(0)
    values, sums = np.empty(N, np.int64), np.empty(N, np.int64)
    for i in range(N):
        n = by_range[i]
        values[i] = np.int64(np.rint((high[n] - low[n]) / unit * 2.0**23))
        total += values[i]
        sums[i] = total
    small = 0
    for k in range(1, M):
        if k * values[M - k - 1] > sums[M - k - 1]:
            small = k
            break
    G, at, row = M - small, 0, M - small
    whole = max(sums[G - 1], 1) if G > 0 else 1
    starts[:], count[:] = N, 0
    for g in range(G + N - M):                            # leaders, then rows that stay alone
        starts[g] = at
        order[at], group[at] = by_range[g if g < G else M + g - G], g
        at += 1
        end = G + np.int64(np.rint(sums[g] * small / whole)) if g < G - 1 else M
        while row < min(end, M):                          # its share of the small ones
            order[at], group[at] = by_range[row], g
            at, row = at + 1, row + 1
        count[g] = at - starts[g]


@compiled
def reflectors(low, high, order, group, starts, count, v, outside, cube, exponent):
    """v, outside, cube and exponent of mixed rows, as bhq.reflections finds them."""
    for j in range(len(order)):
        first, n = starts[group[j]], count[group[j]]
        lead, second = order[first], order[min(first + 1, len(order) - 1)]
        root, large = 1 / math.sqrt(n), high[lead] - low[lead]
        less = max(high[second] - low[second], 1e-30 * large)
        v[j] = (1.0 if j == first else 0.0) - root
        exponent[j] = math.frexp(large)[1] if large > 0 else 0
        large, less = math.ldexp(large, -exponent[j]), math.ldexp(less, -exponent[j])
        outside[j] = 1 / (n - math.sqrt(n)) if n > 1 else 1.0
        highest = (math.sqrt(0.5) if n == 2 else
                   max(outside[j], abs(1 - outside[j]), 1 / math.sqrt(n)))
        cube[j] = large / math.sqrt(n) if j == first else less * highest / max(n - 1, 1)
        cube[j] = cube[j] if n > 1 and cube[j] > 0 else 1.0


@compiled
def scales_of(low, high, order, count, thirds, exponent, root, gain, scales, undo_scales):
    """root and gain of groups, scales and undo_scales of mixed rows from the cube roots s⁻¹."""
    for i in range(len(order)):
        root[i] = 1 / math.sqrt(max(count[i], 1))
        gain[i] = 1 / (1 - root[i] if root[i] < 1 else 1.0)
        room = 32 if exponent[i] > 118 else 0             # or a scale near 2¹²⁸ would overflow
        scales[i], exponent[i] = math.ldexp(1 / thirds[i], -room), exponent[i] - room
        n = order[i]
        undo_scales[i] = 0.0 if low[n] == 0 and high[n] == 0 else 1 / scales[i]


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
