"""What this CPU allows a second, by the project's own inner loops and plain passes.

Integer products, float32 products, memory, random numbers, float64: all on all threads, the best of
some runs. `allowed` turns the work of a kernel (work.py) into time. Not a script: roofline_cpu.py,
the next to read, uses it.
"""
import time

import numpy as np
from threadpoolctl import threadpool_limits

from minifqt.kernels.cpu import choice

if choice.numba is not None:
    from numba import njit

    from minifqt.kernels.cpu import noise, team
    from minifqt.kernels.cpu.amx import configure
    from minifqt.kernels.cpu.board import leave, seat, take
    from minifqt.kernels.cpu.choice import ISAS, WORD
    from minifqt.kernels.cpu.tiles import lanes_of, panel

    # No cache on disk: numba would not notice that board.py or tiles.py has changed.
    compiled = njit(nogil=True, error_model="numpy")
else:
    def compiled(function):
        return function

PART = 1 << 13                                            # int64s, 64 kB: a task of a pass
WORDS, TURNS = 64, 1000                                   # of a tile's operands: 6 kB, in L1
NUMBERS = 2048                                            # 16 kB of int32 and float32, in L1


def measure(flags):
    """All a second, by flags.threads threads, the best of some runs.

    products  {instructions: integer multiply-adds}, tiles on operands in L1
    floats    float32 multiply-adds of a large matrix product of NumPy's; other operations are
              taken to be as fast
    memory    [{"bytes", "read", "copy"}], bytes of a working set and bytes moved
    noise     16-bit random numbers;  doubles  int32 → float64, multiplied, → float32, in L1
    """
    T, tasks, times = flags.threads, flags.tasks, flags.times
    found = {"products": {}, "memory": []}
    for name in choice.supported()[:-1]:
        isa = ISAS[name]
        a = np.ones((T, 2 * isa.rows, WORDS, isa.group), isa.dtype)
        b = np.ones((T, 2, WORDS, isa.lanes, isa.group), isa.dtype)
        out = np.empty((T, 2 * isa.rows, 2 * isa.lanes), np.int32)
        done = tasks * TURNS * WORDS * isa.group * out[0].size
        found["products"][name] = rate(done, times, multiply, tasks, *isa.tile, a, b, out)
    found["floats"] = float_rate(flags.side, T, times)
    for size in flags.sizes:
        x, y = np.ones(size // 8, np.int64), np.ones(size // 16, np.int64)
        rounds, sums = max(1, flags.moved // size), np.empty(T, np.int64)
        found["memory"].append({"bytes": size,
                                "read": rate(rounds * size, times, read_parts, x, rounds, sums),
                                "copy": rate(rounds * size, times, copy_parts, x[:len(y)], y,
                                             rounds)})
    key, words = np.arange(2, dtype=np.uint64), np.empty((T, 4 * noise.BLOCKS), np.uint64)
    found["noise"] = rate(tasks * 10 * noise.BLOCKS * 16, times, draw, tasks * 10, key, words)
    x, y = np.ones((T, NUMBERS), np.int32), np.empty((T, NUMBERS), np.float32)
    found["doubles"] = rate(tasks * 100 * NUMBERS, times, scale, tasks * 10, 10, x, y)
    return found


def allowed(work, limits, instructions):
    """(seconds, resource that takes them): the slowest resource alone, all others for nothing."""
    moved = work.read + work.written
    memory = next((row for row in limits["memory"] if moved <= row["bytes"]), limits["memory"][-1])
    a_read = 1 / memory["read"]
    a_write = max(2 / memory["copy"] - a_read, 0)         # what a copy takes beyond its read
    needs = {"integer": work.products / limits["products"][instructions],
             "memory": work.read * a_read + work.written * a_write,
             "noise": work.noise / limits["noise"], "float64": work.doubles / limits["doubles"],
             "float32": work.floats / limits["floats"]}
    resource = max(needs, key=needs.get)
    return needs[resource], resource


def better(one, other):
    """The higher of two measurements of the limits, number by number."""
    if isinstance(one, dict):
        return {key: better(value, other[key]) for key, value in one.items()}
    return [*map(better, one, other)] if isinstance(one, list) else max(one, other)


def rate(amount, times, kernel, *arguments):
    """amount / seconds of the kernel on all threads, the best of so many times."""
    seconds = []
    for _ in range(1 + times):                            # the first compiles
        start = time.perf_counter()
        team.share(kernel, *arguments)
        seconds.append(time.perf_counter() - start)
    return amount / min(seconds[1:])


def float_rate(side, threads, times):
    a = np.ones((side, side), np.float32)
    seconds = []
    with threadpool_limits(threads, user_api="blas"):
        for _ in range(1 + times):
            start = time.perf_counter()
            a @ a
            seconds.append(time.perf_counter() - start)
    return side**3 / min(seconds)


@compiled
def multiply(counter, tasks, rows, vectors, a, b, out):
    """The panels of sums.py, TURNS times over a thread's a (rows, WORDS) and b (2, WORDS, lanes).

    Two tiles of rows by two of lanes.
    """
    me = seat(counter)
    if me < 0:
        return
    line = lanes_of(vectors) * WORD
    while take(counter) < tasks:
        configure(rows, a.shape[1], WORDS)
        panel(rows, vectors, b, (a[me].ctypes.data, WORDS * WORD, a.shape[1], 0, 1),
              (b[me].ctypes.data, WORDS * line, 2), (out[me].ctypes.data, out.shape[2], 0),
              ((TURNS, 0, 0), (1, 0, 0), (WORDS, WORD, line)), ())
    leave(counter, me)


@compiled
def read_parts(counter, x, rounds, sums):
    """Reads x (size,) int64 so many times."""
    me = seat(counter)
    if me < 0:
        return
    parts, total = len(x) // PART, 0
    while True:
        task = take(counter)
        if task >= rounds * parts:
            break
        part = x[task % parts * PART:(task % parts + 1) * PART]
        for i in range(len(part)):
            total += part[i]
    sums[me] = total
    leave(counter, me)


@compiled
def copy_parts(counter, x, y, rounds):
    """y = x + 1, by plain stores as in the kernels; a mere copy would become memcpy."""
    me = seat(counter)
    if me < 0:
        return
    parts = len(x) // PART
    while True:
        task = take(counter)
        if task >= rounds * parts:
            break
        start = task % parts * PART
        source, target = x[start:start + PART], y[start:start + PART]
        for i in range(len(source)):
            target[i] = source[i] + 1
    leave(counter, me)


@compiled
def draw(counter, tasks, key, words):
    """noise.philox_blocks, one full buffer a task."""
    me = seat(counter)
    if me < 0:
        return
    while True:
        task = take(counter)
        if task >= tasks:
            break
        noise.philox_blocks(key, 0, task * noise.BLOCKS, noise.BLOCKS, words[me])
    leave(counter, me)


@compiled
def scale(counter, tasks, turns, x, y):
    """y = float32(x · factor) by way of float64, as sums of products are scaled."""
    me = seat(counter)
    if me < 0:
        return
    source, target = x[me], y[me]
    while take(counter) < tasks:
        for turn in range(turns):
            factor = 1.0 + turn
            for i in range(len(source)):
                target[i] = source[i] * factor
    leave(counter, me)
