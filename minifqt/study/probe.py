"""One batch through one network, once; then backward passes with quantizers and noise of choice.

A site is a gradient quantizer in its place: NAME.grad_w (the paper's Q_b1) or NAME.grad_x (Q_b2).
Sites that are off are Identity: with all of them off, backward is that of quantization-aware
training (QAT). Next: terms.py.
"""
from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import numpy as np

from minifqt.backend import Array, to_cpu
from minifqt.layers import Layer
from minifqt.layers.base import Quantized
from minifqt.losses import cross_entropy
from minifqt.qtensor import QTensor
from minifqt.quantizers import Bound
from minifqt.rng import Streams
from minifqt.training import same_modes


class Probe:
    """net, forward on x (N, …), labels (N,), kept for backward passes. A context manager.

    seed    of the gradients' noise, which is apart from the network's own; what is rounded forward
            takes the noise of the network's step (`net.streams.step`)
    sites   names in the order in which backward meets them, the last layer's first
    specs   site → quantizer, as the network's recipe has it
    blocks  parameter → where it is in a gradient (P,)
    loss    of the batch
    exact   the gradient of QAT, (P,) float64: all sites off
    errors  site → the dy (N, …) of QAT that it gets
    Inside, the network is for nothing else; afterwards all but its gradients is as before.
    Raises ValueError where no layer is quantized.
    """

    def __init__(self, net: Layer, x: Array, labels: Array, seed: int = 0,
                 label_smoothing: float = 0.0):
        places = {f"{name}.{place}": (layer, place) for name, layer in net.walk()
                  if isinstance(layer, Quantized) for place in ("grad_w", "grad_x")}
        if not places:
            raise ValueError("the network has no quantized layer: there is nothing to study.")
        self.net, self._places, self._stack = net, places, ExitStack()
        self._bound = {site: getattr(layer.q, place) for site, (layer, place) in places.items()}
        self._noise = {site: Streams(seed, net.streams.device) for site in places}
        self.specs = {site: bound.spec for site, bound in self._bound.items()}
        self._stack.enter_context(same_modes(net))
        self._stack.callback(self._set, self._bound)
        self._stack.enter_context(net.keep_saved())
        self.blocks, self.errors, start = {}, {}, 0
        for name, p in net.params().items():
            self.blocks[name] = slice(start, start := start + p.data.size)
        try:
            x, labels = (net.streams.device.asarray(v) for v in (x, labels))
            with unchanged(net):
                self.loss, self._dlogits = cross_entropy(net.train().forward(x), labels,
                                                         label_smoothing)
            self.exact = self.gradient({}, through=dict.fromkeys(places, self._keep_error))
        except BaseException:
            self._stack.close()                           # nobody has entered it to leave it
            raise
        self.sites = list(self.errors)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stack.close()

    def gradient(self, on: Mapping[str, int], specs: Mapping[str, str] | None = None,
                 through: Mapping[str, Callable[[QTensor], QTensor]] | None = None) -> np.ndarray:
        """The gradient of all parameters, (P,) float64.

        on       site → number of its draw: the same number is the same noise; the others are off
        specs    site → quantizer, where it is not the recipe's
        through  site → what its QTensor passes through, to be watched or altered
        """
        specs, through = {**self.specs, **(specs or {})}, through or {}
        for site, draw in on.items():
            self._noise[site].step = draw
        bound = {site: Bound(specs[site] if site in on else "identity", "stochastic",
                             self._noise[site], site) for site in self._places}
        self._set({site: _chain(q, through.get(site)) for site, q in bound.items()})
        self.net.backward(self._dlogits)
        device = self.net.streams.device
        return np.concatenate([to_cpu(device.asarray(p.grad)).reshape(-1)
                               for p in self.net.params().values()]).astype("float64")

    def response(self, site: str, specs: Mapping[str, str] | None = None) -> np.ndarray:
        """Γ · 1: what an error of one step in each of this site's codes does to a gradient, (P,).

        Exact, for backward is linear. Rows of zeros, which have no step, have no error.
        """
        return (self.gradient({site: 0}, specs, {site: _one_step_more})
                - self.gradient({site: 0}, specs))

    def weight_of(self, site: str) -> slice:
        """Where the weight of this site's layer is in a gradient: all that its grad_w reaches."""
        return self.blocks[f"{site.rpartition('.')[0]}.weight".removeprefix(".")]

    def multiplies(self, site: str) -> int:
        """Of the product that this site's codes enter, wgrad or dgrad, absent taps included."""
        dy, at = self.errors[site], self.weight_of(site)
        return dy.size * ((at.stop - at.start) // dy.shape[-1])

    def _set(self, bound):
        for site, (layer, place) in self._places.items():
            setattr(layer.q, place, bound[site])

    def _keep_error(self, t):
        self.errors[t.name] = t.codes
        return t


@contextmanager
def unchanged(net: Layer):
    """Afterwards its parameters, running ranges and statistics are what they were before."""
    before = {name: array.copy() for name, array in net.state().items()}
    try:
        yield
    finally:
        net.load_state(before)


def _chain(bound, then):
    return bound if then is None else (lambda dy: then(bound(dy)))


def _one_step_more(t):
    """x̂ + scale, and T⁻¹ of that where rows are mixed."""
    steps = ~((t.scale == 1) & (t.zero == 0))
    return replace(t, zero=t.zero - steps.astype(t.zero.dtype))
