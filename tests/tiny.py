"""Tiny runs on the first digits, batches and networks, shared by tests."""
from dataclasses import replace

import numpy as np

import data
import minifqt
import models
from data.loader import Loader
from minifqt import optim
from minifqt.layers import BatchNorm2d, Conv2d, ReLU, Sequential, build
from minifqt.run import Run

LOAD = data.load


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


def batch(shape, classes=10):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape, dtype="float32"), np.arange(shape[0]) % classes


def normed_conv(channels, recipe="bhq5"):
    """Batch norm, ReLU and a convolution, fused."""
    return minifqt.fuse(build(Sequential(
        BatchNorm2d(8), ReLU(), Conv2d(8, channels, 3, padding=1)), recipe))
