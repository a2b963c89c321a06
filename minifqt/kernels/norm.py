"""Sums over batch and pixels, and batch normalisation both ways, with the ReLU behind it or alone.

Sums are float64, in an order cut by shape, and rounded once: the same for any number of threads.
Each function shows the plain formula for arrays on a GPU and for float64; else, on a CPU, it is
compiled, or in blocks.py, with the same float operations in the same order (sums in one of their
own: a variance far below its mean's square may differ in its last digits).
"""
import numpy as np

from minifqt.backend import Array, array_module
from minifqt.kernels import blocks
from minifqt.kernels.cpu import choice
from minifqt.kernels.seen import Lazy, Seen, Summary, blank, images, is_images, suits, summary

if choice.numba is not None:
    from minifqt.kernels.cpu import channels, codes, norms, scales
    from minifqt.kernels.cpu.team import begin, share

NOTHING = np.empty((0, 0), np.float32)


def channel_sum(x: Array) -> Array:
    """Σ over all axes but the last.  (…, C) → (C,) float64."""
    return _sums(x)[0]


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
    s1, s2 = _sums(x)
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
    """Numbers of a run of vectors of C channels: so many that a compiled pass has long loops."""
    return max(1, norms.RUN // C) * C if choice.numba is not None else C


def _sums(x):
    """Σ x and Σ x² of each channel, float64."""
    if is_images(x):
        return summary(x).sums.sum(axis=1)
    d = x.reshape(-1, x.shape[-1]).astype("float64")
    return d.sum(axis=0), (d * d).sum(axis=0)


def normalize(x: Array, mean: Array, inv_std: Array, weight: Array, bias: Array) -> Array:
    """y = weight · x̂ + bias, x̂ = (x − mean) · inv_std.  x (…, C), the rest (C,)."""
    if is_images(x):
        return Normalized(x, runs(mean, inv_std, weight, bias)).form()
    return weight * ((x - mean) * inv_std) + bias


def backward(dy: Array, x: Array, mean: Array, inv_std: Array,
             weight: Array) -> tuple[Array, Array, Array]:
    """dx, dweight, dbias of `normalize` where mean and inv_std are those of x itself.

    dx = weight · inv_std · (dy − x̂ · mean(dy · x̂) − mean(dy)); Ioffe & Szegedy 2015, section 3.
    """
    C, count = dy.shape[-1], dy.size // dy.shape[-1]
    if is_images(dy) and is_images(x):
        dx, dweight, dbias = Normalized(x, runs(mean, inv_std, weight, 0 * weight)).backward(dy)
        return dx.form(), dweight, dbias
    normal = (x - mean) * inv_std
    dbias, dweight = (v.reshape(-1, C).sum(axis=0, dtype="float64") for v in (dy, dy * normal))
    dx = ((dy - normal * (dweight / count).astype(dy.dtype)
           - (dbias / count).astype(dy.dtype)) * (weight * inv_std))
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
        if self.compiled:
            share(norms.normalize, *self.operands(), images(y))
        else:
            blocks.normalize(*self.operands(), images(y))
        return y

    def pixel_mean(self) -> np.ndarray:
        """Mean over pixels, as pool.mean_forward finds it.  (N, C)."""
        if not self.compiled:
            return self.form().mean(axis=(1, 2), dtype="float64").astype("float32")
        y = np.empty((self.shape[0], self.shape[-1]), np.float32)
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

    def reader(self):
        """By NumPy alone: function((images, …), out (n, D)) → out, these images' numbers."""
        x, C = images(self.x), self.shape[-1]
        norm = blocks.tiled(self.vectors[:, :C], *blocks.cut(C, x))

        def read(at, out):
            blocks.normalize_block(*blocks.cut(C, x[at[0]]), norm, self.floor, *blocks.cut(C, out))
            return out

        return read

    @property
    def compiled(self) -> bool:
        """Whether compiled passes form it."""
        return suits(self.x)

    def operands(self):
        """What the passes take: x (N, D), vectors (4, run) or (4, C), floor."""
        vectors = self.vectors if self.compiled else self.vectors[:, :self.shape[-1]]
        return images(self.x), vectors, self.floor

    @property
    def summary(self) -> Summary:
        """Its ranges over all images, (2, 1, C), exact: rounding is monotone, extremes stay so."""
        ranges = summary(self.x).ranges
        found = np.empty((2, 1, ranges.shape[2]), np.float32)
        if self.compiled:
            scales.normalized_ranges(ranges, self.vectors, self.floor, found)
        else:
            ends = np.stack([ranges[0].min(axis=0), ranges[1].max(axis=0)])
            blocks.normalize_block(ends, self.operands()[1], self.floor, ends)
            found[:, 0] = ends.min(axis=0), ends.max(axis=0)
        return Summary(found, None)

    def backward(self, dy) -> tuple[Lazy, np.ndarray, np.ndarray]:
        """dx, dweight, dbias as above; dy counts where this is above its floor."""
        (x, vectors, _), compiled = self.operands(), self.compiled
        C, count = self.shape[-1], self.size // self.shape[-1]
        g, sums = self.gated(dy)
        dbias, dweight = totals = np.empty((2, C), np.float32)
        slopes = np.empty((3, vectors.shape[1]), np.float32)
        if compiled:
            channels.slopes(sums, count, vectors, totals, slopes)
        else:
            totals[:] = exact = sums.sum(axis=1)
            slopes[:2], slopes[2] = exact / count, vectors[2] * vectors[1]
        dx = NormGradient(compiled, g, lambda: self.gated(dy)[0], x, vectors, slopes)
        return dx, dweight, dbias

    def gated(self, dy) -> tuple[Seen, np.ndarray]:
        """g = dy where this is above its floor, else 0; Σ g and Σ g · x̂, (2, parts, C) float64."""
        if isinstance(dy, Lazy):
            return dy.gated(*self.operands())
        g = blank(self.shape)
        if not self.compiled:
            return g, blocks.gradient_sums(images(dy), *self.operands(), images(g))
        sums = np.empty((2, len(dy), self.shape[-1]))
        share(norms.gradient_sums, images(dy), *self.operands(), self.shape[-1], images(g), sums)
        return g, sums


class NormGradient(Lazy):
    """dx of a batch norm, not computed yet: a residual's gradient is added in the same pass.

    compiled   whether compiled passes take the operands: x, vectors, slopes
    g          dy where it counts; the first dx takes its memory, which is in cache by then
    recompute  function() → g again, where dx is wanted a second time
    """

    def __init__(self, compiled, g, recompute, *operands):
        super().__init__(g.shape)
        self.compiled, self.g, self.recompute, self.operands = compiled, g, recompute, operands

    def form(self):
        """dx.  (N, …, C)."""
        return self.plus(NOTHING)

    def plus(self, other):
        """dx + other."""
        g, self.g = self.g, None                          # the first time only
        dx = (self.recompute() if g is None else g).view(Seen)
        other = images(other) if other.size else other
        if self.compiled:
            ranges = np.empty((2, len(self), 1), np.float32)
            share(norms.gradient, images(dx), *self.operands, other, ranges)
        else:
            ranges = blocks.gradient(images(dx), *self.operands, other)
        dx.summary = Summary(ranges, None)
        return dx
