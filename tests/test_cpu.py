"""Compiled products give the bits of the plain ones.

For each of the CPU's instructions, any number of threads, and at the limits of what int32 holds.
Which instructions there are: test_choice.py. Other passes: test_passes.py. Networks of lazy arrays:
test_fusion.py.
"""
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from operands import SIZES, assert_same_bits, codes, four_products, three_products, turned, weights

from minifqt import QTensor, backend
from minifqt.kernels import conv, norm, reference, seen
from minifqt.qtensor import as_floats

numba = pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
from minifqt.kernels.cpu import amx, choice, products, tiles  # noqa: E402 - numba is there

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
