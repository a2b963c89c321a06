"""The same networks in PyTorch: logits, gradients and statistics of both must agree.

The replicas are written here from torch.nn alone, with the names of our parameters, so that weights
move with one permutation. Without PyTorch these tests skip: nothing else needs it.
"""
import numpy as np
import pytest

import models
from minifqt import SGD, cross_entropy, layers

torch = pytest.importorskip("torch", reason="PyTorch is not installed: pip install torch==2.13.0")
nn = torch.nn
functional = torch.nn.functional


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- replicas ------------------------------------------------------------------------------------


def conv3(inputs, outputs, stride=1):
    return nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)


class CifarBlock(nn.Module):
    """Pre-activation: bn, relu, conv, bn, relu, conv; the shortcut starts after the first relu."""

    def __init__(self, inputs, outputs):
        super().__init__()
        stride = 1 if inputs == outputs else 2
        self.bn1, self.conv1 = nn.BatchNorm2d(inputs), conv3(inputs, outputs, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(outputs), conv3(outputs, outputs)
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        a = self.bn1(x).relu()
        b = self.conv2(self.bn2(self.conv1(a)).relu())
        return b + (self.shortcut(a) if hasattr(self, "shortcut") else x)


class CifarNet(nn.Module):
    def __init__(self, n, classes):
        super().__init__()
        self.conv1 = conv3(3, 16)
        self.layer1 = nn.Sequential(*[CifarBlock(16, 16) for _ in range(n)])
        self.layer2 = nn.Sequential(CifarBlock(16, 32), *[CifarBlock(32, 32) for _ in range(n - 1)])
        self.layer3 = nn.Sequential(CifarBlock(32, 64), *[CifarBlock(64, 64) for _ in range(n - 1)])
        self.bn, self.fc = nn.BatchNorm2d(64), nn.Linear(64, classes)

    def forward(self, x):
        x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
        return self.fc(self.bn(x).relu().mean(dim=(2, 3)))


class Basic(nn.Module):
    """Two 3×3 convolutions, the first with the stride."""

    expansion = 1

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3(inputs, width, stride), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = conv3(width, width), nn.BatchNorm2d(width)
        if stride != 1 or inputs != width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False),
                                            nn.BatchNorm2d(width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class Bottle(nn.Module):
    """1×1, 3×3 with the stride (v1.5), 1×1 to four times the width."""

    expansion = 4

    def __init__(self, inputs, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.conv2 = conv3(width, width, stride)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if stride != 1 or inputs != 4 * width:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, 4 * width, 1, stride, bias=False),
                                            nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())).relu()
        y = self.bn3(self.conv3(y))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class ImageNet(nn.Module):
    def __init__(self, block, depths, classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1, self.maxpool = nn.BatchNorm2d(64), nn.MaxPool2d(3, 2, 1)
        inputs = 64
        for stage, depth in enumerate(depths):
            width = 64 * 2**stage
            blocks = [block(inputs, width, 2 if stage else 1)]
            inputs = width * block.expansion
            blocks += [block(inputs, width, 1) for _ in range(depth - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x):
        x = self.maxpool(self.bn1(self.conv1(x)).relu())
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean(dim=(2, 3)))


REPLICAS = {
    "resnet20": lambda classes: CifarNet(3, classes),
    "resnet56": lambda classes: CifarNet(9, classes),
    "resnet18": lambda classes: ImageNet(Basic, (2, 2, 2, 2), classes),
    "resnet50": lambda classes: ImageNet(Bottle, (3, 4, 6, 3), classes),
}
SHAPES = {"resnet20": (8, 16, 16, 3), "resnet56": (8, 16, 16, 3), "resnet18": (3, 64, 64, 3),
          "resnet50": (3, 64, 64, 3)}


def to_torch(array):
    """(N, H, W, C) → (N, C, H, W), also (K, R, S, C) → (K, C, R, S); other arrays as they are."""
    return torch.tensor(array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array)


def from_torch(tensor):
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def replica(net, name, classes, dtype):
    """The PyTorch network with the state of net."""
    module = REPLICAS[name](classes).to(getattr(torch, dtype))
    state = {key: to_torch(array) for key, array in net.state().items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return module


def problem(name):
    """A network in both libraries' float64, an input and labels; batch norms away from 1 and 0."""
    rng, classes = np.random.default_rng(0), 10
    net = models.build(name, classes=classes, recipe="fp32", dtype="float64")
    for p in net.params().values():
        if p.data.ndim == 1:
            p.data = (p.data + 0.2 * rng.standard_normal(p.data.shape)).astype("float32")
            p.data = p.data.astype("float64")             # the same in float32
    x = rng.standard_normal(SHAPES[name], dtype="float32")
    return net, x, rng.integers(0, classes, len(x))


def ours(net, x, labels):
    """Logits, dx and the gradients by name."""
    logits = net.forward(x)
    _, dlogits = cross_entropy(logits, labels, 0.1)
    results = {"logits": logits, "dx": net.backward(dlogits)}
    return results | {name: p.grad for name, p in net.params().items()}


def theirs(module, x, labels):
    x = to_torch(x).requires_grad_()
    logits = module(x)
    functional.cross_entropy(logits, torch.tensor(labels), label_smoothing=0.1).backward()
    results = {"logits": from_torch(logits), "dx": from_torch(x.grad)}
    return results | {name: from_torch(p.grad) for name, p in module.named_parameters()}


def errors(results, exact):
    """Largest error of each tensor over its largest element."""
    assert results.keys() == exact.keys()
    return np.array([abs(results[name] - exact[name]).max() / abs(exact[name]).max()
                     for name in exact])


# ---- whole networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPLICAS)
def test_float64_logits_and_gradients_are_pytorchs(name):
    net, x, labels = problem(name)
    x = x.astype("float64")
    module = replica(net, name, 10, "float64")
    exact = theirs(module, x, labels)
    assert errors(ours(net, x, labels), exact).max() < 1e-9
    running = {key: from_torch(v) for key, v in module.state_dict().items() if "running" in key}
    assert errors({key: net.state()[key] for key in running}, running).max() < 1e-12   # float64
    logits = from_torch(module.eval()(to_torch(x)))
    assert abs(net.eval().forward(x) - logits).max() < 1e-9 * abs(logits).max()


@pytest.mark.parametrize("name", REPLICAS)
def test_float32_gradients_are_as_good_as_pytorchs(name):
    """Both against float64. A ReLU that turns on rounding is bad luck that strikes either library,
    hence the median over all tensors beside the worst of them.
    """
    net, x, labels = problem(name)
    exact = theirs(replica(net, name, 10, "float64"), x.astype("float64"), labels)
    single = models.build(name, classes=10, recipe="fp32")
    single.load_state(net.state())
    our = errors(ours(single, x, labels), exact)
    their = errors(theirs(replica(single, name, 10, "float32"), x, labels), exact)
    if name == "resnet20":
        assert our.max() < 1e-5
    assert np.median(our) < 3 * np.median(their)
    assert our.max() < 3 * their.max()
