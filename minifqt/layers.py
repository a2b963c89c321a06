"""Layers with explicit forward and backward. In Conv2d and Linear see four quantizers and three products.

There is no autograd and no branch on quantization: full precision is the Identity quantizer on the same path. Layers know no
device. Activations are (N, H, W, C). Next: quantizers/psq.py, kernels/reference.py.
"""
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from minifqt.backend import Array, array_module, device_module, to_cpu
from minifqt.kernels import conv, gemm, norm, pool
from minifqt.quantizers import Bound
from minifqt.quantizers.base import BoundActivation
from minifqt.recipes import Recipe
from minifqt.recipes import recipe as recipe_of
from minifqt.rng import Streams


@dataclass
class Param:
    """A parameter: `data`, its `grad` (assigned by backward, never added to), and whether weight decay acts on it."""

    data: Array
    grad: Array | None = None
    decay: bool = True


@dataclass
class Places:
    """The four quantizers of a layer, each bound to its stream: q.act(x), q.weight(w), q.grad_w(dy), q.grad_x(dy)."""

    act: BoundActivation
    weight: Bound
    grad_w: Bound
    grad_x: Bound


class Layer:
    """A node of the network: children are its attributes that are layers, in the order of their assignment.

    forward(x) keeps with `save` what backward needs; backward(dy) takes it with `saved`, assigns gradients, returns dx.
    """

    training, name, streams = True, "", None
    buffers: tuple[str, ...] = ()                         # arrays of the state that are no parameters
    _saved, _keep = None, False

    def forward(self, x: Array) -> Array:
        raise TypeError(f"{type(self).__name__} defines no forward.")

    def backward(self, dy: Array) -> Array:
        raise TypeError(f"{type(self).__name__} defines no backward.")

    def save(self, *values):
        """Keep these for backward; in evaluation keep nothing."""
        self._saved = values if self.training else None

    def saved(self) -> tuple:
        """What forward kept; consumed, so a second backward raises RuntimeError."""
        if self._saved is None:
            why = ("the first backward consumed it" if self.training
                   else "an evaluation forward keeps nothing; call train() first")
            raise RuntimeError(f"{self.name or type(self).__name__}: nothing saved for backward(); {why}. "
                               "Call forward() again.")
        values = self._saved
        if not self._keep:
            self._saved = None
        return values

    # ---- the tree ----

    def children(self) -> Iterator[tuple[str, "Layer"]]:
        """(name, layer) of each direct child."""
        for key, value in vars(self).items():
            if isinstance(value, Layer):
                yield key, value

    def walk(self, prefix: str = "") -> Iterator[tuple[str, "Layer"]]:
        """(dotted name, layer) of this layer and all below it, in forward order."""
        yield prefix, self
        for key, child in self.children():
            yield from child.walk(f"{prefix}.{key}" if prefix else key)

    def params(self) -> dict[str, Param]:
        """Dotted name → Param, in forward order."""
        return {_join(name, key): value for name, layer in self.walk()
                for key, value in vars(layer).items() if isinstance(value, Param)}

    def state(self) -> dict[str, Array]:
        """Dotted name → array: parameters, running statistics, activation ranges. The arrays themselves, no copies."""
        arrays = {}
        for name, layer in self.walk():
            for key, value in vars(layer).items():
                if isinstance(value, Param):
                    arrays[_join(name, key)] = value.data
            for key in layer.buffers:
                arrays[_join(name, key)] = getattr(layer, key)
            if isinstance(layer, Quantized) and layer.q.act.has_range:
                arrays[_join(name, "act_range")] = layer.q.act.range
        return arrays

    def load_state(self, arrays: dict[str, Array]) -> None:
        """Take the state over by name; activation ranges may be missing (weights from elsewhere).  ValueError else."""
        own = self.state()
        missing = [name for name in own if name not in arrays and not name.endswith("act_range")]
        extra = [name for name in arrays if name not in own and not name.endswith("act_range")]
        if missing or extra:
            raise ValueError(f"state does not fit this network: missing {missing[:3]}, unknown {extra[:3]} "
                             f"({len(missing)} and {len(extra)} in all). Build the model it was saved from.")
        for name, array in arrays.items():
            if name in own and tuple(array.shape) != tuple(own[name].shape):
                raise ValueError(f"{name} has shape {tuple(array.shape)}; this network needs {own[name].shape}: "
                                 "another number of classes or channels?")
        for name, layer in self.walk():
            def taken(key, old, name=name):
                new = arrays.get(_join(name, key), old)
                return array_module(old).asarray(to_cpu(new), dtype=old.dtype).copy()

            for key, value in vars(layer).items():
                if isinstance(value, Param):
                    value.data, value.grad = taken(key, value.data), None
            for key in layer.buffers:
                setattr(layer, key, taken(key, getattr(layer, key)))
            if isinstance(layer, Quantized) and layer.q.act.has_range:
                layer.q.act.load_range(taken("act_range", layer.q.act.range))

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

    # ---- what a layer is made of ----

    def initialize(self, xp, dtype: str) -> None:
        """Make parameters and buffers; noise from the stream `init.NAME`."""

    def summary(self) -> str:
        """One line, without the children."""
        return type(self).__name__

    def __str__(self):
        lines = []
        for name, layer in self.walk():
            depth = name.count(".") + 1 if name else 0
            lines.append(f"{'  ' * depth}{name.rsplit('.', 1)[-1] + ': ' if name else ''}{layer.summary()}")
        return "\n".join(lines)


def build(net: Layer, recipe: Recipe | str, seed: int = 0, device: str = "cpu", dtype: str = "float32") -> Layer:
    """Name every layer of the tree, give it its parameters, its streams and its four quantizers; returns the net.

    recipe  a Recipe or the name of a preset
    dtype   of parameters and activations; float64 only with Identity everywhere.  ValueError otherwise
    """
    recipe, xp = recipe_of(recipe), device_module(device)
    streams = Streams(seed, xp)
    places = (recipe.act, recipe.weight, recipe.grad_w, recipe.grad_x)
    if dtype not in ("float32", "float64") or (dtype == "float64" and set(places) != {"identity"}):
        raise ValueError(f"dtype {dtype} with recipe {recipe}: expected float32, or float64 with the recipe fp32.")
    for name, layer in net.walk():
        layer.streams, layer.name = streams, name or type(layer).__name__.lower()
        layer.initialize(xp, dtype)
        if isinstance(layer, Quantized):
            def bound(kind, place, rounding, *more, name=layer.name):
                return kind(getattr(recipe, place), rounding, streams, f"{name}.{place}", *more)

            layer.q = Places(bound(BoundActivation, "act", "nearest", recipe.eval_range, xp),
                             bound(Bound, "weight", "nearest"),
                             bound(Bound, "grad_w", "stochastic"), bound(Bound, "grad_x", "stochastic"))
    return net.train()


def _join(name, key):
    return f"{name}.{key}" if name else key


def he_normal(layer: Layer, shape: tuple, fan_in: int, xp, dtype: str) -> Param:
    """Normal numbers of variance 2 / fan_in, made on the CPU.  Source: arXiv 1502.01852, section 2.2."""
    noise = layer.streams.stream(f"init.{layer.name}").generator(step=0).standard_normal(shape, dtype="float32")
    return Param(xp.asarray(noise * np.float32(np.sqrt(2 / fan_in)), dtype=dtype))


# ---- the two layers with integer products ----------------------------------------------------------------------------


class Quantized(Layer):
    """A layer whose products run on integers; `q` holds its four quantizers."""

    q: Places

    def quantizers(self) -> str:
        """The quantizer in each of the four places, for print(net)."""
        return f"act {self.q.act}, weight {self.q.weight}, grad_w {self.q.grad_w}, grad_x {self.q.grad_x}"


class Conv2d(Quantized):
    """y = x ∗ w (+ b) in three integer products.  x (N, H, W, C), weight (K, R, S, C), y (N, P, Q, K).

    kernel_size  R = S, or (R, S); stride and padding are the same in both directions
    bias         adds float32; its gradient is the sum of the unquantized dy
    Source: arXiv 2010.14298, section 2 and its framework of FQT. ValueError for an input of other channels.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple, stride: int = 1,
                 padding: int = 0, bias: bool = False, recipe: Recipe | str = "fp32"):
        self.kernel_size = (kernel_size,) * 2 if isinstance(kernel_size, int) else tuple(kernel_size)
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, bias
        self.stride, self.padding = stride, padding
        build(self, recipe)

    def initialize(self, xp, dtype):
        shape = (self.out_channels, *self.kernel_size, self.in_channels)
        self.weight = he_normal(self, shape, int(np.prod(shape[1:])), xp, dtype)
        if self.has_bias:
            self.bias = Param(xp.zeros(self.out_channels, dtype), decay=False)

    def forward(self, x):                                 # (N, H, W, C)
        require_channels(self, x, 4, self.in_channels)
        qx = self.q.act(x)                                # Q_f   8-bit, nearest
        qw = self.q.weight(self.weight.data)              # Q_θ   8-bit, nearest
        self.save(qx, qw)                                 # the codes are all that this layer keeps
        y = conv.fprop(qx, qw, self.stride, self.padding)
        return y + self.bias.data if self.has_bias else y

    def backward(self, dy):                               # (N, P, Q, K)
        qx, qw = self.saved()                             # consumed: a second backward raises
        gw = self.q.grad_w(dy)                            # Q_b1  8-bit per-tensor, stochastic
        gx = self.q.grad_x(dy)                            # Q_b2  b-bit PTQ / PSQ / BHQ, stochastic
        self.weight.grad = conv.wgrad(gw, qx, self.kernel_size, self.stride, self.padding)
        if self.has_bias:
            self.bias.grad = norm.channel_sum(dy).astype(dy.dtype)
        return conv.dgrad(gx, qw, qx.shape[1:3], self.stride, self.padding)

    def summary(self):
        R, S = self.kernel_size
        return (f"Conv2d {self.in_channels} → {self.out_channels}, {R}×{S}, stride {self.stride}, "
                f"padding {self.padding}: {self.quantizers()}")


class Linear(Quantized):
    """y = x wᵀ + b in three integer GEMMs.  x (N, I), weight (O, I), y (N, O).

    Source: arXiv 2010.14298, section 2 and its framework of FQT. ValueError for an input of other features.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, recipe: Recipe | str = "fp32"):
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        build(self, recipe)

    def initialize(self, xp, dtype):
        self.weight = he_normal(self, (self.out_features, self.in_features), self.in_features, xp, dtype)
        if self.has_bias:
            self.bias = Param(xp.zeros(self.out_features, dtype), decay=False)

    def forward(self, x):                                 # (N, I)
        require_channels(self, x, 2, self.in_features)
        qx = self.q.act(x)
        qw = self.q.weight(self.weight.data)              # (O, I)
        self.save(qx, qw)
        y = gemm.fprop(qx, qw)                            # (N, O), contracts I
        return y + self.bias.data if self.has_bias else y

    def backward(self, dy):                               # (N, O)
        qx, qw = self.saved()
        gw, gx = self.q.grad_w(dy), self.q.grad_x(dy)     # (N, O) twice: two quantizers, two noises
        self.weight.grad = gemm.wgrad(gw, qx)             # (O, I), contracts N
        if self.has_bias:
            self.bias.grad = norm.channel_sum(dy).astype(dy.dtype)
        return gemm.dgrad(gx, qw)                         # (N, I), contracts O

    def summary(self):
        return f"Linear {self.in_features} → {self.out_features}: {self.quantizers()}"


def require_channels(layer, x, axes, channels):
    if x.ndim != axes or x.shape[-1] != channels:
        raise ValueError(f"{layer.name}: input of shape {x.shape}; expected {axes} axes, the last of size {channels} "
                         f"({'(N, H, W, C)' if axes == 4 else '(N, features)'}).")


# ---- layers that stay in floating point ------------------------------------------------------------------------------


class BatchNorm2d(Layer):
    """y = weight · (x − mean) / √(var + 1e-5) + bias for each channel.  x (N, H, W, C) or (N, C).

    Training uses the batch's mean and biased variance (two passes) and moves the running ones by 0.1, the variance unbiased,
    as PyTorch does; evaluation uses the running ones. ValueError where a channel has a single number in training.
    """

    buffers = ("running_mean", "running_var")
    eps, momentum = 1e-5, 0.1

    def __init__(self, channels: int):
        self.channels = channels
        build(self, "fp32")

    def initialize(self, xp, dtype):
        self.weight = Param(xp.ones(self.channels, dtype), decay=False)
        self.bias = Param(xp.zeros(self.channels, dtype), decay=False)
        self.running_mean, self.running_var = xp.zeros(self.channels, dtype), xp.ones(self.channels, dtype)

    def forward(self, x):
        mean, var = norm.statistics(x) if self.training else (self.running_mean, self.running_var)
        inv_std = 1 / array_module(x).sqrt(var + self.eps)
        normal, y = norm.normalize(x, mean, inv_std, self.weight.data, self.bias.data)
        self.save(normal, inv_std)
        if self.training:
            count = x.size // self.channels
            if count < 2:
                raise ValueError(f"{self.name}: one number a channel has no variance; train with a larger batch.")
            self.running_mean = self.running_mean + self.momentum * (mean - self.running_mean)
            self.running_var = self.running_var + self.momentum * (var * (count / (count - 1)) - self.running_var)
        return y

    def backward(self, dy):
        normal, inv_std = self.saved()
        dx, self.weight.grad, self.bias.grad = norm.backward(dy, normal, inv_std, self.weight.data)
        return dx

    def summary(self):
        return f"BatchNorm2d {self.channels}"


class ReLU(Layer):
    """y = max(x, 0); the gradient at 0 is 0."""

    def forward(self, x):
        self.save(x > 0)
        return array_module(x).maximum(x, 0)

    def backward(self, dy):
        positive, = self.saved()
        return dy * positive


class MaxPool2d(Layer):
    """Maximum of kernel_size × kernel_size windows; the first maximum wins a tie.  (N, H, W, C) → (N, P, Q, C)."""

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0):
        self.kernel_size, self.stride, self.padding = kernel_size, stride or kernel_size, padding

    def forward(self, x):
        y, winner = pool.max_forward(x, self.kernel_size, self.stride, self.padding)
        self.save(winner, x.shape[1:3])
        return y

    def backward(self, dy):
        winner, size = self.saved()
        return pool.max_backward(dy, winner, size, self.kernel_size, self.stride, self.padding)

    def summary(self):
        return f"MaxPool2d {self.kernel_size}, stride {self.stride}, padding {self.padding}"


class GlobalAvgPool2d(Layer):
    """Mean over all pixels.  (N, H, W, C) → (N, C)."""

    def forward(self, x):
        self.save(x.shape[1:3])
        return pool.mean_forward(x)

    def backward(self, dy):
        size, = self.saved()
        return pool.mean_backward(dy, size)


class Flatten(Layer):
    """(N, …) → (N, D)."""

    def forward(self, x):
        self.save(x.shape)
        return x.reshape(len(x), -1)

    def backward(self, dy):
        shape, = self.saved()
        return dy.reshape(shape)


class Sequential(Layer):
    """Layers one after another, named 0, 1, 2, …"""

    def __init__(self, *layers: Layer):
        self.layers = layers

    def children(self):
        return ((str(i), layer) for i, layer in enumerate(self.layers))

    def forward(self, x):
        for layer in self.layers:
            x = layer.forward(x)
        return x

    def backward(self, dy):
        for layer in reversed(self.layers):
            dy = layer.backward(dy)
        return dy
