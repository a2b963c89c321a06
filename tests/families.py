"""The families of quantizers, tensors to try them on, and a test of unbiasedness."""
import numpy as np
import pytest
from given import Given

from minifqt.quantizers import create
from minifqt.rng import Streams

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
