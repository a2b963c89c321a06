"""A convolution's three products: laws checked here, sums in cpu/ or blas.py (plain: reference).

Weights do not vary along their taps, images not along their pixels: a patch gathers pixels, so
every axis but the one that survives in the result is contracted.
"""
import numpy as np

from minifqt.backend import array_module, begun, threads
from minifqt.kernels.gemm import alike, products, require_shape, sums_of
from minifqt.kernels.reference import output_size
from minifqt.kernels.seen import Lazy, Seen, images
from minifqt.qtensor import QTensor, common_dtype, require_factorable, require_unmixed


def fprop(x: QTensor, w: QTensor, stride: int, padding: int, lazily: bool = False):
    """x (N, H, W, C), w (K, R, S, C) → (N, P, Q, K), contracts R, S, C.

    lazily  a Product if it is compiled: computed by whoever reads it
    """
    require_unmixed("fprop", x)
    require_unmixed("fprop", w)
    require_factorable("fprop", x, (1, 2, 3))
    require_factorable("fprop", w, (1, 2, 3))
    require_shape("fprop", w, w.shape[:3] + x.shape[3:])
    output_size(x.shape[1:3], w.shape[1:3], stride, padding, x.name)
    sums, (x, w) = sums_of(x, w), alike(x, w)
    if lazily and sums is products and products.fits(w):
        return Product(products.fprop(x, w, stride, padding))
    return sums.conv_fprop(x, w, stride, padding)


def wgrad(g: QTensor, x: QTensor, kernel: tuple, stride: int, padding: int, lazily: bool = False):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q.

    lazily  a float32 WeightGradient on a CPU: other threads fill their free time with it
    """
    require_unmixed("wgrad", g)
    require_unmixed("wgrad", x)
    require_factorable("wgrad", g, (0, 1, 2))
    require_factorable("wgrad", x, (0, 1, 2))
    out = output_size(x.shape[1:3], kernel, stride, padding, x.name)
    require_shape("wgrad", g, (x.shape[0], *out, g.shape[3]))
    sums, (g, x) = sums_of(g, x), alike(g, x)
    work = g, x, kernel, stride, padding
    on_cpu = array_module(g.codes) is np and common_dtype(g, x) == "float32"
    if lazily and on_cpu and threads() > 1:
        end = (products.begin_wgrad(*work) if sums is products else
               begun(sums.conv_wgrad, *work))
        return WeightGradient((g.shape[3], *kernel, x.shape[3]), end)
    return sums.conv_wgrad(*work)


def dgrad(g: QTensor, w: QTensor, size: tuple, stride: int, padding: int, lazily: bool = False):
    """g (N, P, Q, K), w (K, R, S, C) → (N, *size, C), contracts R, S, K; then rows unmixed."""
    require_unmixed("dgrad", w)
    require_factorable("dgrad", g, (1, 2, 3))
    require_factorable("dgrad", w, (0, 1, 2))
    out = output_size(size, w.shape[1:3], stride, padding, g.name)
    require_shape("dgrad", g, (g.shape[0], *out, w.shape[0]))
    sums, (g, w) = sums_of(g, w), alike(g, w)
    compiled = g.mix is None or hasattr(type(g.mix), "plan")   # else g.mix alone unmixes them
    if lazily and compiled and sums is products and products.fits(w):
        return Product(products.dgrad(g, w, size, stride, padding))
    dx = sums.conv_dgrad(g, w, size, stride, padding)
    return dx if g.mix is None else g.mix.undo(dx)


class WeightGradient(Lazy):
    """A wgrad under way; who reads it ends it."""

    def __init__(self, shape, end):
        super().__init__(shape)
        self._end = end

    def form(self):
        """Its numbers; what they were made of is let go."""
        end, self._end = self._end, None
        return end()


class Product(Lazy):
    """A compiled convolution, set up and not yet computed, plus perhaps a residual (N, D)."""

    def __init__(self, correlation, residual=None):
        super().__init__(correlation.shape)
        self.correlation, self.residual = correlation, residual

    def form(self):
        """Its numbers, summarized unless rows were mixed."""
        if self.correlation.mix is None:
            return self.correlation.form(self.residual)
        return self.correlation.form_unmixed(self.residual)[0].view(Seen)

    def plus(self, other):
        """A product with this residual; its numbers plus others, where it has one already."""
        if self.residual is not None:
            return super().plus(other)
        return Product(self.correlation, images(other))

    def gated(self, x, norm, floor):
        """Its numbers, and Σ g and Σ g · x̂ of them (norms.gradient_sums)."""
        return self.correlation.form_unmixed(self.residual, x, norm, floor)
