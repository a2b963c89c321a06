"""The four quantizers of a layer, each in its place, and the running range of its input."""
import logging
import re

import numpy as np
import pytest
from tiny import images, step

import models
from minifqt import layers, recipe
from minifqt.layers import Conv2d, Linear
from models.resnet_cifar import DownBlock

# ---- the four quantizers -------------------------------------------------------------------------


def test_every_stream_of_a_network_has_a_name_of_its_own():
    net = models.build("resnet20", recipe="bhq5", seed=5)
    streams = {}
    for name, layer in net.walk():
        if isinstance(layer, layers.Quantized):
            for place in ("act", "weight", "grad_w", "grad_x"):
                bound = getattr(layer.q, place)
                assert bound.name == bound.stream.name == f"{name}.{place}"
                assert bound.stream.streams is net.streams
                streams[bound.name] = tuple(bound.stream.key)
    assert len(streams) == 4 * (1 + 18 + 2 + 1)
    assert len(set(streams.values())) == len(streams)


def test_forward_rounds_to_nearest_and_backward_stochastically():
    layer = Linear(4, 3, recipe="psq4")
    assert {place: bound.rounding for place, bound in vars(layer.q).items()} == {
        "act": "nearest", "weight": "nearest", "grad_w": "stochastic", "grad_x": "stochastic"}
    x, dy = images(5, 4), images(5, 3)
    first = layer.forward(x), layer.backward(dy), layer.weight.grad
    layer.streams.step = 1
    again = layer.forward(x), layer.backward(dy), layer.weight.grad
    assert (first[0] == again[0]).all()
    assert (first[1] != again[1]).any()
    assert (first[2] != again[2]).any()


@pytest.mark.parametrize(("make", "x"), [
    (lambda r: Linear(4, 3, recipe=r), images(6, 4)),
    (lambda r: Conv2d(4, 3, 3, padding=1, recipe=r), images(6, 5, 5, 4))], ids=["linear", "conv"])
def test_each_quantizer_acts_in_its_own_place(make, x):
    """Coarse in one place alone: the results that it enters change, the others do not."""
    enters = {"act": ("y", "dw"), "weight": ("y", "dx"), "grad_w": ("dw",), "grad_x": ("dx",)}

    def results(r):
        layer = make(r)
        y = layer.forward(x)
        dx = layer.backward(np.random.default_rng(0).standard_normal(y.shape, dtype="float32"))
        return {"y": y, "dx": dx, "dw": layer.weight.grad}

    exact = results("fp32")
    for place, entered in enters.items():
        coarse = results(recipe("fp32").replace(**{place: "ptq2"}))
        for name, value in coarse.items():
            assert (value != exact[name]).any() == (name in entered), (place, name)


def test_conv1_and_the_shortcut_share_their_input_codes_but_not_their_noise():
    block = layers.build(DownBlock(4, 6), "psq4")
    block.forward(images(3, 6, 6, 4))
    x1, x2 = block.conv1.saved()[0], block.shortcut.saved()[0]
    assert (x1.codes == x2.codes).all()
    dy = images(3, 3, 3, 6)
    for place in ("grad_w", "grad_x"):
        first, second = (getattr(layer.q, place)(dy) for layer in (block.conv1, block.shortcut))
        assert (first.scale == second.scale).all()
        assert (first.codes != second.codes).any()


def test_the_two_copies_of_a_gradient_have_different_noise():
    layer = Linear(4, 3, recipe="ptq8")
    dy = images(50, 3)
    gw, gx = layer.q.grad_w(dy), layer.q.grad_x(dy)
    assert gw.name == "linear.grad_w"
    assert gx.name == "linear.grad_x"
    assert (gw.scale == gx.scale).all()
    assert (gw.codes != gx.codes).any()


def test_the_gradient_of_a_bias_is_the_sum_of_the_unquantized_dy():
    for layer, x in ((Linear(4, 3, recipe="ptq2"), images(9, 4)),
                     (Conv2d(4, 3, 1, bias=True, recipe="ptq2"), images(9, 5, 5, 4))):
        dy = np.random.default_rng(1).standard_normal(layer.forward(x).shape, dtype="float32")
        layer.backward(dy)
        exact = dy.sum(axis=tuple(range(dy.ndim - 1)), dtype="float64")
        # 16 float32 terms at a time, relative to Σ|dy|
        assert abs(layer.bias.grad - exact).max() < 16 * 2.0**-24 * abs(dy).sum()


def test_a_bias_is_added_to_every_pixel():
    layer = Conv2d(2, 3, 3, padding=1, bias=True)
    x = images(2, 4, 4, 2)
    without = layer.forward(x)
    layer.bias.data = np.float32([1, 2, 3])
    np.testing.assert_array_equal(layer.forward(x), without + np.float32([1, 2, 3]))


# ---- running ranges ------------------------------------------------------------------------------


def test_the_running_range_starts_as_nan_takes_the_first_batch_and_then_moves_by_a_tenth():
    layer, x = Linear(4, 3, recipe="ptq8"), images(5, 4)
    assert np.isnan(layer.q.act.range).all()
    layer.forward(x)
    assert (layer.q.act.range == [x.min(), x.max()]).all()
    layer.forward(3 * x)
    moved = 0.9 * np.array([x.min(), x.max()]) + 0.1 * np.array([3 * x.min(), 3 * x.max()])
    np.testing.assert_allclose(layer.q.act.range, moved, rtol=3e-7)           # float32
    assert (layer.state()["act_range"] == layer.q.act.range).all()
    before = layer.q.act.range
    layer.eval().forward(100 * x)
    assert (layer.q.act.range == before).all()


def test_evaluation_clips_to_the_running_range():
    layer = Linear(1, 1, bias=False, recipe="ptq8")
    layer.weight.data = np.ones((1, 1), "float32")
    layer.forward(np.float32([[-1], [2]]))
    y = layer.eval().forward(np.float32([[-5], [-1], [2], [9]]))
    np.testing.assert_allclose(y[:, 0], [-1, -1, 2, 2], rtol=1e-6)            # float32 scales


def test_evaluation_does_not_depend_on_how_the_test_set_is_cut_into_batches():
    net, x = models.build("resnet8", recipe="bhq5"), images(8, 8, 8, 3)
    step(net, x[:4])
    net.eval()
    whole = net.forward(x)
    assert (np.concatenate([net.forward(part) for part in np.split(x, [1, 3])]) == whole).all()


def test_eval_range_batch_takes_the_range_of_the_batch_as_the_paper_does():
    x = images(6, 4)
    layer = Linear(4, 3, recipe=recipe("ptq8").replace(eval_range="batch"))
    trained = layer.forward(x)
    layer.forward(5 * x)
    layer.eval()
    assert (layer.forward(x) == trained).all()
    assert (layer.forward(x[:2]) != trained[:2]).any()


def test_evaluation_before_training_warns_once_and_uses_the_batch(caplog):
    net, x = models.build("resnet8"), images(4, 8, 8, 3)
    with caplog.at_level(logging.WARNING, logger="minifqt"):
        first = net.eval().forward(x)
        second = net.forward(x)
    assert [record.name for record in caplog.records] == ["minifqt"]
    assert re.match(r"conv1\.act has no running range yet: evaluation uses the batch's",
                    caplog.records[0].getMessage())
    assert (first == second).all()


def test_a_loaded_range_is_used_and_a_nan_range_is_none(caplog):
    trained, x = Linear(4, 3, recipe="ptq8"), images(5, 4)
    trained.forward(x)
    other = Linear(4, 3, recipe="ptq8")
    other.load_state(trained.state())
    assert (other.eval().forward(9 * x) == trained.eval().forward(9 * x)).all()
    assert not caplog.records
    other.load_state(Linear(4, 3, recipe="ptq8").state())
    other.forward(x)
    assert "no running range" in caplog.text


def test_in_full_precision_there_is_no_range():
    assert not any("range" in name for name in models.build("resnet8", recipe="fp32").state())
