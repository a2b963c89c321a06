"""Noise, the one rounding, and the ranges it needs, compiled: one read of the input each.

Float operations are those of reference.py one by one, each rounded once (nothing is contracted),
and the noise is NumPy's Philox, made where it is used: the codes are the same bits. Next: norms.py.
"""
import numpy as np

from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.team import leave, seat, take
from minifqt.kernels.cpu.tiles import float_of, ordered, rint, steps
from minifqt.rng import INCREMENTS, MULTIPLIERS

CHUNK = 2048                                              # elements from one buffer of noise
BLOCKS = CHUNK // 16 + 1                                  # of Philox, 16 values each
M0, M1 = (np.uint64(v) for v in MULTIPLIERS)
M0_LOW, M1_LOW = (np.uint64(v & 0xFFFFFFFF) for v in MULTIPLIERS)
M0_HIGH, M1_HIGH = (np.uint64(v >> 32) for v in MULTIPLIERS)
W0, W1 = (np.uint64(v) for v in INCREMENTS)
NOTHING_YET = np.int32(2**31 - 1), np.int32(-2**31)       # the range of no number, as `widen` takes it


@compiled
def high_word(a, low, high):
    """The upper 64 bits of a · (2³² · high + low), by 32-bit multiplications, which vectorize."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a, b = a & mask, a >> half
    t = a * high + (a * low >> half)
    return b * high + (t >> half) + (b * low + (t & mask) >> half)


@compiled
def philox_round(c0, c1, c2, c3, k0, k1):
    """One round on four words."""
    return (high_word(c2, M1_LOW, M1_HIGH) ^ c1 ^ k0, c2 * M1,
            high_word(c0, M0_LOW, M0_HIGH) ^ c3 ^ k1, c0 * M0)


@compiled
def philox_blocks(key, step, first, count, state, words):
    """words[:4 · count] = blocks first .. of rng.philox; count ≤ BLOCKS.  state (4, BLOCKS).

    Round by round for all blocks side by side: faster than a core's one 64-bit multiplier.
    """
    k0, k1 = key[0], key[1]
    c0, c1, c2, c3 = state[0], state[1], state[2], state[3]
    for i in range(count):
        c0[i], c1[i], c2[i], c3[i] = first + i + 1, step, 0, 0
    for _ in range(5):                                    # two rounds a turn: half the traffic
        for i in range(count):
            d0, d1, d2, d3 = philox_round(c0[i], c1[i], c2[i], c3[i], k0, k1)
            c0[i], c1[i], c2[i], c3[i] = philox_round(d0, d1, d2, d3, k0 + W0, k1 + W1)
        k0 += W0 + W0
        k1 += W1 + W1
    for i in range(count):
        words[4 * i], words[4 * i + 1] = c0[i], c1[i]
        words[4 * i + 2], words[4 * i + 3] = c2[i], c3[i]


@compiled
def noise_of(key, step, first, count, constant, state, words):
    """The 16-bit noise of elements first .. first + count − 1, in a buffer; constant −1: random."""
    noise = words.view(np.uint16)
    if constant >= 0:
        noise[:] = constant
        return noise[:count]
    skip = first % 16
    philox_blocks(key, step, first // 16, (skip + count + 15) // 16, state, words)
    return noise[skip:skip + count]


@compiled
def round_run(x, noise, shift, inv, code, lowest, highest, out):
    """(clip(rint((x − shift) · inv) + code, lowest, highest) + noise) >> 16, in fixed point."""
    for i in range(len(x)):
        fixed = rint((x[i] - shift) * inv) + code
        fixed = lowest if fixed < lowest else fixed
        fixed = highest if fixed > highest else fixed
        out[i] = steps(fixed, noise[i])


@compiled
def round_rows(counter, x, shift, inv, code, lowest, highest, key, step, constant, out):
    """Codes of x (N, D) with one shift, inv and code a row; noise of flat elements."""
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    parts = (D + CHUNK - 1) // CHUNK
    state, words = np.empty((4, BLOCKS), np.uint64), np.empty(4 * BLOCKS, np.uint64)
    while True:
        task = take(counter)
        if task >= N * parts:
            break
        n, start = task // parts, task % parts * CHUNK
        stop = min(D, start + CHUNK)
        noise = noise_of(key, step, n * D + start, stop - start, constant, state, words)
        round_run(x[n, start:stop], noise, shift[n], inv[n], code[n], lowest, highest,
                  out[n, start:stop])
    leave(counter)


@compiled
def round_normalized(counter, x, norm, floor, shift, inv, code, lowest, highest, key, step,
                     constant, out):
    """round_rows of max(normalize_run(x), floor), all rows with the same shift, inv and code."""
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    run = norm.shape[1]
    y, state = np.empty(run, np.float32), np.empty((4, BLOCKS), np.uint64)
    words = np.empty(4 * BLOCKS, np.uint64)
    while True:
        n = take(counter)
        if n >= N:
            break
        for start in range(0, D, run):
            stop = min(D, start + run)
            normalize_run(x[n, start:stop], norm, floor, y)
            noise = noise_of(key, step, n * D + start, stop - start, constant, state, words)
            round_run(y[:stop - start], noise, shift, inv, code, lowest, highest,
                      out[n, start:stop])
    leave(counter)


@compiled
def widen(row, low, high):
    """low .. high, as `ordered` integers, widened to hold a row's numbers.

    By integers in the same order: a reduction of floats would not vectorize, for NaN's sake.
    """
    low, high = np.int32(low), np.int32(high)
    for i in range(len(row)):
        key = ordered(row[i])
        low = key if key < low else low
        high = key if key > high else high
    return low, high


@compiled
def range_of(low, high):
    """The two numbers that `widen` found, NaN twice where one was not finite."""
    if high >= 0x7F800000 or low <= -0x7F800001:          # an infinity, or NaN beyond it
        return np.float32(np.nan), np.float32(np.nan)
    return float_of(low), float_of(high)


@compiled
def row_range(row):
    """Minimum and maximum of a row, NaN twice where a number is not finite."""
    low, high = widen(row, *NOTHING_YET)
    return range_of(low, high)


@compiled
def row_ranges(counter, x, low, high):
    """row_range of each row of x (N, D) in parts: low, high (N, parts); no part is empty."""
    me = seat(counter)
    if me < 0:
        return
    (N, D), parts = x.shape, low.shape[1]
    while True:
        task = take(counter)
        if task >= N * parts:
            break
        n, part = task // parts, task % parts
        start = min(part * D // parts, D - 1)
        low[n, part], high[n, part] = row_range(x[n, start:max(start + 1, (part + 1) * D // parts)])
    leave(counter)


@compiled
def normalize_run(x, norm, floor, out):
    """max(weight · ((x − mean) · inv_std) + bias, floor).  norm (4, run): these four vectors."""
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    for i in range(len(x)):
        y = weight[i] * ((x[i] - mean[i]) * inv_std[i]) + bias[i]
        out[i] = floor if y < floor else y                # NaN stays
