"""Check the claims of the paper on a real network: python -m minifqt.study layers."""
import argparse
import json
import sys
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import minifqt
import models
import train
from data.loader import Loader
from minifqt import backend, checkpoint, optim, training
from minifqt.study import sites, theorems, variance
from minifqt.study.draw import draw
from minifqt.study.probe import Probe
from minifqt.study.terms import along_site, measure

PILOT, BATCHES, MARGIN = 32, 32, 1.25                    # draws that tell how many are needed
STUDIES = {
    "unbiased": "Theorem 1: is the quantized gradient's mean that of QAT, site by site?",
    "layers": "Theorem 2: what each site adds to the gradient's variance, and their sum",
    "variance": "quantization variance against bits, beside that of sampling",
    "bounds": "each layer's variance: measured, closed form, the theorem's bound",
    "bins": "how the codes are used, and the ranges of the rows",
}


def parser() -> argparse.ArgumentParser:
    """All flags, with their defaults in the help."""
    flags = argparse.ArgumentParser(
        prog="python -m minifqt.study", description=__doc__.partition(":")[0] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:9s} {what}" for name, what in STUDIES.items()))
    add = flags.add_argument
    add("study", choices=STUDIES, help="see below")
    add("--run", help="folder of a run of train.py; without it, resnet8 learns the digits first")
    add("--data-dir", default=".data", help="where the run's data are; %(default)s")
    add("--epochs", type=int, default=4, help="of learning, without --run; %(default)s")
    add("--recipe", help="quantizers to study; default: the run's, without --run bhq5")
    add("--quantizers", default="ptq,psq,bhq", help="of variance, bounds and bins; %(default)s")
    add("--bits", type=int, default=4, help="of bounds and bins; %(default)s")
    add("--layer", help="of bins; default: the first that is quantized backwards, but one")
    add("--draws", type=int, help="of the noise; default: those that are needed, or 16")
    add("--seed", type=int, default=0, help="of the studied noise; without --run also of the net")
    add("--threads", type=int, default=backend.threads(), help="they change no number")
    add("--out", default="runs/study", help="folder of the JSON and the picture; %(default)s")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 after an error (one line says what to do) or where a claim fails; 130."""
    try:
        flags = parser().parse_args(arguments)
        minifqt.set_threads(flags.threads)
        require(flags)
        result, text, holds = globals()[f"study_{flags.study}"](flags)
        folder = Path(flags.out)
        folder.mkdir(parents=True, exist_ok=True)
        result = {"study": flags.study, "command": " ".join(["python -m minifqt.study", *(
            arguments if arguments is not None else sys.argv[1:])]), "seed": flags.seed} | result
        path = folder / f"{flags.study}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        print(f"{text}\nwritten: {path}, {draw(result, path.with_suffix('.png'))}")
        return 0 if holds else 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def require(flags):
    """ValueError for a flag that cannot be."""
    if flags.draws is not None and flags.draws < 2:
        raise ValueError(f"--draws {flags.draws}: a variance needs at least 2.")
    if flags.epochs < 0 or flags.seed < 0:
        raise ValueError(f"--epochs {flags.epochs}, --seed {flags.seed}: expected 0 or more.")
    for name in flags.quantizers.split(","):
        minifqt.quantizers.create(name, flags.bits)


class Setting:
    """A network at a point of its training, and its batches from there on."""

    def __init__(self, flags):
        if flags.run:
            arrays, meta = checkpoint.load(Path(flags.run) / "last.safetensors")
            config, self.progress = meta["config"], training.Progress(**meta["progress"])
        else:
            arrays, self.progress = None, training.Progress()
            config = {**train.PRESETS["digits"], "dataset": "digits", "recipe": "bhq5", "lr": 0.1,
                      "seed": flags.seed, "epochs": max(1, flags.epochs)}
        self.config, preset = config, train.PRESETS[config["dataset"]]
        train_set, _ = data.load(config["dataset"], flags.data_dir)
        self.net = minifqt.fuse(models.build(
            config["model"], train_set.classes, flags.recipe or config["recipe"], config["seed"],
            channels=train_set.images.shape[-1]))
        self.loader = Loader(train_set, config["batch_size"], self.net.streams, train=True,
                             padding=preset["padding"], flip=preset["flip"])
        self.optimizer = minifqt.SGD()
        if arrays is not None:
            self.net.load_state({name.removeprefix("net/"): array for name, array in arrays.items()
                                 if name.startswith("net/")})
        elif flags.study != "variance":                   # which learns as it goes
            self.learn(flags.epochs)

    def learn(self, epochs):
        """Some epochs more."""
        schedule = optim.cosine(self.config["lr"], self.config["epochs"])
        for _ in range(epochs):
            training.train_epoch(self.net, self.optimizer, self.loader,
                                 schedule(self.progress.epoch), self.progress)
            self.progress = training.Progress(self.progress.epoch + 1, step=self.progress.step)

    def batches(self, count):
        """The next ones, (x, labels) each; augmented as in training."""
        p, found = self.progress, []
        for epoch in range(p.epoch, p.epoch + count):
            found += islice(self.loader.epoch(epoch, p.position if epoch == p.epoch else 0),
                            count - len(found))
            if len(found) == count:
                break
        return found

    def probe(self, seed):
        """The next batch in a probe."""
        (x, labels), = self.batches(1)
        return Probe(self.net, x, labels, seed)

    def __str__(self):
        c = self.config
        return (f"{c['model']} on {c['dataset']}, {c['recipe']}, seed {c['seed']}, epoch "
                f"{self.progress.epoch}, batch {c['batch_size']}")


def announced(probe, draws):
    """The numbers of the draws, with a progress bar; says beforehand how long they take."""
    passes = len(probe.sites) // 2 + 2
    whole = draws * passes * seconds(probe)
    print(f"{draws} draws of {passes} backward passes: about {whole:.0f} s")
    return tqdm(range(draws), leave=False, disable=None)


def seconds(probe):
    """Of a backward pass."""
    start = time.perf_counter()
    for _ in range(3):
        probe.gradient(dict.fromkeys(probe.sites, 0))
    return (time.perf_counter() - start) / 3


def study_unbiased(flags):
    """Theorem 1; for sites where the pilot's draws are too few, as many as it says are needed."""
    setting, more = Setting(flags), {}
    with setting.probe(flags.seed) as probe:
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


def study_layers(flags):
    """Theorem 2."""
    setting = Setting(flags)
    with setting.probe(flags.seed) as probe:
        draws = flags.draws or PILOT
        found = theorems.layers(measure(probe, announced(probe, draws)))
    total, (ratio, error) = found.total[0], found.ratio
    rows = [[site, f"{mean:.3g} ± {e:.1g}", f"{mean / total:.1%}"]
            for site, (mean, e) in found.terms.items()]
    correlated = [pair for pair in found.pairs if abs(pair[0]) > found.limit]
    text = (f"total variance {total:.4g} ± {found.total[1]:.2g}, by {draws} draws; total / sum of "
            f"terms {ratio:.3f} ± {error:.3f}; " + (
                f"CORRELATED: {correlated[0][1]} and {correlated[0][2]}, z {correlated[0][0]:.1f}"
                if correlated else "no two sites' noises are correlated"))
    holds = not correlated and abs(ratio - 1) < max(0.1, 4 * error)
    return ({"network": str(setting), "draws": draws, **asdict(found)},
            table(["site", "variance of the gradient", "share"], rows) + text, holds)


def study_variance(flags):
    """Variance against bits at the start, in the middle and at the end of learning, or of a run."""
    setting, points, lines = Setting(flags), [], []
    halves = [0] if flags.run else [0, flags.epochs // 2, flags.epochs - flags.epochs // 2]
    draws, names = range(flags.draws or 8), flags.quantizers.split(",")
    with setting.probe(flags.seed) as probe:
        passes = len(halves) * (len(draws) * (7 * len(names) + 1) + 2 * BATCHES)
        print(f"{passes} backward passes: about {passes * seconds(probe):.0f} s, and the learning")
    for epochs in halves:
        setting.learn(epochs)
        sampled, _ = variance.sampling(setting.net, tqdm(
            setting.batches(BATCHES), leave=False, disable=None))
        with setting.probe(flags.seed) as probe:
            grad_w, _ = variance.quantization(probe, "ptq8", draws, "grad_w")
            found = {name: {b: variance.quantization(probe, f"{name}{b}", draws)
                            for b in tqdm(range(2, 9), name, leave=False, disable=None)}
                     for name in names}
        where = f"epoch {setting.progress.epoch}"
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


def study_bounds(flags):
    """Each layer's gradient under each quantizer, in draws, closed form and bound."""
    setting, rows = Setting(flags), []
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


def study_bins(flags):
    """One layer's codes and ranges."""
    setting = Setting(flags)
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


if __name__ == "__main__":
    sys.exit(main())
