"""Compiled passes give the bits of NumPy's: noise, rounding, ranges, grids, norms, row mixing."""
from types import SimpleNamespace

import numpy as np
import pytest
from given import Given
from operands import assert_same_bits

from minifqt import NonFiniteError, Streams, layers, quantizers
from minifqt.kernels import norm, pool, reference, rounding
from minifqt.quantizers import affine
from minifqt.rng import Stream, nearest

numba = pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
from minifqt.kernels.cpu import channels, choice, packing, scales  # noqa: E402 - numba is there

SPECS = ["ptq", "ptqz", "sym", "psq", "bhq"]
BITS = range(2, 9)


# ---- noise and rounding --------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [
    (1, 1), (1, 15), (1, 17), (3, 5), (7, 2047), (2, 2049), (5, 4099), (1, 70_001), (300, 13)])
@pytest.mark.parametrize("step", [0, 1, 2**40 + 3])
def test_compiled_noise_is_numpys_philox_wherever_a_row_begins(shape, step):
    """Each code tells whether its noise is below a random threshold."""
    rng, stream = np.random.default_rng(0), Streams(7).stream("layer1.0.conv1.grad_x")
    stream.streams.step = step
    x = rng.uniform(0, 1, shape).astype("float32")
    low, inv = np.zeros((shape[0], 1), "float32"), np.full((shape[0], 1), 65536 * 255, "float32")
    plain = reference.round_codes(reference.fixed_point(x, low, inv), stream.bits(shape), 255)
    assert (rounding.round_rows(x, (low, inv, 0 * low), stream, shape, (0, 255)) == plain).all()


def test_a_stream_with_bits_of_its_own_is_heeded():
    class Constant(Stream):
        def bits(self, shape, xp=np, offset=0):
            return xp.full(shape, 65535, "uint16")

    x = np.random.default_rng(0).standard_normal((5, 40), dtype="float32")
    q = quantizers.create("psq", 8)
    assert (q(x, Constant(Streams(0), "x")).codes == q(x, Given(65535)).codes).all()


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("data", ["normal", "outlier", "offset", "tiny", "constant rows", "signs"])
def test_compiled_codes_are_those_of_numpy_for_any_noise_and_width(name, data, both_ways):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((9, 5, 3, 7)).astype("float32")
    if data == "outlier":
        x[2, 3, 1, 4] = 1e6
    if data == "offset":
        x = (1000 + x).astype("float32")
    if data == "tiny":
        x *= np.float32(2.0**-120)
    if data == "constant rows":
        x[1], x[2], x[3] = 0, 2.5, -0.0
    if data == "signs":
        x *= np.array([1, -1, 3] * 3, "float32")[:, None, None, None]
        x[::3] = abs(x[::3])
    for bits in BITS:
        for noise in (0, 32768, 65535, None):
            def quantized(bits=bits, noise=noise):
                stream = Streams(0).stream("x") if noise is None else Given(noise)
                t = quantizers.create(name, bits)(x, stream)
                return [t.codes, t.scale, t.zero, t.dequantize()]

            assert_same_bits(*both_ways(quantized))


@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (1, 63), (1, 65), (1, 99_999), (3, 40), (70, 9)])
def test_compiled_ranges_are_the_minimum_and_maximum_of_each_row(shape):
    x = np.random.default_rng(0).standard_normal(shape, dtype="float32")
    for rows in (x, abs(x), -abs(x), x * np.float32(2.0**-140), x * 0, x * -0.0):
        low, high = rounding.joined(rounding.row_parts(rows))[0]
        assert (low == rows.min(axis=1, keepdims=True)).all()
        assert (high == rows.max(axis=1, keepdims=True)).all()


@pytest.mark.parametrize("bad", [0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000,
                                 0xFF800000],
                         ids=["nan", "-nan", "smallest nan", "last nan", "inf", "-inf"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 63), (1, 1000), (5, 9), (3, 4099)])
def test_compiled_ranges_miss_nothing_that_is_not_finite(bad, shape):
    rng = np.random.default_rng(0)
    for row in {0, shape[0] - 1}:
        for place in {0, shape[1] // 2, shape[1] - 1}:
            x = rng.standard_normal(shape, dtype="float32")
            x.view(np.uint32)[row, place] = bad
            for spec in ("ptq", "psq"):
                with pytest.raises(NonFiniteError, match="^x: NaN or infinity"):
                    quantizers.create(spec, 8)(x, Streams(0).stream("x"))


def test_the_largest_finite_numbers_are_finite():
    x = np.array([[np.finfo("float32").max, np.finfo("float32").min, 0]], "float32")
    ranges, finite = rounding.joined(rounding.row_parts(x))
    assert finite
    assert np.isfinite(ranges).all()


def rows_of_all_sizes(rng, N=40):
    """Ranges of rows: usual, constant, zero, subnormal, narrow on an offset, near overflow."""
    low = rng.standard_normal((N, 1)).astype("float32")
    width = np.minimum(rng.lognormal(0, 2, (N, 1)), 99).astype("float32")
    width[rng.random(N) < 0.2] = 0
    low[rng.random(N) < 0.2] = 0
    with np.errstate(under="ignore"):
        size = np.ldexp(np.float32(1), rng.choice([0, -60, -75, -78, -110, -130, -140, 110, 117],
                                                  (N, 1)))
        low, width = low * size, width * size
        return low, low + np.where(rng.random((N, 1)) < 0.2, width * np.float32(1e-6), width)


@pytest.mark.parametrize("bins", [3, 31, 255])
def test_compiled_grids_are_those_of_numpy_and_leave_rows_to_be_rescaled(bins, set_instructions):
    rng, rescaled = np.random.default_rng(0), 0
    for turn in range(200):
        low, high = rows_of_all_sizes(rng)
        e = rng.integers(-148, 118, low.shape).astype("int32") * (turn % 2)
        if turn % 4 < 2:                                  # no row that must be rescaled
            usual = affine.rescaled(low, low, high)[3]
            keep = (np.broadcast_to(usual, low.shape) == 0)[:, 0]
            low, high, e = low[keep], high[keep], e[keep]
        found = np.empty((7, *low.shape), np.float32)
        alone = scales.grid(np.stack([low, high]), bins, e, found)
        odd = np.any(affine.rescaled(low, low, high)[3])
        assert alone == (not odd)
        rescaled += not alone
        grids = []
        for name in ("auto", "numpy"):
            set_instructions(name)
            with np.errstate(over="ignore", invalid="ignore"):
                g = affine.grid(low, low, high, bins, e)
            grids.append([g.rows, *g.ranges, *g.maps, g.scale, g.zero])
        assert_same_bits(*grids)
        if alone:
            assert_same_bits(found, grids[1][1:])
    assert 50 < rescaled <= 100


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_small_symmetric_tensors_quantized_at_once_are_those_of_numpy(bits, both_ways,
                                                                      set_instructions):
    rng, sym, rescaled = np.random.default_rng(0), quantizers.create("sym", bits), 0
    for turn in range(200):
        low, high = (v[:1] for v in rows_of_all_sizes(rng))
        shape = [(3, 5), (1, 1), (40, 3, 3, 7), (5, 4100)][turn % 4]
        x = (low + (high - low) * rng.random(shape, dtype="float32")).astype("float32")
        x *= turn > 0
        if turn % 3:
            x = x.swapaxes(0, 1)                          # need not be contiguous
        stream = (nearest(Streams(turn), "w"), Streams(turn).stream("w"))[turn % 2]
        set_instructions("auto")
        alone = sym._at_once(x, stream)
        assert (alone is not None) == (not np.any(affine.rescaled(x, x.min(), x.max())[3]))
        rescaled += alone is None

        def quantized(x=x, stream=stream):
            t, ranges = sym.with_range(x, stream)
            return [t.codes, t.scale, t.zero, ranges]

        assert_same_bits(*both_ways(quantized))
    assert 0 < rescaled < 150


def test_a_large_symmetric_tensor_is_quantized_by_all_threads(both_ways):
    x = np.random.default_rng(0).standard_normal((300, 230), dtype="float32")
    sym, stream = quantizers.create("sym", 8), Streams(0).stream("w")
    assert sym._at_once(x, stream) is None

    def quantized():
        t, ranges = sym.with_range(x, stream)
        return [t.codes, t.scale, t.zero, ranges]

    assert_same_bits(*both_ways(quantized))


@pytest.mark.parametrize("bad", [None, np.nan, np.inf, -np.inf])
def test_compiled_ranges_of_parts_are_joined_as_by_numpy(bad, both_ways):
    rng = np.random.default_rng(0)
    for N, parts in ((1, 1), (1, 64), (5, 1), (5, 33)):
        ends = np.sort(rng.standard_normal((2, N, parts)).astype("float32"), axis=0)
        if bad is not None:
            ends[int(bad > 0):1 + (not bad < 0), -1, -1] = bad        # NaN is both of its ends
        fast, plain = both_ways(lambda: rounding.joined(ends))        # noqa: B023 - called here
        assert fast[1] == plain[1] == (bad is None)
        usual = slice(N if bad is None else N - 1)
        assert_same_bits([fast[0][:, usual]], [plain[0][:, usual]])


@pytest.mark.parametrize("shape", [(5, 3, 3, 8), (16, 1, 1, 3), (7, 5, 3, 5)])
def test_codes_that_are_absent_are_packed_as_zeros(shape, instructions, monkeypatch):
    dirty = SimpleNamespace(empty=lambda shape, dtype: np.full(shape, 7, dtype))
    monkeypatch.setattr(packing, "np", dirty)
    w, isa = np.ones(shape, np.int8), choice.ISAS[instructions]
    for by_dgrad in (False, True):
        packed = packing.packed.py_func(w, by_dgrad, 1, np.empty(0, isa.dtype), isa.tile[1])
        assert set(packed.flat) <= {0, 1}
        assert packed.sum() == w.size


# ---- norms and row mixing ------------------------------------------------------------------------


@pytest.mark.parametrize("C", [2, 3, 64])
def test_small_vectors_of_batch_norm_are_those_of_numpy(C):
    rng, count = np.random.default_rng(C), 350
    sums = rng.standard_normal((2, 7, C))                 # of some channels the variance is < 0
    mean, var = np.empty((2, C), np.float32)
    channels.moments(sums, count, mean, var)
    s1, s2 = sums.sum(axis=1) / count
    assert_same_bits([mean, var], [s1.astype("float32"),
                                   np.maximum(s2 - s1**2, 0).astype("float32")])
    vectors = rng.standard_normal((4, C), dtype="float32")
    totals, runs = np.empty((2, C), np.float32), np.empty((3, 5 * C), np.float32)
    channels.slopes(sums, count, np.tile(vectors, 5), totals, runs)
    rows = np.stack([s1.astype("float32"), s2.astype("float32"), vectors[2] * vectors[1]])
    assert_same_bits([totals, runs], [sums.sum(axis=1).astype("float32"), np.tile(rows, 5)])


@pytest.mark.parametrize("shape", [(2, 1), (40, 12), (3, 5, 6, 1), (5, 7, 3, 3), (40, 4, 4, 130)])
def test_batch_norms_scaling_in_one_call_is_that_of_its_layer(shape):
    rng, C = np.random.default_rng(0), shape[-1]
    x, layer = rng.standard_normal(shape, dtype="float32"), layers.BatchNorm2d(shape[-1])
    vectors = rng.standard_normal((4, C), dtype="float32")
    layer.weight.data, layer.bias.data, layer.running_mean, layer.running_var = vectors
    found, moved = norm.scaling(x, *vectors[:2], tuple(vectors[2:]), layer.eps, layer.momentum)
    expected = layer.scaling(x)
    assert_same_bits([found, moved], [norm.runs(*expected),
                                      np.stack([layer.running_mean, layer.running_var])])
    assert_same_bits(found[:, :C], expected)
    assert (found == np.tile(expected, found.shape[1] // C)).all()


@pytest.mark.parametrize("floor", [-np.inf, 0, 0.5])
@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (3, 5, 6, 1), (5, 7, 3, 3), (40, 4, 4, 130)])
def test_the_range_of_a_batch_norm_is_that_of_its_numbers(shape, floor):
    rng, C = np.random.default_rng(0), shape[-1]
    for turn in range(10):
        x = rng.standard_normal(shape, dtype="float32")
        vectors = rng.standard_normal((4, C), dtype="float32")                # half turn the range
        vectors[2, rng.random(C) < 0.2] = 0
        y = norm.Normalized(x, norm.runs(*vectors), floor=floor)
        (low, high), _ = y.summary
        values = np.asarray(y).reshape(1, -1, C)
        assert_same_bits([low, high], [values.min(axis=1), values.max(axis=1)])
        n, c = (int(rng.integers(count)) for count in (shape[0], C))
        x[n, ..., c] = np.nan if turn % 2 else x[n, ..., c]
        vectors[turn % 4, c] = vectors[turn % 4, c] if turn % 2 else np.nan
        with np.errstate(invalid="ignore"):
            ranges, _ = norm.Normalized(x, norm.runs(*vectors), floor=floor).summary
        assert np.isnan(ranges[:, 0, c]).any()            # of a number, of a weight


@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1), (3, 5, 6, 1), (5, 7, 3, 3), (4, 9, 9, 16), (2, 3, 1, 513), (40, 8, 8, 64)])
def test_the_mean_of_what_is_not_formed_is_that_of_its_numbers(shape):
    rng = np.random.default_rng(0)
    x, vectors = (rng.standard_normal(size, "float32") for size in (shape, (4, shape[-1])))
    y = norm.Normalized(x, norm.runs(*vectors), floor=0)
    assert_same_bits([y.pixel_mean()], [pool.mean_forward(y.form())])
    assert y._array is None


@pytest.mark.parametrize("shape", [
    (2, 1), (7, 5), (4, 600), (3, 5, 6, 1), (5, 7, 3, 3), (4, 9, 9, 16), (3, 2, 2, 130),
    (2, 3, 1, 513), (40, 8, 8, 64)])
def test_compiled_norms_have_the_bits_of_numpys(shape, both_ways):
    rng, C = np.random.default_rng(0), shape[-1]
    x, dy = rng.standard_normal((2, *shape), dtype="float32")
    x = np.float32(3) * x + np.float32(5)
    weight, bias = rng.standard_normal((2, C), dtype="float32")

    def results():
        mean, var = norm.statistics(x)
        inv_std = 1 / np.sqrt(var + np.float32(1e-5))
        return [mean, var, norm.normalize(x, mean, inv_std, weight, bias),
                *norm.backward(dy, x, mean, inv_std, weight),
                norm.channel_sum(dy).astype("float32")]

    assert_same_bits(*both_ways(results))


@pytest.mark.parametrize("shape", [(1, 4), (2, 9), (3, 5), (40, 300), (17, 3, 5, 8), (128, 700)])
def test_compiled_row_mixing_has_the_bits_of_numpys(shape, both_ways):
    rng, per_row = np.random.default_rng(0), (shape[0], *(1,) * (len(shape) - 1))
    x = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal(per_row))
    x = x.astype("float32")

    def results():
        t = quantizers.create("bhq", 5)(x, Streams(0).stream("x"))
        if t.mix is None:
            return [t.codes]
        return [t.codes, t.scale, t.zero, t.mix.apply(x), t.mix.undo(x), t.mix.apply_rescaled(x)]

    assert_same_bits(*both_ways(results))


def test_what_a_compiled_norm_gets_that_is_not_finite_stays_so(both_ways):
    rng = np.random.default_rng(0)
    x, dy = rng.standard_normal((2, 4, 3, 3, 8), dtype="float32")
    x[1, 2, 1, 3], dy[2, 1, 1, 5] = np.nan, np.nan
    vectors = [np.ones(8, "float32")] * 3

    def results():
        with np.errstate(invalid="ignore"):
            y = norm.normalize(x, *vectors, vectors[0])
            dx, dweight, dbias = norm.backward(dy, x, *vectors)
        return [np.isnan(v) for v in (y, dx, dweight, dbias, norm.channel_sum(x))]

    compiled, plain = both_ways(results)
    assert_same_bits(compiled, plain)
    assert all(v.any() for v in plain)
