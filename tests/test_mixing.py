"""BHQ's rows mixed by compiled kernels and by NumPy: equal bits, ranges known, codes in cache."""
import numpy as np
import pytest
from given import Given
from matrices import gauss, householder, needs_numba, random_ranges, reflected

from minifqt import Streams
from minifqt.kernels import rounding
from minifqt.quantizers import bhq, create
from minifqt.quantizers.affine import range_parts
from minifqt.quantizers.bhq import BHQ, Householder, compiled_reflections
from minifqt.rng import nearest


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
