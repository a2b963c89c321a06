"""What every quantizer promises: exact mean and variance, codes in range, no absolute epsilon.

The same tests run for each family at 2 to 8 bits. What only BHQ has is in test_bhq.py.
"""
import logging
from dataclasses import replace

import numpy as np
import pytest
from given import Given

import minifqt
from minifqt import backend, quantizers
from minifqt.backend import array_module
from minifqt.kernels import reference, rounding
from minifqt.kernels.cpu import choice
from minifqt.qtensor import QTensor
from minifqt.quantizers import Bound, Quantizer, create
from minifqt.quantizers.affine import grid, rescaled
from minifqt.quantizers.base import BoundActivation
from minifqt.recipes import Recipe
from minifqt.rng import NonFiniteError, Streams, nearest

INTEGER = ("ptq", "ptqz", "psq", "sym", "bhq")
ALL = ("identity", *INTEGER)
BITS = tuple(range(2, 9))
each_integer = pytest.mark.parametrize("name", INTEGER)
each_one = pytest.mark.parametrize("name", ALL)
each_width = pytest.mark.parametrize("bits", BITS)


def make(name, bits=8):
    return create(name, None if name == "identity" else bits)


def stream(name="layer.grad_x", seed=0, step=0):
    streams = Streams(seed)
    streams.step = step
    return streams.stream(name)


def spread(N=32, D=48, seed=0):
    """Rows of very different sizes: one zero, one constant, two equal; heavy tails; zeros."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, (N, D)) * rng.lognormal(0, 1.5, (N, 1))
    x *= rng.random((N, D)) > 0.2
    x[1], x[2], x[4] = 0, 0.7, x[3]
    return x.astype("float32")


def lively(N=32, D=48):
    """Rows of different sizes, none of them constant."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((N, D)) * rng.lognormal(0, 1, (N, 1))).astype("float32")


def _edges():
    rng = np.random.default_rng(0)
    normal = rng.standard_normal((8, 12)).astype("float32")
    outlier = normal.copy()
    outlier[3, 5] = 1e6
    constant = normal.copy()
    constant[2] = -3
    rows = np.logspace(-30, 30, 8).astype("float32")[:, None]
    largest = np.finfo("float32").max
    return {
        "normal": normal,
        "four axes": rng.standard_normal((4, 3, 3, 2)).astype("float32"),
        "one axis": normal[0],
        "one number": np.full((1, 1), -2.5, "float32"),
        "one row": normal[:1],
        "two rows": normal[:2],
        "three rows": normal[:3],
        "one column": normal[:, :1],
        "all zeros": np.zeros((5, 7), "float32"),
        "all equal": np.full((5, 7), -0.3, "float32"),
        "a constant row": constant,
        "zero rows": normal * (np.arange(8) % 2)[:, None].astype("float32"),
        "one row not zero": normal * (np.arange(8) == 5)[:, None].astype("float32"),
        "all positive": abs(normal),
        "all negative": -abs(normal) - 1,
        "relu": np.maximum(normal, 0),
        "least minimum": np.where(normal == normal.min(), np.float32(-1e-7), abs(normal)),
        "one huge outlier": outlier,
        "small range on a large offset": (1000 + 0.003 * normal).astype("float32"),
        "size 1e-9": normal * np.float32(1e-9),
        "subnormal": normal * np.float32(1e-42),
        "least subnormal": np.array([[0, 1e-45], [1e-45, 3e-45], [0, 0]], "float32"),
        "range below 2^-100": normal * np.float32(2.0**-110),
        "rows 1e-30 to 1e30": normal * rows,
        "range beyond float32": np.where(normal > 0, largest, -largest) / np.float32(1.5),
        "two values": np.where(normal > 0, np.float32(1), np.float32(-1)),
    }


EDGES = _edges()


def largest_of_group(x, t):
    """max|x| of the elements that share a scale, in its shape; where rows are mixed, of all."""
    axes = tuple(axis for axis, size in enumerate(t.scale.shape) if size == 1 or t.mix is not None)
    return abs(x.astype("float64")).max(axis=axes, keepdims=True)


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


# -------------------------------------------------------------------------------- mean and variance


def every_noise(x, q):
    """x̂ for each of the 65536 noises, the same in a whole column.  x (N, D) → (N, 65536, D).

    Repeating the columns leaves every range as it is.
    """
    wide = np.tile(x, (1, 65536))
    noise = np.repeat(np.arange(65536), x.shape[1])       # (65536 · D,)
    t = q(wide, Given(noise))
    assert np.array_equal(t.scale, q(x, Given(0)).scale)
    return t.dequantize("float64").reshape(len(x), 65536, -1)


@each_integer
@each_width
def test_the_mean_over_all_noises_is_the_number(name, bits):
    x, q = lively(5, 6), make(name, bits)
    mean = every_noise(x, q).mean(axis=1)
    t = q(x, Given(0))
    scale = np.broadcast_to(t.scale.astype("float64"), x.shape)
    reach = scale if t.mix is None else np.sqrt(t.mix.undo_squared(scale**2))
    # rint to 16 bits is 2⁻¹⁷ of a step, float32 2⁻²⁴ of the code: 2⁻¹⁴ at 8 bits as declared
    assert (abs(mean - x) <= reach * 2.0**-14 * (2**bits / 256 + 0.25)).all()
    row = largest_of_group(x, t)
    assert (abs(mean - x) <= 2.0**-16 / (2**bits - 1) * 4 * row).all()


@each_integer
@each_width
def test_the_variance_over_all_noises_is_the_closed_form(name, bits):
    x, q = lively(5, 6), make(name, bits)
    if name == "bhq":                                     # mixed rows each have their own noise
        wide = np.tile(x, (1, 65536))
        t = q(wide, Given(np.repeat(np.arange(65536), 6)))
        rows = t.rows("float64").reshape(5, 65536, 6)
        exact = t.mix.undo_squared(rows.var(axis=1))
    else:
        exact = every_noise(x, q).var(axis=1)
    # 1e-9 of the variance of a half: float64 sums of 65536 terms
    assert np.allclose(q.variance(x), exact, rtol=1e-9, atol=1e-12 * exact.max())


@each_integer
@each_width
def test_the_variance_found_by_bisection_is_the_closed_form(name, bits):
    q, x = make(name, bits), spread()
    closed = q.variance(x)
    # float64, other order of operations
    assert np.allclose(Quantizer.variance(q, x), closed, rtol=1e-12, atol=1e-14 * closed.max())


def sampled(q, x, draws, noise):
    """x̂ of independent draws, (N, draws, D) float64: columns repeated, one call makes all."""
    return q(np.tile(x, (1, draws)), noise).dequantize("float64").reshape(len(x), draws, x.shape[1])


def z_scores(q, x, draws, noise):
    """Standard errors between each element's mean and itself, where at least ten draws are up."""
    t, v = q(x, Given(0)), q.variance(x)
    whole = np.broadcast_to(t.scale.astype("float64") ** 2, x.shape)
    whole = whole if t.mix is None else t.mix.undo_squared(whole)
    often = v > 10 / draws * whole                        # else the mean is far from normal
    z = (sampled(q, x, draws, noise).mean(axis=1) - x)[often] / np.sqrt(v[often] / draws)
    largest = 1 if t.mix is None else int(t.mix.n.max())  # rows of a group share their noise
    return z, 5 * np.sqrt(2 * largest / z.size)           # five standard errors of the mean of z²


@each_integer
@each_width
def test_rounding_is_unbiased_in_a_sample(name, bits):
    z, tolerance = z_scores(make(name, bits), spread(), 1000, stream())
    assert z.size > 300
    assert abs((z**2).mean() - 1) < tolerance
    assert abs(z).max() < 6


@each_integer
@each_width
def test_nearest_rounding_fails_the_test_of_unbiasedness(name, bits):
    z, tolerance = z_scores(make(name, bits), spread(), 1000, nearest(Streams(0), "a"))
    assert (z**2).mean() - 1 > 20 * tolerance
    assert abs(z).max() > 6


@each_integer
@each_width
def test_the_sampled_variance_is_the_closed_form(name, bits):
    q, x, draws = make(name, bits), spread(), 1000
    errors = sampled(q, x, draws, stream()) - x[:, None]
    squares = (errors**2).sum(axis=(0, 2))                # (draws,) of the whole tensor
    error = squares.std() / np.sqrt(draws)                # standard error of their mean
    assert abs(squares.mean() - q.variance(x).sum()) < 5 * error
    assert 5 * error < 0.02 * q.variance(x).sum()         # the test can see 2%


@each_integer
def test_every_family_declares_itself_unbiased(name):
    assert make(name).unbiased


# ------------------------------------------------------------------------------------------- bounds


@each_integer
@each_width
def test_the_variance_is_at_most_the_bound_and_of_its_order(name, bits):
    q, x = make(name, bits), lively()
    # ⅙ of a step squared against ¼; at 2 bits most numbers are close to an exact zero, which saves
    assert 0.2 * q.bound(x) < q.variance(x).sum() <= q.bound(x)


@each_width
@pytest.mark.parametrize("data", [lively, spread])
def test_the_bound_of_ptq_is_the_theorems(bits, data):
    x = data()
    closed = x.size * float(x.max() - x.min()) ** 2 / (4 * (2**bits - 1) ** 2)
    assert make("ptq", bits).bound(x) == pytest.approx(closed, rel=1e-6)     # scale is a float32


@each_width
def test_the_bound_of_psq_is_the_theorems(bits):
    x = lively()
    ranges = (x.max(axis=1) - x.min(axis=1)).astype("float64")
    closed = x.shape[1] * (ranges**2).sum() / (4 * (2**bits - 1) ** 2)
    assert make("psq", bits).bound(x) == pytest.approx(closed, rel=1e-6)     # scales are float32


@each_width
def test_rows_without_a_range_add_nothing_to_the_bound_of_psq(bits):
    x = lively()
    bare = make("psq", bits).bound(x[2:])
    x[0], x[1] = 0, 1e3                                   # exact: neither has any variance
    assert make("psq", bits).variance(x)[:2].sum() == 0
    assert make("psq", bits).bound(x) == pytest.approx(bare, rel=1e-12)


@each_one
def test_a_tensor_of_zeros_has_the_bound_zero(name):
    assert make(name).bound(np.zeros((4, 6), "float32")) == 0


@each_width
@pytest.mark.parametrize("data", [lively, spread])
def test_the_bound_of_psq_is_never_above_that_of_ptq(bits, data):
    for shift in (0, 5):
        x = data() + np.float32(shift)
        assert make("psq", bits).bound(x) <= make("ptq", bits).bound(x)


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


# --------------------------------------------------------------------------------- the integer zero


@each_width
def test_the_integer_zero_is_the_best_of_all(bits):
    rng, bins = np.random.default_rng(0), 2**bits - 1
    low = -rng.lognormal(0, 2, (1000, 1)).astype("float32")
    high = rng.lognormal(0, 2, (1000, 1)).astype("float32")
    low[:50], high[50:100] = 0, 0
    scale, zero = reference.integer_zero(low, high, bins)
    z = np.arange(bins + 1)
    with np.errstate(divide="ignore", invalid="ignore"):  # z at an end covers no number beyond it
        above = np.where(high == 0, 0, high.astype("float64") / (bins - z))
        below = np.where(low == 0, 0, -low.astype("float64") / z)
    best = np.maximum(above, below).min(axis=1)           # (1000,)
    assert np.array_equal(zero, zero.astype(int))
    assert ((zero >= 0) & (zero <= bins)).all()
    assert (zero[:50] == 0).all()
    assert (zero[50:100] == bins).all()
    assert np.allclose(scale[:, 0], best, rtol=2.0**-23, atol=0)    # rounded to float32


@each_width
def test_ptqz_covers_the_range_without_clipping(bits):
    x = lively()
    t = make("ptqz", bits)(x, Given(32768))
    bins, scale, zero = 2**bits - 1, float(t.scale[0, 0]), float(t.zero[0, 0])
    assert zero == int(zero)
    assert scale * (bins - zero) >= x.max() * (1 - 2.0**-23)      # float32 of the scale
    assert scale * zero >= -x.min() * (1 - 2.0**-23)


@each_width
def test_ptqz_takes_a_minimum_below_one_step(bits):
    x = np.random.default_rng(0).random((8, 12)).astype("float32")
    # the authors' code divides by zero here
    x[0, 0], x[0, 1] = -1e-4, 1
    t = make("ptqz", bits)(x, stream())
    assert t.zero[0, 0] == 1
    assert t.scale[0, 0] == pytest.approx(1 / (2**bits - 2), rel=1e-6)         # float32
    assert (abs(t.dequantize() - x) <= t.scale * (1 + 2**-10)).all()


@pytest.mark.parametrize("sign", [1, -1])
@each_width
def test_ptqz_of_a_range_without_zero_is_ptq(bits, sign):
    x = np.float32(sign) * (1 + np.random.default_rng(0).random((8, 12)).astype("float32"))
    t, real = make("ptqz", bits)(x, stream()), make("ptq", bits)(x, stream())
    for field in ("codes", "scale", "zero"):
        assert np.array_equal(getattr(t, field), getattr(real, field))
    assert np.array_equal(make("ptqz", bits).variance(x), make("ptq", bits).variance(x))


@each_width
def test_ptqz_of_relu_output_has_zero_at_code_zero(bits):
    x = np.maximum(np.random.default_rng(0).standard_normal((8, 12)), 0).astype("float32")
    t = make("ptqz", bits)(x, stream())
    assert t.zero[0, 0] == 0
    assert t.scale[0, 0] == np.float32(x.max() / np.float32(2**bits - 1))
    assert (t.codes[x == 0] == 0).all()


@each_width
def test_sym_uses_as_many_codes_above_as_below(bits):
    top = 2 ** (bits - 1) - 1
    x = np.array([[-4, -1, 0, 1, 4]], "float32")
    for h in (0, 32768, 65535):
        codes = make("sym", bits)(x, Given(h)).codes[0]
        assert codes[0] == -top
        assert codes[2] == 0
        assert codes[4] == top
    assert make("sym", bits)(x, Given(0)).scale[0, 0] == np.float32(4 / top)


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


# --------------------------------------------------------------------------------- fast = reference


def real_zero_equals_reference(t, x, h, bits):
    plain = reference.psq(x, h, 2**bits - 1)
    assert np.array_equal(t.codes, plain.codes)
    assert t.codes.dtype == plain.codes.dtype
    for field in ("scale", "zero"):
        assert np.array_equal(getattr(t, field), getattr(plain, field))
        assert getattr(t, field).dtype == getattr(plain, field).dtype == "float32"


@each_width
@pytest.mark.parametrize("data", [
    spread, lively, lambda: spread(40, 3000), lambda: spread(5, 70000)])
def test_psq_and_ptq_are_their_reference_bit_for_bit(bits, data):
    x = data()
    real_zero_equals_reference(make("psq", bits)(x, stream()), x, stream().bits(x.shape), bits)
    row = x.reshape(1, -1)
    h = stream().bits(row.shape)
    real_zero_equals_reference(make("ptq", bits)(row, stream()), row, h, bits)


@pytest.mark.parametrize("shape", [(1, 7), (1, 200_000), (40, 3000), (3, 70_000), (70_000, 1)])
def test_row_ranges_are_the_minimum_and_maximum_of_each_row(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    low, high = rounding.joined(rounding.row_parts(x))[0]
    assert np.array_equal(low, x.min(axis=1, keepdims=True))
    assert np.array_equal(high, x.max(axis=1, keepdims=True))


@pytest.mark.parametrize("shape", [(1, 7), (1, 200_000), (40, 3000), (3, 70_000), (70_000, 1)])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_blocks_of_codes_are_their_reference_bit_for_bit(shape, bits, monkeypatch):
    monkeypatch.setattr(rounding, "_BLOCK", 1 << 16)
    rng, bins, top = np.random.default_rng(0), 2**bits - 1, 2 ** (bits - 1) - 1
    x = rng.standard_normal(shape).astype("float32")
    h = rng.integers(0, 65536, shape).astype("uint16")
    low = -5 - rng.random((shape[0], 1)).astype("float32")
    high = 5 + rng.random((shape[0], 1)).astype("float32")
    _, inv = reference.grid(low, high, bins)
    expected = reference.round_codes(reference.fixed_point(x, low, inv), h, bins)
    codes = rounding.round_rows(x, (low, inv, 0 * low), Given(h), shape, (0, bins))
    assert codes.dtype == expected.dtype
    assert np.array_equal(codes, expected)
    x = 4 * x                                             # some beyond the range: clipped
    for limits, dtype, code in (((0, bins), "uint8", bins // 2), ((-top, top), "int8", 0)):
        anchored = np.full_like(low, code)
        fixed = reference.anchored_fixed(x, np.zeros_like(low), inv, anchored, *limits)
        codes = rounding.round_rows(x, (0 * low, inv, 65536 * anchored), Given(h), shape, limits,
                                    dtype)
        assert codes.dtype == dtype
        assert np.array_equal(codes, reference.anchored_codes(fixed, h))


@pytest.mark.parametrize("shape", [(1, 200_000), (40, 3000), (3, 70_000)])
@pytest.mark.parametrize("kernels", choice.supported())
def test_noise_made_block_by_block_is_that_of_the_whole(shape, kernels, set_instructions,
                                                        monkeypatch):
    set_instructions(kernels)
    monkeypatch.setattr(rounding, "_BLOCK", 1 << 16)
    x = np.random.default_rng(0).uniform(0, 1, shape).astype("float32")
    stream = Streams(3).stream("x")
    low, inv = np.zeros((shape[0], 1), "float32"), np.full((shape[0], 1), 65536 * 3, "float32")
    expected = reference.round_codes(reference.fixed_point(x, low, inv), stream.bits(shape), 3)
    assert np.array_equal(rounding.round_rows(x, (low, inv, 0 * low), stream, shape, (0, 3)),
                          expected)


def test_fixed_point_is_exact_in_float32_and_clipped_at_the_top():
    rng = np.random.default_rng(0)
    beyond = 0
    for bits in BITS:
        bins = 2**bits - 1
        x = rng.lognormal(0, 2, (20000, 2)).astype("float32") * np.array([[-1, 1]], "float32")
        low, high = x[:, :1], x[:, 1:]
        _, inv = reference.grid(low, high, bins)
        fixed = reference.fixed_point(high, low, inv)     # of the maximum
        assert fixed.max() <= 65536 * bins + 1 < 2**24
        beyond += (fixed > 65536 * bins).sum()
        assert (reference.round_codes(fixed, np.uint16(65535), bins) == bins).all()
        for noise in (65535, np.full(x.shape, 65535)):    # compiled, and in blocks
            codes = rounding.round_rows(x, (low, inv, 0 * low), Given(noise), x.shape, (0, bins))
            assert (codes == [[0, bins]]).all()
        assert (make("psq", bits)(x, Given(65535)).codes == [[0, bins]]).all()
    assert beyond > 0                                     # rint's + 1 does occur


@pytest.mark.parametrize("sign", [1, -1])
def test_the_ends_of_ptqz_keep_their_codes_for_any_noise(sign):
    rng, q, beyond = np.random.default_rng(0), make("ptqz", 8), 0
    for _ in range(200):
        x = np.array([[0, sign * rng.lognormal(0, 2)]], "float32")
        expected = [[0, 255]] if sign > 0 else [[255, 0]]
        for h in (65535 if sign > 0 else 0, 32768):       # the noise that pushes outwards, and none
            t = q(x, Given(h))
            assert np.array_equal(t.codes, expected)
        beyond += np.rint(abs(x[0, 1]) * (np.float32(65536) / t.scale[0, 0])) > 65536 * 255
    assert beyond > 0                                     # without the limit these would wrap


def test_only_rows_of_extreme_range_are_rescaled():
    x = np.array([[-1, 1]], "float32") * np.ldexp(np.float32(1), [[0], [-120], [126], [-99]])
    y, low, high, e = rescaled(x, x[:, :1], x[:, 1:])
    assert np.array_equal(e[:, 0] != 0, [False, True, True, False])
    assert np.array_equal(np.ldexp(y, e), x)
    assert np.array_equal(y[[0, 3]], x[[0, 3]])
    assert np.array_equal(np.concatenate([low, high], axis=1), y)
    plain = x[[0, 3]]
    assert rescaled(plain, plain[:, :1], plain[:, 1:])[0] is plain    # nothing extreme: no copy


def test_a_grids_zero_belongs_to_the_scale_that_is_stored():
    x = EDGES["least subnormal"]
    g = grid(x, x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True), 255)
    assert (g.scale >= 2.0**-149).all()
    back = g.scale.astype("float64") * (0 - g.zero.astype("float64"))
    assert np.allclose(back[:, 0], x.min(axis=1), rtol=2.0**-23, atol=0)   # code 0 is the minimum


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
    act.load_range(np.full(2, np.nan, "float32"))
    assert not act.calibrated
    act.load_range(np.array([-1, 1], "float32"))
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
