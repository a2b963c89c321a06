"""The layers that stay in floating point, as in the paper: norm, ReLU, pooling, reshaping.

Each is a few lines; sums over batch and pixels are in kernels/norm.py and kernels/pool.py.
"""
from minifqt.backend import array_module
from minifqt.kernels import norm, pool
from minifqt.layers.base import Layer, Param, as_input, build


class BatchNorm2d(Layer):
    """y = weight · (x − mean) / √(var + 1e-5) + bias for each channel.

    x (N, H, W, C) or (N, C); weight, bias, running_mean, running_var (C,)
    Training uses the batch's mean and biased variance (one pass, in float64) and moves the running
    ones by 0.1, the variance unbiased; evaluation uses the running ones. torch.nn.BatchNorm2d.
    Raises ValueError where a channel has a single number in training.
    """

    buffers = ("running_mean", "running_var")
    eps, momentum = 1e-5, 0.1

    def __init__(self, channels: int):
        self.channels = channels
        build(self, "fp32")

    def initialize(self, xp, dtype):
        self.weight = Param(xp.ones(self.channels, dtype), decay=False)
        self.bias = Param(xp.zeros(self.channels, dtype), decay=False)
        self.running_mean = xp.zeros(self.channels, dtype)
        self.running_var = xp.ones(self.channels, dtype)

    def forward(self, x):
        x = as_input(self, x, "(N, H, W, C)" if x.ndim == 4 else "(N, C)", self.channels)
        mean, inv_std, weight, bias = self.scaling(x)
        self.save(x, mean, inv_std)
        return norm.normalize(x, mean, inv_std, weight, bias)

    def scaling(self, x):
        """mean, 1/std, weight, bias for this batch; in training the running ones move."""
        if self.training:
            mean, var = norm.statistics(x)
            self._move_running(mean, var, x.size // self.channels)
        else:
            mean, var = self.running_mean, self.running_var
        inv_std = 1 / array_module(x).sqrt(var + self.eps)
        return mean, inv_std, self.weight.data, self.bias.data

    def backward(self, dy):
        x, mean, inv_std = self.saved()
        if dy.shape != x.shape:
            raise ValueError(self.mismatch(dy, x))
        dx, dweight, dbias = norm.backward(dy, x, mean, inv_std, self.weight.data)
        self.weight.grad, self.bias.grad = dweight, dbias
        return dx

    def mismatch(self, dy, x):
        """What to say of a gradient that does not fit."""
        return (f"{self.name}: gradient of shape {dy.shape}; expected the shape of the last "
                f"output, {x.shape}.")

    def _move_running(self, mean, var, count):
        if count < 2:
            raise ValueError(f"{self.name}: one number a channel has no variance; train with a "
                             "larger batch.")
        unbiased = var * (count / (count - 1))
        self.running_mean = self.running_mean + self.momentum * (mean - self.running_mean)
        self.running_var = self.running_var + self.momentum * (unbiased - self.running_var)

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
    """Maximum of kernel_size × kernel_size windows; the first maximum wins a tie.

    (N, H, W, C) → (N, P, Q, C). stride defaults to kernel_size; padding never wins.
    """

    def __init__(self, kernel_size: int, stride: int | None = None, padding: int = 0):
        self.kernel_size, self.padding = kernel_size, padding
        self.stride = kernel_size if stride is None else stride
        if 2 * padding > kernel_size:
            raise ValueError(f"padding {padding} is more than half of kernel_size {kernel_size}: "
                             "a window would hold no pixel.")

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
