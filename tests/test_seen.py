"""Arrays that know their summaries, and arrays that are not computed yet, tell no lies."""
from itertools import permutations, product

import numpy as np
import pytest
from operands import assert_same_bits
from tiny import batch, normed_conv

import minifqt
from minifqt import Streams, backend, fusion, quantizers
from minifqt.kernels import conv, norm, pool, rounding, seen
from minifqt.kernels.cpu import choice
from minifqt.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, ReLU, Sequential, build

needs_numba = pytest.mark.skipif(choice.numba is None, reason="numba is not there: nothing is lazy")

# ---- arrays that know their summary --------------------------------------------------------------


def assert_summary_is_right(y):
    """Ranges and sums of each image, whatever parts they were found in."""
    values, (ranges, sums) = np.asarray(y, "float64"), y.summary
    rows = values.reshape(len(values), -1)
    assert (ranges[0].reshape(len(y), -1).min(axis=1) == rows.min(axis=1)).all()
    assert (ranges[1].reshape(len(y), -1).max(axis=1) == rows.max(axis=1)).all()
    if sums is not None:
        axes = tuple(range(1, values.ndim - 1))
        for found, exact in zip(sums, (values, values**2), strict=True):
            assert found.shape == (len(y), y.shape[-1])
            np.testing.assert_allclose(found, exact.sum(axis=axes), rtol=0,   # float64 sums
                                       atol=1e-15 * y.size * abs(exact).max())


@needs_numba
@pytest.mark.parametrize("shape", [(3, 4, 5, 16), (2, 9, 7, 3), (5, 1, 1, 1), (2, 30, 9, 8)])
def test_a_sum_knows_its_summary(shape):
    x, y = np.random.default_rng(0).standard_normal((2, *shape), dtype="float32")
    z = seen.add(x, y)
    assert (np.asarray(z) == x + y).all()
    assert_summary_is_right(z)
    assert (seen.summary(x).ranges[0] == x.min(axis=tuple(range(1, len(shape) - 1)))).all()
    both = z + z
    assert_summary_is_right(both)
    assert (np.asarray(both) == 2 * (x + y)).all()


def test_an_input_gradient_that_nobody_reads_is_not_even_quantized(set_instructions):
    set_instructions("numpy")
    net, (x, _) = normed_conv(6), batch((4, 9, 9, 8))
    net.forward(x)
    layer, asked = net.layers[2], []
    grad_x, layer.q.grad_x = layer.q.grad_x, lambda dy: asked.append(dy.shape) or grad_x(dy)
    dx = layer.backward(np.ascontiguousarray(x[..., :6]))
    assert dx.shape == x.shape
    assert not asked
    assert np.asarray(dx).any()
    assert asked == [(4, 9, 9, 6)]


@pytest.mark.parametrize("kernels", ["auto", "numpy"])
def test_a_first_layers_gradient_has_the_noise_of_its_own_step(kernels, set_instructions):
    """Read two steps later it is still what the plain layer gave at once."""
    set_instructions(kernels)
    plain, fused = (build(Conv2d(8, 6, 3, padding=1), "bhq5", seed=4) for _ in range(2))
    minifqt.fuse(fused)
    x, dy = np.random.default_rng(0).standard_normal((2, 4, 9, 9, 8), dtype="float32")
    results = []
    for net in (plain, fused):
        net.streams.step = 5
        net.forward(x)
        results.append(net.backward(dy[..., :6]))
        net.streams.step = 7
    assert (np.asarray(results[1]) == results[0]).all()
    assert fused.streams.step == 7


@needs_numba
@pytest.mark.parametrize("grad_x", ["ptq8", "ptqz4", "psq5", "bhq8", "bhq2", "identity"])
@pytest.mark.parametrize("grad_w", ["ptq8", "ptqz8", "sym8", "ptq8:nearest", "identity"])
def test_two_roundings_from_one_read_are_those_of_two(grad_w, grad_x, on_threads):
    """Whoever comes second, somebody rounds the first: the end of the block if nobody else does."""
    x = np.random.default_rng(0).standard_normal((9, 7, 5, 3), dtype="float32")
    first, second = (quantizers.Bound(spec, "stochastic", minifqt.Streams(3), f"layer.{spec}.{i}")
                     for i, spec in enumerate((grad_w, grad_x)))
    expected = first(x), second(x)

    def together():
        with rounding.one_read(x):
            return first(x), second(x)

    for found in on_threads(together):
        for t, u in zip(found, expected, strict=True):
            assert t.codes.dtype == u.codes.dtype
            assert_same_bits([t.codes, t.scale, t.zero], [u.codes, u.scale, u.zero])


@needs_numba
def test_one_read_rounds_no_other_array():
    x, y = np.random.default_rng(0).standard_normal((2, 9, 7, 5, 3), dtype="float32")
    q = quantizers.Bound("psq8", "stochastic", minifqt.Streams(3), "q")
    p = quantizers.Bound("ptq8", "stochastic", minifqt.Streams(3), "p")
    with rounding.one_read(x):
        found = [p(x), q(y), p(y), q(x)]
    assert_same_bits([t.codes for t in found], [q(x).codes for q, x in
                                                ((p, x), (q, y), (p, y), (q, x))])


@needs_numba
def test_what_is_begun_is_rounded_at_the_end_even_after_an_error(on_threads):
    x = np.random.default_rng(0).standard_normal((40, 9, 9, 8), dtype="float32")
    y = norm.Normalized(x, norm.runs(*np.ones((4, 8), np.float32)), floor=0)
    p = quantizers.Bound("ptq8", "stochastic", minifqt.Streams(3), "p")
    expected, empty = p(np.asarray(y.form())).codes, np.empty((0, 3), np.float32)

    def two():
        found = []

        def fail():
            with rounding.begun():
                found.extend([p(y), p(y)])
                p(empty)

        with pytest.raises(ValueError, match="is empty"):
            fail()
        return [t.codes for t in [*found, p(y)]]

    for codes in on_threads(two):
        assert_same_bits(codes, [expected] * 3)


@needs_numba
def test_a_convolution_and_its_gradient_know_their_summaries():
    x, _ = batch((4, 9, 9, 8))
    net = normed_conv(6)
    y = net.forward(x)
    assert isinstance(y, conv.Product)
    other = np.random.default_rng(1).standard_normal(y.shape, dtype="float32")
    assert_summary_is_right(y.array())
    total = y.array() + other
    assert_summary_is_right(total)
    dy = net.layers[2].backward(other)
    dx = net.layers[0].backward(net.layers[1].backward(dy))
    assert isinstance(dx, norm.NormGradient)
    assert_summary_is_right(dx.array())
    assert_summary_is_right(dx.plus(x))
    assert (np.asarray(dx.plus(x)) == np.asarray(dx) + x).all()


def norm_gradients(recipe, count):
    """So many gradients of one batch norm, none of them computed yet: of a product's gradient."""
    x, _ = batch((4, 9, 9, 8))
    results = []
    for _ in range(count):
        net = normed_conv(6, recipe)
        dy = np.random.default_rng(1).standard_normal(net.forward(x).shape, dtype="float32")
        bn, relu, last = net.layers
        results.append(bn.backward(relu.backward(last.backward(dy))))
    assert all(isinstance(dx, norm.NormGradient) for dx in results)
    return results


@needs_numba
@pytest.mark.parametrize("recipe", ["fp32", "ptq8", "bhq5"])
def test_a_norms_gradient_is_the_same_each_time_it_is_read(recipe):
    """The first reading takes the memory of dy, which nobody else saw; later ones make it anew."""
    one, other = np.random.default_rng(2).standard_normal((2, 4, 9, 9, 8), dtype="float32")
    readings = [lambda dx: dx.form(), lambda dx: dx.plus(one), lambda dx: dx.plus(other)]
    expected = [np.array(read(dx)) for read, dx in zip(readings, norm_gradients(recipe, 3),
                                                       strict=True)]
    assert (expected[0] + one == expected[1]).all()
    assert (expected[0] + other == expected[2]).all()
    for dx, order in zip(norm_gradients(recipe, 6), permutations(range(3)), strict=True):
        assert dx.g is not None
        found = [(i, readings[i](dx)) for i in (*order, *order)]
        for i, array in found:                            # no later one wrote to an earlier one
            assert (np.asarray(array) == expected[i]).all()
            assert_summary_is_right(array)
        assert (np.asarray(dx + one) == expected[1]).all()
        assert (np.asarray(dx) == expected[0]).all()
        assert (np.asarray(other + dx) == expected[2]).all()


@needs_numba
def test_what_is_made_from_a_summarized_array_has_no_summary():
    x = np.random.default_rng(0).standard_normal((4, 3, 3, 8), dtype="float32")
    y = seen.add(x, x)
    assert y.summary is not None
    for other in (y[1:3], y.copy(), y[:, ::-1], y.reshape(4, -1), y.T, 2 * y, -y, y - x, y > 0,
                  np.maximum(y, 0), abs(y), y.astype("float64"), y.view(), y + 1,
                  y + x.astype("float64"), y + x[:1]):
        assert getattr(other, "summary", None) is None


@needs_numba
@pytest.mark.parametrize("write", [
    lambda y: y.__imul__(5), lambda y: y.__iadd__(y), lambda y: np.add(y, 5, out=y),
    lambda y: y.__setitem__((0, 1, 1, 3), 7)], ids=["*=", "+=", "out=", "[…] ="])
def test_arithmetic_in_place_forgets_the_summary(write):
    y = seen.add(*2 * [np.ones((4, 3, 3, 8), "float32")])
    write(y)
    if y.summary is not None:
        assert_summary_is_right(y)


WRITES = {
    "a view": lambda y: y.reshape(len(y), -1).__setitem__(..., 9),
    "a part's part": lambda y: y[0].__setitem__(slice(None), 9),
    "fill": lambda y: y.fill(9), "sort": lambda y: y.sort(axis=0), "put": lambda y: y.put([0], 9),
    "copyto": lambda y: np.copyto(y, 9), "putmask": lambda y: np.putmask(y, y > 0, 9),
    "np.put": lambda y: np.put(y, [0], 9), "at": lambda y: np.add.at(y, (0, 0), 9),
    "out": lambda y: np.clip(y, 0, 0.1, out=y), "a mean's out": lambda y: y.mean(0, out=y[0])}


@needs_numba
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_what_is_written_to_forgets_its_summary(write):
    x, _ = batch((4, 3, 3, 8))
    y = seen.add(x, x)
    assert_summary_is_right(y)
    write(y)
    assert y.summary is None


@needs_numba
def test_a_gradient_clipped_in_place_through_a_view_has_its_new_range():
    x, _ = batch((4, 3, 3, 8))
    q, stream = quantizers.create("psq", bits=4), Streams(0).stream("here")
    y = seen.add(x, x)
    y.reshape(len(y), -1)[...] *= np.float32(1e-3)
    told, found = q(y, stream), q(np.array(y), stream)
    assert_same_bits((told.codes, told.scale), (found.codes, found.scale))


# ---- arrays that are not computed yet ------------------------------------------------------------


def lazy_arrays():
    """A norm, rectified, two products, a gated gradient, two norms', a mean's: each not formed."""
    x, _ = batch((4, 6, 6, 8))
    bn, relu, last = normed_conv(8).layers
    y = bn.forward(x)
    z = relu.forward(y)
    product, dz = last.forward(z), last.backward(x)
    other = minifqt.fuse(build(BatchNorm2d(8), "bhq5"))
    other.forward(x)
    arrays = [y, z, product, dz, relu.backward(dz), other.backward(x + 1), norm_of_a_product(x),
              pool.Spread(x[:, 0, 0], (6, 6))]
    assert all(isinstance(v, seen.Lazy) and v._array is None for v in arrays)
    return arrays


def norm_of_a_product(x):
    """A norm's gradient that may take the memory of the one before it."""
    net = normed_conv(8)
    net.forward(x)
    bn, relu, last = net.layers
    return bn.backward(relu.backward(last.backward(x)))


OTHER = np.random.default_rng(2).standard_normal((4, 6, 6, 8), dtype="float32")


@needs_numba
@pytest.mark.parametrize("function", [
    lambda v: v + OTHER, lambda v: OTHER + v, lambda v: v + v, lambda v: 2 * v, lambda v: v - OTHER,
    lambda v: -v, lambda v: v > 0, abs, np.asarray, lambda v: v.mean(axis=(0, 1)), np.max,
    lambda v: np.mean(v, dtype="float64"), lambda v: np.maximum(v, 0), lambda v: v.reshape(4, -1),
    lambda v: v.max(), lambda v: np.concatenate([v, OTHER]), lambda v: np.pad(v, 1), lambda v: v.T,
    lambda v: v.astype("float64"), lambda v: np.add(v, OTHER, dtype="float64"), np.array,
    lambda v: np.add.reduce(v, axis=0), lambda v: np.asarray(v)[1:, ::2], lambda v: v + 1,
    lambda v: v + OTHER[:1], lambda v: v + OTHER.astype("float64")])
def test_a_lazy_array_equals_its_array_in_every_function(function):
    for lazy, expected in zip(lazy_arrays(), map(np.array, lazy_arrays()), strict=True):
        here, there = function(lazy), function(expected)
        assert here.dtype == there.dtype
        assert (np.asarray(here) == np.asarray(there)).all()


@needs_numba
@pytest.mark.parametrize("which", range(8))
def test_a_lazy_sum_is_added_to(which):
    lazy, values = lazy_arrays()[which], np.array(lazy_arrays()[which])
    one, other = np.random.default_rng(2).standard_normal((2, *lazy.shape), "float32")
    assert (np.asarray((lazy + one) + other) == (values + one) + other).all()


@needs_numba
@pytest.mark.parametrize("formed", [*product((False, True), repeat=2)])
@pytest.mark.parametrize("left", range(8))
def test_lazy_arrays_are_added_whichever_of_them_is_computed(left, formed):
    expected = [np.array(v) for v in lazy_arrays()]
    for right in range(8):
        arrays = lazy_arrays()
        pair = arrays[left], lazy_arrays()[right] if left == right else arrays[right]
        for array, now in zip(pair, formed, strict=True):
            if now:
                array.array()
        total = pair[0] + pair[1]
        assert total.dtype == "float32"
        assert (np.asarray(total) == expected[left] + expected[right]).all()
        for array, values in zip(pair, (expected[left], expected[right]), strict=True):
            assert (np.asarray(array) == values).all()    # as it was
        if not (isinstance(total, conv.Product) and total.correlation.mix):   # of mixed rows: none
            assert_summary_is_right(total)


@needs_numba
@pytest.mark.parametrize("formed", [*product((False, True), repeat=2)])
def test_weight_gradients_under_way_are_added(formed):
    rng, before = np.random.default_rng(0), backend.threads()
    g, x = (quantizers.create("ptq", 8)(rng.standard_normal(shape, dtype="float32"),
                                        Streams(0).stream("x"))
            for shape in ((4, 6, 6, 5), (4, 6, 6, 8)))
    backend.set_threads(2)
    try:
        expected = conv.wgrad(g, x, (3, 3), 1, 1)
        pair = [conv.wgrad(g, x, (3, 3), 1, 1, lazily=True) for _ in range(2)]
        for dw, now in zip(pair, formed, strict=True):
            if now:
                dw.array()
        assert (np.asarray(pair[0] + pair[1]) == 2 * expected).all()
    finally:
        backend.set_threads(before)


@needs_numba
def test_a_lazy_array_tells_its_shape_without_being_computed():
    for lazy, array in zip(lazy_arrays(), map(np.array, lazy_arrays()), strict=True):
        assert (lazy.shape, lazy.ndim, lazy.size, len(lazy), lazy.dtype) == (
            array.shape, array.ndim, array.size, len(array), array.dtype)
        assert lazy._array is None


@needs_numba
def test_a_lazy_array_may_be_indexed():
    for lazy in lazy_arrays():
        assert (lazy[1:, ::2] == np.asarray(lazy)[1:, ::2]).all()


@needs_numba
def test_a_lazy_array_may_be_written_to_as_gradient_clipping_does():
    for lazy in lazy_arrays():
        before = np.array(lazy)
        np.clip(lazy, -0.1, 0.1, out=lazy)
        assert (np.asarray(lazy) == before.clip(-0.1, 0.1)).all()
        lazy[0] = 3
        lazy *= 0.5
        assert (np.asarray(lazy)[0] == 1.5).all()
        assert (np.asarray(lazy)[1:] == 0.5 * before.clip(-0.1, 0.1)[1:]).all()


@needs_numba
def test_a_name_that_an_array_lacks_is_an_error_of_a_lazy_array():
    for lazy in lazy_arrays():
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = lazy.no_such_name


@needs_numba
def test_a_product_is_computed_once_when_it_is_read_twice(monkeypatch):
    formed, form = [], conv.Product.form

    def watched(self):
        formed.append(self)
        return form(self)

    monkeypatch.setattr(conv.Product, "form", watched)
    x, _ = batch((4, 6, 6, 8))
    y = minifqt.fuse(build(Conv2d(8, 8, 1), "bhq5")).forward(x)
    assert not formed
    one, other, total = np.asarray(y), np.asarray(y), y + y
    assert formed == [y]
    assert (one == other).all()
    assert (np.asarray(total) == 2 * one).all()


@needs_numba
def test_a_fused_block_forms_no_activation(monkeypatch):
    """What batch norm and ReLU return is rounded from what it is made of, both ways."""
    monkeypatch.setattr(norm.Normalized, "form", None)    # would raise
    monkeypatch.setattr(fusion.Gated, "form", None)
    x, _ = batch((4, 6, 6, 8))
    net = normed_conv(8)
    np.asarray(net.backward(np.asarray(net.forward(x))))
    monkeypatch.setattr(pool.Spread, "form", None)
    net = minifqt.fuse(build(Sequential(BatchNorm2d(8), ReLU(), GlobalAvgPool2d()), "bhq5"))
    np.asarray(net.backward(net.forward(x)))
