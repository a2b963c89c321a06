"""BHQ's groups and its transform T: nothing dense, no copy to the host, exact edges."""
from fractions import Fraction

import authors
import numpy as np
import pytest
from matrices import (
    dense,
    each_matrix,
    each_size,
    householder,
    members,
    random_ranges,
    ranges_of,
    reflected,
    student,
)

from minifqt.kernels import reference
from minifqt.kernels.reflect import _COLUMNS
from minifqt.quantizers.bhq import Householder, groups, inverse_cube_root, reflections

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


def test_the_inverse_cube_root_is_good_to_the_last_bits_and_exact_in_powers_of_eight():
    x = np.exp(np.random.default_rng(0).uniform(-90, 3, 300))
    y = inverse_cube_root(x)
    for a, b in zip(x, y, strict=True):
        # 1.3 units in the last place of y, three times as much in its cube
        assert abs(Fraction(a) * Fraction(b) ** 3 - 1) < 4 * 2**-52
    for k in (-20, -1, 7):
        assert np.array_equal(inverse_cube_root(np.ldexp(x, 3 * k)), np.ldexp(y, -k))
