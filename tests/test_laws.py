"""The design as laws: who reads only this file knows what a product of integer tensors promises.

Law 1, exactness: a product equals the float64 product of its dequantized operands. Law 2,
factoring: no scale along a contracted axis. Law 3, linear mixing: mixed rows are unmixed in the
result of dgrad, nowhere else. Then: tensors are frozen, a cache is consumed, inputs stay as they
were.
"""
import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minifqt import QTensor, Streams, layers, quantizers
from minifqt.kernels import conv, gemm

EXACT = 2.0**-22                                          # law 1; float32 itself rounds by 2⁻²⁴
laws = settings(deadline=None, derandomize=True, max_examples=80)

# For each product its operands' places, then the one axis of each that survives in the result:
# scales and zeros may vary along that axis and along no other.
TABLE = {
    "linear fprop": ("act", "weight", 0, 0),              # (N, I), (O, I) → (N, O)
    "linear wgrad": ("grad_w", "act", 1, 1),              # (N, O), (N, I) → (O, I)
    "linear dgrad": ("grad_x", "weight", 0, 1),           # (N, O), (O, I) → (N, I)
    "conv fprop": ("act", "weight", 0, 0),                # x, w → (N, P, Q, K)
    "conv wgrad": ("grad_w", "act", 3, 3),                # g, x → (K, R, S, C)
    "conv dgrad": ("grad_x", "weight", 0, 3),             # g, w → (N, H, W, C)
}


@dataclass(frozen=True)
class Geometry:
    """Sizes of one convolution; as a linear layer, I = C and O = K."""

    N: int = 3
    H: int = 5
    W: int = 4
    C: int = 3
    K: int = 2
    R: int = 3
    S: int = 2
    stride: int = 2
    padding: int = 1

    @property
    def image(self):
        return self.N, self.H, self.W, self.C

    @property
    def filters(self):
        return self.K, self.R, self.S, self.C

    @property
    def output(self):
        P = (self.H + 2 * self.padding - self.R) // self.stride + 1
        Q = (self.W + 2 * self.padding - self.S) // self.stride + 1
        return self.N, P, Q, self.K

    def shapes(self, product):
        """Shapes of the product's two operands."""
        N, I, O = self.N, self.C, self.K
        return {"linear fprop": ((N, I), (O, I)), "conv fprop": (self.image, self.filters),
                "linear wgrad": ((N, O), (N, I)), "conv wgrad": (self.output, self.image),
                "linear dgrad": ((N, O), (O, I)), "conv dgrad": (self.output, self.filters),
                }[product]

    def multiply(self, product, a, b):
        """The product of two QTensors, as the layers form it."""
        kind, name = product.split()
        if kind == "linear":
            return getattr(gemm, name)(a, b)
        sizes = {"fprop": (), "wgrad": ((self.R, self.S),), "dgrad": ((self.H, self.W),)}[name]
        return getattr(conv, name)(a, b, *sizes, self.stride, self.padding)

    def multiply64(self, product, a, b):
        """The same product of two float64 arrays from its definition, pixel by pixel."""
        kind, name = product.split()
        if kind == "linear":
            return a @ b.T if name == "fprop" else a.T @ b if name == "wgrad" else a @ b
        x = {"fprop": a, "wgrad": b, "dgrad": np.zeros(self.image)}[name]
        x = np.pad(x, ((0, 0), (self.padding,) * 2, (self.padding,) * 2, (0, 0)))
        y, dw = np.zeros(self.output), np.zeros(self.filters)
        for p, q in np.ndindex(self.output[1:3]):
            top, left = p * self.stride, q * self.stride
            patch = x[:, top:top + self.R, left:left + self.S]                # (N, R, S, C), a view
            if name == "fprop":
                y[:, p, q] = np.tensordot(patch, b, 2 * [[1, 2, 3]])
            elif name == "wgrad":
                dw += np.tensordot(a[:, p, q], patch, (0, 0))
            else:
                patch += np.tensordot(a[:, p, q], b, (1, 0))
        top = left = self.padding
        dx = x[:, top:top + self.H, left:left + self.W]
        return {"fprop": y, "wgrad": dw, "dgrad": dx}[name]


@st.composite
def geometries(draw):
    """Kernels of any two sides from 1 to 5, also larger than the image where padding allows."""
    sizes = st.integers(1, 5)
    R, S, stride = draw(sizes), draw(sizes), draw(st.integers(1, 3))
    padding = draw(st.integers(0, 3))
    H, W = (draw(st.integers(max(1, taps - 2 * padding), 7)) for taps in (R, S))
    return Geometry(draw(sizes), H, W, draw(sizes), draw(sizes), R, S, stride, padding)


@st.composite
def operands(draw, product, geometry):
    """Two integer tensors with any scales and zeros that law 2 allows.

    A zero can be as large as that of a row of 1000 ± 0.003: 4·10⁷ steps.
    """
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    places, free_axes = TABLE[product][:2], TABLE[product][2:]
    pair = []
    for shape, free, place in zip(geometry.shapes(product), free_axes, places, strict=True):
        bits, dtype = draw(st.integers(2, 8)), draw(st.sampled_from(["uint8", "int8"]))
        kind = draw(st.sampled_from(["none", "integer", "real", "large"]))
        per = along(shape, free) if draw(st.booleans()) else (1,) * len(shape)
        low = 0 if dtype == "uint8" else -2 ** (bits - 1)
        zero = {"none": np.zeros(per), "integer": rng.integers(low, low + 2**bits, per),
                "real": rng.uniform(-300, 300, per), "large": rng.uniform(-4e7, 4e7, per)}[kind]
        codes, scale = rng.integers(low, low + 2**bits, shape), 2 ** rng.uniform(-20, 4, per)
        pair.append(tensor(codes, scale, zero, dtype, place))
    return pair


def along(shape, *axes):
    """Shape of a scale that varies along these axes alone."""
    return tuple(n if axis in axes else 1 for axis, n in enumerate(shape))


def tensor(codes, scale, zero, dtype="uint8", name="tensor"):
    """A QTensor of read-only arrays: a product that writes to an operand fails."""
    codes = np.array(codes, dtype)
    scale, zero = (np.array(v, "float32").reshape(np.shape(v) or (1,) * codes.ndim)
                   for v in (scale, zero))
    for array in (codes, scale, zero):
        array.flags.writeable = False
    return QTensor(codes, scale, zero, name=name)


def some(rng, shape, dtype="uint8", name="tensor"):
    """Per-tensor codes of the whole range, with a real zero."""
    low = 0 if dtype == "uint8" else -128
    return tensor(rng.integers(low, low + 256, shape), 0.01, 3.7, dtype, name)


def real(t):
    """What the codes stand for, in float64 from the stored scale and zero; rows stay mixed."""
    return t.scale.astype("float64") * (t.codes.astype("float64") - t.zero.astype("float64"))


# ---- law 1: exactness ----------------------------------------------------------------------------


@pytest.mark.parametrize("product", TABLE)
@given(data=st.data(), geometry=geometries())
@laws
def test_a_product_equals_the_float64_product_of_the_dequantized_operands(product, geometry, data):
    a, b = data.draw(operands(product, geometry))
    y = geometry.multiply(product, a, b)
    y64 = geometry.multiply64(product, real(a), real(b))
    assert y.dtype == np.float32
    assert y.shape == y64.shape
    assert abs(y - y64).max() <= EXACT * abs(y64).max()


@pytest.mark.parametrize(("spec", "product"), [
    (spec, product) for spec in ("ptq8", "ptq2", "ptqz4", "sym8", "psq5", "psq2")
    for product in TABLE if not (spec.startswith("psq") and product.endswith("wgrad"))])
def test_law_1_holds_for_what_each_quantizer_makes_wherever_law_2_lets_it_in(spec, product):
    rng, geometry, stream = np.random.default_rng(0), Geometry(N=6), Streams(0).stream("x")
    first, second = (rng.standard_normal(s, "float32") for s in geometry.shapes(product))
    a = quantizers.parse(spec)[0](1000 * first + 300, stream)
    b = quantizers.create("sym", 8)(second, stream)
    y = geometry.multiply(product, a, b)
    y64 = geometry.multiply64(product, real(a), real(b))
    assert abs(y - y64).max() <= EXACT * abs(y64).max()


def test_a_small_range_on_a_large_offset_keeps_its_digits():
    rng = np.random.default_rng(0)
    x = (1000 + 0.003 * rng.uniform(-1, 1, (4, 64))).astype("float32")
    t, w = quantizers.create("psq", 8)(x, Streams(0).stream("x")), some(rng, (8, 64), "int8")
    assert abs(t.zero).min() > 1e7
    y64 = real(t) @ real(w).T
    assert abs(gemm.fprop(t, w) - y64).max() <= EXACT * abs(y64).max()


@pytest.mark.parametrize("instructions", ["numpy", "auto"])
@pytest.mark.parametrize("K", [1024, 1025, 2049, 4608])
@pytest.mark.parametrize(("dtype", "extreme"),
                         [("uint8", 0), ("uint8", 255), ("int8", -128), ("int8", 127)])
def test_sums_are_exact_where_float32_would_round_them(K, dtype, extreme, instructions,
                                                       set_instructions):
    """1,024 products of 128 · 128 are 2²⁴: beyond, float32 cannot hold every partial sum."""
    set_instructions(instructions)
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 2, (2, 3, K))                 # codes are the extreme or one from it
    a, b = extreme + (1 if extreme <= 0 else -1) * steps
    exact = steps[0] @ steps[1].T                         # ≤ 4,608: float32 holds the result
    assert (gemm.fprop(*(tensor(c, 1, extreme, dtype) for c in (a, b))) == exact).all()
    x, w = (tensor(c.reshape(3, 1, 1, K), 1, extreme, dtype) for c in (a, b))
    assert (conv.fprop(x, w, 1, 0)[:, 0, 0] == exact).all()
    turned = tensor(b.T.reshape(K, 1, 1, 3), 1, extreme, dtype)
    assert (conv.dgrad(x, turned, (1, 1), 1, 0)[:, 0, 0] == exact).all()


@pytest.mark.parametrize("instructions", ["numpy", "auto"])
@pytest.mark.parametrize(("dtype", "extreme"), [("uint8", 0), ("int8", -128)])
def test_wgrad_of_131072_extreme_codes_does_not_wrap(dtype, extreme, instructions,
                                                     set_instructions):
    """128 images of 32 × 32: 131,072 · 128 · 128 = 2³¹, one more than int32 holds."""
    set_instructions(instructions)
    rng = np.random.default_rng(0)
    steps = rng.integers(0, 2, (2, 128, 32, 32, 2))
    g, x = (tensor(extreme + s, 1, extreme, dtype) for s in steps)
    exact = steps[0].reshape(-1, 2).T @ steps[1].reshape(-1, 2)               # float32 holds it
    assert (conv.wgrad(g, x, (1, 1), 1, 0)[:, 0, 0] == exact).all()
    flat = (tensor(t.codes.reshape(-1, 2), 1, extreme, dtype) for t in (g, x))
    assert (gemm.wgrad(*flat) == exact).all()
    g = tensor(np.full((128, 32, 32, 1), extreme), 1, extreme + 128, dtype)
    assert (conv.wgrad(g, g, (1, 1), 1, 0) == 2.0**31).all()


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2.0**-20), ("float64", 2.0**-49)])
@pytest.mark.parametrize("product", TABLE)
def test_beside_an_identity_operand_the_other_is_dequantized(product, dtype, tolerance):
    """The tolerance is the type's own rounding, 2⁻²⁴ or 2⁻⁵³, of sums of at most 18 terms."""
    rng, geometry = np.random.default_rng(0), Geometry()
    first, second = geometry.shapes(product)
    identity, stream = quantizers.create("identity"), Streams(0).stream("x")
    for integer_first in (True, False):
        shape = second if integer_first else first
        floats = identity(rng.standard_normal(shape).astype(dtype), stream)
        pair = (some(rng, first), floats) if integer_first else (floats, some(rng, second))
        y = geometry.multiply(product, *pair)
        y64 = geometry.multiply64(product, *(t.dequantize(dtype).astype("float64") for t in pair))
        assert y.dtype == dtype
        assert abs(y - y64).max() <= tolerance * abs(y64).max()


def test_padding_is_a_real_zero_whatever_the_zero_of_the_codes():
    x = tensor(np.full((1, 1, 1, 1), 7), 1, 100.5)
    w = tensor(np.full((1, 3, 3, 1), 9), 1, -2.25)
    expected = np.zeros((5, 5))                           # a border of outputs that see no pixel
    expected[1:4, 1:4] = (7 - 100.5) * (9 + 2.25)
    assert (conv.fprop(x, w, 1, 3)[0, :, :, 0] == expected).all()


# ---- law 2: factoring ----------------------------------------------------------------------------


def varying(rng, shape, axis, fields, name="tensor"):
    """An integer tensor whose named fields vary along this axis."""
    scale, zero = (rng.uniform(1, 2, along(shape, axis) if field in fields else along(shape))
                   for field in ("scale", "zero"))
    return tensor(rng.integers(0, 256, shape), scale, zero, name=name)


@pytest.mark.parametrize("product", TABLE)
def test_scales_and_zeros_may_vary_along_the_axis_that_survives(product):
    rng, geometry = np.random.default_rng(0), Geometry()
    a, b = (varying(rng, shape, axis, ("scale", "zero"))
            for shape, axis in zip(geometry.shapes(product), TABLE[product][2:], strict=True))
    assert min(a.scale.size, b.scale.size) > 1
    y64 = geometry.multiply64(product, real(a), real(b))
    assert abs(geometry.multiply(product, a, b) - y64).max() <= EXACT * abs(y64).max()


@pytest.mark.parametrize("fields", [("scale", "zero"), ("scale",), ("zero",)], ids="+".join)
@pytest.mark.parametrize(("product", "operand", "axis"), [
    (product, operand, axis) for product, row in TABLE.items() for operand in (0, 1)
    for axis in range(2 if product.startswith("linear") else 4) if axis != row[2 + operand]])
def test_a_scale_or_zero_along_a_contracted_axis_raises(product, operand, axis, fields):
    rng, geometry = np.random.default_rng(0), Geometry()
    shapes, name = geometry.shapes(product), f"layer1.0.conv1.{TABLE[product][operand]}"
    pair = [some(rng, shape) for shape in shapes]
    pair[operand] = varying(rng, shapes[operand], axis, fields, name)
    shape = re.escape(str(along(shapes[operand], axis)))
    with pytest.raises(ValueError, match=rf"{product.split()[1]} contracts axes \(.*\) of {name}, "
                       rf"but its {fields[0]}, shape {shape}, varies along axis {axis}: "):
        geometry.multiply(product, *pair)


@pytest.mark.parametrize("product", ["linear wgrad", "conv wgrad"])
def test_per_sample_codes_cannot_enter_wgrad_so_there_are_two_gradient_quantizers(product):
    rng, geometry = np.random.default_rng(0), Geometry()
    first, second = geometry.shapes(product)
    dy = rng.standard_normal(first, "float32")
    gw = replace(quantizers.create("psq", 4)(dy, Streams(0).stream("g")), name="fc.grad_w")
    with pytest.raises(ValueError, match="varies along axis 0: no integer GEMM can factor it out. "
                       r'Use a per-tensor quantizer: recipe.replace\(grad_w="ptq8"\)'):
        geometry.multiply(product, gw, some(rng, second))


# ---- law 3: linear mixing ------------------------------------------------------------------------


def mixed(rng, shape, bits=5):
    """BHQ codes of rows whose sizes differ 10⁴-fold, so that some are mixed."""
    sizes = 10 ** rng.uniform(-3, 1, along(shape, 0))
    x = (sizes * rng.standard_normal(shape)).astype("float32")
    return quantizers.create("bhq", bits)(x, Streams(0).stream("x"))


@pytest.mark.parametrize("operand", [0, 1])
@pytest.mark.parametrize("product", [name for name in TABLE if not name.endswith("dgrad")])
def test_a_mixed_operand_may_not_enter_fprop_or_wgrad(product, operand):
    rng, geometry = np.random.default_rng(0), Geometry(N=6, K=6)
    pair = [some(rng, shape) for shape in geometry.shapes(product)]
    pair[operand] = mixed(rng, pair[operand].shape)
    with pytest.raises(ValueError, match=rf"{product.split()[1]} cannot take x, whose rows "
                       "are mixed by Householder: only dgrad"):
        geometry.multiply(product, *pair)


@pytest.mark.parametrize("product", ["linear dgrad", "conv dgrad"])
def test_mixed_weights_may_not_enter_dgrad(product):
    rng, geometry = np.random.default_rng(0), Geometry(K=6)
    first, second = geometry.shapes(product)
    with pytest.raises(ValueError, match="dgrad cannot take x, whose rows are mixed"):
        geometry.multiply(product, some(rng, first), mixed(rng, second))


@pytest.mark.parametrize("product", ["linear dgrad", "conv dgrad"])
@given(geometry=geometries(), N=st.integers(3, 9), bits=st.integers(2, 8))
@laws
def test_unmixing_the_result_of_dgrad_equals_unmixing_its_operand(product, geometry, N, bits):
    rng, geometry = np.random.default_rng(0), replace(geometry, N=N)
    first, second = geometry.shapes(product)
    g, w = mixed(rng, first, bits), some(rng, second, "int8")
    dx = geometry.multiply(product, g, w)
    dx64 = geometry.multiply64(product, g.mix.undo(real(g)), real(w))
    # a mixed row is rounded by 2⁻²⁴; up to 9 of them, of different size, meet in a sample
    assert abs(dx - dx64).max() <= 2.0**-19 * abs(dx64).max()


def test_a_mixed_gradient_is_unmixed_beside_identity_weights_too():
    rng = np.random.default_rng(0)
    g, stream = mixed(rng, (6, 5)), Streams(0).stream("w")
    w = quantizers.create("identity")(rng.standard_normal((5, 4)), stream)
    dx64 = g.dequantize("float64") @ w.codes
    assert abs(gemm.dgrad(g, w) - dx64).max() <= 2.0**-45 * abs(dx64).max()   # float64 both ways
    assert abs(g.rows("float64") @ w.codes - dx64).max() > 0.1 * abs(dx64).max()


# ---- the integer tensor --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["codes", "scale", "zero", "mix", "name"])
def test_an_integer_tensor_is_frozen(name):
    t = some(np.random.default_rng(0), (3, 4))
    with pytest.raises(AttributeError, match=f"cannot assign to field '{name}'"):
        setattr(t, name, None)


def test_an_integer_tensor_stands_for_scale_times_codes_minus_zero():
    t = tensor([[0, 255, 7]], 0.5, 1.5, name="fc.act")
    assert (t.dequantize() == [[-0.75, 126.75, 2.75]]).all()
    assert t.dequantize().dtype == np.float32
    assert t.dequantize("float64").dtype == np.float64
    assert t.is_integer
    assert t.shape == (1, 3)
    turned = t.transposed()
    assert (turned.dequantize() == t.dequantize().T).all()
    assert turned.name == "fc.act"


@pytest.mark.parametrize("field", ["scale", "zero"])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (1, 1, 1), (2, 1), (4, 3), (1, 3)])
def test_scale_and_zero_need_the_axes_of_the_codes(field, shape):
    one = np.ones((1, 1), "float32")
    fields = {"scale": one, "zero": one, field: np.ones(shape, "float32")}
    with pytest.raises(ValueError, match=rf"fc\.act: {field} has shape {re.escape(str(shape))}; "
                       r"codes of shape \(3, 4\) need"):
        QTensor(np.zeros((3, 4), "uint8"), **fields, name="fc.act")


@pytest.mark.parametrize("dtype", ["int16", "int32", "uint16", "float16", "bool"])
def test_codes_of_another_type_raise(dtype):
    with pytest.raises(ValueError, match=rf"fc\.act: codes are {dtype}; expected uint8, int8"):
        QTensor(np.zeros((3, 4), dtype), np.ones((1, 1)), np.zeros((1, 1)), name="fc.act")


def test_a_kernel_that_does_not_fit_raises():
    rng = np.random.default_rng(0)
    x, w = some(rng, (1, 4, 4, 1)), some(rng, (1, 5, 3, 1))
    with pytest.raises(ValueError, match=r"\(5, 3\) does not fit into an image of \(4, 4\)"):
        conv.fprop(x, w, 1, 0)


@pytest.mark.parametrize(("stride", "padding"), [(0, 1), (-1, 0), (1, -1)])
def test_a_stride_below_1_or_a_padding_below_0_raises(stride, padding):
    rng = np.random.default_rng(0)
    x, w = some(rng, (1, 4, 4, 1)), some(rng, (1, 3, 3, 1))
    with pytest.raises(ValueError, match=f"stride {stride}, padding {padding}; expected stride"):
        conv.fprop(x, w, stride, padding)


# ---- the cache of a layer ------------------------------------------------------------------------

LAYERS = {
    "conv2d": (lambda: layers.Conv2d(2, 3, 3, padding=1, bias=True), (4, 5, 5, 2)),
    "linear": (lambda: layers.Linear(5, 3), (4, 5)),
    "batchnorm2d": (lambda: layers.BatchNorm2d(2), (4, 5, 5, 2)),
    "relu": (layers.ReLU, (4, 5, 5, 2)),
    "maxpool2d": (lambda: layers.MaxPool2d(2), (4, 4, 4, 2)),
    "globalavgpool2d": (layers.GlobalAvgPool2d, (4, 5, 5, 2)),
    "flatten": (layers.Flatten, (4, 5, 5, 2)),
}


def layer_and_input(name, recipe="bhq5"):
    make, shape = LAYERS[name]
    return (layers.build(make(), recipe),
            np.random.default_rng(0).standard_normal(shape, dtype="float32"))


@pytest.mark.parametrize("name", LAYERS)
def test_a_second_backward_raises(name):
    layer, x = layer_and_input(name)
    dy = layer.forward(x)
    layer.backward(dy)
    with pytest.raises(RuntimeError, match=f"{name}: nothing saved for .* backward consumed it"):
        layer.backward(dy)


@pytest.mark.parametrize("name", LAYERS)
def test_a_backward_after_an_evaluation_forward_raises_whatever_came_before(name):
    layer, x = layer_and_input(name)
    layer.forward(x)
    dy = layer.eval().forward(x)
    with pytest.raises(RuntimeError, match=f"{name}: nothing saved for .* evaluation .*train"):
        layer.backward(dy)


@pytest.mark.parametrize("name", LAYERS)
def test_keep_saved_allows_many_backwards_of_one_forward_within_its_block(name):
    layer, x = layer_and_input(name)
    dy = layer.forward(x)
    with layer.keep_saved():
        first, second = layer.backward(dy), layer.backward(dy)
    assert (first == second).all()                        # one step, hence one noise
    with pytest.raises(RuntimeError, match=f"{name}: nothing saved for"):
        layer.backward(dy)


@pytest.mark.parametrize("recipe", ["fp32", "qat8", "psq4", "bhq5"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_writes_to_nothing_that_it_was_given_nor_to_its_parameters(name, recipe):
    layer, x = layer_and_input(name, recipe)
    dy = np.random.default_rng(0).standard_normal(layer.forward(x).shape, dtype="float32")
    for array in (x, dy, *layer.state().values()):
        array.flags.writeable = False                     # to write would raise
    assert layer.forward(x).shape == dy.shape
    assert layer.backward(dy).shape == x.shape


@pytest.mark.parametrize("name", ["conv2d", "linear", "batchnorm2d"])
def test_gradients_are_assigned_and_never_added_to(name):
    layer, x = layer_and_input(name)
    dy = np.random.default_rng(0).standard_normal(layer.forward(x).shape, dtype="float32")
    layer.backward(dy)
    first = {key: p.grad for key, p in layer.params().items()}
    layer.forward(x)
    layer.backward(dy)
    assert all((p.grad == first[key]).all() for key, p in layer.params().items())
