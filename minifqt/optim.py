"""Stochastic gradient descent with momentum, and learning rates as functions of the epoch."""
import math
from collections.abc import Callable

import numpy as np

from minifqt.backend import Array, array_module, empty
from minifqt.kernels.cpu import choice
from minifqt.layers import Param

if choice.numba is not None:
    from minifqt.kernels.cpu import plans


class SGD:
    """v ← momentum · v + grad + weight_decay · w; w ← w − lr · v.  torch.optim.SGD's default form.

    weight_decay acts where Param.decay is true: on weights, not on batch norm, not on biases.
    Raises ValueError for a momentum outside [0, 1) or a negative weight decay.
    """

    def __init__(self, momentum: float = 0.9, weight_decay: float = 1e-4):
        if not 0 <= momentum < 1 or not weight_decay >= 0:
            raise ValueError(f"momentum {momentum}, weight_decay {weight_decay}: expected "
                             "0 ≤ momentum < 1 and a weight decay ≥ 0.")
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity: dict[str, Array] = {}

    def step(self, params: dict[str, Param], lr: float) -> None:
        """One update of all parameters.  RuntimeError where backward assigned no gradient."""
        without = [name for name, p in params.items() if p.grad is None]
        if without:                                       # before anything is updated
            raise RuntimeError(f"{without[0]} has no gradient: call backward() before step().")
        for name, p in params.items():
            zero = array_module(p.data).zeros_like
            v = self.velocity[name] if name in self.velocity else zero(p.data)
            decay = self.weight_decay if p.decay else 0.0
            v, p.data = moved(p.data, p.grad, v, self.momentum, decay, float(lr))
            self.velocity[name] = v


def moved(w: Array, grad: Array, v: Array, momentum: float, decay: float, lr: float):
    """The next v and w, new arrays.  Compiled, the same bits in one pass."""
    on_gpu, numbers = array_module(w) is not np, (momentum, decay, lr)
    if on_gpu or choice.isa() is None or not w.dtype == v.dtype == grad.dtype == np.float32:
        v = (momentum * v + grad + decay * w).astype(w.dtype, copy=False)
        return v, w - lr * v
    next_v, next_w = empty(w.shape), empty(w.shape)
    plans.momentum_step(*(np.ascontiguousarray(t).reshape(-1) for t in (w, grad, v)),
                        *map(np.float32, numbers), next_v.reshape(-1), next_w.reshape(-1))
    return next_v, next_w


def cosine(lr: float, epochs: int, warmup: int = 0) -> Callable[[int], float]:
    """epoch → lr/2 · (1 + cos(π · epoch / epochs)); the first `warmup` epochs rise linearly."""
    _require_epochs(epochs)
    return lambda e: _ramp(e, warmup) * lr / 2 * (1 + math.cos(math.pi * e / epochs))


def steps(lr: float, epochs: int, warmup: int = 0) -> Callable[[int], float]:
    """epoch → lr, lr/10 from half of the epochs on, lr/100 from three quarters on.

    Source: arXiv 1512.03385, section 4.2. The first `warmup` epochs rise linearly.
    """
    _require_epochs(epochs)
    return lambda e: _ramp(e, warmup) * lr * 0.1 ** ((2 * e >= epochs) + (4 * e >= 3 * epochs))


SCHEDULES = {"cosine": cosine, "steps": steps}


def _require_epochs(epochs):
    if epochs < 1:
        raise ValueError(f"{epochs} epochs: a schedule needs at least 1.")


def _ramp(epoch, warmup):
    return min(1.0, (epoch + 1) / (warmup + 1))
