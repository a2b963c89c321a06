"""Fusion by substitution: the same network, with fewer passes over memory and the same numbers.

`fuse(net)` gives convolutions, batch norms and ReLUs another class in their place; names,
parameters, streams and every other layer stay. What they return is not computed yet: whoever reads
it first computes it on the way. A convolution is added to the skip, or summed for the batch norm
behind it, as its rows are written; batch norm and ReLU are formed by the activation quantizer of
the next layer; backwards, the same convolution's gradient is unmixed, gated and summed in cache.
Whoever else reads them gets plain numbers. By NumPy alone products and the mean over pixels are
written, the rest is fused.
"""
import numpy as np

from minifqt.kernels import conv, norm, pool, rounding
from minifqt.kernels.conv import Product
from minifqt.kernels.norm import Normalized
from minifqt.kernels.pool import Spread
from minifqt.kernels.seen import Lazy, Seen, is_images, suits
from minifqt.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Layer, ReLU
from minifqt.layers.base import as_input


class FusedConv2d(Conv2d):
    """Conv2d whose two images are formed where they are read.  x, dy (N, …, channels)."""

    def forward(self, x):
        if self.has_bias:
            return super().forward(x)
        outside = suits(x) and not isinstance(x, Seen)    # given from there: images, perhaps
        x = as_input(self, x, "(N, H, W, C)", self.in_channels)
        with rounding.begun():                            # other threads round x meanwhile
            qx, qw = self.q.act(x), self.q.weight(self.weight.data)
        self.save(qx, qw, outside)
        return remembering(conv.fprop(qx, qw, self.stride, self.padding, lazily=True))

    def backward(self, dy):
        qx, qw, *outside = self.saved()                   # the plain forward saves two
        dy = dy.array() if isinstance(dy, Lazy) else dy
        later = any(outside) or in_numpy(dy)
        with rounding.one_read(dy):
            gw = self.q.grad_w(dy)
            gx = None if later else self.q.grad_x(dy)
        self.weight.grad = conv.wgrad(gw, qx, self.kernel_size, self.stride, self.padding,
                                      lazily=True)
        if self.has_bias:
            self.bias.grad = norm.channel_sum(dy).astype(dy.dtype)
        if later:
            return InputGradient(self, dy, qx.shape, qw)
        return conv.dgrad(gx, qw, qx.shape[1:3], self.stride, self.padding, lazily=True)


class InputGradient(Lazy):
    """dx of a convolution whose dy is quantized when it is read: a first layer's, never."""

    def __init__(self, layer, dy, shape, qw):
        super().__init__(shape)
        self.layer, self.dy, self.qw, self.step = layer, dy, qw, layer.streams.step

    def form(self):
        """Its numbers, with the noise of the step that it belongs to."""
        with self.layer.streams.at(self.step):
            gx = self.layer.q.grad_x(self.dy)
        return conv.dgrad(gx, self.qw, self.shape[1:3], self.layer.stride, self.layer.padding)


class FusedBatchNorm2d(BatchNorm2d):
    """BatchNorm2d whose output, and whose gradient, are formed where they are read."""

    def forward(self, x):
        x = as_input(self, x, "(N, H, W, C)" if x.ndim == 4 else "(N, C)", self.channels)
        x = x.array() if isinstance(x, Lazy) else x
        if not is_images(x):                              # float64, or on a GPU
            return super().forward(x)
        y = Normalized(x, self.scaled(x))
        self.save(y)
        return y

    def scaled(self, x):
        """What `scaling` finds, as runs (4, run); in training, if compiled, in one call."""
        one = x.size == self.channels                     # number a channel: then `scaling` raises
        if one or not self.training or not suits(x):
            return norm.runs(*self.scaling(x))
        vectors, (self.running_mean, self.running_var) = norm.scaling(
            x, self.weight.data, self.bias.data, (self.running_mean, self.running_var), self.eps,
            self.momentum)
        return vectors

    def backward(self, dy):
        y, *rest = self.saved()
        if rest:                                          # the plain forward's
            self.save(y, *rest)
            return super().backward(dy.array() if isinstance(dy, Lazy) else dy)
        if dy.shape != y.shape:
            raise ValueError(self.mismatch(dy, y))
        if isinstance(dy, Gated) and dy.gate.source is y:
            y, dy = dy.gate, dy.dy
        if not isinstance(dy, Product | Spread):
            dy = np.asarray(dy)
        dx, self.weight.grad, self.bias.grad = y.backward(dy)
        return dx


class FusedReLU(ReLU):
    """ReLU that only notes itself where a batch norm comes before it."""

    def forward(self, x):
        if not isinstance(x, Normalized):
            return remembering(super().forward(x.array() if isinstance(x, Lazy) else x))
        y = x.rectified()
        self.save(y)
        return y

    def backward(self, dy):
        saved, = self.saved()
        if isinstance(saved, Normalized):
            return Gated(dy, saved)
        dy = dy.array() if isinstance(dy, Lazy) else dy
        return dy * saved


class Gated(Lazy):
    """dy where the rectified `gate` is above 0, else 0: formed by the batch norm's own pass."""

    def __init__(self, dy, gate):
        super().__init__(dy.shape)
        self.dy, self.gate = dy, gate

    def form(self):
        """Its numbers."""
        return np.asarray(self.dy) * (self.gate.array() > 0)


class FusedGlobalAvgPool2d(GlobalAvgPool2d):
    """GlobalAvgPool2d that, compiled, forms neither a batch norm's output nor its gradient."""

    def forward(self, x):
        if not isinstance(x, Normalized):
            return super().forward(x)
        self.save(x.shape[1:3])
        return x.pixel_mean()

    def backward(self, dy):
        size, = self.saved()
        return Spread(dy, size) if suits(dy) else pool.mean_backward(dy, size)


def in_numpy(x):
    """Whether only passes by NumPy alone take it."""
    return is_images(x) and not suits(x)


def remembering(y):
    """y, which by NumPy alone will know what somebody has found in it: the next need not look."""
    return y.view(Seen) if in_numpy(y) else y


FUSED = {Conv2d: FusedConv2d, BatchNorm2d: FusedBatchNorm2d, ReLU: FusedReLU,
         GlobalAvgPool2d: FusedGlobalAvgPool2d}


def fuse(net: Layer) -> Layer:
    """The network itself, fused; on a GPU it works as before."""
    return _exchange(net, FUSED)


def unfuse(net: Layer) -> Layer:
    """The network itself, as it was before `fuse`; what forward saved until then is let go."""
    for _, layer in net.walk():
        layer._saved = None                               # plain layers save something else
    return _exchange(net, {fused: plain for plain, fused in FUSED.items()})


def _exchange(net, classes):
    for _, layer in net.walk():
        layer.__class__ = classes.get(type(layer), type(layer))
    return net
