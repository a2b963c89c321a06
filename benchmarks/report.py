"""What accuracy.py found: the table of its results, and the curves of its runs. Not a script."""
import re
import statistics
from collections import defaultdict

from variance import QUANTIZERS, save_picture

AUTO = 0.5                                                # the bits of an -auto: the last column


def table(runs):
    """Markdown: one row a quantizer, mean test accuracy in per cent ± sample standard deviation."""
    found = by_quantizer(runs)
    columns = [None, *bits_of(found)]
    heads = [title(bits) for bits in columns]
    lines = [f"| gradients | {' | '.join(heads)} |", "|---|" + "---|" * len(columns)]
    for name in dict.fromkeys(name for name, _ in found):
        cells = [cell(found.get((name, bits), [])) for bits in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    commits = {(commit or "unknown")[:7] for run in runs for commit in run["commits"]}
    seconds = statistics.median(run["seconds"] for run in runs)
    threads = " or ".join(sorted({str(run["threads"]) for run in runs}))
    lines += ["", f"Test accuracy after {runs[0]['epochs']} epochs in per cent: mean ± sample "
              f"standard deviation over the seeds {seeds_of(runs)}; {len(runs)} runs, median "
              f"{seconds:.0f} s on {threads} thread{'s' * (threads != '1')}.",
              f"Commit {', '.join(sorted(commits))}; "
              f"{', '.join(sorted({run['machine']['cpu'] for run in runs}))}."]
    return "\n".join(lines)


def by_quantizer(runs):
    """{("bhq", 5): its runs}, in the order of a table; fp32's and qat8's bits are None.

    Those of bhq-auto are AUTO. Fields stay with the name: ("bhq,alpha=0.05", AUTO).
    """
    order, found = ["fp32", "qat8", *QUANTIZERS], {}
    for run in runs:
        plain, comma, fields = run["recipe"].partition(",")
        name, bits = re.fullmatch(r"(.+?)(\d+|-auto)", plain).groups()
        name, bits = ((plain, None) if plain in order else
                      (name, AUTO if bits == "-auto" else int(bits)))
        found.setdefault((name + comma + fields, bits), []).append(run)

    def place(key):
        name = key[0].partition(",")[0]
        return order.index(name) if name in order else len(order), key[0], -(key[1] or 0)

    return {key: found[key] for key in sorted(found, key=place)}


def bits_of(found):
    return sorted({bits for _, bits in found if bits}, reverse=True)


def title(bits):
    return {None: "float32", AUTO: "automatic"}.get(bits, f"{bits} bits")


def seeds_of(runs):
    """"0, 1 (fp32: 0, 1, 2; psq4: 0)": what most recipes have, then those that have others."""
    seeds = defaultdict(list)
    for run in runs:
        seeds[run["recipe"]].append(run["seed"])
    listed = {recipe: ", ".join(map(str, sorted(some))) for recipe, some in seeds.items()}
    usual = statistics.mode(listed.values())
    others = [f"{recipe}: {some}" for recipe, some in listed.items() if some != usual]
    return usual + f" ({'; '.join(others)})" * (len(others) > 0)


def cell(runs):
    """"97.31 ± 0.21", "1 of 3 diverged, else 96.11", "diverged", or "" without a run."""
    values = [100 * run["test_acc"] for run in runs if not run["diverged"]]
    if not runs or not values:
        return "diverged" if runs else ""
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    text = f"{statistics.fmean(values):.2f}{spread}"
    bits = [run["average_bits"] for run in runs if run.get("average_bits")]
    text += f" ({statistics.fmean(bits):.2f} bits)" if bits else ""
    lost = len(runs) - len(values)
    return f"{lost} of {len(runs)} diverged, else {text}" if lost else text


def draw(runs, path):
    """Training loss and test accuracy by epoch, mean over seeds; a column for each number of bits.

    Gradients in float32 are in every column. A line ends with the first seed that diverged.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError(f"{path} not drawn: matplotlib is missing; pip install -r "
                           "requirements-dev.txt") from None
    found = by_quantizer([run for run in runs if run["curve"]])
    if not found:
        raise ValueError("no finished run has a curve: older results have only its end.")
    columns = bits_of(found) or [None]
    size = max(6, 2.2 * len(columns) + 1), 5              # room for the legend
    figure = Figure(size, dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(2, len(columns), sharex=True, sharey="row", squeeze=False)
    for (name, bits), of_one in found.items():
        label, colour, _ = QUANTIZERS.get(name, (name, "0" if name == "fp32" else "0.6", ""))
        for column in range(len(columns)) if bits is None else [columns.index(bits)]:
            for row, key in enumerate(("train_loss", "test_acc")):
                seeds = zip(*(run["curve"][key] for run in of_one), strict=False)
                means = list(map(statistics.fmean, seeds))
                axes[row, column].plot(range(1, len(means) + 1), means, color=colour, label=label,
                                       linewidth=1)
    for bits, (top, bottom) in zip(columns, axes.T, strict=True):
        top.set_title(title(bits), fontsize=10)
        top.set_yscale("log")
        bottom.set_xlabel("epoch")
        for axis in (top, bottom):
            axis.grid(axis="y", color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("training loss")
    axes[1, 0].set_ylabel("test accuracy")
    lines = {line.get_label(): line for axis in axes[0] for line in axis.get_lines()}
    figure.legend(lines.values(), lines, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{runs[0]['model']} on {runs[0]['dataset']}, mean over the seeds "
                    f"{seeds_of(runs)}")
    return save_picture(figure, path)
