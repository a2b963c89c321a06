"""A newcomer's first step: another process compiles what the backward pass needs, meanwhile.

In one process numba compiles one function at a time, as they are called, and keeps them on disk.
While this process compiles the forward pass, the other runs backward passes of which nothing went
forward. It is started where the disk holds nothing yet; nobody waits for it.
"""
import json
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np

from minifqt.backend import threads
from minifqt.fusion import fuse
from minifqt.kernels import conv
from minifqt.kernels.cpu import choice
from minifqt.kernels.norm import Normalized, runs
from minifqt.layers import BatchNorm2d, Conv2d, Linear, ReLU, Sequential, build
from minifqt.recipes import Recipe

if choice.numba is not None:
    from minifqt.kernels.cpu.wgrad import wgrad_images

IMAGES, SIDE, CHANNELS = 64, 4, 16
_started = []                                             # or Python warns that nobody waited


def begin(recipe: Recipe) -> bool:
    """Starts the other process for fused networks of this recipe on the CPU, if it is of use."""
    if choice.isa() is None or threads() == 1 or not _cold():
        return False
    command = [sys.executable, "-m", __name__, choice.instructions(), json.dumps(asdict(recipe))]
    _started.append(subprocess.Popen(
        command, cwd=Path(__file__).parents[1], stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
    return True


def _cold():
    """Whether the disk holds nothing yet of a kernel that backward passes need."""
    with suppress(AttributeError):                        # a numba that keeps it elsewhere
        return not wgrad_images._cache._cache_file._load_index()
    return False


def compile_backward(recipe: Recipe) -> None:
    """What backward passes call, on layers that saved nothing real.

    What takes longest first; the rest in such an order that both processes meet in the middle.
    """
    bn, relu, layer, fc = (BatchNorm2d(CHANNELS), ReLU(), Conv2d(CHANNELS, CHANNELS, 3, padding=1),
                           Linear(CHANNELS, CHANNELS))
    fuse(build(Sequential(bn, relu, layer, fc), recipe))
    x = np.sin(np.arange(IMAGES * SIDE * SIDE * CHANNELS, dtype="float32"))
    x = x.reshape(IMAGES, SIDE, SIDE, CHANNELS)
    row, y = x[:, 0, 0], Normalized(x, runs(*np.ones((4, CHANNELS), "float32")))
    instructions = choice.instructions()
    choice.set_instructions("numpy")                      # codes without their kernels
    qx, qw = layer.q.act(x), layer.q.weight(layer.weight.data)
    gw, gx = layer.q.grad_w(x), layer.q.grad_x(x)
    fc.save(fc.q.act(row), fc.q.weight(fc.weight.data))
    choice.set_instructions(instructions)

    def through_norm(dy):
        bn.save(y)
        relu.save(y.rectified())
        return bn.backward(relu.backward(dy))

    dw = conv.wgrad(gw, qx, layer.kernel_size, layer.stride, layer.padding, lazily=True)
    dx = conv.dgrad(gx, qw, (SIDE, SIDE), layer.stride, layer.padding, lazily=True)
    np.asarray(dw), np.asarray(through_norm(dx) + x), np.asarray(through_norm(x))
    layer.save(qx, qw, False)
    layer.backward(x)                                     # its quantizers, compiled
    fc.backward(row)


if __name__ == "__main__":
    choice.set_instructions(sys.argv[1])
    compile_backward(Recipe(**json.loads(sys.argv[2])))
