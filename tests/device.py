"""A stand-in for CuPy on a CPU: NumPy arrays of another type that refuse to be read by the host.

It runs every line that a GPU would run, but for cuBLAS and one kernel, and finds each hidden copy
to the host. It says nothing about speed, nor about CuPy itself.
"""
import types

import numpy as np


class SyncError(AssertionError):
    """The host read an array of the device without `.get()`."""


def refuse(self, *ignored):
    raise SyncError("a device array was read by the host")


class DeviceArray(np.ndarray):
    """An array that only `get` brings to the host."""

    __bool__ = __int__ = __float__ = __index__ = item = tolist = refuse

    def get(self):
        """A NumPy copy."""
        return np.array(self.view(np.ndarray))


def segment_kernel(arguments, result, code, name):
    """backend.segment_sum's kernel, in plain Python."""
    def kernel(x, starts, stops, width, out):
        for i, (start, stop) in enumerate(zip(starts.get(), stops.get(), strict=True)):
            out[i] = 0
            for row in range(start, stop):
                out[i] += x[row]
        return out

    return kernel


class Device(types.ModuleType):
    """Looks like the module cupy: makes DeviceArrays, never plain ones."""

    ndarray, ElementwiseKernel = DeviceArray, staticmethod(segment_kernel)

    def __getattr__(self, name):
        found = getattr(np, name)
        if isinstance(found, type) or not callable(found) or isinstance(found, np.ufunc):
            return found

        def made_here(*arguments, **options):
            return owned(found(*arguments, **options))

        return made_here


def owned(result):
    if isinstance(result, tuple | list):
        return type(result)(owned(part) for part in result)
    return result.view(DeviceArray) if isinstance(result, np.ndarray) else result


def gemm(a, b):
    """What cuBLAS does: int8 operands, int32 sums that wrap."""
    assert a.dtype == b.dtype == np.int8
    assert a.shape[1] % 16 == 0
    assert b.shape[0] % 16 == 0
    left, right = (v.view(np.ndarray).astype(np.int64) for v in (a, b))
    return (left @ right.T).astype(np.int32).view(DeviceArray)
