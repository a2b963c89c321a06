"""Batch norm, ReLU, pooling and the loss: the formulas, ties, padding, limits."""
import numpy as np
import pytest
from tiny import images

from minifqt import cross_entropy, layers
from minifqt.layers import BatchNorm2d, MaxPool2d, ReLU


def test_batch_norm_normalizes_and_moves_its_running_statistics_by_a_tenth():
    x = 3 + 2 * images(6, 4, 5, 2)
    layer = BatchNorm2d(2)
    layer.weight.data, layer.bias.data = np.float32([2, -1]), np.float32([5, 7])
    x64, axes = x.astype("float64"), (0, 1, 2)
    mean, var = x64.mean(axis=axes), x64.var(axis=axes)
    y = layer.forward(x)
    exact = (x64 - mean) / np.sqrt(var + 1e-5) * [2, -1] + [5, 7]
    assert abs(y - exact).max() < 1e-5                    # float32, values up to 12
    running = 0.1 * mean, 0.9 + 0.1 * var * 120 / 119     # from 0 and 1, the variance unbiased
    np.testing.assert_allclose(layer.running_mean, running[0], rtol=1e-6)     # float32
    np.testing.assert_allclose(layer.running_var, running[1], rtol=1e-6)
    layer.forward(x)
    np.testing.assert_allclose(layer.running_mean, 1.9 * running[0], rtol=1e-6)
    y = layer.eval().forward(x)
    exact = ((x64 - layer.running_mean) / np.sqrt(layer.running_var.astype("float64") + 1e-5)
             * [2, -1] + [5, 7])
    assert abs(y - exact).max() < 1e-5                    # float32, values up to 12


def test_batch_norms_epsilon_is_1e_5():
    layer = layers.build(BatchNorm2d(1), "fp32", dtype="float64")
    y = layer.forward(np.array([[-1e-3], [1e-3]]))
    np.testing.assert_allclose(y, [[-1e-3 / np.sqrt(1.1e-5)], [1e-3 / np.sqrt(1.1e-5)]], rtol=1e-12)


def test_relu_is_0_below_and_its_gradient_at_0_is_0():
    layer = ReLU()
    assert (layer.forward(np.float32([[-2, -0.0, 0, 3]])) == [[0, 0, 0, 3]]).all()
    assert (layer.backward(np.float32([[5, 6, 7, 8]])) == [[0, 0, 0, 8]]).all()


def test_the_first_maximum_wins_a_tie_and_overlapping_windows_add():
    layer, x = MaxPool2d(2, stride=1), np.zeros((1, 2, 3, 1), "float32")
    x[0, :, 1] = 1                                        # both windows see two equal maxima
    assert (layer.forward(x) == 1).all()
    dx = layer.backward(np.float32([10, 100]).reshape(1, 1, 2, 1))
    assert (dx[0, :, :, 0] == [[0, 110, 0], [0, 0, 0]]).all()


def test_padding_never_wins_in_max_pooling():
    layer, x = MaxPool2d(3, stride=2, padding=1), -1 - abs(images(2, 5, 5, 3))
    y = layer.forward(x)
    assert (y == [[[x[n, max(0, 2 * p - 1):2 * p + 2, max(0, 2 * q - 1):2 * q + 2].max(axis=(0, 1))
                    for q in range(3)] for p in range(3)] for n in range(2)]).all()
    assert layer.backward(np.ones_like(y)).sum() == y.size


def test_max_pooling_with_too_much_padding_raises():
    with pytest.raises(ValueError, match="padding 2 is more than half of kernel_size 3"):
        MaxPool2d(3, padding=2)


# ---- the loss ------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_cross_entropy_against_smoothed_targets():
    logits, labels = np.log(np.array([[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]])), np.array([0, 1])
    loss, dlogits = cross_entropy(logits, labels)
    assert loss == pytest.approx(-(np.log(0.5) + np.log(0.2)) / 2, rel=1e-14)
    np.testing.assert_allclose(dlogits, [[-0.25, 0.125, 0.125], [0.05, -0.4, 0.35]], rtol=1e-14)
    loss, dlogits = cross_entropy(logits, labels, label_smoothing=0.3)
    target = np.array([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1]])
    assert loss == pytest.approx(-(target * logits).sum() / 2, rel=1e-14)
    np.testing.assert_allclose(dlogits, (np.exp(logits) - target) / 2, atol=1e-16)  # float64


def test_the_loss_of_huge_logits_is_finite():
    logits = np.float32([[1e30, 0], [-1e30, 0]])
    loss, dlogits = cross_entropy(logits, np.array([0, 0]))
    assert loss == pytest.approx(5e29, rel=1e-7)
    assert (dlogits == [[0, 0], [-0.5, 0.5]]).all()
    assert dlogits.dtype == np.float32


@pytest.mark.parametrize(("labels", "smoothing", "message"), [
    (np.array([0, 1, 2]), 0, r"labels \(3,\)"),
    (np.array([[0], [1]]), 0, r"labels \(2, 1\)"),
    (np.array([0, 3]), 0, r"labels 0\.\.3 for 3 classes: expected 0\.\.2"),
    (np.array([-1, 0]), 0, r"labels -1\.\.0 for 3 classes"),
    (np.array([0.0, 1.0]), 0, "expected integers"),
    (np.array([0, 1]), 1.5, "label_smoothing 1.5"),
    (np.array([0, 1]), -0.1, "label_smoothing -0.1"),
])
def test_labels_or_a_smoothing_that_do_not_fit_raise(labels, smoothing, message):
    with pytest.raises(ValueError, match=message):
        cross_entropy(np.zeros((2, 3)), labels, smoothing)


def test_a_pooling_stride_of_zero_raises():
    with pytest.raises(ValueError, match="stride 0"):
        MaxPool2d(2, stride=0).forward(np.zeros((1, 4, 4, 1), "float32"))
