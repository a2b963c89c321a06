"""The data sets: what `data.load` promises, and that damaged, missing or foreign files are refused.

CIFAR is tested on small files of the exact format; the tests on the real files need the environment
variable MINIFQT_DATA, a folder that holds cifar-10-batches-bin.
"""
import hashlib
import os
from dataclasses import replace

import numpy as np
import pytest
from records import archive, synthetic

import data
from data import Dataset, cifar, digits

# ---------------------------------------------------------------------------------------- Dataset


def small(**changes):
    parts = dict(images=np.zeros((2, 4, 4, 3), np.uint8), labels=np.array([0, 1]), classes=2,
                 names=("a", "b"), mean=np.zeros(3, np.float32), std=np.ones(3, np.float32))
    return Dataset(**{**parts, **changes})


def test_a_dataset_is_frozen_and_as_long_as_its_labels():
    dataset = small()
    assert len(dataset) == 2
    with pytest.raises(AttributeError, match="cannot assign to field 'labels'"):
        dataset.labels = np.array([0, 0])


@pytest.mark.parametrize(("changes", "message"), [
    (dict(images=np.zeros((2, 4, 4, 3), np.float32)), r"float32: expected \(N, H, W, C\) uint8"),
    (dict(images=np.zeros((2, 4, 4), np.uint8)), r"images \(2, 4, 4\)"),
    (dict(labels=np.array([0, 1, 1])), "one for each of 2 images"),
    (dict(labels=np.array([0, 1], np.uint8)), "uint8: expected int64"),
    (dict(images=np.zeros((0, 4, 4, 3), np.uint8), labels=np.array([], np.int64)), "at least one"),
    (dict(labels=np.array([0, 2])), r"labels 0\.\.2: expected 0\.\.1"),
    (dict(labels=np.array([-1, 1])), r"labels -1\.\.1: expected 0\.\.1"),
    (dict(names=("a",)), "1 names: expected one for each of the 2 classes"),
    (dict(mean=np.zeros(3)), r"mean \(3,\) float64: expected \(3,\) float32"),
    (dict(std=np.ones(1, np.float32)), r"std \(1,\) float32: expected \(3,\) float32"),
    (dict(std=np.float32([1, 0, 1])), "expected > 0"),
])
def test_a_dataset_whose_parts_disagree_raises(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


def test_an_unknown_name_raises_and_lists_the_known_ones():
    with pytest.raises(ValueError, match="'mnist': expected one of digits, cifar10, cifar100"):
        data.load("mnist")


def test_channel_statistics_are_those_of_the_pixels_in_float64():
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
    images[..., 1] //= 3
    mean, std = data.channel_statistics(images)
    pixels = images.reshape(-1, 3) / 255
    np.testing.assert_allclose(mean, pixels.mean(axis=0), rtol=2e-7)      # one rounding to float32
    np.testing.assert_allclose(std, pixels.std(axis=0), rtol=2e-7)
    assert mean.dtype == std.dtype == np.float32


# ----------------------------------------------------------------------------------------- digits


def test_the_digits_are_1437_and_360_images_with_the_training_sets_statistics():
    train, test = data.load("digits")
    assert (train.images.shape, test.images.shape) == ((1437, 8, 8, 1), (360, 8, 8, 1))
    assert train.classes == 10
    assert train.names == tuple("0123456789")
    pixels = train.images / 255
    np.testing.assert_allclose(train.mean, [pixels.mean()], rtol=2e-7)    # one rounding to float32
    np.testing.assert_allclose(train.std, [pixels.std()], rtol=2e-7)
    assert test.mean == train.mean
    assert test.std == train.std


def test_the_digits_split_is_stratified_and_loses_no_image():
    train, test = data.load("digits")
    with np.load(digits.PATH, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    counts = np.bincount(labels)
    share = counts * 360 / 1797
    assert (abs(np.bincount(test.labels) - share) < 1).all()
    assert (np.bincount(test.labels) + np.bincount(train.labels) == counts).all()
    stored = sorted(image.tobytes() for image in images)
    both = np.rint(np.concatenate([train.images, test.images]) * (16 / 255)).astype(np.uint8)
    assert sorted(image.tobytes() for image in both) == stored


def test_the_digits_pixels_are_the_counts_0_to_16_spread_over_0_to_255():
    train, _ = data.load("digits")
    assert np.unique(train.images).tolist() == [int(count * 255 / 16 + 0.5) for count in range(17)]


def test_the_digits_labels_belong_to_the_images():
    train, test = data.load("digits")
    x, y = train.images.reshape(1437, -1).astype(float), test.images.reshape(360, -1).astype(float)
    distance = (y * y).sum(1)[:, None] - 2 * y @ x.T + (x * x).sum(1)     # (360, 1437), squared
    assert (train.labels[distance.argmin(axis=1)] == test.labels).mean() > 0.95


@pytest.mark.parametrize(("count", "total"), [(360, 1797), (1, 7), (3, 10), (10, 10)])
def test_the_split_rule_takes_exactly_as_many_as_asked(count, total):
    labels = np.random.default_rng(0).integers(0, 3, total)
    test = digits.in_test(labels, count)
    by_class = sorted(range(total), key=lambda i: labels[i])              # Python's sort is stable
    assert set(test.nonzero()[0].tolist()) == {
        i for position, i in enumerate(by_class) if position * count % total < count}
    assert test.sum() == count
    share = np.bincount(labels, minlength=3) * count / total
    assert (abs(np.bincount(labels[test], minlength=3) - share) <= 1).all()


def test_a_digits_file_with_one_other_pixel_raises(tmp_path):
    with np.load(digits.PATH, allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    images[100, 3, 3] ^= 1
    np.savez(tmp_path / "digits.npz", images=images, labels=labels)
    with pytest.raises(ValueError, match="sha256 of images is .*Restore it from the repository"):
        digits.read(tmp_path / "digits.npz")


def _truncated(content):
    return content[:20_000]


def _altered(content):
    return content[:9_000] + bytes([content[9_000] ^ 255]) + content[9_001:]


def _emptied(_):
    return b""


@pytest.mark.parametrize("damage", [_truncated, _altered, _emptied])
def test_a_damaged_digits_file_raises_and_names_it(tmp_path, damage):
    path = tmp_path / "digits.npz"
    path.write_bytes(damage(digits.PATH.read_bytes()))
    with pytest.raises(ValueError, match=r"digits\.npz: damaged .*Restore it from the repository"):
        digits.read(path)


# ------------------------------------------------------------------------------------------ CIFAR

COARSE, FINE = 20, 100


def write(folder, content):
    folder.mkdir(parents=True, exist_ok=True)
    for name, raw in content.items():
        (folder / name).write_bytes(raw)


@pytest.mark.parametrize(("name", "limits"), [("cifar10", (10,)), ("cifar100", (COARSE, FINE))])
@pytest.mark.parametrize("place", ["", "subfolder", "archive"])
def test_cifar_is_read_from_the_folder_its_subfolder_or_the_archive(tmp_path, name, limits, place):
    source, content, images, labels = synthetic(name, limits=limits)
    if place == "archive":
        write(tmp_path, {source.url.split("/")[-1]: archive(source.subfolder, content)})
    else:
        write(tmp_path / source.subfolder if place else tmp_path, content)
    train, test = cifar.read(source, tmp_path)
    assert (train[0] == np.concatenate(images[:-1])).all()
    assert (train[1] == np.concatenate(labels[:-1])).all()
    assert (test[0] == images[-1]).all()
    assert (test[1] == labels[-1]).all()
    assert train[0].dtype == np.uint8
    assert train[1].dtype == np.int64


def test_load_gives_cifar100_its_fine_labels_names_and_statistics(tmp_path, monkeypatch):
    source, content, _, labels = synthetic("cifar100", limits=(COARSE, FINE))
    monkeypatch.setitem(cifar.SOURCES, "cifar100", source)
    write(tmp_path, content)
    train, test = data.load("cifar100", tmp_path)
    assert (train.labels == labels[0]).all()
    assert (train.classes, len(set(train.names))) == (100, 100)
    assert (train.names[0], train.names[53], train.names[99]) == ("apple", "orange", "worm")
    assert train.mean.tolist() == test.mean.tolist() == np.float32(source.mean).tolist()
    assert train.std.tolist() == np.float32(source.std).tolist()


def test_unpacking_writes_the_expected_members_and_nothing_else(tmp_path):
    source, content, _, _ = synthetic("cifar100", limits=(COARSE, FINE))
    write(tmp_path / "inner", {"cifar-100-binary.tar.gz": archive(source.subfolder, content)})
    cifar.read(source, tmp_path / "inner")
    assert sorted(path.name for path in tmp_path.rglob("*") if not path.is_dir()) == [
        "cifar-100-binary.tar.gz", "test.bin", "train.bin"]


def test_a_missing_file_alone_is_unpacked_again_and_others_stay_as_they_are(tmp_path):
    source, content, images, _ = synthetic("cifar10")
    write(tmp_path, {"cifar-10-binary.tar.gz": archive(source.subfolder, content)})
    cifar.read(source, tmp_path)
    folder = tmp_path / source.subfolder
    before = (folder / "test_batch.bin").stat().st_mtime_ns
    (folder / "data_batch_3.bin").unlink()
    train, _ = cifar.read(source, tmp_path)
    assert (train[0][12:18] == images[2]).all()
    assert (folder / "test_batch.bin").stat().st_mtime_ns == before


def test_missing_data_says_what_was_looked_for_and_the_command_that_gets_it(tmp_path):
    message = ("cifar-10-batches-bin/data_batch_1.bin is missing, and so is .*/cifar-10-binary.tar"
               f".gz.*`python train.py --dataset cifar10 --data-dir {tmp_path} --download`")
    with pytest.raises(FileNotFoundError, match=message):
        data.load("cifar10", tmp_path)


def test_no_folder_says_the_command_with_a_place_to_fill_in():
    with pytest.raises(FileNotFoundError,
                       match="`python train.py --dataset cifar100 --data-dir DIR --download`"):
        data.load("cifar100")


def test_a_folder_with_a_blank_is_quoted_in_the_command(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data-dir '.*my data' --download`"):
        data.load("cifar10", tmp_path / "my data")


def test_a_truncated_cifar_file_raises_with_both_sizes(tmp_path):
    source, content, _, _ = synthetic("cifar10")
    content["data_batch_2.bin"] = content["data_batch_2.bin"][:-1]
    write(tmp_path, content)
    with pytest.raises(ValueError, match=r"data_batch_2.bin: 18437 bytes, expected 18438 \(6 "
                                         r"records of 3073\). Delete it and run .*--download"):
        cifar.read(source, tmp_path)


def test_a_cifar_file_with_one_other_bit_raises(tmp_path):
    source, content, _, _ = synthetic("cifar10")
    raw = bytearray(content["test_batch.bin"])
    raw[5000] ^= 1
    write(tmp_path, {**content, "test_batch.bin": bytes(raw)})
    with pytest.raises(ValueError, match="test_batch.bin: sha1 .* altered. Delete it and run"):
        cifar.read(source, tmp_path)


@pytest.mark.parametrize(("byte", "value", "message"), [
    (0, COARSE, r"label byte 0 of record 2 is 20, expected 0\.\.19"),
    (1, FINE, r"label byte 1 of record 2 is 100, expected 0\.\.99"),
])
def test_a_label_out_of_range_raises_with_its_record(tmp_path, byte, value, message):
    source, content, _, _ = synthetic("cifar100", limits=(COARSE, FINE))
    raw = bytearray(content["test.bin"])
    raw[2 * 3074 + byte] = value
    write(tmp_path, {**content, "test.bin": bytes(raw)})
    with pytest.raises(ValueError, match=f"test.bin: {message}. Delete it and run"):
        cifar.read(source, tmp_path)


def test_an_altered_archive_raises_and_nothing_is_unpacked(tmp_path):
    source, content, _, _ = synthetic("cifar10")
    write(tmp_path, {"cifar-10-binary.tar.gz": archive(source.subfolder, content)[:-1]})
    with pytest.raises(ValueError, match="cifar-10-binary.tar.gz: md5 .* or altered. Delete it"):
        cifar.read(source, tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["cifar-10-binary.tar.gz"]


def test_an_archive_without_an_expected_member_raises(tmp_path):
    source, content, _, _ = synthetic("cifar10")
    del content["data_batch_4.bin"]
    packed = archive(source.subfolder, content)
    write(tmp_path, {"cifar-10-binary.tar.gz": packed})
    source = replace(source, md5=hashlib.md5(packed).hexdigest())
    with pytest.raises(ValueError, match="no member cifar-10-batches-bin/data_batch_4.bin"):
        cifar.read(source, tmp_path)


def test_a_link_in_the_place_of_a_member_is_not_followed(tmp_path):
    source, content, _, _ = synthetic("cifar100", limits=(COARSE, FINE))
    del content["test.bin"]
    packed = archive(source.subfolder, content, links=("test.bin",))
    write(tmp_path, {"cifar-100-binary.tar.gz": packed})
    source = replace(source, md5=hashlib.md5(packed).hexdigest())
    with pytest.raises(ValueError, match="no member cifar-100-binary/test.bin, though its md5"):
        cifar.read(source, tmp_path)


def test_the_official_sources_describe_60000_records_each():
    for source, size in ((cifar.SOURCES["cifar10"], 3073), (cifar.SOURCES["cifar100"], 3074)):
        assert sum(file.records for file in source.train) == 50_000
        assert sum(file.records for file in source.test) == 10_000
        assert source.record_bytes == size
        assert source.label_limits[-1] == len(source.names)


@pytest.fixture(scope="module")
def real_cifar10():
    folder = os.environ.get("MINIFQT_DATA")
    if not folder:
        pytest.skip("MINIFQT_DATA is not set to a folder that holds cifar-10-batches-bin")
    return data.load("cifar10", folder)


def test_real_cifar10_has_5000_and_1000_images_of_each_class(real_cifar10):
    train, test = real_cifar10
    assert np.bincount(train.labels).tolist() == [5000] * 10
    assert np.bincount(test.labels).tolist() == [1000] * 10
    assert [train.names[label] for label in train.labels[:3]] == ["frog", "truck", "truck"]


def test_the_statistics_in_the_source_are_those_of_the_real_training_set(real_cifar10):
    train, _ = real_cifar10
    mean, std = data.channel_statistics(train.images)
    np.testing.assert_allclose(mean, train.mean, rtol=1e-7)               # written with 8 digits
    np.testing.assert_allclose(std, train.std, rtol=1e-7)
