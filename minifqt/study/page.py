"""One HTML file about a run: curves, terms, codes, bits and audit, with a layer and step to pick.

`page` is data in, text out; page.html holds the looks and the picking. Nothing is loaded from
elsewhere: the file works from a disk, in any browser.
"""
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minifqt.layers import Layer
from minifqt.quantizers import parse
from minifqt.study import sites, variance
from minifqt.study.audit import audit
from minifqt.study.probe import Probe

QUANTIZERS, POINTS = ("ptq", "psq", "bhq"), 64            # compared; of a curve of ranges
TEMPLATE = Path(__file__).with_name("page.html")


def look(net: Layer, batches: Sequence, seed: int = 0, label_smoothing: float = 0.0) -> dict:
    """What the page shows of one step: terms and sampling over batches, codes and audit of one."""
    found = variance.terms(net, batches, None, 0, seed, label_smoothing)
    sampled, _ = variance.sampling(net, batches, label_smoothing)
    with Probe(net, *batches[0], seed, label_smoothing) as probe:
        specs = {site: probe.specs[site] for site in probe.sites}
        errors = {site: dy for site, dy in probe.errors.items() if site.endswith(".grad_x")}
        loss = float(probe.loss)
    return {"loss": loss, "sampling": sampled, "terms": found, "specs": specs,
            "total": sum(mean for mean, _ in found.values()),
            "codes": {site: [_codes(name, bits_of(specs[site]), dy) for name in QUANTIZERS]
                      for site, dy in errors.items()},
            "audit": audit(net, *batches[0], seed, label_smoothing)}


def bits_of(spec: str) -> int:
    """Of a quantizer; 8 where it has none."""
    return getattr(parse(spec)[0], "bits", 8)


def _codes(name, bits, dy):
    row = sites.bins(name, bits, dy)
    ranges = np.quantile(row["ranges"], np.linspace(1, 0, min(POINTS, len(row["ranges"]))))
    closed, size = sites.closed_form(name, bits, dy)
    return {"name": f"{name}{bits}", "occupied": row["occupied"], "ranges": _short(ranges),
            "used": sites.bits_used(row["occupied"]), "variance": closed / size if size else 0.0}


def _short(values):
    return [float(f"{v:.4g}") for v in values]


def _finite(value):
    """With None for what JSON has no number for."""
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def page(data: dict) -> str:
    """The whole file.

    data  title, config (flat), curves (lines of metrics.jsonl), choices (lines of bits.jsonl) and
          points: `look` of each, with name, step and epoch
    """
    text = json.dumps(_finite(data), separators=(",", ":")).replace("<", "\\u003c")
    return TEMPLATE.read_text().replace("@DATA", text)
