"""Proof of integers: what the products of one training step really multiply, sum and keep.

It watches the functions that every product goes through (kernels/conv.py, gemm.py), looks at the
operands that they got, and multiplies some of them again in int64 (kernels/reference.py).
"""
import gc
import math
import tracemalloc
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps

import numpy as np

from minifqt import backend
from minifqt.backend import Array, to_cpu
from minifqt.kernels import conv, gemm, reference
from minifqt.layers import Layer
from minifqt.layers.base import Quantized
from minifqt.losses import cross_entropy
from minifqt.qtensor import QTensor
from minifqt.study.probe import unchanged
from minifqt.training import same_modes

KINDS = ("fprop", "wgrad", "dgrad")


@dataclass
class Call:
    """A product that was asked for: its operands and the rest of its arguments."""

    kind: str
    a: QTensor
    b: QTensor
    rest: tuple = ()                                      # of a convolution: stride, padding, …
    options: dict = field(default_factory=dict)

    @property
    def layer(self) -> str:
        """Whose product it is."""
        return self.a.name.rpartition(".")[0]

    @property
    def filters(self) -> int:
        """R · S, 1 for a linear layer."""
        if not self.rest:
            return 1
        return math.prod(self.rest[0] if self.kind == "wgrad" else self.b.shape[1:3])

    @property
    def terms(self) -> int:
        """Length of the contraction: products in a sum, at most."""
        if self.kind == "wgrad":
            return math.prod(self.a.shape[:-1])
        return self.filters * self.a.shape[-1]

    @property
    def multiplies(self) -> int:
        """All of them, those of absent taps included."""
        if self.kind != "fprop":
            return self.a.codes.size * self.filters * self.b.shape[-1]
        size = reference.output_size(self.a.shape[1:3], self.b.shape[1:3], *self.rest) \
            if self.rest else ()
        return self.a.shape[0] * math.prod(size) * self.b.shape[0] * self.terms

    def again(self) -> Array:
        """The product once more, as the step asked for it: BHQ's rows unmixed in the kernel."""
        product = getattr(conv if self.rest else gemm, self.kind)
        return product(self.a, self.b, *self.rest, **self.options)

    def plainly(self, c: int) -> Array:
        """Its channel c alone, in int64 and one epilogue (kernels/reference.py)."""
        a, b = replace(self.a, mix=None), _only(self.b, 0 if self.kind == "fprop" else -1, c)
        if self.rest:
            y = getattr(reference, f"conv_{self.kind}")(a, b, *self.rest)
        elif self.kind == "wgrad":
            y = reference.matmul(a.transposed(), b.transposed())
        else:
            y = reference.matmul(a, b if self.kind == "fprop" else b.transposed())
        return y if self.a.mix is None else self.a.mix.undo(y)


def _only(t, axis, c):
    """t with its channel c alone."""
    at = slice(c, c + 1) if axis == 0 else (..., slice(c, c + 1))
    codes, scale, zero = (v if v.shape[axis] == 1 else v[at] for v in (t.codes, t.scale, t.zero))
    return QTensor(codes, scale, zero, t.mix, t.name)


@contextmanager
def watched():
    """Inside, every product of a layer is noted in the list that is yielded."""
    calls = []

    def noting(product, kind):
        @wraps(product)
        def note(a, b, *rest, **options):
            calls.append(Call(kind, a, b, rest, options))
            return product(a, b, *rest, **options)
        return note

    before = [(module, kind, getattr(module, kind)) for module in (conv, gemm) for kind in KINDS]
    try:
        for module, kind, product in before:
            setattr(module, kind, noting(product, kind))
        yield calls
    finally:
        for module, kind, product in before:
            setattr(module, kind, product)


def row(call: Call, channel: int = 0) -> dict:
    """One product.

    codes      dtypes of the operands;  integers  whether both are
    multiplies, terms  their number; the length of the longest sum
    bits       log₂ of terms · max|a| · max|b|: no sum of these codes is larger
    left31, left24  bits from there to 2³¹ (int32) and 2²⁴ (float32); below 0 sums are cut
    deviation  of one channel from int64 and one epilogue, relative to its largest number
    """
    a, b = call.a, call.b
    found = {"layer": call.layer, "product": call.kind, "integers": a.is_integer and b.is_integer,
             "codes": f"{a.codes.dtype} × {b.codes.dtype}", "multiplies": call.multiplies,
             "terms": call.terms}
    if found["integers"]:
        bits = math.log2(max(1, call.terms * _largest(a) * _largest(b)))
        y = call.again()
        c = channel % y.shape[-1]
        got, expected = to_cpu(y)[..., c:c + 1], to_cpu(call.plainly(c))
        found |= {"bits": bits, "left31": 31 - bits, "left24": 24 - bits, "deviation": float(
            abs(got - expected).max() / max(abs(expected).max(), 1e-300))}
    return found


def _largest(t):
    return int(abs(t.codes.astype("int64")).max())


# ---- memory --------------------------------------------------------------------------------------

def kept(net: Layer) -> dict[str, dict[str, int]]:
    """Layer → dtype → bytes of what it keeps for backward; what layers share counts for the first.
    """
    seen, found = set(), {}
    for name, layer in net.walk():
        for array in _arrays(layer._saved, set()):
            place = _address(array)
            if place not in seen:
                seen.add(place)
                of = found.setdefault(name, {})
                of[str(array.dtype)] = of.get(str(array.dtype), 0) + array.nbytes
    return found


def _arrays(value, met):
    """All arrays in here."""
    if id(value) in met:
        return
    met.add(id(value))
    if isinstance(value, np.ndarray) or backend.array_module(value) is not np:
        yield value
        return
    inside = (value if isinstance(value, list | tuple) else
              value.values() if isinstance(value, dict) else
              vars(value).values() if type(value).__module__.startswith("minifqt") else ())
    for part in inside:
        yield from _arrays(part, met)


def _address(array):
    return (array.__array_interface__["data"][0] if isinstance(array, np.ndarray) else
            array.data.ptr)


def predicted(net: Layer, calls: list[Call], saved: int) -> dict[str, int]:
    """Bytes that a step needs at its peak beside parameters, momentum and batch, from shapes.

    The gradients, what backward needs, and what is worked on: dy, dx and a sum of two in float32,
    two tensors of codes; these once for each size of image, for memory that was let go is kept for
    the next of its size.
    """
    sizes = {}
    for call in calls:
        if call.kind != "fprop":
            codes = call.a.codes.nbytes if call.a.is_integer else 0
            sizes[call.a.codes.size] = 12 * call.a.codes.size + 2 * codes
    return {"gradients": sum(p.data.nbytes for p in net.params().values()),
            "kept for backward": saved, "worked on": sum(sizes.values())}


def measured(step) -> int:
    """Bytes that arrays took at the peak of step(), run twice from empty memory; on a CPU.

    On one thread: with more, weight gradients that wait for one hold their operands longer.
    """
    threads = backend.threads()
    backend.set_threads(1)
    try:
        with backend.nothing_kept():
            gc.collect()
            tracemalloc.start()
            step()
            step()
            return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        backend.set_threads(threads)


# ---- the audit -----------------------------------------------------------------------------------

def audit(net: Layer, x: Array, labels: Array, seed: int = 0, label_smoothing: float = 0.0) -> dict:
    """One step of the network on x (N, …), labels (N,); it is afterwards as it was.

    products  row() of each, in the order of the step;  skipped  "layer product" not computed
    kept      layer → dtype → bytes kept for backward
    memory    bytes beside parameters, momentum and batch at the peak: predicted, by part, and
              measured (None on a GPU)
    """
    device = net.streams.device
    x, labels = device.asarray(x), device.asarray(labels)

    def step():
        _, dlogits = cross_entropy(net.train().forward(x), labels, label_smoothing)
        saved = kept(net)
        net.backward(dlogits)
        for p in net.params().values():
            device.asarray(p.grad)                        # what is begun is ended
        return saved

    with same_modes(net), unchanged(net):
        with watched() as calls:
            saved = step()
        rng = np.random.default_rng(seed)
        rows = [row(call, int(rng.integers(1 << 30))) for call in calls]
        parts = predicted(net, calls, sum(sum(sizes.values()) for sizes in saved.values()))
        done = {f"{r['layer']} {r['product']}" for r in rows}
        calls.clear()                                     # whose operands hold memory
        peak = measured(step) if device is np else None
    wanted = [f"{name} {kind}" for name, layer in net.walk() if isinstance(layer, Quantized)
              for kind in KINDS]
    return {"products": rows, "skipped": [name for name in wanted if name not in done],
            "kept": saved, "memory": {"predicted": parts, "measured": peak}}
