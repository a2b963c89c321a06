"""The arithmetic in its plainest form: what every fast kernel must equal. Read this first.

It refuses to be fast. Integer products are int64, the four sums of a product with zeros are written
out, and each quantizer is a few lines. The fast versions: blas.py (products), rounding.py
(quantizers).
"""
from functools import cache

import numpy as np

from minifqt.backend import array_module
from minifqt.qtensor import QTensor

UNIT = 65536                                              # a code step in fixed point: 16-bit noise


# ---- products ------------------------------------------------------------------------------------

def epilogue(ab, b1, a1, n, scale, zero_a, zero_b):
    """float32 of scale · Σ(a − zero_a)(b − zero_b), from Σab, Σ1b, Σa1, Σ11, all exact in float64.

    One order on every device, rounded once: a zero can be 4·10⁷ (a row of 1000 ± 0.003) and its
    terms nearly cancel.
    """
    y = ab - zero_a * b1
    y = y - zero_b * a1
    y = y + (zero_a * zero_b) * n
    return (y * scale).astype("float32")


def expand(sums, a, b, turn_a=lambda v: v, turn_b=lambda v: v):
    """A product of QTensors: bilinear `sums` of floats, or four of integer codes and the epilogue.

    turn_*  moves a scale's axes to where they stand in the result
    """
    if not (a.is_integer and b.is_integer):
        return sums(a.codes, b.codes)
    xp = array_module(a.codes)
    a_codes, b_codes = a.codes.astype("int64"), b.codes.astype("int64")
    ones_a, ones_b = xp.ones_like(a_codes), xp.ones_like(b_codes)
    scale = turn_a(a.scale.astype("float64")) * turn_b(b.scale.astype("float64"))
    zero_a, zero_b = turn_a(a.zero.astype("float64")), turn_b(b.zero.astype("float64"))
    return epilogue(sums(a_codes, b_codes).astype("float64"), sums(ones_a, b_codes),
                    sums(a_codes, ones_b), sums(ones_a, ones_b), scale, zero_a, zero_b)


def first_to_last(v):
    """(K, 1, …, 1) ↔ (1, …, 1, K): an output channel's scale in a weight and in an output."""
    return v.swapaxes(0, -1)


def matmul(a, b):
    """a bᵀ.  a (M, K), b (J, K) → (M, J), contracts K."""
    return expand(lambda a, b: a @ b.T, a, b, turn_b=first_to_last)


def conv_fprop(x, w, stride, padding):
    """x (N, H, W, C), w (K, R, S, C) → (N, P, Q, K), contracts R, S, C.

    Padding is a real zero: absent from all four sums.
    """
    P, Q = output_size(x.shape[1:3], w.shape[1:3], stride, padding)

    def sums(x, w):
        return sum(taps(pad(x, padding), r, s, P, Q, stride) @ w[:, r, s].T
                   for r, s in np.ndindex(w.shape[1:3]))

    return expand(sums, x, w, turn_b=first_to_last)


def conv_wgrad(g, x, kernel, stride, padding):
    """g (N, P, Q, K), x (N, H, W, C) → (K, R, S, C), contracts N, P, Q."""
    (_, P, Q, K), C = g.shape, x.shape[3]

    def sums(g, x):
        columns = [taps(pad(x, padding), r, s, P, Q, stride).reshape(-1, C)
                   for r, s in np.ndindex(*kernel)]
        return array_module(g).stack(
            [g.reshape(-1, K).T @ c for c in columns], axis=1).reshape(K, *kernel, C)

    return expand(sums, g, x, turn_a=first_to_last)


def conv_dgrad(g, w, size, stride, padding):
    """g (N, P, Q, K), w (K, R, S, C) → (N, H, W, C), contracts R, S, K.

    Each product goes back to where its tap came from.
    """
    (N, P, Q, _), (_, R, S, C) = g.shape, w.shape

    def sums(g, w):
        dx = array_module(g).zeros((N, size[0] + 2 * padding, size[1] + 2 * padding, C), g.dtype)
        for r, s in np.ndindex(R, S):
            taps(dx, r, s, P, Q, stride)[...] += g @ w[:, r, s]
        return dx[:, padding:padding + size[0], padding:padding + size[1]]

    return expand(sums, g, w)


def pad(x, padding):
    return array_module(x).pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))


def taps(x, r, s, P, Q, stride):
    """View of the pixels that tap (r, s) reads.  (N, P, Q, C)."""
    return x[:, r:r + stride * (P - 1) + 1:stride, s:s + stride * (Q - 1) + 1:stride]


@cache
def output_size(size, kernel, stride, padding, name="image"):
    """(P, Q) of a convolution; ValueError where the kernel does not fit into the padded image."""
    if stride < 1 or padding < 0:
        raise ValueError(f"{name}: stride {stride}, padding {padding}; expected stride ≥ 1 and "
                         "padding ≥ 0.")
    if any(side + 2 * padding < width for side, width in zip(size, kernel, strict=True)):
        raise ValueError(f"{name}: a kernel of {tuple(kernel)} does not fit into an image of "
                         f"{tuple(size)} with padding {padding}.")
    return tuple((side + 2 * padding - width) // stride + 1
                 for side, width in zip(size, kernel, strict=True))


# ---- rounding and quantizers ---------------------------------------------------------------------

def grid(low, high, bins):
    """scale and inv of `bins` steps low .. high: inv turns x − low into fixed point, 65536 a step.

    A constant row is exact: inv 0, so codes 0, with scale |low| (1 for zeros).
    """
    xp = array_module(low)
    flat = high == low
    scale = xp.where(flat, xp.where(low == 0, 1, abs(low)), (high - low) / bins)
    return scale, xp.where(flat, 0, UNIT * bins / xp.where(flat, 1, high - low))


def fixed_point(x, low, inv):
    """x in 1/65536 of a step above low: int32 ≤ 65536 · bins + 1 < 2²⁴, so exact in float32 too.

    Outside a range that was given from outside, x is limited: below here, above in round_codes.
    """
    return array_module(x).rint((x - low) * inv).clip(0, 2**24).astype("int32")


def round_codes(fixed, h, bins):
    """The one rounding: fixed + noise, cut to steps. The minimum catches rint's + 1 at the top."""
    return (array_module(fixed).minimum(fixed + h, UNIT * bins + UNIT - 1) >> 16).astype("uint8")


def psq(x, h, bins):
    """Per-sample quantizer: one scale and one zero for each row of x (N, D).

    `x.reshape(1, -1)` makes it per-tensor (PTQ).
    x     (N, D) float32; a range outside 2⁻¹⁰⁰ .. 2¹²⁰ is scaled by the caller
    h     (N, D) 16-bit noise, uint16; 32768 everywhere rounds to nearest
    bins  2**bits − 1 steps from a row's minimum to its maximum
    E, Var  unbiased but for float32 rounding and rint (2⁻¹⁴ of a step at 8 bits);
            scale² · p · (1 − p) per element, p the fractional part of (x − low) / scale
    Source: arXiv 2010.14298, the per-sample quantizer. Departs: a constant row is exact, not 0/0.
    """
    low, high = x.min(axis=1, keepdims=True), x.max(axis=1, keepdims=True)    # (N, 1)
    scale, inv = grid(low, high, bins)
    return QTensor(round_codes(fixed_point(x, low, inv), h, bins), scale, -low / scale)


def integer_zero(low, high, bins):
    """(scale, zero) of the finest clip-free grid with integer zero code, for ranges containing 0.

    The scale max(high / (B − z), −low / z) falls and rises in z, so the best integer is a neighbour
    of −low · B / (high − low).
    Departs from the authors' code, which floors it and divides by 0 where −low is below one step.
    """
    xp = array_module(low)
    best = -low * (bins / xp.where(high == low, 1, high - low))

    def scale_at(z):
        return xp.maximum(xp.where(high > 0, high / xp.maximum(bins - z, 1), 0),
                          xp.where(low < 0, -low / xp.maximum(z, 1), 0))

    least = xp.where(low < 0, 1, 0).astype(low.dtype)
    most = xp.where(high > 0, bins - 1, bins).astype(low.dtype)
    below = xp.clip(xp.floor(best), least, xp.where(low < 0, most, 0))
    above = xp.clip(xp.ceil(best), least, xp.where(low < 0, most, 0))
    zero = xp.where(scale_at(below) <= scale_at(above), below, above)
    scale = scale_at(zero)
    return xp.where(scale == 0, 1, scale), zero


def anchored_fixed(x, shift, inv, code, lowest, highest):
    """(x − shift) / scale + code in 1/65536 of a step, clipped to lowest .. highest.  int32.

    For integer zeros and weights, where `psq` above has a real zero. Clipped before the noise is
    added: with shift 0 and an integer code of zero the number 0 is exact, and no code wraps.
    """
    xp = array_module(x)
    fixed = xp.rint((x - shift) * inv) + UNIT * code
    return xp.clip(fixed, UNIT * lowest, UNIT * highest).astype("int32")


def anchored_codes(fixed, h):
    """The one rounding again: fixed + noise, cut to whole steps.  int32."""
    return (fixed + h) >> 16


# ---- block Householder ---------------------------------------------------------------------------

def householder(n):
    """The n × n reflection Q = I − 2vvᵀ/vᵀv, v = e₁ − 1/√n.

    Symmetric, its own inverse, first row and column 1/√n.
    """
    v = np.eye(n)[0] - 1 / np.sqrt(n)
    return np.eye(n) - (2 / max(v @ v, 1e-300)) * np.outer(v, v)


def bhq_transform(ranges):
    """The dense T (N, N) of BHQ for rows of these ranges (float64).

    Sort, group, scale, reflect, one group after another. Row r of T·x is the r-th mixed row: groups
    in order, a group's leader first. Rows with the same range keep their order.
    ranges  (N,), N ≥ 3, none 0: BHQ leaves constant rows alone, each rounded by itself
    Source: arXiv 2010.14298, the block Householder quantizer; grouping and scales as in the
    authors' code.
    """
    N = len(ranges)
    order = np.argsort(-ranges, kind="stable")
    v = ranges[order]
    # k small rows; there is such a k for N ≥ 3 and ranges above 0.
    k = next(k for k in range(1, N) if k * v[N - k - 1] > v[:N - k].sum())
    leaders = N - k
    ends = np.rint(np.cumsum(v[:leaders]) * k / v[:leaders].sum()).astype(int)
    T, row, start = np.zeros((N, N)), 0, 0
    for leader, end in enumerate(ends):
        members = [leader, *range(leaders + start, leaders + end)]
        n, start = len(members), end
        s = np.ones(n)
        if n > 1:
            Q = householder(n)
            small = max(v[members[1]], 1e-30 * v[leader])
            s[:] = (small * abs(Q).max() / (n - 1)) ** (-1 / 3)
            s[0] = (v[leader] / np.sqrt(n)) ** (-1 / 3)
            T[row:row + n, order[members]] = Q * s
        else:
            T[row, order[leader]] = 1
        row += n
    return T
