"""How a training step scales: with the batch, with threads, in memory, and fed by a loader.

Four parts, each a few lines of a table: milliseconds an image for each batch, the same step on one
and more threads, peak memory, and a step fed by the loader beside one that has its batch already.
minifqt's networks are fused. Without PyTorch the rest is measured and the table says what was left
out. Next: accuracy.py.
"""
import argparse
import json
import os
import resource
import subprocess
import sys
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import machine
import numpy as np
import step as steps

sys.path.insert(0, str(machine.ROOT))                     # where minifqt, models and data are
import data
import minifqt
import models
from data.loader import AHEAD, Loader
from minifqt import backend, training
from minifqt.kernels import cpu
from minifqt.rng import Streams
from models import resnet_cifar

PARTS = ("batches", "threads", "memory", "loader")
TORCH = (steps.REFERENCE, "PyTorch bfloat16 channels_last")
MEMORY_STEPS, MB = 3, 1 << 20
SETTINGS = {
    "full": {"batch": 128, "batches": "32,64,128,256,512", "repeats": 9, "warmup": 1,
             "images": 10_000, "fed": 12},
    "quick": {"batch": 4, "batches": "2,4", "repeats": 1, "warmup": 0, "images": 100, "fed": 2}}


def parser():
    text = argparse.ArgumentParser(description=__doc__)
    add = text.add_argument
    add("--model", choices=resnet_cifar.MODELS, default="resnet20")
    add("--recipes", default="fp32,qat8,bhq8",
        help="separated by commas, the last is also fed by the loader; %(default)s")
    add("--parts", default=",".join(PARTS), help="separated by commas; %(default)s")
    add("--batch", type=int, help="images in a step of the other parts; 128, with --quick 4")
    add("--batches", help=f"{SETTINGS['full']['batches']}, with --quick 2,4")
    add("--thread-counts", default="1,2", help="%(default)s")
    add("--repeats", type=int, help="timed steps of each contestant; 9, with --quick 1")
    add("--warmup", type=int, help="rounds that are not timed; 1, with --quick none")
    add("--fed", type=int, help="timed steps of a round of the loader's part; 12, with --quick 2")
    add("--workers", type=int, default=1, help="threads of the loader; %(default)s")
    add("--threads", type=int, default=2, help="of the other parts; %(default)s")
    add("--seed", type=int, default=0, help="of weights, images and rounding; %(default)s")
    add("--quick", action="store_true", help="tiny: shows that the script runs, measures nothing")
    add("--out", default="benchmarks/results", help="folder of the JSON file; %(default)s")
    add("--memory-of", metavar="NAME", help=argparse.SUPPRESS)    # the process of one contestant
    return text


def main(arguments=None):
    flags = parser().parse_args(arguments)
    for key, value in SETTINGS["quick" if flags.quick else "full"].items():
        if getattr(flags, key, None) is None:
            setattr(flags, key, value)
    flags.batches, flags.thread_counts = (sorted(map(int, text.split(","))) for text in
                                          (flags.batches, flags.thread_counts))
    require_sense(flags)
    minifqt.set_threads(flags.threads)
    if flags.memory_of:
        print(json.dumps(memory_of(flags.memory_of, flags)))
        return
    result = machine.facts("scaling", flags.seed, flags.threads)
    result |= {key: getattr(flags, key) for key in
               ("model", "batch", "repeats", "warmup", "workers", "quick")}
    names, skipped = contestants(flags)
    result |= {"versions": machine.versions(), "instructions": cpu.instructions(),
               "kernels": cpu.describe(), "fused": True, "skipped": skipped}
    measure = {"batches": batches, "threads": thread_counts, "memory": memory, "loader": loader}
    for part in PARTS:
        if part in flags.parts.split(","):
            result[f"{part}_rows"] = measure[part](names, flags)
    print(table(result))
    print(f"written: {steps.write(result, Path(flags.out))}")


def require_sense(flags):
    if unknown := set(flags.parts.split(",")) - set(PARTS):
        raise ValueError(f"--parts {','.join(sorted(unknown))}: there are {', '.join(PARTS)}.")
    if min(flags.batch - 1, flags.batches[0] - 1, flags.thread_counts[0], flags.repeats, flags.fed,
           flags.workers, flags.threads, flags.warmup + 1) < 1:
        raise ValueError("--batch and --batches must be at least 2; --thread-counts, --repeats, "
                         "--fed, --workers and --threads 1; --warmup 0.")


def contestants(flags):
    """(names of all that can be measured here, [{"name", "why"} left out])."""
    names = [f"minifqt {recipe}" for recipe in flags.recipes.split(",")]
    try:
        import torch  # noqa: F401 - whether it is there
    except ImportError as error:
        why = f"{error}; pip install torch==2.13.0"
        return names, [{"name": name, "why": why} for name in TORCH]
    return [*names, *TORCH], []


def step_of(name, flags, batch, threads, model=None):
    """A function that makes one step of this contestant, on so many threads."""
    rng = np.random.default_rng(flags.seed)
    x = rng.standard_normal((batch, 32, 32, 3), "float32")                    # (N, H, W, C)
    labels, model = rng.integers(0, steps.CLASSES, batch), model or flags.model
    if name in TORCH:
        import torch
        step = steps.torch_step(torch, model, flags.seed, x, labels, channels_last=True,
                                bfloat16="bfloat16" in name)
        return on_threads(step, threads, torch.get_num_threads, torch.set_num_threads)
    step = steps.minifqt_step(model, name.removeprefix("minifqt "), flags.seed, x, labels)
    return on_threads(step, threads, backend.threads, minifqt.set_threads)


def on_threads(step, count, get, put):
    """The step, which sees to its number of threads: in steps.take_turns the untimed one does."""
    def run():
        if get() != count:
            put(count)
        return step()

    return run


# ---- batch and threads ---------------------------------------------------------------------------


def batches(names, flags):
    """ms an image for each contestant and batch, all taking turns."""
    return turns({(name, batch, flags.threads): step_of(name, flags, batch, flags.threads)
                  for name in names for batch in flags.batches}, flags)


def thread_counts(names, flags):
    """The same for each contestant and number of threads."""
    return turns({(name, flags.batch, count): step_of(name, flags, flags.batch, count)
                  for name in names for count in flags.thread_counts}, flags)


def turns(functions, flags):
    """(name, batch, threads) → step, as rows."""
    for step in functions.values():
        step()                                            # compiles, allocates
    rows = []
    for (name, batch, threads), seconds in steps.take_turns(functions, flags.warmup,
                                                            flags.repeats).items():
        p10, median, p90 = (round(1e3 * float(value) / batch, 5)
                            for value in np.percentile(seconds, (10, 50, 90)))
        rows.append({"name": name, "batch": batch, "threads": threads, "ms_an_image": median,
                     "p10": p10, "p90": p90})
    minifqt.set_threads(flags.threads)
    return rows


# ---- memory --------------------------------------------------------------------------------------


def memory(names, flags):
    """MB that a few steps take at most beyond the process before them: a fresh process for each."""
    rows = []
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name, "--model", flags.model,
                   "--batch", str(flags.batch), "--threads", str(flags.threads),
                   "--seed", str(flags.seed)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ)
        if done.returncode:
            raise RuntimeError(f"the memory of {name}: {done.stderr.strip()}")
        rows.append({"name": name, "batch": flags.batch, **json.loads(done.stdout)})
    return rows


def memory_of(name, flags):
    """Of this process: the peak of the first steps, and what was there before the network was.

    Code is loaded and compiled before, by a step of the smallest network on two images.
    """
    step_of(name, flags, 2, flags.threads, "resnet8")()
    before = resident()
    step = step_of(name, flags, flags.batch, flags.threads)
    for _ in range(MEMORY_STEPS):
        step()
    peak = resident(peak=True)
    return {"before_mb": round(before / MB, 1), "peak_mb": round(peak / MB, 1),
            "mb": round((peak - before) / MB, 1)}


def resident(peak=False):
    """Bytes of this process in memory, or the most since resident() was asked last.

    On Linux ru_maxrss of a child begins with its parent's (it survives exec), so /proc is asked;
    where there is none, both are ru_maxrss.
    """
    status = Path("/proc/self/status")
    if not status.exists():
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    found = dict(line.split(":", 1) for line in status.read_text().splitlines())
    if not peak:
        try:
            Path("/proc/self/clear_refs").write_text("5") # the peak begins anew
        except OSError:
            pass                                          # then it is that of the whole process
    return int(found["VmHWM" if peak else "VmRSS"].split()[0]) * 1024


# ---- the loader ----------------------------------------------------------------------------------


def loader(_names, flags):
    """Images a second of the loader, of the step, and of the step that the loader feeds.

    Rounds of `fed` timed steps each, the loader running in no other; the batches that it has made
    ahead are used up before.
    """
    recipe, batch = flags.recipes.split(",")[-1], flags.batch
    source = Loader(synthetic(flags.images, flags.seed), batch, Streams(flags.seed), train=True,
                    padding=4, flip=True, workers=flags.workers)
    ahead = AHEAD + flags.workers + 1
    if len(source) < ahead + flags.fed:
        raise ValueError(f"--batch {batch}, --fed {flags.fed}: {flags.images} images are "
                         f"{len(source)} batches, and {ahead + flags.fed} are needed.")
    net = minifqt.fuse(models.build(flags.model, steps.CLASSES, recipe, flags.seed))
    train = trainer(net)
    with closing(source.epoch(0)) as made:
        constant = next(made)
    train(constant)                                       # compiles, allocates
    found = {"loader alone": [], "step alone": [], "step fed by the loader": []}
    for turn in range(flags.warmup + flags.repeats):
        for name, use, fed in (("loader alone", lambda _: None, True), ("step alone", train, False),
                               ("step fed by the loader", train, True)):
            with closing(source.epoch(turn)) as made:
                feed = made if fed else iter(lambda: constant, None)
                for images in islice(feed, ahead):
                    use(images)
                start = time.perf_counter()
                for images in islice(feed, flags.fed):
                    use(images)
                seconds = (time.perf_counter() - start) / flags.fed
            if turn >= flags.warmup:
                found[name].append(seconds)
    return [{"name": name, "recipe": recipe, "batch": batch,
             "ms_a_batch": round(1e3 * float(np.median(seconds)), 4),
             "images_a_second": round(batch / float(np.median(seconds)), 1)}
            for name, seconds in found.items()]


def trainer(net):
    """train((x, labels)): one step."""
    optimizer, done = minifqt.SGD(), []

    def train(batch):
        done.append(float(training.train_step(net, optimizer, *batch, steps.LR, len(done))))

    return train


def synthetic(count, seed):
    """Random images and labels, of CIFAR's shape."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 32, 32, 3), np.uint8)               # (N, H, W, C)
    labels = rng.integers(0, steps.CLASSES, count)
    names = tuple(map(str, range(steps.CLASSES)))
    return data.Dataset(images, labels, steps.CLASSES, names, *data.channel_statistics(images))


# ---- the table -----------------------------------------------------------------------------------


def table(result):
    lines = [f"{result['model']}, batch {result['batch']}, {result['repeats']} repeats",
             machine.describe(result), f"minifqt: {result['kernels']}; fused"]
    for part, title, column in (("batches", "ms an image, by batch", "batch"),
                                ("threads", "ms an image, by threads", "threads")):
        if rows := result.get(f"{part}_rows"):
            lines += ["", *by_column(rows, title, column)]
    if rows := result.get("memory_rows"):
        lines += ["", f"{'MB of ' + str(MEMORY_STEPS) + ' steps':32}{'before':>9}{'peak':>9}"
                      f"{'more':>9}"]
        lines += [f"{row['name']:32}{row['before_mb']:9.0f}{row['peak_mb']:9.0f}{row['mb']:9.0f}"
                  for row in rows]
    if rows := result.get("loader_rows"):
        title = f"{rows[0]['recipe']}, {result['workers']} workers"
        lines += ["", f"{title:32}{'ms a batch':>12}{'images a second':>18}"]
        lines += [f"{row['name']:32}{row['ms_a_batch']:12.2f}{row['images_a_second']:18.0f}"
                  for row in rows]
    lines += [f"left out: {entry['name']}: {entry['why']}" for entry in result["skipped"]]
    return "\n".join(lines)


def by_column(rows, title, column):
    """A line for each name, a column for each batch or number of threads."""
    heads = sorted({row[column] for row in rows})
    lines = [f"{title:32}" + "".join(f"{head:9}" for head in heads)]
    for name in dict.fromkeys(row["name"] for row in rows):
        values = {row[column]: row["ms_an_image"] for row in rows if row["name"] == name}
        lines.append(f"{name:32}" + "".join(f"{values[head]:9.4f}" for head in heads))
    return lines


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
