"""Matrices of rows whose ranges differ, on which BHQ is tried, and its transform of them."""
import numpy as np
import pytest

from minifqt.kernels.cpu import choice
from minifqt.quantizers.bhq import Householder, compiled_reflections, reflections

each_width = pytest.mark.parametrize("bits", range(2, 9))
each_size = pytest.mark.parametrize("N", [1, 2, 3, 5, 37, 100])
needs_numba = pytest.mark.skipif(choice.numba is None, reason="needs numba: nothing is compiled")


def student(N=32, D=48):
    rng = np.random.default_rng(0)
    return (rng.standard_t(4, (N, D)) * rng.lognormal(0, 1.5, (N, 1))).astype("float32")


def gauss(N=32, D=48):
    return np.random.default_rng(0).standard_normal((N, D)).astype("float32")


def sparse_rows(N=32, D=48):
    """Two large rows, all others a thousandth of them."""
    return gauss(N, D) * np.where(np.arange(N) % 16 == 3, 1, 1e-3)[:, None].astype("float32")


def one_large_row(N=32, D=48):
    return gauss(N, D) * np.where(np.arange(N) == 5, 1e4, 1)[:, None].astype("float32")


def dwarfs(N=32, D=48):
    """One large row; all others are below 2⁻²⁴ of it, the smallest first."""
    sizes = np.geomspace(1e-30, 1e-8, N)
    sizes[-1] = 1
    return gauss(N, D) * sizes[:, None].astype("float32")


MATRICES = [student, gauss, sparse_rows, one_large_row, dwarfs]
each_matrix = pytest.mark.parametrize("matrix", MATRICES)


def ranges_of(x):
    return x.max(axis=1).astype("float64") - x.min(axis=1)


def householder(x):
    return Householder(*reflections(*(v.astype("float64") for v in (x.min(axis=1), x.max(axis=1)))))


def dense(mix, N):
    """T and T⁻¹ as matrices, (N, N) each."""
    return mix.apply(np.eye(N)), mix.undo(np.eye(N))


def random_ranges(N):
    """500 vectors of N ranges from even to very uneven."""
    rng = np.random.default_rng(0)
    return [rng.lognormal(0, rng.uniform(0.1, 4), N) for _ in range(500)]


def members(order, group):
    """The rows of each group in mixed order."""
    return [list(order[group == g]) for g in range(group.max() + 1)]


def reflected(parts):
    """`reflections` of rows whose parts have these ranges (2, N, parts), plain and compiled."""
    low, high = parts.astype("float64")
    yield reflections(low.min(axis=1), high.max(axis=1))
    if choice.instructions() != "numpy":
        yield compiled_reflections(parts)
