"""Every backward against central differences of its forward: float64 through Identity.

The upstream gradient is random: under an all-ones one, batch norm and softmax have a gradient of 0
and a backward that returns zeros would pass. Parameters are random too: at their first values, 1
and 0, a batch norm's weight could be forgotten.
"""
import numpy as np
import pytest

import models
from minifqt import cross_entropy
from minifqt.layers import (
    BatchNorm2d,
    Conv2d,
    Flatten,
    GlobalAvgPool2d,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    build,
)
from models import resnet_cifar, resnet_imagenet

STEP = 1e-5
# A central difference is off by step² · f‴ / 6, about 1e-10, and by the rounding of f over the
# step, 1e-16 · |f| / 1e-5 with |f| up to some hundred: 1e-9. Gradients are of size 1.
TOLERANCE = 1e-7


def random_parameters(layer, rng):
    """float64 through Identity, and every parameter away from 0 and 1."""
    build(layer, "fp32", dtype="float64")
    for p in layer.params().values():
        p.data = rng.standard_normal(p.data.shape) * (0.5 if p.data.ndim > 1 else 1)
    return layer


def assert_gradient(value, array, gradient, rng, elements=30):
    """d value() / d array at up to `elements` random elements of array, which is put back."""
    assert gradient.shape == array.shape
    picked = rng.permutation(array.size)[:elements]
    differences, flat = np.empty(len(picked)), array.reshape(-1)
    for i, element in enumerate(picked):
        before = flat[element]
        flat[element] = before + STEP
        above = value()
        flat[element] = before - STEP
        differences[i] = (above - value()) / (2 * STEP)
        flat[element] = before
    error = abs(differences - gradient.reshape(-1)[picked]).max()
    assert error <= TOLERANCE * abs(differences).max()


def assert_gradients(layer, x, rng, elements=30):
    """The gradients of the input and of every parameter."""
    upstream = rng.standard_normal(layer.forward(x).shape)
    dx = layer.backward(upstream)

    def value():
        return (layer.forward(x) * upstream).sum()

    assert dx.dtype == np.float64
    assert_gradient(value, x, dx, rng, elements)
    for p in layer.params().values():
        assert p.grad.dtype == np.float64
        assert_gradient(value, p.data, p.grad, rng, elements)


LAYERS = {
    "conv 3x3": (lambda: Conv2d(3, 4, 3, padding=1), (2, 5, 4, 3)),
    "conv 1x1": (lambda: Conv2d(3, 4, 1), (2, 3, 4, 3)),
    "conv 1x1 stride 2": (lambda: Conv2d(3, 4, 1, stride=2), (2, 5, 6, 3)),
    "conv with bias": (lambda: Conv2d(2, 3, 3, bias=True), (2, 5, 6, 2)),
    "conv 2x3 stride 2": (lambda: Conv2d(3, 2, (2, 3), stride=2, padding=1, bias=True),
                          (2, 6, 5, 3)),
    "conv 4x1 stride 3": (lambda: Conv2d(2, 2, (4, 1), stride=3, padding=2), (2, 7, 6, 2)),
    "conv 7x7 stride 2": (lambda: Conv2d(2, 3, 7, stride=2, padding=3), (2, 6, 5, 2)),
    "linear": (lambda: Linear(5, 4), (3, 5)),
    "linear without bias": (lambda: Linear(5, 4, bias=False), (3, 5)),
    "batch norm of images": (lambda: BatchNorm2d(3), (4, 3, 5, 3)),
    "batch norm of rows": (lambda: BatchNorm2d(3), (40, 3)),
    "relu": (ReLU, (3, 4, 4, 2)),
    "max pool": (lambda: MaxPool2d(2), (2, 4, 6, 3)),
    "max pool, overlapping, padded": (lambda: MaxPool2d(3, stride=2, padding=1), (2, 6, 7, 3)),
    "max pool with gaps": (lambda: MaxPool2d(2, stride=3), (2, 7, 8, 2)),
    "average pool": (GlobalAvgPool2d, (3, 4, 5, 2)),
    "flatten": (Flatten, (3, 2, 3, 2)),
    "sequential": (lambda: Sequential(Conv2d(2, 3, 3), BatchNorm2d(3), ReLU(), Flatten(),
                                      Linear(12, 2)), (4, 4, 4, 2)),
    "CIFAR block": (lambda: resnet_cifar.Block(3), (4, 4, 5, 3)),
    "CIFAR block of half the size": (lambda: models.build("resnet8").layer2.layers[0],
                                     (3, 4, 5, 16)),
    "ImageNet basic block": (lambda: resnet_imagenet.BasicBlock(3, 3, 1), (4, 4, 5, 3)),
    "ImageNet basic block with stride": (lambda: resnet_imagenet.BasicBlock(3, 4, 2),
                                         (4, 5, 6, 3)),
    "ImageNet bottleneck": (lambda: resnet_imagenet.Bottleneck(8, 2, 1), (4, 4, 5, 8)),
    "ImageNet bottleneck, wider": (lambda: resnet_imagenet.Bottleneck(3, 2, 1), (4, 4, 5, 3)),
    "ImageNet bottleneck with stride": (lambda: resnet_imagenet.Bottleneck(3, 2, 2), (4, 5, 6, 3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_backward_is_the_derivative_of_forward(name):
    rng, (make, shape) = np.random.default_rng(0), LAYERS[name]
    assert_gradients(random_parameters(make(), rng), rng.standard_normal(shape), rng)


def test_batch_norm_has_no_gradient_along_its_input_nor_along_ones():
    rng = np.random.default_rng(0)
    layer, x = random_parameters(BatchNorm2d(3), rng), rng.standard_normal((5, 4, 4, 3))
    layer.forward(x)
    dx = layer.backward(rng.standard_normal(x.shape))
    for direction in (x, np.ones_like(x)):                # y does not change, but for eps
        assert abs((dx * direction).sum(axis=(0, 1, 2))).max() < 1e-3 * abs(dx).sum()


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.5])
def test_the_gradient_of_the_loss_is_its_derivative(label_smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 3 * rng.standard_normal((6, 5)), rng.integers(0, 5, 6)
    _, dlogits = cross_entropy(logits, labels, label_smoothing)
    assert_gradient(lambda: cross_entropy(logits, labels, label_smoothing)[0], logits, dlogits, rng)


NETS = {
    "CIFAR": (lambda: models.build("resnet8", classes=4), (4, 9, 8, 3)),
    "ImageNet": (lambda: resnet_imagenet.ResNet(resnet_imagenet.BasicBlock, (2, 1, 1, 1), 4, 3),
                 (3, 33, 36, 3)),
}


@pytest.mark.parametrize("name", NETS)
def test_a_whole_network_agrees_along_a_direction_of_each_tensor(name):
    """A random direction plus the gradient's own: two forwards see all elements of a tensor."""
    rng, (make, shape) = np.random.default_rng(0), NETS[name]
    net = build(make(), "fp32", dtype="float64")
    for p in net.params().values():
        p.data = p.data + 0.1 * rng.standard_normal(p.data.shape) * abs(p.data).max()
    x, labels = rng.standard_normal(shape), rng.integers(0, 4, shape[0])
    _, dlogits = cross_entropy(net.forward(x), labels, 0.1)
    dx = net.backward(dlogits)

    def loss():
        return cross_entropy(net.forward(x), labels, 0.1)[0]

    step = 1e-6
    for array, gradient in [(x, dx), *((p.data, p.grad) for p in net.params().values())]:
        direction, size = rng.standard_normal(array.shape), np.linalg.norm(gradient)
        direction = direction / np.linalg.norm(direction) + gradient / size
        array += step * direction
        above = loss()
        array -= 2 * step * direction
        difference = (above - loss()) / (2 * step)
        array += step * direction
        # rounding of the loss over the step, 1e-10, and the few units that turn within it
        assert abs(difference - (gradient * direction).sum()) <= 1e-5 * size
