"""What the compiled kernels of a training step take, beside what this CPU allows.

Each kernel is timed from outside and by itself: one that other threads would begin while Python
goes on (wgrad) is ended at once, and the table says what that beginning saves. Limits are measured
in the same run (limits.py), work is counted from shapes (work.py). Next: scaling.py.
"""
import argparse
import sys
import time
from collections import defaultdict
from contextlib import contextmanager
from pathlib import Path

import machine
import numpy as np
import step as steps

sys.path.insert(0, str(machine.ROOT))                     # where minifqt, models and data are
from limits import allowed, better, measure
from work import WORK, Work, work_of

import minifqt
from minifqt.kernels.cpu import choice
from models import resnet_cifar

if choice.numba is not None:
    from minifqt.kernels.cpu import team

MB = 1 << 20
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
    before, measured = measure(flags), steps_of(flags)
    result["limits"] = better(before, measure(flags))      # others can lower a limit, not raise it
    result |= summary(*measured, result["limits"])
    print(table(result))
    print(f"written: {steps.write(result, Path(flags.out))}")


# ---- the kernels of a step -----------------------------------------------------------------------


class Calls(defaultdict):
    """(kernel, shape) → [(seconds, Work)] of one step; Work None if there is no formula."""

    def __init__(self):
        super().__init__(list)
        self.noting = 0.0                                 # seconds that it took to note them

    def seconds(self):
        """Of all kernels."""
        return sum(seconds for found in self.values() for seconds, _ in found)


def steps_of(flags):
    """(calls of each step, its seconds between kernels, seconds of each step left to itself)."""
    rng = np.random.default_rng(flags.seed)
    x = rng.standard_normal((flags.batch, 32, 32, 3), "float32")              # (N, H, W, C)
    labels = rng.integers(0, steps.CLASSES, flags.batch)
    step = steps.minifqt_step(flags.model, flags.recipe, flags.seed, x, labels, not flags.plain)
    step()                                                # compiles, allocates
    calls, between, whole = [], [], []
    for turn in range(flags.warmup + flags.repeats):
        start = time.perf_counter()
        step()
        seconds = time.perf_counter() - start
        with watched(Calls()) as found:
            start = time.perf_counter()
            step()
            alone = time.perf_counter() - start
        if turn >= flags.warmup:
            whole.append(seconds), calls.append(found)
            between.append(alone - found.seconds() - found.noting)
    return calls, between, whole


def summary(calls, between, whole, limits):
    """Rows of kernels and shapes, and what they add up to: kernels + Python − saved = a step."""
    rows = rows_of(calls, limits, choice.instructions())
    kernels = sum(row["total_ms"] for row in rows)
    python, whole = ms(np.median(between)), ms(np.median(whole))
    return {"rows": rows, "by_kernel": by_kernel(rows), "kernels_ms": round(kernels, 4),
            "python_ms": python, "saved_ms": round(kernels + python - whole, 4), "whole_ms": whole,
            "allowed_ms": round(sum(row["allowed_ms"] or 0 for row in rows), 4)}


@contextmanager
def watched(calls):
    """Every module that shares kernels among threads does it through a clock, one at a time."""
    def share(kernel, *arguments):
        start = time.perf_counter()
        team.share(kernel, *arguments)
        end = time.perf_counter()
        name, work = kernel.py_func.__name__, work_of(kernel.py_func, arguments)
        calls[name, work.shape].append((end - start, work if name in WORK else None))
        calls.noting += time.perf_counter() - end

    def begin(kernel, *arguments):
        share(kernel, *arguments)
        return lambda: None                               # it has ended already

    here = [(module, function) for name, module in sys.modules.items()
            if name.startswith("minifqt.") and module is not team for function in (share, begin)
            if getattr(module, function.__name__, None) is getattr(team, function.__name__)]
    for module, function in here:
        setattr(module, function.__name__, function)
    try:
        yield calls
    finally:
        for module, function in here:
            setattr(module, function.__name__, getattr(team, function.__name__))


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
        end = f"{'–':>9}{'–':>8}{'–':>9}{'–':>9}  not in work.py"
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
              (("kernels, one at a time", "kernels_ms"), ("+ Python, NumPy", "python_ms"),
               ("− saved by wgrad beside them", "saved_ms"), ("= the step", "whole_ms"),
               ("what the limits allow kernels", "allowed_ms"))]
    return "\n".join(lines)


def number(ratio):
    return f"{'–':>9}" if ratio is None else f"{ratio:9.2f}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
