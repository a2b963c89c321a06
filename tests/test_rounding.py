"""The one rounding, fast and plain: the same bits; and the integer zero."""
import numpy as np
import pytest
from families import BITS, EDGES, each_width, lively, make, spread, stream
from given import Given

from minifqt.kernels import reference, rounding
from minifqt.kernels.cpu import choice
from minifqt.quantizers.affine import grid, rescaled
from minifqt.rng import Streams

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
