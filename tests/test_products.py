"""The fast products are the plain ones, bit for bit: through float32 BLAS, through the tensor-core
road, on any number of threads, and on a GPU where there is one.
"""
from threading import Event

import numpy as np
import pytest
from given import Given
from operands import assert_same_bits, codes, four_products, geometry
from threadpoolctl import threadpool_limits

from minifqt import NonFiniteError, QTensor, Streams, backend, layers, quantizers
from minifqt.kernels import blas, conv, engines, norm, reference, rounding

SEEDS = range(40)


# ---- float32 BLAS --------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
def test_products_through_blas_equal_the_reference(seed):
    assert_same_bits(four_products(np.random.default_rng(seed), blas),
                     four_products(np.random.default_rng(seed), reference))


@pytest.mark.parametrize("zeros", [("none", "none"), ("real", "none"), ("none", "real"),
                                   ("large", "large")])
def test_products_equal_the_reference_whichever_zeros_let_a_term_be_left_out(zeros):
    rng = np.random.default_rng(0)
    x, w = codes(rng, (5, 9, 9, 3), zero=zeros[0]), codes(rng, (4, 3, 3, 3), zero=zeros[1])
    g = codes(rng, (5, 5, 5, 4), zero=zeros[0])
    v = codes(rng, (5, 9, 9, 3), zero=zeros[1])
    assert_same_bits([blas.conv_fprop(x, w, 2, 1), blas.conv_dgrad(g, w, (9, 9), 2, 1),
                      blas.conv_wgrad(g, v, (3, 3), 2, 1)],
                     [reference.conv_fprop(x, w, 2, 1), reference.conv_dgrad(g, w, (9, 9), 2, 1),
                      reference.conv_wgrad(g, v, (3, 3), 2, 1)])


@pytest.mark.parametrize("columns", [100, 1000, 4000])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("centred", [True, False])
def test_products_equal_the_reference_wherever_the_work_is_cut(centred, stride, columns,
                                                               monkeypatch):
    """Blocks of images, slabs of a contraction: all of them small."""
    if centred:
        monkeypatch.setattr(engines.Narrow, "largest", 0)
    monkeypatch.setattr(engines.Sgemm, "columns", columns)
    monkeypatch.setattr(engines.Sgemm, "slab", 50)
    monkeypatch.setattr(blas, "LEAST", columns)
    rng = np.random.default_rng(0)
    a, b = codes(rng, (200, 120), 0, varies=True), codes(rng, (3, 120), 0)
    x, w = (codes(rng, shape, 0, varies=True) for shape in ((9, 10, 11, 4), (2, 3, 3, 4)))
    P, Q = reference.output_size((10, 11), (3, 3), stride, 1)
    g, y = (codes(rng, (9, P, Q, 2), free, varies=True) for free in (3, 0))
    v, u = codes(rng, (9, 10, 11, 4), 3), codes(rng, (2, 3, 3, 4), 3)
    assert_same_bits([blas.matmul(a, b), blas.conv_fprop(x, w, stride, 1),
                      blas.conv_wgrad(g, v, (3, 3), stride, 1),
                      blas.conv_dgrad(y, u, (10, 11), stride, 1)],
                     [reference.matmul(a, b), reference.conv_fprop(x, w, stride, 1),
                      reference.conv_wgrad(g, v, (3, 3), stride, 1),
                      reference.conv_dgrad(y, u, (10, 11), stride, 1)])


def test_a_weight_gradient_adds_as_many_images_at_once_as_float32_holds(monkeypatch):
    """Two of 25 pixels each, then the next two; of nine, the last is alone."""
    monkeypatch.setattr(engines.Sgemm, "slab", 50)
    rng = np.random.default_rng(0)
    g, x = (codes(rng, (9, 5, 5, size), 3) for size in (2, 4))
    assert_same_bits([blas.conv_wgrad(g, x, (3, 3), 1, 1)],
                     [reference.conv_wgrad(g, x, (3, 3), 1, 1)])


@pytest.mark.parametrize(("terms", "kind"), [(518, "Narrow"), (519, "Sgemm")])
def test_codes_are_not_centred_beside_weights_that_float32_can_hold(terms, kind):
    """255 · 127 · 519 is odd and above 2²⁴: float32 would round it."""
    one = np.ones((1, 1), "float32")
    a = QTensor(np.full((3, terms), 255, "uint8"), one, 0 * one)
    w = np.full((2, terms), 127, "int8")
    w[1, ::2] = -1
    w = QTensor(w, one, 0 * one)
    assert type(engines.engine_of(a, w, weights=True)).__name__ == kind
    assert type(engines.engine_of(a, w)).__name__ == "Sgemm"
    x, f = (QTensor(t.codes[:, None, None], one[:, None, None], 0 * one[:, None, None])
            for t in (a, w))
    assert_same_bits([blas.matmul(a, w), blas.conv_fprop(x, f, 1, 0)],
                     [reference.matmul(a, w), reference.conv_fprop(x, f, 1, 0)])


def test_many_codes_beside_weights_of_zero_are_added_exactly():
    """Σa = 255 · 70,001 is odd and above 2²⁴; the zeros cancel it."""
    one = np.ones((1, 1, 1, 1), "float32")
    x = QTensor(np.full((1, 1, 1, 70_001), 255, "uint8"), one, 255 * one)
    w = QTensor(np.zeros((1, 1, 1, 70_001), "int8"), one, one)
    assert blas.conv_fprop(x, w, 1, 0) == 0


def test_filter_rows_add_up_exactly_where_float32_would_round_their_sum():
    """Each row of 603 terms fits below 2²⁴, all three, odd, do not; the zero cancels them."""
    one = np.ones((1, 1, 1, 1), "float32")
    x = QTensor(np.full((1, 3, 3, 201), 255, "uint8"), one, 255 * one)
    w = QTensor(np.full((1, 3, 3, 201), 127, "int8"), one, 0 * one)
    assert blas.conv_fprop(x, w, 1, 0) == 0


def test_codes_need_not_be_contiguous():
    rng = np.random.default_rng(0)
    x, w = codes(rng, (4, 3, 8, 6)), codes(rng, (3, 5, 3, 2))

    def turned(t):                                        # (N, C, H, W) → (N, H, W, C), a view
        return QTensor(t.codes.transpose(0, 2, 3, 1)[:, ::-1], t.scale, t.zero)

    x, w = turned(x), QTensor(w.codes.transpose(1, 2, 3, 0)[:, :, ::-1], w.scale, w.zero)
    assert_same_bits([blas.conv_fprop(x, w, 1, 1)], [reference.conv_fprop(x, w, 1, 1)])


def test_float_products_equal_the_reference_to_rounding():
    rng, single = np.random.default_rng(0), np.ones((1, 1, 1, 1))

    def floats(*shape):
        return QTensor(rng.standard_normal(shape), single, 0 * single)

    x, w, g = floats(3, 7, 8, 4), floats(5, 3, 2, 4), floats(3, 4, 5, 5)
    pairs = [(blas.conv_fprop(x, w, 2, 1), reference.conv_fprop(x, w, 2, 1)),
             (blas.conv_dgrad(g, w, (7, 8), 2, 1), reference.conv_dgrad(g, w, (7, 8), 2, 1)),
             (blas.conv_wgrad(g, x, (3, 2), 2, 1), reference.conv_wgrad(g, x, (3, 2), 2, 1))]
    for fast, plain in pairs:                             # float64 sums of at most 60 terms
        np.testing.assert_allclose(fast, plain, rtol=0, atol=1e-14 * abs(plain).max())


# ---- the road of a GPU, walked with NumPy --------------------------------------------------------


class Elsewhere:
    """NumPy that is not NumPy: code that asks `xp is np` takes the GPU's branch."""

    def __getattr__(self, name):
        return getattr(np, name)


def int8_gemm(a, b):
    """a bᵀ as an int8 tensor core forms it: int32, wrapping; takes multiples of 16 alone."""
    assert a.dtype == b.dtype == np.int8
    assert a.shape[1] % 16 == b.shape[1] % 16 == b.shape[0] % 16 == 0
    return a.astype("int32") @ b.astype("int32").T


@pytest.fixture
def tensor_cores(monkeypatch):
    """Integer products go through TensorCores(gemm), with int8_gemm unless a test sets another."""
    engine, elsewhere = engines.TensorCores(int8_gemm), Elsewhere()
    plain = blas.engine_of
    monkeypatch.setattr(blas, "array_module", lambda _: elsewhere)
    monkeypatch.setattr(blas, "engine_of",
                        lambda a, b, weights=False: engine if a.is_integer and b.is_integer
                        else plain(a, b, weights))
    return engine


@pytest.mark.parametrize("seed", SEEDS)
def test_products_through_int8_tensor_cores_equal_the_reference(seed, tensor_cores):
    assert tensor_cores.slab == 65536
    assert_same_bits(four_products(np.random.default_rng(seed), blas),
                     four_products(np.random.default_rng(seed), reference))


def test_tensor_cores_cut_a_long_contraction_into_slabs(tensor_cores):
    rng, lengths = np.random.default_rng(0), []

    def gemm(a, b):
        lengths.append(a.shape[1])
        return int8_gemm(a, b)

    tensor_cores.gemm, tensor_cores.slab = gemm, 32
    a, b = codes(rng, (3, 100)), codes(rng, (2, 100))
    assert_same_bits([blas.matmul(a, b)], [reference.matmul(a, b)])
    assert lengths == [32, 32, 32, 16]


def test_without_slabs_int32_would_wrap_at_131072_terms(tensor_cores):
    one = np.ones((1, 1), "float32")
    a = QTensor(np.zeros((1, 131072), "uint8"), one, 128 * one)
    assert blas.matmul(a, a) == 2.0**31
    tensor_cores.slab = 1 << 20
    assert blas.matmul(a, a) == -(2.0**31)


def test_tensor_cores_take_extreme_codes_of_both_types(tensor_cores):
    one = np.ones((1, 1), "float32")
    for dtype, values in (("uint8", [0, 127, 128, 255]), ("int8", [-128, -1, 0, 127])):
        a = QTensor(np.array(4 * [values], dtype).T.copy(), one, 0 * one)
        assert tensor_cores.load(a.codes).dtype == np.int8
        exact = a.codes.astype(int) @ a.codes.astype(int).T
        assert (blas.matmul(a, a) == exact).all()


@pytest.mark.parametrize("kernels", ["auto", "numpy"])
def test_batch_norm_on_the_road_of_a_gpu_agrees_with_that_of_a_cpu(
        kernels, set_instructions, monkeypatch):
    set_instructions(kernels)
    rng = np.random.default_rng(0)
    x, dy = 2 + rng.standard_normal((2, 6, 5, 4, 3), dtype="float32")
    weight, bias, inv_std = rng.standard_normal((3, 3), dtype="float32")

    def results():
        mean, var = norm.statistics(x)
        y = norm.normalize(x, mean, inv_std, weight, bias)
        return [mean, var, y, *norm.backward(dy, x, mean, inv_std, weight)]

    here, elsewhere = results(), Elsewhere()
    monkeypatch.setattr(norm, "array_module", lambda _: elsewhere)
    monkeypatch.setattr(norm, "is_images", lambda _: False)
    for a, b in zip(results(), here, strict=True):        # float64 sums, rounded to float32
        np.testing.assert_allclose(a, b, rtol=0, atol=2.0**-23 * abs(b).max())


# ---- threads -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["integer", "float32", "float64"])
def test_the_number_of_threads_changes_no_bit_of_a_product(kind, on_threads):
    rng = np.random.default_rng(0)

    def operand(*shape):
        single = (1,) * len(shape)
        if kind == "integer":
            return codes(rng, shape, zero="real")
        return QTensor(rng.standard_normal(shape, kind), np.ones(single), np.zeros(single))

    x, w, g = operand(24, 16, 16, 16), operand(8, 3, 3, 16), operand(24, 16, 16, 8)
    a, b = operand(2000, 300), operand(20, 300)
    one, two, four = on_threads(lambda: [
        blas.matmul(a, b), blas.conv_fprop(x, w, 1, 1), blas.conv_wgrad(g, x, (3, 3), 1, 1),
        blas.conv_dgrad(g, w, (16, 16), 1, 1)])
    assert_same_bits(one, two)
    assert_same_bits(one, four)


def test_the_number_of_threads_changes_no_bit_of_a_float_sum(on_threads):
    rng = np.random.default_rng(0)
    x, dy = (10 + rng.standard_normal((30, 32, 32, 16), dtype="float32") for _ in range(2))
    weight, bias = rng.standard_normal((2, 16), dtype="float32")

    def sums():
        mean, var = norm.statistics(x)
        inv_std = 1 / np.sqrt(var + np.float32(1e-5))
        y = norm.normalize(x, mean, inv_std, weight, bias)
        return [mean, var, y, *norm.backward(dy, x, mean, inv_std, weight), norm.channel_sum(dy)]

    one, two, four = on_threads(sums)
    assert_same_bits(one, two)
    assert_same_bits(one, four)


@pytest.mark.parametrize("spec", ["ptq8", "ptqz8", "sym8", "psq4", "bhq5"])
def test_the_number_of_threads_changes_no_bit_of_a_quantizer(spec, on_threads):
    x = np.random.default_rng(0).standard_normal((64, 16, 16, 16), dtype="float32")
    x *= np.arange(1, 65, dtype="float32").reshape(64, 1, 1, 1)

    def quantized():
        t = quantizers.parse(spec)[0](x, Streams(0).stream("x"))
        return [t.codes, t.scale, t.zero, t.dequantize()]

    one, two, four = on_threads(quantized)
    assert_same_bits(one, two)
    assert_same_bits(one, four)


def test_blocks_come_back_in_order_and_cover_everything(on_threads):
    expected = [(start, min(start + 7, 50)) for start in range(0, 50, 7)]
    results = on_threads(lambda: backend.map_blocks(lambda s: (s.start, s.stop), 50, 7))
    assert all(blocks == expected for blocks in results)


def test_less_than_one_thread_raises():
    with pytest.raises(ValueError, match="0 threads: expected 1 to 256"):
        backend.set_threads(0)


def test_blas_has_one_thread_inside_and_its_own_again_behind():
    def counts():
        return {library.get_num_threads() for library in backend._blas}

    with threadpool_limits(2, user_api="blas"):
        with backend.one_blas_thread():
            assert counts() == {1}
        assert counts() == {2}


def test_blas_has_one_thread_until_the_last_is_outside():
    with threadpool_limits(2, user_api="blas"):
        first, second = backend.one_blas_thread(), backend.one_blas_thread()
        for enter in (first.__enter__, second.__enter__):
            enter()
        first.__exit__(None, None, None)                  # while another thread still multiplies
        assert {library.get_num_threads() for library in backend._blas} == {1}
        second.__exit__(None, None, None)
        assert {library.get_num_threads() for library in backend._blas} == {2}


def test_what_is_begun_is_done_by_whoever_has_time():
    before, released = backend.threads(), Event()
    backend.set_threads(2)
    try:
        first, second = backend.begun(released.wait), backend.begun(np.add, 1, 2)
        assert second() == 3                              # the only helper is busy
        released.set()
        assert first()
        assert backend.begun(np.multiply, 2, 3)() == 6
    finally:
        released.set()
        backend.set_threads(before)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("spec", ["ptq8", "identity"])
def test_a_weight_gradient_of_numpy_waits_for_nobody(spec, dtype, on_threads, set_instructions):
    set_instructions("numpy")
    rng, (quantize, _) = np.random.default_rng(0), quantizers.base.parse(spec)
    g, x = (quantize(rng.standard_normal((40, 9, 9, C)).astype(dtype), Streams(0).stream("x"))
            for C in (5, 3))
    plain = conv.wgrad(g, x, (3, 3), 1, 1)
    for found in on_threads(lambda: conv.wgrad(g, x, (3, 3), 1, 1, lazily=True)):
        assert found.dtype == plain.dtype
        assert np.array_equal(found, plain)


# ---- quantizers in blocks, and sums over batch and pixels ----------------------------------------


@pytest.mark.parametrize("shape", [(1, 200_001), (300, 700), (3, 5)])
@pytest.mark.parametrize("noise", ["random", 0, 65535])
def test_blockwise_rounding_equals_the_reference(shape, noise):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape, dtype="float32")
    stream = Given(rng.integers(0, 65536, shape) if noise == "random" else noise)
    h = stream.bits(shape)
    low, high = rounding.joined(rounding.row_parts(x))[0]
    assert (low == x.min(axis=1, keepdims=True)).all()
    assert (high == x.max(axis=1, keepdims=True)).all()
    for bins in (3, 255):
        _, inv = reference.grid(low, high, bins)
        plain = reference.round_codes(reference.fixed_point(x, low, inv), h, bins)
        fast = rounding.round_rows(x, (low, inv, 0 * low), stream, shape, (0, bins))
        assert (fast == plain).all()
        code = np.full_like(low, bins // 2)
        plain = reference.anchored_fixed(x, 0 * low, inv, code, 0, bins)
        plain = reference.anchored_codes(plain, h)
        fast = rounding.round_rows(x, (0 * low, inv, 65536 * code), stream, shape, (0, bins))
        assert (fast == plain).all()


@pytest.mark.parametrize("shape", [(1, 3), (37, 3), (5, 3, 7, 4), (40, 16, 16, 8), (3, 6, 2)])
def test_channel_sums_are_float64_sums(shape):
    x = np.random.default_rng(0).uniform(1, 2, shape).astype("float32")
    exact = x.sum(axis=tuple(range(x.ndim - 1)), dtype="float64")
    terms = x.size // shape[-1]
    np.testing.assert_allclose(norm.channel_sum(x), exact, rtol=2 * terms * 2.0**-53)   # float64


def test_statistics_take_one_pass_in_float64_so_a_large_offset_costs_no_digits():
    x = (1e4 + np.random.default_rng(0).standard_normal((4096, 3))).astype("float32")
    _, var = norm.statistics(x)
    # Σx² is 1e8 times the variance: each rounding of 2⁻⁵³ weighs 1e-8; then one to float32, 6e-8
    np.testing.assert_allclose(var, x.astype("float64").var(axis=0), rtol=1e-6)


# ---- a GPU ---------------------------------------------------------------------------------------


@pytest.fixture(params=["cupy"])
def xp(request):
    """The other array modules; skips where there is none."""
    try:
        module = backend.device_module("cuda")
    except RuntimeError as error:
        pytest.skip(str(error))
    assert module.__name__ == request.param
    return module


def moved(t, xp):
    return QTensor(xp.asarray(t.codes), xp.asarray(t.scale), xp.asarray(t.zero))


@pytest.mark.parametrize("seed", range(10))
def test_products_on_a_gpu_equal_those_on_the_cpu(seed, xp):
    rng = np.random.default_rng(seed)
    x, w, y, stride, padding = geometry(rng)
    pairs = [("matmul", (codes(rng, (70, 33), 0), codes(rng, (21, 33), 0)), ()),
             ("conv_fprop", (codes(rng, x, 0), codes(rng, w, 0)), (stride, padding)),
             ("conv_wgrad", (codes(rng, y, 3), codes(rng, x, 3)), (w[1:3], stride, padding)),
             ("conv_dgrad", (codes(rng, y, 0), codes(rng, w, 3)), (x[1:3], stride, padding))]
    for name, operands, sizes in pairs:
        here = getattr(blas, name)(*operands, *sizes)
        there = getattr(blas, name)(*(moved(t, xp) for t in operands), *sizes)
        assert_same_bits([backend.to_cpu(there)], [here])


def test_wgrad_of_131072_extreme_codes_does_not_wrap_on_a_gpu(xp):
    one = xp.ones((1, 1), "float32")
    a = QTensor(xp.zeros((3, 131072), "uint8"), one, 128 * one)
    assert (blas.matmul(a, a) == 2.0**31).all()


@pytest.mark.parametrize("spec", ["identity", "ptq8", "ptq2", "ptqz5", "sym8", "psq4", "bhq5"])
def test_quantizers_on_a_gpu_equal_those_on_the_cpu(spec, xp):
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((9, 5, 5, 3)) * 10 ** rng.uniform(-3, 3, (9, 1, 1, 1)))
    x = x.astype("float32")
    here, there = (quantizers.parse(spec)[0](array, Streams(0, module).stream("x"))
                   for array, module in ((x, np), (xp.asarray(x), xp)))
    fields = [backend.to_cpu(getattr(there, field)) for field in ("codes", "scale", "zero")]
    if spec != "bhq5":
        assert_same_bits(fields, [here.codes, here.scale, here.zero])
    else:                                                 # group sums: equal nearly always
        assert (fields[0] == here.codes).mean() > 0.99
        np.testing.assert_allclose(fields[1], here.scale, rtol=2.0**-22)      # a rounding or two


def test_a_layer_on_a_gpu_gives_the_gradients_of_the_cpu(xp):
    rng = np.random.default_rng(0)
    x, dy = (rng.standard_normal(shape, "float32") for shape in ((4, 7, 7, 3), (4, 4, 4, 5)))
    results = []
    for module, device in ((np, "cpu"), (xp, "cuda")):
        layer = layers.build(layers.Conv2d(3, 5, 3, stride=2, padding=1), "psq4", device=device)
        y, dx = layer.forward(module.asarray(x)), layer.backward(module.asarray(dy))
        results.append([backend.to_cpu(v) for v in (y, dx, layer.weight.grad)])
    assert_same_bits(*results)


def test_nan_on_a_gpu_raises_when_the_program_asks(xp):
    streams = Streams(0, xp)
    quantizers.create("ptq", 8)(xp.full((2, 2), xp.nan, "float32"), streams.stream("conv1.act"))
    with pytest.raises(NonFiniteError, match=r"conv1\.act: NaN or infinity entered a quantizer"):
        streams.raise_pending()
