"""The program: one training step, one epoch, one evaluation. Read `train_step`, then a model.

It knows neither data sets nor flags nor files: train.py makes the first two, run.py the last.
"""
import math
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from minifqt.backend import array_module, one_blas_thread, to_cpu
from minifqt.layers.base import Layer, Quantized
from minifqt.losses import cross_entropy
from minifqt.rng import NonFiniteError


@one_blas_thread()                                        # minifqt's own threads share its work
def train_step(net, optimizer, x, labels, lr, step, label_smoothing=0.0):
    """One step on x (N, H, W, C), labels (N,); returns the loss."""
    net.streams.step = step                               # all noise is a function of it
    logits = net.forward(x)                               # (N, classes)
    loss, dlogits = cross_entropy(logits, labels, label_smoothing)
    net.backward(dlogits)                                 # assigns every Param.grad
    optimizer.step(net.params(), lr)
    return loss


@dataclass
class Progress:
    """Where a run stands; part of each checkpoint, so that resuming works inside an epoch."""

    epoch: int = 0                                        # the one under way
    position: int = 0                                     # its steps that are done
    step: int = 0                                         # all steps that are done
    best_acc: float = -1.0
    loss_sum: float = 0.0                                 # over this epoch's images so far
    correct: int = 0
    images: int = 0
    seconds: float = 0.0


class DivergedError(RuntimeError):
    """Loss, activations or gradients are not finite; says what first was not."""


def train_epoch(net, optimizer, loader, lr, progress, label_smoothing=0.0, after_step=None):
    """The rest of epoch `progress.epoch`, from `progress.position` on; updates progress.

    after_step  called after every step but the last; the epoch stops where it returns true
    Returns whether the epoch is complete. Raises DivergedError.
    """
    watched, device = Watched(net.train()), net.streams.device
    batches = loader.epoch(progress.epoch, start=progress.position)
    bar = tqdm(batches, f"epoch {progress.epoch + 1}", len(loader), leave=False, disable=None,
               initial=progress.position, unit="step", smoothing=0.05)
    try:
        for x, labels in bar:
            x, labels = device.asarray(x), device.asarray(labels)
            loss = checked_step(watched, optimizer, x, labels, lr, progress, label_smoothing)
            progress.step, progress.position = progress.step + 1, progress.position + 1
            progress.loss_sum += loss * len(x)
            progress.correct += int((watched.logits.argmax(axis=1) == labels).sum())
            progress.images += len(x)
            bar.set_postfix(loss=f"{progress.loss_sum / progress.images:.3f}",
                            acc=f"{progress.correct / progress.images:.3f}", refresh=False)
            if progress.position < len(loader) and after_step and after_step():
                return False
    finally:
        bar.close()
        batches.close()                                   # stops the loader's threads
    return True


@np.errstate(over="ignore", invalid="ignore", divide="ignore")   # non-finite is looked for below
def checked_step(net, optimizer, x, labels, lr, progress, label_smoothing):
    """train_step whose loss is a finite float, else DivergedError with the place of origin."""
    try:
        loss = train_step(net, optimizer, x, labels, lr, progress.step, label_smoothing)
        loss = float(to_cpu(loss))                        # sync
        net.streams.raise_pending()
        if math.isfinite(loss):
            return loss
        what = f"the loss is {loss}."
    except NonFiniteError as error:
        what = str(error)
    raise DivergedError(f"step {progress.step}, epoch {progress.epoch + 1}: {what} First not "
                        f"finite: {first_nonfinite(net, x)}.")


@np.errstate(over="ignore", invalid="ignore", divide="ignore")   # a quantizer raises it
def evaluate(net, loader, label_smoothing=0.0):
    """Mean loss and accuracy per image over loader.epoch(0), in evaluation mode; then as before.

    loader  whatever yields (x, labels) there, as data.loader.Loader does
    """
    device, total, correct, images = net.streams.device, 0.0, 0, 0
    with same_modes(net):
        net.eval()
        for x, labels in loader.epoch(0):
            x, labels = device.asarray(x), device.asarray(labels)
            logits = net.forward(x)
            loss, _ = cross_entropy(logits, labels, label_smoothing)
            total += float(to_cpu(loss)) * len(x)
            correct += int((logits.argmax(axis=1) == labels).sum())
            images += len(x)
        net.streams.raise_pending()
    return total / images, correct / images


@contextmanager
def same_modes(net: Layer):
    """Afterwards each layer is in training or evaluation as it was before."""
    before = [(layer, layer.training) for _, layer in net.walk()]
    try:
        yield
    finally:
        for layer, training in before:
            layer.training = training
            if isinstance(layer, Quantized):
                layer.q.act.training = training


class Watched:
    """A net whose last logits can be read: train_step returns the loss alone."""

    def __init__(self, net):
        self._net, self.logits = net, None

    def forward(self, x):
        self.logits = self._net.forward(x)
        return self.logits

    def __getattr__(self, name):
        return getattr(self._net, name)


def first_nonfinite(net, x) -> str:
    """The first parameter, or in one more forward the first layer, that is not finite."""
    def bad(array):
        return not bool(array_module(array).isfinite(array).all())

    for name, p in net.params().items():
        if bad(p.data):
            return f"the parameter {name}"
    found, leaves = [], [layer for _, layer in net.walk() if not list(layer.children())]
    for layer in leaves:
        def watched(x, layer=layer, forward=layer.forward):
            y = forward(x)
            if bad(y):
                found.append(f"the output of {layer.name}")
            return y

        layer.forward = watched
    try:
        net.forward(x)
    except NonFiniteError as error:                       # a quantizer met it
        found.append(error.name)
    finally:
        for layer in leaves:
            del layer.forward
    return found[0] if found else "a gradient; the forward pass is finite"
