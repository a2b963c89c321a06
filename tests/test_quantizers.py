"""What every quantizer promises: codes in range, zeros exact, no absolute epsilon.

The same tests run for each family at 2 to 8 bits; their statistics are in test_variance.py, what
only BHQ has in test_bhq.py.
"""
import numpy as np
import pytest
from families import (
    BITS,
    EDGES,
    each_integer,
    each_one,
    each_width,
    largest_of_group,
    lively,
    make,
    sampled,
    spread,
    stream,
)
from given import Given

import minifqt
from minifqt import backend
from minifqt.rng import NonFiniteError, Streams

# -------------------------------------------------------------------------------- shapes and ranges


@each_integer
@pytest.mark.parametrize("shape", [(6, 5), (6, 4, 5, 3), (6,), (6, 1, 1)])
def test_codes_scale_and_zero_have_the_declared_shapes_and_dtypes(name, shape):
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    t = make(name, 5)(x, stream())
    rows = 6 if name in ("psq", "bhq") else 1
    assert t.codes.shape == x.shape
    assert t.codes.dtype == ("int8" if name == "sym" else "uint8")
    assert t.scale.shape == t.zero.shape == (rows,) + (1,) * (len(shape) - 1)
    assert t.scale.dtype == t.zero.dtype == "float32"
    assert (t.mix is None) == (name != "bhq")
    assert t.dequantize().dtype == "float32"
    assert t.dequantize("float64").dtype == "float64"
    assert make(name, 5).variance(x).shape == shape
    assert make(name, 5).variance(x).dtype == "float64"


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_identity_keeps_the_numbers_in_their_own_dtype(dtype):
    x = np.random.default_rng(0).standard_normal((4, 3, 2)).astype(dtype)
    t = make("identity")(x, stream())
    assert t.codes is x
    assert t.scale.shape == t.zero.shape == (1, 1, 1)
    assert t.scale.dtype == t.zero.dtype == t.codes.dtype == dtype
    assert np.array_equal(t.dequantize(dtype), x)
    assert not t.is_integer
    assert make("identity").variance(x).sum() == 0
    assert make("identity").bound(x) == 0


@each_integer
@pytest.mark.parametrize("edge", EDGES)
def test_codes_stay_in_range_and_one_step_from_the_number_for_any_noise(name, edge):
    x = EDGES[edge].copy()
    x.setflags(write=False)                               # writing to the input raises
    for bits in BITS:
        q = make(name, bits)
        top = 2 ** (bits - 1) - 1
        lowest, highest = (-top, top) if name == "sym" else (0, 2**bits - 1)
        tensors = [q(x, Given(h)) for h in (0, 32768, 65535)]
        for t in tensors:
            assert lowest <= t.codes.min() <= t.codes.max() <= highest
            assert np.isfinite(t.scale).all()
            assert np.isfinite(t.zero).all()
            assert (t.scale > 0).all()
            exact = x.astype("float64")
            if t.mix is not None:
                exact = t.mix.apply(exact)
            # one step (and 2⁻¹⁰ of it for 16-bit noise), 2⁻²¹ of the largest number for float32,
            # and half the smallest float a step: a scale cannot be finer. A wrapped code would be
            # off by a whole range.
            reach = largest_of_group(exact, t)
            allowed = t.scale.astype("float64") * (1 + 2**-10) + 2.0**-21 * reach
            allowed = allowed + highest * 2.0**-149
            assert (abs(t.rows("float64") - exact) <= allowed).all(), bits
        steps = tensors[2].codes.astype(int) - tensors[0].codes
        assert set(np.unique(steps)) <= {0, 1}            # all noise decides between two neighbours


@each_integer
@pytest.mark.parametrize("edge", EDGES)
def test_every_edge_has_a_finite_variance_below_its_bound(name, edge):
    for bits in (2, 5, 8):
        q, x = make(name, bits), EDGES[edge]
        v, bound = q.variance(x), q.bound(x)
        assert np.isfinite(v).all()
        assert (v >= 0).all()
        assert np.isfinite(bound)
        assert v.sum() <= bound * (1 + 1e-12)             # order of a float64 sum


@each_one
def test_a_view_of_every_second_row_and_column_gives_the_codes_of_its_copy(name):
    x = spread(32, 48)
    for view in (x[::2, ::3], x.T, x[::-1], x.reshape(32, 4, 12).transpose(0, 2, 1)):
        q = make(name, 6)
        t, copy = q(view, stream()), q(np.ascontiguousarray(view), stream())
        for field in ("codes", "scale", "zero"):
            assert np.array_equal(getattr(t, field), getattr(copy, field))
        assert np.array_equal(t.dequantize(), copy.dequantize())
        assert np.array_equal(q.variance(view), q.variance(np.ascontiguousarray(view)))


@each_integer
@pytest.mark.parametrize("dtype", ["float64", "float16"])
def test_other_floats_are_taken_as_float32(name, dtype):
    x = np.random.default_rng(0).standard_normal((8, 12)).astype(dtype)
    q = make(name, 4)
    t, expected = q(x, stream()), q(x.astype("float32"), stream())
    assert np.array_equal(t.codes, expected.codes)
    assert np.array_equal(t.scale, expected.scale)
    assert t.scale.dtype == t.zero.dtype == t.dequantize().dtype == "float32"
    assert np.array_equal(q.variance(x), q.variance(x.astype("float32")))
    assert q.bound(x) == q.bound(x.astype("float32"))


# ------------------------------------------------------------------------------ zeros and constants


@pytest.mark.parametrize("name", ["ptqz", "sym"])
@each_width
def test_zero_stays_zero_without_variance(name, bits):
    for size in (1, 1e-9, 1e30):
        x = spread() * np.float32(size)
        q = make(name, bits)
        assert (x == 0).sum() > 100
        for h in (0, 1, 32768, 65535):
            assert (q(x, Given(h)).dequantize("float64")[x == 0] == 0).all()
        assert (q.variance(x)[x == 0] == 0).all()


@pytest.mark.parametrize("name", ["psq", "bhq"])
@each_width
def test_zero_rows_stay_exactly_zero(name, bits):
    x, q = spread(), make(name, bits)
    x[20] = 0
    for h in (0, 1, 32768, 65535):
        back = q(x, Given(h)).dequantize("float64")
        assert (back[[1, 20]] == 0).all()
    assert (q.variance(x)[[1, 20]] == 0).all()


@pytest.mark.parametrize("name", ["psq", "bhq"])
@each_width
def test_constant_rows_are_exact(name, bits):
    values = np.array([0.7, -0.7, 1e-30, -1e30, 1e-42, 1 / 3, 0], "float32")
    x = np.concatenate([lively(5, 9), np.tile(values[:, None], (1, 9))])
    q = make(name, bits)
    for h in (0, 1, 65535):
        t = q(x, Given(h))
        assert np.array_equal(t.dequantize()[5:], x[5:])
    assert (q.variance(x)[5:] == 0).all()


@each_integer
@each_width
@pytest.mark.parametrize("value", [0, 0.3, -0.3, 1e-9, -1e-42, 3e38])
def test_a_constant_tensor_is_exact(name, bits, value):
    x = np.full((3, 4, 2), value, "float32")
    q = make(name, bits)
    for h in (0, 32768, 65535):
        back = q(x, Given(h)).dequantize("float64")
        # only sym has a step below |v|: |v| / top, of which float32 keeps all but half an ulp
        allowed = 2.0**-24 * abs(x.astype("float64")) + 2.0**-149 * 64 if name == "sym" else 0
        assert (abs(back - x) <= allowed).all()
    assert (q.variance(x) == 0).all()


@each_integer
def test_a_tensor_of_zeros_has_scale_one_and_zero_zero(name):
    t = make(name)(np.zeros((4, 6), "float32"), stream())
    assert (t.codes == 0).all()
    assert (t.scale == 1).all()
    assert (t.zero == 0).all()


# -------------------------------------------------------------------------------------------- sizes


@each_one
@pytest.mark.parametrize("bits", [2, 5, 8])
def test_scaling_by_a_power_of_two_changes_no_code(name, bits):
    x, q = spread(), make(name, bits)
    t, v = q(x, stream()), q.variance(x)
    for k in range(-40, 61):
        scaled = np.ldexp(x, k)
        s = q(scaled, stream())
        if name != "identity":
            assert np.array_equal(s.codes, t.codes), k
            assert np.array_equal(s.zero, t.zero), k
        assert np.array_equal(s.dequantize("float64"), np.ldexp(t.dequantize("float64"), k)), k
        assert np.array_equal(s.dequantize(), np.ldexp(t.dequantize(), k)), k
        assert np.array_equal(q.variance(scaled), np.ldexp(v, 2 * k)), k


@each_integer
@pytest.mark.parametrize("k", [-112, -105, -90, 100, 115, 122])
def test_ranges_near_the_ends_of_float32_have_the_same_codes(name, k):
    x, q = lively(8, 12), make(name, 8)
    x *= np.float32(16 / abs(x).max())                    # normal numbers, and 2^126 at the most
    x[abs(x) < 2.0**-10] = 0
    t, s = q(x, stream()), q(np.ldexp(x, k), stream())
    assert np.array_equal(s.codes, t.codes)
    assert np.array_equal(s.zero, t.zero)
    if name != "bhq":                                     # the units of mixed rows are T's affair
        assert np.array_equal(s.scale, np.ldexp(t.scale, k))
    assert np.array_equal(s.dequantize("float64"), np.ldexp(t.dequantize("float64"), k))
    assert np.array_equal(q.variance(np.ldexp(x, k)), np.ldexp(q.variance(x), 2 * k))


@each_integer
@each_width
def test_gradients_of_size_1e_9_lose_no_precision(name, bits):
    x, q = lively(), make(name, bits)
    small = np.ldexp(x, -30)                              # 1e-9 of the size
    relative = q.variance(small).sum() / (small.astype("float64") ** 2).sum()
    assert relative == q.variance(x).sum() / (x.astype("float64") ** 2).sum()
    # no 1e-8 was added
    assert np.array_equal(q(small, stream()).scale, np.ldexp(q(x, stream()).scale, -30))


def test_rows_of_all_sizes_keep_their_relative_error():
    x = EDGES["rows 1e-30 to 1e30"]
    t = make("psq", 8)(x, stream())
    low, high = x.min(axis=1), x.max(axis=1)
    step = high / 255 - low / 255
    assert (abs(t.dequantize("float64") - x).max(axis=1) <= step * (1 + 2**-10)).all()
    back = sampled(make("bhq", 8), x, 1000, stream())
    assert np.isfinite(back).all()
    squares = ((back - x[:, None]) ** 2).sum(axis=(0, 2))         # (draws,)
    error = squares.std() / np.sqrt(1000)                         # standard error of their mean
    assert abs(squares.mean() - make("bhq", 8).variance(x).sum()) < 5 * error


@each_integer
@each_width
def test_subnormal_numbers_are_quantized(name, bits):
    x = EDGES["subnormal"]
    bins, tiny = 2**bits - 1, 2.0**-149
    width = float(x.max()) - float(x.min())
    t = make(name, bits)(x, stream())
    # a range over the bins (sym: max over half of them), and half an ulp of scale a step
    allowed = 2 * width / (bins - 1) + bins * tiny
    if name == "bhq":                                     # the scale is a few ulp, T⁻¹ up to 2
        allowed = 4 * width / bins + 4 * bins * tiny
    assert (abs(t.dequantize("float64") - x) <= allowed).all()
    assert np.isfinite(make(name, bits).variance(x)).all()


@pytest.mark.parametrize("name", ["ptq", "ptqz", "psq", "sym"])
@each_width
def test_the_largest_floats_are_quantized(name, bits):
    largest = np.finfo("float32").max
    x = np.array([[-largest, -1, 0, largest / 3, largest], [largest, 0, 5, 1, -largest]], "float32")
    t = make(name, bits)(x, stream())
    assert np.isfinite(t.scale).all()
    assert np.isfinite(t.zero).all()
    error = abs(t.dequantize("float64") - x) / float(largest)
    assert (error <= 2 / (2**bits - 2) * (1 + 2**-10)).all()


# --------------------------------------------------------------------------------------------- rows


@each_width
def test_psq_follows_a_permutation_of_its_rows(bits):
    x, q = spread(), make("psq", bits)
    rng = np.random.default_rng(0)
    noise, order = rng.integers(0, 65536, x.shape), rng.permutation(len(x))
    t, s = q(x, Given(noise)), q(x[order], Given(noise[order]))
    for field in ("codes", "scale", "zero"):
        assert np.array_equal(getattr(s, field), getattr(t, field)[order])


@each_width
def test_a_row_of_psq_does_not_depend_on_the_others(bits):
    x, q = spread(), make("psq", bits)
    noise = np.random.default_rng(0).integers(0, 65536, x.shape)
    t = q(x, Given(noise))
    for i in (0, 1, 2, 17):
        alone = make("ptq", bits)(x[i:i + 1], Given(noise[i:i + 1]))
        assert np.array_equal(alone.codes[0], t.codes[i])
        assert alone.scale[0] == t.scale[i]
        assert alone.zero[0] == t.zero[i]


# -------------------------------------------------------------------------------------------- noise


@each_integer
def test_the_same_seed_name_and_step_give_the_same_codes(name):
    x, q = spread(), make(name, 4)
    codes = q(x, stream("a", 0, 3)).codes
    assert np.array_equal(q(x, stream("a", 0, 3)).codes, codes)
    for other in (stream("b", 0, 3), stream("a", 1, 3), stream("a", 0, 4)):
        assert not np.array_equal(q(x, other).codes, codes)


@each_integer
def test_codes_do_not_depend_on_what_was_quantized_before(name):
    x, q, streams = spread(), make(name, 4), Streams(0)
    a, b = streams.stream("a"), streams.stream("b")
    forth = q(x, a).codes, q(x, b).codes
    back = q(x, b).codes, q(x, a).codes
    assert np.array_equal(forth[0], back[1])
    assert np.array_equal(forth[1], back[0])


@each_integer
def test_codes_do_not_depend_on_the_number_of_threads(name):
    before = backend.threads()
    x = spread(64, 3000)                                  # more than one block in every loop
    q = make(name, 5)
    try:
        results = []
        for threads in (1, 2, 4):
            minifqt.set_threads(threads)
            t = q(x, stream())
            results.append((t.codes, t.scale, t.zero, t.dequantize(), q.variance(x)))
    finally:
        minifqt.set_threads(before)
    for other in results[1:]:
        for one, expected in zip(other, results[0], strict=True):
            assert np.array_equal(one, expected)


@each_integer
def test_errors_of_two_places_two_layers_and_two_steps_are_uncorrelated(name):
    q, x = make(name, 4), lively(32, 512)
    one = Streams(0)
    errors = []
    places = [("conv1.grad_w", 0), ("conv1.grad_x", 0), ("conv2.grad_w", 0), ("conv1.grad_w", 1)]
    for layer, step in places:
        one.step = step
        error = q(x, one.stream(layer)).dequantize("float64") - x
        errors.append((error / np.sqrt(q.variance(x).mean(axis=1, keepdims=True))).reshape(-1))
    correlation = np.corrcoef(errors) - np.eye(4)
    # five standard errors; where rows are mixed, those of a group count as one
    group = int(q(x, Given(0)).mix.n.max()) if name == "bhq" else 1
    assert abs(correlation).max() < 5 * np.sqrt(group / x.size)


# ---------------------------------------------------------------------------------------- bad input


@each_one
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (7, 11), (3, 5)])
def test_a_number_that_is_not_finite_raises_with_the_streams_name(name, bad, place):
    x = EDGES["normal"].copy()
    x[place] = bad
    with pytest.raises(NonFiniteError, match="^layer3.grad_x: NaN or infinity entered") as error:
        make(name)(x, stream("layer3.grad_x"))
    assert error.value.name == "layer3.grad_x"


@each_integer
def test_the_variance_of_what_is_not_finite_raises(name):
    x = EDGES["normal"].copy()
    x[2, 2] = np.nan
    with pytest.raises(NonFiniteError, match="^x: NaN or infinity"):
        make(name).variance(x)


@each_one
def test_infinities_of_both_signs_raise_too(name):
    x = EDGES["normal"].copy()
    x[0, 0], x[0, 1] = np.inf, -np.inf
    with pytest.raises(NonFiniteError, match="^fc.grad_x: NaN or infinity"):
        make(name)(x, stream("fc.grad_x"))


def test_identity_takes_large_numbers_whose_sum_overflows():
    x = np.full((4, 4), 3e38, "float32")
    assert make("identity")(x, stream()).codes is x


@each_one
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0,), (2, 0, 3)])
def test_an_empty_array_raises(name, shape):
    with pytest.raises(ValueError, match=r"an array of shape \(.*\) is empty"):
        make(name)(np.zeros(shape, "float32"), stream())
