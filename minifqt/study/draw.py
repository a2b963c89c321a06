"""Pictures of the studies' numbers, where matplotlib is installed; the JSON holds the same."""
from pathlib import Path

import numpy as np

COLOURS = {"ptq": "#D55E00", "ptqz": "#E69F00", "psq": "#0072B2", "bhq": "#009E73"}   # Okabe, Ito
GREY = "#666666"


def draw(result: dict, path: Path) -> str:
    """The picture of a study's result; returns a line that says where it is, or what is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return f"{path} not drawn: matplotlib is missing; pip install -r requirements-dev.txt"
    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained", facecolor="white")
    PICTURES[result["study"]](figure, result)
    figure.suptitle(f"{result['study']}: {result['network']}", fontsize=10)
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return str(path)


def _unbiased(figure, result):
    axes = figure.subplots(1, 2, width_ratios=(3, 1))
    for some, name, at in zip(axes, ("sites", "parameters"), (0, 1), strict=True):
        z = [test["z"] for test in result[name]]
        some.axvspan(-result["limit"], result["limit"], color="0.93")
        some.plot(z, range(len(z)), "o", color=COLOURS["bhq"], markersize=4)
        some.set_yticks(range(len(z)), [test["name"] for test in result[name]], fontsize=5)
        some.set_xlabel(("z of the mean noise along the site's response",
                         "z along the QAT gradient")[at], fontsize=7)
        some.invert_yaxis()


def _layers(figure, result):
    axes, names = figure.subplots(), list(result["terms"])
    share = [result["terms"][name][0] / result["total"][0] for name in names]
    colours = [COLOURS["bhq" if name.endswith("grad_x") else "psq"] for name in names]
    axes.barh(range(len(names)), share, color=colours)
    axes.set_yticks(range(len(names)), names, fontsize=5)
    axes.invert_yaxis()
    axes.set_xlabel("share of the quantization variance (blue: Q_b1, green: Q_b2)")


def _variance(figure, result):
    axes = np.atleast_1d(figure.subplots(1, len(result["points"]), sharey=True))
    for some, point in zip(axes, result["points"], strict=True):
        for name, by_bits in point["quantization"].items():
            bits = [int(b) for b in by_bits]
            mean, error = np.array(list(by_bits.values())).T
            some.errorbar(bits, mean, 2 * error, color=COLOURS.get(name), marker="o", markersize=3,
                          label=name)
        some.axhline(point["sampling"], color=GREY, linestyle="--", label="minibatch (QAT)")
        some.axhline(point["grad_w"], color=GREY, linestyle=":", label="Q_b1, 8 bits")
        some.set(yscale="log", xlabel="bits of Q_b2", title=point["where"])
    axes[0].set_ylabel("total variance of the gradient")
    axes[0].legend(frameon=False, fontsize=7)


def _bounds(figure, result):
    axes = figure.subplots()
    sites = list(dict.fromkeys(row["site"] for row in result["rows"]))
    names = list(dict.fromkeys(row["quantizer"] for row in result["rows"]))
    for k, name in enumerate(names):
        rows = [row for row in result["rows"] if row["quantizer"] == name]
        x = np.arange(len(sites)) + (k - (len(names) - 1) / 2) * 0.25
        axes.bar(x, [row["bound"] for row in rows], 0.22, color=COLOURS.get(name), alpha=0.3)
        axes.bar(x, [row["closed"] for row in rows], 0.22, color=COLOURS.get(name), label=name)
        axes.plot(x, [row["measured"] for row in rows], "_", color="black", markersize=5)
    axes.set_yscale("log")
    axes.set_xticks(range(len(sites)), sites, rotation=90, fontsize=5)
    axes.set_ylabel("Var / Σ dy²: bound (pale), closed form, measured (–)")
    axes.legend(frameon=False)


def _bins(figure, result):
    axes = figure.subplots(2, len(result["rows"]), squeeze=False, sharey="row")
    for (above, below), row in zip(axes.T, result["rows"], strict=True):
        colour = COLOURS.get(row["quantizer"])
        above.bar(range(len(row["occupied"])), row["occupied"], color=colour, width=0.9)
        above.set(yscale="log", xlabel="code",
                  title=f"{row['quantizer']}{row['bits']}: {row['entropy']:.2f} bits used")
        if len(row["ranges"]) == 1:                       # of the whole tensor
            below.axhline(row["ranges"][0], color=colour)
            below.set_xticks([])
        below.plot(sorted(row["ranges"], reverse=True), "o", color=colour, markersize=3)
        below.set(yscale="log", xlabel="row, the largest first")
    axes[0, 0].set_ylabel("elements")
    axes[1, 0].set_ylabel("range that its steps divide")


def _replay(figure, result):
    rows = [row for row in result["rows"] if row["parameter"].endswith(".weight")]
    axes = figure.subplots()
    for key, label, colour in (("noise", "as it was", "bhq"), ("changed", "changed", "ptq")):
        axes.plot([row[key] for row in rows], "o", color=COLOURS[colour], markersize=4, label=label)
    axes.set_xticks(range(len(rows)), [row["parameter"].removesuffix(".weight") for row in rows],
                    rotation=90, fontsize=5)
    axes.set(ylabel="distance from the QAT gradient ÷ its norm", yscale="log")
    axes.legend(frameon=False)


def _audit(figure, result):
    above, below = figure.subplots(2, 1, sharex=True)
    rows = result["products"]
    names = list(dict.fromkeys(row["layer"] for row in rows))
    for kind, colour in (("fprop", "psq"), ("wgrad", "ptq"), ("dgrad", "bhq")):
        some = [row for row in rows if row["product"] == kind]
        at = [names.index(row["layer"]) for row in some]
        above.plot(at, [row["multiplies"] for row in some], "o", color=COLOURS[colour],
                   markersize=3, label=kind)
        below.plot(at, [row.get("bits", np.nan) for row in some], "o", color=COLOURS[colour],
                   markersize=3)                          # floats have none
    for bits in (24, 31):
        below.axhline(bits, color=GREY, linestyle="--")
    above.set(ylabel="multiplies", yscale="log")
    above.legend(frameon=False, fontsize=7)
    below.set_ylabel("bits of the largest sum")
    below.set_xticks(range(len(names)), names, rotation=90, fontsize=5)


def _bits(figure, result):
    above, below = figure.subplots(2, 1, sharex=True)
    names = list(result["bits"])
    for axes, values in ((above, result["bits"]), (below, result["terms"])):
        axes.bar(range(len(names)), [values[name] for name in names], color=COLOURS["bhq"])
    above.axhline(result["equal_bits"], color=GREY, linestyle="--",
                  label=f"equal bits of the same variance, {result['equal_bits']:.2f}")
    above.axhline(result["average"], color=COLOURS["bhq"], linestyle=":",
                  label=f"average {result['average']:.2f}")
    above.set_ylabel("bits")
    above.legend(frameon=False, fontsize=7)
    below.set(ylabel="term of Theorem 2", yscale="log")
    below.set_xticks(range(len(names)), names, rotation=90, fontsize=5)


PICTURES = {"unbiased": _unbiased, "layers": _layers, "variance": _variance, "bounds": _bounds,
            "bins": _bins, "replay": _replay, "audit": _audit, "bits": _bits}
