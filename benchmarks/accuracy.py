"""Accuracy against bits: every gradient quantizer at 8 to 2 bits, several seeds, on one data set.

Each run is a train.py of its own with its default settings, in a folder of its own; when it has
finished it becomes a line of accuracy-DATASET.jsonl. Ctrl-C or SIGTERM saves the runs under way,
and the same command goes on where they stood. A run that diverged is a result too. Next:
report.py for the table; variance.py, which explains it.
"""
import argparse
import fcntl
import json
import re
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import machine
import report
from variance import QUANTIZERS

sys.path.insert(0, str(machine.ROOT))                     # where minifqt, models and data are
import data
import minifqt
import models
import train
from minifqt.run import interruptible

BITS = (8, 5, 4, 3, 2)
RECIPES = ("fp32", "qat8", *(f"{name}{bits}" for name in QUANTIZERS for bits in BITS))
DEFAULTS = {"digits": ("resnet8", 15), "cifar10": ("resnet20", 30), "cifar100": ("resnet20", 30)}


class Setting(NamedTuple):
    """What tells one run from another; flags of train.py, and keys of a result."""

    dataset: str
    model: str
    epochs: int
    recipe: str
    seed: int


def parser():
    text = argparse.ArgumentParser(description=__doc__)
    add = text.add_argument
    add("--dataset", choices=DEFAULTS, default="digits", help="%(default)s")
    add("--data-dir", default=".data", help="where CIFAR is; %(default)s")
    add("--model", choices=models.MODELS, help="default: resnet8 for digits, resnet20 for CIFAR")
    add("--recipes", default=",".join(RECIPES), type=recipes,
        help="in the order of training, with fields such as bhq-auto,alpha=0.05; %(default)s")
    add("--seeds", default="0,1,2", type=whole_numbers, help="one after another; %(default)s")
    add("--epochs", type=int, help="of every run; default: 15 for digits, 30 for CIFAR")
    add("--workers", type=int, default=2, help="runs at a time; %(default)s")
    add("--threads", type=int, default=1, help="of each run; more change no number; %(default)s")
    add("--table", action="store_true", help="only print the table of the finished runs")
    add("--plot", metavar="PNG", help="only draw the curves of the finished runs")
    add("--runs", default="runs/accuracy", help="folder of the runs' folders; %(default)s")
    add("--out", default="benchmarks/results", help="folder of the results; %(default)s")
    return text


def whole_numbers(text):
    return [int(number) for number in text.split(",")]


def recipes(text):
    return re.split(r",(?!\w+=)", text)                   # a field belongs to the name before it


def main(arguments=None):
    flags = parser().parse_args(arguments)
    model, epochs = DEFAULTS[flags.dataset]
    model = flags.model or model
    epochs = epochs if flags.epochs is None else flags.epochs
    if min(epochs, flags.workers, flags.threads) < 1:
        raise ValueError(f"--epochs {epochs}, --workers {flags.workers}, --threads "
                         f"{flags.threads}: expected 1 or more.")
    path = Path(flags.out) / f"accuracy-{flags.dataset}.jsonl"
    if not flags.table and not flags.plot:
        train_all([Setting(flags.dataset, model, epochs, recipe, seed)
                   for seed in flags.seeds for recipe in flags.recipes], flags, path)
    runs = [run for run in read(path) if (run["model"], run["epochs"]) == (model, epochs)]
    if not runs:
        raise ValueError(f"{path} has no finished run of {model}, {epochs} epochs: start this "
                         "script without --table and --plot.")
    print(report.draw(runs, Path(flags.plot)) if flags.plot else report.table(runs))


def read(path):
    """All results.  ValueError for a damaged line."""
    runs = []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            runs.append(json.loads(line))
        except json.JSONDecodeError:
            raise ValueError(f"{path}, line {number} is damaged, perhaps by a killed run: delete "
                             "that line and start again.") from None
    return runs


# ---- the runs ------------------------------------------------------------------------------------


def train_all(asked, flags, path):
    """Train what is missing in path, flags.workers at a time; a line of path for each as it ends.

    Raises KeyboardInterrupt, all runs saved, and RuntimeError where a run came to no result.
    """
    for setting in asked:
        minifqt.recipe(setting.recipe)                    # a misspelt one raises at once,
    data.load(flags.dataset, flags.data_dir)              # and so do missing images
    path.parent.mkdir(parents=True, exist_ok=True)
    done = {tuple(run[key] for key in Setting._fields) for run in read(path)}
    waiting = [setting for setting in dict.fromkeys(asked) if setting not in done]
    print(f"{len(asked) - len(waiting)} of {len(asked)} runs are in {path} already", flush=True)
    running, failed = [], 0
    with locked(Path(flags.runs)) as lock, interruptible() as asked_to_stop:
        try:
            while (waiting or running) and not asked_to_stop():
                while waiting and len(running) < flags.workers:
                    running.append(Training(waiting.pop(0), flags, lock))
                time.sleep(0.2)
                for run in [run for run in running if run.has_ended()]:
                    running.remove(run)
                    result = run.result()
                    failed += result is None              # the other runs go on
                    if result:
                        with path.open("a") as file:
                            file.write(json.dumps(result) + "\n")
        finally:
            for run in running:
                run.process.terminate()                   # train.py saves, and ends
            for run in running:
                run.process.wait()
    if asked_to_stop():
        raise KeyboardInterrupt
    if failed:
        raise RuntimeError(f"{failed} runs came to no result, see above; the same command tries "
                           "them again.")


@contextmanager
def locked(folder):
    """Let no second queue in. The runs hold the lock as well: they may outlive a killed queue."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder} is in use by another queue, or by runs that a killed one "
                               "left behind: wait for their end, or choose other --runs.") from None
        yield file


class Training:
    """One train.py under way, new or resumed where its folder stands.

    A folder that was begun by hand is adopted, whatever its other settings are. starts.jsonl there
    says at which commits the run was started and resumed; log.txt, what train.py said.
    """

    def __init__(self, setting, flags, lock):
        self.setting, self.threads = setting, flags.threads
        self.folder = Path(flags.runs) / ("{}-{}-{}epochs-{}-seed{}".format(*setting))
        self.folder.mkdir(parents=True, exist_ok=True)
        begun = (self.folder / "last.safetensors").exists()
        self.shown = len(self.epochs()) if begun else 0
        self._note_start(begun)
        settings = [f"--{key}={value}" for key, value in setting._asdict().items()]
        with (self.folder / "log.txt").open("a") as log:
            self.process = subprocess.Popen(
                [sys.executable, machine.ROOT / "train.py", *settings, "--device=cpu",
                 f"--threads={self.threads}", f"--data-dir={flags.data_dir}",
                 f"--{'resume' if begun else 'out'}={self.folder}"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()],
                start_new_session=True)                   # a terminal's Ctrl-C is the queue's alone
        self._say(f"resumed after epoch {self.shown}" if begun else "started")

    def _note_start(self, begun):
        path = self.folder / "starts.jsonl"
        facts = machine.facts("accuracy", self.setting.seed, self.threads)
        starts = []
        if begun and not path.exists():                   # who knows when, and by what command
            starts.append(facts | dict.fromkeys(("commit", "dirty", "command")))
        if self.shown < self.setting.epochs:              # else there is nothing left to train
            starts.append(facts)
        with path.open("a") as file:
            file.writelines(json.dumps(start) + "\n" for start in starts)

    def _say(self, what):
        print(f"{self.setting.recipe:>5} seed {self.setting.seed}  {what}", flush=True)

    def epochs(self):
        """The metrics of each finished epoch; half a line is none."""
        path = self.folder / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def has_ended(self):
        """Whether train.py has; prints a line for each epoch that is new."""
        ended, epochs = self.process.poll() is not None, self.epochs()
        for new in epochs[self.shown:]:
            self._say(f"epoch {new['epoch']:3d}/{self.setting.epochs}  loss "
                      f"{new['train_loss']:.4f}  test {new['test_acc']:.2%}  "
                      f"{new['seconds']:.1f} s")
        self.shown = max(self.shown, len(epochs))
        return ended

    def result(self):
        """The line of a run that has ended; None unless it has finished or diverged."""
        status, log = self.process.returncode, self.folder / "log.txt"
        last, diverged = log.read_text().strip().rpartition("\n")[2], status == train.DIVERGED
        if status and not diverged:
            self._say(f"failed with status {status}; the end of {log}: {last}")
            return None
        epochs, starts = self.epochs(), read(self.folder / "starts.jsonl")
        curve = {key: [round(epoch[key], 6) for epoch in epochs]
                 for key in ("train_loss", "test_acc")}
        seconds = sum(epoch["seconds"] + epoch["test_seconds"] for epoch in epochs)
        self._say("diverged" if diverged else f"finished after {seconds:.0f} s")
        return starts[0] | self.setting._asdict() | {
            "test_acc": None if diverged else curve["test_acc"][-1],
            "best_acc": max(curve["test_acc"], default=None),
            "train_loss": None if diverged else curve["train_loss"][-1],
            "seconds": round(seconds, 2),
            "average_bits": average_bits(self.folder / "bits.jsonl", epochs),
            "diverged": re.sub(f"^error: | {re.escape(str(self.folder))}.*", "", last)
                        if diverged else None,            # what to do next is no result
            "commits": list(dict.fromkeys(start["commit"] for start in starts)),
            "dirty": any(start["dirty"] for start in starts),
            "curve": curve}


def average_bits(path, epochs):
    """Of a run whose bits were chosen on the way, over its steps; None for another."""
    if not path.exists() or not epochs:
        return None
    last = epochs[-1]["step"]                             # a choice may follow, of a step that was
    choices = [choice for choice in read(path) if choice["step"] < last]              # not finished
    ends = [choice["step"] for choice in choices[1:]] + [last]
    steps = [end - choice["step"] for choice, end in zip(choices, ends, strict=True)]
    return round(sum(n * choice["average"] for n, choice in zip(steps, choices, strict=True))
                 / sum(steps), 3)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        print("interrupted and saved; the same command goes on")
        sys.exit(130)
