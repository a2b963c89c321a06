"""Tiny runs on the first digits, batches and networks, shared by tests."""
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np

import data
import minifqt
import models
from data.loader import Loader
from minifqt import checkpoint, cross_entropy, optim
from minifqt.layers import BatchNorm2d, Conv2d, GlobalAvgPool2d, Linear, ReLU, Sequential, build
from minifqt.run import Run

LOAD = data.load
QUICK = (("BATCHES", 2), ("NOISY", 1), ("ROUNDS", 2))     # of minifqt.autobits


def digits(count=96):
    """The first `count` digits to train on and 40 to test with."""
    cut = [replace(part, images=part.images[:n], labels=part.labels[:n])
           for part, n in zip(LOAD("digits"), (count, 40), strict=True)]
    return tuple(cut)


def job(folder, recipe="bhq5", batch_size=32, save_minutes=10.0):
    train_set, test_set = digits()
    net = models.build("resnet8", 10, recipe, seed=3, channels=1)
    loaders = (Loader(train_set, batch_size, net.streams, train=True, padding=1),
               Loader(test_set, 16, net.streams, train=False))
    return Run(folder, net, minifqt.SGD(), {"recipe": recipe}, save_minutes), loaders


def train_all(run, loaders, epochs=3, say=lambda line: None):
    return run.train(*loaders, optim.cosine(0.1, 3), epochs, say=say)


def outcome(folder):
    """What a run of train.py came to: a digest of its arrays, test losses and learning rates."""
    arrays, _ = checkpoint.load(Path(folder) / "last.safetensors")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return checkpoint.digest(arrays, ""), [(m["test_loss"], m["lr"]) for m in lines]


class InterruptAt:
    """A loader that sends this process Ctrl-C before the step with this number."""

    def __init__(self, loader, number):
        self.loader, self.number, self.steps = loader, number, 0

    def __len__(self):
        return len(self.loader)

    def epoch(self, e, start=0):
        for batch in self.loader.epoch(e, start):
            if self.steps == self.number:
                os.kill(os.getpid(), signal.SIGINT)
            self.steps += 1
            yield batch


def probed(recipe="psq4", fused=False):
    """Two convolutions and a classifier, 0, 3 and 7, for studies."""
    net = build(Sequential(
        Conv2d(2, 4, 3, padding=1), BatchNorm2d(4), ReLU(), Conv2d(4, 6, 3, stride=2, padding=1),
        BatchNorm2d(6), ReLU(), GlobalAvgPool2d(), Linear(6, 3)), recipe, seed=5)
    return minifqt.fuse(net) if fused else net


def probed_batch(N=8):
    """A batch for it."""
    rng = np.random.default_rng(0)
    return rng.standard_normal((N, 6, 6, 2), dtype="float32"), np.arange(N) % 3


def batch(shape, classes=10):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, dtype="float32"), np.arange(shape[0]) % classes


def normed_conv(channels, recipe="bhq5"):
    """Batch norm, ReLU and a convolution, fused."""
    return minifqt.fuse(build(Sequential(
        BatchNorm2d(8), ReLU(), Conv2d(8, channels, 3, padding=1)), recipe))


def images(*shape):
    return np.random.default_rng(0).standard_normal(shape, dtype="float32")


def step(net, x):
    """One forward and backward; the labels are 0, 1, 2, …"""
    logits = net.forward(x)
    _, dlogits = cross_entropy(logits, np.arange(len(x)) % logits.shape[1])
    return net.backward(dlogits)
