"""BHQ: the released algorithm's variance, its bounds, any number of rows.

Its transform is test_householder.py's.
"""
import authors
import numpy as np
import pytest
from given import Given
from matrices import (
    dense,
    each_matrix,
    each_size,
    each_width,
    gauss,
    householder,
    one_large_row,
    ranges_of,
    student,
)

from minifqt.quantizers import create

# --------------------------------------------------------------------------- the released algorithm


@each_width
@each_matrix
def test_the_variance_is_the_released_algorithms(matrix, bits):
    x = matrix()
    ours, theirs = create("bhq", bits).variance(x).sum(), authors.variance(x, bits).sum()
    # p is cut to 16 bits: 2⁻¹⁶ of a step, of B steps
    assert ours <= theirs * (1 + 2**bits * 2.0**-16)
    assert ours > theirs * 0.99


@each_width
@pytest.mark.parametrize("N", [3, 5, 37, 100])
def test_the_variance_is_the_released_algorithms_for_other_numbers_of_rows(N, bits):
    x = student(N, 64)
    ours, theirs = create("bhq", bits).variance(x).sum(), authors.variance(x, bits).sum()
    assert ours == pytest.approx(theirs, rel=0.01)


@each_width
def test_zero_rows_only_lower_the_variance(bits):
    x = student()
    x[[2, 7, 11]] = 0
    ours, theirs = create("bhq", bits).variance(x), authors.variance(x, bits)
    assert (ours[[2, 7, 11]] == 0).all()
    assert theirs[[2, 7, 11]].sum() > 0
    assert ours.sum() < theirs.sum()
    others = np.delete(np.arange(len(x)), [2, 7, 11])
    assert ours[others].sum() == pytest.approx(theirs[others].sum(), rel=0.01)


@each_width
@each_matrix
def test_bhq_is_better_than_psq_where_rows_differ(matrix, bits):
    x = matrix()
    bhq, psq = create("bhq", bits).variance(x).sum(), create("psq", bits).variance(x).sum()
    if matrix is gauss:
        assert bhq < 1.1 * psq                            # nothing to gain, little lost
    else:
        assert bhq < psq


@each_width
def test_one_group_is_below_the_cubic_bound(bits):
    x = one_large_row()
    n, D = x.shape
    mix = householder(x)
    assert (mix.group == 0).all()
    small = np.delete(x, 5, axis=0)
    large, rest = float(np.ptp(x[5])), 2 * float(abs(small).max())
    B = 2**bits - 1
    root = large ** (2 / 3) * n ** (-1 / 3) + rest ** (2 / 3) * n ** (2 / 3)
    bound = D / (4 * B**2) * root**3
    q = create("bhq", bits)
    assert q.variance(x).sum() <= q.bound(x) <= bound
    assert bound < create("psq", bits).bound(x)           # n rows share the noise of one


@each_width
def test_the_bound_is_the_theorems_for_mixed_rows(bits):
    x = student()
    T = authors.transform(ranges_of(x))
    y = T @ x.astype("float64")
    step = np.ptp(y, axis=1) / (2**bits - 1)
    closed = x.shape[1] / 4 * (step**2 * (np.linalg.inv(T) ** 2).sum(axis=0)).sum()
    # scales are float32, of float32 rows
    assert create("bhq", bits).bound(x) == pytest.approx(closed, rel=1e-5)


# --------------------------------------------------------------------------------------------- rows


@each_width
@pytest.mark.parametrize("N", [1, 2])
def test_fewer_than_three_rows_are_psq(N, bits):
    x = student(N, 48)
    noise = np.random.default_rng(0).integers(0, 65536, x.shape)
    bhq, psq = create("bhq", bits), create("psq", bits)
    t, s = bhq(x, Given(noise)), psq(x, Given(noise))
    order = t.mix.order                                   # mixed row j is row order[j]
    expected = psq(x[order], Given(noise))
    assert np.array_equal(t.codes, expected.codes)
    assert np.array_equal(t.scale, expected.scale)
    assert np.array_equal(bhq.variance(x), psq.variance(x))
    assert np.array_equal(t.dequantize()[order], expected.dequantize())
    assert s.shape == t.shape


@each_width
@each_matrix
def test_bhq_follows_a_permutation_of_its_rows(matrix, bits):
    x, q = matrix(), create("bhq", bits)
    rng = np.random.default_rng(0)
    assert len(np.unique(ranges_of(x))) == len(x)         # no ties: their order would be the rows'
    noise, order = rng.integers(0, 65536, x.shape), rng.permutation(len(x))
    t, s = q(x, Given(noise)), q(x[order], Given(noise))  # equal noise for each mixed row
    for field in ("codes", "scale", "zero"):
        assert np.array_equal(getattr(s, field), getattr(t, field))
    assert np.array_equal(s.dequantize("float64"), t.dequantize("float64")[order])
    assert np.array_equal(q.variance(x[order]), q.variance(x)[order])


@each_width
def test_permuted_ties_have_the_same_total_variance(bits):
    x = np.concatenate([student(10)] * 3)
    order = np.random.default_rng(0).permutation(30)
    q = create("bhq", bits)
    # which of the equal rows is mixed with which may change; here all copies are alike
    assert q.variance(x[order]).sum() == pytest.approx(q.variance(x).sum(), rel=0.05)


@each_width
@each_size
@each_matrix
def test_any_number_of_rows_comes_back_within_its_noise(matrix, N, bits):
    x, q = matrix(N, 20), create("bhq", bits)
    for h in (0, 32768, 65535):
        t = q(x, Given(h))
        assert t.codes.shape == (N, 20)
        _, inverse = dense(t.mix, N)
        # at most a step in each mixed row, and float32 of the group's largest number
        worst = abs(inverse) @ (t.scale.astype("float64") * np.ones((1, 20))) * (1 + 2**-10)
        assert (abs(t.dequantize("float64") - x) <= worst + 2.0**-20 * abs(x).max()).all()


@pytest.mark.parametrize("N", [1, 2, 3, 5, 37])
def test_one_column_is_exact(N):
    x = student(N, 1)
    t = create("bhq", 2)(x, Given(65535))
    assert np.array_equal(t.dequantize(), x)
    assert (create("bhq", 2).variance(x) == 0).all()


@each_width
def test_rows_that_are_all_zero_but_one_share_its_noise(bits):
    x = np.zeros((16, 40), "float32")
    x[3] = student(1, 40)[0]
    q = create("bhq", bits)
    t = q(x, Given(32768))
    assert (np.delete(t.dequantize(), 3, axis=0) == 0).all()
    psq = create("psq", bits).variance(x).sum()
    assert q.variance(x).sum() < psq / 4                  # a sixteenth, but for other fractions p
    worst = (abs(dense(t.mix, 16)[1][3]) @ t.scale)[0]
    assert (abs(t.dequantize("float64") - x)[3] <= worst * 0.51).all()
