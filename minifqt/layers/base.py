"""What a layer is: forward and backward, what it saves between them, and its place in the tree.

It holds no arithmetic. The layers to read are in quantized.py and floating.py.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from minifqt.backend import Array, array_module, device_module, to_cpu
from minifqt.quantizers.base import Bound, BoundActivation, gradient
from minifqt.recipes import Recipe
from minifqt.recipes import recipe as recipe_of
from minifqt.rng import Streams

_KEPT = ("act_range", "grad_w_bits", "grad_x_bits")       # by quantizers


@dataclass
class Param:
    """A parameter: its data, its gradient (assigned by backward), and whether it decays."""

    data: Array
    grad: Array | None = None
    decay: bool = True


@dataclass
class Places:
    """A layer's four quantizers, each bound to its stream: q.act(x), q.weight(w), q.grad_x(dy)…"""

    act: BoundActivation
    weight: Bound
    grad_w: Bound
    grad_x: Bound

    def __str__(self):
        return ", ".join(f"{place} {bound}" for place, bound in vars(self).items())


class Layer:
    """A node of the network. Its children are its attributes that are layers, in order.

    forward(x) keeps with `save` what backward needs; backward(dy) takes it with `saved`, assigns
    every gradient and returns dx. Neither writes to its input.
    """

    training, name = True, ""
    buffers: tuple[str, ...] = ()                         # state that is no parameter
    _saved, _keep, _streams = None, False, None

    def forward(self, x: Array) -> Array:  # noqa: ARG002 - subclasses use it
        """The layer's output; in training, what backward needs is saved."""
        raise TypeError(f"{type(self).__name__} defines no forward.")

    def backward(self, dy: Array) -> Array:  # noqa: ARG002 - subclasses use it
        """dx for the dy of the last forward; gradients of parameters are assigned."""
        raise TypeError(f"{type(self).__name__} defines no backward.")

    @property
    def streams(self) -> Streams:
        """The noise of the network that this layer is part of; its `step` is set by train_step."""
        if self._streams is None:
            raise RuntimeError(f"{type(self).__name__}: not built. Call minifqt.layers.build(net, "
                               "recipe, seed) first: it names the layers and gives them noise.")
        return self._streams

    def save(self, *values) -> None:
        """Keep these for backward; in evaluation keep nothing."""
        self._saved = values if self.training else None

    def saved(self) -> tuple:
        """What forward kept; consumed, so that a second backward raises RuntimeError."""
        if self._saved is None:
            why = ("the first backward consumed it" if self.training
                   else "evaluation keeps nothing: call train() first")
            raise RuntimeError(f"{self.name or type(self).__name__}: nothing saved for backward(); "
                               f"{why}. Call forward() again.")
        values = self._saved
        if not self._keep:
            self._saved = None
        return values

    @contextmanager
    def keep_saved(self):
        """Inside, backward does not consume: many backwards of one forward, for studies."""
        layers = [layer for _, layer in self.walk()]
        for layer in layers:
            layer._keep = True
        try:
            yield self
        finally:
            for layer in layers:
                layer._keep, layer._saved = False, None

    def train(self, mode: bool = True) -> "Layer":
        """Training mode for this layer and all below it; returns it."""
        for _, layer in self.walk():
            layer.training = mode
            if isinstance(layer, Quantized):
                layer.q.act.training = mode
        return self

    def eval(self) -> "Layer":
        """Evaluation mode: running statistics and ranges, nothing saved for backward."""
        return self.train(False)

    # ---- the tree ------------------------------------------------------------------------------

    def children(self) -> Iterator[tuple[str, "Layer"]]:
        """(name, layer) of each direct child."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Layer))

    def walk(self, prefix: str = "") -> Iterator[tuple[str, "Layer"]]:
        """(dotted name, layer) of this layer and all below it, in forward order."""
        yield prefix, self
        for name, child in self.children():
            yield from child.walk(_join(prefix, name))

    def params(self) -> dict[str, Param]:
        """Dotted name → Param, in forward order."""
        return {_join(prefix, name): value for prefix, layer in self.walk()
                for name, value in vars(layer).items() if isinstance(value, Param)}

    def state(self) -> dict[str, Array]:
        """Dotted name → array: parameters, running statistics, ranges, chosen bits. No copies."""
        return {name: get() for name, get, _ in self._entries()}

    def load_state(self, arrays: dict[str, Array]) -> None:
        """Take a state over by name; what quantizers keep may be missing (weights from elsewhere).

        Raises ValueError where names or shapes differ, and then changes nothing.
        """
        own = self.state()
        missing, extra = ([name for name in some if name not in others and not name.endswith(_KEPT)]
                          for some, others in ((own, arrays), (arrays, own)))
        if missing or extra:
            raise ValueError(f"the state does not fit this network: {len(missing)} names are "
                             f"missing, {missing[:3]}, and {len(extra)} unknown, {extra[:3]}. "
                             "Build the model it was saved from.")
        for name, old in own.items():
            if name in arrays and tuple(arrays[name].shape) != old.shape:
                raise ValueError(f"{name} has shape {tuple(arrays[name].shape)}; this network "
                                 f"needs {old.shape}: other classes, channels or model?")
        for name, get, take in self._entries():
            old = get()
            new = to_cpu(arrays[name]) if name in arrays else np.full(old.shape, np.nan)
            take(array_module(old).array(new, dtype=old.dtype))

    def _entries(self):
        """(name, get, take) of every array of the state."""
        for prefix, layer in self.walk():
            for name, value in vars(layer).items():
                if isinstance(value, Param):
                    yield (_join(prefix, name), lambda value=value: value.data,
                           lambda new, value=value: vars(value).update(data=new, grad=None))
            for name in layer.buffers:
                yield (_join(prefix, name), lambda layer=layer, name=name: getattr(layer, name),
                       lambda new, layer=layer, name=name: setattr(layer, name, new))
            for bound in vars(layer.q).values() if isinstance(layer, Quantized) else ():
                if bound.entry:
                    yield (_join(prefix, bound.entry), lambda bound=bound: bound.value, bound.load)

    # ---- what a subclass may define ------------------------------------------------------------

    def initialize(self, xp, dtype: str) -> None:
        """Make parameters and buffers; noise from the stream `init.NAME`."""

    def summary(self) -> str:
        """One line, without the children."""
        return type(self).__name__

    def __str__(self):
        lines = []
        for name, layer in self.walk():
            label = f"{name.rsplit('.', 1)[-1]}: " if name else ""
            lines.append("  " * (name.count(".") + bool(name)) + label + layer.summary())
        return "\n".join(lines)


class Quantized(Layer):
    """A layer whose products run on integers; `q` holds its four quantizers."""

    q: Places


class Sequential(Layer):
    """Layers one after another, named 0, 1, 2, …; `layers.build` it, or RuntimeError."""

    def __init__(self, *layers: Layer):
        self.layers = layers

    def children(self):
        return ((str(i), layer) for i, layer in enumerate(self.layers))

    def forward(self, x):
        self.streams                                      # noqa: B018 - raises where not built
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy


def build(net: Layer, recipe: Recipe | str, seed: int = 0, device: str = "cpu",
          dtype: str = "float32") -> Layer:
    """Name every layer, give it its parameters, its streams and its four quantizers; the net.

    recipe  a Recipe or the name of a preset; it takes the place of one that a layer was made with
    device  auto, cpu or cuda
    dtype   of parameters and activations; float64 only with identity in all four places
    Raises ValueError for an unknown recipe, device or dtype, and for layers that are in a list.
    """
    recipe, xp = recipe_of(recipe), device_module(device)
    streams = Streams(seed, xp)
    specs = {place: getattr(recipe, place) for place in ("act", "weight", "grad_w", "grad_x")}
    exact = all(spec == "identity" for spec in specs.values())
    if dtype not in ("float32", "float64") or (dtype == "float64" and not exact):
        raise ValueError(f"dtype {dtype} with {recipe}: expected float32, or float64 with the "
                         "recipe fp32.")
    for name, layer in net.walk():
        _require_found(layer)
        layer._streams, layer.name = streams, name or type(layer).__name__.lower()
        layer.initialize(xp, dtype)
        if isinstance(layer, Quantized):
            names = {place: f"{layer.name}.{place}" for place in specs}
            layer.q = Places(
                BoundActivation(specs["act"], streams, names["act"], recipe.eval_range),
                Bound(specs["weight"], "nearest", streams, names["weight"]),
                gradient(specs["grad_w"], streams, names["grad_w"]),
                gradient(specs["grad_x"], streams, names["grad_x"]))
    return net.train()


def _require_found(layer):
    """ValueError for layers in a list or dict, where `children` does not look for them."""
    for name, value in vars(layer).items():
        inside = value.values() if isinstance(value, dict) else value
        if (type(layer).children is Layer.children and isinstance(value, list | tuple | dict)
                and any(isinstance(v, Layer) for v in inside)):
            raise ValueError(f"{type(layer).__name__}.{name} holds layers in a "
                             f"{type(value).__name__}, where they would not be trained: use "
                             "Sequential(*layers), or an attribute for each.")


def he_normal(layer: Layer, shape: tuple, fan_in: int, xp, dtype: str) -> Param:
    """Normal numbers of variance 2 / fan_in, drawn on the CPU.  arXiv 1502.01852, section 2.2."""
    generator = layer.streams.stream(f"init.{layer.name}").generator(step=0)
    noise = generator.standard_normal(shape, dtype="float32")
    return Param(xp.asarray(noise * np.float32(np.sqrt(2 / fan_in)), dtype=dtype))


def as_input(layer: Layer, x: Array, axes: str, channels: int) -> Array:
    """x in the layer's dtype; ValueError unless it has these axes, the last of size `channels`."""
    if x.ndim != axes.count(",") + 1 or x.shape[-1] != channels or x.size == 0:
        raise ValueError(f"{layer.name}: input of shape {x.shape}; expected {axes} with "
                         f"{channels} in the last place, and no axis of size 0.")
    return x.astype(layer.weight.data.dtype, copy=False)


def _join(prefix, name):
    return f"{prefix}.{name}" if prefix else name
