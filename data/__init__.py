"""Image data sets that fit in memory as bytes; `load(name)` gives the training and the test set.

A data set's own file (digits.py, cifar.py) only finds, checks and returns (images, labels); what
they mean for training is one `Dataset`. No pickle is ever read. Next: loader.py makes batches.
"""
from dataclasses import dataclass
from os import PathLike

import numpy as np

from data import cifar, digits

NAMES = ("digits", *cifar.SOURCES)


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images and the statistics that normalise them.  ValueError where the parts disagree.

    images     (N, H, W, C) uint8; anything with shape, dtype and [array of indices] will do
    labels     (N,) int64 in 0 .. classes - 1
    names      one for each class
    mean, std  (C,) float32, per channel over the *training* set's pixels scaled to 0..1
    """

    images: np.ndarray
    labels: np.ndarray
    classes: int
    names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    def __post_init__(self):
        shape, count = self.images.shape, len(self.labels)
        if self.images.dtype != np.uint8 or len(shape) != 4:
            raise ValueError(f"images {shape} {self.images.dtype}: expected (N, H, W, C) uint8.")
        if self.labels.dtype != np.int64 or self.labels.shape != shape[:1] or count == 0:
            raise ValueError(f"labels {self.labels.shape} {self.labels.dtype}: expected int64, one "
                             f"for each of {shape[0]} images, and at least one.")
        low, high = self.labels.min(), self.labels.max()
        if low < 0 or high >= self.classes:
            raise ValueError(f"labels {low}..{high}: expected 0..{self.classes - 1}.")
        if len(self.names) != self.classes:
            raise ValueError(f"{len(self.names)} names: expected one for each of the "
                             f"{self.classes} classes.")
        for name, value in (("mean", self.mean), ("std", self.std)):
            if value.dtype != np.float32 or value.shape != shape[3:]:
                raise ValueError(f"{name} {value.shape} {value.dtype}: "
                                 f"expected {shape[3:]} float32.")
        if not (self.std > 0).all():
            raise ValueError(f"std {self.std}: expected > 0; a constant channel cannot "
                             "be normalised: leave it out.")

    def __len__(self) -> int:
        return len(self.labels)


def load(name: str, folder: str | PathLike | None = None,
         download: bool = False) -> tuple[Dataset, Dataset]:
    """(training set, test set) of "digits", "cifar10" or "cifar100".

    folder    where CIFAR's files or its archive are or shall be; the digits come with minifqt
    download  fetch what is missing into folder
    Errors: ValueError for an unknown name or a damaged file, FileNotFoundError, ConnectionError.
    """
    if name not in NAMES:
        raise ValueError(f"dataset {name!r}: expected one of {', '.join(NAMES)}.")
    if name == "digits":
        train, test = digits.read()
        names, (mean, std) = digits.NAMES, channel_statistics(train[0])
    else:
        source = cifar.SOURCES[name]
        train, test = cifar.read(source, folder, download)
        names, mean, std = source.names, np.float32(source.mean), np.float32(source.std)
    return (Dataset(*train, len(names), names, mean, std),
            Dataset(*test, len(names), names, mean, std))


def channel_statistics(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation of each channel, pixels scaled to 0..1: (C,) float32 each.

    From counts of the 256 values in float64, so large sets cost no copy in floating point.
    """
    values = np.arange(256) / 255
    share = np.stack([np.bincount(channel.ravel(), minlength=256) / channel.size
                      for channel in np.moveaxis(images, -1, 0)])         # (C, 256)
    mean = share @ values                                                 # (C,)
    variance = (share * (values - mean[:, None]) ** 2).sum(axis=1)        # (C,), two passes
    return mean.astype(np.float32), np.sqrt(variance).astype(np.float32)
