"""Bits that follow the noise: where a recipe says NAME-auto, by Theorem 2 (docs/theory.md).

The gradient's variance is that of drawing the batch plus one term a quantizer. Every so many steps
these are measured, and each automatic place gets its bits anew: all terms together stay below alpha
times the sampling variance, at the least cost Σ bits · multiplies. Bits depend on weights, batches
and noise of their own, never on the noise that training rounds with: Theorem 1 still holds.
"""
import logging
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path

from minifqt.backend import one_blas_thread
from minifqt.checkpoint import json_lines, write_json_lines
from minifqt.layers import Layer
from minifqt.layers.base import Quantized
from minifqt.quantizers.base import AUTO, Automatic
from minifqt.rng import NonFiniteError
from minifqt.study import variance
from minifqt.study.probe import Probe
from minifqt.training import DivergedError

BITS = range(2, 9)
EVERY, FIRST = 1000, 64                                   # steps; before 1000 at 64, 128, 256, 512
BATCHES, NOISY, ROUNDS = 8, 3, 6                          # of a choice; NOISY of them for the terms
APART = 1 << 40                                           # from the seeds of training: other noise
TRUSTED, WORTH = 5, 0.98                                  # bits down to which the law holds; gain


@dataclass
class Bits:
    """Bits for some sites, and what was measured with them.

    bits     site → bits;  average  of them, weighted by multiplies
    terms    site → E‖Γ ε‖², of all sites of the network;  total  their sum
    """

    bits: dict[str, int]
    average: float
    terms: dict[str, float]
    total: float


class AutoBits:
    """A loader that chooses the bits of a network's automatic places before some of its batches.

    net, loader  what is trained, and what yields its batches (data.loader.Loader)
    alpha        total quantization variance ÷ sampling variance, at most
    every        steps from one choice to the next, if not sooner at the beginning
    log          file to which each choice goes as a line of JSON
    Raises ValueError where no place of the network is automatic.
    """

    def __init__(self, net: Layer, loader, alpha: float = 0.1, label_smoothing: float = 0.0,
                 every: int = EVERY, log: Path | None = None):
        self.places = {bound.name: bound for _, layer in net.walk() if isinstance(layer, Quantized)
                       for bound in vars(layer.q).values() if isinstance(bound, Automatic)}
        if not self.places:
            raise ValueError("no place of this network is automatic: build it with a recipe such "
                             "as bhq-auto.")
        self.net, self.loader, self.alpha, self.every, self.log = net, loader, alpha, every, log
        self.label_smoothing = label_smoothing

    @property
    def bits(self) -> dict[str, int]:
        """Automatic site → the bits that it has now."""
        return {site: place.bits for site, place in self.places.items()}

    def __len__(self):
        return len(self.loader)

    def epoch(self, e: int, start: int = 0) -> Iterator:
        """The loader's batches of epoch e from step `start` on."""
        with closing(self.loader.epoch(e, start)) as batches:
            for i, batch in enumerate(batches, start):
                step = e * len(self) + i
                if due(step, self.every):
                    self.choose(step, self.loader.following(e, i, BATCHES))
                yield batch

    def choose(self, step: int, batches: Sequence) -> Bits:
        """Measure on these batches (x, labels), set the bits and log them.  DivergedError."""
        try:
            with self.net.streams.at(step), one_blas_thread():
                return self._choose(step, batches)
        except NonFiniteError as error:
            raise DivergedError(f"bits before step {step}: {error}") from None

    def _choose(self, step, batches):
        sampling, _ = variance.sampling(self.net, batches, self.label_smoothing)
        with Probe(self.net, *batches[0], 0, self.label_smoothing) as probe:
            costs = {site: probe.multiplies(site) for site in self.places if site in probe.sites}
        noise = Noise(self.net, batches[:NOISY], {site: self.places[site].recipe for site in costs},
                      APART + self.net.streams.seed, step, self.label_smoothing)
        bits = {site: self.places[site].bits for site in costs}
        found = fewest(noise, costs, bits, self.alpha * sampling)
        for site, b in found.bits.items():
            self.places[site].bits = b
        if found.total > self.alpha * sampling:
            logging.getLogger("minifqt").warning(
                "step %d: quantization variance is %.2g of the sampling variance, alpha %g cannot "
                "be kept.", step, found.total / sampling, self.alpha)
        self._note({"step": step, "sampling": sampling, "budget": self.alpha * sampling}
                   | asdict(found))
        return found

    def _note(self, line):
        """Lines of this step and later ones are of a run that was cut off."""
        if self.log is not None:
            kept = [old for old in json_lines(self.log) if old["step"] < line["step"]]
            write_json_lines(self.log, [*kept, line])


class Noise:
    """The quantization variance of a network on some batches, each time with noise of its own.

    recipes  site → "bhq-auto", of the sites whose bits are asked for;  step  of the training
    """

    def __init__(self, net: Layer, batches: Sequence, recipes: dict[str, str], seed: int, step: int,
                 label_smoothing: float = 0.0):
        self.net, self.batches, self.recipes = net, batches, recipes
        self.seed, self.label_smoothing = seed, label_smoothing
        self._draws = count(step << 16, len(batches))

    def terms(self, bits: dict[str, int]) -> dict[str, float]:
        """Site → its term of Theorem 2, of all sites of the network."""
        return {site: mean for site, (mean, _) in self._ask(variance.terms, bits).items()}

    def total(self, bits: dict[str, int]) -> float:
        """Their sum, in one backward pass a batch."""
        return self._ask(variance.total, bits)

    def _ask(self, question, bits):
        specs = {site: self.recipes[site].replace(AUTO, str(b)) for site, b in bits.items()}
        return question(self.net, self.batches, specs, next(self._draws), self.seed,
                        self.label_smoothing)


def due(step: int, every: int) -> bool:
    """Whether bits are chosen before this step: 0, FIRST · 2ᵏ below `every`, and its multiples."""
    early = step < every and step % FIRST == 0 and (step // FIRST).bit_count() == 1
    return step % every == 0 or early


def fewest(noise: Noise, costs: dict[str, int], bits: dict[str, int], budget: float) -> Bits:
    """The cheapest bits whose terms, with those of all other sites, sum to `budget` at most.

    What other bits would give is said by the law Var ∝ 1 / (2^b − 1)²; noise from above widens the
    ranges below, so below TRUSTED bits it is followed for one bit at a time, and a proposal whose
    noise is too large is made again for less of it. What is used was measured to fit. If
    nothing fits, the bits with the least noise.
    costs  multiplies of each site;  bits  to begin with; who reaches no parameter is left out
    """
    found = []
    for _ in range(ROUNDS):
        now = measured(noise, costs, bits)
        found.append(now)
        bits = _better(noise, now, costs, budget)
        if bits is None:
            break
    return min(found, key=lambda b: (b.total > budget, b.total if b.total > budget else b.average))


def _better(noise, now, costs, budget):
    """Bits that fit where `now` does not, or fit and cost less; None where there are none."""
    if now.total > budget:
        bits = _proposed(now, costs, budget)
        return bits if bits != now.bits else None
    for target in (budget, math.sqrt(budget * now.total), now.total):
        bits = _proposed(now, costs, target)
        if average(bits, costs) <= WORTH * now.average and noise.total(bits) <= budget:
            return bits
    return None


def _proposed(now, costs, target):
    """What the law takes for the cheapest with this noise; 8 bits where it knows none."""
    fixed = now.total - sum(now.terms[site] for site in now.bits)
    chosen = cheapest(_units([costs[site] for site in now.bits]),
                      [_predicted(now.terms[site], b) for site, b in now.bits.items()],
                      target - fixed)
    return dict(zip(now.bits, chosen or [BITS[-1]] * len(now.bits), strict=True))


def measured(noise: Noise, costs: dict[str, int], bits: dict[str, int]) -> Bits:
    """What the network's noise is with these bits; sites without any are dropped."""
    of = noise.terms(bits)
    bits = {site: b for site, b in bits.items() if of[site] > 0}
    return Bits(bits, average(bits, costs), of, sum(of.values()))


def average(bits: dict[str, int], costs: dict[str, int]) -> float:
    """Of bits, weighted by costs."""
    whole = sum(costs[site] for site in bits)
    return sum(costs[site] * b for site, b in bits.items()) / max(1, whole)


def _units(costs):
    """In 1/500 of all: few different numbers, and `cheapest` is quick."""
    return [max(1, round(500 * cost / sum(costs))) for cost in costs]


def _predicted(term, bits):
    """Bits → the term that the law expects."""
    return {b: term * ((2**bits - 1) / (2**b - 1)) ** 2 for b in BITS
            if b >= min(bits - 1, TRUSTED)}


def cheapest(costs: Sequence[int], variances: Sequence[dict[int, float]],
             budget: float) -> tuple[int, ...] | None:
    """One b of variances[i] for each site i: least Σ cost · b with Σ variance ≤ budget, or None.

    Exact: of all choices for the first sites, those stay that no other beats in cost and variance.
    """
    front = [(0, 0.0, ())]
    for cost, by_bits in zip(costs, variances, strict=True):
        longer = sorted((c + cost * b, v + more, chosen + (b,))
                        for c, v, chosen in front for b, more in by_bits.items())
        front, least = [], math.inf
        for c, v, chosen in longer:
            if v < least and v <= budget:
                front.append((c, v, chosen))
                least = v
    return front[0][2] if front else None
