"""Stochastic gradient descent with momentum, and learning rates as functions of the epoch."""
import math
from collections.abc import Callable

from minifqt.backend import Array, array_module
from minifqt.layers import Param


class SGD:
    """v ← momentum · v + grad + weight_decay · w; w ← w − lr · v.  No dampening, as PyTorch's default.

    weight_decay acts where Param.decay is true: on weights, not on batch norm, not on biases.
    """

    def __init__(self, momentum: float = 0.9, weight_decay: float = 1e-4):
        if not 0 <= momentum < 1 or weight_decay < 0:
            raise ValueError(f"momentum {momentum}, weight_decay {weight_decay}: expected 0 ≤ momentum < 1 and a "
                             "weight decay ≥ 0.")
        self.momentum, self.weight_decay = momentum, weight_decay
        self.velocity: dict[str, Array] = {}

    def step(self, params: dict[str, Param], lr: float) -> None:
        """One update of all parameters.  RuntimeError where backward assigned no gradient."""
        for name, p in params.items():
            if p.grad is None:
                raise RuntimeError(f"{name} has no gradient: call backward() before the optimizer's step.")
            v = self.velocity.setdefault(name, array_module(p.data).zeros_like(p.data))
            v *= self.momentum
            v += p.grad + self.weight_decay * p.data if p.decay else p.grad
            p.data = p.data - float(lr) * v


def cosine(lr: float, epochs: int, warmup: int = 0) -> Callable[[int], float]:
    """epoch → lr/2 · (1 + cos(π · epoch / epochs)); the first `warmup` epochs rise linearly to it."""
    return lambda epoch: _ramp(epoch, warmup) * lr / 2 * (1 + math.cos(math.pi * epoch / epochs))


def steps(lr: float, epochs: int, warmup: int = 0) -> Callable[[int], float]:
    """epoch → lr, a tenth of it from half of the epochs on, a hundredth from three quarters on (arXiv 1512.03385, 4.2)."""
    return lambda epoch: _ramp(epoch, warmup) * lr * 0.1 ** ((2 * epoch >= epochs) + (4 * epoch >= 3 * epochs))


SCHEDULES = {"cosine": cosine, "steps": steps}


def _ramp(epoch, warmup):
    return min(1.0, (epoch + 1) / (warmup + 1))
