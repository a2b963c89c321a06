"""Small arithmetic between kernels, compiled: in NumPy it is a hundred short calls a layer.

What is computed, and why, is said elsewhere, and tests compare the bits: `epilogue` in
kernels/reference.py, SGD in optim.py. Ranges and grids: scales.py.
"""

import numpy as np

from minifqt.kernels.cpu.choice import compiled


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
