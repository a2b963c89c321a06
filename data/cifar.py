"""CIFAR-10 and CIFAR-100 from the official *binary* version: plain records, no pickle.

Source: A. Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
https://www.cs.toronto.edu/~kriz/cifar.html, which gives the format and the archives' md5 and states
no licence. All that differs between the two sets is in two `Source` values at the end.
"""
import hashlib
import os
import shlex
import shutil
import tarfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.download import fetch, file_md5

PIXELS = 3 * 32 * 32                                      # a record: labels, 1024 R, 1024 G, 1024 B


@dataclass(frozen=True)
class File:
    """One .bin file of a set: its name, how many records it holds, and its checksum."""

    name: str
    records: int
    sha1: str | None = None                               # None: no published one is known


@dataclass(frozen=True)
class Source:
    """Where one set comes from and all that is known about it.

    subfolder     of the archive's members, and of folder where they are unpacked to
    label_limits  classes of each label byte that opens a record; the last byte is the label
    mean, std     per channel over the training set, pixels scaled to 0..1
    """

    name: str
    url: str
    md5: str
    subfolder: str
    train: tuple[File, ...]
    test: tuple[File, ...]
    label_limits: tuple[int, ...]
    names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def files(self) -> tuple[File, ...]:
        return self.train + self.test

    @property
    def record_bytes(self) -> int:
        return len(self.label_limits) + PIXELS

    def command(self, folder) -> str:
        """What a user types to get the files."""
        where = "DIR" if folder is None else shlex.quote(str(folder))
        return f"`python train.py --dataset {self.name} --data-dir {where} --download`"


def read(source: Source, folder: str | os.PathLike | None,
         download: bool = False) -> tuple[tuple, tuple]:
    """((images, labels), (images, labels)) of training and test set, in the official order.

    folder   holds the .bin files, or source.subfolder with them, or the .tar.gz (then unpacked)
    images   (N, 32, 32, 3) uint8;  labels  (N,) int64
    Errors: FileNotFoundError; ValueError for a file of wrong size, checksum or labels.
    """
    directory = _find(source, None if folder is None else Path(folder), download)
    command = source.command(folder)
    return tuple(_read_files(source, directory, files, command)
                 for files in (source.train, source.test))


def _find(source, folder, download) -> Path:
    """The directory that holds all files, after unpacking what is missing."""
    if folder is None:
        raise FileNotFoundError(f"{source.name}: no folder was given. To download it into DIR: "
                                f"{source.command(folder)}.")
    here = any((folder / file.name).exists() for file in source.files)
    directory = folder if here else folder / source.subfolder
    missing = [file for file in source.files if not (directory / file.name).exists()]
    if not missing:
        return directory
    archive = folder / source.url.rpartition("/")[2]
    if download:
        fetch(source.url, archive, source.md5)            # returns at once if it is there and right
    elif not archive.exists():
        raise FileNotFoundError(f"{source.name}: {directory / missing[0].name} is missing, and so "
                                f"is {archive}. To download it: {source.command(folder)}.")
    elif (found := file_md5(archive)) != source.md5:
        raise ValueError(f"{archive}: md5 {found}, expected {source.md5}: truncated or altered. "
                         f"Delete it and run {source.command(folder)}.")
    _unpack(source, archive, directory, missing)
    return directory


def _unpack(source, archive, directory, missing):
    """Only expected members, only to names chosen here: no path, link or mode is the archive's."""
    wanted = {f"{source.subfolder}/{file.name}": directory / file.name for file in missing}
    directory.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            if not member.isfile() or member.name not in wanted:
                continue
            path = wanted.pop(member.name)
            part = path.with_name(path.name + ".part")    # a killed run leaves no truncated .bin
            with tar.extractfile(member) as packed, open(part, "wb") as unpacked:
                shutil.copyfileobj(packed, unpacked)
            os.replace(part, path)
    if wanted:
        raise ValueError(f"{archive}: no member {', '.join(wanted)}, though its md5 is right: "
                         f"the description of {source.name} in data/cifar.py does not fit it.")


def _read_files(source, directory, files, command):
    count = sum(file.records for file in files)
    images, labels = np.empty((count, 32, 32, 3), np.uint8), np.empty(count, np.int64)
    first = 0
    for file in files:
        records = _read_records(source, directory / file.name, file, command)
        part = slice(first, first + file.records)
        planes = records[:, -PIXELS:].reshape(-1, 3, 32, 32)                  # (N, C, H, W)
        images[part] = planes.transpose(0, 2, 3, 1)                           # (N, H, W, C)
        labels[part] = records[:, len(source.label_limits) - 1]
        first += file.records
    return images, labels


def _read_records(source, path, file, command):
    """(records, record_bytes) uint8, checked."""
    size, expected = path.stat().st_size, file.records * source.record_bytes
    if size != expected:
        raise ValueError(f"{path}: {size} bytes, expected {expected} ({file.records} records of "
                         f"{source.record_bytes}). Delete it and run {command}.")
    records = np.fromfile(path, np.uint8).reshape(file.records, source.record_bytes)
    if file.sha1 is not None:
        found = hashlib.sha1(records, usedforsecurity=False).hexdigest()
        if found != file.sha1:
            raise ValueError(f"{path}: sha1 {found}, expected {file.sha1}: it was altered. "
                             f"Delete it and run {command}.")
    for position, limit in enumerate(source.label_limits):
        worst = records[:, position].argmax()
        if records[worst, position] >= limit:
            raise ValueError(f"{path}: label byte {position} of record {worst} is "
                             f"{records[worst, position]}, expected 0..{limit - 1}. "
                             f"Delete it and run {command}.")
    return records


SOURCES = {
    "cifar10": Source(
        name="cifar10",
        url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
        md5="c32a1d4ab5d03f1284b67883e8d87530",
        subfolder="cifar-10-batches-bin",
        train=(                                           # sha1: Apache MXNet's CIFAR-10 loader
            File("data_batch_1.bin", 10_000, "aadd24acce27caa71bf4b10992e9e7b2d74c2540"),
            File("data_batch_2.bin", 10_000, "c0ba65cce70568cd57b4e03e9ac8d2a5367c1795"),
            File("data_batch_3.bin", 10_000, "1dd00a74ab1d17a6e7d73e185b69dbf31242f295"),
            File("data_batch_4.bin", 10_000, "aab85764eb3584312d3c7f65fd2fd016e36a258e"),
            File("data_batch_5.bin", 10_000, "26e2849e66a845b7f1e4614ae70f4889ae604628"),
        ),
        test=(File("test_batch.bin", 10_000, "67eb016db431130d61cd03c7ad570b013799c88c"),),
        label_limits=(10,),
        names=tuple("airplane automobile bird cat deer dog frog horse ship truck".split()),
        mean=(0.49139968, 0.48215841, 0.44653091),        # computed from the training files
        std=(0.24703223, 0.24348513, 0.26158784),
    ),
    "cifar100": Source(
        name="cifar100",
        url="https://www.cs.toronto.edu/~kriz/cifar-100-binary.tar.gz",
        md5="03b5dce01913d631647c71ecec9e9cb8",
        subfolder="cifar-100-binary",
        train=(File("train.bin", 50_000),),
        test=(File("test.bin", 10_000),),
        label_limits=(20, 100),                           # coarse, fine
        names=tuple("""
            apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge
            bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud
            cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox
            girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man
            maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter palm_tree
            pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
            road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel
            streetcar sunflower sweet_pepper table tank telephone television tiger tractor train
            trout tulip turtle wardrobe whale willow_tree wolf woman worm
            """.split()),
        mean=(0.50707516, 0.48654887, 0.44091784),        # the values in common use, not recomputed
        std=(0.26733429, 0.25643846, 0.27615047),
    ),
}
