"""Layers as a user meets them: names, building, initialisation, state, errors."""
import pickle
import re
from copy import deepcopy

import numpy as np
import pytest
from tiny import images, step

import models
from minifqt import NonFiniteError, backend, layers, recipe
from minifqt.layers import BatchNorm2d, Conv2d, Layer, Linear, ReLU, Sequential

# ---- names ---------------------------------------------------------------------------------------


def cifar_names(n):
    """Parameters of the pre-activation ResNet of 6n + 2 layers, in forward order."""
    names = ["conv1.weight"]
    for stage in (1, 2, 3):
        for block in range(n):
            shortcut = ["shortcut.weight"] if stage > 1 and block == 0 else []
            names += [f"layer{stage}.{block}.{name}" for name in (
                "bn1.weight", "bn1.bias", *shortcut, "conv1.weight", "bn2.weight", "bn2.bias",
                "conv2.weight")]
    return [*names, "bn.weight", "bn.bias", "fc.weight", "fc.bias"]


def torchvision_names(depths, convolutions):
    """Parameters of torchvision.models.resnet, in its order."""
    names = ["conv1.weight", "bn1.weight", "bn1.bias"]
    for stage, depth in enumerate(depths, start=1):
        for block in range(depth):
            for i in range(1, convolutions + 1):
                names += [f"layer{stage}.{block}.{name}"
                          for name in (f"conv{i}.weight", f"bn{i}.weight", f"bn{i}.bias")]
            if block == 0 and (stage > 1 or convolutions == 3):
                names += [f"layer{stage}.0.downsample.{name}"
                          for name in ("0.weight", "1.weight", "1.bias")]
    return [*names, "fc.weight", "fc.bias"]


@pytest.mark.parametrize(("name", "n", "count"), [
    # 3×3 convolutions 267,696, shortcuts 2,560, batch norms 1,376, classifier 650; then 6 blocks
    # more a stage, of 4,672, 18,560 and 73,984: 0.27 M and 0.86 M, as in arXiv 1512.03385, table 6
    ("resnet20", 3, 272_282), ("resnet56", 9, 272_282 + 6 * (4_672 + 18_560 + 73_984))])
def test_cifar_parameters_have_their_names_in_forward_order(name, n, count):
    params = models.build(name).params()
    assert list(params) == cifar_names(n)
    assert sum(p.data.size for p in params.values()) == count


@pytest.mark.parametrize(("name", "depths", "convolutions", "count"), [
    ("resnet18", (2, 2, 2, 2), 2, 11_689_512),            # counts as torchvision documents them
    ("resnet34", (3, 4, 6, 3), 2, 21_797_672),
    ("resnet50", (3, 4, 6, 3), 3, 25_557_032)])
def test_imagenet_parameters_are_named_as_torchvisions(name, depths, convolutions, count):
    net = models.build(name, classes=1000, recipe="fp32")
    names = torchvision_names(depths, convolutions)
    assert list(net.params()) == names
    assert sum(p.data.size for p in net.params().values()) == count
    running = {f"{bn[:-len('.weight')]}.{buffer}" for bn in names
               if re.search(r"(bn\d|downsample\.1)\.weight$", bn)
               for buffer in ("running_mean", "running_var")}
    assert net.state().keys() == {*names, *running}


def test_the_tree_is_walked_in_forward_order_with_dotted_names():
    net = models.build("resnet20")
    walked = [name for name, _ in net.walk()]
    assert walked[:4] == ["", "conv1", "layer1", "layer1.0"]
    assert walked[-4:] == ["bn", "relu", "pool", "fc"]
    assert [name for name in walked if re.fullmatch(r"layer2\.0\..*", name)] == [
        f"layer2.0.{name}"
        for name in ("bn1", "relu1", "shortcut", "conv1", "bn2", "relu2", "conv2")]
    assert len(set(walked)) == len(walked)
    assert all(layer.name == name for name, layer in net.walk() if name)


def test_printing_a_network_shows_the_four_quantizers_of_every_layer():
    lines = str(models.build("resnet20", recipe="psq4")).splitlines()
    shown = [line for line in lines if "Conv2d" in line or "Linear" in line]
    assert len(shown) == 1 + 18 + 2 + 1
    for line in shown:
        assert line.endswith("act ptq8, weight sym8, grad_w ptq8, grad_x psq4")
    assert "      conv1: Conv2d 16 → 16, 3×3, stride 1, padding 1: act ptq8" in "\n".join(lines)
    changed = recipe("fp32").replace(grad_w="ptq6:nearest")
    assert "grad_w ptq6:nearest, grad_x identity" in str(Linear(2, 2, recipe=changed))


# ---- building ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(name="resnet21"), "'resnet21'.*resnet8, resnet20"),
    (dict(recipe="bhq9"), "2 to 8 bits"),
    (dict(recipe="int8"), "'int8'"),
    (dict(dtype="float64", recipe="bhq5"), "dtype float64.*expected float32, or float64 with"),
    (dict(dtype="float64", recipe="qat8"), "dtype float64"),
    (dict(dtype="float16", recipe="fp32"), "dtype float16"),
    (dict(device="gpu"), "device 'gpu': expected auto, cpu or cuda"),
    (dict(classes=0), "classes 0"),
    (dict(channels=0), "channels 0"),
    (dict(seed=-1), "seed -1"),
])
def test_what_cannot_be_built_raises(arguments, message):
    with pytest.raises(ValueError, match=message):
        models.build(**{"name": "resnet8", **arguments})


def test_a_missing_gpu_raises_and_says_what_to_do():
    if backend.device_module("auto") is not np:
        pytest.skip("there is a GPU")
    with pytest.raises(RuntimeError, match="device cuda: .*Or use the device cpu"):
        models.build("resnet8", device="cuda")


@pytest.mark.parametrize("name", ["fp32", "qat8", "ptq8", "psq4", "bhq5"])
def test_layers_work_alone(name):
    for layer, x in ((Conv2d(3, 4, 3, stride=2, padding=1, bias=True, recipe=name),
                      images(5, 6, 6, 3)),
                     (Linear(3, 4, recipe=name), images(5, 3)),
                     (BatchNorm2d(3), images(5, 6, 6, 3)), (BatchNorm2d(3), images(5, 3))):
        y = layer.forward(x)
        dx = layer.backward(y)
        assert y.dtype == dx.dtype == np.float32
        assert dx.shape == x.shape
        assert all(p.grad.shape == p.data.shape and p.grad.dtype == np.float32
                   for p in layer.params().values())
        assert layer.training
        assert list(layer.params())[0] == "weight"


@pytest.mark.parametrize("kind", [list, tuple, lambda some: dict(enumerate(some))])
def test_layers_in_a_list_raise_instead_of_staying_untrained(kind):
    class Branches(Layer):
        def __init__(self):
            self.first, self.branches = ReLU(), kind([Conv2d(2, 2, 1), ReLU()])

    with pytest.raises(ValueError, match=r"Branches.branches holds layers in a \w+.*Sequential"):
        layers.build(Branches(), "bhq5")


def test_a_sequence_that_was_not_built_raises():
    with pytest.raises(RuntimeError, match=r"Sequential: not built. Call minifqt.layers.build"):
        Sequential(ReLU()).forward(images(2, 3, 3, 1))


@pytest.mark.parametrize(("make", "message"), [
    (lambda: Conv2d(0, 4, 3), "Conv2d 0 → 4"),
    (lambda: Conv2d(1, 4, 0), r"kernel \(0, 0\)"),
    (lambda: Conv2d(1, 4, 3, stride=0), "stride 0"),
    (lambda: Conv2d(1, 4, 3, padding=-1), "padding -1: expected at least 1, padding 0"),
    (lambda: Linear(3, 0), "Linear 3 → 0: expected at least 1 of each")])
def test_a_layer_of_impossible_size_raises(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_layer_that_defines_nothing_raises():
    with pytest.raises(TypeError, match="Layer defines no forward"):
        Layer().forward(images(1))
    with pytest.raises(TypeError, match="Layer defines no backward"):
        Layer().backward(images(1))


def test_the_input_can_have_any_number_of_channels_and_the_output_of_classes():
    net = models.build("resnet8", classes=7, recipe="fp32", channels=1)
    assert net.forward(images(2, 8, 8, 1)).shape == (2, 7)


# ---- initialisation ------------------------------------------------------------------------------


def test_weights_are_he_normal():
    for layer, fan_in in ((Conv2d(32, 64, (3, 5)), 32 * 3 * 5), (Linear(300, 200), 300)):
        z = layer.weight.data / np.sqrt(2 / fan_in)
        n = z.size                                        # 5 standard errors of each moment
        assert abs(z.mean()) < 5 / np.sqrt(n)
        assert abs((z**2).mean() - 1) < 5 * np.sqrt(2 / n)
        assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)


def test_biases_start_at_0_and_batch_norm_at_the_identity():
    for name, array in models.build("resnet20", recipe="fp32").state().items():
        if name.endswith((".bias", "running_mean")):
            assert (array == 0).all()
        elif "bn" in name:
            assert (array == 1).all()


def test_initial_weights_depend_on_the_seed_and_the_name_alone():
    net = models.build("resnet20", seed=3, recipe="bhq5")
    weight = "layer1.0.conv1.weight"
    same = [models.build("resnet20", seed=3, recipe="fp32"), models.build("resnet32", seed=3),
            models.build("resnet20", seed=3, recipe="fp32", dtype="float64")]
    for other in same:
        assert (other.params()[weight].data == net.params()[weight].data).all()
    other = models.build("resnet20", seed=4).params()
    assert (other[weight].data != net.params()[weight].data).mean() > 0.99
    drawn = [p.data for p in net.params().values() if p.data.shape == (16, 3, 3, 16)]
    assert len(drawn) == 6
    assert len({array.tobytes() for array in drawn}) == 6


def test_weight_decay_acts_on_weights_and_neither_on_biases_nor_on_batch_norm():
    for name, p in models.build("resnet18", recipe="fp32").params().items():
        assert p.decay == (name.endswith("weight") and p.data.ndim > 1)
    assert not Conv2d(2, 3, 1, bias=True).bias.decay


# ---- state ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("copy", [deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
def test_a_copy_of_a_network_is_a_network_of_its_own(copy):
    net, x = models.build("resnet8", channels=1, seed=3), images(4, 8, 8, 1)
    step(net, x)
    other = copy(net)
    assert other.streams.device is np
    for one in (net, other):
        one.streams.step = 1
    expected = step(net, x)
    assert np.array_equal(step(other, x), expected)
    other.conv1.weight.data[...] = 0
    assert net.conv1.weight.data.any()


def test_a_state_makes_the_round_trip():
    net, other = models.build("resnet8", seed=0), models.build("resnet8", seed=1)
    x = images(6, 8, 8, 3)
    step(net, x)
    other.load_state(net.state())
    assert list(other.state()) == list(net.state())
    assert all((a == b).all() for a, b in
               zip(other.state().values(), net.state().values(), strict=True))
    assert (other.eval().forward(x) == net.eval().forward(x)).all()


def test_a_loaded_state_is_a_copy_in_the_types_of_the_network():
    net = models.build("resnet8", recipe="fp32")
    arrays = {name: array.astype("float64") for name, array in net.state().items()}
    net.load_state(arrays)
    for array in arrays.values():
        array += 1
    assert all(array.dtype == np.float32 for array in net.state().values())
    assert all((array + 1 == arrays[name]).all() for name, array in net.state().items()
               if name.startswith("bn"))


def test_loading_forgets_gradients():
    layer = Linear(3, 2)
    layer.backward(layer.forward(images(4, 3)))
    layer.load_state(layer.state())
    assert layer.weight.grad is None


@pytest.mark.parametrize(("change", "message"), [
    (lambda s: s.pop("fc.bias"), r"1 .*missing.*'fc\.bias'.* 0 "),
    (lambda s: s.pop("bn.running_var"), r"missing.*'bn\.running_var'"),
    (lambda s: s.update(head=np.zeros(3)), r"1 .*unknown.*'head'"),
    (lambda s: s.update({"fc.weight": np.zeros((5, 64))}),
     r"fc\.weight has shape \(5, 64\); this network needs \(10, 64\)"),
    (lambda s: s.update({"conv1.act_range": np.zeros(3)}), r"conv1\.act_range has shape \(3,\)"),
])
def test_a_state_that_does_not_fit_raises_and_changes_nothing(change, message):
    net, state = models.build("resnet8", seed=0), models.build("resnet8", seed=1).state()
    before = {name: array.copy() for name, array in net.state().items()}
    change(state)
    with pytest.raises(ValueError, match=message):
        net.load_state(state)
    for name, array in net.state().items():
        np.testing.assert_array_equal(array, before[name])


def test_activation_ranges_may_be_missing_or_unknown_so_weights_move_between_recipes():
    quantized, plain = models.build("resnet8", seed=0), models.build("resnet8", recipe="fp32")
    step(quantized, images(4, 8, 8, 3))
    plain.load_state(quantized.state())
    assert (plain.fc.weight.data == quantized.fc.weight.data).all()
    assert np.isfinite(quantized.conv1.q.act.range).all()
    quantized.load_state(models.build("resnet8", seed=2, recipe="fp32").state())
    assert np.isnan(quantized.conv1.q.act.range).all()    # those of the old weights are forgotten


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "name", "shape"), [
    (lambda: Conv2d(3, 4, 3), "conv2d", (2, 8, 8, 4)),
    (lambda: Conv2d(3, 4, 3), "conv2d", (8, 8, 3)),
    (lambda: Linear(3, 4), "linear", (2, 4)),
    (lambda: Linear(3, 4), "linear", (2, 5, 5, 3)),
    (lambda: BatchNorm2d(3), "batchnorm2d", (4, 5, 5, 1)),
    (lambda: BatchNorm2d(3), "batchnorm2d", (4, 5, 3)),
    (lambda: models.build("resnet8"), "conv1", (2, 3, 8, 8)),
])
def test_an_input_of_another_shape_raises_and_names_the_layer(make, name, shape):
    layer, shown = make(), re.escape(str(shape))
    with pytest.raises(ValueError, match=rf"{name}: input of shape {shown}; expected"):
        layer.forward(images(*shape))


def test_batch_norm_of_one_number_a_channel_raises_in_training_alone():
    net = layers.build(Sequential(BatchNorm2d(3)), "fp32")
    with pytest.raises(ValueError, match="0: one number a channel has no variance"):
        net.forward(images(1, 1, 1, 3))
    assert net.eval().forward(images(1, 1, 1, 3)).shape == (1, 1, 1, 3)


@pytest.mark.parametrize("name", ["fp32", "bhq5"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_bad_number_in_the_input_names_the_first_quantizer(name, bad):
    net, x = models.build("resnet8", recipe=name), images(2, 8, 8, 3)
    x[1, 2, 3, 0] = bad
    with pytest.raises(NonFiniteError, match=r"conv1\.act: NaN or infinity entered a quantizer"):
        net.forward(x)


@pytest.mark.parametrize("name", ["fp32", "bhq5"])
def test_nan_in_the_gradient_names_the_quantizer_that_met_it(name):
    net, x = models.build("resnet8", recipe=name), images(4, 8, 8, 3)
    dlogits = np.ones_like(net.forward(x))
    dlogits[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match=r"fc\.grad_w: NaN or infinity") as error:
        net.backward(dlogits)
    assert error.value.name == "fc.grad_w"
