"""Looks into a run as commands: replay, audit, bits, report; numbers, a table, whether all is well.

replay.py, audit.py, autobits.py and page.py do the work.
"""
import math
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from minifqt import autobits
from minifqt.autobits import BITS
from minifqt.checkpoint import json_lines
from minifqt.quantizers.base import AUTO
from minifqt.study import variance
from minifqt.study.audit import audit
from minifqt.study.claims import BATCHES, seconds, table
from minifqt.study.page import look, page
from minifqt.study.replay import replay
from minifqt.study.setting import folder_of, points_of

PAGE_BATCHES = 4                                          # at each step that a page shows


def study_replay(flags, setting):
    """One step again, with --change."""
    changes = dict(_split(text) for text in flags.change)
    shown = {"all"} | {f"{name}.weight" for name in setting.layers}
    step = setting.progress.step
    found = replay(setting.net, setting.batches(1)[0], changes, setting.config["seed"], step,
                   setting.config["label_smoothing"])
    rows = [[r["parameter"], f"{r['norm']:.3g}",
             *(f"{r[key]:.4f}" for key in ("noise", "changed", "moved", "cosine"))]
            for r in found["rows"] if r["parameter"] in shown]
    said = ", ".join(flags.change) or "nothing changed"
    return ({"network": f"step {step} of {setting}", "changes": changes, **found},
            table(["gradient of", "norm (QAT)", "FQT − QAT", "changed − QAT", "changed − FQT",
                   "cosine"], rows)
            + f"step {step}, {said}; distances ÷ the QAT gradient's norm; loss "
              f"{found['loss']:.6f}, changed {found['changed_loss']:.6f}", True)


def _split(text):
    where, equals, spec = text.partition("=")
    if not equals:
        raise ValueError(f"--change {text}: expected WHERE=SPEC, as in grad_x=psq4 or "
                         "conv1=identity.")
    return where, spec


def study_audit(flags, setting):
    """One step: integers or floats, exact or not, and how much memory."""
    found = audit(setting.net, *setting.batches(1)[0], flags.seed,
                  setting.config["label_smoothing"])
    rows = [[r["layer"], r["product"], r["codes"], f"{r['multiplies']:,}", f"{r['terms']:,}",
             *(f"{r[key]:.1f}" if key in r else "" for key in ("left31", "left24")),
             "" if "deviation" not in r else f"{r['deviation']:.1e}" if r["deviation"] else "0"]
            for r in found["products"]]
    whole = sum(r["multiplies"] for r in found["products"])
    integer = sum(r["multiplies"] for r in found["products"] if r["integers"])
    wrong = [r for r in found["products"] if not r.get("deviation", 0) <= 2**-22]    # or NaN
    parts, peak = found["memory"]["predicted"], found["memory"]["measured"]
    expected = sum(parts.values())
    text = table(["layer", "product", "codes", "multiplies", "terms of a sum", "bits left to 2³¹",
                  "to 2²⁴", "off int64 by"], rows) + "\n".join([
        f"{integer / whole:.1%} of {whole:,} multiplies on integers; "
        f"{len(wrong)} of {len(rows)} products are off int64 by more than 2⁻²² in one channel",
        f"not computed, for nobody reads it: {', '.join(found['skipped']) or 'nothing'}",
        "kept for backward: " + ", ".join(f"{dtype} {size / 1e6:.1f} MB" for dtype, size in by_type(
            found["kept"]).items()),
        f"peak memory of the step {expected / 1e6:.1f} MB predicted ("
        + ", ".join(f"{name} {size / 1e6:.1f}" for name, size in parts.items()) + ")"
        + (f"; measured on one thread {peak / 1e6:.1f} MB, the prediction is "
           f"{expected / peak:.2f} of it" if peak else "")])
    return {"network": str(setting), **found}, text, not wrong


def study_bits(flags, setting):
    """The cheapest bits of each layer for a budget, beside the same bits everywhere."""
    recipe, smoothing = setting.recipe, setting.config["label_smoothing"]
    spec = recipe.grad_x if AUTO in recipe.grad_x else re.sub(r"\d+(?=$|:)", AUTO, recipe.grad_x)
    if AUTO not in spec:
        raise ValueError(f"{recipe.grad_x} has no bits to choose: give --recipe bhq5, psq4, …")
    batches, alpha = setting.batches(BATCHES), flags.alpha or recipe.alpha
    some = batches[:flags.draws or autobits.NOISY]
    with setting.probe(flags.seed) as probe:
        costs = {site: probe.multiplies(site) for site in probe.sites if site.endswith(".grad_x")}
        passes = 2 * BATCHES + len(some) * (4 * (len(costs) + 3) + 3 * (len(BITS) + 6))
        print(f"about {passes} backward passes: about {passes * seconds(probe):.0f} s")
    sampled, _ = variance.sampling(setting.net, tqdm(batches, leave=False, disable=None), smoothing)
    noise, budget = autobits.Noise(setting.net, some, dict.fromkeys(costs, spec), flags.seed, 0,
                                   smoothing), alpha * sampled
    found = autobits.fewest(noise, costs, dict.fromkeys(costs, BITS[-1]), budget)
    rows = [{"bits": b, "total": noise.total(dict.fromkeys(found.bits, b))}
            for b in tqdm(BITS, "equal bits", leave=False, disable=None)]
    weights = {site: costs[site] for site in found.bits}
    text = table(["site", "bits", "its term", "share of the variance", "share of the multiplies"], [
        [site, str(b), f"{found.terms[site]:.3g}", f"{found.terms[site] / found.total:.1%}",
         f"{weights[site] / sum(weights.values()):.1%}"] for site, b in found.bits.items()])
    text += table(["the same bits everywhere", *(str(row["bits"]) for row in rows)],
                  [["total variance", *(f"{row['total']:.3g}" for row in rows)]])
    fixed = sum(term for site, term in found.terms.items() if site not in found.bits)
    needed = bits_of_equal(rows, found.total)
    text += (f"sampling variance {sampled:.3g}; budget, {alpha:g} of it, {budget:.3g}; "
             f"total {found.total:.3g}, of which {fixed:.3g} by sites that keep their bits\n"
             f"{found.average:.2f} bits on average; equal bits of the same variance: {needed:.2f}"
             + ("" if found.total <= budget else "\nthe budget cannot be kept: the sites that keep "
                "their bits, or 8 bits everywhere, need more"))
    return ({"network": str(setting), "spec": spec, "alpha": alpha, "sampling": sampled,
             "budget": budget, "equal": rows, "equal_bits": needed, "multiplies": weights,
             **asdict(found)}, text, found.total <= budget)


def study_report(flags, setting):
    """One page of a run: at its start, its best and its last checkpoint, and at --step."""
    if not setting.is_run:
        raise ValueError("report looks at a run of train.py: give its folder, as in runs/NAME.")
    folder, points, batches = folder_of(flags.run), [], flags.draws or PAGE_BATCHES
    config = {key: value for key, value in setting.config.items() if not isinstance(value, dict)}
    curves, choices = ([line for line in json_lines(folder / name) if key in line]
                       for name, key in (("metrics.jsonl", "test_loss"), ("bits.jsonl", "average")))
    with setting.probe(flags.seed) as probe:              # and as much again for the audits
        each = (len(probe.sites) // 2 + 8) * batches * 2 * seconds(probe)
    print(f"three steps or four, about {each:.0f} s each")
    for name, other in points_of(flags.run, flags.step, flags.data_dir, flags.device):
        print(f"{name}: {other}")
        points.append({"name": name, "step": other.progress.step,
                       "epoch": other.progress.step / len(other.loader)}
                      | look(other.net, other.batches(batches), flags.seed,
                             setting.config["label_smoothing"]))
    text = page({"title": str(setting), "config": config, "points": points, "curves": curves,
                 "choices": choices})
    Path(flags.out).mkdir(parents=True, exist_ok=True)
    path = Path(flags.out) / "report.html"
    path.write_text(text)
    return ({"network": str(setting), "points": [
        {key: point[key] for key in ("name", "step", "sampling", "terms", "total")}
        for point in points]}, f"{path}: open it in a browser ({len(text) / 1e6:.1f} MB)", True)


def bits_of_equal(rows, total):
    """Bits that everywhere the same would have this variance, between two by its logarithm."""
    log = [math.log(row["total"]) for row in rows]
    return float(np.interp(-math.log(total), [-v for v in log], [row["bits"] for row in rows]))


def by_type(kept):
    """dtype → bytes, of all layers."""
    found = {}
    for sizes in kept.values():
        for dtype, size in sizes.items():
            found[dtype] = found.get(dtype, 0) + size
    return found
