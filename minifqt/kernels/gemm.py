"""A linear layer's three products: laws checked here, sums in cpu/ or blas.py; see reference.py."""
import numpy as np

from minifqt.backend import array_module
from minifqt.kernels import blas
from minifqt.kernels.cpu import choice
from minifqt.qtensor import QTensor, as_floats, common_dtype, require_factorable, require_unmixed

products = None
if choice.numba is not None:
    from minifqt.kernels.cpu import products


def fprop(x: QTensor, w: QTensor):
    """x wᵀ.  x (N, I), w (O, I) → (N, O), contracts I."""
    require_unmixed("fprop", x)
    require_unmixed("fprop", w)
    require_factorable("fprop", x, (1,))
    require_factorable("fprop", w, (1,))
    require_shape("fprop", w, (w.shape[0], x.shape[1]))
    return sums_of(x, w).matmul(*alike(x, w))


def wgrad(g: QTensor, x: QTensor):
    """gᵀ x.  g (N, O), x (N, I) → (O, I), contracts N."""
    require_unmixed("wgrad", g)
    require_unmixed("wgrad", x)
    require_factorable("wgrad", g, (0,))
    require_factorable("wgrad", x, (0,))
    require_shape("wgrad", g, (x.shape[0], g.shape[1]))
    g, x = alike(g, x)
    return sums_of(g, x).matmul(g.transposed(), x.transposed())


def dgrad(g: QTensor, w: QTensor):
    """g w, then rows unmixed.  g (N, O), w (O, I) → (N, I), contracts O."""
    require_unmixed("dgrad", w)
    require_factorable("dgrad", g, (1,))
    require_factorable("dgrad", w, (0,))
    require_shape("dgrad", g, (g.shape[0], w.shape[0]))
    g, w = alike(g, w)
    dx = sums_of(g, w).matmul(g, w.transposed())
    return dx if g.mix is None else g.mix.undo(dx)


def require_shape(product: str, t: QTensor, expected: tuple) -> None:
    """ValueError unless t has the shape that the other operand asks for."""
    if t.shape != expected:
        raise ValueError(f"{product}: {t.name} has shape {t.shape}; expected {expected}. "
                         "A gradient has the shape of its layer's last output.")


def alike(a: QTensor, b: QTensor):
    """Both as they are if both are integers; beside an Identity operand both as floats."""
    if a.is_integer and b.is_integer:
        return a, b
    dtype, compiled = common_dtype(a, b), sums_of(a, b) is products
    return tuple(as_floats(products.dequantized(t) if compiled else t, dtype) for t in (a, b))


def sums_of(a: QTensor, b: QTensor):
    """The module that multiplies these two: compiled on a CPU that can, but float64 by BLAS."""
    compiled = choice.isa() and array_module(a.codes) is np and common_dtype(a, b) == "float32"
    return products if compiled else blas
