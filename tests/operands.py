"""Operands of integer products, drawn at random: shared by the tests of each way to multiply."""
import numpy as np

from minifqt import QTensor
from minifqt.kernels import reference

SIZES = {                                                 # x, w, y, stride, padding
    "3 channels": ((2, 9, 10, 3), (5, 3, 3, 3), (2, 9, 10, 5), 1, 1),
    "1 x 1": ((3, 6, 5, 18), (20, 1, 1, 18), (3, 6, 5, 20), 1, 0),
    "1 x 1, stride 2": ((3, 7, 6, 16), (32, 1, 1, 16), (3, 4, 3, 32), 2, 0),
    "3 x 3, stride 2": ((2, 8, 9, 16), (17, 3, 3, 16), (2, 4, 5, 17), 2, 1),
    "7 x 7, stride 2": ((2, 23, 22, 3), (16, 7, 7, 3), (2, 12, 11, 16), 2, 3),
    "stride 3": ((2, 13, 11, 4), (6, 4, 2, 4), (2, 4, 4, 6), 3, 1),
    "one image of one pixel": ((1, 1, 1, 5), (3, 1, 1, 5), (1, 1, 1, 3), 1, 0),
    "one image": ((1, 12, 12, 33), (34, 3, 3, 33), (1, 12, 12, 34), 1, 1),
    "a row of more than two tiles": ((1, 3, 37, 4), (3, 3, 3, 4), (1, 1, 35, 3), 1, 0),
    "more images than a task": ((37, 4, 4, 2), (2, 3, 3, 2), (37, 4, 4, 2), 1, 1)}


def codes(rng, shape, free=None, zero=None, varies=None, dtype=None, extreme=None):
    """Integer codes with any legal scale and zero: per tensor, or along the axis `free`."""
    dtype = dtype or rng.choice(["uint8", "int8"])
    low = 0 if dtype == "uint8" else -128
    if extreme is None:
        extreme = rng.random() < 0.3                      # only the two outermost codes
    values = low + (255 * rng.integers(0, 2, shape) if extreme else rng.integers(0, 256, shape))
    varies = free is not None and rng.random() < 0.5 if varies is None else varies
    per = tuple(n if varies and axis == free else 1 for axis, n in enumerate(shape))
    zeros = {"none": np.zeros(per), "integer": rng.integers(low, low + 256, per),
             "real": rng.uniform(-300, 300, per), "large": rng.uniform(-4e7, 4e7, per)}
    zero = zero or rng.choice(list(zeros))
    return QTensor(values.astype(dtype), rng.uniform(1e-3, 1, per).astype("float32"),
                   zeros[zero].astype("float32"))


def weights(rng, shape, free=None, **options):
    """Codes as `sym` makes weights: signed, without a zero."""
    return codes(rng, shape, free, zero="none", dtype="int8", **options)


def geometry(rng):
    """Sizes of a convolution; padding up to 3, also around a 1×1 kernel."""
    N, C, K, R, S = map(int, rng.integers(1, 6, 5))
    stride, padding = int(rng.integers(1, 4)), int(rng.integers(0, 4))
    H, W = (int(rng.integers(max(1, taps - 2 * padding), 10)) for taps in (R, S))
    P, Q = reference.output_size((H, W), (R, S), stride, padding)
    return (N, H, W, C), (K, R, S, C), (N, P, Q, K), stride, padding


def three_products(rng, module, sizes, weights=codes, **options):
    """A convolution's three products by this module, of operands that rng makes."""
    x, w, y, stride, padding = sizes
    return [module.conv_fprop(codes(rng, x, 0, **options), weights(rng, w, 0), stride, padding),
            module.conv_wgrad(codes(rng, y, 3, **options), codes(rng, x, 3, **options), w[1:3],
                              stride, padding),
            module.conv_dgrad(codes(rng, y, 0, **options), weights(rng, w, 3), x[1:3], stride,
                              padding)]


def four_products(rng, module, weights=codes):
    """matmul and the three of a convolution of random sizes."""
    sizes, (M, J, K) = geometry(rng), rng.integers(1, 40, 3)
    return [module.matmul(codes(rng, (M, K), 0), codes(rng, (J, K), 0)),
            *three_products(rng, module, sizes, weights)]


def turned(t):
    """The same numbers, (N, C, H, W) → (N, W, H, C) backwards: a view, not contiguous."""
    return QTensor(t.codes.transpose(0, 3, 2, 1)[:, ::-1], t.scale, t.zero)


def assert_same_bits(fast, plain):
    for a, b in zip(fast, plain, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (np.asarray(a) == np.asarray(b)).all()
