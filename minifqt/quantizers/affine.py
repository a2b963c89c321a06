"""What PTQ, PSQ and BHQ share: rows, each with its own range, rounded to bins with a real zero."""
from dataclasses import dataclass

import numpy as np

from minifqt.backend import Array, array_module
from minifqt.kernels import reference, rounding
from minifqt.kernels.cpu import choice
from minifqt.kernels.norm import Normalized
from minifqt.kernels.reference import UNIT
from minifqt.kernels.seen import Seen, suits
from minifqt.rng import Stream, Streams

if choice.numba is not None:
    from minifqt.kernels.cpu import scales

SMALLEST = np.float32(2.0**-149)                          # a scale below it would be 0
_NO_EXPONENT = np.zeros((1, 1), np.int64)


def as_rows(x: Array, rows: int) -> Array:
    """x as a (rows, D) float32 matrix.  ValueError where it is empty."""
    if x.size == 0:
        raise ValueError(
            f"an array of shape {x.shape} is empty: a quantizer needs at least one number.")
    if isinstance(x, Normalized) and rows == 1:           # rounded from what it is made of
        return x
    row = (np.asarray(x) if isinstance(x, Seen) else x).reshape(rows, -1)
    if row.dtype == np.float32:
        return row
    with np.errstate(over="ignore"):                      # float64 beyond float32: not finite
        return row.astype("float32")


def range_parts(x: Array, rows: int) -> Array:
    """Minima and maxima of parts of each row, (2, rows, parts), found before or now."""
    return rounding.parts_of(x, rows, as_rows(x, rows))


def finite_ranges(x: Array, rows: int, stream: Stream | None = None) -> Array:
    """Minimum and maximum of each row, (2, rows, 1).  NonFiniteError names the stream or "x"."""
    return _joined(range_parts(x, rows), stream)


def _joined(parts, stream):
    ranges, finite = rounding.joined(parts)
    require_finite(finite, stream)
    return ranges


def require_finite(finite: Array | bool, stream: Stream | None = None) -> None:
    """NonFiniteError, which names the stream or "x", unless finite."""
    (stream or Streams(0).stream("x")).require_finite(finite)


def rescaled(x: Array, low: Array, high: Array) -> tuple[Array, Array, Array, Array | int]:
    """Rows whose range would under- or overflow float32, times 2⁻ᵉ; all others as they are.

    Returns x, low, high and e (N, 1). Exact, so that q(2ᵏx) = 2ᵏ q(x). No absolute epsilon: the
    authors' 1e-8 erases gradients of that size.
    """
    xp = array_module(x)
    largest = xp.maximum(-low, high)
    with np.errstate(over="ignore"):
        width = high - low
    tiny = (width < 2.0**-100) & (0 < largest) & (largest < 2.0**-76)     # 24 bits are all it has
    odd = tiny | (largest > 2.0**119)
    if xp is np and not odd.any():                        # elsewhere asking would cost a sync
        return x, low, high, 0
    e = xp.where(odd, xp.frexp(largest)[1], 0)
    x = x.array().reshape(1, -1) if isinstance(x, Normalized) else x
    return xp.ldexp(x, -e), xp.ldexp(low, -e), xp.ldexp(high, -e), e


@dataclass
class Grid:
    """Rows to be rounded: (rows − low) · inv is fixed point; codes mean scale · (codes − zero)."""

    rows: Array                                           # (N, D)
    ranges: Array                                         # (2, N, 1) lowest and highest
    maps: Array                                           # low, inv, first code 0; (N, 1) each
    scale: Array                                          # (N, 1)
    zero: Array                                           # (N, 1)

    def codes(self, stream: Stream, shape: tuple, bins: int) -> Array:
        """uint8 of this shape, which has as many elements, with the stream's noise for it."""
        return rounding.round_rows(self.rows, self.maps, stream, shape, (0, bins))

    def variance(self, bins: int) -> Array:
        """scale² · p(1 − p), p the higher code's probability: exact for 16-bit noise.  float64."""
        low, inv, _ = self.maps
        fixed = reference.fixed_point(self.rows, low, inv)
        p = (array_module(fixed).minimum(fixed, UNIT * bins) & (UNIT - 1)) / UNIT   # (N, D)
        return self.scale.astype("float64") ** 2 * p * (1 - p)

    def bound(self) -> Array:
        """The largest variance of rows with these ranges: scale² / 4, 0 in constant rows."""
        largest = self.scale.astype("float64") ** 2 / 4 * (self.maps[1] > 0)
        return array_module(largest).broadcast_to(largest, self.rows.shape)


def fitted(x: Array, rows: int, bins: int, stream: Stream | None = None) -> Grid:
    """x as so many rows, each in `bins` steps of its range.  NonFiniteError as in finite_ranges."""
    matrix = as_rows(x, rows)
    parts = rounding.parts_of(x, rows, matrix)
    return _compiled(matrix, parts, bins) or grid(matrix, *_joined(parts, stream), bins)


def grid(x: Array, low: Array, high: Array, bins: int, exponent: Array | int = 0) -> Grid:
    """`bins` steps from low to high in each row of x (N, D); x stands for x · 2^exponent."""
    xp, ranges = array_module(x), array_module(low).stack([low, high])
    found = _compiled(x, ranges, bins, _NO_EXPONENT if isinstance(exponent, int) else exponent)
    if found:
        return found
    x, low, high, e = rescaled(x, low, high)
    scale, inv = reference.grid(low, high, bins)
    e = e + exponent
    stored = xp.maximum(xp.ldexp(scale, e), SMALLEST)
    return Grid(x, ranges, (low, inv, 0 * inv), stored, -low / xp.ldexp(stored, -e))


def _compiled(x, parts, bins, exponent=_NO_EXPONENT):
    """`grid` from ranges of rows' parts (2, N, parts), where they suit and none is `rescaled`."""
    if suits(parts[0]):
        found = np.empty((7, parts.shape[1], 1), np.float32)    # ranges, maps, scale, zero
        if scales.grid(parts, bins, exponent, found):
            return Grid(x, found[:2], found[2:5], found[5], found[6])
    return None
