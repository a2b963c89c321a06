"""Noise that is a function of (seed, stream name, step, element) and of nothing else.

NumPy's counter-based Philox 4×64-10 makes it; `philox` below is the same function in plain array
operations, for reading, for other array modules, and checked against NumPy's. No global generator,
no order of calls. Next: qtensor.py.
"""
import hashlib
import math
from contextlib import contextmanager
from threading import local

import numpy as np

from minifqt.backend import Array, array_module, device_module, map_blocks, to_cpu

HALF = 32768                                              # as noise everywhere it rounds to nearest
_CHUNK = 1 << 14                                          # Philox blocks (of 16 values) in one task
_LOW32, _LOW64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
MULTIPLIERS = (0xD2E7470EE14C6C93, 0xCA5A826395121157)    # Salmon 2011, table 2; NumPy's philox.h
INCREMENTS = (0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B)
_own = local()                                            # of each thread


def philox(key, step: int, first: int, count: int, xp=np) -> Array:
    """Blocks first .. first + count - 1 of Philox 4×64-10, (count, 4) uint64.

    Block 0 has counter 1, as in NumPy.
    key  two unsigned 64-bit integers
    Source: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011; NumPy's Philox.
    """
    def product(a, b):                                    # high, low words of a 64 × 64-bit product
        a0, a1, b0, b1 = (xp.uint64(a & _LOW32), xp.uint64(a >> 32),
                          b & xp.uint64(_LOW32), b >> xp.uint64(32))
        middle = ((a0 * b0 >> xp.uint64(32)) + (a0 * b1 & xp.uint64(_LOW32))
                  + (a1 * b0 & xp.uint64(_LOW32)))
        high = (a1 * b1 + (a0 * b1 >> xp.uint64(32)) + (a1 * b0 >> xp.uint64(32))
                + (middle >> xp.uint64(32)))
        return high, xp.uint64(a) * b                     # uint64 wraps: the low word

    k0, k1 = int(key[0]), int(key[1])
    c0 = xp.arange(first + 1, first + 1 + count, dtype=xp.uint64)
    c1, c2, c3 = xp.full_like(c0, step), xp.zeros_like(c0), xp.zeros_like(c0)
    for _ in range(10):
        (h0, l0), (h1, l1) = product(MULTIPLIERS[0], c0), product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = h1 ^ c1 ^ xp.uint64(k0), l1, h0 ^ c3 ^ xp.uint64(k1), l0
        k0, k1 = k0 + INCREMENTS[0] & _LOW64, k1 + INCREMENTS[1] & _LOW64
    return xp.stack([c0, c1, c2, c3], axis=1)


class Streams:
    """All noise of one run: `Streams(seed).stream(name)`; `step` is set once by the training step.

    seed    any integer ≥ 0
    device  numpy or cupy: where the network of these streams lives
    """

    def __init__(self, seed: int, device=np):
        if seed < 0:
            raise ValueError(f"seed {seed}: expected an integer ≥ 0.")
        self.seed, self.step, self.device = seed, 0, device
        self.warned = False                               # fallback to batch ranges: announced once
        self._pending = {}                                # name → "was not finite", on the device

    def __getstate__(self):                               # a module can not be copied or pickled
        return {**vars(self), "device": self.device is np}

    def __setstate__(self, state):
        vars(self).update(state, device=device_module("cpu" if state["device"] else "cuda"))

    def stream(self, name: str) -> "Stream":
        """The stream of this name; two names are two independent noises."""
        return Stream(self, name)

    @contextmanager
    def at(self, step: int):
        """Inside, noise is that of another step."""
        now, self.step = self.step, step
        try:
            yield
        finally:
            self.step = now

    def require_finite(self, name: str, finite: Array) -> None:
        """ValueError naming the tensor unless finite; on a GPU, for no sync, at `raise_pending`."""
        if array_module(finite) is np:
            if not finite:
                raise NonFiniteError(name)
        else:
            self._pending[name] = self._pending.get(name, False) | ~finite

    def raise_pending(self) -> None:
        """Raise for the first tensor that was not finite since the last call.  # sync"""
        pending, self._pending = self._pending, {}
        for name, bad in pending.items():
            if to_cpu(bad):
                raise NonFiniteError(name)


class NonFiniteError(ValueError):
    """NaN or infinity entered a quantizer; `name` is the tensor's."""

    def __init__(self, name: str):
        self.name = name
        super().__init__(f"{name}: NaN or infinity entered a quantizer. Training has diverged or "
                         "its input is bad: lower the learning rate, or check the data and the "
                         "weights that were loaded.")


class Stream:
    """One named stream of 16-bit noise."""

    def __init__(self, streams: Streams, name: str):
        self.streams, self.name = streams, name
        digest = hashlib.sha256(f"{streams.seed}/{name}".encode()).digest()[:16]
        self.key = np.frombuffer(digest, "<u8")           # never hash(): it changes from run to run

    def bits(self, shape: tuple, xp=np, offset: int = 0) -> Array:
        """uint16 noise of this shape; element i is field i % 4 of word i // 4 of the step's words.

        i       index in flat C order, plus offset
        offset  index of the first element, for a rank that holds a part of the batch
        """
        count, step = math.prod(shape), self.streams.step
        first, skip = divmod(offset, 16)
        blocks = -(-(skip + count) // 16)
        if xp is not np:
            return (philox(self.key, step, first, blocks, xp).view(xp.uint16)
                    .reshape(-1)[skip:skip + count].reshape(shape))

        def words_of(part):
            return self._words(first + part.start, step).random_raw((part.stop - part.start, 4))

        words = (words_of(slice(0, blocks)) if blocks <= _CHUNK else
                 np.concatenate(map_blocks(words_of, blocks, _CHUNK)))
        return words.view("<u2").reshape(-1)[skip:skip + count].reshape(shape)

    def generator(self, step: int) -> np.random.Generator:
        """A NumPy generator for this name and step: initialisation, data order, augmentation."""
        counter = np.array([0, step, 0, 0], np.uint64)
        return np.random.Generator(np.random.Philox(counter=counter, key=self.key))

    def _words(self, block, step):
        """This thread's Philox, set to begin with this block: to make one takes long."""
        counter = np.array([block, step, 0, 0], np.uint64)
        if not hasattr(_own, "philox"):
            _own.philox = np.random.Philox(0)
        _own.philox.state = {"bit_generator": "Philox", "buffer": np.zeros(4, np.uint64),
                             "buffer_pos": 4, "has_uint32": 0, "uinteger": 0,
                             "state": {"counter": counter, "key": self.key}}
        return _own.philox

    def source(self) -> tuple | None:
        """(key, step, constant) for kernels that make `bits` themselves: constant −1, or the noise.

        None where a subclass defines `bits` in its own way.
        """
        plain = type(self).bits is Stream.bits
        return (self.key, self.streams.step, -1) if plain else None

    def require_finite(self, finite: Array) -> None:
        self.streams.require_finite(self.name, finite)


class _Nearest(Stream):
    """The constant noise 32768: rounds to nearest, a half upwards."""

    def bits(self, shape: tuple, xp=np, offset: int = 0) -> Array:  # noqa: ARG002 - every element is the same
        return xp.broadcast_to(xp.asarray(HALF, xp.uint16), shape)

    def source(self):
        return self.key, self.streams.step, HALF


def nearest(streams: Streams, name: str) -> Stream:
    """A stream of this name whose noise is the constant 32768: rounding to nearest."""
    return _Nearest(streams, name)
