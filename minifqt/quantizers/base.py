"""What a quantizer is: `q(x, stream)` → QTensor, with its exact variance and its bound.

Also Identity, the registry and Bound. It knows no layer and no recipe. Read psq.py next, the
shortest real one.
"""
import logging
import re
from dataclasses import replace
from numbers import Integral

import numpy as np

from minifqt.backend import Array, array_module, to_cpu
from minifqt.kernels.seen import Lazy
from minifqt.qtensor import QTensor
from minifqt.rng import Stream, Streams, nearest

AUTO, START = "-auto", 8                                  # a spec's ending; bits before any choice
_REGISTRY: dict[str, type["Quantizer"]] = {}


def register(name: str):
    """Class decorator: usable at once as NAME and its bits.  ValueError for a bad or taken name."""
    if not re.fullmatch(r"[a-z]([a-z0-9_]*[a-z_])?", name):
        raise ValueError(f"quantizer name {name!r}: use lower-case letters, digits and _, "
                         "the last no digit (bits follow it).")
    if name in _REGISTRY:
        raise ValueError(f"a quantizer named {name!r} is registered already, "
                         f"{_REGISTRY[name].__name__}: choose another name.")

    def add(kind):
        kind.name, _REGISTRY[name] = name, kind
        return kind

    return add


def names() -> list[str]:
    """All registered names, in the order of registration."""
    return list(_REGISTRY)


def create(name: str, bits: int | None = None) -> "Quantizer":
    """create("bhq", bits=4), create("identity").  ValueError: unknown name or bits outside 2..8."""
    if name not in _REGISTRY:
        raise ValueError(f"no quantizer is named {name!r}; there are {', '.join(names())}.")
    return _REGISTRY[name](bits)


def parse(spec: str) -> tuple["Quantizer", str | None]:
    """"bhq4" → (BHQ(4), None); "ptq8:nearest" → (PTQ(8), "nearest").  ValueError for a bad spec.

    "bhq-auto" is BHQ(8): what an Automatic place starts from.
    """
    match = (re.fullmatch(r"([a-z][a-z0-9_]*?)(\d*|-auto)(?::(nearest|stochastic))?", spec)
             if isinstance(spec, str) else None)
    if match is None:
        raise ValueError(f"quantizer {spec!r}: expected a name and its bits, perhaps a rounding: "
                         "bhq5, ptq8:nearest, bhq-auto, identity.")
    name, bits, rounding = match.groups()
    return create(name, int(bits.replace(AUTO, str(START))) if bits else None), rounding


class Quantizer:
    """Base of all quantizers: rows are samples, an (N, …) array is an (N, D) matrix.

    A subclass defines `__call__`. It draws one 16-bit number of `stream.bits(x.shape, xp)` an
    element and adds it in fixed point (65536 to a code step); then `variance` and `bound` below are
    exact for it as they stand.
    bits  2..8.  ValueError otherwise.
    """

    name = ""
    unbiased = True                                       # E[x̂] = x under stochastic rounding
    per_sample = False                                    # a scale a row, or rows mixed: for grad_x
    reads_normalized = False                              # takes norm.Normalized as it is

    def __init__(self, bits: int | None):
        if not isinstance(bits, Integral) or not 2 <= bits <= 8:
            raise ValueError(
                f"{self.name} with bits {bits}: expected 2 to 8 bits, as in {self.name}8.")
        self.bits = bits

    @property
    def bins(self) -> int:
        """Steps from the lowest to the highest code, 2**bits − 1."""
        return 2**self.bits - 1

    def __call__(self, x: Array, stream: Stream) -> QTensor:  # noqa: ARG002 - subclasses use it
        """Codes of x (N, …) with this stream's noise.  ValueError if x is empty or not finite."""
        raise TypeError(f"{type(self).__name__} defines no __call__(x, stream).")

    def variance(self, x: Array) -> Array:
        """Exact Var of dequantize() for each element, float64, shape of x.

        The rounding is a step in the noise; where it steps is found by bisection, with 18
        quantizations. Families whose closed form is cheaper override this.
        """
        xp = array_module(x)
        lowest = self(x, _Given(xp.zeros(x.shape, "uint16")))
        # The code steps up at noise `above`, if at all.
        below, above = xp.zeros(x.shape, "int32"), xp.full(x.shape, 65536, "int32")
        for _ in range(17):
            middle = (below + above) // 2
            stepped = (self(x, _Given(xp.minimum(middle, 65535).astype("uint16"))).codes
                       > lowest.codes)
            stepped &= middle < 65536
            below, above = xp.where(stepped, below, middle), xp.where(stepped, middle, above)
        up = (65536 - above) / 65536                      # probability of the higher code
        v = lowest.scale.astype("float64") ** 2 * up * (1 - up)
        return v if lowest.mix is None else lowest.mix.undo_squared(v)

    def bound(self, x: Array) -> float:
        """Largest total variance a tensor of these scales can have: Σ (T⁻¹)² · scale² / 4.  # sync

        arXiv 2010.14298, the theorems; a family states its own form.
        """
        xp = array_module(x)
        t = self(x, _Given(xp.zeros(x.shape, "uint16")))
        v = xp.broadcast_to(t.scale.astype("float64") ** 2 / 4, t.shape)
        return float((v if t.mix is None else t.mix.undo_squared(v)).sum())

    def __str__(self):
        return f"{self.name}{self.bits}"


class _Given(Stream):
    """A stream of given noise, for looking at a quantizer's rounding."""

    def __init__(self, noise):
        super().__init__(Streams(0), "variance")
        self._noise = noise

    def bits(self, shape, xp=np, offset=0):  # noqa: ARG002 - the noise is given
        return self._noise


@register("identity")
class Identity(Quantizer):
    """Full precision: codes are x in its own float dtype, scale 1, zero 0."""

    reads_normalized = True                               # its range, to know that it is finite

    def __init__(self, bits: int | None = None):
        if bits is not None:
            raise ValueError(f"identity{bits}: full precision has no bits; write identity.")

    def __call__(self, x: Array, stream: Stream) -> QTensor:
        xp = array_module(x)
        if x.size == 0:
            raise ValueError(f"an array of shape {x.shape} is empty: a quantizer needs at least "
                             "one number.")
        known = getattr(x, "summary", None)
        x = x.array() if isinstance(x, Lazy) else x
        with np.errstate(over="ignore", invalid="ignore"):
            finite = (xp.isfinite(x.sum()) if known is None   # a sum may overflow: look again
                      else np.isfinite(known.ranges).all())
        if xp is np and not finite:
            finite = xp.isfinite(x).all()
        stream.require_finite(finite)
        shape = (1,) * x.ndim
        return QTensor(x, xp.ones(shape, x.dtype), xp.zeros(shape, x.dtype), name=stream.name)

    def variance(self, x: Array) -> Array:
        """0 everywhere."""
        return array_module(x).zeros(x.shape, "float64")

    def bound(self, x: Array) -> float:  # noqa: ARG002 - the same for all x
        """0."""
        return 0.0

    def __str__(self):
        return "identity"


class Bound:
    """A quantizer in its place in a layer: quantizer + stream + name. `layer.q.grad_x` is one.

    spec      as in a recipe: "bhq5", "ptq8:nearest", "identity"
    rounding  of this place, unless the spec names one
    entry     name of the array that it adds to the network's state, if any: see `value`, `load`
    """

    entry: str | None = None

    def __init__(self, spec: str, rounding: str, streams: Streams, name: str):
        self.quantizer, named = parse(spec)
        self.spec, self.name, self.streams = spec, name, streams
        self.rounding = named or rounding
        self.stream = nearest(streams, name) if self.rounding == "nearest" else streams.stream(name)

    def __call__(self, x: Array) -> QTensor:
        x = x.array() if isinstance(x, Lazy) and not self.quantizer.reads_normalized else x
        return self.named(self.quantizer(x, self.stream))

    def named(self, t: QTensor) -> QTensor:
        """t under this place's name, which errors tell."""
        return t if t.name == self.name else replace(t, name=self.name)

    def __str__(self):
        return self.spec


class Automatic(Bound):
    """A gradient's quantizer whose bits are chosen on the way (autobits.py), and saved."""

    def __init__(self, spec: str, streams: Streams, name: str):
        super().__init__(spec, "stochastic", streams, name)
        self.recipe, self.entry = spec, f"{name.rpartition('.')[2]}_bits"
        self.bits = START

    @property
    def bits(self) -> int:
        """Of the quantizer that is in this place now.  ValueError outside 2..8."""
        return self.quantizer.bits

    @bits.setter
    def bits(self, bits: int):
        self.spec = self.recipe.replace(AUTO, str(bits))
        self.quantizer, _ = parse(self.spec)

    @property
    def value(self) -> np.ndarray:
        """bits, (1,)."""
        return np.array([self.bits], np.float32)

    def load(self, values: Array) -> None:
        """Take over saved bits; NaN where none were."""
        bits = float(to_cpu(values)[0])
        self.bits = START if np.isnan(bits) else int(bits)

    def __str__(self):
        return f"{self.recipe} ({self.spec})"


def gradient(spec: str, streams: Streams, name: str) -> Bound:
    """A gradient's quantizer in its place: fixed or Automatic."""
    return (Automatic(spec, streams, name) if AUTO in spec else
            Bound(spec, "stochastic", streams, name))


class BoundActivation(Bound):
    """A layer's input quantizer, with a running range for evaluation (momentum 0.1, as batch norm).

    range  (2,) float32, lowest and highest; NaN until the first training forward
    """

    def __init__(self, spec: str, streams: Streams, name: str, eval_range: str):
        super().__init__(spec, "nearest", streams, name)
        self.has_range = hasattr(self.quantizer, "static")
        self.entry = "act_range" if self.has_range else None
        self.range = streams.device.full(2, np.nan, "float32")
        self.training, self.eval_range, self.calibrated = True, eval_range, False

    def __call__(self, x: Array) -> QTensor:
        x = x.array() if isinstance(x, Lazy) and not self.quantizer.reads_normalized else x
        if not self.has_range or (not self.training and self.eval_range == "batch"):
            return super().__call__(x)
        if self.training:
            xp = array_module(x)
            t, batch = self.quantizer.with_range(x, self.stream)
            self.range = (self.range + xp.float32(0.1) * (batch - self.range)
                          if self.calibrated else batch)
            self.calibrated = True
            return self.named(t)
        if not self.calibrated:
            if not self.streams.warned:
                logging.getLogger("minifqt").warning(
                    "%s has no running range yet: evaluation uses the batch's. "
                    "Train, or load a checkpoint, first.", self.name)
            self.streams.warned = True
            return super().__call__(x)
        low, high = self.range[:1], self.range[1:]
        return self.named(self.quantizer.static(x, self.stream, low, high))

    @property
    def value(self) -> Array:
        """The range."""
        return self.range

    def load(self, values: Array) -> None:
        """Take over a saved range; NaN means that there was none.  # sync"""
        self.range, self.calibrated = values, bool(np.isfinite(to_cpu(values)).all())
