"""The row transform of BHQ, compiled: reflections of groups of rows by group sums, in cache."""

from minifqt.kernels.cpu.choice import compiled
from minifqt.kernels.cpu.codes import row_range
from minifqt.kernels.cpu.team import leave, seat, take


@compiled
def group_sum(y, root, gain, total):
    """total = (y₁ − Σy · root) · gain for the rows y (n, D) of a group, float64, row by row."""
    for i in range(len(total)):
        total[i] = y[0, i]
    for j in range(1, len(y)):
        row = y[j]
        for i in range(len(total)):
            total[i] += row[i]
    lead = y[0]
    for i in range(len(total)):
        total[i] = (lead[i] - total[i] * root) * gain


@compiled
def reflect_row(row, v, total, factor, out):
    """out = (row − v · total) · factor."""
    for i in range(len(out)):
        out[i] = (row[i] - v * total[i]) * factor


@compiled
def reflect(counter, scratch, x, source, before, starts, root, gain, v, target, after, out, ranges):
    """out[target[j]] = reflect_row of y_j = x[source[j]] · before_j, in groups between `starts`.

    scratch  (threads, rows of the largest group + 1, columns of a block) float64
    ranges   (2, blocks, N) of what was written; empty if nobody asks
    """
    me = seat(counter)
    if me < 0:
        return
    (_, D), columns = x.shape, scratch.shape[2]
    blocks, y, total = (D + columns - 1) // columns, scratch[me, 1:], scratch[me, 0]
    while True:
        block = take(counter)
        if block >= blocks:
            break
        left, right = block * columns, min(D, block * columns + columns)
        for group in range(len(starts) - 1):
            first, last = starts[group], starts[group + 1]
            for j in range(first, last):
                row, scaled, factor = x[source[j], left:right], y[j - first], before[j]
                for i in range(len(row)):
                    scaled[i] = row[i] * factor
            group_sum(y[:last - first], root[group], gain[group], total[:right - left])
            for j in range(first, last):
                result = out[target[j], left:right]
                reflect_row(y[j - first], v[j], total, after[j], result)
                if ranges.size:
                    ranges[0, block, target[j]], ranges[1, block, target[j]] = row_range(result)
    leave(counter)
