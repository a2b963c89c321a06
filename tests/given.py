"""Noise that a test chooses: all of it, or one number everywhere."""
import numpy as np

from minifqt.rng import Stream, Streams


class Given(Stream):
    """A stream of one given noise: a number for all elements, or an array.

    One number is noise that compiled kernels make themselves, as they make a real stream's.
    """

    def __init__(self, noise):
        super().__init__(Streams(0), "given")
        self.noise = noise

    def bits(self, shape, xp=np, offset=0):
        return xp.broadcast_to(xp.asarray(self.noise, "uint16"), shape)

    def source(self):
        one = np.ndim(self.noise) == 0
        return (self.key, self.streams.step, int(self.noise)) if one else None
