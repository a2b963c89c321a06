"""Batch norm's passes by NumPy alone, in blocks that fit a cache: compiled they are cpu/norms.py.

Arrays (N, D) are images of pixels with C channels innermost, vectors (C,) one number a channel. A
pass sees images as rows of a `run`, whole pixels with the vectors tiled beside them: inner loops
are then long, if images are. Float operations are those of norm.py one by one; sums are float64,
block by block.
"""
from functools import cache

import numpy as np

from minifqt.backend import map_blocks, scratch

_BLOCK = 1 << 18                                          # elements that fit a cache
_RUN = 2048                                               # elements: fewer make short inner loops


@cache
def run_length(D: int, C: int) -> int:
    """Numbers of a run: of the fewest whole pixels that are many and divide an image."""
    pixels = D // C
    return C * next(n for n in range(1, pixels + 1)
                    if pixels % n == 0 and (n * C >= _RUN or n == pixels))


@cache
def _pieces(runs, run):
    """In how many equal pieces an image of so many runs is cut, to fit a block."""
    return next(n for n in range(1, runs + 1) if runs % n == 0 and runs // n * run <= _BLOCK or
                n == runs)


def cut(C: int, *arrays: np.ndarray) -> list[np.ndarray]:
    """Images (N, D) in pieces of runs, (N · pieces, runs, run) each; views."""
    N, D = arrays[0].shape
    run = run_length(D, C)
    pieces = N * _pieces(D // run, run)
    return [x.reshape(pieces, -1, run) for x in arrays]


def tiled(vectors: np.ndarray, pieces: np.ndarray) -> np.ndarray:
    """Vectors (k, C) as long as a run."""
    return np.tile(vectors, pieces.shape[2] // vectors.shape[1])


def over(function, pieces: np.ndarray, size: int = _BLOCK) -> list[tuple]:
    """What function(slice) returns for blocks of so many elements, on all threads, as columns."""
    found = map_blocks(function, len(pieces), max(1, size // pieces[0].size))
    return [] if found[0] is None else list(zip(*found, strict=True))


def summarize(x: np.ndarray, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Σ x and Σ x² (2, parts, C) float64 of parts of x (N, D), ranges (2, 1, C) of the whole."""
    x, = cut(C, x)
    return _by_channel(over(lambda part: _summary(x[part]), x, _BLOCK // 2), C)


def add(a: np.ndarray, b: np.ndarray, C: int, out: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """out = a + b, and what `summarize` finds in it.  All (N, D)."""
    a, b, out = cut(C, a, b, out)
    return _by_channel(over(lambda part: _summary(np.add(a[part], b[part], out=out[part])), out,
                            _BLOCK // 2), C)


def _summary(x):
    rows = x.reshape(-1, x.shape[2])
    d, ones = scratch("doubled", rows.shape, "float64"), np.ones(len(rows))
    d[...] = rows
    return (ones @ d, ones @ np.multiply(d, d, out=d),    # BLAS is the fastest to sum
            np.minimum.reduce(rows), np.maximum.reduce(rows))


def _by_channel(found, C):
    s1, s2, low, high = (np.array(some).reshape(len(some), -1, C) for some in found)
    return (np.stack([s1.sum(axis=1), s2.sum(axis=1)]),
            np.stack([low.min(axis=(0, 1)), high.max(axis=(0, 1))])[:, None])


def normalize_block(x, norm, floor, out):
    """max(weight · ((x − mean) · inv_std) + bias, floor).  (…, run); norm (4, run)."""
    mean, inv_std, weight, bias = norm
    v = np.subtract(x, mean, out=out)
    v *= inv_std
    v *= weight
    v += bias
    if floor > -np.inf:
        np.maximum(v, np.full_like(bias, floor), out=v)   # a row: NumPy is slow with one number
    return v


def normalize(x: np.ndarray, vectors: np.ndarray, floor: np.float32, out: np.ndarray) -> None:
    """normalize_block of x (N, D) → out (N, D).  vectors (4, C)."""
    x, out = cut(vectors.shape[1], x, out)
    norm = tiled(vectors, x)

    def block(part):
        normalize_block(x[part], norm, floor, out[part])

    over(block, x)


def gradient_sums(dy: np.ndarray, x: np.ndarray, vectors: np.ndarray, floor: np.float32,
                  g: np.ndarray) -> np.ndarray:
    """g = dy where weight · x̂ + bias is above floor, else 0; Σ g and Σ g · x̂, (2, parts, C).

    dy, x, g (N, D), vectors (4, C)
    """
    C = vectors.shape[1]
    dy, x, g = cut(C, dy, x, g)
    mean, inv_std, weight, bias = tiled(vectors, x)

    def block(part):
        x_hat, some = scratch("x_hat", x[part].shape), g[part]
        np.subtract(x[part], mean, out=x_hat)
        x_hat *= inv_std
        if floor > -np.inf:
            gate = np.multiply(x_hat, weight, out=scratch("gate", some.shape))
            gate += bias
            gate[...] = gate > floor
            np.multiply(dy[part], gate, out=some)
        else:
            some[...] = dy[part]
        x_hat *= some
        return [np.add.reduce(v, axis=(0, 1), dtype="float64") for v in (some, x_hat)]

    found = np.array(over(block, x))
    return found.reshape(*found.shape[:2], -1, C).sum(axis=2)


def gradient(dx: np.ndarray, x: np.ndarray, vectors: np.ndarray, slopes: np.ndarray,
             residual: np.ndarray) -> np.ndarray:
    """dx, which holds g, becomes gain · (g − x̂ · mean_gx − mean_g) (+ residual); its ranges.

    dx, x (N, D), residual (N, D) or empty, slopes (3, C): mean_g, mean_gx, gain → (2, N, parts)
    """
    N = len(x)
    dx, x, *others = cut(vectors.shape[1], dx, x, *([residual] if residual.size else []))
    (mean, inv_std), (mean_g, mean_gx, gain) = tiled(vectors[:2], x), tiled(slopes, x)

    def block(part):
        v, some = scratch("x_hat", x[part].shape), dx[part]
        np.subtract(x[part], mean, out=v)
        v *= inv_std
        v *= mean_gx
        some -= v
        some -= mean_g
        some *= gain
        for other in others:
            some += other[part]
        flat = some.reshape(len(some), -1)
        return flat.min(axis=1), flat.max(axis=1)

    return np.stack([np.concatenate(ends) for ends in over(block, x)]).reshape(2, N, -1)
