"""Quantizers by name, in their places in a layer, of one's own, and in evaluation."""
import logging
from dataclasses import replace

import numpy as np
import pytest
from families import (
    ALL,
    EDGES,
    each_integer,
    each_width,
    lively,
    make,
    sampled,
    spread,
    stream,
    z_scores,
)
from given import Given

import minifqt
from minifqt import quantizers
from minifqt.backend import array_module
from minifqt.qtensor import QTensor
from minifqt.quantizers import Bound, Quantizer, create
from minifqt.quantizers.base import BoundActivation
from minifqt.recipes import Recipe
from minifqt.rng import NonFiniteError, Streams, nearest

# ------------------------------------------------------------------------- a quantizer of one's own


@pytest.fixture
def half():
    """The example of the README, registered for one test."""
    @quantizers.register("half")
    class Half(Quantizer):
        """Per tensor, half the range: finer steps, but what lies outside is clipped (biased)."""

        unbiased = False

        def __call__(self, x, stream):
            xp = array_module(x)
            top = 2 ** (self.bits - 1) - 1
            high = abs(x).max(keepdims=True) / 2
            scale = xp.where(high == 0, 1, high / top)        # a zero tensor is exact
            limit = 65536 * top
            fixed = xp.rint(x * (65536 / scale)).clip(-limit, limit).astype(xp.int32)
            codes = (fixed + stream.bits(x.shape, xp)) >> 16  # the one rounding, zero = 0
            return QTensor(codes.astype(xp.int8), scale, xp.zeros_like(scale))

    yield Half
    del quantizers.base._REGISTRY["half"]


@pytest.mark.usefixtures("half")
def test_a_registered_quantizer_is_a_recipe_at_once():
    assert "half" in quantizers.names()
    recipe = minifqt.recipe("half4")
    assert recipe == Recipe(grad_x="half4")
    layer = minifqt.layers.Linear(6, 5, recipe=recipe)
    rng = np.random.default_rng(0)
    layer.forward(rng.standard_normal((8, 6)).astype("float32"))
    dy = rng.standard_normal((8, 5)).astype("float32")
    dx = layer.backward(dy)
    assert dx.shape == (8, 6)
    assert str(layer.q.grad_x) == "half4"
    clipped = abs(layer.q.grad_x(dy).dequantize()).max()
    assert clipped <= abs(dy).max() / 2 * (1 + 2.0**-23)  # float32


def test_the_registry_forgets_what_the_test_removed():
    assert "half" not in quantizers.names()
    with pytest.raises(ValueError, match="no quantizer is named 'half'"):
        minifqt.recipe("half4")


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_biased_quantizer_is_biased_where_it_says(half, bits):
    x, q = lively(5, 6), half(bits)
    assert not q.unbiased
    high = abs(x).max() / 2
    t = q(np.tile(x, (1, 65536)), Given(np.repeat(np.arange(65536), 6)))
    mean = t.dequantize("float64").reshape(5, 65536, 6).mean(axis=1)
    assert (abs(x) > high).any()
    # the clipped number, to 2⁻¹⁷ of a step for rint and float32's part of the code
    assert (abs(mean - np.clip(x, -high, high)) <= t.scale * (2.0**-17 + 2.0**-23 * 2**bits)).all()
    variance = t.dequantize("float64").reshape(5, 65536, 6).var(axis=1)
    # float64 sums of 65536 terms
    assert np.allclose(q.variance(x), variance, rtol=1e-9, atol=1e-12 * variance.max())
    assert (q.variance(x)[abs(x) > high] == 0).all()
    assert q.variance(x).sum() <= q.bound(x)


def test_a_biased_quantizer_fails_the_test_of_unbiasedness(half):
    z, tolerance = z_scores(half(4), spread(), 1000, stream())
    assert abs((z**2).mean() - 1) < tolerance             # what is not clipped has no bias
    q, x = half(4), spread()
    clipped = abs(x) > abs(x).max() / 2
    error = sampled(q, x, 200, stream()).mean(axis=1) - x
    assert (error[clipped] * np.sign(x[clipped]) < 0).all()


@pytest.mark.usefixtures("half")
def test_a_taken_name_raises():
    for name, kind in (("half", "Half"), ("psq", "PSQ")):
        with pytest.raises(ValueError, match=f"'{name}' is registered already, {kind}: choose"):
            quantizers.register(name)


@pytest.mark.parametrize("name", [
    "", "Half", "half4", "4half", "half-way", "half way", "_half", "ptq:x"])
def test_a_bad_name_raises(name):
    with pytest.raises(ValueError, match="use lower-case letters, digits and _, the last no digit"):
        quantizers.register(name)


def test_names_come_in_the_order_of_registration():
    assert quantizers.names()[0] == "identity"
    assert set(ALL) <= set(quantizers.names())
    assert all(quantizers.base._REGISTRY[name].name == name for name in quantizers.names())


class Bare(Quantizer):
    """Defines nothing."""

    name = "bare"


def test_a_quantizer_without_a_call_says_so():
    with pytest.raises(TypeError, match=r"Bare defines no __call__\(x, stream\)"):
        Bare(4)(EDGES["normal"], stream())


# ------------------------------------------------------------------------------ create, parse, bind


@each_width
@each_integer
def test_create_and_parse_agree(name, bits):
    q, named = quantizers.parse(f"{name}{bits}")
    assert type(q) is type(create(name, bits=bits))
    assert (q.bits, q.bins, str(q), named) == (bits, 2**bits - 1, f"{name}{bits}", None)
    for kind in ("nearest", "stochastic"):
        assert quantizers.parse(f"{name}{bits}:{kind}")[1] == kind


def test_identity_has_no_bits():
    assert str(create("identity")) == "identity"
    assert isinstance(quantizers.parse("identity")[0], quantizers.Identity)
    with pytest.raises(ValueError, match="identity8: full precision has no bits; write identity"):
        create("identity", bits=8)


@pytest.mark.parametrize("bits", [None, 0, 1, 9, 16, -3])
@each_integer
def test_bits_outside_2_to_8_raise(name, bits):
    with pytest.raises(ValueError, match=f"^{name} with bits {bits}: expected 2 to 8 bits, as in"):
        create(name, bits=bits)


def test_an_unknown_name_raises_and_lists_the_known():
    with pytest.raises(ValueError, match="no quantizer is named 'hqq'; there are identity, .*psq"):
        create("hqq", bits=4)


@pytest.mark.parametrize("spec", [
    "", "8", "PTQ8", "ptq8:", "ptq8:floor", "ptq 8", "ptq8 ", "ptq-8", None, 8, b"ptq8"])
def test_a_spec_that_cannot_be_read_raises(spec):
    with pytest.raises(ValueError, match="expected a name and its bits, perhaps a rounding: bhq5"):
        quantizers.parse(spec)


def test_a_bound_quantizer_names_what_its_quantizer_left_without_a_name():
    bound, x = Bound("psq5", "stochastic", Streams(0), "conv1.grad_x"), spread()
    named = bound(x)
    bound.quantizer = lambda x, stream: replace(create("psq", 5)(x, stream), name="tensor")
    t = bound(x)
    assert t.name == "conv1.grad_x"
    assert np.array_equal(t.codes, named.codes)


def test_a_bound_quantizer_names_its_tensors_and_uses_its_stream():
    streams, x = Streams(0), spread()
    bound = Bound("psq5", "stochastic", streams, "conv1.grad_x")
    streams.step = 3
    t = bound(x)
    assert t.name == "conv1.grad_x"
    assert str(bound) == "psq5"
    assert np.array_equal(t.codes, create("psq", 5)(x, stream("conv1.grad_x", 0, 3)).codes)
    x[0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="^conv1.grad_x: NaN"):
        bound(x)


@pytest.mark.parametrize(("spec", "place", "expected"), [
    ("ptq4", "nearest", "nearest"), ("ptq4", "stochastic", "stochastic"),
    ("ptq4:nearest", "stochastic", "nearest"), ("ptq4:stochastic", "nearest", "stochastic"),
])
def test_a_spec_may_override_the_rounding_of_its_place(spec, place, expected):
    x, streams = spread(), Streams(0)
    bound = Bound(spec, place, streams, "a")
    noise = nearest(streams, "a") if expected == "nearest" else streams.stream("a")
    assert bound.rounding == expected
    assert np.array_equal(bound(x).codes, create("ptq", 4)(x, noise).codes)


# ---------------------------------------------------------------------------- ranges for evaluation


@pytest.mark.parametrize("name", ["ptq", "ptqz", "sym"])
@each_width
def test_a_static_range_clips_first(name, bits):
    x, q = lively(), make(name, bits)
    low, high = np.array([-0.5], "float32"), np.array([0.75], "float32")
    t = q.static(x, stream(), low, high)
    clipped = np.clip(x, -0.5, 0.75)
    assert (x < -0.5).any()
    assert (x > 0.75).any()
    expected = q(clipped, stream())                       # whose own range is that one
    for field in ("codes", "scale", "zero"):
        assert np.array_equal(getattr(t, field), getattr(expected, field))


@pytest.mark.parametrize("name", ["ptq", "ptqz", "sym"])
def test_with_range_returns_the_minimum_and_maximum(name):
    x = lively().reshape(4, 8, 6, 8)
    t, found = make(name).with_range(x, stream())
    assert np.array_equal(t.codes, make(name)(x, stream()).codes)
    assert np.array_equal(found, [x.min(), x.max()])


def activation(eval_range="running", spec="ptq8", streams=None):
    return BoundActivation(spec, streams or Streams(0), "conv1.act", eval_range)


def test_the_running_range_starts_with_the_first_batch_and_moves_by_a_tenth():
    act, x = activation(), lively()
    assert np.isnan(act.range).all()
    assert not act.calibrated
    t = act(x)
    assert np.array_equal(act.range, np.array([x.min(), x.max()]))
    # training uses the batch's own
    assert np.array_equal(t.codes, create("ptq", 8)(x, nearest(Streams(0), "a")).codes)
    assert t.name == "conv1.act"
    act(x * 3)
    assert np.allclose(act.range, np.array([x.min(), x.max()]) * 1.2, rtol=1e-6, atol=0)   # float32


def test_evaluation_uses_the_running_range_and_does_not_move_it():
    act, x = activation(), lively()
    act(x)
    act.training, before = False, act.range.copy()
    t = act(x * 3)
    assert np.array_equal(act.range, before)
    assert t.scale[0, 0] == act(x).scale[0, 0]
    assert abs(t.dequantize()).max() <= abs(x).max() * (1 + 2.0**-22)       # clipped; float32
    assert t.name == "conv1.act"


def test_evaluation_may_use_the_batchs_range():
    act, x = activation("batch"), lively()
    act(x)
    act.training = False
    assert np.array_equal(act(x * 3).codes, create("ptq", 8)(x * 3, nearest(Streams(0), "a")).codes)


def test_evaluation_before_training_says_once_that_it_uses_the_batch(caplog):
    streams, x = Streams(0), lively()
    first, second = activation(streams=streams), activation(streams=streams)
    first.training = second.training = False
    with caplog.at_level(logging.WARNING, "minifqt"):
        t = first(x)
        second(x)
    assert [record.message.split(" has")[0] for record in caplog.records] == ["conv1.act"]
    assert np.array_equal(t.codes, create("ptq", 8)(x, nearest(Streams(0), "a")).codes)


def test_a_loaded_range_counts_unless_it_is_nan():
    act, x = activation(), lively()
    act.load(np.full(2, np.nan, "float32"))
    assert not act.calibrated
    act.load(np.array([-1, 1], "float32"))
    act.training = False
    assert act.calibrated
    assert abs(act(x).dequantize()).max() <= 1 + 2.0**-22             # float32 of the scale


@pytest.mark.parametrize("spec", ["psq8", "identity", "bhq4"])
def test_a_quantizer_without_a_static_range_has_none(spec):
    act, x = activation(spec=spec), lively()
    act(x)
    assert np.isnan(act.range).all()
    act.training = False
    expected = quantizers.parse(spec)[0](x, nearest(Streams(0), "a"))
    assert np.array_equal(act(x).codes, expected.codes)
