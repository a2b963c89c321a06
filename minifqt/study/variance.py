"""Quantization variance of the whole gradient against bits, beside the variance of sampling.

Q_b2 alone is varied; Q_b1, 8 bits per tensor in every recipe, stands beside it. Source: arXiv
2010.14298, the figure of gradient variance against bits.
"""
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from minifqt.layers import Layer
from minifqt.study.probe import Probe
from minifqt.study.terms import sizes


def quantization(probe: Probe, spec: str, draws: Iterable[int], place: str = "grad_x") -> tuple:
    """Total variance of the gradient, its standard error: all sites of this place are `spec`."""
    sites = [site for site in probe.sites if site.endswith(f".{place}")]
    specs = dict.fromkeys(sites, spec)
    sizes = [((probe.gradient(dict.fromkeys(sites, draw), specs) - probe.exact) ** 2).sum()
             for draw in draws]
    if len(sizes) < 2:
        raise ValueError(f"{len(sizes)} draws: a variance needs at least two.")
    return float(np.mean(sizes)), float(np.std(sizes, ddof=1) / np.sqrt(len(sizes)))


def sampling(net: Layer, batches: Iterable, label_smoothing: float = 0.0) -> tuple[float, float]:
    """Total variance of the QAT gradient over batches (x, labels), and ‖mean gradient‖².

    Of batches of this size, by Welford's update. The mean's own variance is taken from its size.
    """
    count, mean, squares = 0, 0.0, 0.0
    for x, labels in batches:
        with Probe(net, x, labels, label_smoothing=label_smoothing) as probe:
            gradient = probe.exact
        count, before = count + 1, gradient - mean
        mean = mean + before / count
        squares += float(before @ (gradient - mean))
    if count < 2:
        raise ValueError(f"{count} batches: a variance needs at least two.")
    variance = squares / (count - 1)
    return variance, float(mean @ mean) - variance / count


def terms(net: Layer, batches: Sequence, specs: Mapping[str, str] | None = None, first: int = 0,
          seed: int = 0, label_smoothing: float = 0.0) -> dict[str, tuple[float, float]]:
    """Site → its term of Theorem 2 and the standard error: mean over batches, one draw of each.

    specs  site → quantizer, where it is not the network's;  first  number of the first draw
    """
    found = []
    for draw, (x, labels) in enumerate(batches, first):
        with Probe(net, x, labels, seed, label_smoothing) as probe:
            found.append(sizes(probe, draw, specs))
    return {site: mean_and_error([one[site] for one in found]) for site in found[0]}


def total(net: Layer, batches: Sequence, specs: Mapping[str, str] | None = None, first: int = 0,
          seed: int = 0, label_smoothing: float = 0.0) -> float:
    """The sum of all `terms` in one backward pass a batch: mean of ‖FQT − QAT gradient‖²."""
    found = []
    for draw, (x, labels) in enumerate(batches, first):
        with Probe(net, x, labels, seed, label_smoothing) as probe:
            noise = probe.gradient(dict.fromkeys(probe.sites, draw), specs) - probe.exact
            found.append(float(noise @ noise))
    return float(np.mean(found))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error (0 of one value)."""
    error = np.std(values, ddof=1) / np.sqrt(len(values)) if len(values) > 1 else 0.0
    return float(np.mean(values)), float(error)


def slopes(variances: dict[int, float]) -> dict[int, float]:
    """bits b → V(b − 1) / V(b) over the law's ((2^b − 1) / (2^(b − 1) − 1))²: 1 where it holds."""
    return {b: variances[b - 1] / v / ((2**b - 1) / (2 ** (b - 1) - 1)) ** 2
            for b, v in variances.items() if b - 1 in variances}
