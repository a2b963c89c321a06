"""Batch norm's passes by NumPy alone: blocks of any shape compute the plain formula."""
import numpy as np
import pytest
from operands import assert_same_bits
from tiny import batch, normed_conv

import minifqt
from minifqt import fusion, quantizers
from minifqt.kernels import blocks, norm, rounding, seen
from minifqt.rng import Stream

SHAPES = [(1, 1), (7, 5), (300, 3000), (3, 5, 6, 1), (2, 1, 1, 2500), (5, 7, 3, 3), (40, 4, 4, 130),
          (2, 113, 113, 24)]


@pytest.fixture(autouse=True)
def _in_numpy(set_instructions):
    set_instructions("numpy")


def numbers(shape):
    """x, dy of this shape and mean, inv_std, weight, bias of its channels."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4, shape[-1]), dtype="float32")
    return *rng.standard_normal((2, *shape), dtype="float32"), vectors


def ranges_of(y, axis):
    return np.stack([np.asarray(y).min(axis=axis), np.asarray(y).max(axis=axis)])


@pytest.mark.parametrize(("D", "C"), [
    (1, 1), (7, 7), (5000, 5000), (16384, 16), (4096, 64), (49 * 64, 64), (113 * 113 * 3, 3)])
def test_a_run_is_whole_pixels_that_divide_an_image(D, C):
    run = blocks.run_length(D, C)
    assert run % C == 0
    assert D % run == 0
    assert run >= min(D, 2048)
    a, b = blocks.cut(C, *np.zeros((2, 3, D), "float32"))
    assert a.shape == b.shape
    assert a.shape[2] == run
    assert a[0].size <= blocks._BLOCK or a.shape[1] == 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_norm_in_blocks_is_the_formula_bit_for_bit(shape, on_threads):
    x, _, (mean, inv_std, weight, bias) = numbers(shape)
    plain = weight * ((x - mean) * inv_std) + bias
    for floor in (-np.inf, 0.25):
        for y in on_threads(lambda floor=floor: norm.Normalized(
                x, norm.runs(mean, inv_std, weight, bias), floor=floor).form()):
            assert_same_bits([y], [np.maximum(plain, np.float32(floor))])
        ranges, _ = norm.Normalized(x, norm.runs(mean, inv_std, weight, bias), floor=floor).summary
        assert (ranges[:, 0] == ranges_of(y.reshape(-1, shape[-1]), 0)).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_its_gradient_in_blocks_is_the_formula_where_it_is_above_the_floor(shape, on_threads):
    x, dy, vectors = numbers(shape)
    mean, inv_std, weight, bias = vectors
    x_hat, count = (x - mean) * inv_std, x.size // shape[-1]
    g = dy * (weight * x_hat + bias > 0)
    y = norm.Normalized(x, norm.runs(*vectors)).rectified()
    for dx, dweight, dbias in on_threads(lambda: y.backward(dy)):
        for found, exact in ((dweight, g * x_hat), (dbias, g)):
            exact = exact.reshape(-1, shape[-1])
            np.testing.assert_allclose(found, exact.sum(axis=0, dtype="float64"), rtol=1e-6,
                                       atol=1e-12 * abs(exact).max() * count)
        slopes = [(v.astype("float64") / count).astype("float32") for v in (dweight, dbias)]
        expected = (g - x_hat * slopes[0] - slopes[1]) * (weight * inv_std)
        near = 4 * 2**-24 * abs(expected).max()           # these slopes were rounded once more
        np.testing.assert_allclose(dx.form(), expected, rtol=0, atol=near)


@pytest.mark.parametrize("shape", SHAPES)
def test_threads_change_no_bit_of_it_and_ranges_are_right(shape, on_threads):
    x, dy, vectors = numbers(shape)
    flat, one = x.reshape(len(x), -1), (2, len(x), 1)

    def results():
        dx, dweight, dbias = norm.Normalized(x, norm.runs(*vectors), floor=0).backward(dy)
        total = dx + x                                    # a residual, added on the way
        parts, _ = rounding.joined(rounding.parts_of(total, len(x), flat))
        assert_same_bits([parts], [ranges_of(total.reshape(len(x), -1), 1).reshape(one)])
        assert (np.asarray(total) == dx.form() + x).all()
        return [total, dweight, dbias, *norm.statistics(x)]

    found = on_threads(results)
    assert_same_bits(found[0], found[1])
    assert_same_bits(found[0], found[2])


@pytest.mark.parametrize("shape", SHAPES)
def test_a_summary_in_blocks_holds_ranges_and_sums_of_each_channel(shape):
    x, y, _ = numbers(shape)
    z = seen.add(x, y)
    assert_same_bits([z], [x + y])
    for array, (ranges, sums) in ((x + y, z.summary), (x, seen.summary(x))):
        rows = array.reshape(-1, shape[-1]).astype("float64")
        assert (ranges[0].min(axis=0) == rows.min(axis=0)).all()
        assert (ranges[1].max(axis=0) == rows.max(axis=0)).all()
        np.testing.assert_allclose(sums.sum(axis=1), [rows.sum(axis=0), (rows**2).sum(axis=0)],
                                   rtol=1e-12, atol=1e-12 * len(rows))


@pytest.mark.parametrize("formed", [lambda x: fusion.remembering(x),
                                    lambda x: fusion.FusedReLU().forward(x)])
def test_who_reads_it_first_tells_the_next(formed, monkeypatch):
    x, y = formed(numbers((3, 4, 4, 8))[0]), norm.runs(*np.ones((4, 8), "float32"))
    first = seen.summary(x)
    monkeypatch.setattr(blocks, "summarize", None)        # nobody reads it again
    assert seen.summary(x) is first
    assert norm.Normalized(x, y).summary.ranges.shape == (2, 1, 8)
    parts = rounding.parts_of(x, 1, None)
    assert (parts.min(), parts.max()) == (x.min(), x.max())


def test_what_is_known_of_rows_is_not_forgotten_for_channels():
    x = numbers((3, 4, 4, 8))[0].view(seen.Seen)
    rounding.parts_of(x, 3, x)
    known = x.summary
    assert seen.summary(x).sums is not None
    assert x.summary is known


@pytest.mark.parametrize("spec", ["ptq8", "ptq8:nearest", "ptqz5", "identity"])
@pytest.mark.parametrize("shape", [(1, 40, 40, 200), (3, 5, 6, 1), (70, 9, 9, 64), (40, 4, 4, 130)])
def test_what_is_not_formed_is_rounded_as_if_it_were(shape, spec, on_threads):
    x, _, vectors = numbers(shape)
    q = quantizers.Bound(spec, "stochastic", minifqt.Streams(3), "q")
    expected = q(norm.Normalized(x, norm.runs(*vectors), floor=0).form())
    for t in on_threads(lambda: q(norm.Normalized(x, norm.runs(*vectors), floor=0))):
        assert_same_bits([t.codes, t.scale, t.zero],
                         [expected.codes, expected.scale, expected.zero])


@pytest.mark.parametrize("kernels", ["auto", "numpy"])
@pytest.mark.parametrize("shape", [(1, 5, 6, 3), (5, 7, 3, 3), (40, 4, 4, 130)])
def test_a_stream_with_bits_of_its_own_rounds_what_is_not_formed(shape, kernels, set_instructions):
    class Own(Stream):
        def bits(self, shape, xp=np, offset=0):
            return xp.broadcast_to(xp.asarray(20000, xp.uint16), shape)

    set_instructions(kernels)
    x, _, vectors = numbers(shape)
    stream, q = Own(minifqt.Streams(3), "q"), quantizers.create("ptq", 8)
    y = norm.Normalized(x, norm.runs(*vectors), floor=0)
    found, expected = q(y, stream), q(np.asarray(y.form()), stream)
    assert_same_bits([found.codes, found.scale], [expected.codes, expected.scale])


def test_a_fused_block_forms_no_activation_in_numpy_either(monkeypatch):
    monkeypatch.setattr(norm.Normalized, "form", None)    # would raise
    monkeypatch.setattr(fusion.Gated, "form", None)
    x, _ = batch((4, 6, 6, 8))
    net = normed_conv(8)
    assert np.asarray(net.backward(np.asarray(net.forward(x)))).any()


def test_what_is_not_finite_is_found_in_blocks():
    x, dy, vectors = numbers((4, 3, 3, 8))
    x[1, 2, 1, 3] = np.nan
    with np.errstate(invalid="ignore"):
        (low, high), _ = norm.Normalized(x, norm.runs(*vectors), floor=0).summary
        dx, _, dbias = norm.Normalized(x, norm.runs(*vectors), floor=0).backward(dy)
        assert np.isnan(low).any(axis=0).tolist() == [c == 3 for c in range(8)]
        assert np.isnan(high).any()
        assert np.isnan(dx.form()[..., 3]).all()
        assert np.isfinite(dbias).all()                   # NaN is not above the floor
