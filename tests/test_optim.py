"""SGD against its closed form, and the learning rate of every epoch."""
import math

import numpy as np
import pytest
from operands import assert_same_bits

from minifqt import SGD, layers, optim
from minifqt.layers import Param


def test_sgd_follows_its_closed_form():
    """v ← 0.9 v + g + 0.01 w, w ← w − lr v: with constant g and no decay v is a geometric sum."""
    w, g = np.array([1.0, -2.0]), np.array([0.5, 4.0])
    params, sgd = {"w": Param(w, g, decay=False)}, SGD(momentum=0.9, weight_decay=0.01)
    expected = w
    for t in range(5):
        sgd.step(params, lr=0.1)
        expected = expected - 0.1 * g * (1 - 0.9 ** (t + 1)) / (1 - 0.9)
        np.testing.assert_allclose(params["w"].data, expected, rtol=1e-13)    # float64, 5 steps


def test_weight_decay_adds_to_the_gradient_before_momentum():
    rng = np.random.default_rng(0)
    w, gradients, v = rng.standard_normal(4), rng.standard_normal((3, 4)), np.zeros(4)
    params, sgd = {"w": Param(w)}, SGD(momentum=0.8, weight_decay=0.05)
    for g, lr in zip(gradients, (0.1, 0.2, 0.05), strict=True):
        params["w"].grad = g
        sgd.step(params, lr)
        v = 0.8 * v + g + 0.05 * w
        w = w - lr * v
        np.testing.assert_allclose(params["w"].data, w, rtol=1e-13)           # float64, 3 steps


def test_weight_decay_spares_parameters_marked_so():
    params = {"weight": Param(np.ones(2), np.zeros(2)),
              "bias": Param(np.ones(2), np.zeros(2), decay=False)}
    SGD(momentum=0, weight_decay=0.1).step(params, lr=0.5)
    assert (params["weight"].data == 1 - 0.5 * 0.1).all()
    assert (params["bias"].data == 1).all()


def test_each_parameter_has_a_velocity_of_its_own():
    params = {"a": Param(np.zeros(1), np.ones(1)), "b": Param(np.zeros(1), -np.ones(1))}
    sgd = SGD(momentum=0.5, weight_decay=0)
    for _ in range(2):
        sgd.step(params, lr=1)
    assert params["a"].data == -(1 + 1.5)
    assert params["b"].data == 1 + 1.5
    assert sgd.velocity.keys() == params.keys()


def test_sgd_keeps_float32_and_writes_to_no_array_that_it_was_given():
    rng = np.random.default_rng(0)
    data, grad = rng.standard_normal((2, 3), dtype="float32")
    before = data.copy(), grad.copy()
    params, sgd = {"w": Param(data, grad)}, SGD()
    for _ in range(2):
        sgd.step(params, lr=np.float64(0.1))
    assert params["w"].data.dtype == sgd.velocity["w"].dtype == np.float32
    assert (data == before[0]).all()
    assert (grad == before[1]).all()


def given(rng, dtypes):
    """A parameter for each dtype, every second one decays; the first gradient is not contiguous."""
    params = {str(i): Param(rng.standard_normal((3, 5, i + 1)).astype(dtype), decay=i % 2 == 0)
              for i, dtype in enumerate(dtypes)}
    for p in params.values():
        p.grad = rng.standard_normal(p.data.shape[::-1]).astype(p.data.dtype).T
    return params


@pytest.mark.parametrize("dtypes", [["float32"], 4 * ["float32"], ["float32", "float64"]])
def test_a_compiled_step_is_the_plain_one_bit_for_bit(dtypes, set_instructions):
    """Also where a parameter or a velocity was replaced between two steps."""
    found = []
    for name in ("auto", "numpy"):
        set_instructions(name)
        rng, sgd = np.random.default_rng(0), SGD(momentum=0.9, weight_decay=0.01)
        params, arrays = given(rng, dtypes), []
        for turn in range(5):
            new = rng.standard_normal((3, 5, 1), dtype="float32")
            kept = new.copy()
            if turn == 2:
                params["0"].data = new
            if turn == 3:
                sgd.velocity["0"] = new
            sgd.step(params, lr=0.1)
            assert (new == kept).all()
            arrays += [v.copy() for v in sgd.velocity.values()]
            arrays += [p.data for p in params.values()]   # no copies: a step makes new ones
        found.append(arrays)
    assert_same_bits(*found)


def test_a_missing_gradient_raises_and_names_the_parameter():
    layer, sgd = layers.Linear(3, 2), SGD()
    with pytest.raises(RuntimeError, match=r"weight has no gradient: call backward\(\) before"):
        sgd.step(layer.params(), 0.1)


@pytest.mark.parametrize(("momentum", "weight_decay"), [(-0.1, 0), (1, 0), (1.5, 0), (0.9, -1e-4)])
def test_bad_arguments_raise(momentum, weight_decay):
    with pytest.raises(ValueError, match=f"momentum {momentum}, weight_decay {weight_decay}: "):
        SGD(momentum, weight_decay)


def test_cosine_is_half_a_wave_from_lr_to_0():
    lr = optim.cosine(0.1, epochs=200)
    for epoch in range(201):
        assert lr(epoch) == pytest.approx(0.05 * (1 + math.cos(math.pi * epoch / 200)), rel=1e-15)
    assert lr(0) == 0.1
    assert lr(200) == 0


def test_steps_divide_by_10_at_half_and_at_three_quarters():
    lr = optim.steps(0.1, epochs=200)
    for first, last, factor in ((0, 99, 1), (100, 149, 0.1), (150, 199, 0.01)):
        assert lr(first) == lr(last) == pytest.approx(0.1 * factor, rel=1e-15)
    odd = optim.steps(1.0, epochs=7)                      # half is 3.5, three quarters 5.25
    assert [round(odd(epoch), 4) for epoch in range(7)] == [1, 1, 1, 1, 0.1, 0.1, 0.01]


@pytest.mark.parametrize("name", optim.SCHEDULES)
def test_warm_up_rises_linearly_to_the_schedule(name):
    plain, warm = (optim.SCHEDULES[name](0.1, 200, warmup) for warmup in (0, 4))
    shares = [warm(epoch) / plain(epoch) for epoch in range(7)]
    assert shares == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1, 1], rel=1e-15)


@pytest.mark.parametrize("schedule", sorted(optim.SCHEDULES))
def test_a_schedule_of_no_epochs_raises(schedule):
    with pytest.raises(ValueError, match="0 epochs: a schedule needs at least 1"):
        optim.SCHEDULES[schedule](0.1, 0)


def test_a_missing_gradient_updates_nothing():
    params = {"a": Param(np.ones(2), np.ones(2)), "b": Param(np.ones(2))}
    with pytest.raises(RuntimeError, match="b has no gradient"):
        optim.SGD().step(params, 0.1)
    np.testing.assert_array_equal(params["a"].data, 1)
