"""What the quantizers do to the gradient that enters one layer: its variance, and why it is so.

bounds: closed form, measured and the theorem's bound side by side. bins: how codes are used, and
the rows' ranges, which decide the step. No backward pass is made here: probe.errors is looked at.
"""
from collections.abc import Iterable

import numpy as np

from minifqt.backend import Array, to_cpu
from minifqt.quantizers import create
from minifqt.rng import Streams
from minifqt.study.theorems import z_of_t


def bounds(name: str, bits: int, dy: Array, draws: int, seed: int = 0) -> dict:
    """Variance of Q(dy), relative to Σ dy²: measured from draws, closed form, the theorem's bound.

    error  standard error of `measured`;  loose  bound / closed form
    z      of measured − closed form: beyond 4 or so the formula is wrong
    """
    q, stream = create(name, bits=bits), Streams(seed).stream("study.bounds")
    sizes = [_squared_error(q, dy, stream, draw) for draw in range(draws)]
    closed, size = closed_form(name, bits, dy)
    measured, error = float(np.mean(sizes)), float(np.std(sizes, ddof=1) / np.sqrt(draws))
    return {"quantizer": name, "bits": bits, "measured": measured / size, "error": error / size,
            "closed": closed / size, "bound": q.bound(dy) / size, "loose": q.bound(dy) / closed,
            "z": z_of_t((measured - closed) / error, draws - 1) if error else 0.0}


def closed_form(name: str, bits: int, dy: Array) -> tuple[float, float]:
    """Total variance of Q(dy) without any draw, and Σ dy²."""
    return (float(create(name, bits=bits).variance(dy).sum()),
            float((to_cpu(dy).astype("float64") ** 2).sum()))


def _squared_error(q, dy, stream, draw):
    stream.streams.step = draw
    return float(((to_cpu(q(dy, stream).dequantize("float64")) - to_cpu(dy)) ** 2).sum())


def bins(name: str, bits: int, dy: Array) -> dict:
    """How Q(dy) uses its codes: `occupied[c]` elements have code c; `ranges` of the rows, (N,).

    A row's range is its steps' size times their number, in units of the largest |dy|; where rows
    are mixed, of the steps as they are after mixing back: √((T⁻¹)² · scale²).
    """
    q = create(name, bits=bits)
    t = q(dy, Streams(0).stream("study.bins"))
    squares = to_cpu(t.scale).reshape(-1, 1).astype("float64") ** 2
    squares = squares if t.mix is None else t.mix.undo_squared(squares)
    return {"quantizer": name, "bits": bits,
            "occupied": np.bincount(to_cpu(t.codes).reshape(-1), minlength=q.bins + 1).tolist(),
            "ranges": (np.sqrt(squares[:, 0]) * q.bins / float(abs(to_cpu(dy)).max())).tolist()}


def bits_used(occupied: Iterable[int]) -> float:
    """Entropy of the codes in bits: how many of b the tensor really uses."""
    share = np.array([count for count in occupied if count], float)
    share /= share.sum()
    return float(-(share * np.log2(share)).sum())
