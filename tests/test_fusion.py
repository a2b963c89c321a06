"""A fused network is the plain one, number for number.

What lazy arrays promise is in test_seen.py, what compiled kernels compute in test_cpu.py
and test_passes.py.
"""
from dataclasses import replace

import numpy as np
import pytest
from device import Device, DeviceArray, gemm
from tiny import batch

import minifqt
import models
from minifqt import NonFiniteError, Streams, backend, fusion, quantizers
from minifqt.kernels import engines, seen
from minifqt.kernels.cpu import choice
from minifqt.layers import (
    BatchNorm2d,
    Conv2d,
    GlobalAvgPool2d,
    Layer,
    Linear,
    MaxPool2d,
    ReLU,
    Sequential,
    build,
)
from models.resnet_cifar import DownBlock

needs_numba = pytest.mark.skipif(choice.numba is None, reason="numba is not there: nothing is lazy")


def trained(net, x, labels, steps=3):
    """Losses of some steps, the state afterwards, and logits in evaluation."""
    optimizer = minifqt.SGD()
    losses = [float(minifqt.train_step(net, optimizer, x.astype(net.fc.weight.data.dtype), labels,
                                       0.05, t)) for t in range(steps)]
    return losses, net.state(), np.asarray(net.eval().forward(x))


def assert_same(fused, plain):
    (losses, state, logits), (expected, plain_state, plain_logits) = fused, plain
    assert losses == expected
    assert list(state) == list(plain_state)
    for name, array in state.items():
        assert array.dtype == plain_state[name].dtype, name
        assert (array == plain_state[name]).all(), name
    assert (logits == plain_logits).all()


# ---- whole networks ------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["fp32", "qat8", "ptq8", "ptqz8", "psq4", "bhq5"])
def test_a_fused_network_trains_and_evaluates_as_the_plain_one(recipe):
    x, labels = batch((8, 16, 16, 3))
    plain, fused = (models.build("resnet20", 10, recipe, seed=1) for _ in range(2))
    assert_same(trained(minifqt.fuse(fused), x, labels), trained(plain, x, labels))


@pytest.mark.parametrize("recipe", ["ptq8", "bhq5"])
def test_a_fused_network_for_large_images_is_the_plain_one(recipe):
    x, labels = batch((4, 64, 64, 3))
    plain, fused = (models.build("resnet18", 10, recipe, seed=1) for _ in range(2))
    assert_same(trained(minifqt.fuse(fused), x, labels, 2), trained(plain, x, labels, 2))


@pytest.mark.parametrize("model", ["resnet50", "resnet8"])
def test_one_step_of_each_kind_of_block_is_the_plain_one(model):
    x, labels = batch((3, 33, 31, 3))
    plain, fused = (models.build(model, 10, "bhq5", seed=1) for _ in range(2))
    assert_same(trained(minifqt.fuse(fused), x, labels, 1), trained(plain, x, labels, 1))


@pytest.mark.parametrize("recipe", ["fp32", "bhq5"])
def test_a_fused_network_works_where_nothing_is_compiled(recipe, set_instructions):
    x, labels = batch((8, 8, 8, 3))
    plain, fused = (models.build("resnet8", 10, recipe, seed=1) for _ in range(2))
    expected = trained(plain, x, labels)
    set_instructions("numpy")
    assert_same(trained(minifqt.fuse(fused), x, labels), trained(
        models.build("resnet8", 10, recipe, seed=1), x, labels))
    np.testing.assert_allclose(trained(fused.train(), x, labels, 1)[0], trained(
        plain.train(), x, labels, 1)[0], rtol=1e-3)       # of fp32: another BLAS order
    assert expected[1].keys() == fused.state().keys()


def test_a_fused_float64_network_is_the_plain_one():
    x, labels = batch((6, 9, 9, 3))
    plain, fused = (models.build("resnet8", 10, "fp32", seed=1, dtype="float64") for _ in range(2))
    assert_same(trained(minifqt.fuse(fused), x, labels), trained(plain, x, labels))


@pytest.mark.parametrize("recipe", ["fp32", "qat8", "bhq5"])
def test_the_number_of_threads_changes_no_bit_of_a_fused_step(recipe, on_threads):
    x, labels = batch((8, 16, 16, 3))
    one, two, four = on_threads(lambda: trained(
        minifqt.fuse(models.build("resnet20", 10, recipe, seed=1)), x, labels, 2))
    assert_same(two, one)
    assert_same(four, one)


@needs_numba
@pytest.mark.parametrize("recipe", ["fp32", "qat8", "bhq5"])
@pytest.mark.parametrize("name", choice.supported()[1:-1])
def test_the_instructions_change_no_bit_of_a_fused_step(name, recipe, set_instructions):
    x, labels = batch((8, 12, 12, 3))
    results = []
    for chosen in ("auto", name):
        set_instructions(chosen)
        net = minifqt.fuse(models.build("resnet8", 10, recipe, seed=1))
        results.append(trained(net, x, labels, 2))
    assert_same(*results)


@pytest.mark.parametrize("gain", [1e37, 1e-37])
def test_a_batch_norm_of_an_unusual_range_is_the_plain_one(gain):
    x, _ = batch((4, 5, 5, 8))
    found = []
    for fused in (False, True):
        net = build(Sequential(BatchNorm2d(8), Conv2d(8, 8, 1)), "ptq8")
        net.layers[0].weight.data[:] = gain
        found.append(np.asarray((minifqt.fuse(net) if fused else net).forward(x)))
    assert np.array_equal(*found)


class Swap:
    """Rows in reverse order: a transform of one's own, without a plan for the kernels."""

    def apply(self, x):
        return x[::-1]

    undo = undo_squared = apply


@pytest.fixture
def swapped():
    """psq of rows in reverse order."""
    kind = type(quantizers.create("psq", bits=4))

    def call(self, x, stream):
        return replace(kind.__call__(self, np.ascontiguousarray(x[::-1]), stream), mix=Swap())

    quantizers.register("swapped")(type("Swapped", (kind,), {"__call__": call}))
    yield
    del quantizers.base._REGISTRY["swapped"]


def test_rows_mixed_in_ones_own_way_are_unmixed_in_a_fused_network(swapped):  # noqa: ARG001 - it registers
    x, labels = batch((6, 8, 8, 3))
    assert_same(*(trained(make(models.build("resnet8", 10, "swapped6", 0)), x, labels)
                  for make in (minifqt.fuse, lambda net: net)))


def test_unfuse_lets_go_of_what_fused_layers_have_saved():
    net = minifqt.fuse(models.build("resnet8", 10, "psq8"))
    x, labels = batch((4, 8, 8, 3))
    _, dlogits = minifqt.cross_entropy(net.forward(x), labels)
    fusion.unfuse(net)
    with pytest.raises(RuntimeError, match=r"nothing saved for backward.* Call forward\(\) again"):
        net.backward(dlogits)
    net.forward(x)
    net.backward(dlogits)


def test_unfuse_restores_the_classes_and_fusing_changes_no_name():
    net = models.build("resnet8", 10, "bhq5")
    before = [(name, type(layer)) for name, layer in net.walk()], list(net.state()), str(net)
    assert fusion.fuse(net) is net
    names, classes = zip(*net.walk(), strict=True)
    assert names == tuple(name for name, _ in before[0])
    assert {type(layer) for layer in classes} & set(fusion.FUSED) == set()
    assert list(net.state()) == before[1]
    assert fusion.unfuse(net) is net
    assert ([(name, type(layer)) for name, layer in net.walk()], list(net.state()),
            str(net)) == before


def test_a_subclass_of_a_layer_is_not_fused():
    class Leaky(ReLU):
        pass

    net = minifqt.fuse(build(Sequential(Leaky(), ReLU()), "bhq5"))
    assert [type(layer) for layer in net.layers] == [Leaky, fusion.FusedReLU]


def test_many_backwards_of_one_fused_forward_are_alike():
    x, _ = batch((5, 8, 8, 3))
    net = minifqt.fuse(models.build("resnet8", 10, "bhq5"))
    dy = np.random.default_rng(0).standard_normal(net.forward(x).shape, dtype="float32")
    with net.keep_saved():
        one, other = (np.array(net.backward(dy)) for _ in range(2))
    assert (one == other).all()


@pytest.fixture
def device(monkeypatch):
    """backend.cupy and cuBLAS replaced by the stand-in."""
    module = Device("cupy")
    monkeypatch.setattr(backend, "cupy", module)
    monkeypatch.setattr(engines, "gemm_ex", gemm)
    monkeypatch.setattr("minifqt.layers.base.device_module", lambda name: module)
    return module


@pytest.mark.parametrize("recipe", ["fp32", "bhq5"])
def test_a_fused_network_on_a_device_stays_there(device, recipe):
    x, labels = batch((6, 8, 8, 3))
    fused, plain = (models.build("resnet8", 10, recipe, device="cuda") for _ in range(2))
    for net in (minifqt.fuse(fused), plain):
        dx = net.backward(device.asarray(np.eye(10, dtype="float32"))[labels]
                          + 0 * net.forward(device.asarray(x)))
        assert isinstance(dx, DeviceArray)
    for name, p in fused.params().items():
        assert isinstance(p.grad, DeviceArray), name
        assert (p.grad.get() == plain.params()[name].grad.get()).all(), name


# ---- layers put together in other ways -----------------------------------------------------------


class Twice(Layer):
    """conv1(relu1(h)) + conv2(h) + relu2(h) + h, h a batch norm's output: read in four ways."""

    def __init__(self):
        self.bn, self.relu1, self.relu2 = BatchNorm2d(8), ReLU(), ReLU()
        self.conv1, self.conv2 = Conv2d(8, 8, 3, padding=1), Conv2d(8, 8, 1)

    def forward(self, x):
        h = self.bn.forward(x)
        a, b = self.relu1.forward(h), self.relu2.forward(h)
        return self.conv1.forward(a) + self.conv2.forward(h) + b + h

    def backward(self, dy):
        dh = self.relu1.backward(self.conv1.backward(dy)) + self.conv2.backward(dy)
        return self.bn.backward(dh + self.relu2.backward(dy) + dy)


class Added(Layer):
    """relu(bn(x)) + bn(x), whose gradients meet again."""

    def __init__(self):
        self.bn, self.relu = BatchNorm2d(8), ReLU()

    def forward(self, x):
        y = self.bn.forward(x)
        return self.relu.forward(y) + y

    def backward(self, dy):
        return self.bn.backward(self.relu.backward(dy) + dy)


class Strided(Layer):
    """Every second pixel of a convolution of a batch norm, times 2: read by slices."""

    def __init__(self):
        self.bn, self.conv = BatchNorm2d(8), Conv2d(8, 8, 3, padding=1)

    def forward(self, x):
        y = self.conv.forward(self.bn.forward(x))
        self.save(y.shape)
        return 2 * y[:, ::2, ::2]

    def backward(self, dy):
        shape, = self.saved()
        spread = np.zeros(shape, "float32")
        spread[:, ::2, ::2] = 2 * dy
        return self.bn.backward(self.conv.backward(spread))[:, ::-1]


@pytest.mark.parametrize("recipe", ["fp32", "ptq8", "sym8", "bhq5"])
@pytest.mark.parametrize("layers", [
    lambda: [BatchNorm2d(8), ReLU(), Conv2d(8, 8, 3, padding=1)],
    lambda: [Twice(), BatchNorm2d(8)],
    lambda: [Conv2d(8, 8, 3, padding=1), Added(), Added(), Conv2d(8, 8, 1)],
    lambda: [Strided()],
    lambda: [BatchNorm2d(8), ReLU(), ReLU(), Conv2d(8, 8, 1)],                # gated twice
    lambda: [ReLU(), BatchNorm2d(8), BatchNorm2d(8), ReLU()],                 # batch norms in a row
    lambda: [BatchNorm2d(8), Conv2d(8, 8, 1, bias=True), ReLU(), Conv2d(8, 8, 1)],
    lambda: [Conv2d(8, 8, 1), Conv2d(8, 8, 1), ReLU()],                       # no batch norm
    lambda: [DownBlock(8, 8)],                            # two convolutions read a batch norm
    lambda: [BatchNorm2d(8), ReLU(), GlobalAvgPool2d()],
    lambda: [BatchNorm2d(8), GlobalAvgPool2d(), Linear(8, 3)],
    lambda: [BatchNorm2d(8), Conv2d(8, 8, 1), GlobalAvgPool2d()],
    lambda: [BatchNorm2d(8), ReLU(), MaxPool2d(2), GlobalAvgPool2d()]],
    ids=["usual", "read four times", "added", "strided", "two ReLUs", "two norms", "bias",
         "no norm", "shortcut", "mean", "mean of a norm", "mean of a product", "mean of maxima"])
def test_layers_read_in_any_way_give_the_plain_stacks_gradients(layers, recipe):
    if recipe == "sym8":
        recipe = minifqt.recipe("ptq8").replace(act="sym8", grad_w="sym8", grad_x="sym8")
    x, _ = batch((5, 8, 8, 8))
    plain, fused = (build(Sequential(*layers()), recipe, seed=1) for _ in range(2))
    minifqt.fuse(fused)
    for net in (plain, fused):
        rng = np.random.default_rng(1)
        for _, layer in net.walk():
            if isinstance(layer, BatchNorm2d):
                layer.weight.data, layer.bias.data = rng.standard_normal((2, 8), dtype="float32")
                layer.weight.data[3] = -9                 # the range is that of a turned channel
        net.forward(2 * x)                                # running ranges differ from the batch's
    results = []
    for net in (plain, fused):
        y = np.asarray(net.forward(x))
        dy = np.random.default_rng(1).standard_normal(y.shape, dtype="float32")
        dx = np.asarray(net.backward(dy))
        results.append([y, dx, *(p.grad for p in net.params().values()),
                        np.asarray(net.eval().forward(3 * x))])
    for here, there in zip(*results, strict=True):
        assert here.dtype == there.dtype
        assert (here == there).all()


def test_a_fused_batch_norm_of_vectors_is_the_plain_one():
    x, _ = batch((40, 12))
    results = []
    for change in (minifqt.fuse, lambda net: net):
        net = change(build(Sequential(Linear(12, 8), BatchNorm2d(8), ReLU(), Linear(8, 3)), "psq4"))
        y = np.asarray(net.forward(x))
        results.append([y, net.backward(y), *(p.grad for p in net.params().values())])
    assert all((a == b).all() for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("make", [lambda: BatchNorm2d(8), ReLU, lambda: Conv2d(8, 8, 1)])
def test_a_second_backward_of_a_fused_layer_raises(make):
    x, _ = batch((4, 3, 3, 8))
    layer = minifqt.fuse(build(Sequential(BatchNorm2d(8), make()), "bhq5")).layers[1]
    layer.forward(minifqt.fuse(build(BatchNorm2d(8), "bhq5")).forward(x))
    np.asarray(layer.backward(x))
    with pytest.raises(RuntimeError, match="nothing saved for backward"):
        layer.backward(x)


def test_a_gradient_of_another_shape_raises_in_a_fused_batch_norm():
    x, _ = batch((4, 3, 3, 8))
    layer = minifqt.fuse(build(BatchNorm2d(8), "bhq5"))
    layer.forward(x)
    with pytest.raises(ValueError, match=r"gradient of shape \(4, 3, 3, 4\); expected"):
        layer.backward(x[..., :4])


def test_a_fused_batch_norm_of_one_number_a_channel_raises():
    layer = minifqt.fuse(build(BatchNorm2d(8), "bhq5"))
    with pytest.raises(ValueError, match="one number a channel has no variance"):
        layer.forward(np.ones((1, 1, 1, 8), "float32"))


def test_an_input_of_a_fused_layer_is_not_written_to():
    x, _ = batch((4, 6, 6, 8))
    net = minifqt.fuse(build(Sequential(BatchNorm2d(8), ReLU(), Conv2d(8, 8, 1)), "bhq5"))
    kept, dy = x.copy(), x + 1
    np.asarray(net.forward(x))
    net.layers[2].backward(dy)
    assert (x == kept).all()
    assert (dy == kept + 1).all()


# ---- what is not finite --------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fused", [False, True])
def test_what_is_not_finite_passes_batch_norm_and_relu(fused, training, bad):
    x, _ = batch((4, 5, 5, 8))
    x[1, 2, 3, 4] = bad
    net = build(Sequential(BatchNorm2d(8), ReLU()), "fp32").train(training)
    net = minifqt.fuse(net) if fused else net
    with np.errstate(invalid="ignore"):
        y = np.asarray(net.forward(x))
    assert not np.isfinite(y[1, 2, 3, 4])


@pytest.mark.parametrize("recipe", ["fp32", "ptq8", "ptqz8", "bhq5"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_batch_norm_that_makes_nan_is_found_by_the_next_layer(recipe, fused):
    x, _ = batch((4, 5, 5, 8))
    for training in (True, False):
        for field in ("weight", "bias"):
            net = build(Sequential(BatchNorm2d(8), ReLU(), Conv2d(8, 8, 1)), recipe)
            net.forward(x)                                # a running range
            net.train(training)
            getattr(net.layers[0], field).data[5] = np.nan
            net = minifqt.fuse(net) if fused else net
            with pytest.raises(NonFiniteError, match=r"^2\.act: NaN or infinity"):
                net.forward(x)


@needs_numba
@pytest.mark.parametrize("spec", ["ptq8", "sym8", "psq8", "bhq8"])
@pytest.mark.parametrize("place", [0, 100, -1])
def test_a_sum_that_holds_nan_is_found_though_its_range_is_known(spec, place):
    x, _ = batch((4, 5, 5, 8))
    x.reshape(-1)[place] = np.nan
    y = seen.add(x, np.ones_like(x))
    with pytest.raises(NonFiniteError, match="^y: NaN or infinity"):
        quantizers.parse(spec)[0](y, Streams(0).stream("y"))


# ---- memory --------------------------------------------------------------------------------------


@needs_numba
@pytest.mark.parametrize("recipe", ["fp32", "qat8", "ptq8", "bhq5"])
def test_a_steady_step_allocates_nothing_large(recipe, monkeypatch):
    x, labels = batch((8, 16, 16, 3))
    net, before = minifqt.fuse(models.build("resnet20", 10, recipe)), backend.threads()
    backend.set_threads(1)                                # a thread that is late holds on to arrays
    try:
        optimizer = minifqt.SGD()
        for step in range(2):
            minifqt.train_step(net, optimizer, x, labels, 0.05, step)
        taken, new_memory = [], backend._new_memory

        def watched(size):
            taken.append(size)
            return new_memory(size)

        monkeypatch.setattr(backend, "_new_memory", watched)
        minifqt.train_step(net, optimizer, x, labels, 0.05, 2)
    finally:
        backend.set_threads(before)
    assert taken == []
