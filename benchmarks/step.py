"""Seconds for one training step (forward, backward, SGD): minifqt's recipes next to PyTorch.

All contestants take turns in one process, so that a busy moment hits them all; not a profiler.
Without PyTorch the rest is measured and the table says what was left out. Next: roofline_cpu.py.
"""
import argparse
import json
import os
import sys
import time
from pathlib import Path

import machine
import numpy as np

sys.path.insert(0, str(machine.ROOT))                     # where minifqt, models and data are
import minifqt
import models
from minifqt import training
from minifqt.kernels import cpu
from models import resnet_cifar

REFERENCE = "PyTorch float32 channels_last"               # all ratios are to its median
CLASSES, LR = 10, 0.01                                    # small: there is nothing to learn
INSTRUCTIONS = ("auto", "amx", "vnni512", "vnni256", "avx2", "numpy")
NO_MORE_THAN_AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2",
                     "MKL_ENABLE_INSTRUCTIONS": "AVX2"}
SETTINGS = {"full": {"batch": 128, "repeats": 15, "warmup": 2},
            "quick": {"batch": 4, "repeats": 1, "warmup": 0}}


def parser():
    text = argparse.ArgumentParser(description=__doc__)
    add = text.add_argument
    add("--model", choices=resnet_cifar.MODELS, default="resnet20")
    add("--recipes", default="fp32,qat8,ptq8,psq8,bhq8", help="separated by commas; %(default)s")
    add("--batch", type=int, help="images in a step; 128, with --quick 4")
    add("--repeats", type=int, help="timed steps of each contestant; 15, with --quick 1")
    add("--warmup", type=int, help="rounds that are not timed; 2, with --quick none")
    add("--threads", type=int, default=2, help="for minifqt and for PyTorch; %(default)s")
    add("--seed", type=int, default=0, help="of weights, images and rounding; %(default)s")
    add("--instructions", choices=INSTRUCTIONS, default="auto",
        help="of minifqt's integer products; %(default)s, the fastest that this CPU has")
    add("--torch-avx2", action="store_true", help="PyTorch as on a CPU that has no more than AVX2")
    add("--plain", action="store_true", help="minifqt's networks as they are, not fused")
    add("--quick", action="store_true", help="tiny: shows that the script runs, measures nothing")
    add("--out", default="benchmarks/results", help="folder of the JSON file; %(default)s")
    return text


def main(arguments=None):
    flags = parser().parse_args(arguments)
    for key, value in SETTINGS["quick" if flags.quick else "full"].items():
        if getattr(flags, key) is None:
            setattr(flags, key, value)
    if min(flags.batch - 1, flags.repeats, flags.threads, flags.warmup + 1) < 1:
        raise ValueError("--batch must be at least 2, --repeats and --threads 1, --warmup 0.")
    os.environ.update(NO_MORE_THAN_AVX2 if flags.torch_avx2 else {})          # before its import
    minifqt.set_threads(flags.threads)
    cpu.set_instructions(flags.instructions)
    contestants, skipped = all_contestants(flags)
    result = machine.facts("step", flags.seed, flags.threads)
    result |= {key: getattr(flags, key) for key in ("model", "batch", "repeats", "warmup", "quick")}
    result |= {"instructions": cpu.instructions(), "kernels": cpu.describe(),
               "fused": not flags.plain, "torch_avx2": flags.torch_avx2}
    losses = {name: step() for name, step in contestants.items()}             # compiles, allocates
    require_the_same_network(losses)
    seconds = take_turns(contestants, flags.warmup, flags.repeats)
    result |= {"rows": rows_of(seconds, losses), "skipped": skipped}
    print(table(result))
    print(f"written: {write(result, Path(flags.out))}")


def take_turns(contestants, warmup, repeats):
    """name → seconds of each timed step.

    The step before each timed one is the contestant's own: nobody pays for the caches and the
    spinning threads that another left behind.
    """
    seconds = {name: [] for name in contestants}
    for turn in range(warmup + repeats):
        for name, step in contestants.items():
            step()
            start = time.perf_counter()
            step()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def all_contestants(flags):
    """({name: function that makes one step and returns its loss}, [{"name", "why"} left out])."""
    rng = np.random.default_rng(flags.seed)
    x = rng.standard_normal((flags.batch, 32, 32, 3), "float32")              # (N, H, W, C)
    labels = rng.integers(0, CLASSES, flags.batch)
    contestants = {f"minifqt {recipe}": minifqt_step(flags.model, recipe, flags.seed, x, labels,
                                                     fused=not flags.plain)
                   for recipe in flags.recipes.split(",")}
    names = (REFERENCE, "PyTorch float32", "PyTorch bfloat16 channels_last")
    try:
        import torch
    except ImportError as error:
        why = f"{error}; pip install torch==2.13.0"
        return contestants, [{"name": name, "why": why} for name in names]
    if flags.torch_avx2 and torch.backends.cpu.get_cpu_capability() != "AVX2":
        raise RuntimeError("--torch-avx2: PyTorch had been imported before, or has no AVX2 here.")
    torch.set_num_threads(flags.threads)
    for name in names:
        contestants[name] = torch_step(torch, flags.model, flags.seed, x, labels,
                                       channels_last="channels_last" in name,
                                       bfloat16="bfloat16" in name)
    return contestants, []


def minifqt_step(model, recipe, seed, x, labels, fused=True):
    net, optimizer = models.build(model, CLASSES, recipe, seed), minifqt.SGD()
    net, done = minifqt.fuse(net) if fused else net, []

    def step():
        loss = training.train_step(net, optimizer, x, labels, LR, len(done))
        done.append(loss)
        return float(loss)

    return step


def rows_of(seconds, losses):
    """Median, 10th and 90th percentile, and the median's ratio to PyTorch's."""
    rows = []
    for name, values in seconds.items():
        p10, median, p90 = np.percentile(values, (10, 50, 90))
        rows.append({"name": name, "median_s": round(median, 6), "p10_s": round(p10, 6),
                     "p90_s": round(p90, 6), "first_loss": round(losses[name], 6)})
    reference = next((row["median_s"] for row in rows if row["name"] == REFERENCE), None)
    return [row | {"ratio": round(row["median_s"] / reference, 4) if reference else None}
            for row in rows]


def require_the_same_network(losses):
    """RuntimeError unless all float32 contestants computed the same loss from the same weights."""
    exact = {name: loss for name, loss in losses.items() if "float32" in name or "fp32" in name}
    # rtol: float32 rounding in some 20 to 110 layers, summed in another order
    if len(exact) > 1 and not np.allclose(list(exact.values()), min(exact.values()), rtol=1e-3):
        raise RuntimeError(f"the first losses differ, {exact}: these are not the same network.")


def table(result):
    lines = [f"{result['model']}, batch {result['batch']}, {result['repeats']} repeats, seconds a "
             f"step", machine.describe(result),
             f"minifqt: {result['kernels']}; {'fused' if result['fused'] else 'not fused'}"
             f"{'; PyTorch: no more than AVX2' if result['torch_avx2'] else ''}", "",
             f"{'':32}{'median':>9}{'p10':>9}{'p90':>9}{'ratio':>8}"]
    for row in result["rows"]:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.2f}"
        lines.append(f"{row['name']:32}{row['median_s']:9.4f}{row['p10_s']:9.4f}"
                     f"{row['p90_s']:9.4f}{ratio:>8}")
    lines += [f"left out: {entry['name']}: {entry['why']}" for entry in result["skipped"]]
    return "\n".join(lines)


def write(result, folder):
    """folder/KIND-MODEL-DATE.json, -2, -3, … if there is one: no measurement is overwritten."""
    folder.mkdir(parents=True, exist_ok=True)
    name, number = f"{result['kind']}-{result['model']}-{result['date'][:10]}", 1
    path = folder / f"{name}.json"
    while path.exists():
        number += 1
        path = folder / f"{name}-{number}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


# ---- the same network in PyTorch ---------------------------------------------------------------


def torch_step(torch, model, seed, x, labels, channels_last, bfloat16):
    net = torch_model(torch, model)
    weights = models.build(model, CLASSES, "fp32", seed).params()
    own = dict(net.named_parameters())
    if set(own) != set(weights):
        raise RuntimeError(f"PyTorch's network has other parameters: {set(own) ^ set(weights)}.")
    with torch.no_grad():
        for name, p in weights.items():
            w = torch.from_numpy(p.data.copy())
            own[name].copy_(w.permute(0, 3, 1, 2) if w.ndim == 4 else w)      # (K, C, R, S)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    net = net.to(memory_format=layout)
    x = torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    labels = torch.from_numpy(labels)
    optimizer = torch.optim.SGD(net.parameters(), LR, momentum=0.9, weight_decay=1e-4)

    def step():
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = torch.nn.functional.cross_entropy(net(x), labels)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def torch_model(torch, model):
    """models/resnet_cifar.py line by line, with its names; ReLU in place, as is usual there."""
    nn, n = torch.nn, resnet_cifar.MODELS[model].args[0]

    def conv(in_channels, channels, size, stride=1):
        return nn.Conv2d(in_channels, channels, size, stride, size // 2, bias=False)

    class Block(nn.Module):
        def __init__(self, in_channels, channels, stride=1):
            super().__init__()
            self.bn1, self.relu = nn.BatchNorm2d(in_channels), nn.ReLU(inplace=True)
            if in_channels != channels:
                self.shortcut = conv(in_channels, channels, 1, stride)
            self.conv1 = conv(in_channels, channels, 3, stride)
            self.bn2, self.conv2 = nn.BatchNorm2d(channels), conv(channels, channels, 3)

        def forward(self, x):
            a = self.relu(self.bn1(x))
            b = self.relu(self.bn2(self.conv1(a)))
            return (self.shortcut(a) if hasattr(self, "shortcut") else x) + self.conv2(b)

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = conv(3, 16, 3)
            self.layer1 = nn.Sequential(*[Block(16, 16) for _ in range(n)])
            self.layer2 = nn.Sequential(Block(16, 32, 2), *[Block(32, 32) for _ in range(n - 1)])
            self.layer3 = nn.Sequential(Block(32, 64, 2), *[Block(64, 64) for _ in range(n - 1)])
            self.bn, self.relu = nn.BatchNorm2d(64), nn.ReLU(inplace=True)
            self.fc = nn.Linear(64, CLASSES)

        def forward(self, x):
            x = self.layer3(self.layer2(self.layer1(self.conv1(x))))
            return self.fc(self.relu(self.bn(x)).mean((2, 3)))

    return ResNet()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, RuntimeError, OSError) as error:
        sys.exit(f"error: {error}")
