"""Small CIFAR files of the exact format, and archives of them."""
import hashlib
import io
import tarfile
from dataclasses import replace

import numpy as np

from data import cifar


def synthetic(name, records=6, limits=(10,)):
    """(a Source of small files, their content by name, images, labels) in the official format."""
    rng = np.random.default_rng(0)
    official = cifar.SOURCES[name]
    content, images, labels = {}, [], []

    def file(official_file):
        pixels = rng.integers(0, 256, (records, 32, 32, 3), dtype=np.uint8)
        marks = [rng.integers(0, limit, records) for limit in limits]
        raw = b""
        for i in range(records):                          # the format as its authors describe it
            raw += bytes(int(mark[i]) for mark in marks)
            raw += b"".join(pixels[i, :, :, channel].tobytes() for channel in range(3))
        content[official_file.name] = raw
        images.append(pixels)
        labels.append(marks[-1])
        sha1 = hashlib.sha1(raw).hexdigest() if official_file.sha1 else None
        return cifar.File(official_file.name, records, sha1)

    train, test = tuple(map(file, official.train)), tuple(map(file, official.test))
    source = replace(official, train=train, test=test,
                     md5=hashlib.md5(archive(official.subfolder, content)).hexdigest())
    return source, content, images, labels


def archive(subfolder, content, links=("link.bin",)):
    """The .tar.gz of these files, the same bytes each time, with members that nobody wants."""
    members = {"../escaped.bin": b"no", f"{subfolder}/readme.html": b"hello",
               **{f"{subfolder}/{name}": raw for name, raw in content.items()}}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz", format=tarfile.GNU_FORMAT) as tar:
        for name in links:
            link = tarfile.TarInfo(f"{subfolder}/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "readme.html"
            tar.addfile(link)
        for name, raw in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))
    result = bytearray(packed.getvalue())
    result[4:8] = bytes(4)                                # gzip's time stamp
    return bytes(result)
