"""Train a network, every GEMM of it on integers: `python train.py`. Flags → recipe, model, data."""
import argparse
import math
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np

import data
import minifqt
import models
from data.loader import Loader
from minifqt import ahead, backend, checkpoint, optim
from minifqt.autobits import AutoBits
from minifqt.kernels.cpu import choice
from minifqt.recipes import recipe as recipe_of
from minifqt.run import Run
from minifqt.training import DivergedError

PRESETS = {                                               # epochs and batch as the paper's
    "digits": {"model": "resnet8", "epochs": 30, "batch_size": 64, "padding": 1, "flip": False},
    "cifar10": {"model": "resnet56", "epochs": 200, "batch_size": 128, "padding": 4, "flip": True},
    "cifar100": {"model": "resnet56", "epochs": 200, "batch_size": 128, "padding": 4, "flip": True},
}
ANYTIME = ("resume", "device", "threads", "data_dir", "download", "kernels")


DIVERGED = 3                                              # exit status


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names a default only where there is one."""

    def _get_help_string(self, action):
        named = action.default is not None and action.default is not False    # 0 is a default
        return super()._get_help_string(action) if named else action.help


def parser() -> argparse.ArgumentParser:
    """All flags, with their defaults in the help."""
    flags = argparse.ArgumentParser(description=__doc__.partition("`. ")[0] + "`.",
                                    formatter_class=Help)
    add = flags.add_argument
    add("--dataset", choices=PRESETS, default="digits", help="digits is embedded")
    add("--data-dir", default=".data", help="where CIFAR is, or goes with --download")
    add("--download", action="store_true", help="fetch the data set if it is not there")
    add("--model", choices=models.MODELS, help="default: resnet8 for digits, resnet56 for CIFAR")
    add("--recipe", default="bhq5",
        help="fp32, qat8, or a gradient quantizer and its bits: ptq8, ptqz8, psq4, bhq5, … or "
             "bhq-auto; fields may follow: bhq5,grad_w=identity,eval_range=batch")
    add("--epochs", type=int, help="default: 30 for digits, 200 for CIFAR")
    add("--batch-size", type=int, help="default: 64 for digits, 128 for CIFAR")
    add("--lr", type=float, default=0.1, help="learning rate at the start")
    add("--schedule", choices=optim.SCHEDULES, default="cosine", help="learning rate by epoch")
    add("--warmup", type=int, default=0, help="epochs in which the learning rate rises")
    add("--momentum", type=float, default=0.9, help="of SGD")
    add("--weight-decay", type=float, default=1e-4, help="on weights, not on BN and biases")
    add("--label-smoothing", type=float, default=0.0, help="share spread over all classes")
    add("--seed", type=int, default=0, help="of initialisation, order, augmentation, rounding")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--threads", type=int, default=backend.threads(), help="CPU threads; change no number")
    add("--out", help="the run's folder; default: runs/DATASET-MODEL-RECIPE-seedSEED")
    add("--resume", metavar="RUN", help="continue the run in this folder with its own settings")
    add("--kernels", choices=("auto", "plain", *choice.ISAS, "numpy"), default="auto",
        help="on a CPU; auto: the fastest, fused; plain: layer by layer. They change no "
             "integer sum; numpy adds the floats of fp32, qat8 and batch norm in another order")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 after an error (one line says what to do), 3 where the run diverged, 130."""
    try:
        return run(settings(arguments))
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return DIVERGED if isinstance(error, DivergedError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def run(flags: argparse.Namespace) -> int:
    """One run from its settings, new or resumed."""
    backend.set_threads(flags.threads)
    choice.set_instructions("auto" if flags.kernels == "plain" else flags.kernels)
    recipe = recipe_of(flags.recipe)
    augment = {key: PRESETS[flags.dataset][key] for key in ("padding", "flip")}
    train_set, test_set = data.load(flags.dataset, flags.data_dir, flags.download)
    net = models.build(flags.model, train_set.classes, recipe, flags.seed, flags.device,
                       channels=train_set.images.shape[-1])
    if flags.kernels != "plain":
        minifqt.fuse(net)
        if net.streams.device is np and ahead.begin(recipe):
            print("the first step compiles its kernels, this once: less than a minute as a rule")
    train_loader = Loader(train_set, flags.batch_size, net.streams, train=True, **augment)
    test_loader = Loader(test_set, 256, net.streams, train=False)
    optimizer = minifqt.SGD(flags.momentum, flags.weight_decay)
    job = Run(flags.out, net, optimizer, config_of(flags, recipe))
    if flags.resume:
        job.resume()
        done = job.progress.epoch >= flags.epochs
        print(f"{flags.out} has finished its {flags.epochs} epochs" if done else
              f"resuming {flags.out} at epoch {job.progress.epoch + 1}, step {job.progress.step}")
    else:
        job.start()
        print(f"{flags.model} on {flags.dataset}, {flags.recipe}: {recipe}\n{flags.epochs} epochs "
              f"of {len(train_loader)} steps with {net.streams.device.__name__}, "
              f"{backend.threads()} threads; {choice.describe()}; writing {flags.out}")
    schedule = optim.SCHEDULES[flags.schedule](flags.lr, flags.epochs, flags.warmup)
    if recipe.automatic:
        log = Path(flags.out) / "bits.jsonl"
        train_loader = AutoBits(net, train_loader, recipe.alpha, flags.label_smoothing, log=log)
        print(f"bits are chosen as it trains, often at first; each choice is a line of {log}")
    try:
        metrics = job.train(train_loader, test_loader, schedule, flags.epochs,
                            flags.label_smoothing)
    except DivergedError as error:
        raise DivergedError(f"{error} {job.last} is the last good checkpoint. Start again with a "
                            "lower --lr or more bits.") from None
    again = to_resume(flags)
    if metrics is None:
        print(f"\ninterrupted and saved; go on with: {again}")
        return 130
    if flags.dataset == "digits":
        print("try next: --recipe bhq3 (fewer bits), ptq3 (a coarser quantizer), fp32; or\n"
              "  python train.py --dataset cifar10 --download --model resnet20 --epochs 30")
    print(f"test accuracy {metrics['test_acc']:.2%}, best {job.progress.best_acc:.2%}; "
          f"the curve is in {job.metrics}; resume: {again}")
    return 0


def settings(arguments: list[str] | None) -> argparse.Namespace:
    """The flags, completed from the data set's preset; on --resume from the run itself."""
    flags = parser().parse_args(arguments)
    if flags.resume:
        flags = resumed(flags, arguments)
    for key in ("model", "epochs", "batch_size"):
        if getattr(flags, key) is None:
            setattr(flags, key, PRESETS[flags.dataset][key])
    for key, least in (("epochs", 1), ("batch_size", 2), ("warmup", 0), ("seed", 0),
                       ("threads", 1)):
        if not getattr(flags, key) >= least:
            raise ValueError(f"--{key.replace('_', '-')} {getattr(flags, key)}: expected at least "
                             f"{least}.")
    if not 0 < flags.lr < math.inf or not 0 <= flags.label_smoothing < 1:
        raise ValueError(f"--lr {flags.lr}, --label-smoothing {flags.label_smoothing}: expected a "
                         "rate above 0 and a smoothing in [0, 1).")
    if flags.out is None:
        flags.out = free_folder(f"{flags.dataset}-{flags.model}-{flags.recipe}-seed{flags.seed}")
    return flags


def resumed(flags, arguments):
    """The settings of the run; a flag that says otherwise is an error, not ignored."""
    _, meta = checkpoint.load(Path(flags.resume) / "last.safetensors")
    config = meta["config"] | {"out": flags.resume}
    unset = argparse.Namespace(**dict.fromkeys(vars(flags)))
    given = vars(parser().parse_args(arguments, unset))   # None where the flag was not written
    for key, value in given.items():
        if key in ANYTIME or value is None or value == config[key]:
            continue
        if key != "out" or Path(value) != Path(flags.resume):
            raise ValueError(f"--{key.replace('_', '-')} {value}: the run in {flags.resume} has "
                             f"{config[key]}, and a resumed run keeps its settings. Leave the "
                             "flag out, or start a new run.")
    fields, now = config.get("recipe_fields", {}), asdict(recipe_of(config["recipe"]))
    if now | fields != now:
        raise ValueError(f"{flags.resume} was trained with {fields}, and {config['recipe']} is "
                         f"{now} today: resume it with the version that began it.")
    own = {key: config[key] for key in given if key not in ANYTIME}
    return argparse.Namespace(**(vars(flags) | own))


def config_of(flags, recipe):
    """All that is needed to repeat the run."""
    versions = {"minifqt": minifqt.__version__, "numpy": np.__version__,
                "python": platform.python_version()}
    own = {key: value for key, value in vars(flags).items() if key not in ANYTIME}
    return own | {"recipe_fields": asdict(recipe), "versions": versions}


def to_resume(flags):
    """The command that goes on with this run, with the flags that are no setting of a run."""
    command = ["python", "train.py", "--resume", str(flags.out)]
    for key in ("device", "data_dir", "kernels"):
        if getattr(flags, key) != parser().get_default(key):
            command += [f"--{key.replace('_', '-')}", str(getattr(flags, key))]
    return shlex.join(command)


def free_folder(name):
    """runs/NAME, or runs/NAME-2, -3, … where that holds a run."""
    folder, number = Path("runs") / name, 1
    while (folder / "config.json").exists():
        number += 1
        folder = Path("runs") / f"{name}-{number}"
    return str(folder)


if __name__ == "__main__":
    sys.exit(main())
