"""Accuracy on the embedded digits: every gradient quantizer at 8 to 2 bits, several seeds.

Trains with the settings of train.py; each finished run is a line of digits.jsonl, and the same
command again does only what is missing. A run whose loss is not finite is a result too: it
diverged. Next: variance.py, which explains the table.
"""
import argparse
import json
import re
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import machine
from threadpoolctl import threadpool_limits
from tqdm import tqdm

sys.path.insert(0, str(machine.ROOT))                     # where minifqt, models and data are
import data
import minifqt
import models
import train
from data.loader import Loader
from minifqt import optim, training

BITS = (8, 5, 4, 3, 2)
QUANTIZERS = ("ptq", "ptqz", "psq", "bhq")
RECIPES = ("fp32", "qat8", *(f"{name}{bits}" for name in QUANTIZERS for bits in BITS))
KEYS = (*machine.KEYS, "recipe", "epochs", "model", "test_acc", "best_acc", "train_loss",
        "seconds", "diverged")                            # of every line


def parser():
    text = argparse.ArgumentParser(description=__doc__)
    add = text.add_argument
    add("--recipes", default=",".join(RECIPES), help="separated by commas; %(default)s")
    add("--seeds", default="0,1,2", type=whole_numbers, help="separated by commas; %(default)s")
    add("--epochs", type=int, default=15, help="of every run; %(default)s")
    add("--workers", type=int, default=2, help="runs at a time, one thread each; %(default)s")
    add("--table", action="store_true", help="only print the table of the finished runs")
    add("--out", default="benchmarks/results", help="folder of digits.jsonl; %(default)s")
    return text


def whole_numbers(text):
    return [int(number) for number in text.split(",")]


def main(arguments=None):
    flags = parser().parse_args(arguments)
    if flags.epochs < 1 or flags.workers < 1:
        raise ValueError(f"--epochs {flags.epochs}, --workers {flags.workers}: expected 1 or more.")
    recipes = flags.recipes.split(",")
    for recipe in recipes:
        minifqt.recipe(recipe)                            # a misspelt one raises at once
    path = Path(flags.out) / "digits.jsonl"
    if not flags.table:
        path.parent.mkdir(parents=True, exist_ok=True)
        done = {(run["recipe"], run["seed"], run["epochs"]) for run in read(path)}
        asked = [(recipe, seed, flags.epochs) for seed in flags.seeds for recipe in recipes]
        missing = [run for run in dict.fromkeys(asked) if run not in done]
        print(f"{len(asked) - len(missing)} of {len(asked)} runs are in {path} already")
        if missing:
            run_all(missing, flags.workers, path)
    print(table([run for run in read(path) if run["epochs"] == flags.epochs], flags.epochs))


def run_all(missing, workers, path):
    """The missing runs, in processes of one thread; a line of path for each as it ends."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), one_thread)
    try:
        waiting = [pool.submit(one_run, *run) for run in missing]
        for run in tqdm(as_completed(waiting), "runs", len(waiting), unit="run"):
            with path.open("a") as file:
                file.write(json.dumps(run.result()) + "\n")
    finally:
        pool.shutdown(cancel_futures=True)


def one_thread():
    minifqt.set_threads(1)
    threadpool_limits(1)


def one_run(recipe, seed, epochs):
    """Train and evaluate once; the line for digits.jsonl."""
    record, start = machine.facts("digits", seed, threads=1), time.perf_counter()
    preset, defaults = train.PRESETS["digits"], train.parser().parse_args([])
    train_set, test_set = data.load("digits")
    net = models.build(preset["model"], train_set.classes, recipe, seed,
                       channels=train_set.images.shape[-1])
    batches = Loader(train_set, preset["batch_size"], net.streams, train=True,
                     padding=preset["padding"], flip=preset["flip"])
    tests = Loader(test_set, 256, net.streams, train=False)
    optimizer = minifqt.SGD(defaults.momentum, defaults.weight_decay)
    schedule = optim.SCHEDULES[defaults.schedule](defaults.lr, epochs, defaults.warmup)
    accuracies, loss, diverged = [], None, None
    try:
        for epoch in range(epochs):
            loss = one_epoch(net, optimizer, batches, epoch, schedule(epoch))
            accuracies.append(training.evaluate(net, tests)[1])
    except (training.DivergedError, minifqt.NonFiniteError) as error:
        diverged = str(error)
    return record | {"recipe": recipe, "epochs": epochs, "model": preset["model"],
                     "test_acc": None if diverged else round(accuracies[-1], 6),
                     "best_acc": round(max(accuracies), 6) if accuracies else None,
                     "train_loss": None if diverged else round(loss, 6),
                     "seconds": round(time.perf_counter() - start, 2), "diverged": diverged}


def one_epoch(net, optimizer, batches, epoch, lr):
    """Mean training loss of the epoch; training.train_epoch without its bar.  DivergedError."""
    progress, losses = training.Progress(epoch, step=epoch * len(batches)), []
    for x, labels in batches.epoch(epoch):
        losses.append(training.checked_step(net, optimizer, x, labels, lr, progress, 0.0))
        progress.step += 1
    return statistics.fmean(losses)


def read(path):
    """All finished runs.  ValueError for a damaged line."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number} is damaged, perhaps by a killed run: delete "
                             "that line and start again.") from None
    return runs


# ---- the table -----------------------------------------------------------------------------------


def table(runs, epochs):
    """Markdown: one row a quantizer, mean test accuracy in per cent ± sample standard deviation."""
    if not runs:
        raise ValueError(f"no finished run of {epochs} epochs: run this script without --table.")
    found = {}
    for run in runs:
        found.setdefault(name_and_bits(run["recipe"]), []).append(run)
    columns = [None, *sorted({bits for _, bits in found if bits}, reverse=True)]
    heads = ["float32" if bits is None else f"{bits} bits" for bits in columns]
    lines = [f"| gradients | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    for name in sorted({name for name, _ in found}, key=rank):
        cells = [cell(found.get((name, bits), [])) for bits in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    seeds = sorted({run["seed"] for run in runs})
    commits = sorted({(run["commit"] or "none")[:7] for run in runs})
    seconds = statistics.median(run["seconds"] for run in runs)
    lines += ["", f"Test accuracy after {epochs} epochs in per cent: mean ± sample standard "
              f"deviation over the seeds {', '.join(map(str, seeds))}; {len(runs)} runs, median "
              f"{seconds:.0f} s on one thread.", f"Commit {', '.join(commits)}; "
              f"{', '.join(sorted({run['machine']['cpu'] for run in runs}))}."]
    return "\n".join(lines)


def name_and_bits(recipe):
    """("bhq", 5); fp32 and qat8 leave the gradients in float32: ("qat8", None)."""
    match = re.fullmatch(r"(.+?)(\d+)", recipe)
    return (recipe, None) if recipe in ("fp32", "qat8") else (match[1], int(match[2]))


def rank(name):
    order = ("fp32", "qat8", *QUANTIZERS)
    return order.index(name) if name in order else len(order), name


def cell(runs):
    """"97.31 ± 0.21", "1 of 3 diverged, else 96.11", "diverged", or "" without a run."""
    values = [100 * run["test_acc"] for run in runs if not run["diverged"]]
    if not runs or not values:
        return "diverged" if runs else ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    text = f"{statistics.fmean(values):.2f}{spread}"
    lost = len(runs) - len(values)
    return f"{lost} of {len(runs)} diverged, else {text}" if lost else text


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted; finished runs are kept, and the same command does the rest.")
