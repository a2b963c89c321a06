"""How noisy the quantized gradients are: relative variance against bits, for each quantizer.

A small network is trained, the gradients that enter its quantized layers on one batch are kept,
and each quantizer states its exact variance for them: no sampling, hence no error bars. Every
quantizer sees the same gradients. It draws docs/variance.png where matplotlib is installed.
"""
import argparse
import io
import json
import sys
from pathlib import Path

import machine
import numpy as np

sys.path.insert(0, str(machine.ROOT))                     # where minifqt, models and data are
import data
import minifqt
import models
import train
from data.loader import Loader
from minifqt import optim, training
from minifqt.layers import Quantized

BITS = range(2, 9)
QUANTIZERS = {                                            # colours: Okabe and Ito's, for all eyes
    "ptq": ("per tensor (PTQ)", "#D55E00", "o"),
    "ptqz": ("per tensor, integer zero (PTQZ)", "#E69F00", "s"),
    "psq": ("per sample (PSQ)", "#0072B2", "^"),
    "bhq": ("block Householder (BHQ)", "#009E73", "D"),
}


def parser():
    text = argparse.ArgumentParser(description=__doc__)
    add = text.add_argument
    add("--epochs", type=int, default=5, help="of training before the look; %(default)s")
    add("--recipe", default="bhq5", help="of that training; %(default)s")
    add("--seed", type=int, default=0, help="of weights, order and rounding; %(default)s")
    add("--threads", type=int, default=1, help="they change no number; %(default)s")
    add("--out", default="benchmarks/results", help="folder of the JSON file; %(default)s")
    add("--picture", default="docs/variance.png", help="where to draw; %(default)s")
    return text


def main(arguments=None):
    flags = parser().parse_args(arguments)
    if flags.epochs < 1:
        raise ValueError(f"--epochs {flags.epochs}: expected 1 or more.")
    minifqt.set_threads(flags.threads)
    result = machine.facts("variance", flags.seed, flags.threads)
    gradients, setting = trained_gradients(flags.recipe, flags.epochs, flags.seed)
    result |= setting | {"formula": "mean over the layers of sum Var[Q(dy)] / sum dy**2",
                         "rows": [row(name, bits, gradients)
                                  for name in QUANTIZERS for bits in BITS]}
    folder = Path(flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"variance-{setting['dataset']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))
    print(f"written: {path}\n{draw(result, Path(flags.picture))}")


def row(name, bits, gradients):
    """Σ Var[Q(dy)] / Σ dy² of each layer, and their mean."""
    q = minifqt.quantizers.create(name, bits=bits)
    layers = {layer: float(q.variance(dy).sum() / (dy.astype("float64") ** 2).sum())
              for layer, dy in gradients.items()}
    return {"quantizer": name, "bits": bits,
            "relative_variance": float(f"{np.mean(list(layers.values())):.6g}"),
            "layers": {layer: float(f"{value:.6g}") for layer, value in layers.items()}}


def trained_gradients(recipe, epochs, seed):
    """({layer: the dy (N, …) that enters it on the next batch}, how they came about)."""
    preset, defaults = train.PRESETS["digits"], train.parser().parse_args([])
    train_set, _ = data.load("digits")
    net = models.build(preset["model"], train_set.classes, recipe, seed,
                       channels=train_set.images.shape[-1])
    batches = Loader(train_set, preset["batch_size"], net.streams, train=True,
                     padding=preset["padding"], flip=preset["flip"])
    optimizer = minifqt.SGD(defaults.momentum, defaults.weight_decay)
    schedule = optim.SCHEDULES[defaults.schedule](defaults.lr, preset["epochs"], defaults.warmup)
    progress = training.Progress()
    for epoch in range(epochs):
        training.train_epoch(net, optimizer, batches, schedule(epoch), progress)
        loss = progress.loss_sum / progress.images
        progress = training.Progress(epoch=epoch + 1, step=progress.step)
    x, labels = next(batches.epoch(epochs))
    return gradients_of(net, x, labels, progress.step), {
        "dataset": "digits", "model": preset["model"], "recipe": recipe, "epochs": epochs,
        "batch": len(x), "train_loss": round(loss, 6)}


def gradients_of(net, x, labels, step):
    """What each layer gives to its grad_x quantizer in one backward, looked at from outside."""
    seen = {}

    def watched(inner, name):
        def grad_x(dy):
            seen[name] = dy
            return inner(dy)

        return grad_x

    for name, layer in net.walk():
        if isinstance(layer, Quantized):
            layer.q.grad_x = watched(layer.q.grad_x, name)
    net.streams.step = step
    _, dlogits = minifqt.cross_entropy(net.forward(x), labels)
    net.backward(dlogits)
    return {name: seen[name] for name, layer in net.walk() if name in seen}


def table(result):
    """Markdown: relative variance, one row a quantizer."""
    lines = [f"{result['model']} on {result['dataset']} after {result['epochs']} epochs of "
             f"{result['recipe']}, training loss {result['train_loss']:.3f}; {result['formula']}",
             machine.describe(result), "",
             "| quantizer | " + " | ".join(f"{bits} bits" for bits in BITS) + " |",
             "|---|" + "---|" * len(BITS)]
    for name in QUANTIZERS:
        values = [row["relative_variance"] for row in result["rows"] if row["quantizer"] == name]
        lines.append(f"| {name} | {' | '.join(f'{value:.2g}' for value in values)} |")
    return "\n".join(lines)


def draw(result, path):
    """Draw the picture; returns a line that says where it is, or what is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path} not drawn: matplotlib is missing; pip install -r requirements-dev.txt"
    figure = Figure(figsize=(6.4, 4.2), dpi=150, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    for name, (label, colour, marker) in QUANTIZERS.items():
        values = [row["relative_variance"] for row in result["rows"] if row["quantizer"] == name]
        axes.plot(BITS, values, color=colour, marker=marker, markersize=5, label=label)
    axes.set_yscale("log")
    axes.set_xticks(BITS)
    axes.set_xlabel("bits of the gradient")
    axes.set_ylabel("variance / squared norm, mean over layers")
    axes.set_title(f"Noise that quantization adds to the gradients\n({result['model']} on "
                   f"{result['dataset']}, after {result['epochs']} epochs)", fontsize=11)
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return save_picture(figure, path)


def save_picture(figure, path):
    """Write it in 64 colours, for its size; returns a line that says where it is."""
    from PIL import Image
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = io.BytesIO()
    figure.savefig(pixels)
    Image.open(pixels).convert("RGB").quantize(64).save(path, optimize=True)
    return f"written: {path}"


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
