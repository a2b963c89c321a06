"""The integer tensor: codes, scale, zero, and laws 2 and 3: which product it may enter.

It has no arithmetic of its own beyond turning codes back into numbers. Next: kernels/reference.py.
"""
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np

from minifqt.backend import Array, array_module


class Mix(Protocol):
    """A linear transform T of rows; codes describe T·x.  All methods take and return (N, …).

    One that reflects groups of rows may have a `plan`, as BHQ's has: kernels then unmix as they go.
    """

    def apply(self, x: Array) -> Array:
        """T·x."""

    def undo(self, y: Array) -> Array:
        """T⁻¹·y, in y's dtype."""

    def undo_squared(self, v: Array) -> Array:
        """(T⁻¹)²·v, squared elementwise: Var of undo(y) for independent rows of variance v."""


@dataclass(frozen=True, eq=False)
class QTensor:
    """x̂ = scale · (codes − zero), then mix.undo(x̂) if rows were mixed.

    codes  uint8 0..B for affine quantizers, int8 for symmetric, float32 or float64 for Identity
    scale  the real size of one code step; as many axes as codes, size 1 where it does not vary
    zero   any real number of steps; axes as scale
    mix    row transform or None
    name   "layer1.0.conv1.grad_w", for messages
    Raises ValueError where the fields do not fit together.
    """

    codes: Array
    scale: Array
    zero: Array
    mix: Any = None
    name: str = "tensor"

    def __init__(self, codes, scale, zero, mix=None, name="tensor"):
        if codes.dtype.char not in "Bbfd":                # uint8, int8, float32, float64
            raise ValueError(f"{name}: codes are {codes.dtype}; "
                             "expected uint8, int8, float32 or float64.")
        misfit = _misfit(codes.shape, scale.shape, zero.shape)
        if misfit:
            raise ValueError(f"{name}: {misfit}; codes of shape {codes.shape} need as many axes, "
                             "each of size 1 or the full size.")
        vars(self).update(codes=codes, scale=scale, zero=zero, mix=mix, name=name)   # then frozen

    @property
    def shape(self) -> tuple:
        """Shape of codes."""
        return self.codes.shape

    @property
    def is_integer(self) -> bool:
        """False for Identity, whose codes are the floats themselves."""
        return self.codes.dtype.kind in "iu"

    def rows(self, dtype="float32") -> Array:
        """scale · (codes − zero), no mix undone: what a product sees. In float64, rounded once."""
        if not self.is_integer:
            return self.codes.astype(dtype, copy=False)
        return ((self.codes - self.zero.astype("float64")) * self.scale).astype(dtype)

    def dequantize(self, dtype="float32") -> Array:
        """x̂, the real numbers that the codes stand for.  (N, …) like codes."""
        rows = self.rows(dtype)
        return rows if self.mix is None else self.mix.undo(rows)

    def transposed(self) -> "QTensor":
        """The same matrix (N, D) as (D, N)."""
        return QTensor(self.codes.T, self.scale.T, self.zero.T, self.mix, self.name)


@lru_cache                                                # a step has few shapes, and many tensors
def _misfit(full, scale, zero):
    for field, shape in (("scale", scale), ("zero", zero)):
        if len(shape) != len(full) or any(
                size not in (1, most) for size, most in zip(shape, full, strict=True)):
            return f"{field} has shape {shape}"
    return None


_ADVICE = {
    "fprop": "Use a per-tensor quantizer: recipe.replace({place}=\"{spec}\").",
    "wgrad": "Use a per-tensor quantizer: recipe.replace({place}=\"ptq8\").",
    "dgrad": "Use a quantizer with one scale a tensor or a sample: "
             "recipe.replace({place}=\"{spec}\").",
}
_SPECS = {"act": "ptq8", "weight": "sym8", "grad_w": "ptq8", "grad_x": "psq8"}


def require_factorable(product: str, t: QTensor, axes: tuple) -> None:
    """Law 2: scale and zero are constant along the product's contracted axes, else ValueError."""
    if t.scale.size == t.zero.size == 1:                  # of a tensor: they vary nowhere
        return
    varying = [axis for axis in axes if t.scale.shape[axis] != 1 or t.zero.shape[axis] != 1]
    if varying:
        place = t.name.rsplit(".", 1)[-1]
        advice = _ADVICE[product].format(place=place, spec=_SPECS.get(place, "ptq8"))
        field, shape = (("scale", t.scale.shape) if t.scale.shape[varying[0]] != 1
                        else ("zero", t.zero.shape))
        raise ValueError(f"{product} contracts axes {axes} of {t.name}, but its {field}, "
                         f"shape {shape}, varies along axis {varying[0]}: "
                         f"no integer GEMM can factor it out. {advice}")


def require_unmixed(product: str, t: QTensor) -> None:
    """Law 3: mixed rows can be unmixed only in the result of dgrad, else ValueError."""
    if t.mix is not None:
        raise ValueError(f"{product} cannot take {t.name}, whose rows are mixed by "
                         f"{type(t.mix).__name__}: only dgrad keeps rows apart, so that they can "
                         "be unmixed in its result. Use a quantizer that does not mix rows.")


def common_dtype(a: QTensor, b: QTensor) -> str:
    """float32 for two integer tensors; else the widest float among the Identity operands."""
    floats = [t.codes.dtype for t in (a, b) if not t.is_integer]
    return np.result_type(*floats).name if floats else "float32"


def as_floats(t: QTensor, dtype: str) -> QTensor:
    """The same rows as float codes, scale 1, zero 0: what integers become beside an Identity."""
    xp = array_module(t.codes)
    shape = (1,) * t.codes.ndim
    return QTensor(t.rows(dtype), xp.ones(shape, dtype), xp.zeros(shape, dtype), t.mix, t.name)
