"""A batch norm's vectors, one number a channel: the small arithmetic between its passes, compiled.

In NumPy it is a dozen short calls a layer. What is computed, and why, is said by `scaling` in
layers/floating.py and by `statistics` and `backward` in kernels/norm.py; tests compare the bits.
"""
import math

import numpy as np

from minifqt.kernels.cpu.choice import compiled


@compiled
def total(parts):
    """Sums in parts (2, parts, C) → (2, C), part after part."""
    _, N, C = parts.shape
    sums = np.zeros((2, C))
    for k in range(2):
        for n in range(N):
            for c in range(C):
                sums[k, c] += parts[k, n, c]
    return sums


@compiled
def moments(sums, count, mean, var):
    """Mean and variance (C,) from Σ x and Σ x² in parts (2, parts, C), of so many numbers each."""
    s1, s2 = total(sums)
    for c in range(len(mean)):
        exact = s2[c] / count - (s1[c] / count) * (s1[c] / count)
        mean[c], var[c] = s1[c] / count, 0 if exact < 0 else exact            # NaN stays


@compiled
def scaling(sums, count, eps, momentum, weight, bias, running_mean, running_var, moved, norm):
    """BatchNorm2d.scaling in training: mean, 1/std, weight, bias as runs; the running ones moved.

    sums (2, parts, C), count  as in `moments`;  moved (2, C) mean and variance;  norm (4, run)
    """
    C, eps, momentum = len(weight), np.float32(eps), np.float32(momentum)
    mean, var, unbias = norm[0, :C], moved[1], np.float32(count / (count - 1))
    moments(sums, count, mean, var)
    for c in range(C):
        norm[1, c], norm[2, c] = np.float32(1) / math.sqrt(var[c] + eps), weight[c]
        norm[3, c] = bias[c]
        moved[0, c] = running_mean[c] + momentum * (mean[c] - running_mean[c])
        moved[1, c] = running_var[c] + momentum * (var[c] * unbias - running_var[c])
    repeat(norm, C)


@compiled
def slopes(sums, count, norm, totals, runs):
    """Σ g and Σ g · x̂ in parts (2, parts, C) → totals (2, C), and their means and the gain as runs.

    norm (4, run);  runs (3, run), as norms.gradient takes them
    """
    s1, s2 = total(sums)
    for c in range(len(s1)):
        totals[0, c], totals[1, c] = s1[c], s2[c]
        runs[0, c], runs[1, c], runs[2, c] = s1[c] / count, s2[c] / count, norm[2, c] * norm[1, c]
    repeat(runs, len(s1))


@compiled
def repeat(runs, C):
    """The first C numbers of each run, over and over."""
    for run in runs:
        for i in range(C, len(run)):
            run[i] = run[i - C]
