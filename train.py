"""Train a network with every GEMM on integers: `python train.py`. Flags → recipe, model, data → training.Run."""
import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

import data
from data.loader import Loader
import minifqt
import models
from minifqt import backend, checkpoint, optim, training
from minifqt.recipes import recipe as recipe_of

PRESETS = {                                               # CIFAR: the paper's setting
    "digits": {"model": "resnet8", "epochs": 30, "batch_size": 64, "padding": 1, "flip": False},
    "cifar10": {"model": "resnet56", "epochs": 200, "batch_size": 128, "padding": 4, "flip": True},
    "cifar100": {"model": "resnet56", "epochs": 200, "batch_size": 128, "padding": 4, "flip": True},
}
ANYTIME = ("resume", "device", "threads", "data_dir", "download", "save_minutes")     # may differ on --resume


def parser():
    text = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = text.add_argument
    add("--dataset", choices=PRESETS, default="digits", help="digits is embedded; it sets the defaults of the rest")
    add("--data-dir", default=".data", help="where CIFAR is, or goes with --download")
    add("--download", action="store_true", help="fetch the data set if it is not there")
    add("--model", choices=models.MODELS, help="default: resnet8 for digits, resnet56 for CIFAR")
    add("--recipe", default="bhq5", help="fp32, qat8, or a gradient quantizer and its bits: ptq8, ptqz8, psq4, bhq5, …")
    add("--eval-range", choices=("running", "batch"), default="running", help="activation ranges in evaluation")
    add("--epochs", type=int, help="default: 30 for digits, 200 for CIFAR")
    add("--batch-size", type=int, help="default: 64 for digits, 128 for CIFAR; a last partial batch is dropped")
    add("--lr", type=float, default=0.1, help="learning rate at the start")
    add("--schedule", choices=optim.SCHEDULES, default="cosine", help="learning rate by epoch")
    add("--warmup", type=int, default=0, help="epochs in which the learning rate rises")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=1e-4, help="on weights, not on batch norm and biases")
    add("--label-smoothing", type=float, default=0.0, help="share of the target spread over all classes")
    add("--seed", type=int, default=0, help="of initialisation, data order, augmentation and rounding")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes a GPU if there is one")
    add("--threads", type=int, default=backend.threads(), help="CPU threads; they change no number")
    add("--out", help="the run's folder; default: runs/DATASET-MODEL-RECIPE-seedSEED")
    add("--resume", metavar="RUN", help="continue the run in this folder, with its own settings")
    add("--save-minutes", type=float, default=10.0, help="checkpoint inside an epoch after this long")
    return text


def main(arguments=None):
    """Run the command line.  Exit status 0; 1 for an error (one line says what to do); 130 when interrupted."""
    try:
        return run(arguments)
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def run(arguments):
    flags = settings(arguments)
    backend.set_threads(flags.threads)
    recipe = recipe_of(flags.recipe).replace(eval_range=flags.eval_range)
    preset = PRESETS[flags.dataset]
    train_set, test_set = data.load(flags.dataset, flags.data_dir, flags.download)
    net = models.build(flags.model, train_set.classes, recipe, flags.seed, flags.device,
                       channels=train_set.images.shape[-1])
    train_loader = Loader(train_set, flags.batch_size, net.streams, train=True, padding=preset["padding"],
                               flip=preset["flip"], drop_last=True)
    test_loader = Loader(test_set, 256, net.streams, train=False)
    config = {key: value for key, value in vars(flags).items() if key not in ANYTIME}
    config |= {"recipe_fields": asdict(recipe), "versions": {"minifqt": minifqt.__version__, "numpy": np.__version__,
                                                             "python": platform.python_version()}}
    optimizer = minifqt.SGD(flags.momentum, flags.weight_decay)
    job = training.Run(flags.out, net, optimizer, config, flags.save_minutes)
    if flags.resume:
        job.resume()
        print(f"resuming {flags.out} at epoch {job.progress.epoch + 1}, step {job.progress.step}")
    else:
        job.start()
        print(f"{flags.model} on {flags.dataset}, recipe {flags.recipe}: {recipe}\n"
              f"{flags.epochs} epochs of {len(train_loader)} steps, device {net.streams.device.__name__}, "
              f"{backend.threads()} threads, writing {flags.out}")
    schedule = optim.SCHEDULES[flags.schedule](flags.lr, flags.epochs, flags.warmup)
    again = f"python train.py --resume {flags.out}"
    try:
        metrics = job.train(train_loader, test_loader, schedule, flags.epochs, flags.label_smoothing, print)
    except (training.DivergedError, minifqt.NonFiniteError) as error:
        raise RuntimeError(f"{error} The last good checkpoint is {flags.out}/last.safetensors; try a lower --lr or more "
                           "bits.") from None
    if metrics is None:
        print(f"\ninterrupted and saved; go on with: {again}")
        return 130
    print(f"done: test accuracy {metrics['test_acc']:.2%} (best {job.progress.best_acc:.2%}), {flags.out}\n"
          f"{what_next(flags)}")
    return 0


def settings(arguments):
    """The flags with the data set's defaults filled in; on --resume those of the run, which no flag may contradict."""
    known = parser()
    flags = known.parse_args(arguments)
    given = {key for key, value in vars(known.parse_args(arguments, argparse.Namespace(
        **dict.fromkeys(vars(flags), None)))).items() if value is not None}
    if flags.resume:
        _, meta = checkpoint.load(Path(flags.resume) / "last.safetensors")
        saved = {key: meta["config"][key] for key in vars(flags) if key in meta["config"]}
        saved["out"] = flags.resume
        for key in sorted(given - set(ANYTIME)):
            if getattr(flags, key) != saved[key]:
                raise ValueError(f"--{key.replace('_', '-')} {getattr(flags, key)}: the run in {flags.resume} has "
                                 f"{saved[key]}, and a resumed run keeps its settings. Leave the flag out, or start a "
                                 "new run.")
        for key, value in saved.items():
            setattr(flags, key, value)
        return flags
    for key in ("model", "epochs", "batch_size"):
        if getattr(flags, key) is None:
            setattr(flags, key, PRESETS[flags.dataset][key])
    require(flags)
    flags.out = flags.out or free_folder(f"{flags.dataset}-{flags.model}-{flags.recipe}-seed{flags.seed}")
    return flags


def require(flags):
    """ValueError for a number that cannot be meant."""
    for key, least in (("epochs", 1), ("batch_size", 2), ("warmup", 0), ("seed", 0), ("threads", 1)):
        if getattr(flags, key) < least:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(flags, key)}: expected at least {least}.")
    if not flags.lr > 0 or not 0 <= flags.label_smoothing < 1 or not flags.save_minutes >= 0:
        raise ValueError(f"--lr {flags.lr}, --label-smoothing {flags.label_smoothing}, --save-minutes "
                         f"{flags.save_minutes}: expected lr > 0, smoothing in [0, 1), minutes ≥ 0.")


def free_folder(name):
    """runs/NAME, or runs/NAME-2, -3, … where that holds a run."""
    candidates = [f"runs/{name}", *(f"runs/{name}-{i}" for i in range(2, 10_000))]
    return next(c for c in candidates if not (Path(c) / "config.json").exists())


def what_next(flags):
    if flags.dataset != "digits":
        return f"its curve is in {flags.out}/metrics.jsonl"
    return ("next: fewer bits (--recipe bhq3), a coarser quantizer (--recipe ptq4), full precision (--recipe fp32), or\n"
            "      python train.py --dataset cifar10 --download --model resnet20 --epochs 30")


if __name__ == "__main__":
    sys.exit(main())
