"""Block Householder quantizer: spread each large row over small ones, round, gather it again.

A sample whose gradient is large would need a coarse grid of its own; reflected into a group of n
rows it costs 1/n of the variance. The plain dense form is kernels/reference.bhq_transform; here
nothing is larger than N × D.
"""
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from minifqt.backend import Array, array_module, empty, segment_sum, threads
from minifqt.kernels import reflect
from minifqt.kernels.cpu import choice
from minifqt.kernels.rounding import rounding_of
from minifqt.kernels.seen import Summary, blank, images, suits
from minifqt.qtensor import QTensor
from minifqt.quantizers.affine import as_rows, finite_ranges, grid, range_parts, require_finite
from minifqt.quantizers.base import Quantizer, register
from minifqt.rng import Stream

if choice.numba is not None:
    from minifqt.kernels.cpu import mixing
    from minifqt.kernels.cpu.householder import plan
    from minifqt.kernels.cpu.team import share

ROOM = 1 << 20                                            # bytes of a group's mixed rows, in cache


@register("bhq")
class BHQ(Quantizer):
    """T = Q · diag(s) in groups of one large row and many small; then each mixed row its own range.

    Var x̂_ij = Σ_r (T⁻¹)²_ir scale_r² p(1 − p)_rj ≤ D/4 · Σ_r scale_r² ‖T⁻¹e_r‖².
    Source: arXiv 2010.14298, the block Householder quantizer; grouping, scales and re-ranging as in
    the authors' code. Departs: fewer than 3 rows are PSQ; zero rows come back as exact zeros;
    constant rows stay out of groups and are exact. May enter dgrad alone.
    """
    per_sample = True

    def __call__(self, x: Array, stream: Stream) -> QTensor:
        mix = householder(x, stream)
        found = self._in_cache(mix, x, stream)
        if found is None:
            g, rows = self._grid(mix, x), (len(x),) + (1,) * (x.ndim - 1)
            found = g.codes(stream, x.shape, self.bins), g.scale.reshape(rows), g.zero.reshape(rows)
        return QTensor(*found, mix, stream.name)

    def variance(self, x: Array) -> Array:
        """(T⁻¹)² · scale² p(1 − p).  float64, shape of x."""
        mix = householder(x)
        return mix.undo_squared(self._grid(mix, x).variance(self.bins)).reshape(x.shape)

    def bound(self, x: Array) -> float:
        """D/4 · Σ_r scale_r² ‖T⁻¹e_r‖².  # sync"""
        mix = householder(x)
        return float(mix.undo_squared(self._grid(mix, x).bound()).sum())

    def _grid(self, mix, x):
        mixed = mix.apply_rescaled(as_rows(x, len(x)))
        return grid(mixed, *finite_ranges(mixed, len(x)), self.bins, mix.exponent[:, None])

    def _in_cache(self, mix, x, stream):
        """Codes, scale and zero of T·x / 2^exponent, on a CPU, in one pass over x.

        None where groups are too large for a cache or for the threads to share, where a row must be
        rescaled (affine.rescaled) and where the stream makes its noise in its own way.
        """
        source = stream.source()
        if source is None or not suits(x):
            return None
        N, (largest, starts, order, _) = len(x), mix.plan
        if largest > max(3, ROOM // (4 * x.size // N)) or 2 * threads() * largest > N:
            return None
        rows, codes = images(x), empty(x.shape, "uint8")
        grids = np.empty((3, N) + (1,) * (x.ndim - 1), np.float32)
        share(mixing.reflect_and_round, rows, rounding_of(rows), order, mix.rescaled, starts,
              largest, self.bins, mix.exponent, *source, grids.reshape(3, N), codes.reshape(N, -1))
        return (codes, grids[1], grids[2]) if grids[1].all() else None


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
    order = xp.argsort(xp.where(alone, 1, -ranges), kind="stable")
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


def reflections(low: Array, high: Array) -> tuple[Array, ...]:
    """What Householder is made of, for rows of these ranges, (N,) float64 each."""
    xp, N = array_module(low), len(low)
    ranges, row = high - low, xp.arange(N)
    order, group = groups(ranges, (ranges == 0) & (low != 0))
    starts = xp.searchsorted(group, xp.arange(N + 1), side="left")
    first = starts[group]                                 # each mixed row's leader
    n = (starts[group + 1] - first).astype("float64")
    large, small = ranges[order[first]], ranges[order[xp.minimum(first + 1, N - 1)]]
    exponent = xp.where(large > 0, xp.frexp(large)[1], 0)
    large, small = (xp.ldexp(large, -exponent),
                    xp.ldexp(xp.maximum(small, 1e-30 * large), -exponent))
    outside = 1 / xp.where(n > 1, n - xp.sqrt(n), 1)      # −Q between two small rows
    highest = xp.where(n == 2, xp.sqrt(0.5),
                       xp.maximum(xp.maximum(outside, abs(1 - outside)), 1 / xp.sqrt(n)))
    cube = xp.where(row == first, large / xp.sqrt(n), small * highest / xp.maximum(n - 1, 1))
    cube = xp.where(n > 1, cube, 1)                       # s⁻³, in units of 2^exponent
    room = xp.where(exponent > 118, 32, 0)                # or a scale near 2¹²⁸ would overflow
    scales, exponent = xp.ldexp(inverse_cube_root(cube), -room), exponent - room
    zero_rows = ((low == 0) & (high == 0))[order]
    undo_scales = xp.where(zero_rows, 0.0, 1 / scales)    # what is 0 stays 0
    return order, starts, exponent, scales, xp.ldexp(scales, -exponent), undo_scales


def inverse_cube_root(x: Array) -> Array:
    """x^(−1/3) to 1.3 units in the last place, the same bits everywhere, as no library's cbrt.

    Newton's y ← y + y (1 − x y³) / 3 from a straight line over ½ ≤ x < 4, 15% off at most.
    """
    xp = array_module(x)
    m, e = xp.frexp(x)
    third = e // 3
    m = xp.ldexp(m, e - 3 * third)
    y = 1.2 - 0.16 * m
    for _ in range(5):                                    # the error e becomes 2 e²
        y = y + y / 3 * (1 - m * y * (y * y))
    return xp.ldexp(y, -third)


def compiled_reflections(parts: np.ndarray) -> tuple:
    """`reflections` from minima and maxima of parts of rows, (2, N, parts) float32, in one call.

    And how many groups there are and rows of the largest: 0, 0 where a range is not finite.
    """
    N = parts.shape[1]
    (order, exponent), starts = np.empty((2, N), np.int64), np.empty(N + 1, np.int64)
    found = order, starts, exponent, *np.empty((3, N))
    return *found, plan(parts, *found)


def householder(x: Array, stream: Stream | None = None) -> "Householder":
    """T for the rows of x (N, …).  NonFiniteError names the stream or "x"."""
    if not suits(x):
        low, high = finite_ranges(x, len(x), stream)[:, :, 0].astype("float64")
        return Householder(*reflections(low, high))
    *found, sizes = compiled_reflections(range_parts(x, len(x)))
    require_finite(sizes[0] > 0, stream)
    mix = Householder(*found)
    mix.sizes = sizes                                     # known already
    return mix


@dataclass(eq=False)
class Householder:
    """The row transform T of BHQ, by group sums: y = Q · diag(s) · x in each group.

    Q = I − 2vvᵀ/vᵀv, v = e₁ − 1/√n.
    s₁ = (λ₁/√n)^(−1/3) for the leader, s₂ = (λ₂ · max|Q| / (n − 1))^(−1/3) for the others, λ₂ the
    range of the largest of them; in units of 2^exponent, exponent the binary exponent of λ₁, so
    that T(2ᵏx) = 2ᵏT(x) to the bit.
    """

    order: Array                                          # (N,) mixed row j is row order[j]
    starts: Array                                         # (N + 1,) of groups; N behind the last
    exponent: Array                                       # (N,) of mixed rows, as the rest
    scales: Array
    rescaled: Array                                       # scales / 2^exponent
    undo_scales: Array                                    # 1 / scales, 0 for a zero row

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """How many groups there are, and rows of the largest.  # sync"""
        counts = np.diff(self.starts)
        return int((counts > 0).sum()), int(counts.max())

    @cached_property
    def group(self) -> Array:
        """Which group each mixed row is in, 0, 1, ….  (N,)."""
        xp = array_module(self.starts)
        return xp.searchsorted(self.starts, xp.arange(len(self.order)), side="right") - 1

    @property
    def n(self) -> Array:
        """Size of each mixed row's group.  (N,) float64."""
        return array_module(self.starts).diff(self.starts)[self.group].astype("float64")

    @cached_property
    def _leads(self):
        """Which mixed rows lead their groups.  (N, 1) bool."""
        return array_module(self.group).diff(self.group, prepend=-1)[:, None] > 0

    def apply(self, x: Array) -> Array:
        """T·x, (N, …), rows in mixed order, in x's dtype."""
        return self._scaled(x, self.scales)

    def apply_rescaled(self, x: Array) -> Array:
        """T·x / 2^exponent: near 1 whatever the size of x."""
        return self._scaled(x, self.rescaled)

    def undo(self, y: Array) -> Array:
        """T⁻¹·y = diag(1/s) · Q · y, rows back in the samples' order, in y's dtype."""
        if suits(y):
            return self._compiled(y, after=(self.order, self.undo_scales))
        if array_module(y) is np:
            return reflect.undo(y, self._reflection, self.order, self.undo_scales)

        def unmixed(y):
            y = self._reflect(y.astype("float64"))
            y *= self.undo_scales[:, None]
            return y

        return self._by_rows(y, self.order, unmixed)

    def _scaled(self, x, scales):
        if suits(x):
            return self._compiled(x, before=(self.order, scales))
        if array_module(x) is np:
            return reflect.apply(x, self._reflection, self.order, scales)
        return self._by_rows(
            x, slice(None), lambda x: self._reflect(x[self.order] * scales[:, None]))

    def _compiled(self, x, before=None, after=None):
        """mixing.reflect: it knows its rows' ranges."""
        (N, D), groups = images(x).shape, self.sizes[0]
        as_they_are = np.arange(N), np.ones(N)
        parts = max(1, min(-(-32 // groups), D // mixing.CHUNK))  # of columns, for the threads
        y, ranges = blank(x.shape), np.empty((2, N, parts), np.float32)
        share(mixing.reflect, images(x), *(before or as_they_are), self.starts[:groups + 1],
              *(after or as_they_are), parts, images(y), ranges)
        y.summary = Summary(ranges, None)
        return y

    @cached_property
    def _reflection(self):
        return reflect.Reflection(self.starts[:self.sizes[0] + 1])

    @property
    def plan(self) -> tuple:
        """largest, starts, target, after: what a kernel needs to undo T (sums.correlate_gated)."""
        groups, largest = self.sizes
        return largest, self.starts[:groups + 1], self.order, self.undo_scales

    def undo_squared(self, v: Array) -> Array:
        """(T⁻¹)²·v, squared element by element, float64.

        Q² is 1/n between a leader and anyone, (δ − 1/(n − √n))² between small rows.
        """
        xp, n = array_module(v), self.n[:, None]
        outside = 1 / xp.where(n > 1, n - xp.sqrt(n), 1)

        def squared(part):
            sums, first = (per_group[self.group] for per_group in self._group_sums(part))
            small = first / n + outside**2 * (sums - first - part) + (1 - outside) ** 2 * part
            return xp.where(self._leads, sums / n, small) * self.undo_scales[:, None] ** 2

        return self._by_rows(v.astype("float64"), self.order, squared)

    def _reflect(self, y):
        """Q·y = y − v · (y₁ − Σy/√n) / (1 − 1/√n) in each group, in place.  (N, D) float64."""
        xp, (sums, c) = array_module(y), self._group_sums(y)
        root = 1 / xp.sqrt(xp.maximum(xp.diff(self.starts), 1))[:len(sums), None]
        sums *= root
        c -= sums
        c *= 1 / xp.where(root < 1, 1 - root, 1)
        change = c[self.group]
        change *= self._leads - root[self.group]          # v
        y -= change
        return y

    def _group_sums(self, y):
        """Σy and y₁ of each group.  (groups, D) twice."""
        sums = segment_sum(y, self.starts[:-1])
        return sums, y[self.starts[:len(sums)].clip(0, len(y) - 1)]

    def _by_rows(self, x, rows, function):
        """function of (N, D), float64, put into these rows and rounded once to x's dtype."""
        flat = x.reshape(len(x), -1)
        out = array_module(x).empty(flat.shape, x.dtype)
        out[rows] = function(flat)
        return out.reshape(x.shape)
