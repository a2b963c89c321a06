"""One step of a run once more, with other quantizers in some places, on the same batch and noise.

Noise is a function of (seed, name, step, element), so nothing else differs: what a layer's gradient
becomes is the effect of the change alone.
"""
from collections.abc import Mapping
from copy import deepcopy

import numpy as np

from minifqt.layers import Layer
from minifqt.layers.base import Quantized
from minifqt.quantizers.base import AUTO, Bound, BoundActivation, gradient
from minifqt.study.probe import Probe

PLACES = ("act", "weight", "grad_w", "grad_x")


def change(net: Layer, changes: Mapping[str, str]) -> Layer:
    """The network itself with other quantizers in some places.

    changes  where → spec: a place of all layers (grad_x), a layer's two gradients (conv1), or one
             of its places (conv1.grad_x); the last that fits counts
    Raises ValueError for a place or spec that is not there.
    """
    layers = {name: layer for name, layer in net.walk() if isinstance(layer, Quantized)}
    for where, spec in changes.items():
        if AUTO in spec:
            raise ValueError(f"--change {where}={spec}: bits are chosen in training, or by the "
                             "study `bits`. Give a number, as in bhq4.")
        met = [(layer, place) for name, layer in layers.items() for place in PLACES
               if where in (place, f"{name}.{place}") or (where == name and "grad" in place)]
        if not met:
            raise ValueError(f"--change {where}: there is no such place. Expected one of "
                             f"{', '.join(PLACES)}, or a layer, perhaps with its place, as in "
                             f"{list(layers)[-1]}.grad_x; the layers are {', '.join(layers)}.")
        for layer, place in met:
            exchange(layer, place, spec)
    return net


def exchange(layer: Quantized, place: str, spec: str) -> None:
    """Another quantizer in one place of a layer; an activation keeps its running range."""
    old = getattr(layer.q, place)
    if place == "act":
        new = BoundActivation(spec, old.streams, old.name, old.eval_range)
        new.range, new.calibrated, new.training = old.range, old.calibrated, old.training
    elif place == "weight":
        new = Bound(spec, "nearest", old.streams, old.name)
    else:
        new = gradient(spec, old.streams, old.name)
    setattr(layer.q, place, new)


def replay(net: Layer, batch: tuple, changes: Mapping[str, str], seed: int, step: int,
           label_smoothing: float = 0.0) -> dict:
    """Step `step` of the run with this seed on `batch`, as it was and changed.

    Returns losses, and of each parameter: norm of the QAT gradient; noise, changed: distance of the
    gradient from that of QAT, relative to it, as the run had it and with the changes; moved:
    distance between the two; cosine: between them.
    """
    net.streams.step = step                               # what is rounded forward has noise too
    other = change(deepcopy(net), changes)
    with Probe(net, *batch, seed, label_smoothing) as probe:
        loss, exact, blocks = float(probe.loss), probe.exact, probe.blocks
        was = probe.gradient(dict.fromkeys(probe.sites, step))
    with Probe(other, *batch, seed, label_smoothing) as probe:
        other_loss, now = float(probe.loss), probe.gradient(dict.fromkeys(probe.sites, step))
    rows = [{"parameter": name} | _compared(exact[at], was[at], now[at])
            for name, at in {**blocks, "all": slice(None)}.items()]
    return {"loss": loss, "changed_loss": other_loss, "rows": rows}


def _compared(exact, was, now):
    size, product = np.linalg.norm(exact), np.linalg.norm(was) * np.linalg.norm(now)
    relative = {"noise": was - exact, "changed": now - exact, "moved": now - was}
    return {"norm": float(size)} | {
        key: float(np.linalg.norm(v) / size) if size else 0.0 for key, v in relative.items()} | {
        "cosine": float(was @ now / product) if product else 1.0}
