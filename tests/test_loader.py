"""Batches: what augmentation does, image by image; what a batch depends on; how the threads end."""
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from data import Dataset
from data.augment import normalize, pad_crop_flip
from data.loader import AHEAD, Loader
from minifqt.rng import Streams

# --------------------------------------------------------------------------------------- augment


def pad_crop_flip_reference(images, generator, padding=4, flip=True):
    """The same, one image and one pixel at a time."""
    N, H, W, _ = images.shape
    corner = generator.integers(0, 2 * padding + 1, (N, 2))
    mirrored = generator.random(N) < 0.5
    out = np.zeros_like(images)
    for i in range(N):
        for y in range(H):
            for x in range(W):
                column = W - 1 - x if flip and mirrored[i] else x
                row, column = y + corner[i, 0] - padding, column + corner[i, 1] - padding
                if 0 <= row < H and 0 <= column < W:
                    out[i, y, x] = images[i, row, column]
    return out


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4])
@pytest.mark.parametrize("shape", [(1, 8, 8, 1), (20, 6, 9, 3), (7, 5, 4, 2)])
def test_pad_crop_flip_is_its_reference(shape, padding, flip):
    images = np.random.default_rng(0).integers(1, 256, shape, dtype=np.uint8)
    out = pad_crop_flip(images, np.random.default_rng(1), padding, flip)
    assert (out == pad_crop_flip_reference(images, np.random.default_rng(1), padding, flip)).all()


def test_pad_crop_flip_takes_every_second_image_and_leaves_its_input_alone():
    images = np.random.default_rng(0).integers(1, 256, (10, 6, 6, 3), dtype=np.uint8)
    before = images.copy()
    out = pad_crop_flip(images[::2], np.random.default_rng(1))
    assert (out == pad_crop_flip(images[::2].copy(), np.random.default_rng(1))).all()
    assert (images == before).all()
    assert not np.shares_memory(pad_crop_flip(images, np.random.default_rng(1), 0, False), images)


def test_every_shift_and_both_mirrorings_are_equally_likely():
    N = 8100
    images = np.zeros((N, 9, 9, 1), np.uint8)
    images[:, 4, 4], images[:, 4, 5] = 200, 100           # in view after any shift by 3
    out = pad_crop_flip(images, np.random.default_rng(0), padding=3)[..., 0]
    place = (out == 200).reshape(N, -1).argmax(axis=1)
    mirrored = out.reshape(N, -1)[np.arange(N), place - 1] == 100
    counts = np.bincount(place, minlength=81).reshape(9, 9)
    assert (counts > 0).sum() == 49                       # shifts -3..3 in both directions
    for seen, p in ((counts[1:8, 1:8], 1 / 49), (mirrored.sum(), 1 / 2)):
        assert (abs(seen - N * p) < 5 * np.sqrt(N * p * (1 - p))).all()   # 5 standard deviations


@pytest.mark.parametrize(("images", "padding", "message"), [
    (np.zeros((2, 4, 4, 3), np.float32), 4, r"float32: expected \(N, H, W, C\) uint8"),
    (np.zeros((4, 4, 3), np.uint8), 4, r"images \(4, 4, 3\)"),
    (np.zeros((2, 4, 4, 3), np.uint8), -1, "padding -1: expected a number of pixels ≥ 0"),
])
def test_pad_crop_flip_refuses_what_are_no_images(images, padding, message):
    with pytest.raises(ValueError, match=message):
        pad_crop_flip(images, np.random.default_rng(0), padding)


def test_normalize_is_float64s_result_to_the_rounding_of_its_constants():
    images = np.arange(256, dtype=np.uint8).repeat(3).reshape(4, 8, 8, 3)
    mean, std = np.float32([0.5, 0.0, 0.44653091]), np.float32([0.25, 1.0, 0.26158784])
    x = normalize(images, mean, std)
    exact = (images / 255 - mean.astype(np.float64)) / std.astype(np.float64)
    bound = (1 + mean.astype(np.float64)) / std * 2.0 ** -23      # four roundings of at most 2**-24
    assert x.dtype == np.float32
    assert (abs(x - exact) <= 2 * bound).all()


@pytest.mark.parametrize(("images", "channels"), [
    (np.zeros((2, 4, 4, 3), np.float32), 3), (np.zeros((2, 4, 4, 3), np.uint8), 1)])
def test_normalize_refuses_floats_and_statistics_of_other_channels(images, channels):
    with pytest.raises(ValueError, match=r"expected \(…, H, W, C\) uint8 and twice \(C,\)"):
        normalize(images, np.zeros(channels, np.float32), np.ones(channels, np.float32))


# ---------------------------------------------------------------------------------------- loader


class Images:
    """Images that count the batches taken from them, and fail or wait where they are told to."""

    def __init__(self, count, fail_at=None, seconds=0.0):
        self.array = np.random.default_rng(0).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        self.shape, self.dtype = self.array.shape, self.array.dtype
        self.fail_at, self.seconds, self.taken = fail_at, seconds, 0

    def __getitem__(self, chosen):
        self.taken += 1
        time.sleep(self.seconds)
        if self.fail_at is not None and self.fail_at in chosen:
            raise OSError(f"image {self.fail_at} cannot be read")
        return self.array[chosen]


def dataset(count=50, **options):
    return Dataset(Images(count, **options), np.arange(count), count,
                   tuple(map(str, range(count))), np.float32([0.5, 0.4, 0.3]),
                   np.float32([0.2, 0.25, 0.3]))


def training(seed=0, count=50, batch_size=8, workers=1, **options):
    return Loader(dataset(count), batch_size, Streams(seed), train=True, padding=2, flip=True,
                  workers=workers, **options)


def same(first, second):
    """Equal in number and bit for bit."""
    first, second = list(first), list(second)
    return len(first) == len(second) > 0 and all(
        (x == y).all() and (a == b).all() for (x, a), (y, b) in zip(first, second, strict=True))


def threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("data.loader")]


def test_a_training_batch_is_what_the_streams_say():
    loader, streams = training(seed=3), Streams(3)
    e, i = 2, 4
    x, labels = list(loader.epoch(e))[i]
    order = streams.stream("data.order").generator(step=e).permutation(50)
    chosen = order[i * 8:(i + 1) * 8]
    generator = streams.stream("data.augment").generator(step=e * 6 + i)
    images = pad_crop_flip_reference(loader.dataset.images.array[chosen], generator, 2, True)
    assert (x == normalize(images, loader.dataset.mean, loader.dataset.std)).all()
    assert (labels == chosen).all()
    assert (x.dtype, labels.dtype, x.shape) == (np.float32, np.int64, (8, 8, 8, 3))


@pytest.mark.parametrize("workers", [2, 5])
def test_the_number_of_workers_changes_nothing(workers):
    assert same(training(workers=workers).epoch(1), training().epoch(1))


def test_a_resumed_epoch_is_the_rest_of_an_unbroken_one():
    assert same(training().epoch(1, start=2), list(training().epoch(1))[2:])


def test_an_epoch_may_be_resumed_at_its_end():
    assert list(training().epoch(0, start=6)) == []


def test_the_streams_step_has_no_effect():
    loader = training()
    before = list(loader.epoch(1))
    loader.streams.step = 17
    assert same(loader.epoch(1), before)


def test_other_epochs_and_other_seeds_have_other_orders_and_other_crops():
    labels = [np.concatenate([labels for _, labels in loader.epoch(e)])
              for loader, e in ((training(), 0), (training(), 1), (training(seed=1), 0))]
    assert all((labels[i] != labels[j]).any() for i, j in ((0, 1), (0, 2), (1, 2)))
    crops = [dict(zip(labels.tolist(), x, strict=True)) for e in (0, 1)
             for x, labels in training(count=8).epoch(e)]
    assert any((crops[0][label] != crops[1][label]).any() for label in range(8))


def test_a_training_epoch_shows_no_image_twice_and_drops_the_incomplete_batch():
    loader = training()
    labels = np.concatenate([labels for _, labels in loader.epoch(0)])
    assert len(loader) == 6
    assert len(labels) == len(set(labels.tolist())) == 48


def test_the_incomplete_training_batch_is_kept_if_asked_for():
    loader = training(drop_last=False)
    labels = [labels for _, labels in loader.epoch(0)]
    assert [len(part) for part in labels] == [8] * 6 + [2]
    assert len(loader) == 7
    assert sorted(np.concatenate(labels).tolist()) == list(range(50))


def test_evaluation_is_in_order_whole_and_as_it_is():
    loader = Loader(dataset(), 8, None, train=False, workers=2)
    batches = list(loader.epoch(0))
    x, labels = (np.concatenate(part) for part in zip(*batches, strict=True))
    assert len(batches) == len(loader) == 7
    assert (labels == np.arange(50)).all()
    assert (x == normalize(loader.dataset.images.array, loader.dataset.mean,
                           loader.dataset.std)).all()
    assert same(loader.epoch(5), batches)


def test_a_batch_larger_than_the_dataset_raises_unless_it_may_be_incomplete():
    with pytest.raises(ValueError, match="batch_size 51 is more than the 50 images.*at most 50, or "
                                         "drop_last=False"):
        training(batch_size=51)
    assert len(training(batch_size=51, drop_last=False)) == 1
    assert len(Loader(dataset(), 51, None, train=False)) == 1


@pytest.mark.parametrize(("options", "message"), [
    (dict(batch_size=0), "batch_size 0, workers 1, padding 0: expected at least 1, 1 and 0"),
    (dict(workers=0), "workers 0"),
    (dict(padding=-1), "padding -1"),
    (dict(streams=None), "training batches need streams"),
    (dict(train=False, padding=4), "padding 4, flip False: only training batches are augmented"),
    (dict(train=False, flip=True), "flip True: only training batches are augmented"),
])
def test_arguments_that_make_no_loader_raise(options, message):
    with pytest.raises(ValueError, match=message):
        Loader(**{"dataset": dataset(), "batch_size": 8, "streams": Streams(0), "train": True,
                  **options})


@pytest.mark.parametrize(("e", "start"), [(-1, 0), (0, -1), (0, 7)])
def test_an_epoch_or_step_that_does_not_exist_raises_before_the_first_batch(e, start):
    with pytest.raises(ValueError, match=rf"epoch {e} from step {start}: .* in 0\.\.6"):
        training().epoch(e, start)


@pytest.mark.parametrize("workers", [1, 3])
def test_an_error_in_a_worker_is_raised_at_its_batch(workers):
    loader = Loader(dataset(fail_at=20), 8, None, train=False, workers=workers)
    batches = loader.epoch(0)
    assert [next(batches)[1][0], next(batches)[1][0]] == [0, 8]
    with pytest.raises(OSError, match="image 20 cannot be read"):
        next(batches)
    assert threads() == []


def test_a_few_batches_are_prepared_ahead_and_no_more():
    loader = Loader(dataset(count=400), 8, None, train=False)
    batches = loader.epoch(0)
    next(batches)
    ahead, images = 1 + AHEAD, loader.dataset.images      # by one worker, besides the one taken
    deadline = time.monotonic() + 5
    while images.taken < 1 + ahead and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.02)                                      # time enough for a hundred more
    assert images.taken == 1 + ahead
    batches.close()


def test_leaving_early_stops_the_threads_and_makes_no_further_batch():
    loader = Loader(dataset(count=400, seconds=0.1), 8, None, train=False)
    for _ in loader.epoch(0):
        assert len(threads()) == 1
        break
    assert threads() == []
    assert loader.dataset.images.taken < 2 + AHEAD        # those waiting would take 0.4 s


def test_an_interrupt_in_the_loop_stops_the_threads():
    def interrupted():
        for _ in training().epoch(0):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt, match="^$"):
        interrupted()
    assert threads() == []


def test_a_finished_epoch_leaves_no_thread():
    assert len(list(training(workers=3).epoch(0))) == 6
    assert threads() == []


def test_a_program_that_ends_in_the_middle_of_an_epoch_does_not_hang():
    program = ("import data; from data.loader import Loader; from minifqt.rng import Streams\n"
               "loader = Loader(data.load('digits')[0], 32, Streams(0), True, workers=2)\n"
               "batches = loader.epoch(0)\n"
               "next(batches)")
    done = subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parent.parent,
                          timeout=30, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
