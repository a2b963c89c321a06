"""The paper's claims as commands: each returns its numbers, a table and whether the claim holds.

theorems.py, variance.py and sites.py do the statistics; here it is said how long they take, and
how their numbers are read. What looks into runs instead: tools.py.
"""
import time
from dataclasses import asdict

import numpy as np
from tqdm import tqdm

from minifqt.study import sites, theorems, variance
from minifqt.study.setting import points_of
from minifqt.study.terms import along_site, measure

PILOT, BATCHES, MARGIN = 32, 32, 1.25                    # draws that tell how many are needed


def announced(probe, draws):
    """The numbers of the draws, with a progress bar; says beforehand how long they take."""
    passes = len(probe.sites) // 2 + 2
    whole = draws * passes * seconds(probe)
    print(f"{draws} draws of {passes} backward passes: about {whole:.0f} s")
    return tqdm(range(draws), leave=False, disable=None)


def require_noise(probe):
    """ValueError where no gradient is quantized."""
    if all(spec == "identity" for spec in probe.specs.values()):
        raise ValueError("no gradient is quantized here: there is no noise to study. Give --recipe "
                         "bhq5, psq4, …")


def seconds(probe):
    """Of a backward pass."""
    start = time.perf_counter()
    for _ in range(3):
        probe.gradient(dict.fromkeys(probe.sites, 0))
    return (time.perf_counter() - start) / 3


def study_unbiased(flags, setting):
    """Theorem 1; for sites where the pilot's draws are too few, as many as it says are needed."""
    more = {}
    with setting.probe(flags.seed) as probe:
        require_noise(probe)
        terms = measure(probe, announced(probe, flags.draws or PILOT))
        found = theorems.unbiased(terms)
        if not flags.draws:
            short = {t.name: range(t.draws, int(MARGIN * t.needed)) for t in found.sites
                     if t.needed > t.draws}          # what the pilot says is uncertain itself
            passes = 2 * sum(map(len, short.values()))
            print(f"{passes} backward passes more, for {len(short)} sites: about "
                  f"{passes * seconds(probe):.0f} s")
            more = {site: along_site(probe, site, tqdm(draws, site, leave=False, disable=None))
                    for site, draws in short.items()}
            found = theorems.unbiased(terms, more)
    rows = [[t.name, f"{t.mean:+.5f} ± {t.error:.5f}", f"{t.z:+.2f}", str(t.draws), str(t.needed)]
            for t in found.sites]
    verdict = (f"{len(found.sites) + len(found.parameters)} tests, limit |z| = {found.limit:.2f} "
               f"(one study of {1 / theorems.ALARM:.0f} exceeds it by chance): " + (
                   "no bias" if not found.alarms else "BIAS in " + ", ".join(
                       f"{t.name}, z {t.z:+.1f}" for t in found.alarms)))
    return ({"network": str(setting), "draws": flags.draws or PILOT, **asdict(found)},
            table(["site", "mean noise along its response, steps", "z", "draws",
                   f"draws that find {theorems.BIAS} steps in {theorems.POWER:.0%}"], rows)
            + verdict, not found.alarms)


def study_layers(flags, setting):
    """Theorem 2."""
    with setting.probe(flags.seed) as probe:
        require_noise(probe)
        draws = flags.draws or PILOT
        found = theorems.layers(measure(probe, announced(probe, draws)))
    total, (ratio, error) = found.total[0], found.ratio
    rows = [[site, f"{mean:.3g} ± {e:.1g}", f"{mean / total:.1%}"]
            for site, (mean, e) in found.terms.items()]
    correlated = [pair for pair in found.pairs if abs(pair[0]) > found.limit]
    text = (f"total variance {total:.4g} ± {found.total[1]:.2g}, by {draws} draws; total / sum of "
            f"terms {ratio:.3f} ± {error:.3f}; " + (
                f"CORRELATED: {correlated[0][1]} and {correlated[0][2]}, z {correlated[0][0]:.1f}"
                if correlated else f"no two sites' noises correlated beyond chance, |z| < "
                f"{found.limit:.2f}") + (
                "; too few draws: the error of that ratio should be 0.05 at most" if error > 0.05
                else ""))
    holds = not correlated and abs(ratio - 1) < max(0.1, 4 * error)
    return ({"network": str(setting), "draws": draws, **asdict(found)},
            table(["site", "variance of the gradient", "share"], rows) + text, holds)


def study_variance(flags, setting):
    """Variance against bits at the start, in the middle and at the end of learning, or of a run."""
    points, lines, draws = [], [], range(flags.draws or 8)
    names, smoothing = flags.quantizers.split(","), setting.config["label_smoothing"]
    with setting.probe(flags.seed) as probe:
        passes = 3 * (len(draws) * (7 * len(names) + 1) + 2 * BATCHES)
        print(f"{passes} backward passes: about {passes * seconds(probe):.0f} s, and the learning")
    for where, at in stages(flags, setting):
        sampled, _ = variance.sampling(at.net, tqdm(at.batches(BATCHES), where, leave=False,
                                                    disable=None), smoothing)
        with at.probe(flags.seed) as probe:
            grad_w, _ = variance.quantization(probe, "ptq8", draws, "grad_w")
            found = {name: {b: variance.quantization(probe, f"{name}{b}", draws)
                            for b in tqdm(range(2, 9), name, leave=False, disable=None)}
                     for name in names}
        slopes = {name: variance.slopes({b: v for b, (v, _) in by_bits.items()})
                  for name, by_bits in found.items()}
        points.append({"where": where, "sampling": sampled, "grad_w": grad_w,
                       "quantization": found, "slopes": slopes})
        lines += [[where, "sampling of batches (QAT)", f"{sampled:.3g}"] + [""] * 6,
                  [where, "Q_b1, 8 bits per tensor"] + [""] * 6 + [f"{grad_w:.2g}"]]
        for name, by_bits in found.items():
            lines.append([where, name, *(f"{v:.2g}" for v, _ in by_bits.values())])
            lines.append([where, "its slope / the law's", "", *(
                f"{v:.2f}" for v in slopes[name].values())])
    return ({"network": str(setting), "draws": len(draws), "points": points},
            table(["", "total variance", *(f"{b} bits" for b in range(2, 9))], lines), True)


def stages(flags, setting):
    """(where, Setting) of a run's checkpoints, or of what learns meanwhile."""
    if setting.is_run:
        for name, other in points_of(flags.run, flags.step, flags.data_dir, flags.device):
            yield f"{name}, epoch {other.progress.epoch}", other
    else:
        for epochs in (0, flags.epochs // 2, flags.epochs - flags.epochs // 2):
            setting.learn(epochs)
            yield f"epoch {setting.progress.epoch}", setting


def study_bounds(flags, setting):
    """Each layer's gradient under each quantizer, in draws, closed form and bound."""
    rows = []
    with setting.probe(flags.seed) as probe:
        errors = {site: dy for site, dy in probe.errors.items() if site.endswith(".grad_x")}
    for site, dy in tqdm(errors.items(), leave=False, disable=None):
        rows += [{"site": site} | sites.bounds(name, flags.bits, dy, flags.draws or PILOT,
                                               flags.seed) for name in flags.quantizers.split(",")]
    text = table(["site", "quantizer", "measured", "closed form", "bound", "bound / closed", "z"], [
        [r["site"], f"{r['quantizer']}{r['bits']}", f"{r['measured']:.3g} ± {r['error']:.1g}",
         *(f"{r[key]:.3g}" for key in ("closed", "bound", "loose")), f"{r['z']:+.1f}"]
        for r in rows])
    wrong = [r for r in rows if abs(r["z"]) > 5 or r["closed"] > r["bound"]]
    return ({"network": str(setting), "draws": flags.draws or PILOT, "rows": rows},
            text + f"relative to Σ dy²; {len(wrong)} of {len(rows)} beyond bound or noise",
            not wrong)


def study_bins(flags, setting):
    """One layer's codes and ranges."""
    with setting.probe(flags.seed) as probe:
        errors = {site.rpartition(".")[0]: dy for site, dy in probe.errors.items()}
    layer = flags.layer or list(errors)[1]
    if layer not in errors:
        raise ValueError(f"--layer {layer}: there are {', '.join(errors)}.")
    rows = [sites.bins(name, flags.bits, errors[layer]) for name in flags.quantizers.split(",")]
    for row in rows:
        row["entropy"] = sites.bits_used(row["occupied"])
    text = table(["quantizer", "bits used", "codes used", "largest range", "median", "least"], [
        [f"{row['quantizer']}{row['bits']}", f"{row['entropy']:.2f}",
         f"{np.count_nonzero(row['occupied'])} of {len(row['occupied'])}",
         *(f"{np.quantile(row['ranges'], q):.3g}" for q in (1, 0.5, 0))] for row in rows])
    return ({"network": f"{layer} of {setting}", "layer": layer, "rows": rows},
            text + "ranges in units of the largest |dy|", True)


def table(head, rows):
    """Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n\n"
