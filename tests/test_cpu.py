"""Compiled kernels give the bits of the plain ones: products, rounding, ranges, norms, row mixing.

For each of the CPU's instructions, any number of threads, and at the limits of what int32 holds.
Which instructions there are: test_choice.py. Networks of lazy arrays: test_fusion.py.
"""
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from given import Given
from operands import SIZES, assert_same_bits, codes, four_products, three_products, turned, weights

from minifqt import NonFiniteError, QTensor, Streams, backend, layers, quantizers
from minifqt.kernels import conv, norm, pool, reference, rounding, seen
from minifqt.qtensor import as_floats
from minifqt.quantizers import affine
from minifqt.rng import Stream, nearest

numba = pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
from minifqt.kernels.cpu import (  # noqa: E402 - numba is there
    amx,
    channels,
    choice,
    packing,
    products,
    scales,
    tiles,
)

SPECS = ["ptq", "ptqz", "sym", "psq", "bhq"]
BITS = range(2, 9)


@pytest.fixture
def both_ways(set_instructions):
    """both_ways(function) is function() compiled, then by NumPy."""
    def each(function):
        set_instructions("auto")
        compiled = function()
        set_instructions("numpy")
        return compiled, function()

    return each


# ---- products ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(40))
def test_compiled_products_equal_the_reference(seed, instructions, sent_to_blas):
    assert_same_bits(four_products(np.random.default_rng(seed), products, weights),
                     four_products(np.random.default_rng(seed), reference, weights))
    assert not sent_to_blas


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("options", [
    {"dtype": "uint8", "zero": "real", "varies": False},                      # ptq
    {"dtype": "uint8", "zero": "real", "varies": True},                       # psq
    {"dtype": "uint8", "zero": "none", "varies": True},
    {"dtype": "int8", "zero": "none", "varies": False},                       # sym
    {"dtype": "int8", "zero": "large", "varies": True}],
    ids=lambda options: "-".join(map(str, options.values())))
def test_compiled_products_equal_the_reference_for_each_shape_and_kind_of_codes(
        sizes, options, instructions, sent_to_blas):
    for extreme in (True, False):
        assert_same_bits(*(three_products(np.random.default_rng(0), module, sizes, weights,
                                          extreme=extreme, **options)
                           for module in (products, reference)))
    assert not sent_to_blas


@pytest.mark.parametrize("name", choice.supported()[:-1])
@pytest.mark.parametrize("many", [True, False])
def test_tiles_for_many_registers_and_for_few(many, name, set_instructions, monkeypatch):
    """AVX-512 has 32 vector registers, AVX2 alone 16: rows of two vectors are 8, or 4; AMX's 16."""
    set_instructions(name)
    monkeypatch.setitem(choice._features, "avx512vl", many)
    isa = choice.isa()
    assert isa.lanes == 16
    assert isa.rows == (16 if name == "amx" else 4 if isa.vectors == 2 and not many else 8)
    for seed in range(8):
        assert_same_bits(four_products(np.random.default_rng(seed), products, weights),
                         four_products(np.random.default_rng(seed), reference, weights))


@pytest.mark.parametrize("seed", range(12))
def test_a_panel_is_all_products_of_rows_and_blocks(seed, instructions):
    """Whole and odd numbers of tiles, groups, blocks and words, in three loops."""
    rng, isa = np.random.default_rng(seed), choice.isa()
    count, words = rng.integers(1, 50, 2)
    outer, inner, groups, blocks = rng.integers(1, 4, 4)
    tall, wide, start = -(-count // isa.rows) * isa.rows, words * isa.group, 3
    a = rng.integers(0, 256, (outer, inner, groups, tall, wide)).astype(f"u{4 // isa.group}")
    b = rng.integers(-128, 128, (outer, inner, blocks, words, isa.lanes, isa.group))
    b = b.astype(isa.dtype)
    whole = np.einsum("oigmk,oibkl->gmbl", a.astype(int), b.swapaxes(4, 5).reshape(
        outer, inner, blocks, wide, isa.lanes).astype(int))[:, :count]
    for accumulate in ((), (0,)):
        c = np.full((groups, tall, blocks, isa.lanes), start, "int32")
        multiply_panel(*isa.tile, a, b, count, c, accumulate)
        assert (c[:, :count] == whole + (start if accumulate else 0)).all()


@numba.njit(error_model="numpy")
def multiply_panel(rows, vectors, a, b, count, c, accumulate):
    (outer, inner, groups, tall, wide), (blocks, words, lanes) = a.shape, b.shape[2:5]
    row, line = wide * b.itemsize, words * lanes * 4
    amx.configure(rows, count, words)
    tiles.panel(rows, vectors, b.reshape(-1), (a.ctypes.data, row, count, tall * row, groups),
                (b.ctypes.data, line, blocks),
                (c.ctypes.data, blocks * lanes, tall * blocks * lanes),
                ((outer, inner * groups * tall * row, inner * blocks * line),
                 (inner, groups * tall * row, blocks * line), (words, 4, lanes * 4)), accumulate)


@pytest.mark.parametrize("strip", [1, 100, 700])
def test_images_larger_than_a_cache_are_cut_into_strips(strip, instructions, monkeypatch):
    monkeypatch.setattr(products, "STRIP", strip)
    monkeypatch.setattr(products, "IMAGES", 2)
    for name in ("3 channels", "3 x 3, stride 2", "7 x 7, stride 2", "stride 3"):
        assert_same_bits(*(three_products(np.random.default_rng(0), module, SIZES[name], weights)
                           for module in (products, reference)))


def test_a_weight_gradient_takes_as_many_images_at_a_time_as_are_near(instructions):
    """One of these: the next two come on top."""
    rng, ends = np.random.default_rng(0), np.float32([0.5, 3.5]).reshape(2, 1, 1, 1, 1)
    g, x = (QTensor(rng.integers(0, 256, (3, 32, 32, 16), np.uint8), *ends) for _ in range(2))
    assert_same_bits(*([module.conv_wgrad(g, x, (3, 3), 1, 1)] for module in (products, reference)))


def test_codes_of_compiled_products_need_not_be_contiguous(instructions):
    rng = np.random.default_rng(0)
    x, w = turned(codes(rng, (4, 3, 8, 6))), turned(weights(rng, (5, 3, 3, 2)))
    g = turned(codes(rng, (4, 5, 8, 7)))
    a, b = (QTensor(t.codes[0, 1:, :, 1].T, t.scale[0, 0], t.zero[0, 0]) for t in (x, g))
    assert not any(t.codes.flags.c_contiguous for t in (x, w, g, a))
    b = QTensor(b.codes[:, :5], b.scale, b.zero)
    assert_same_bits(*([
        module.conv_fprop(x, w, 1, 1), module.conv_wgrad(g, x, (2, 3), 1, 1),
        module.conv_dgrad(g, w, (6, 8), 1, 1), module.matmul(a, b)]
        for module in (products, reference)))


def long_rows(terms):
    """Two rows whose product is as far from 0 as it can be, and its scale."""
    one = np.ones((1, 1), "float32")
    a = QTensor(np.full((1, terms), 255, "uint8"), one, 0 * one)
    return a, QTensor(np.full((1, terms), -128, "int8"), one, 0 * one)


def long_images(a, b):
    """The same as images of one pixel."""
    def image(t):
        return QTensor(t.codes[:, None, None], *(v[:, None, None] for v in (t.scale, t.zero)))

    return image(a), image(b)


def test_at_the_bound_int32_still_holds_the_sums(instructions, sent_to_blas):
    a, b = long_rows(products.TERMS)
    exact = np.float32(-255.0 * 128 * products.TERMS)
    assert 2**31 - 2 * 255 * 128 < abs(int(exact)) < 2**31
    x, w = long_images(a, b)
    assert products.matmul(a, b) == products.conv_fprop(x, w, 1, 0) == exact
    g = QTensor(x.codes, x.scale, x.zero)                 # (1, 1, 1, K) and w (K, 1, 1, 1)
    v = QTensor(w.codes.swapaxes(0, 3), w.scale, w.zero)
    assert products.conv_dgrad(g, v, (1, 1), 1, 0) == exact
    assert not sent_to_blas


def test_what_int32_does_not_hold_goes_to_blas(instructions, sent_to_blas):
    a, b = long_rows(products.TERMS + 1)
    exact = np.float32(-255.0 * 128 * (products.TERMS + 1))
    x, w = long_images(a, b)
    v = QTensor(w.codes.swapaxes(0, 3), w.scale, w.zero)
    assert (products.matmul(a, b) == products.conv_fprop(x, w, 1, 0)
            == products.conv_dgrad(x, v, (1, 1), 1, 0) == exact)
    assert sent_to_blas == ["matmul", "conv_fprop", "conv_dgrad"]


@pytest.mark.parametrize(("P", "Q"), [(256, 257), (300, 300), (2, 70_000)])
def test_wgrad_of_a_large_image_of_one_channel_does_not_wrap(P, Q, instructions):
    one = np.ones((1, 1, 1, 1), "float32")
    x = QTensor(np.full((1, P, Q, 1), 255, "uint8"), one, 0 * one)
    g = QTensor(np.zeros((1, P, Q, 1), "uint8"), one, 128 * one)
    assert products.conv_wgrad(g, x, (1, 1), 1, 0) == np.float32(-255.0 * 128 * P * Q)


def test_weights_with_a_zero_go_to_blas_and_are_right(instructions, sent_to_blas, caplog,
                                                      monkeypatch):
    monkeypatch.setattr(products, "_told", [])
    for options in ({"zero": "real", "dtype": "int8"}, {"zero": "none", "dtype": "uint8"}):
        def loaded(rng, shape, free, options=options):
            return codes(rng, shape, free, **options)

        assert_same_bits(*(three_products(np.random.default_rng(0), module, SIZES["1 x 1"], loaded)
                           for module in (products, reference)))
    assert sent_to_blas == 2 * ["conv_fprop", "conv_dgrad"]
    assert [record.message for record in caplog.records] == [
        "tensor: BLAS multiplies it, which takes longer than this CPU's integer instructions. They "
        "take int8 weights whose zero is 0, as sym8 makes them, and 65,792 terms."]     # said once


# ---- threads -------------------------------------------------------------------------------------


def test_the_number_of_threads_changes_no_bit_of_a_compiled_product(on_threads):
    def results():
        rng = np.random.default_rng(0)
        return [*four_products(rng, products, weights),
                *three_products(rng, products, SIZES["7 x 7, stride 2"], weights),
                *three_products(rng, products, SIZES["more images than a task"], weights)]

    one, two, four = on_threads(results)
    assert_same_bits(one, two)
    assert_same_bits(one, four)


@pytest.mark.parametrize("shape", [(3, 5), (9, 7, 6, 5), (65, 4, 4, 16)])
def test_the_number_of_threads_changes_no_bit_of_a_compiled_sum(shape, on_threads):
    rng, C = np.random.default_rng(0), shape[-1]
    x, dy = rng.standard_normal((2, *shape), dtype="float32")
    vectors = rng.standard_normal((4, C), dtype="float32")

    def results():
        return [*norm.statistics(x), norm.channel_sum(x), norm.normalize(x, *vectors),
                norm.Normalized(x, norm.runs(*vectors)).pixel_mean(),
                *norm.backward(dy, x, *vectors[:3]), seen.add(x, dy), *seen.summary(x)]

    one, two, four = on_threads(results)
    assert_same_bits(one, two)
    assert_same_bits(one, four)


def test_a_kernel_shared_by_more_threads_than_cores_leaves_nothing_undone():
    rng, before = np.random.default_rng(0), backend.threads()
    backend.set_threads(4)
    try:
        for _ in range(300):
            x, y = rng.standard_normal((2, 9, 2, 2, 16), dtype="float32")
            z = seen.add(x, y)
            assert (np.asarray(z) == x + y).all()
            assert (z.summary.ranges[1].max(axis=0) == (x + y).max(axis=(0, 1, 2))).all()
    finally:
        backend.set_threads(before)


def test_two_python_threads_may_multiply_at_once():
    def result(seed):
        return four_products(np.random.default_rng(seed), products, weights)

    with ThreadPoolExecutor(2) as pool:
        at_once = list(pool.map(result, range(60)))
    for seed, fast in enumerate(at_once):
        assert_same_bits(fast, result(seed))


# ---- weight gradients under way ------------------------------------------------------------------


def gradient_operands(rng, real):
    """g, x and how wgrad is called with them."""
    x, w, y, stride, padding = SIZES[str(rng.choice(list(SIZES)))]
    g, x = codes(rng, y, 3), codes(rng, x, 3)
    g, x = (as_floats(t, "float32") for t in (g, x)) if real else (g, x)
    return g, x, w[1:3], stride, padding


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_weight_gradients_may_be_begun_together_and_read_in_any_order(threads, real, set_threads):
    rng = np.random.default_rng(threads)
    for turn in range(8):
        set_threads(threads)
        many = [gradient_operands(rng, real) for _ in range(6)]
        expected = [conv.wgrad(*operands) for operands in many]
        begun = [conv.wgrad(*operands, lazily=True) for operands in many]
        assert all(isinstance(dw, conv.WeightGradient) for dw in begun) == (threads > 1)
        if turn % 2:                                      # others than those that have begun
            set_threads(int(rng.choice([1, 2, 4])))
        for i in rng.permutation(6):
            assert_same_bits([np.asarray(begun[i])] * 2, [expected[i]] * 2)
            assert begun[i].shape == expected[i].shape


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_weight_gradient_that_nobody_reads_lets_all_go(threads, real, set_threads):
    """Neither its operands nor a thread stay, and the others do not wait for it."""
    set_threads(threads)
    rng, members = np.random.default_rng(0), set(threading.enumerate())
    for _ in range(10):
        g, *rest = gradient_operands(rng, real)
        alive = weakref.ref(g.codes)
        begun = products.begin_wgrad(g, *rest)
        assert callable(begun)
        del g, begun
    assert_same_bits(*(three_products(np.random.default_rng(0), module, SIZES["1 x 1"], weights)
                       for module in (products, reference)))
    for _ in range(500):                                  # a thread may still be at it
        if alive() is None:
            break
        gc.collect()
        time.sleep(0.01)
    assert alive() is None
    started = set(threading.enumerate()) - members
    assert len(started) < threads


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


# ---- memory that is used again -------------------------------------------------------------------


def test_memory_is_never_lent_twice_at_a_time():
    """Arrays of a few sizes come and go in random order; what lives keeps what it was given."""
    rng, living = np.random.default_rng(0), []
    for turn in range(3000):
        if living and rng.random() < 0.5:
            array, expected = living.pop(rng.integers(len(living)))
            assert (array == expected).all()
            continue
        shape = (int(rng.choice([100, 5000, 8192, 20_000])), int(rng.integers(1, 3)))
        array = backend.empty(shape, "int32")
        array[:] = turn
        if rng.random() < 0.3:                            # a view keeps the whole alive
            array = array.T[..., 1::2].view("float32")
            expected = np.int32(turn).view("float32")
        else:
            expected = turn
        living.append((array, expected))


def test_a_view_of_a_loan_returns_no_memory():
    array = backend.empty((123_461,), "uint8")
    assert len(array.base[3:]) == 123_458                 # made, and let go
    assert backend.empty((123_461,), "uint8").ctypes.data != array.ctypes.data


def test_memory_that_was_let_go_is_used_again(monkeypatch):
    size = 123_457
    address = backend.empty((size,), "uint8").ctypes.data
    monkeypatch.setattr(backend, "_new_memory", None)     # would raise
    again = backend.empty((size,), "uint8")
    assert again.ctypes.data == address
