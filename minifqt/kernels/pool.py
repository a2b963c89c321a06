"""Max pooling by comparing taps in order (the first maximum wins a tie), and an image's mean."""
import numpy as np

from minifqt.backend import Array, array_module
from minifqt.kernels.cpu import choice
from minifqt.kernels.reference import output_size, taps
from minifqt.kernels.seen import Lazy, blank, images

if choice.numba is not None:
    from minifqt.kernels.cpu import norms
    from minifqt.kernels.cpu.team import share


def max_forward(x: Array, kernel: int, stride: int, padding: int) -> tuple[Array, Array]:
    """Maximum of each window and the tap that held it.

    (N, H, W, C) → (N, P, Q, C) twice, the second int16. Padding is −∞: it never wins.
    """
    xp = array_module(x)
    P, Q = output_size(x.shape[1:3], (kernel, kernel), stride, padding)
    padded = xp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)),
                    constant_values=-np.inf)
    best = taps(padded, 0, 0, P, Q, stride).copy()
    winner = xp.zeros(best.shape, "int16")
    for tap, (r, s) in enumerate(np.ndindex(kernel, kernel)):
        candidate = taps(padded, r, s, P, Q, stride)
        better = candidate > best
        best = xp.where(better, candidate, best)
        winner = xp.where(better, xp.int16(tap), winner)
    return best, winner


def max_backward(dy: Array, winner: Array, size: tuple, kernel: int, stride: int,
                 padding: int) -> Array:
    """dy goes to the winning pixel, summed where windows overlap.  (N, P, Q, C) → (N, *size, C)."""
    xp, (N, P, Q, C) = array_module(dy), dy.shape
    dx = xp.zeros((N, size[0] + 2 * padding, size[1] + 2 * padding, C), dy.dtype)
    for tap, (r, s) in enumerate(np.ndindex(kernel, kernel)):
        taps(dx, r, s, P, Q, stride)[...] += dy * (winner == tap)
    return dx[:, padding:padding + size[0], padding:padding + size[1]]


def mean_forward(x: Array) -> Array:
    """Mean over pixels, summed in float64.  (N, H, W, C) → (N, C)."""
    return x.mean(axis=(1, 2), dtype="float64").astype(x.dtype)


def mean_backward(dy: Array, size: tuple) -> Array:
    """(N, C) → (N, H, W, C): each pixel gets dy / (H · W)."""
    xp, (N, C) = array_module(dy), dy.shape
    return xp.ascontiguousarray(xp.broadcast_to(share_of(dy, size)[:, None, None], (N, *size, C)))


def share_of(dy, size):
    """What each of so many pixels gets of dy."""
    return (dy / (size[0] * size[1])).astype(dy.dtype)


class Spread(Lazy):
    """`mean_backward` of dy (N, C) float32, not computed yet: batch norm's backward spreads it."""

    def __init__(self, dy, size):
        super().__init__((len(dy), *size, dy.shape[1]))
        self.dy = dy

    def form(self):
        """Its numbers."""
        return mean_backward(self.dy, self.shape[1:3])

    def gated(self, x, norm, floor):
        """Its numbers, and Σ g and Σ g · x̂ of them (norms.gradient_sums)."""
        (N, H, W, C), spread = self.shape, blank(self.shape)
        sums = np.empty((2, N, C))
        share(norms.gradient_sums, share_of(self.dy, (H, W)), x, norm, floor, C, images(spread),
              sums)
        return spread, sums
