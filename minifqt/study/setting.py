"""A network at a point of its training, and the batches that come next: what a study looks at.

A run of train.py at one of its checkpoints or at any step between, rebuilt from its own settings;
or, without a run, resnet8 that has learnt the digits for some epochs. The only file of the
laboratory that knows data sets, models and train.py. Next: probe.py.
"""
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

import data
import minifqt
import models
import train
from data.loader import Loader
from minifqt import checkpoint, optim, training
from minifqt.autobits import BATCHES, EVERY, AutoBits, due
from minifqt.layers.base import Quantized
from minifqt.recipes import Recipe
from minifqt.run import restore
from minifqt.study.probe import Probe
from minifqt.study.replay import PLACES, exchange

KEYS = ("dataset", "model", "recipe", "epochs", "batch_size", "lr", "schedule", "warmup",
        "momentum", "weight_decay", "label_smoothing", "seed")


class Setting:
    """net (fused, in training mode), loader, optimizer, config and progress.

    source  a run's folder, one of its checkpoints (.safetensors), or None: the digits are learnt
    step    that is to be looked at, by `train(ahead)`; None: that of the checkpoint
    ahead   steps from the latest checkpoint that is not later (or from the start) to `step`
    Raises ValueError, FileNotFoundError for what is no run, or not its step.
    """

    def __init__(self, source: str | None, step: int | None = None, data_dir: str = ".data",
                 seed: int = 0, epochs: int = 1, device: str = "cpu"):
        arrays, self.progress, self.is_run = {}, training.Progress(), bool(source)
        if source:
            arrays, meta = start_of(Path(source), step)
            self.config = meta["config"]
            try:
                self.progress = training.Progress(**meta["progress"])
                self.recipe = Recipe(**self.config["recipe_fields"])
                for key in KEYS:
                    self.config[key]                      # raises where it is missing
            except (KeyError, TypeError) as error:
                raise ValueError(f"{source} was made by another version of minifqt ({error}): "
                                 "study it with that one.") from None
        else:
            flags = vars(train.parser().parse_args([]))
            self.config = {key: flags[key] for key in KEYS} | train.PRESETS["digits"] | {
                "dataset": "digits", "seed": seed, "epochs": max(1, epochs)}
            self.recipe = minifqt.recipe(self.config["recipe"])
        config, preset = self.config, train.PRESETS[self.config["dataset"]]
        self.dataset, _ = data.load(config["dataset"], data_dir)
        self.net = minifqt.fuse(models.build(
            config["model"], self.dataset.classes, self.recipe, config["seed"], device,
            channels=self.dataset.images.shape[-1]))
        self.loader = Loader(self.dataset, config["batch_size"], self.net.streams, train=True,
                             padding=preset["padding"], flip=preset["flip"])
        self.optimizer = minifqt.SGD(config["momentum"], config["weight_decay"])
        if arrays:                                        # else as it was initialised
            restore(self.net, self.optimizer, arrays)
        if step is not None and not 0 <= step < self.steps:
            raise ValueError(f"--step {step}: the run has steps 0 to {self.steps - 1}, "
                             f"{len(self.loader)} an epoch.")
        self.ahead = 0 if step is None else step - self.progress.step

    @property
    def steps(self) -> int:
        """Of the whole run."""
        return self.config["epochs"] * len(self.loader)

    def train(self, steps: int) -> None:
        """That many steps more, the very ones of the run, bit for bit."""
        c, end = self.config, self.progress.step + steps
        loader = self._chooser() if self.recipe.automatic else self.loader
        schedule = optim.SCHEDULES[c["schedule"]](c["lr"], c["epochs"], c["warmup"])
        with tqdm(total=steps, desc="training", leave=False, disable=None) as bar:
            while self.progress.step < end:
                self._epoch(loader, schedule, end, bar)

    def _epoch(self, loader, schedule, end, bar):
        p = self.progress

        def after_step():
            bar.update()
            return p.step >= end

        if training.train_epoch(self.net, self.optimizer, loader, schedule(p.epoch), p,
                                self.config["label_smoothing"], after_step):
            self.progress = training.Progress(p.epoch + 1, step=p.step)

    def _chooser(self):
        return AutoBits(self.net, self.loader, self.recipe.alpha, self.config["label_smoothing"],
                        EVERY)

    def learn(self, epochs: int) -> None:
        """Some epochs more."""
        self.train(epochs * len(self.loader))

    def settle(self, anew: bool = False) -> None:
        """Be before the step ahead as the run is: its noise, its bits where they are automatic.

        anew  choose bits even if the run does not at this step
        """
        self.net.streams.step = self.progress.step
        if self.recipe.automatic and (anew or due(self.progress.step, EVERY)):
            self._chooser().choose(self.progress.step, self.batches(BATCHES))

    @property
    def layers(self) -> dict[str, Quantized]:
        """Name → quantized layer."""
        return {name: layer for name, layer in self.net.walk() if isinstance(layer, Quantized)}

    def use(self, recipe: str) -> None:
        """From here on other quantizers than the run's."""
        self.recipe = minifqt.recipe(recipe)
        self.config = self.config | {"recipe": recipe}
        for layer in self.layers.values():
            for place in PLACES:
                exchange(layer, place, getattr(self.recipe, place))
        self.settle(anew=True)

    def batches(self, count: int) -> list:
        """The next ones, (x, labels) each; augmented as in training."""
        return self.loader.following(self.progress.epoch, self.progress.position, count)

    def probe(self, seed: int) -> Probe:
        """The next batch in a probe."""
        return Probe(self.net, *self.batches(1)[0], seed, self.config["label_smoothing"])

    def __str__(self):
        c, p = self.config, self.progress
        where = f"epoch {p.epoch}" + (f", step {p.step}" if p.position else "")
        return (f"{c['model']} on {c['dataset']}, {c['recipe']}, seed {c['seed']}, {where}, "
                f"batch {c['batch_size']}")


def start_of(source: Path, step: int | None) -> tuple[dict, dict]:
    """(arrays, meta) of the latest checkpoint not later than `step`; no arrays: the start."""
    if source.suffix == ".safetensors":
        files = [source]
    else:
        files = [source / "last.safetensors", *source.glob("best.safetensors")]
    found = [checkpoint.load(file) for file in files]
    if step is None:
        return found[0]
    early = [pair for pair in found if pair[1]["progress"]["step"] <= step]
    return max(early, key=lambda pair: pair[1]["progress"]["step"],
               default=({}, {**found[0][1], "progress": {}}))


def points_of(run: str, step: int | None, data_dir: str, device: str) -> Iterator:
    """(name, Setting) of a run's start, best and last checkpoint, and `step`: in order."""
    folder, asked = folder_of(run), {0: ("start", 0)}
    if step is not None:
        asked[step] = (f"step {step}", step)
    for name in ("best", "last"):
        file = folder / f"{name}.safetensors"
        if file.exists():
            _, meta = checkpoint.load(file)
            asked[meta["progress"]["step"]] = (name, file)
    for _, (name, where) in sorted(asked.items()):
        at_step = isinstance(where, int)
        setting = Setting(str(folder if at_step else where), where if at_step else None, data_dir,
                          device=device)
        setting.train(setting.ahead)
        setting.settle()
        yield name, setting


def folder_of(run: str) -> Path:
    """The folder of a run, or of the run that this is a checkpoint of."""
    path = Path(run)
    return path.parent if path.suffix == ".safetensors" else path
