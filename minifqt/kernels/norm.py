"""Sums over batch and pixels, and batch normalisation's two passes each way.

Sums are float64 (float32 partial sums of 16 fixed rows), in an order cut by shape, rounded once:
the same for any thread count.
"""
import numpy as np

from minifqt.backend import Array, array_module, map_blocks

_BLOCK = 1 << 16                                          # elements


def channel_sum(x: Array) -> Array:
    """Σ over all axes but the last.  (…, C) → (C,) float64."""
    if array_module(x) is not np:
        return x.sum(axis=tuple(range(x.ndim - 1)), dtype="float64")
    rows = _wide(x)
    return sum(map_blocks(lambda part: _partial(rows[part], x.shape[-1]), len(rows), _rows(rows)))


def statistics(x: Array) -> tuple[Array, Array]:
    """Mean and biased variance of each channel, two passes.  (…, C) → (C,), (C,) in x's dtype."""
    xp, C, count = array_module(x), x.shape[-1], x.size // x.shape[-1]
    mean = (channel_sum(x) / count).astype(x.dtype)
    if xp is not np:
        return mean, (channel_sum((x - mean) ** 2) / count).astype(x.dtype)
    rows, wide_mean = _wide(x), _tile(mean, x)

    def squares(part):
        v = rows[part] - wide_mean
        v *= v
        return _partial(v, C)

    return mean, (sum(map_blocks(squares, len(rows), _rows(rows))) / count).astype(x.dtype)


def normalize(x: Array, mean: Array, inv_std: Array, weight: Array,
              bias: Array) -> tuple[Array, Array]:
    """x̂ = (x − mean) · inv_std and y = weight · x̂ + bias.  x (…, C), the rest (C,)."""
    if array_module(x) is not np:
        normal = (x - mean) * inv_std
        return normal, weight * normal + bias
    normal, y = np.empty_like(x, order="C"), np.empty_like(x, order="C")
    rows, out_normal, out = _wide(x), _wide(normal), _wide(y)
    mean, inv_std, weight, bias = (_tile(v, x) for v in (mean, inv_std, weight, bias))

    def block(part):
        v = np.subtract(rows[part], mean, out=out_normal[part])
        v *= inv_std
        np.multiply(v, weight, out=out[part])
        out[part] += bias

    map_blocks(block, len(rows), _rows(rows))
    return normal, y


def backward(dy: Array, normal: Array, inv_std: Array, weight: Array) -> tuple[Array, Array, Array]:
    """dx, dweight, dbias of y = weight · x̂ + bias where x̂ came from the batch's own statistics.

    dx = weight · inv_std · (dy − mean(dy) − x̂ · mean(dy · x̂)); Ioffe & Szegedy 2015, section 3.
    """
    xp, C, count = array_module(dy), dy.shape[-1], dy.size // dy.shape[-1]
    dbias = channel_sum(dy)
    if xp is not np:
        dweight = channel_sum(dy * normal)
        dx = weight * inv_std * (dy - (dbias / count).astype(dy.dtype)
                                 - normal * (dweight / count).astype(dy.dtype))
        return dx, dweight.astype(dy.dtype), dbias.astype(dy.dtype)
    rows, hats, dx = _wide(dy), _wide(normal), np.empty_like(dy, order="C")
    out, size = _wide(dx), _rows(rows)
    dweight = sum(map_blocks(lambda part: _partial(rows[part] * hats[part], C), len(rows), size))
    mean_dy, mean_dy_hat, gain = (_tile(v.astype(dy.dtype), dy)
                                  for v in (dbias / count, dweight / count, weight * inv_std))

    def block(part):
        v = np.multiply(hats[part], mean_dy_hat, out=out[part])
        np.subtract(rows[part], v, out=v)
        v -= mean_dy
        v *= gain

    map_blocks(block, len(rows), size)
    return dx, dweight.astype(dy.dtype), dbias.astype(dy.dtype)


def _wide(x):
    """(N, H, W, C) as rows of W · C numbers, a view of a C-ordered x.

    Long runs, so that per-channel factors repeat inside them.
    """
    return x.reshape(-1, x.shape[-2] * x.shape[-1]) if x.ndim == 4 else x.reshape(-1, x.shape[-1])


def _tile(v, x):
    return np.tile(v, x.shape[2]) if x.ndim == 4 else v


def _rows(rows):
    return max(16, _BLOCK // rows.shape[1] // 16 * 16)


def _partial(rows, C):
    """Σ of each channel over rows (m, L · C): float32 over 16 equidistant rows, then float64."""
    whole = len(rows) // 16 * 16
    first = rows[:whole].reshape(16, -1).sum(axis=0).reshape(-1, C).sum(axis=0, dtype="float64")
    return first + rows[whole:].reshape(-1, C).sum(axis=0, dtype="float64")
