"""1,797 handwritten digits of 8×8 pixels that come with minifqt: for tests and a first run.

Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning
Repository, 1998, https://doi.org/10.24432/C50P49, licence CC BY 4.0; the copy of its test set in
scikit-learn (BSD-3-Clause). Changed: only the container (digits.npz, written by make_digits.py).
"""
import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("digits.npz")
NAMES = tuple("0123456789")
TEST = 360                                                # of 1,797: a fifth
SHA256 = {                                                # of the arrays' bytes, C order
    "images": "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3",
    "labels": "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0",
}


def read(path: Path = PATH) -> tuple[tuple, tuple]:
    """((images, labels), (images, labels)) of 1,437 training and 360 test digits, in file order.

    images  (N, 8, 8, 1) uint8: the stored counts 0..16 times 255/16, rounded half up
    labels  (N,) int64
    Errors: ValueError if the file is not the one that was shipped.
    """
    images, labels = _stored(path)
    images = ((images.astype(np.uint16) * 255 + 8) // 16).astype(np.uint8)[..., None]
    test = in_test(labels)
    return (images[~test], labels[~test]), (images[test], labels[test])


def in_test(labels: np.ndarray, count: int = TEST) -> np.ndarray:
    """Which images are test images, (N,) bool: a rule, no draw; classes within ±1 of their share.

    Sort by class, keeping the file's order within each; the image at position p is a test image if
    p · count mod N < count: an even comb over all classes. Writers are not kept apart.
    """
    position = np.empty(len(labels), np.int64)
    position[labels.argsort(kind="stable")] = np.arange(len(labels))
    return position * count % len(labels) < count


def _stored(path):
    try:
        with open(path, "rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in SHA256}
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}). Restore it from the repository.") from error
    for name, expected in SHA256.items():
        found = hashlib.sha256(arrays[name].tobytes()).hexdigest()
        if found != expected:
            raise ValueError(f"{path}: sha256 of {name} is {found}, expected {expected}. "
                             "Restore it from the repository.")
    return arrays["images"], arrays["labels"].astype(np.int64)           # (1797, 8, 8), (1797,)
