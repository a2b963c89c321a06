"""Ranges and the one rounding, in cache-sized blocks on all threads; bit for bit reference.py.

On a GPU the reference, which is plainer, itself runs: whole arrays, no sync.
"""
import numpy as np

from minifqt.backend import Array, array_module, map_blocks
from minifqt.kernels import reference
from minifqt.kernels.reference import UNIT

_BLOCK = 1 << 16                                          # float32s, 256 kB: in a core's L2 cache


def row_ranges(x: Array) -> tuple[Array, Array]:
    """Minimum and maximum of each row of x (N, D), each (N, 1); NaN where a row holds one."""
    if array_module(x) is not np or len(x) == 1:
        return x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)
    low, high = np.empty((len(x), 1), x.dtype), np.empty((len(x), 1), x.dtype)

    def block(rows):
        x[rows].min(axis=1, keepdims=True, out=low[rows])
        x[rows].max(axis=1, keepdims=True, out=high[rows])

    map_blocks(block, len(x), max(1, _BLOCK // x.shape[1]))
    return low, high


def affine_codes(x: Array, low: Array, inv: Array, h: Array, bins: int) -> Array:
    """reference.round_codes of fixed_point.  x, h (N, D); low, inv (N, 1) → uint8 (N, D)."""
    if array_module(x) is not np:
        return reference.round_codes(reference.fixed_point(x, low, inv), h, bins)

    def rounded(x, low, inv, h, out):
        v = x - low
        v *= inv
        np.rint(v, out=v)
        fixed = v.astype("int32")
        fixed += h
        np.minimum(fixed, UNIT * bins + UNIT - 1, out=fixed)
        fixed >>= 16
        out[...] = fixed

    return _in_blocks(rounded, x, h, np.uint8, low, inv)


def anchored_codes(x: Array, h: Array, shift: Array, inv: Array, code: Array, limits: tuple,
                   dtype) -> Array:
    """reference.anchored_codes as dtype.

    x, h (N, D); shift, inv, code (N, 1); limits (lowest, highest)
    """
    if array_module(x) is not np:
        return reference.anchored_codes(
            reference.anchored_fixed(x, shift, inv, code, *limits), h).astype(dtype)

    def rounded(x, shift, inv, code, h, out):
        out[...] = reference.anchored_codes(
            reference.anchored_fixed(x, shift, inv, code, *limits), h)

    return _in_blocks(rounded, x, h, dtype, shift, inv, code)


def _in_blocks(rounded, x, h, dtype, *per_row):
    codes = np.empty(x.shape, dtype)
    if len(x) == 1:                                       # one row: cut it along D

        def block(part):
            rounded(x[:, part], *per_row, h[:, part], codes[:, part])

        map_blocks(block, x.shape[1], _BLOCK)
    else:

        def block(rows):
            rounded(x[rows], *(v[rows] for v in per_row), h[rows], codes[rows])

        map_blocks(block, len(x), max(1, _BLOCK // x.shape[1]))
    return codes
