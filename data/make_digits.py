"""Writes digits.npz from scikit-learn's copy: `python -m data.make_digits` in the root folder.

Nothing else needs scikit-learn (`pip install scikit-learn`). digits.py says where the data is from.
"""
import numpy as np
from sklearn.datasets import load_digits

from data import digits


def main():
    source = load_digits()                                # images (1797, 8, 8) float64, all 0..16
    np.savez_compressed(digits.PATH, images=source.images.astype(np.uint8),
                        labels=source.target.astype(np.uint8))
    digits.read()                                         # raises unless they are the known arrays


if __name__ == "__main__":
    main()
