"""Compiled kernels for the CPU: read reference.py for what they compute, integers bit for bit.

tiles.py generates the micro-kernels; packing.py, sums.py, wgrad.py, floats.py and products.py are
the three products; noise.py, codes.py, norms.py and mixing.py the elementwise rest; scales.py,
channels.py and householder.py the small arithmetic between; board.py and team.py the threads;
choice.py says which instructions are used and why. Without numba all of it is absent, and NumPy
does the work.
"""
from minifqt.kernels.cpu.choice import describe, instructions, set_instructions, supported

__all__ = ["describe", "instructions", "set_instructions", "supported"]
