"""Batches of a data set, prepared a few ahead in background threads.

What a batch holds is a function of (seed, epoch, position in it) alone: not of threads, timing or
the step where an epoch was entered, so a resumed run sees the batches of an unbroken one. Not an
endless iterator and no sampler framework: `for x, labels in loader.epoch(e)` is all of it.
"""
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import islice

import numpy as np

from data import Dataset
from data.augment import normalize, pad_crop_flip
from minifqt.rng import Streams

AHEAD = 3                                                 # batches beyond those being made


class Loader:
    """`loader.epoch(e)` yields len(loader) batches: x (N, H, W, C) float32, labels (N,) int64.

    streams    order of epoch e: stream "data.order", step e; augmentation: stream "data.augment",
               step e · len(loader) + i.  None will do where train is False
    train      shuffled and augmented; otherwise in the set's order and as it is
    padding    pixels of random shift, 0 for none;  flip  mirrors half of the images
    drop_last  leave out an incomplete last batch; None: in training only
    workers    threads; changes speed and never a number
    """

    def __init__(self, dataset: Dataset, batch_size: int, streams: Streams | None, train: bool,
                 padding: int = 0, flip: bool = False, drop_last: bool | None = None,
                 workers: int = 1):
        if batch_size < 1 or workers < 1 or padding < 0:
            raise ValueError(f"batch_size {batch_size}, workers {workers}, padding {padding}: "
                             "expected at least 1, 1 and 0.")
        if train and streams is None:
            raise ValueError("training batches need streams, minifqt.rng.Streams(seed): "
                             "the order is drawn from them.")
        if not train and (padding or flip):
            raise ValueError(f"padding {padding}, flip {flip}: only training batches are "
                             "augmented; leave both out, or set train=True.")
        self.dataset, self.batch_size, self.streams = dataset, batch_size, streams
        self.train, self.padding, self.flip, self.workers = train, padding, flip, workers
        self.drop_last = train if drop_last is None else drop_last
        if len(self) == 0:
            raise ValueError(f"batch_size {batch_size} is more than the {len(dataset)} images, and "
                             f"incomplete batches are left out. Take a batch_size of at most "
                             f"{len(dataset)}, or drop_last=False.")

    def __len__(self) -> int:
        whole, rest = divmod(len(self.dataset), self.batch_size)
        return whole + (rest > 0 and not self.drop_last)

    def epoch(self, e: int, start: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The batches start .. len - 1 of epoch e.  Leaving early stops the threads.

        An error in a thread is raised here, at the batch that it belongs to.
        """
        if e < 0 or not 0 <= start <= len(self):
            raise ValueError(f"epoch {e} from step {start}: expected an epoch ≥ 0 and a step "
                             f"in 0..{len(self)}.")
        return self._prefetched(e, start)

    def following(self, e: int, start: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """`count` batches from step `start` of epoch e on, and on into the epochs after it."""
        found = []
        while len(found) < count:
            with closing(self.epoch(e, start)) as batches:
                found += islice(batches, count - len(found))
            e, start = e + 1, 0
        return found

    def _prefetched(self, e, start):
        order = self._order(e)
        steps = iter(range(start, len(self)))
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="data.loader")
        waiting = deque()                                 # in order, whoever finishes first

        def submit(count):
            waiting.extend(pool.submit(self._batch, order, e, i) for i in islice(steps, count))

        try:
            submit(self.workers + AHEAD)
            while waiting:
                batch = waiting.popleft().result()
                submit(1)                                 # made while this one is used
                yield batch
        finally:                                          # also when the consumer breaks off
            pool.shutdown(cancel_futures=True)            # waits for those being made, no more

    def _order(self, e):
        count = len(self.dataset)
        if not self.train:
            return np.arange(count)
        return self.streams.stream("data.order").generator(step=e).permutation(count)

    def _batch(self, order, e, i):
        chosen = order[i * self.batch_size:(i + 1) * self.batch_size]
        images = self.dataset.images[chosen]              # (N, H, W, C) uint8
        if self.padding or self.flip:
            generator = self.streams.stream("data.augment").generator(step=e * len(self) + i)
            images = pad_crop_flip(images, generator, self.padding, self.flip)
        x = normalize(images, self.dataset.mean, self.dataset.std)
        return x, self.dataset.labels[chosen]
