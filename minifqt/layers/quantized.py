"""The two layers whose products run on integers: see four quantizers and three products in each.

There is no branch on quantization: full precision is the Identity quantizer on the same path.
Next: quantizers/psq.py, then kernels/reference.py. What a Layer is: base.py.
"""
import math
from numbers import Integral

from minifqt.kernels import conv, gemm, norm
from minifqt.layers.base import Param, Quantized, as_input, build, he_normal
from minifqt.recipes import Recipe


class Conv2d(Quantized):
    """y = x ∗ w (+ b) in three integer products.

    x (N, H, W, C), weight (K, R, S, C), y (N, P, Q, K); (N, H, W, C) everywhere
    kernel_size  R = S, or (R, S); stride and padding are the same in both directions
    bias         added in float32; its gradient is the sum of the unquantized dy
    Raises ValueError for sizes below 1, an input with other channels or smaller than the kernel.
    Source: arXiv 2010.14298, the framework of fully quantized training and its two gradients.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int | tuple[int, int],
                 stride: int = 1, padding: int = 0, bias: bool = False,
                 recipe: Recipe | str = "fp32"):
        square = isinstance(kernel_size, Integral)
        self.kernel_size = (kernel_size, kernel_size) if square else tuple(kernel_size)
        if min(in_channels, out_channels, stride, *self.kernel_size, padding + 1) < 1:
            raise ValueError(f"Conv2d {in_channels} → {out_channels}, kernel {self.kernel_size}, "
                             f"stride {stride}, padding {padding}: expected at least 1, padding 0.")
        self.in_channels, self.out_channels, self.has_bias = in_channels, out_channels, bias
        self.stride, self.padding = stride, padding
        build(self, recipe)

    def forward(self, x):                                 # (N, H, W, C)
        x = as_input(self, x, "(N, H, W, C)", self.in_channels)
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

    def initialize(self, xp, dtype):
        shape = (self.out_channels, *self.kernel_size, self.in_channels)
        self.weight = he_normal(self, shape, math.prod(shape[1:]), xp, dtype)
        if self.has_bias:
            self.bias = Param(xp.zeros(self.out_channels, dtype), decay=False)

    def summary(self):
        R, S = self.kernel_size
        return (f"Conv2d {self.in_channels} → {self.out_channels}, {R}×{S}, stride {self.stride}, "
                f"padding {self.padding}: {self.q}")


class Linear(Quantized):
    """y = x wᵀ + b in three integer GEMMs.

    x (N, I), weight (O, I), y (N, O)
    bias  added in float32; its gradient is the sum of the unquantized dy
    Raises ValueError for sizes below 1, and for an input with other features.
    Source: arXiv 2010.14298, the framework of fully quantized training and its two gradients.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True,
                 recipe: Recipe | str = "fp32"):
        if min(in_features, out_features) < 1:
            raise ValueError(f"Linear {in_features} → {out_features}: expected at least 1 of each.")
        self.in_features, self.out_features, self.has_bias = in_features, out_features, bias
        build(self, recipe)

    def forward(self, x):                                 # (N, I)
        x = as_input(self, x, "(N, I)", self.in_features)
        qx = self.q.act(x)                                # (N, I)
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

    def initialize(self, xp, dtype):
        shape = (self.out_features, self.in_features)
        self.weight = he_normal(self, shape, self.in_features, xp, dtype)
        if self.has_bias:
            self.bias = Param(xp.zeros(self.out_features, dtype), decay=False)

    def summary(self):
        return f"Linear {self.in_features} → {self.out_features}: {self.q}"
