"""The two theorems as statistics of the terms, with their errors and the draws that they need.

Theorem 1: each part has mean zero. Theorem 2: the variance of the gradient is the sum of theirs.
Source: arXiv 2010.14298, Theorems 1 and 2; the derivations in docs/theory.md.
"""
import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from minifqt.study.terms import Terms

ALARM, POWER, BIAS = 1e-3, 0.99, 0.01                     # chance in a study; chance; in steps
_normal = NormalDist()


@dataclass
class Test:
    """One test of a mean of zero.  needed: draws that find the bias with probability POWER."""

    name: str
    mean: float
    error: float                                          # standard error of the mean
    z: float
    draws: int
    needed: int | None = None


@dataclass
class Unbiased:
    """All tests of Theorem 1; `limit`: the |z| that one of a thousand studies exceeds anywhere."""

    sites: list[Test]                                     # mean in steps of the site's codes
    parameters: list[Test]                                # mean in shares of the QAT gradient
    limit: float

    @property
    def alarms(self) -> list[Test]:
        """Tests beyond the limit."""
        return [test for test in self.sites + self.parameters if abs(test.z) > self.limit]


def unbiased(terms: Terms, more: dict[str, np.ndarray] | None = None,
             bias: float = BIAS) -> Unbiased:
    """Theorem 1 of these terms. Sites and parameters that noise does not reach are left out.

    A bias of β steps in every code of a site shifts its mean along the response by β. Over all
    tests false alarms have a chance of ALARM (Bonferroni).
    more  site → `along` of other draws (terms.along_site)
    bias  to be found, in steps
    """
    more = more or {}
    found = [[_test(name, np.append(column, more.get(name, [])))
              for name, column in zip(names, values.T, strict=True)
              if np.isfinite(column).all() and column.any()]
             for names, values in ((terms.sites, terms.along),
                                   (terms.parameters, terms.projected))]
    limit = -_normal.inv_cdf(ALARM / 2 / max(1, sum(map(len, found))))
    for test in found[0]:
        z = limit - _normal.inv_cdf(1 - POWER)            # and a deviation is estimated too
        deviation = test.error * math.sqrt(test.draws)
        test.needed = math.ceil((z * deviation / bias) ** 2 + limit**2 / 2)
    return Unbiased(*found, limit)


def _test(name, values):
    n = len(values)
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(n))
    return Test(name, mean, error, z_of_t(mean / error if error else math.inf, n - 1), n)


def z_of_t(t: float, dof: int) -> float:
    """Student's t as a normal deviate of the same tail.  Wallace, Ann. Math. Stat. 30, 1959."""
    size = math.sqrt(dof * math.log1p(t * t / dof)) * (8 * dof + 1) / (8 * dof + 3)
    return math.copysign(size, t)


@dataclass
class Layers:
    """Theorem 2, term by term.

    terms   site → (E‖Γ ε‖², its standard error)
    total   E‖FQT − QAT gradient‖²;  ratio  total / Σ terms and its standard error (jackknife)
    pairs   (z, site, site) of each two sites' inner product, the largest |z| first; beyond `limit`
            they are correlated, which no independent noises are
    """

    terms: dict[str, tuple[float, float]]
    total: tuple[float, float]
    ratio: tuple[float, float]
    pairs: list[tuple[float, str, str]]
    limit: float


def layers(terms: Terms) -> Layers:
    """Theorem 2 of these terms."""
    own, total = np.einsum("sii->si", terms.grams), terms.grams.sum(axis=(1, 2))
    n, S = len(terms.sites), len(total)
    ratios = _without_one(total) / _without_one(own.sum(axis=1))
    ratio = total.sum() / own.sum()
    error = math.sqrt((S - 1) / S * ((ratios - ratios.mean()) ** 2).sum())
    pairs = [(_test("", terms.grams[:, i, j]).z, terms.sites[i], terms.sites[j])
             for i in range(n) for j in range(i) if terms.grams[:, i, j].any()]
    limit = -_normal.inv_cdf(ALARM / 2 / max(1, len(pairs)))
    return Layers({site: _mean(column) for site, column in zip(terms.sites, own.T, strict=True)},
                  _mean(total), (float(ratio), error),
                  sorted(pairs, key=lambda pair: -abs(pair[0])), limit)


def _mean(values):
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def _without_one(values):
    return values.sum() - values
