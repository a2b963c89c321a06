"""Per-tensor quantizers: real zero (ptq, the paper's), integer (ptqz), symmetric (sym, weights)."""
import numpy as np

from minifqt.backend import Array, array_module
from minifqt.kernels import reference, rounding
from minifqt.kernels.cpu import choice
from minifqt.kernels.reference import UNIT
from minifqt.kernels.seen import suits
from minifqt.qtensor import QTensor
from minifqt.quantizers.affine import SMALLEST, as_rows, finite_ranges, fitted, grid, rescaled
from minifqt.quantizers.base import Quantizer, register
from minifqt.rng import Stream

if choice.numba is not None:
    from minifqt.kernels.cpu import scales
    from minifqt.kernels.cpu.team import SMALL


class PerTensor(Quantizer):
    """One scale and one zero for all of x; also takes a range from outside, as evaluation does.

    A subclass defines `_round(x, row, low, high, stream)` → QTensor of x's shape; row is x as
    (1, D), within low .. high, (1, 1) each.
    """

    def __call__(self, x: Array, stream: Stream) -> QTensor:
        return self.with_range(x, stream)[0]

    def with_range(self, x: Array, stream: Stream) -> tuple[QTensor, Array]:
        """The codes, and the minimum and maximum that they cover, (2,)."""
        ranges = finite_ranges(x, 1, stream)
        return self._round(x, as_rows(x, 1), *ranges, stream), ranges.reshape(2)

    def static(self, x: Array, stream: Stream, low: Array, high: Array) -> QTensor:
        """Codes over the given range (1,), (1,); x is clipped to it first."""
        finite_ranges(x, 1, stream)
        low, high = low.reshape(1, 1), high.reshape(1, 1)
        return self._round(x, self._clipped(as_rows(x, 1), low, high), low, high, stream)

    def _clipped(self, row, low, high):
        return array_module(row).clip(row, low, high)


@register("ptq")
class PTQ(PerTensor):
    """scale = R / B, zero = −min / scale, a real number.

    Var = scale² Σ p(1 − p) ≤ N·D·R²/4B². May enter every product. The authors' code has an integer
    zero (`ptqz`), which is better where most numbers are far smaller than a step.
    Source: arXiv 2010.14298, the per-tensor quantizer. Plain form: reference.psq of one row.
    """

    reads_normalized = True

    def with_range(self, x, stream):
        g = fitted(x, 1, self.bins, stream)
        return self._rounded(x, g, stream), g.ranges.reshape(2)

    def _clipped(self, row, low, high):  # noqa: ARG002 - its codes end where the range ends
        return row

    def _round(self, x, row, low, high, stream):
        return self._rounded(x, grid(row, low, high, self.bins), stream)

    def _rounded(self, x, g, stream):
        codes, single = g.codes(stream, x.shape, self.bins), (1,) * x.ndim
        return QTensor(codes, g.scale.reshape(single), g.zero.reshape(single), name=stream.name)

    def variance(self, x: Array) -> Array:
        """scale² · p(1 − p).  float64, shape of x."""
        return fitted(x, 1, self.bins).variance(self.bins).reshape(x.shape)

    def bound(self, x: Array) -> float:
        """N·D·R²/4B².  # sync"""
        return float(fitted(x, 1, self.bins).bound().sum())


class Anchored(PerTensor):
    """Zero is an integer code, so 0 is exact and has no variance.

    A subclass says where it is: `_anchor(low, high)` → shift, scale, inv, code, (1, 1) each.
    """

    dtype = np.uint8

    def _round(self, x, row, low, high, stream):
        row, shift, inv, code, scale, zero = self._prepared(row, low, high)
        codes = rounding.round_rows(row, (shift, inv, UNIT * code), stream, x.shape,
                                    self._limits(), self.dtype)
        single = (1,) * x.ndim
        return QTensor(codes, scale.reshape(single), zero.reshape(single), name=stream.name)

    def variance(self, x: Array) -> Array:
        """scale² · p(1 − p), 0 for every 0.  float64, shape of x."""
        row, shift, inv, code, scale, _ = self._prepared(as_rows(x, 1), *finite_ranges(x, 1))
        p = (reference.anchored_fixed(row, shift, inv, code, *self._limits()) & (UNIT - 1)) / UNIT
        return (scale.astype("float64") ** 2 * p * (1 - p)).reshape(x.shape)

    def bound(self, x: Array) -> float:
        """N·D·scale²/4, 0 for zeros: scale exceeds R/B where both signs occur.  # sync"""
        return float(x.any()) * super().bound(x)

    def _prepared(self, row, low, high):
        xp = array_module(row)
        row, low, high, e = rescaled(row, low, high)
        shift, scale, inv, code = self._anchor(low, high)
        stored = xp.maximum(xp.ldexp(scale, e), SMALLEST)
        return row, shift, inv, code, stored, code - shift / xp.ldexp(stored, -e)

    def _limits(self):
        return 0, self.bins


@register("ptqz")
class IntegerZeroPTQ(Anchored):
    """Per tensor, integer zero: the finest grid of 0..B that has 0 as a code and covers the range.

    Clip-free, as the authors' code intends; theirs divides by a vanishing zero code. Where the
    range does not contain 0, extending it would only coarsen it: then PTQ's real zero is used.
    Source: kernels/reference.integer_zero. May enter every product.
    """

    def _anchor(self, low, high):
        xp = array_module(low)
        inside = (low <= 0) & (high >= 0)
        scale, code = reference.integer_zero(xp.minimum(low, 0), xp.maximum(high, 0), self.bins)
        real_scale, real_inv = reference.grid(low, high, self.bins)
        return (xp.where(inside, 0, low), xp.where(inside, scale, real_scale),
                xp.where(inside, UNIT / scale, real_inv), xp.where(inside, code, 0))


@register("sym")
class Symmetric(Anchored):
    """The weights' quantizer: int8 codes −t .. t, t = 2^(b−1) − 1, zero 0, scale = max|x| / t.

    No code −2^(b−1): one more on one side would bias. May enter every product.
    Source: symmetric weight quantization, e.g. arXiv 1712.05877; the paper quantizes weights per
    tensor too.
    """

    dtype = np.int8

    def with_range(self, x, stream):
        return self._at_once(x, stream) or super().with_range(x, stream)

    def _at_once(self, x, stream):
        """`with_range` in one compiled call, where x is small and usual, as weights are."""
        source = stream.source()
        if not source or not suits(x) or x.size > SMALL:
            return None
        codes, ends = np.empty(x.shape, np.uint8), np.empty((4,) + (1,) * x.ndim, np.float32)
        if not scales.symmetric(np.ascontiguousarray(x).reshape(-1), self._limits()[1], *source,
                               ends.reshape(-1), codes.reshape(-1)):
            return None
        return QTensor(codes.view(np.int8), ends[2], ends[3], name=stream.name), ends[:2].reshape(2)

    def _limits(self):
        top = 2 ** (self.bits - 1) - 1
        return -top, top

    def _anchor(self, low, high):
        xp = array_module(low)
        largest = xp.maximum(-low, high)
        scale = xp.where(largest == 0, 1, largest / self._limits()[1])
        return xp.zeros_like(low), scale, UNIT / scale, xp.zeros_like(low)
