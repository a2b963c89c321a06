"""Every quantizer's mean and variance are exact, and its bound is the theorem's, at 2 to 8 bits."""
import numpy as np
import pytest
from families import (
    each_integer,
    each_one,
    each_width,
    largest_of_group,
    lively,
    make,
    sampled,
    spread,
    stream,
    z_scores,
)
from given import Given

from minifqt.quantizers import Quantizer
from minifqt.rng import Streams, nearest

# -------------------------------------------------------------------------------- mean and variance


def every_noise(x, q):
    """x̂ for each of the 65536 noises, the same in a whole column.  x (N, D) → (N, 65536, D).

    Repeating the columns leaves every range as it is.
    """
    wide = np.tile(x, (1, 65536))
    noise = np.repeat(np.arange(65536), x.shape[1])       # (65536 · D,)
    t = q(wide, Given(noise))
    assert np.array_equal(t.scale, q(x, Given(0)).scale)
    return t.dequantize("float64").reshape(len(x), 65536, -1)


@each_integer
@each_width
def test_the_mean_over_all_noises_is_the_number(name, bits):
    x, q = lively(5, 6), make(name, bits)
    mean = every_noise(x, q).mean(axis=1)
    t = q(x, Given(0))
    scale = np.broadcast_to(t.scale.astype("float64"), x.shape)
    reach = scale if t.mix is None else np.sqrt(t.mix.undo_squared(scale**2))
    # rint to 16 bits is 2⁻¹⁷ of a step, float32 2⁻²⁴ of the code: 2⁻¹⁴ at 8 bits as declared
    assert (abs(mean - x) <= reach * 2.0**-14 * (2**bits / 256 + 0.25)).all()
    row = largest_of_group(x, t)
    assert (abs(mean - x) <= 2.0**-16 / (2**bits - 1) * 4 * row).all()


@each_integer
@each_width
def test_the_variance_over_all_noises_is_the_closed_form(name, bits):
    x, q = lively(5, 6), make(name, bits)
    if name == "bhq":                                     # mixed rows each have their own noise
        wide = np.tile(x, (1, 65536))
        t = q(wide, Given(np.repeat(np.arange(65536), 6)))
        rows = t.rows("float64").reshape(5, 65536, 6)
        exact = t.mix.undo_squared(rows.var(axis=1))
    else:
        exact = every_noise(x, q).var(axis=1)
    # 1e-9 of the variance of a half: float64 sums of 65536 terms
    assert np.allclose(q.variance(x), exact, rtol=1e-9, atol=1e-12 * exact.max())


@each_integer
@each_width
def test_the_variance_found_by_bisection_is_the_closed_form(name, bits):
    q, x = make(name, bits), spread()
    closed = q.variance(x)
    # float64, other order of operations
    assert np.allclose(Quantizer.variance(q, x), closed, rtol=1e-12, atol=1e-14 * closed.max())


@each_integer
@each_width
def test_rounding_is_unbiased_in_a_sample(name, bits):
    z, tolerance = z_scores(make(name, bits), spread(), 1000, stream())
    assert z.size > 300
    assert abs((z**2).mean() - 1) < tolerance
    assert abs(z).max() < 6


@each_integer
@each_width
def test_nearest_rounding_fails_the_test_of_unbiasedness(name, bits):
    z, tolerance = z_scores(make(name, bits), spread(), 1000, nearest(Streams(0), "a"))
    assert (z**2).mean() - 1 > 20 * tolerance
    assert abs(z).max() > 6


@each_integer
@each_width
def test_the_sampled_variance_is_the_closed_form(name, bits):
    q, x, draws = make(name, bits), spread(), 1000
    errors = sampled(q, x, draws, stream()) - x[:, None]
    squares = (errors**2).sum(axis=(0, 2))                # (draws,) of the whole tensor
    error = squares.std() / np.sqrt(draws)                # standard error of their mean
    assert abs(squares.mean() - q.variance(x).sum()) < 5 * error
    assert 5 * error < 0.02 * q.variance(x).sum()         # the test can see 2%


@each_integer
def test_every_family_declares_itself_unbiased(name):
    assert make(name).unbiased


# ------------------------------------------------------------------------------------------- bounds


@each_integer
@each_width
def test_the_variance_is_at_most_the_bound_and_of_its_order(name, bits):
    q, x = make(name, bits), lively()
    # ⅙ of a step squared against ¼; at 2 bits most numbers are close to an exact zero, which saves
    assert 0.2 * q.bound(x) < q.variance(x).sum() <= q.bound(x)


@each_width
@pytest.mark.parametrize("data", [lively, spread])
def test_the_bound_of_ptq_is_the_theorems(bits, data):
    x = data()
    closed = x.size * float(x.max() - x.min()) ** 2 / (4 * (2**bits - 1) ** 2)
    assert make("ptq", bits).bound(x) == pytest.approx(closed, rel=1e-6)     # scale is a float32


@each_width
def test_the_bound_of_psq_is_the_theorems(bits):
    x = lively()
    ranges = (x.max(axis=1) - x.min(axis=1)).astype("float64")
    closed = x.shape[1] * (ranges**2).sum() / (4 * (2**bits - 1) ** 2)
    assert make("psq", bits).bound(x) == pytest.approx(closed, rel=1e-6)     # scales are float32


@each_width
def test_rows_without_a_range_add_nothing_to_the_bound_of_psq(bits):
    x = lively()
    bare = make("psq", bits).bound(x[2:])
    x[0], x[1] = 0, 1e3                                   # exact: neither has any variance
    assert make("psq", bits).variance(x)[:2].sum() == 0
    assert make("psq", bits).bound(x) == pytest.approx(bare, rel=1e-12)


@each_one
def test_a_tensor_of_zeros_has_the_bound_zero(name):
    assert make(name).bound(np.zeros((4, 6), "float32")) == 0


@each_width
@pytest.mark.parametrize("data", [lively, spread])
def test_the_bound_of_psq_is_never_above_that_of_ptq(bits, data):
    for shift in (0, 5):
        x = data() + np.float32(shift)
        assert make("psq", bits).bound(x) <= make("ptq", bits).bound(x)
