"""The least that each compiled kernel has to do, counted from the shapes of its arguments.

Bytes of whole arrays once each, products without absent taps, random numbers, numbers that pass
through float64. What a kernel reads twice, packs or pads is its own affair. Next: limits.py.
"""
from functools import lru_cache
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np

ROUNDING = 9                                              # float32 operations of a code


class Work(NamedTuple):
    """The least that a call has to do, from the shapes of its arguments."""

    shape: str                                            # for the reader
    products: int = 0                                     # integer multiply-adds, no absent tap
    read: int = 0                                         # bytes of whole arrays; each once
    written: int = 0
    noise: int = 0                                        # 16-bit random numbers
    doubles: int = 0                                      # numbers that pass through float64 once
    floats: int = 0                                       # float32 operations: ± · < min max rint


def correlation(v):
    """Either correlation; of codes, scaling is a passage through float64 of each number of y."""
    N, P, Q, K = v.y.shape
    (H, W, C), (R, S) = v.a.shape[1:], v.w.shape[1:3]
    met = (meetings(P, R, v.offset[0], H, v.spread, v.stride)
           * meetings(Q, S, v.offset[1], W, v.spread, v.stride))
    shape = f"{dims(v.a)} → {P}·{Q}·{K}, {R}×{S}"
    shape += f", stride {v.stride}" if v.stride > 1 else ""
    shape += f", spread {v.spread}" if v.spread > 1 else ""
    work = Work(shape, 0, v.a.nbytes + v.w.nbytes, v.y.nbytes)
    return (work._replace(floats=N * met * C * K) if v.w.dtype == np.float32 else
            work._replace(products=N * met * C * K, doubles=v.y.size))


def correlate_images(v):
    """Σ y, Σ y² are one passage more, a residual and the range 1 and 2 operations."""
    work, summed, more = correlation(v), v.sums.size > 0, v.residual.size > 0
    return work._replace(shape=work.shape + " + residual" * more,
                         read=work.read + v.residual.nbytes,
                         doubles=work.doubles + v.y.size * summed,
                         floats=work.floats + v.y.size * (more + 2 * summed))


def correlate_gated(v):
    """Unmixing is two passages of a mixed row, one of another; Σ g and Σ g · x̂ one each.

    Operations as in gradient_sums, and one for a residual.
    """
    work, counts = correlation(v), np.diff(v.starts)
    mixed, more = int(counts[counts > 1].sum()), v.residual.size > 0
    unmixed = v.y.size // len(v.y) * mixed
    return work._replace(shape=work.shape + " + residual" * more + ", gated" * (v.x.size > 0)
                         + ", mixed" * (mixed > 0),
                         read=work.read + v.x.nbytes + v.residual.nbytes,
                         doubles=work.doubles + v.y.size + 2 * v.x.size + unmixed,
                         floats=work.floats + 7 * v.x.size + more * v.y.size)


def wgrad_images(v):
    """Every pixel of g meets the pixels of x under its taps."""
    (N, P, Q, K), (H, W, C), (R, S) = v.g.shape, v.x.shape[1:], v.taps
    met = (meetings(P, R, v.offset[0], H, 1, v.stride)
           * meetings(Q, S, v.offset[1], W, 1, v.stride))
    return Work(f"{dims(v.g)}, {H}·{W}·{C} → {K}·{R}·{S}·{C}"
                + (f", stride {v.stride}" if v.stride > 1 else ""), N * met * C * K,
                v.g.nbytes + v.x.nbytes, K * R * S * C * 4)


def wgrad_parts(v):
    """The same of floats; what is written are the parts."""
    work = wgrad_images(v)
    return work._replace(products=0, floats=work.products, written=v.parts.nbytes)


def gemm_rows(v):
    """Of whole tiles: padding counts too."""
    return Work(f"{dims(v.a)} by {dims(v.w)}", v.a.size * v.out.shape[1], v.a.nbytes + v.w.nbytes,
                v.out.nbytes)


def passed(read, written=(), doubles=0, floats=0):
    """A pass over arrays of these names; so many passages and operations for each number."""
    def work(v):
        first = getattr(v, read[0])
        more = "residual" in read and v.residual.size > 0
        random = getattr(v, "constant", 0) < 0            # 16 bits each, unless all are the same
        return Work(dims(first) + " + residual" * more + ", random" * random, 0,
                    sum(getattr(v, name).nbytes for name in read),
                    sum(getattr(v, name).nbytes for name in written), first.size * random,
                    doubles * first.size, (floats + more) * first.size)

    return work


def beside(work, v):
    """And another rounding of x from the same read, if there is one."""
    *_, constant, out = v.beside
    if not out.size:
        return work
    return work._replace(shape=work.shape + " + codes of x", written=work.written + out.nbytes,
                         noise=work.noise + out.size * (constant < 0),
                         floats=work.floats + ROUNDING * out.size)


def round_rows(v):
    """Codes, and perhaps others."""
    return beside(passed(["x"], ["out"], floats=ROUNDING)(v), v)


def mixing(v):
    """Σ and reflection: two passages of a mixed row, one of another; and a range, 2 operations."""
    counts, N = np.diff(v.starts), len(v.x)
    mixed = int(counts[counts > 1].sum())
    return Work(dims(v.x), 0, v.x.nbytes, 0, 0, v.x.size // N * (N + mixed), 2 * v.x.size)


def reflect(v):
    """And the mixed rows themselves."""
    return mixing(v)._replace(written=v.out.nbytes)


def reflect_and_round(v):
    """And codes as round_rows has them and perhaps others; mixed rows stay in cache."""
    work = mixing(v)
    return beside(work._replace(shape=f"{work.shape} → codes", written=v.codes.nbytes,
                                noise=v.x.size * (v.constant < 0),
                                floats=work.floats + ROUNDING * v.x.size), v)


WORK = {                                                  # kernel → Work of its named arguments
    "correlate_images": correlate_images,
    "correlate_gated": correlate_gated,
    "wgrad_images": wgrad_images,
    "wgrad_parts": wgrad_parts,
    "add_parts": passed(["parts"], ["total"], doubles=1),
    "dequantize": passed(["codes"], ["out"], doubles=1),
    "gemm_rows": gemm_rows,
    "round_rows": round_rows,
    "round_normalized": passed(["x"], ["out"], floats=ROUNDING + 5),
    "row_ranges": passed(["x"], floats=2),
    "reflect": reflect,
    "reflect_and_round": reflect_and_round,
    "summarize": passed(["x"], doubles=1, floats=2),
    "add": passed(["a", "b"], ["out"], doubles=1, floats=1 + 2),
    "normalize": passed(["x"], ["out"], floats=5),
    "pixel_means": passed(["x"], ["out"], doubles=1, floats=5),
    "gradient_sums": passed(["x", "dy"], ["g"], doubles=2, floats=7),
    "gradient": passed(["dx", "x", "residual"], ["dx"], floats=7 + 2),
}


def dims(array):
    return "·".join(map(str, array.shape))


@lru_cache
def meetings(outputs, taps, offset, side, spread, stride):
    """How many pairs of an output row and a tap meet a row that is there."""
    at = np.arange(outputs)[:, None] * stride + np.arange(taps) - offset
    return int(((at % spread == 0) & (at >= 0) & (at < side * spread)).sum())


def work_of(kernel, arguments):
    """Its Work; of a kernel that WORK does not know, the shapes of its arrays alone."""
    names = kernel.__code__.co_varnames[1:kernel.__code__.co_argcount]        # without the counter
    if kernel.__name__ in WORK:
        return WORK[kernel.__name__](SimpleNamespace(**dict(zip(names, arguments, strict=True))))
    return Work(" ".join(dims(v) for v in arguments if isinstance(v, np.ndarray)))
