"""BHQ: the released algorithm to the row, nothing dense, no copy to the host, exact edges."""
from fractions import Fraction

import authors
import numpy as np
import pytest
from given import Given

from minifqt import Streams
from minifqt.kernels import reference, rounding
from minifqt.kernels.cpu import choice
from minifqt.kernels.reflect import _COLUMNS
from minifqt.quantizers import bhq, create
from minifqt.quantizers.affine import range_parts
from minifqt.quantizers.bhq import (
    BHQ,
    Householder,
    compiled_reflections,
    groups,
    inverse_cube_root,
    reflections,
)
from minifqt.rng import nearest

each_width = pytest.mark.parametrize("bits", range(2, 9))
each_size = pytest.mark.parametrize("N", [1, 2, 3, 5, 37, 100])
needs_numba = pytest.mark.skipif(choice.numba is None, reason="needs numba: nothing is compiled")


def student(N=32, D=48):
    rng = np.random.default_rng(0)
    return (rng.standard_t(4, (N, D)) * rng.lognormal(0, 1.5, (N, 1))).astype("float32")


def gauss(N=32, D=48):
    return np.random.default_rng(0).standard_normal((N, D)).astype("float32")


def sparse_rows(N=32, D=48):
    """Two large rows, all others a thousandth of them."""
    return gauss(N, D) * np.where(np.arange(N) % 16 == 3, 1, 1e-3)[:, None].astype("float32")


def one_large_row(N=32, D=48):
    return gauss(N, D) * np.where(np.arange(N) == 5, 1e4, 1)[:, None].astype("float32")


def dwarfs(N=32, D=48):
    """One large row; all others are below 2⁻²⁴ of it, the smallest first."""
    sizes = np.geomspace(1e-30, 1e-8, N)
    sizes[-1] = 1
    return gauss(N, D) * sizes[:, None].astype("float32")


MATRICES = [student, gauss, sparse_rows, one_large_row, dwarfs]
each_matrix = pytest.mark.parametrize("matrix", MATRICES)


def ranges_of(x):
    return x.max(axis=1).astype("float64") - x.min(axis=1)


def householder(x):
    return Householder(*reflections(*(v.astype("float64") for v in (x.min(axis=1), x.max(axis=1)))))


def dense(mix, N):
    """T and T⁻¹ as matrices, (N, N) each."""
    return mix.apply(np.eye(N)), mix.undo(np.eye(N))


def random_ranges(N):
    """500 vectors of N ranges from even to very uneven."""
    rng = np.random.default_rng(0)
    return [rng.lognormal(0, rng.uniform(0.1, 4), N) for _ in range(500)]


def members(order, group):
    """The rows of each group in mixed order."""
    return [list(order[group == g]) for g in range(group.max() + 1)]


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


# ----------------------------------------------------------------------------------------- grouping


def test_the_groups_are_those_of_the_loop():
    for N in (3, 5, 16, 37):
        for ranges in random_ranges(N):
            order, group = groups(ranges, np.zeros(N, bool))
            assert members(order, group) == authors.groups(ranges)


@pytest.mark.parametrize("N", [3, 4, 5, 6, 10, 37, 64, 100])
def test_equal_rows_are_paired(N):
    order, group = groups(np.ones(N), np.zeros(N, bool))
    assert members(order, group) == authors.groups(np.ones(N))
    assert abs(group.max() + 1 - N / 2) <= 1
    assert np.bincount(group).max() <= 4


@pytest.mark.parametrize("N", [3, 10, 100])
def test_one_large_row_leads_all_others(N):
    ranges = np.full(N, 1e-6)
    ranges[N // 2] = 1
    order, group = groups(ranges, np.zeros(N, bool))
    assert (group == 0).all()
    assert order[0] == N // 2
    others = np.delete(np.arange(N), N // 2)
    assert np.array_equal(order[1:], others)              # equal rows keep their order


@each_size
def test_every_row_is_in_one_group_and_groups_are_in_order(N):
    for ranges in random_ranges(N)[:50]:
        order, group = groups(ranges, np.zeros(N, bool))
        assert np.array_equal(np.sort(order), np.arange(N))
        assert group[0] == 0
        assert set(np.diff(group)) <= {0, 1}
        leaders = order[np.searchsorted(group, np.arange(group.max() + 1))]
        assert (np.diff(ranges[leaders]) <= 0).all()      # groups in the order of their leaders
        assert ranges[leaders].min() >= max(ranges[np.setdiff1d(order, leaders)], default=0)


@pytest.mark.parametrize("N", [1, 2])
def test_fewer_than_three_rows_stay_apart(N):
    _, group = groups(np.linspace(1, 2, N), np.zeros(N, bool))
    assert np.array_equal(group, np.arange(N))


@pytest.mark.parametrize("left_out", [[0], [1, 3], [0, 1, 2, 3], range(8), range(10)])
def test_rows_left_out_are_groups_of_one_and_change_no_other(left_out):
    ranges = np.random.default_rng(0).lognormal(0, 1, 10)
    alone = np.isin(np.arange(10), list(left_out))
    ranges[alone] = 0
    order, group = groups(ranges, alone)
    found = members(order, group)
    kept = np.flatnonzero(~alone)
    expected = authors.groups(ranges[kept]) if len(kept) > 2 else [
        [i] for i in np.argsort(-ranges[kept], kind="stable")]
    expected = [[kept[i] for i in rows] for rows in expected]
    assert found[:len(expected)] == expected
    assert found[len(expected):] == [[i] for i in left_out]


def test_grouping_does_not_depend_on_the_size_of_the_ranges():
    for ranges in random_ranges(20)[:50]:
        expected = groups(ranges, np.zeros(20, bool))
        for k in (-300, -1, 40, 300):
            found = groups(np.ldexp(ranges, k), np.zeros(20, bool))
            assert np.array_equal(found, expected)


# ------------------------------------------------------------------------------------ the transform


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 100])
def test_the_reflection_is_its_own_inverse_with_an_even_first_row(n):
    Q = reference.householder(n)
    assert np.allclose(Q, authors.reflection(n), rtol=0, atol=1e-13)          # float64, entries ≤ 1
    assert np.allclose(Q @ Q, np.eye(n), rtol=0, atol=1e-13)
    assert np.allclose(Q[0], n**-0.5, rtol=1e-13)


def test_the_reference_transform_is_the_released_one():
    for N in (3, 5, 16, 37):
        for ranges in random_ranges(N)[:100]:
            T, expected = reference.bhq_transform(ranges), authors.transform(ranges)
            assert np.allclose(T, expected, rtol=1e-9, atol=1e-12 * abs(expected).max())   # float64


@each_matrix
@pytest.mark.parametrize("N", [3, 5, 37, 100])
def test_the_transform_by_group_sums_is_the_dense_reference(matrix, N):
    x = matrix(N, 20)
    mix, expected = householder(x), reference.bhq_transform(ranges_of(x))
    sizes = mix.n[:, None]
    # scales are in units of 2^exponent of the leader, so that they do not depend on the size of x
    expected = expected * np.where(sizes > 1, 2.0 ** (mix.exponent[:, None] / 3), 1)
    T, inverse = dense(mix, N)
    assert np.allclose(T, expected, rtol=1e-9, atol=1e-12 * abs(expected).max())           # float64
    assert np.allclose(inverse, np.linalg.inv(expected), rtol=1e-7, atol=1e-11 * abs(inverse).max())
    y = mix.apply(x.astype("float64"))
    assert np.allclose(y, expected @ x, rtol=1e-9, atol=1e-12 * abs(y).max())


@each_size
@each_matrix
def test_undo_is_the_inverse_of_apply(matrix, N):
    x = matrix(N, 20).astype("float64")
    mix = householder(x)
    error = abs(mix.undo(mix.apply(x)) - x)
    leader = ranges_of(x)[mix.order[mix.starts[mix.group]]]       # of each mixed row
    reach = np.empty(N)
    reach[mix.order] = leader
    # float64, relative to the group's largest row
    assert (error <= 1e-12 * reach[:, None]).all()


@each_size
@each_matrix
def test_undo_squared_is_the_square_of_each_element_of_the_inverse(matrix, N):
    mix = householder(matrix(N, 20))
    _, inverse = dense(mix, N)
    v = np.random.default_rng(0).random((N, 7))
    # float64; what is zero in exact arithmetic is 1e-16 of the largest
    assert np.allclose(mix.undo_squared(np.eye(N)), inverse**2, rtol=1e-9,
                       atol=1e-13 * (inverse**2).max())
    assert np.allclose(mix.undo_squared(v), inverse**2 @ v, rtol=1e-9, atol=0)    # no cancellation
    assert mix.undo_squared(v.astype("float32")).dtype == "float64"


def test_transforms_keep_the_dtype_and_take_any_number_of_axes():
    x = student(12, 60)
    mix = householder(x)
    for dtype in ("float32", "float64"):
        flat = x.astype(dtype)
        flat.setflags(write=False)                        # writing to it raises
        images = flat.reshape(12, 5, 4, 3)
        for function in (mix.apply, mix.undo):
            assert function(images).dtype == dtype
            assert np.array_equal(function(images).reshape(12, 60), function(flat))


def test_columns_are_mixed_apart_from_each_other(set_instructions):
    set_instructions("numpy")
    x = student(12, 2 * _COLUMNS + 300)                   # three blocks of columns
    mix = householder(x)
    for function in (mix.apply, mix.undo, mix.undo_squared):
        whole = function(x)
        for column in (0, _COLUMNS - 1, _COLUMNS, 2 * _COLUMNS, 2 * _COLUMNS + 299):
            assert np.array_equal(function(x[:, column:column + 1]), whole[:, column:column + 1])


@each_matrix
def test_apply_rescaled_is_apply_in_units_of_the_group(matrix):
    x = matrix().astype("float64")
    mix = householder(x)
    y = mix.apply_rescaled(x)
    assert np.array_equal(np.ldexp(y, mix.exponent[:, None]), mix.apply(x))
    assert 0.01 < abs(y).max() < 100                      # near 1 whatever the size
    for k in (-60, 60):
        scaled = np.ldexp(x, k)
        assert np.array_equal(householder(scaled).apply_rescaled(scaled), y)


@each_size
def test_zero_rows_come_back_as_zeros_whatever_the_codes_say(N):
    x = student(N, 20)
    x[::3] = 0
    mix = householder(x)
    y = np.random.default_rng(0).standard_normal((N, 20))
    assert (mix.undo(y)[::3] == 0).all()
    assert (mix.undo_squared(y**2)[::3] == 0).all()
    if N > 1:
        assert (mix.undo(y)[1] != 0).any()


def test_constant_rows_stay_out_of_all_groups():
    x = student()
    x[[3, 9]] = np.array([[5], [-1e-9]])
    mix = householder(x)
    for row in (3, 9):
        at = int(np.flatnonzero(mix.order == row)[0])
        assert mix.n[at] == 1
        assert mix.scales[at] == 1
    others = np.delete(np.arange(32), [3, 9])
    bare = authors.groups(ranges_of(x[others]))
    assert members(mix.order, mix.group)[:len(bare)] == [[others[i] for i in rows] for rows in bare]


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


# ----------------------------------------------------------------------- nothing waits for a device


class NoSync(np.ndarray):
    """An array whose numbers cannot be asked for, as those on a device should not be in a step."""

    def _refuse(self, *_):
        raise AssertionError("this would wait for the device")

    __bool__ = __int__ = __float__ = __index__ = __iter__ = __complex__ = item = tolist = _refuse

    def __array_ufunc__(self, ufunc, method, *inputs, out=None, **kwargs):
        kwargs |= {} if out is None else {"out": tuple(bare(o) for o in out)}
        named = {name: bare(value) for name, value in kwargs.items()}
        return guard(getattr(ufunc, method)(*bare(inputs), **named))

    def __array_function__(self, function, types, args, kwargs):
        named = {name: bare(value) for name, value in kwargs.items()}
        return guard(function(*bare(args), **named))

    def __getitem__(self, index):
        return guard(bare(self)[bare(index)])

    def __setitem__(self, index, value):
        bare(self)[bare(index)] = bare(value)

    def argmax(self, *args, **kwargs):
        return guard(bare(self).argmax(*args, **kwargs))


def bare(value):
    if isinstance(value, tuple | list):
        return type(value)(bare(v) for v in value)
    return value.view(np.ndarray) if isinstance(value, NoSync) else value


def guard(value):
    """Everything NumPy returns, scalars too, as an array that refuses."""
    if isinstance(value, tuple):
        return tuple(guard(v) for v in value)
    return np.asarray(value).view(NoSync)


def test_the_guarded_array_refuses_and_otherwise_computes():
    x = guard(np.arange(6.0))
    for ask in (bool, int, float, list, NoSync.item, NoSync.tolist):
        with pytest.raises(AssertionError, match="would wait"):
            ask(x.max())
    with pytest.raises(AssertionError, match="would wait"):
        range(guard(np.int64(3)))
    y = np.where(x > 2, np.cumsum(x), x[x.argmax()])
    assert isinstance(y, NoSync)
    assert np.array_equal(bare(y), [5, 5, 5, 6, 10, 15])


@each_size
def test_grouping_asks_for_no_number(N):
    for ranges in [*random_ranges(N)[:5], np.ones(N), np.zeros(N)]:
        for alone in (np.zeros(N, bool), np.arange(N) % 3 == 0, np.ones(N, bool)):
            order, group = groups(guard(ranges), guard(alone))
            assert isinstance(order, NoSync)
            assert isinstance(group, NoSync)
            assert np.array_equal([bare(order), bare(group)], groups(ranges, alone))


@each_size
def test_building_the_transform_asks_for_no_number(N, set_instructions):
    set_instructions("numpy")                             # as a GPU does it
    x = student(N, 20)
    x[1::7], x[2::5] = 0, 3
    low, high = x.min(axis=1).astype("float64"), x.max(axis=1).astype("float64")
    mix, expected = Householder(*reflections(guard(low), guard(high))), householder(x)
    for field in ("order", "group", "starts", "n", "exponent", "scales", "rescaled", "undo_scales"):
        assert isinstance(getattr(mix, field), NoSync), field
        assert np.array_equal(bare(getattr(mix, field)), getattr(expected, field)), field


def test_the_sums_that_group_rows_are_finer_than_2_to_the_minus_20():
    """Three small rows need 2 v₁ > v₀, here by 2⁻²⁰ of it."""
    above = np.array([1, 0.5 * (1 + 2.0**-20), 1e-6, 1e-6, 1e-6])
    assert leaders_of(above) == 2
    assert leaders_of(above * [1, 1 - 2.0**-19, 1, 1, 1]) == 1


def leaders_of(ranges):
    _, group = groups(ranges, np.zeros(len(ranges), bool))
    return group.max() + 1


def test_the_scales_are_the_released_ones_down_to_the_floor():
    for small in (0.3, 1e-25, 1e-35):
        ranges = np.array([[0] * 4, [1, small, small, small]], "float32")
        for _, _, exponent, scales, rescaled, undo_scales, *_ in reflected(ranges[:, :, None]):
            unit = 2.0**exponent                          # scales are in units of 2^exponent
            expected = np.array([1 / 2, *[max(float(ranges[1, 1]), 1e-30) * 0.5 / 3] * 3])
            # √n = 2, max|Q| = ½; a few float64 roundings
            np.testing.assert_allclose(scales, (expected / unit) ** (-1 / 3), rtol=1e-12)
            assert np.array_equal(rescaled * unit, scales)
            assert np.array_equal(undo_scales, 1 / scales)


def reflected(parts):
    """`reflections` of rows whose parts have these ranges (2, N, parts), plain and compiled."""
    low, high = parts.astype("float64")
    yield reflections(low.min(axis=1), high.max(axis=1))
    if choice.instructions() != "numpy":
        yield compiled_reflections(parts)


def test_the_inverse_cube_root_is_good_to_the_last_bits_and_exact_in_powers_of_eight():
    x = np.exp(np.random.default_rng(0).uniform(-90, 3, 300))
    y = inverse_cube_root(x)
    for a, b in zip(x, y, strict=True):
        # 1.3 units in the last place of y, three times as much in its cube
        assert abs(Fraction(a) * Fraction(b) ** 3 - 1) < 4 * 2**-52
    for k in (-20, -1, 7):
        assert np.array_equal(inverse_cube_root(np.ldexp(x, 3 * k)), np.ldexp(y, -k))


# ------------------------------------------------------------------------------------ compiled rows


@needs_numba
@pytest.mark.parametrize("N", [1, 2, 3, 4, 5, 17, 64, 130])
@pytest.mark.parametrize("kind", ["random", "constant", "zero", "huge", "tiny", "equal", "dwarfs"])
def test_compiled_reflections_are_the_plain_ones_bit_for_bit(kind, N):
    rng = np.random.default_rng(N)
    for ranges in random_ranges(N)[:20]:
        low = rng.uniform(-2, 1, N) * ranges
        if kind == "dwarfs":
            ranges = ranges ** 20
        if kind == "equal":
            low, ranges = np.round(low), np.round(ranges)
        high = low + ranges
        if kind in ("constant", "zero"):
            some = rng.random(N) < rng.random()
            low[some] = high[some] = (kind == "constant") * rng.standard_normal(some.sum()).round()
        largest = np.frexp(max(abs(low).max(), abs(high).max()))[1]
        unit = {"huge": 127 - largest, "tiny": -140, "dwarfs": -largest}.get(kind, 0)
        low, high = np.ldexp([low, high], unit).astype("float32")
        middle = np.clip(low / 2 + high / 2, low, high)
        parts = np.stack([[low, middle, middle], [middle, middle, high]]).swapaxes(1, 2)
        plain, compiled = reflected(parts)
        sizes = Householder(*plain).sizes
        for found, expected in zip(compiled, (*plain, sizes), strict=True):
            assert np.asarray(found).dtype.kind == np.asarray(expected).dtype.kind
            assert np.array_equal(found, expected)


@needs_numba
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_ranges_that_are_not_finite_make_no_group(bad):
    for at in (0, 4):
        for end in (0, 1):
            parts = np.stack([-np.ones((5, 3), "float32"), np.ones((5, 3), "float32")])
            assert compiled_reflections(parts)[-1] == (2, 3)
            parts[end, at, 1] = bad
            assert compiled_reflections(parts)[-1] == (0, 0)


def rows_in_groups(N, D, groups):
    x = gauss(N, D)
    x *= np.where(np.arange(N) % max(1, N // groups) == 0, 1e3, 1)[:, None].astype("float32")
    assert householder(x).group[-1] + 1 == groups
    return x


each_group = pytest.mark.parametrize(("N", "D", "groups"), [
    (1, 5, 1), (2, 40, 2), (3, 2000, 1), (4, 33, 1), (5, 1, 5), (16, 5003, 1), (40, 4100, 2),
    (33, 900, 15), (128, 1700, 60)])


@needs_numba
@each_group
def test_mixed_rows_know_their_ranges(N, D, groups):
    x = rows_in_groups(N, D, groups)
    y = householder(x).apply(x)
    if D > 4000:
        assert y.summary.ranges.shape[2] > 1              # columns are cut where groups are few
    found, finite = rounding.joined(y.summary.ranges)
    assert finite
    assert np.array_equal(found[:, :, 0], [y.min(axis=1), y.max(axis=1)])


@each_group
def test_rows_mixed_by_numpy_know_their_ranges_and_have_the_groups_sums(
        N, D, groups, set_instructions):
    set_instructions("numpy")
    x = rows_in_groups(N, D, groups)
    mix = householder(x)
    y = mix.apply(x)
    (low, high), finite = rounding.joined(range_parts(y, N))
    assert finite
    assert np.array_equal(low[:, 0], y.min(axis=1))
    assert np.array_equal(high[:, 0], y.max(axis=1))
    wide = x.astype("float64")                            # as a device does it: whole arrays
    assert np.array_equal(y, mix._reflect(wide[mix.order] * mix.scales[:, None]).astype("float32"))
    back = mix._reflect(np.asarray(y, "float64")) * mix.undo_scales[:, None]
    assert np.array_equal(mix.undo(y)[mix.order], back.astype("float32"))


def same(one, other):
    return all(np.array_equal(getattr(one, name), getattr(other, name))
               for name in ("codes", "scale", "zero"))


@pytest.fixture
def attempts(monkeypatch):
    """Whether each call of BHQ found codes while rows were mixed."""
    found, in_cache = [], BHQ._in_cache

    def watched(self, *arguments):
        result = in_cache(self, *arguments)
        found.append(result is not None)
        return result

    monkeypatch.setattr(BHQ, "_in_cache", watched)
    return found


@needs_numba
@each_group
@pytest.mark.parametrize("noise", ["random", "nearest"])
def test_rows_quantized_in_cache_have_the_codes_of_formed_ones(N, D, groups, noise, on_threads,
                                                               attempts, monkeypatch):
    x, q, streams = rows_in_groups(N, D, groups), create("bhq", 5), Streams(3)
    stream = streams.stream("x") if noise == "random" else nearest(streams, "x")
    in_cache = on_threads(lambda: q(x, stream))
    largest = householder(x).n.max() if N > 2 else 1
    assert attempts == [2 * threads * largest <= N for threads in (1, 2, 4)]
    monkeypatch.setattr(BHQ, "_in_cache", lambda *_: None)
    formed = q(x, stream)
    assert all(same(t, formed) for t in in_cache)


@needs_numba
@pytest.mark.parametrize("why", ["", "too large for a cache", "rescaled", "noise of its own"])
def test_what_can_not_be_quantized_in_cache_is_formed(why, set_instructions, attempts, monkeypatch):
    x, stream = rows_in_groups(64, 900, 29), Streams(0).stream("x")
    if why == "too large for a cache":
        monkeypatch.setattr(bhq, "ROOM", 1)
        x[:60:3] /= 1e4                                   # some leader has more than two followers
    if why == "rescaled":
        x[5] = 1e-30                                      # alone, and below 2⁻⁷⁶
    if why == "noise of its own":
        stream = Given(np.full(x.shape, 7))
    compiled = create("bhq", 5)(x, stream)
    assert attempts == [why == ""]
    set_instructions("numpy")
    assert same(compiled, create("bhq", 5)(x, stream))
