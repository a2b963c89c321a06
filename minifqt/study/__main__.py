"""Look into training, and check the paper's claims on it: python -m minifqt.study layers [RUN]."""
import argparse
import json
import sys
from pathlib import Path

import minifqt
from minifqt import backend
from minifqt.study import claims, tools
from minifqt.study.draw import PICTURES, draw
from minifqt.study.setting import Setting

STUDIES = {
    "unbiased": (claims, "Theorem 1: is the quantized gradient's mean that of QAT, site by site?"),
    "layers": (claims, "Theorem 2: what each site adds to the gradient's variance, and their sum"),
    "variance": (claims, "quantization variance against bits, beside that of sampling"),
    "bounds": (claims, "each layer's variance: measured, closed form, the theorem's bound"),
    "bins": (claims, "how the codes are used, and the ranges of the rows"),
    "replay": (tools, "one step of a run again, with --change, on the same batch and noise"),
    "audit": (tools, "proof of integers: what each product of a step multiplies and sums"),
    "bits": (tools, "bits of each layer for a budget of variance, beside the same for all"),
    "report": (tools, "all of it on one page, report.html, to look at in a browser"),
}


def parser() -> argparse.ArgumentParser:
    """All flags, with their defaults in the help."""
    flags = argparse.ArgumentParser(
        prog="python -m minifqt.study", description=__doc__.partition(":")[0] + ".",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n".join(f"  {name:9s} {what}" for name, (_, what) in STUDIES.items()))
    add = flags.add_argument
    add("study", choices=STUDIES, help="see below")
    add("run", nargs="?", help="folder of a run of train.py, or one of its checkpoints; without "
                               "it, resnet8 learns the digits first")
    add("--step", type=int, help="of the run; default: where the checkpoint stands")
    add("--data-dir", default=".data", help="where the run's data are; %(default)s")
    add("--device", choices=("auto", "cpu", "cuda"), default="cpu", help="%(default)s")
    add("--epochs", type=int, default=4, help="of learning, without a run; %(default)s")
    add("--recipe", help="quantizers to study; default: the run's, without a run bhq5")
    add("--change", metavar="WHERE=SPEC", action="append", default=[],
        help="of replay, as often as wanted: a place (grad_x), a layer's two gradients (conv1) or "
             "one of its places (conv1.grad_x), and a quantizer: psq4, identity, …")
    add("--quantizers", default="ptq,psq,bhq", help="of variance, bounds, bins; %(default)s")
    add("--bits", type=int, default=4, help="of bounds and bins; %(default)s")
    add("--alpha", type=float, help="of bits: budget ÷ sampling variance; default: the recipe's")
    add("--layer", help="of bins; default: the first that is quantized backwards, but one")
    add("--draws", type=int, help="of the noise, for bits and report: batches; default: enough")
    add("--seed", type=int, default=0, help="of the studied noise; without a run also of the net")
    add("--threads", type=int, default=backend.threads(), help="they change no number")
    add("--out", default="runs/study", help="folder of the JSON and the picture; %(default)s")
    return flags


def main(arguments: list[str] | None = None) -> int:
    """Exit status 0; 1 after an error (one line says what to do) or where a claim fails; 130."""
    try:
        flags = parser().parse_intermixed_args(arguments)
        minifqt.set_threads(flags.threads)
        require(flags)
        setting = Setting(flags.run, flags.step, flags.data_dir, flags.seed, flags.epochs,
                          flags.device)
        reach(setting, flags)
        home, _ = STUDIES[flags.study]
        result, text, holds = getattr(home, f"study_{flags.study}")(flags, setting)
        folder = Path(flags.out)
        folder.mkdir(parents=True, exist_ok=True)
        result = {"study": flags.study, "command": " ".join(["python -m minifqt.study", *(
            arguments if arguments is not None else sys.argv[1:])]), "seed": flags.seed} | result
        path = folder / f"{flags.study}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")
        picture = (draw(result, path.with_suffix(".png")) if flags.study in PICTURES else
                   "no picture")
        print(f"{text}\nwritten: {path}, {picture}")
        return 0 if holds else 1
    except (ValueError, RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def reach(setting, flags):
    """The step that is asked for, or what is learnt without a run."""
    if setting.is_run and flags.study in ("report", "variance"):      # they look at more steps
        if flags.recipe:
            raise ValueError(f"--recipe {flags.recipe}: {flags.study} shows a run as it is. Leave "
                             "the flag out; --quantizers are those that variance compares.")
        return
    if setting.ahead:
        print(f"training {setting.ahead} steps, those of the run, to its step {flags.step}")
        setting.train(setting.ahead)
    if not setting.is_run and flags.step is None and flags.study != "variance":
        setting.learn(flags.epochs)                       # variance learns as it goes
    if flags.recipe:
        setting.use(flags.recipe)
    else:
        setting.settle()


def require(flags):
    """ValueError for a flag that cannot be."""
    if flags.draws is not None and flags.draws < 2:
        raise ValueError(f"--draws {flags.draws}: a variance needs at least 2.")
    if flags.epochs < 0 or flags.seed < 0:
        raise ValueError(f"--epochs {flags.epochs}, --seed {flags.seed}: expected 0 or more.")
    if flags.alpha is not None and not 0 < flags.alpha < float("inf"):
        raise ValueError(f"--alpha {flags.alpha}: expected a number above 0.")
    for name in flags.quantizers.split(","):
        minifqt.quantizers.create(name, flags.bits)


if __name__ == "__main__":
    sys.exit(main())
