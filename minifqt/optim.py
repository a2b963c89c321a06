"""Stochastic gradient descent with momentum, and learning rates as functions of the epoch."""
import math
from collections.abc import Callable
from functools import cached_property
from itertools import pairwise
from operator import is_

import numpy as np

from minifqt.backend import Array, array_module, empty
from minifqt.kernels.cpu import choice
from minifqt.kernels.seen import Lazy
from minifqt.layers import Param

if choice.numba is not None:
    from minifqt.kernels.cpu import norms


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
        self._w = self._v = _Whole([])                    # after a compiled step

    def step(self, params: dict[str, Param], lr: float) -> None:
        """One update of all parameters.  RuntimeError where backward assigned no gradient."""
        without = [name for name, p in params.items() if p.grad is None]
        if without:                                       # before anything is updated
            raise RuntimeError(f"{without[0]} has no gradient: call backward() before step().")
        for name, p in params.items():
            if name not in self.velocity:
                self.velocity[name] = array_module(p.data).zeros_like(p.data)
            p.grad = p.grad.array() if isinstance(p.grad, Lazy) else p.grad
        step = self._step_compiled if self._suits(params) else self._step_plainly
        step(params, float(lr))

    def _step_plainly(self, params, lr):
        for name, p in params.items():
            w, v, decay = p.data, self.velocity[name], self.weight_decay if p.decay else 0.0
            v = (self.momentum * v + p.grad + decay * w).astype(w.dtype, copy=False)
            self.velocity[name], p.data = v, w - lr * v

    def _step_compiled(self, params, lr):
        """The same bits in one pass over all parameters, which are new; v is its own memory."""
        data, velocity = [p.data for p in params.values()], [self.velocity[name] for name in params]
        if not self._v.has(velocity):                     # the first time, or one was replaced
            self._v = _Whole.of(velocity)
            self.velocity |= zip(params, self._v.parts, strict=True)
        w = self._w if self._w.has(data) else _Whole.of(data)
        grad, self._w = _Whole.of([p.grad for p in params.values()]), _Whole(w.shapes)
        decay = np.array([self.weight_decay * p.decay for p in params.values()], np.float32)
        norms.momentum_step(w.flat, grad.flat, w.ends, decay, np.float32(self.momentum),
                            np.float32(lr), self._v.flat, self._w.flat)
        for p, new in zip(params.values(), self._w.parts, strict=True):
            p.data = new

    def _suits(self, params):
        arrays = [a for name, p in params.items() for a in (p.data, p.grad, self.velocity[name])]
        return (choice.isa() is not None and {a.dtype for a in arrays} == {np.dtype("float32")}
                and all(array_module(a) is np for a in arrays))


class _Whole:
    """Arrays of these shapes, one behind another in one."""

    def __init__(self, shapes):
        self.shapes, sizes = shapes, [math.prod(shape) for shape in shapes]
        self.ends, self.flat = np.cumsum(sizes, dtype=np.int64), empty((sum(sizes),))

    @classmethod
    def of(cls, arrays):
        """With these numbers."""
        whole = cls([a.shape for a in arrays])
        np.concatenate([a.reshape(-1) for a in arrays], out=whole.flat)
        return whole

    @cached_property
    def parts(self):
        """The arrays, views of `flat`."""
        places = pairwise([0, *self.ends.tolist()])
        return [self.flat[start:end].reshape(shape)
                for (start, end), shape in zip(places, self.shapes, strict=True)]

    def has(self, arrays):
        """Whether these are the parts."""
        return len(arrays) == len(self.parts) and all(map(is_, arrays, self.parts))


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
