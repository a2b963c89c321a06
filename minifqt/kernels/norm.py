"""Sums over batch and pixels, and batch normalisation both ways, with the ReLU behind it or alone.

Sums are float64, in an order cut by shape, and rounded once: the same for any number of threads.
Each function shows the plain formula for arrays on a GPU; on a CPU it is compiled, or runs in
blocks that fit a cache, with the same float operations in the same order (sums in one of their own:
a variance far below its mean's square may differ in its last digits).
"""
import numpy as np

from minifqt.backend import Array, array_module, empty, map_blocks, scratch
from minifqt.kernels.cpu import choice
from minifqt.kernels.seen import Lazy, Seen, Summary, blank, images, suits, summary

if choice.numba is not None:
    from minifqt.kernels.cpu import channels, codes, norms, scales
    from minifqt.kernels.cpu.team import begin, share

_BLOCK = 1 << 18                                          # elements
NOTHING = np.empty((0, 0), np.float32)


def channel_sum(x: Array) -> Array:
    """Σ over all axes but the last.  (…, C) → (C,) float64."""
    if suits(x):
        return summary(x).sums[0].sum(axis=0)
    return sums(x)[0]


def statistics(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel.  (…, C) → (C,), (C,) in x's dtype.

    One pass suffices: float64 loses no more digits of the variance of float32 numbers than their
    own rounding has lost, where their mean is many standard deviations.
    """
    count = x.size // x.shape[-1]
    if suits(x):
        mean, var = np.empty((2, x.shape[-1]), np.float32)
        channels.moments(summary(x).sums, count, mean, var)
        return mean, var
    s1, s2 = sums(x)
    return ((s1 / count).astype(x.dtype),
            array_module(x).maximum(s2 / count - (s1 / count) ** 2, 0).astype(x.dtype))


def scaling(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, running: tuple, eps: float,
            momentum: float) -> tuple[np.ndarray, np.ndarray]:
    """BatchNorm2d.scaling in training, compiled: what Normalized takes, and `running` moved.

    x (…, C) that suits, of two numbers a channel or more; the rest (C,).  Returns (4, run), (2, C)
    """
    C = x.shape[-1]
    vectors, moved = np.empty((4, run_length(C)), np.float32), np.empty((2, C), np.float32)
    channels.scaling(summary(x).sums, x.size // C, eps, momentum, weight, bias, *running, moved,
                     vectors)
    return vectors, moved


def runs(*vectors: np.ndarray) -> np.ndarray:
    """Vectors (C,) tiled to the length of a run: (count, run)."""
    C = len(vectors[0])
    return np.tile(np.stack(vectors), run_length(C) // C).astype(np.float32, copy=False)


def run_length(C: int) -> int:
    """Numbers of a run of vectors of C channels, so long that a pass has long inner loops."""
    return max(1, norms.RUN // C) * C


def sums(x):
    """Σ x and Σ x² of each channel, float64."""
    C = x.shape[-1]
    if array_module(x) is not np:
        d = x.reshape(-1, C).astype("float64")
        return d.sum(axis=0), (d * d).sum(axis=0)
    rows = _wide(x)

    def block(part):
        d = _doubled(rows[part])
        s1 = _column_sums(d)
        return s1, _column_sums(np.multiply(d, d, out=d))

    return _by_channel(map_blocks(block, len(rows), _rows(rows)), C)


def normalize(x: Array, mean: Array, inv_std: Array, weight: Array, bias: Array) -> Array:
    """y = weight · x̂ + bias, x̂ = (x − mean) · inv_std.  x (…, C), the rest (C,)."""
    if suits(x):
        return Normalized(x, runs(mean, inv_std, weight, bias)).form()
    if array_module(x) is not np:
        return weight * ((x - mean) * inv_std) + bias
    y = empty(x.shape, x.dtype)
    rows, out = _wide(x), _wide(y)
    mean, inv_std, weight, bias = (_tile(v, x) for v in (mean, inv_std, weight, bias))

    def block(part):
        v = np.subtract(rows[part], mean, out=out[part])
        v *= inv_std
        v *= weight
        v += bias

    map_blocks(block, len(rows), _rows(rows))
    return y


def rectify(x: np.ndarray) -> tuple[Seen, np.ndarray]:
    """max(x, 0), which knows its ranges, and where x > 0.  (N, …) float32 on a CPU."""
    y, above, ranges = empty(x.shape), empty(x.shape, bool), np.empty((2, len(x), 1), np.float32)
    rows, out, mask = (v.reshape(len(x), -1) for v in (np.asarray(x), y, above))
    zeros = np.zeros(rows.shape[1], np.float32)           # a row: NumPy is slow with a single 0

    def block(part):
        np.greater(rows[part], 0, out=mask[part])
        v = np.maximum(rows[part], zeros, out=out[part])
        ranges[:, part] = v.min(axis=1, keepdims=True), v.max(axis=1, keepdims=True)

    map_blocks(block, len(rows), max(1, _BLOCK // rows.shape[1]))
    y = y.view(Seen)
    y.summary = Summary(ranges, None)
    return y, above


def backward(dy: Array, x: Array, mean: Array, inv_std: Array,
             weight: Array) -> tuple[Array, Array, Array]:
    """dx, dweight, dbias of `normalize` where mean and inv_std are those of x itself.

    dx = weight · inv_std · (dy − x̂ · mean(dy · x̂) − mean(dy)); Ioffe & Szegedy 2015, section 3.
    """
    xp, C, count = array_module(dy), dy.shape[-1], dy.size // dy.shape[-1]
    if suits(dy) and suits(x):
        dx, dweight, dbias = Normalized(x, runs(mean, inv_std, weight, 0 * weight)).backward(dy)
        return dx.form(), dweight, dbias
    if xp is not np:
        normal = (x - mean) * inv_std
        dbias, dweight = (v.reshape(-1, C).sum(axis=0, dtype="float64") for v in (dy, dy * normal))
        dx = ((dy - normal * (dweight / count).astype(dy.dtype)
               - (dbias / count).astype(dy.dtype)) * (weight * inv_std))
        return dx, dweight.astype(dy.dtype), dbias.astype(dy.dtype)
    rows, inputs, dx = _wide(dy), _wide(x), empty(dy.shape, dy.dtype)
    hats, out, size = _wide(empty(dy.shape, dy.dtype)), _wide(dx), _rows(rows)
    mean, wide_inv = _tile(mean, dy), _tile(inv_std, dy)

    def partial(part):
        hat = np.subtract(inputs[part], mean, out=hats[part])
        hat *= wide_inv
        s1 = _column_sums(_doubled(rows[part]))
        return s1, _column_sums(_doubled(np.multiply(rows[part], hat, out=out[part])))

    dbias, dweight = _by_channel(map_blocks(partial, len(rows), size), C)
    mean_dy, mean_dy_hat, gain = (_tile(v.astype(dy.dtype), dy)
                                  for v in (dbias / count, dweight / count, weight * inv_std))

    def block(part):
        v = np.multiply(hats[part], mean_dy_hat, out=out[part])
        np.subtract(rows[part], v, out=v)
        v -= mean_dy
        v *= gain

    map_blocks(block, len(rows), size)
    return dx, dweight.astype(dy.dtype), dbias.astype(dy.dtype)


class Normalized(Lazy):
    """`normalize`, and perhaps the ReLU behind it, not computed yet.

    x (N, …, C) float32;  vectors (4, run): mean, inv_std, weight, bias as `runs`
    The activation quantizer rounds it without forming it, and batch norm's backward is its own.
    """

    def __init__(self, x, vectors, floor=-np.inf, source=None):
        super().__init__(x.shape)
        self.x, self.vectors, self.floor, self.source = x, vectors, np.float32(floor), source

    def rectified(self) -> "Normalized":
        """max(this, 0); its `source` is this."""
        return Normalized(self.x, self.vectors, floor=0, source=self)

    def form(self) -> np.ndarray:
        """Its numbers.  (N, …, C)."""
        y = blank(self.shape)
        share(norms.normalize, *self.operands(), images(y))
        return y

    def pixel_mean(self) -> np.ndarray:
        """Mean over pixels, as pool.mean_forward finds it.  (N, C)."""
        N, C = self.shape[0], self.shape[-1]
        y = np.empty((N, C), np.float32)
        share(norms.pixel_means, *self.operands(), y)
        return y

    def astype(self, dtype, copy=True):
        """Itself as float32, else an array."""
        return self if dtype == self.dtype and not copy else super().astype(dtype, copy)

    def rounded(self, rounding: tuple, out: np.ndarray):
        """Begins to write its codes (N, D); call the result to end that (team.begin).

        rounding  as codes.round_rows takes it, of one row
        """
        return begin(codes.round_normalized, *self.operands(), *rounding, out)

    def operands(self):
        """What the passes take: x (N, D), vectors (4, run), floor."""
        return images(self.x), self.vectors, self.floor

    @property
    def summary(self) -> Summary:
        """Its ranges over all images, (2, 1, C), exact: rounding is monotone, extremes stay so."""
        ranges = summary(self.x).ranges
        found = np.empty((2, 1, ranges.shape[2]), np.float32)
        scales.normalized_ranges(ranges, self.vectors, self.floor, found)
        return Summary(found, None)

    def backward(self, dy) -> tuple[Lazy, np.ndarray, np.ndarray]:
        """dx, dweight, dbias as above; dy counts where this is above its floor."""
        x, vectors, floor = self.operands()
        C, count = self.shape[-1], self.size // self.shape[-1]

        def gated():
            if isinstance(dy, Lazy):
                return dy.gated(x, vectors, floor)
            g, sums = blank(self.shape), np.empty((2, len(dy), C))
            share(norms.gradient_sums, images(dy), x, vectors, floor, C, images(g), sums)
            return g, sums

        g, sums = gated()
        dbias, dweight = totals = np.empty((2, C), np.float32)
        slopes = np.empty((3, vectors.shape[1]), np.float32)
        channels.slopes(sums, count, vectors, totals, slopes)
        return NormGradient(g, gated, x, vectors, slopes), dweight, dbias


class NormGradient(Lazy):
    """dx of a batch norm, not computed yet: a residual's gradient is added in the same pass.

    g, again  dy where it counts, whose memory dx takes: what is written is then read anyway; and
              what computes it once more (and its sums)
    """

    def __init__(self, g, again, *operands):
        super().__init__(g.shape)
        self.g, self.again, self.operands = g, again, operands

    def form(self):
        """dx.  (N, …, C)."""
        return self.plus(NOTHING)

    def plus(self, other):
        """dx + other."""
        g, self.g = self.g, None                          # the first time only
        dx = (self.again()[0] if g is None else g).view(Seen)
        ranges = np.empty((2, len(self), 1), np.float32)
        share(norms.gradient, images(dx), *self.operands,
              images(other) if other.size else other, ranges)
        dx.summary = Summary(ranges, None)
        return dx


def _wide(x):
    """(N, H, W, C) as rows of W · C numbers, a view of a C-ordered x.

    Long runs, so that per-channel factors repeat inside them.
    """
    width = x.shape[-2] * x.shape[-1] if x.ndim == 4 else x.shape[-1]
    return np.asarray(x).reshape(-1, width)


def _doubled(rows):
    """The same in float64; scratch."""
    d = scratch("doubled", rows.shape, "float64")
    d[...] = rows
    return d


def _column_sums(d):
    return np.ones(len(d)) @ d                            # BLAS is the fastest to sum


def _by_channel(sums, C):
    """Σ over blocks and pixels of so many sums of rows' columns.  Each (C,) float64."""
    return [sum(some).reshape(-1, C).sum(axis=0) for some in zip(*sums, strict=True)]


def _tile(v, x):
    return np.tile(v, x.shape[2]) if x.ndim == 4 else v


def _rows(rows):
    return max(16, _BLOCK // rows.shape[1] // 16 * 16)
