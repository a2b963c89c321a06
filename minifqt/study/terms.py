"""The noise of a fully quantized backward pass, taken apart: what each site adds to the gradient.

Sites are switched on one after another in the order of the backward pass, all with the noise of
one draw. What the next one changes is Γ ε: its own noise, made from a gradient that already carries
the noise from above, on its way to the parameters. These parts are a martingale's differences: they
have mean zero (Theorem 1), no correlation, and their squares add up (Theorem 2).
"""
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from minifqt.study.probe import Probe


@dataclass
class Terms:
    """Of some draws of the noise: inner products and projections of the parts Γ_l ε_l.

    sites       names, in the order of the backward pass
    grams       (draws, sites, sites): ⟨Γ_k ε_k, Γ_l ε_l⟩; they sum to ‖FQT − QAT gradient‖²
    along       (draws, sites): ⟨r_l, Γ_l ε_l⟩ / ‖r_l‖², r_l the response to one step (NaN for 0)
    parameters  names;  projected  (draws, parameters): ⟨g, FQT − g⟩ / ‖g‖², g of QAT (NaN for 0)
    """

    sites: list[str]
    grams: np.ndarray
    along: np.ndarray
    parameters: list[str]
    projected: np.ndarray


def measure(probe: Probe, draws: Iterable[int], specs: dict | None = None) -> Terms:
    """The terms of these draws: a backward pass for each grad_x, and one more, a draw.

    draws  their numbers: the same number is the same noise.  ValueError for fewer than two
    specs  site → quantizer, where it is not the recipe's
    """
    exact, blocks = probe.exact, probe.blocks
    directions = [probe.response(site, specs)[at] for site, at in _reach(probe).items()]
    grams, along, projected = [], [], []
    for draw in draws:
        parts, noise = _parts(probe, draw, specs)
        grams.append(_gram(probe, parts))
        along.append([_share(r, part) for r, part in zip(directions, parts, strict=True)])
        projected.append([_share(exact[at], noise[at]) for at in blocks.values()])
    if len(grams) < 2:
        raise ValueError(f"{len(grams)} draws: a variance needs at least two.")
    return Terms(probe.sites, np.array(grams), np.array(along), list(blocks), np.array(projected))


def along_site(probe: Probe, site: str, draws: Iterable[int],
               specs: dict | None = None) -> np.ndarray:
    """`Terms.along` of one site, for more draws: two backward passes a draw."""
    at, direction = _reach(probe)[site], probe.response(site, specs)
    above = [other for other in probe.sites[:probe.sites.index(site)] if other.endswith(".grad_x")]
    found = []
    for draw in draws:
        on = dict.fromkeys(above, draw)
        part = probe.gradient({**on, site: draw}, specs) - probe.gradient(on, specs)
        found.append(_share(direction[at], part[at]))
    return np.array(found)


def _reach(probe):
    """Site → the part of a gradient that its noise reaches: grad_w its own weight alone."""
    return {site: probe.weight_of(site) if site.endswith(".grad_w") else slice(None)
            for site in probe.sites}


def sizes(probe: Probe, draw: int, specs: dict | None = None) -> dict[str, float]:
    """Site → ‖Γ_l ε_l‖² of one draw: what Theorem 2 adds up, without bias from a single draw."""
    parts, _ = _parts(probe, draw, specs)
    return {site: float(part @ part) for site, part in zip(probe.sites, parts, strict=True)}


def _parts(probe, draw, specs):
    """Γ_l ε_l of each site, where it reaches, and FQT − QAT gradient."""
    on, last, parts, reach = {}, probe.exact, {}, _reach(probe)
    for site in probe.sites:
        if site.endswith(".grad_x"):
            on[site] = draw
            now = probe.gradient(on, specs)
            parts[site], last = now - last, now
    total = probe.gradient(dict.fromkeys(probe.sites, draw), specs)
    return [parts.get(site, (total - last)[at]) for site, at in reach.items()], total - probe.exact


def _gram(probe, parts):
    """Inner products of all parts, (sites, sites)."""
    reach, count = list(_reach(probe).values()), len(parts)
    gram = np.zeros((count, count))
    wide = [i for i, at in enumerate(reach) if at == slice(None)]
    rows = np.array([parts[i] for i in wide]).reshape(len(wide), -1)
    gram[np.ix_(wide, wide)] = rows @ rows.T
    for i in set(range(count)) - set(wide):               # two of these have no element in common
        gram[i, i] = parts[i] @ parts[i]
        gram[i, wide] = gram[wide, i] = rows[:, reach[i]] @ parts[i]
    return gram


def _share(direction, part):
    size = direction @ direction
    return direction @ part / size if size else np.nan
