"""BHQ's reflections by NumPy alone: a few columns at a time, the groups' rows in a handy order.

All leaders come first, then the second row of each group that has one, then the third, …, larger
groups before smaller ones: a sum over groups is then a few sums of slices, which copy nothing.
"""
import numpy as np

from minifqt.backend import empty, map_blocks, scratch
from minifqt.kernels.seen import Seen, Summary

_COLUMNS = 1024                                           # mixed at a time


class Reflection:
    """Q·y = y − v · (y₁ − root · Σy) · gain in each group, in place, rounded as it stands.

    starts  (groups + 1,) of groups among mixed rows;  rows  those in our order
    """

    def __init__(self, starts):
        count = np.diff(starts)
        by_size = np.argsort(-count, kind="stable")
        groups = [by_size[:(count > k).sum()] for k in range(count.max())]
        self.rows = np.concatenate([starts[some] + k for k, some in enumerate(groups)])
        ends = np.cumsum([len(some) for some in groups])
        self.runs = [slice(end - len(some), end)
                     for end, some in zip(ends, groups, strict=True)]
        self.root = 1 / np.sqrt(count[by_size, None])
        self.gain = 1 / np.where(self.root < 1, 1 - self.root, 1)

    def __call__(self, y):
        first, *others = (y[run] for run in self.runs)
        c, change = (scratch(use, first.shape, "float64") for use in ("c", "change"))
        total = first                                     # Σ over rows: a pass less than from 0
        for some in others:
            np.add(total[:len(some)], some, out=c[:len(some)])
            total = c
        alone = len(others[0]) if others else 0
        c[alone:] = first[alone:]
        c *= self.root
        np.subtract(first, c, out=c)
        c *= self.gain
        first -= np.multiply(c, 1 - self.root, out=change)     # v of a leader
        c *= self.root                                    # −v of the others
        for some in others:
            some += c[:len(some)]


def apply(x, reflection, order, scales):
    """Q · diag(scales) · x, which knows its rows' ranges: float64, rounded once.

    x (N, …); mixed row i is row order[i] of x, scales (N,) of mixed rows
    """
    rows, flat = reflection.rows, np.asarray(x).reshape(len(x), -1)
    place, scales, N = np.argsort(order[rows]), scales[rows, None], len(x)
    out = empty(flat.shape, x.dtype)

    def block(columns):
        y = scratch("mixed", (N, columns.stop - columns.start), "float64")
        y[place] = flat[:, columns]
        y *= scales
        reflection(y)
        out[rows, columns] = y
        ranges = np.empty((2, N, 1), x.dtype)
        ranges[:, rows] = y.min(axis=1, keepdims=True), y.max(axis=1, keepdims=True)
        return ranges

    ranges = np.concatenate(map_blocks(block, flat.shape[1], _COLUMNS), axis=2)
    mixed = out.reshape(x.shape).view(Seen)
    mixed.summary = Summary(ranges, None)
    return mixed


def undo(y, reflection, order, scales):
    """diag(scales) · Q · y, rows back in the samples' order: float64, rounded once."""
    rows, flat = reflection.rows, np.asarray(y).reshape(len(y), -1)
    place, target, scales = np.argsort(rows), order[rows], scales[rows, None]
    out = empty(flat.shape, y.dtype)

    def block(columns):
        x = scratch("mixed", (len(y), columns.stop - columns.start), "float64")
        x[place] = flat[:, columns]
        reflection(x)
        x *= scales
        out[target, columns] = x

    map_blocks(block, flat.shape[1], _COLUMNS)
    return out.reshape(y.shape)
