"""The one rounding and the ranges it needs, compiled: one read of the input each.

Float operations are those of reference.py one by one, each rounded once (nothing is contracted),
with the noise of noise.py: the codes are the same bits. Next: norms.py.
"""
import numpy as np

from minifqt.kernels.cpu.board import leave, seat, take
from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.noise import BLOCKS, CHUNK, noise_of
from minifqt.kernels.cpu.tiles import apart, fetch, float_of, ordered, rint, steps

NOTHING_BESIDE = (np.zeros((3, 1), np.float32), *np.zeros(2, np.float32),
                  np.frombuffer(bytes(16), np.uint64), 0, -1, np.empty(0, np.uint8))
# The range of no number, as `widen` takes it.
NOTHING_YET = np.int32(2**31 - 1), np.int32(-2**31)


@compiled
def round_run(x, noise, shift, inv, code, lowest, highest, out):
    """(clip(rint((x − shift) · inv) + code, lowest, highest) + noise) >> 16, in fixed point.

    code and the limits are integers: clipped first, rounded and converted in one, it is the same.
    """
    apart()
    least, most, whole = lowest - code, highest - code, np.int32(code)
    for i in range(len(x)):
        fixed = (x[i] - shift) * inv
        fixed = least if fixed < least else fixed
        fixed = most if fixed > most else fixed
        out[i] = steps(rint(fixed), whole, noise[i])


@compiled
def round_beside(x, first, beside, words):
    """Another rounding of numbers x, elements first .. of their array, if one is asked for.

    beside  maps .. constant as round_rows takes them, of one row; codes, flat or empty
    """
    maps, lowest, highest, key, step, constant, out = beside
    if out.size:
        noise = noise_of(key, step, first, len(x), constant, words)
        round_run(x, noise, maps[0, 0], maps[1, 0], maps[2, 0], lowest, highest,
                  out[first:first + len(x)])


@compiled
def round_rows(counter, x, beside, maps, lowest, highest, key, step, constant, out):
    """Codes of x (N, D); maps (3, N): shift, inv and code of each row; noise of flat elements."""
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    parts = (D + CHUNK - 1) // CHUNK
    words = np.empty(4 * BLOCKS, np.uint64)
    while True:
        task = take(counter)
        if task >= N * parts:
            break
        n, start = task // parts, task % parts * CHUNK
        stop = min(D, start + CHUNK)
        round_beside(x[n, start:stop], n * D + start, beside, words)
        noise = noise_of(key, step, n * D + start, stop - start, constant, words)
        round_run(x[n, start:stop], noise, maps[0, n], maps[1, n], maps[2, n], lowest, highest,
                  out[n, start:stop])
    leave(counter, me)


@compiled
def round_normalized(counter, x, norm, floor, maps, lowest, highest, key, step, constant, out):
    """round_rows of max(normalize_run(x), floor), all rows with the same shift, inv and code."""
    me = seat(counter)
    if me < 0:
        return
    N, D = x.shape
    run = norm.shape[1]
    y, words = np.empty(run, np.float32), np.empty(4 * BLOCKS, np.uint64)
    while True:
        n = take(counter)
        if n >= N:
            break
        for start in range(0, D, run):
            stop = min(D, start + run)
            fetch(x[n, stop + run:stop + 2 * run])
            normalize_run(x[n, start:stop], norm, floor, y)
            noise = noise_of(key, step, n * D + start, stop - start, constant, words)
            round_run(y[:stop - start], noise, maps[0, 0], maps[1, 0], maps[2, 0], lowest, highest,
                      out[n, start:stop])
    leave(counter, me)


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
    leave(counter, me)


@compiled
def normalize_run(x, norm, floor, out):
    """max(weight · ((x − mean) · inv_std) + bias, floor).  norm (4, run): these four vectors."""
    apart()
    mean, inv_std, weight, bias = norm[0], norm[1], norm[2], norm[3]
    for i in range(len(x)):
        y = weight[i] * ((x[i] - mean[i]) * inv_std[i]) + bias[i]
        out[i] = floor if y < floor else y                # NaN stays
