"""Compiled float products: as exact as their sums' lengths allow, and the same bits every time.

Integers are test_cpu.py's; Identity operands of a whole network are test_fusion.py's.
"""
import numpy as np
import pytest
from operands import SIZES, assert_same_bits, codes, geometry, turned

from minifqt import QTensor
from minifqt.kernels import conv, gemm, reference
from minifqt.kernels.cpu import choice
from minifqt.qtensor import as_floats

pytest.importorskip("numba", reason="compiled kernels need numba: pip install numba")
from minifqt.kernels.cpu import floats, products  # noqa: E402 - numba is there

ROUNDING = 2.0**-24                                       # of one float32 operation, relative


def real(rng, shape, dtype="float32"):
    """What Identity makes of numbers of all sizes."""
    one = np.ones((1,) * len(shape), dtype)
    values = rng.standard_normal(shape) * 10 ** rng.uniform(-3, 3, shape)
    return QTensor(values.astype("float32").astype(dtype), one, 0 * one)


def operands(rng, sizes):
    """x, w, y, stride and padding as numbers."""
    return *(real(rng, shape) for shape in sizes[:3]), *sizes[3:]


def three_products(x, w, g, stride, padding, module=conv):
    """fprop, wgrad and dgrad by conv.py, or by the reference."""
    names = (("fprop", "wgrad", "dgrad") if module is conv else
             ("conv_fprop", "conv_wgrad", "conv_dgrad"))
    fprop, wgrad, dgrad = (getattr(module, name) for name in names)
    return [fprop(x, w, stride, padding), wgrad(g, x, w.shape[1:3], stride, padding),
            dgrad(g, w, x.shape[1:3], stride, padding)]


def assert_as_exact_as_floats_are(found, x, w, g, stride, padding, parts=1):
    """Each element within n roundings of Σ|a · b|, n the terms of its longest float32 sum."""
    double, size = ([QTensor(f(t.codes.astype("float64")), t.scale, t.zero) for t in (x, w, g)]
                    for f in (lambda v: v, abs))
    exact, sizes = (three_products(*v, stride, padding, reference) for v in (double, size))
    (K, R, S, C), (N, P, Q, _) = w.shape, g.shape
    terms = R * S * C, -(-N // parts) * P * Q + 1, R * S * K                  # + 1: of the total
    for y, z, total, n in zip(found, exact, sizes, terms, strict=True):
        assert y.dtype == np.float32
        assert y.shape == z.shape
        assert (abs(y - z) <= n * ROUNDING / (1 - n * ROUNDING) * total).all()


@pytest.mark.parametrize("seed", range(40))
def test_compiled_float_products_are_exact_to_rounding(seed, instructions, sent_to_blas):
    rng = np.random.default_rng(seed)
    given = operands(rng, geometry(rng))
    assert_as_exact_as_floats_are(three_products(*given), *given, parts=floats.PARTS)
    assert not sent_to_blas


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_compiled_float_products_of_each_shape_are_exact_to_rounding(sizes, instructions):
    given = operands(np.random.default_rng(0), sizes)
    assert_as_exact_as_floats_are(three_products(*given), *given, parts=floats.PARTS)


@pytest.mark.parametrize("size", [1, 100, 700])
def test_strips_of_a_large_image_change_no_bit_of_a_float_product(size, instructions, monkeypatch):
    for name in ("3 channels", "3 x 3, stride 2", "7 x 7, stride 2", "stride 3"):
        given = operands(np.random.default_rng(0), SIZES[name])
        whole = three_products(*given)
        with monkeypatch.context() as patch:
            patch.setattr(products, "STRIP", size)
            patch.setattr(floats, "CACHE", size)
            assert_same_bits(three_products(*given), whole)


def test_float_weight_gradients_add_parts_of_the_batch_in_float64(instructions, monkeypatch):
    """Two large images that cancel, ones between: a float32 total loses what it meets between."""
    x, g = (QTensor(np.ones((32, 1, 1, 1), "float32"), *2 * [np.zeros((1, 1, 1, 1), "float32")])
            for _ in range(2))
    x.codes[0], x.codes[-1] = 2.0**24, -(2.0**24)
    assert conv.wgrad(g, x, (1, 1), 1, 0) == 29           # one is lost, in the part of the first
    monkeypatch.setattr(floats, "PARTS", 32)
    assert conv.wgrad(g, x, (1, 1), 1, 0) == 30
    monkeypatch.setattr(floats, "PART", 1)
    assert conv.wgrad(g, x, (1, 1), 1, 0) == 0            # all in one float32 sum


def test_neither_threads_nor_instructions_change_a_bit_of_a_float_product(
        on_threads, set_instructions):
    def results():
        return [y for sizes in SIZES.values()
                for y in three_products(*operands(np.random.default_rng(0), sizes))]

    expected = results()
    for name in choice.supported()[:-1]:
        set_instructions(name)
        for found in on_threads(results):
            assert_same_bits(found, expected)


def test_sixteen_lanes_where_the_cpu_has_them_and_its_own_instructions_are_used(
        set_instructions, monkeypatch):
    for wide, lanes in ((False, 8), (True, 16)):
        monkeypatch.setitem(choice._features, "avx512f", wide)
        set_instructions("auto")
        assert choice.floats().lanes == lanes
    for name in choice.supported()[1:-1]:
        set_instructions(name)
        assert choice.floats().lanes == 8


def test_float_operands_need_not_be_contiguous(instructions):
    rng = np.random.default_rng(0)
    x, w, g = (turned(real(rng, shape)) for shape in ((4, 3, 8, 6), (5, 3, 3, 2), (4, 5, 8, 7)))
    assert not any(t.codes.flags.c_contiguous for t in (x, w, g))
    assert_as_exact_as_floats_are(three_products(x, w, g, 1, 1), x, w, g, 1, 1)


def test_float64_operands_stay_float64(sent_to_blas):
    rng = np.random.default_rng(0)
    x, w, g = (real(rng, shape, "float64") for shape in SIZES["3 channels"][:3])
    found = three_products(x, w, g, 1, 1)
    for y, z in zip(found, three_products(x, w, g, 1, 1, reference), strict=True):
        np.testing.assert_allclose(y, z, rtol=0, atol=1e-14 * abs(z).max())   # at most 180 terms
    assert sent_to_blas == ["conv_fprop", "conv_dgrad"]


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize("varies", [False, True])
def test_integers_beside_identity_become_the_floats_that_they_stand_for(dtype, varies):
    rng = np.random.default_rng(0)
    t = codes(rng, (3, 70, 90, 2), 0, zero="real", varies=varies, dtype=dtype)
    x = real(rng, (1, 1, 1, 2))
    for here in (t, turned(t)):
        found, expected = gemm.alike(here, x)[0], as_floats(here, "float32")
        assert_same_bits([found.codes, found.scale, found.zero],
                         [expected.codes, expected.scale, expected.zero])
