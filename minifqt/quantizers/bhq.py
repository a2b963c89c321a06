"""Block Householder quantizer: spread each large row over small ones, round, gather it again.

A sample whose gradient is large would need a coarse grid of its own; reflected into a group of n
rows it costs 1/n of the variance. The plain dense form is kernels/reference.bhq_transform; here
nothing is larger than N × D.
"""
from functools import cached_property

import numpy as np

from minifqt.backend import Array, array_module, empty, segment_sum, threads
from minifqt.kernels import reflect
from minifqt.kernels.cpu import choice
from minifqt.kernels.rounding import rounding_of
from minifqt.kernels.seen import Lazy, Summary, blank, images, suits
from minifqt.qtensor import QTensor
from minifqt.quantizers.affine import as_rows, finite_ranges, grid
from minifqt.quantizers.base import Quantizer, register
from minifqt.rng import Stream

if choice.numba is not None:
    from minifqt.kernels.cpu import mixing, plans
    from minifqt.kernels.cpu.team import share

ROOM = 1 << 20                                            # bytes of a group's mixed rows, in cache


@register("bhq")
class BHQ(Quantizer):
    """T = Q · diag(s) in groups of one large row and many small; then each mixed row its own range.

    Var x̂_ij = Σ_r (T⁻¹)²_ir scale_r² p(1 − p)_rj ≤ D/4 · Σ_r scale_r² ‖T⁻¹e_r‖².
    May enter dgrad alone.
    Source: arXiv 2010.14298, the block Householder quantizer; grouping, scales and re-ranging as in
    the authors' code. Departs: fewer than 3 rows are PSQ; zero rows come back as exact zeros;
    constant rows stay out of groups and are exact.
    """

    def __call__(self, x: Array, stream: Stream) -> QTensor:
        mix, mixed = self._mixed(x, stream)
        found = mixed.quantized(self.bins, stream) if isinstance(mixed, Mixed) else None
        if found is None:                                 # not while it was mixed
            g = self._grid(mix, mixed)
            found = g.codes(stream, x.shape, self.bins), g.scale, g.zero
        codes, scale, zero = found
        per_row = (len(x),) + (1,) * (x.ndim - 1)
        return QTensor(codes.reshape(x.shape), scale.reshape(per_row), zero.reshape(per_row), mix,
                       stream.name)

    def variance(self, x: Array) -> Array:
        """(T⁻¹)² · scale² p(1 − p).  float64, shape of x."""
        mix, mixed = self._mixed(x)
        v = self._grid(mix, mixed).variance(self.bins)
        return mix.undo_squared(v).reshape(x.shape)

    def bound(self, x: Array) -> float:
        """D/4 · Σ_r scale_r² ‖T⁻¹e_r‖².  # sync"""
        mix, mixed = self._mixed(x)
        return float(mix.undo_squared(self._grid(mix, mixed).bound()).sum())

    def _mixed(self, x, stream=None):
        low, high = finite_ranges(x, len(x), stream)
        mix = Householder(low[:, 0].astype("float64"), high[:, 0].astype("float64"))
        return mix, mix.apply_rescaled(as_rows(x, len(x)))[0]

    def _grid(self, mix, mixed):
        mixed = np.asarray(mixed) if isinstance(mixed, Mixed) else mixed
        return grid(mixed, *finite_ranges(mixed, len(mixed)), self.bins, mix.exponent[:, None])


def groups(ranges: Array, alone: Array) -> tuple[Array, Array]:
    """Which rows are mixed with which: (order, group), both (N,).

    Mixed row j is row order[j], in group[j] = 0, 1, …. The G rows of largest range lead a group
    each; the k = M − G others are dealt out in proportion to their leaders' ranges, k ≥ 1 the
    smallest with k · v[M − k − 1] > Σ v[:M − k] (v sorted, descending). No k: every row is a group
    of its own.
    ranges  (N,) float64; summed as integers, so that nothing depends on the order of a sum
    alone   (N,) bool, the rows to be left out; M is the number of others
    Source: the authors' code; here array operations of fixed shape, nothing copied to the host.
    """
    xp, N = array_module(ranges), len(ranges)
    largest = ranges.max()
    v = xp.rint(ranges / xp.where(largest > 0, largest, 1) * 2**23).astype("int64")
    order = by_size(ranges, alone)
    v, M = v[order], N - alone.sum(keepdims=True)              # (1,), and so k and G
    sums, k = xp.cumsum(v), xp.arange(1, N + 1)
    last = M - k - 1                                      # the last leader, were there k small rows
    fits = (last >= 0) & (k * v[last.clip(0)] > sums[last.clip(0)])
    k = xp.where(fits.any(), fits.argmax(keepdims=True) + 1, 0)
    G, row = M - k, xp.arange(N)
    ends = xp.rint(sums * k / xp.maximum(sums[(G - 1).clip(0)], 1)).astype("int64")
    small_before = xp.where(row < G, ends, N + 1)         # so many belong to groups 0 .. i
    group = xp.where(row < G, row, xp.searchsorted(small_before, row - G, side="right"))
    group = xp.where(row < M, group, G + row - M)
    leader_first = xp.argsort(group, kind="stable")
    return order[leader_first], group[leader_first]


def by_size(ranges: Array, alone: Array) -> Array:
    """The rows, those of large range first, those that stay alone last."""
    xp = array_module(ranges)
    return xp.argsort(xp.where(alone, 1, -ranges), kind="stable")


def reflections(low: Array, high: Array) -> tuple[Array, ...]:
    """What Householder is made of: order, group, starts, count, v, outside, exponent and the rest.

    starts, count  (N,) of group i, N and 0 if there is none; root, gain (N,) as _reflect uses them
    outside        −Q between two small rows of its group, (N,) as all that follow, of mixed rows
    """
    xp, N = array_module(low), len(low)
    ranges, row = high - low, xp.arange(len(low))
    order, group = groups(ranges, (ranges == 0) & (low != 0))
    starts = xp.searchsorted(group, row, side="left")
    count = xp.searchsorted(group, row, side="right") - starts
    first, n = starts[group], count[group].astype("float64")          # each mixed row's leader
    v = xp.where(row == first, 1, 0) - 1 / xp.sqrt(n)
    root = 1 / xp.sqrt(xp.maximum(count, 1))              # v₁ = 1 − root, the others −root,
    gain = 1 / xp.where(root < 1, 1 - root, 1)            # and vᵀv / 2 = 1 − root
    large, small = ranges[order[first]], ranges[order[xp.minimum(first + 1, N - 1)]]
    exponent = xp.where(large > 0, xp.frexp(large)[1], 0)
    large, small = (xp.ldexp(large, -exponent),
                    xp.ldexp(xp.maximum(small, 1e-30 * large), -exponent))
    outside = 1 / xp.where(n > 1, n - xp.sqrt(n), 1)                  # −Q between two small rows
    highest = xp.where(n == 2, xp.sqrt(0.5),
                       xp.maximum(xp.maximum(outside, abs(1 - outside)), 1 / xp.sqrt(n)))
    cube = xp.where(row == first, large / xp.sqrt(n), small * highest / xp.maximum(n - 1, 1))
    cube = xp.where((n > 1) & (cube > 0), cube, 1)        # s⁻³, in units of 2^exponent
    room = xp.where(exponent > 118, 32, 0)                # or a scale near 2¹²⁸ would overflow
    scales, exponent = xp.ldexp(1 / xp.cbrt(cube), -room), exponent - room
    zero_rows = ((low == 0) & (high == 0))[order]
    undo_scales = xp.where(zero_rows, 0.0, 1 / scales)    # what is 0 stays 0
    return order, group, starts, count, v, outside, exponent, root, gain, scales, undo_scales


def compiled_reflections(low: np.ndarray, high: np.ndarray) -> tuple[np.ndarray, ...]:
    """The same by plans.py, but for the cube roots, where libraries differ in the last bit."""
    N, ranges = len(low), high - low
    by_range = by_size(ranges, (ranges == 0) & (low != 0))
    order, group, starts, count, exponent = np.empty((5, N), np.int64)
    v, outside, cube, root, gain, scales, undo_scales = np.empty((7, N))
    plans.groups(low, high, by_range, order, group, starts, count)
    plans.reflectors(low, high, order, group, starts, count, v, outside, cube, exponent)
    plans.scales_of(low, high, order, count, np.cbrt(cube), exponent, root, gain, scales,
                    undo_scales)
    return order, group, starts, count, v, outside, exponent, root, gain, scales, undo_scales


class Householder:
    """The row transform T of BHQ, by group sums: y = Q · diag(s) · x in each group.

    Q = I − 2vvᵀ/vᵀv, v = e₁ − 1/√n.
    s₁ = (λ₁/√n)^(−1/3) for the leader, s₂ = (λ₂ · max|Q| / (n − 1))^(−1/3) for the others, λ₂ the
    range of the largest of them; in units of 2^exponent, exponent the binary exponent of λ₁, so
    that T(2ᵏx) = 2ᵏT(x) to the bit.
    low, high  (N,) float64, the rows' ranges
    """

    def __init__(self, low: Array, high: Array):
        compiled = array_module(low) is np and choice.instructions() != "numpy"
        found = compiled_reflections(low, high) if compiled else reflections(low, high)
        (self.order, self.group, self.starts, self._count, self._v, self._outside, self.exponent,
         self._root, self._gain, self.scales, self.undo_scales) = found

    @property
    def n(self) -> Array:
        """Size of each mixed row's group.  (N,) float64."""
        return self._count[self.group].astype("float64")

    def apply(self, x: Array) -> Array:
        """T·x, (N, …), rows in mixed order, in x's dtype."""
        return self._scaled(x, self.scales)

    def apply_rescaled(self, x: Array) -> tuple[Array, Array]:
        """T·x / 2^exponent and the exponent (N, 1): near 1 whatever the size of x."""
        scales = array_module(x).ldexp(self.scales, -self.exponent)
        mixed = Mixed(x, self, scales) if suits(x) else self._scaled(x, scales)
        return mixed, self.exponent[:, None]

    def undo(self, y: Array) -> Array:
        """T⁻¹·y = diag(1/s) · Q · y, rows back in the samples' order, in y's dtype."""
        if suits(y):
            return Mixed(y, self, to_samples=True).form()
        if array_module(y) is np:
            return reflect.undo(y, self._reflection, self.order, self.undo_scales)

        def unmixed(y):
            y = self._reflect(y.astype("float64"))
            y *= self.undo_scales[:, None]
            return y

        return self._by_rows(y, self.order, unmixed)

    def _scaled(self, x, scales):
        if suits(x):
            return Mixed(x, self, scales).form()
        if array_module(x) is np:
            return reflect.apply(x, self._reflection, self.order, scales)
        return self._by_rows(
            x, slice(None), lambda x: self._reflect(x[self.order] * scales[:, None]))

    @cached_property
    def largest(self) -> int:
        """Rows of the largest group."""
        return int(self._count.max())

    @cached_property
    def _reflection(self):
        starts, root, gain, v, *_ = self.plan
        return reflect.Reflection(starts[:-1], np.diff(starts), root, gain, v)

    @cached_property
    def plan(self):
        """starts, root, gain, v, target, after: what a kernel needs to undo T (mixing.reflect)."""
        groups = self.group[-1] + 1
        return (np.append(self.starts[:groups], len(self.order)), self._root[:groups],
                self._gain[:groups], self._v, self.order, self.undo_scales)

    def undo_squared(self, v: Array) -> Array:
        """(T⁻¹)²·v, squared element by element, float64.

        Q² is 1/n between a leader and anyone, (δ − 1/(n − √n))² between small rows.
        """
        leads = (array_module(v).arange(len(self.group)) == self.starts[self.group])[:, None]
        n, outside = self.n[:, None], self._outside[:, None]

        def squared(part):
            sums, first = (per_group[self.group] for per_group in self._group_sums(part))
            small = first / n + outside**2 * (sums - first - part) + (1 - outside) ** 2 * part
            mixed = array_module(v).where(leads, sums / n, small)
            return mixed * self.undo_scales[:, None] ** 2

        return self._by_rows(v.astype("float64"), self.order, squared)

    def _reflect(self, y):
        """Q·y = y − v · (y₁ − Σy/√n) / (1 − 1/√n) in each group, in place.  (N, D) float64."""
        sums, c = self._group_sums(y)
        sums *= self._root[:len(sums), None]
        c -= sums
        c *= self._gain[:len(sums), None]
        change = c[self.group]
        change *= self._v[:, None]
        y -= change
        return y

    def _group_sums(self, y):
        """Σy and y₁ of each group.  (groups, D) twice."""
        sums = segment_sum(y, self.starts)
        return sums, y[self.starts[:len(sums)].clip(0, len(y) - 1)]

    def _by_rows(self, x, rows, function):
        """function of (N, D), float64, put into these rows and rounded once to x's dtype."""
        flat = x.reshape(len(x), -1)
        out = array_module(x).empty(flat.shape, x.dtype)
        out[rows] = function(flat)
        return out.reshape(x.shape)


class Mixed(Lazy):
    """T·x for a T with these scales, or T⁻¹·x, on a CPU; quantized without an array of it.

    x (N, …) float32;  scales (N,) float64, of the mixed rows
    """

    def __init__(self, x, mix: Householder, scales=None, to_samples=False):
        super().__init__(x.shape)
        self.x, self.mix, self.scales, self.to_samples = images(x), mix, scales, to_samples

    def form(self) -> np.ndarray:
        """Its numbers, with their rows' ranges.  (N, …)."""
        (N, D), (*groups, order, undo_scales) = self.x.shape, self.mix.plan
        rows, ones = np.arange(N), np.ones(N)
        operands = ((rows, ones, *groups, order, undo_scales) if self.to_samples else
                    (order, self.scales, *groups, rows, ones))
        # Columns are cut for the threads where groups are few.
        parts = max(1, min(-(-32 // len(groups[1])), D // mixing.CHUNK))
        y, ranges = blank(self.shape), np.empty((2, N, parts), np.float32)
        share(mixing.reflect, self.x, *operands, parts, images(y), ranges)
        y.summary = Summary(ranges, None)
        return y

    def quantized(self, bins: int, stream: Stream) -> tuple[np.ndarray, ...] | None:
        """Codes (N, D), scale and zero (N,) of T·x / 2^exponent, in one pass over x.

        None where groups are too large for a cache or for the threads to share, where a row must be
        rescaled (affine.rescaled) and where the stream makes its noise in its own way.
        """
        (N, D), (starts, root, gain, v, order, _) = self.x.shape, self.mix.plan
        largest, source = self.mix.largest, stream.source()
        room = max(3, ROOM // (4 * D))
        if source is None or largest > room or 2 * threads() * largest > N:
            return None
        codes, grids = empty((N, D), "uint8"), np.empty((3, N), np.float32)
        share(mixing.reflect_and_round, empty((threads(), room, D)), self.x, rounding_of(self.x),
              order, self.scales, starts, root, gain, v, bins, self.mix.exponent, *source, grids,
              codes)
        return (codes, *grids[1:]) if grids[1].all() else None
