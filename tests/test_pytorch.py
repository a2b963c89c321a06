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
SHAPES = {"resnet20": (8, 8, 8, 3), "resnet56": (8, 16, 16, 3), "resnet18": (3, 64, 64, 3),
          "resnet50": (3, 64, 64, 3)}


def to_torch(array):
    """(N, H, W, C) → (N, C, H, W), also (K, R, S, C) → (K, C, R, S); other arrays as they are."""
    return torch.tensor(array.transpose(0, 3, 1, 2).copy() if array.ndim == 4 else array)


def from_torch(tensor):
    array = tensor.detach().numpy()
    return array.transpose(0, 2, 3, 1) if array.ndim == 4 else array


def replica(name, net, dtype):
    """The PyTorch network with the state of net."""
    module = REPLICAS[name](10).to(getattr(torch, dtype))
    state = {key: to_torch(array) for key, array in net.state().items()}
    missing, unexpected = module.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return module


def problem(name, shape, bias=0.0):
    """A float64 network whose numbers float32 holds, an input and labels.

    bias  added to every batch norm's bias: at 3 few units are near the kink of their ReLU
    """
    rng = np.random.default_rng(0)
    net = models.build(name, classes=10, recipe="fp32", dtype="float64")
    for key, p in net.params().items():
        if p.data.ndim == 1:                              # away from their first values, 1 and 0
            shift = bias if key.endswith("bias") and not key.startswith("fc") else 0
            p.data = p.data + shift + 0.2 * rng.standard_normal(p.data.shape)
            p.data = p.data.astype("float32").astype("float64")
    x = rng.standard_normal(shape, dtype="float32")
    return net, x, rng.integers(0, 10, len(x))


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
def test_float64_logits_gradients_and_statistics_are_pytorchs(name):
    net, x, labels = problem(name, SHAPES[name])
    x, module = x.astype("float64"), replica(name, net, "float64")
    assert errors(ours(net, x, labels), theirs(module, x, labels)).max() < 1e-9
    running = {key: from_torch(v) for key, v in module.state_dict().items() if "running" in key}
    moved = {key: net.state()[key] for key in running}
    assert len(moved) == 2 * sum(isinstance(m, nn.BatchNorm2d) for m in module.modules())
    assert errors(moved, running).max() < 1e-9
    logits = from_torch(module.eval()(to_torch(x)))
    assert abs(net.eval().forward(x) - logits).max() < 1e-9 * abs(logits).max()


def float32_errors(name, **more):
    """Errors of all tensors against PyTorch's float64: ours in float32, then PyTorch's."""
    net, x, labels = problem(name, SHAPES[name], **more)
    exact = theirs(replica(name, net, "float64"), x.astype("float64"), labels)
    single = models.build(name, classes=10, recipe="fp32")
    single.load_state(net.state())
    module = replica(name, single, "float32")
    return errors(ours(single, x, labels), exact), errors(theirs(module, x, labels), exact)


def test_float32_gradients_of_resnet20_are_within_1e_5():
    our, _ = float32_errors("resnet20")
    assert our.max() < 1e-5


@pytest.mark.parametrize("name", ["resnet56", "resnet18", "resnet50"])
def test_float32_errors_of_deep_networks_are_at_most_3_times_pytorchs(name):
    """The median of all tensors' errors: a bias that a later batch norm takes away again has a
    gradient of 0, hence no relative error. A ReLU that turns on rounding would be bad luck for
    either library, so units are kept away from 0.
    """
    our, their = float32_errors(name, bias=3.0)
    assert np.median(our) < 3 * np.median(their) < 1e-4


# ---- one layer -----------------------------------------------------------------------------------

PAIRS = {
    "conv": (lambda: layers.Conv2d(3, 5, (3, 2), stride=2, padding=1, bias=True),
             lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1), (4, 7, 6, 3)),
    "linear": (lambda: layers.Linear(6, 4), lambda: nn.Linear(6, 4), (5, 6)),
    "batch norm of images": (lambda: layers.BatchNorm2d(3), lambda: nn.BatchNorm2d(3),
                             (4, 5, 6, 3)),
    "batch norm of rows": (lambda: layers.BatchNorm2d(3), lambda: nn.BatchNorm1d(3), (7, 3)),
    "relu": (layers.ReLU, nn.ReLU, (4, 5, 6, 3)),
    "max pool": (lambda: layers.MaxPool2d(3, stride=2, padding=1), lambda: nn.MaxPool2d(3, 2, 1),
                 (4, 7, 6, 3)),
    "max pool without overlap": (lambda: layers.MaxPool2d(2), lambda: nn.MaxPool2d(2),
                                 (4, 7, 6, 3)),
}


@pytest.mark.parametrize("ties", [False, True], ids=["", "small integers"])
@pytest.mark.parametrize("name", PAIRS)
def test_a_layer_agrees_with_its_namesake(name, ties):
    """Small integers: half of ReLU's inputs are at or below 0, and most windows hold a tie."""
    rng, (make, make_torch, shape) = np.random.default_rng(0), PAIRS[name]
    layer, module = layers.build(make(), "fp32", dtype="float64"), make_torch().double()
    for p in layer.params().values():
        p.data = rng.standard_normal(p.data.shape)
    module.load_state_dict({key: to_torch(v) for key, v in layer.state().items()}, strict=False)
    x = rng.integers(-1, 2, shape).astype("float64") if ties else rng.standard_normal(shape)
    inputs = to_torch(x).requires_grad_()
    y, expected = layer.forward(x), module(inputs)
    dy = rng.standard_normal(y.shape)
    dx = layer.backward(dy)
    expected.backward(to_torch(dy))
    pairs = [(y, expected), (dx, inputs.grad)]
    pairs += [(layer.params()[key].grad, p.grad) for key, p in module.named_parameters()]
    pairs += [(layer.state()[key], v) for key, v in module.named_buffers() if "running" in key]
    for value, tensor in pairs:                           # float64 sums of at most 120 terms
        exact = from_torch(tensor)
        assert abs(value - exact).max() < 1e-13 * abs(exact).max()


# ---- loss and optimizer --------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.7])
def test_the_loss_and_its_gradient_are_pytorchs(label_smoothing):
    rng = np.random.default_rng(0)
    logits, labels = 5 * rng.standard_normal((9, 7)), rng.integers(0, 7, 9)
    tensor = torch.tensor(logits, requires_grad=True)
    expected = functional.cross_entropy(tensor, torch.tensor(labels),
                                        label_smoothing=label_smoothing)
    expected.backward()
    loss, dlogits = cross_entropy(logits, labels, label_smoothing)
    assert loss == pytest.approx(expected.item(), rel=1e-14)
    np.testing.assert_allclose(dlogits, tensor.grad, rtol=0, atol=1e-15)      # float64 of ≤ 1/9


def test_three_steps_of_sgd_are_pytorchs():
    net, x, labels = problem("resnet20", SHAPES["resnet20"])
    x, module = x.astype("float64"), replica("resnet20", net, "float64")
    sgd = SGD(momentum=0.9, weight_decay=0.01)
    decay = [p for p in module.parameters() if p.ndim > 1]
    rest = [p for p in module.parameters() if p.ndim == 1]
    torch_sgd = torch.optim.SGD([{"params": decay, "weight_decay": 0.01}, {"params": rest}],
                                lr=0.1, momentum=0.9)
    for lr in (0.1, 0.1, 0.05):
        ours(net, x, labels)
        sgd.step(net.params(), lr)
        torch_sgd.zero_grad()
        theirs(module, x, labels)
        for group in torch_sgd.param_groups:
            group["lr"] = lr
        torch_sgd.step()
    after = {key: from_torch(p) for key, p in module.named_parameters()}
    assert errors({key: p.data for key, p in net.params().items()}, after).max() < 1e-9
