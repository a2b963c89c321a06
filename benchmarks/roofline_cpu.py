"""What this CPU allows and what the compiled kernels of a training step take of it.

First the limits, by the project's own inner loops and plain passes: integer products, memory,
random numbers, float64. Then the steps of a network, each kernel timed from outside; beside it the
time that the limits allow if all but the slowest resource cost nothing. Next: scaling.py.
"""
import argparse
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import machine
import numpy as np
import step as steps
from threadpoolctl import threadpool_limits

sys.path.insert(0, str(machine.ROOT))                     # where minifqt, models and data are
import minifqt
from minifqt.kernels.cpu import choice
from models import resnet_cifar

if choice.numba is not None:
    from numba import njit

    from minifqt.kernels.cpu import codes, products, team
    from minifqt.kernels.cpu.choice import ISAS, WORD
    from minifqt.kernels.cpu.team import leave, seat, take
    from minifqt.kernels.cpu.tiles import tile

    # No cache on disk: numba would not notice that team.py or tiles.py has changed.
    compiled = njit(nogil=True, error_model="numpy")
else:
    def compiled(function):
        return function

MB, PART = 1 << 20, 1 << 13                               # PART int64s, 64 kB: a task of a pass
WORDS, TURNS = 64, 1000                                   # of a tile's operands: 6 kB, in L1
NUMBERS = 2048                                            # 16 kB of int32 and float32, in L1
SMALL = 0.003                                             # of the kernels' time: not printed alone
SETTINGS = {
    "full": {"batch": 128, "repeats": 15, "warmup": 2, "tasks": 150, "side": 2048,
             "sizes": (8 * MB, 32 * MB, 256 * MB), "moved": 1024 * MB, "times": 20},
    "quick": {"batch": 4, "repeats": 1, "warmup": 0, "tasks": 2, "side": 64,
              "sizes": (MB // 2, MB), "moved": 2 * MB, "times": 1}}


def parser():
    text = argparse.ArgumentParser(description=__doc__)
    add = text.add_argument
    add("--model", choices=resnet_cifar.MODELS, default="resnet20")
    add("--recipe", default="bhq8", help="%(default)s")
    add("--batch", type=int, help="images in a step; 128, with --quick 4")
    add("--repeats", type=int, help="timed steps; 15, with --quick 1")
    add("--warmup", type=int, help="rounds that are not timed; 2, with --quick none")
    add("--threads", type=int, default=2, help="for limits and steps; %(default)s")
    add("--seed", type=int, default=0, help="of weights, images and rounding; %(default)s")
    add("--instructions", choices=steps.INSTRUCTIONS[:-1], default="auto",
        help="of the integer products; %(default)s, the fastest that this CPU has")
    add("--plain", action="store_true", help="the network as it is, not fused")
    add("--quick", action="store_true", help="tiny: shows that the script runs, measures nothing")
    add("--out", default="benchmarks/results", help="folder of the JSON file; %(default)s")
    return text


def main(arguments=None):
    flags = parser().parse_args(arguments)
    for key, value in SETTINGS["quick" if flags.quick else "full"].items():
        if getattr(flags, key, None) is None:
            setattr(flags, key, value)
    if min(flags.batch - 1, flags.repeats, flags.threads, flags.warmup + 1) < 1:
        raise ValueError("--batch must be at least 2, --repeats and --threads 1, --warmup 0.")
    choice.set_instructions(flags.instructions)
    if choice.isa() is None:
        raise RuntimeError(f"no kernel here is compiled, so there is none to look at: "
                           f"{choice.describe()}.")
    minifqt.set_threads(flags.threads)
    result = machine.facts("roofline", flags.seed, flags.threads)
    result |= {key: getattr(flags, key)
               for key in ("model", "recipe", "batch", "repeats", "warmup", "quick")}
    result |= {"instructions": choice.instructions(), "kernels": choice.describe(),
               "fused": not flags.plain}
    before, measured = limits(flags), steps_of(flags)
    result["limits"] = better(before, limits(flags))      # others can lower a limit, not raise it
    result |= summary(*measured, result["limits"])
    print(table(result))
    print(f"written: {steps.write(result, Path(flags.out))}")


# ---- what a kernel must do -----------------------------------------------------------------------


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
    (H, W, C), (R, S) = v.a.shape[1:], v.taps
    met = (meetings(P, R, v.offset[0], H, v.spread, v.stride)
           * meetings(Q, S, v.offset[1], W, v.spread, v.stride))
    shape = f"{dims(v.a)} → {P}·{Q}·{K}, {R}×{S}"
    shape += f", stride {v.stride}" if v.stride > 1 else ""
    shape += f", spread {v.spread}" if v.spread > 1 else ""
    work = Work(shape, 0, v.a.nbytes + v.b.nbytes, v.y.nbytes)
    return (work._replace(floats=N * met * C * K) if v.b.dtype == np.float32 else
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

    Operations as in gradient_sums.
    """
    work, counts = correlation(v), np.diff(v.starts)
    mixed = int(counts[counts > 1].sum())
    unmixed = v.y.size // len(v.y) * mixed
    return work._replace(shape=work.shape + ", gated" + (", mixed" if mixed else ""),
                         read=work.read + v.x.nbytes,
                         doubles=work.doubles + 3 * v.y.size + unmixed,
                         floats=work.floats + 7 * v.y.size)


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
    """Of packed operands, whole tiles: padding counts too, for the arguments do not tell."""
    return Work(f"{dims(v.a)} by {dims(v.b)}", v.a.size * v.out.shape[1], v.a.nbytes + v.b.nbytes,
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


def reflect(v):
    """Σ and reflection are two passages of a mixed row, one of another; a range 2 operations."""
    counts = np.diff(v.starts)
    mixed = int(counts[counts > 1].sum())
    return Work(dims(v.x), 0, v.x.nbytes, v.out.nbytes, 0,
                v.x.size // len(v.x) * (len(v.x) + mixed), 2 * v.x.size * (v.ranges.size > 0))


WORK = {                                                  # kernel → Work of its named arguments
    "correlate_images": correlate_images,
    "correlate_gated": correlate_gated,
    "wgrad_images": wgrad_images,
    "wgrad_parts": wgrad_parts,
    "add_parts": passed(["parts"], ["total"], doubles=1),
    "dequantize": passed(["codes"], ["out"], doubles=1),
    "gemm_rows": gemm_rows,
    "round_rows": passed(["x"], ["out"], floats=9),
    "round_normalized": passed(["x"], ["out"], floats=9 + 5),
    "row_ranges": passed(["x"], floats=2),
    "reflect": reflect,
    "summarize": passed(["x"], doubles=1, floats=2),
    "add": passed(["a", "b"], ["out"], doubles=1, floats=1 + 2),
    "normalize": passed(["x"], ["out"], floats=5),
    "gradient_sums": passed(["dy", "x"], doubles=2, floats=7),
    "gradient": passed(["dy", "x", "residual"], ["dx"], floats=10 + 2),
}


def dims(array):
    return "·".join(map(str, array.shape))


@lru_cache
def meetings(outputs, taps, offset, side, spread, stride):
    """How many pairs of an output row and a tap meet a row that is there."""
    at = np.arange(outputs)[:, None] * stride + np.arange(taps) - offset
    return int(((at % spread == 0) & (at >= 0) & (at < side * spread)).sum())


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


# ---- the machine's limits ------------------------------------------------------------------------


def limits(flags):
    """All a second, by flags.threads threads, the best of some runs.

    products  {instructions: integer multiply-adds}, the tile on operands in L1
    floats    float32 multiply-adds of a large matrix product of NumPy's; other operations are
              taken to be as fast
    memory    [{"bytes", "read", "copy"}], bytes of a working set and bytes moved
    noise     16-bit random numbers;  doubles  int32 → float64, multiplied, → float32, in L1
    """
    T, tasks, times = flags.threads, flags.tasks, flags.times
    found = {"products": {}, "memory": []}
    for name in choice.supported()[:-1]:
        isa, rows = ISAS[name], products.ROWS
        a = np.ones((T, len(rows), WORDS, isa.group), isa.dtype)
        b = np.ones((T, WORDS, isa.lanes, isa.group), isa.dtype)
        out = np.empty((T, len(rows), isa.lanes), np.int32)
        done = tasks * TURNS * WORDS * isa.group * out[0].size
        found["products"][name] = rate(done, times, multiply, tasks, rows, (0,) * isa.lanes, a, b,
                                       out)
    found["floats"] = float_rate(flags.side, T, times)
    for size in flags.sizes:
        x, y = np.ones(size // 8, np.int64), np.ones(size // 16, np.int64)
        rounds, sums = max(1, flags.moved // size), np.empty(T, np.int64)
        found["memory"].append({"bytes": size,
                                "read": rate(rounds * size, times, read_parts, x, rounds, sums),
                                "copy": rate(rounds * size, times, copy_parts, x[:len(y)], y,
                                             rounds)})
    state = np.empty((T, 4, codes.BLOCKS), np.uint64)
    key, words = np.arange(2, dtype=np.uint64), np.empty((T, 4 * codes.BLOCKS), np.uint64)
    found["noise"] = rate(tasks * 10 * codes.BLOCKS * 16, times, draw, tasks * 10, key, state,
                          words)
    x, y = np.ones((T, NUMBERS), np.int32), np.empty((T, NUMBERS), np.float32)
    found["doubles"] = rate(tasks * 100 * NUMBERS, times, scale, tasks * 10, 10, x, y)
    return found


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
def multiply(counter, tasks, rows, lanes, a, b, out):
    """The tile of products.py, TURNS times over a thread's a (rows, WORDS) and b (WORDS, lanes)."""
    me = seat(counter)
    if me < 0:
        return
    left, right, sums = a[me].ctypes.data, b[me].ctypes.data, out[me].ctypes.data
    while take(counter) < tasks:
        tile(rows, lanes, b, left, WORDS * WORD, right, sums, len(lanes),
             ((TURNS, 0, 0), (1, 0, 0), (WORDS, WORD, len(lanes) * WORD)), ())
    leave(counter)


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
    leave(counter)


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
    leave(counter)


@compiled
def draw(counter, tasks, key, state, words):
    """codes.philox_blocks, one full buffer a task."""
    me = seat(counter)
    if me < 0:
        return
    while True:
        task = take(counter)
        if task >= tasks:
            break
        codes.philox_blocks(key, 0, task * codes.BLOCKS, codes.BLOCKS, state[me], words[me])
    leave(counter)


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
    leave(counter)


# ---- the kernels of a step -----------------------------------------------------------------------


def steps_of(flags):
    """(calls of each step, seconds of each step without instruments, and with them)."""
    rng = np.random.default_rng(flags.seed)
    x = rng.standard_normal((flags.batch, 32, 32, 3), "float32")              # (N, H, W, C)
    labels = rng.integers(0, steps.CLASSES, flags.batch)
    step = steps.minifqt_step(flags.model, flags.recipe, flags.seed, x, labels, not flags.plain)
    step()                                                # compiles, allocates
    calls, whole, watched_steps = [], [], []

    def watched_step():
        calls.append(defaultdict(list))                   # (kernel, shape) → [(seconds, Work)]
        with watched(calls[-1]):
            step()

    for turn in range(flags.warmup + flags.repeats):
        for function, seconds in ((step, whole), (watched_step, watched_steps)):
            start = time.perf_counter()
            function()
            seconds.append(time.perf_counter() - start)
        if turn < flags.warmup:
            calls.clear(), whole.clear(), watched_steps.clear()
    return calls, whole, watched_steps


def summary(calls, whole, watched_steps, limits):
    """Rows of kernels and shapes, and the whole step, which was timed without instruments."""
    rows = rows_of(calls, limits, choice.instructions())
    kernels = float(np.median([sum(s for found in c.values() for s, _ in found) for c in calls]))
    whole = float(np.median(whole))
    return {"rows": rows, "by_kernel": by_kernel(rows),
            "kernels_ms": ms(kernels), "rest_ms": ms(whole - kernels), "whole_ms": ms(whole),
            "watched_ms": ms(np.median(watched_steps)),
            "allowed_ms": round(sum(row["allowed_ms"] or 0 for row in rows), 4)}


@contextmanager
def watched(calls):
    """Every module that shares kernels among threads does it through a clock."""
    modules = [module for name, module in sys.modules.items() if name.startswith("minifqt.")
               and module is not team and getattr(module, "share", None) is team.share]

    def timed(kernel, *arguments):
        start = time.perf_counter()
        team.share(kernel, *arguments)
        seconds = time.perf_counter() - start
        name, work = kernel.py_func.__name__, work_of(kernel.py_func, arguments)
        calls[name, work.shape].append((seconds, work if name in WORK else None))

    for module in modules:
        module.share = timed
    try:
        yield
    finally:
        for module in modules:
            module.share = team.share


def work_of(kernel, arguments):
    """Its Work; of a kernel that WORK does not know, the shapes of its arrays alone."""
    names = kernel.__code__.co_varnames[1:kernel.__code__.co_argcount]        # without the counter
    if kernel.__name__ in WORK:
        return WORK[kernel.__name__](SimpleNamespace(**dict(zip(names, arguments, strict=True))))
    return Work(" ".join(dims(v) for v in arguments if isinstance(v, np.ndarray)))


def rows_of(calls, limits, instructions):
    """One for each kernel and shape, the longest first.  Times in ms; counts are of one call."""
    rows = []
    for name, shape in dict.fromkeys(key for step in calls for key in step):
        found = [step.get((name, shape), []) for step in calls]
        seconds = [s for step in found for s, _ in step]
        total = float(np.median([sum(s for s, _ in step) for step in found]))
        row = {"kernel": name, "shape": shape, "calls": float(np.median([*map(len, found)])),
               "median_ms": ms(np.median(seconds)), "total_ms": ms(total)}
        works = [work for step in found for _, work in step]
        if None in works:                                 # not in WORK
            rows.append(row | {"allowed_ms": None, "bound": None, "ratio": None})
            continue
        times = [sum(allowed(w, limits, instructions)[0] for _, w in step) for step in found]
        least = float(np.median(times))
        middle = sorted(works)[len(works) // 2]           # mixed rows differ from step to step
        rows.append(row | {key: getattr(middle, key) for key in Work._fields[1:]}
                    | {"allowed_ms": ms(least), "bound": allowed(middle, limits, instructions)[1],
                       "ratio": round(total / least, 3) if least else None})
    return sorted(rows, key=lambda row: -row["total_ms"])


def by_kernel(rows):
    """Sums over the shapes of each kernel, the longest first."""
    sums = []
    for name in dict.fromkeys(row["kernel"] for row in rows):
        mine = [row for row in rows if row["kernel"] == name]
        known = all(row["allowed_ms"] is not None for row in mine)
        total, least = (round(sum(row[key] or 0 for row in mine), 4)
                        for key in ("total_ms", "allowed_ms"))
        sums.append({"kernel": name, "calls": sum(row["calls"] for row in mine), "total_ms": total,
                     "allowed_ms": least if known else None,
                     "ratio": round(total / least, 3) if known and least else None})
    return sorted(sums, key=lambda row: -row["total_ms"])


def ms(seconds):
    return round(1e3 * float(seconds), 4)


def table(result):
    limit, fused = result["limits"], "fused" if result["fused"] else "not fused"
    lines = [f"{result['model']} {result['recipe']}, batch {result['batch']}, {result['repeats']} "
             "repeats", machine.describe(result), f"minifqt: {result['kernels']}; {fused}", "",
             "what the machine allows, a second:"]
    lines += [f"  {value / 1e9:9.1f} G integer multiply-adds by {name}"
              for name, value in limit["products"].items()]
    lines += [f"  {limit['floats'] / 1e9:9.1f} G float32 multiply-adds (NumPy)"]
    lines += [f"  {row['read'] / 1e9:9.1f} GB read, {row['copy'] / 1e9:.1f} GB copied (in and out "
              f"counted), within {row['bytes'] / MB:g} MB" for row in limit["memory"]]
    lines += [f"  {limit['noise'] / 1e9:9.1f} G 16-bit random numbers",
              f"  {limit['doubles'] / 1e9:9.1f} G numbers scaled in float64", ""]
    rows = [row for row in result["rows"] if row["total_ms"] >= SMALL * result["kernels_ms"]
            or row["bound"] is None]
    others = [row for row in result["rows"] if row not in rows]
    width = max(len(row["shape"]) for row in rows) + 2
    lines += [f"{'ms':18}{'':{width}}{'calls':>6}{'a call':>9}{'a step':>9}{'Mmul':>9}{'MB':>8}"
              f"{'allowed':>9}{'ratio':>9}  bound by"]
    for row in rows:
        end = f"{'–':>9}{'–':>8}{'–':>9}{'–':>9}  not in WORK"
        if row["bound"]:
            end = (f"{row['products'] / 1e6:9.1f}{(row['read'] + row['written']) / 1e6:8.2f}"
                   f"{row['allowed_ms']:9.3f}{number(row['ratio'])}  {row['bound']}")
        lines.append(f"{row['kernel']:18}{row['shape']:{width}}{row['calls']:6g}"
                     f"{row['median_ms']:9.3f}{row['total_ms']:9.3f}{end}")
    lines += [f"{len(others)} smaller:".ljust(18 + width)
              + f"{sum(row['calls'] for row in others):6g}{'':9}"
              f"{sum(row['total_ms'] for row in others):9.3f}"] if others else []
    lines += ["", f"{'ms a step':18}{'calls':>6}{'':9}{'total':>9}{'allowed':>9}{'ratio':>9}"]
    for row in result["by_kernel"]:
        least = "–" if row["allowed_ms"] is None else f"{row['allowed_ms']:.3f}"
        lines.append(f"{row['kernel']:18}{row['calls']:6g}{'':9}{row['total_ms']:9.3f}{least:>9}"
                     f"{number(row['ratio'])}")
    lines += [f"{name:33}{result[key]:9.3f}" for name, key in
              (("kernels", "kernels_ms"), ("the rest: Python, NumPy", "rest_ms"),
               ("the step, without instruments", "whole_ms"),
               ("the step, with instruments", "watched_ms"),
               ("what the limits allow kernels", "allowed_ms"))]
    return "\n".join(lines)


def number(ratio):
    return f"{'–':>9}" if ratio is None else f"{ratio:9.2f}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
