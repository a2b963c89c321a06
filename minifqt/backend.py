"""Where arrays live and how the CPU's cores are used: the only file that imports CuPy.

Everything above asks `array_module(x)` and never the device. Blocks of work are cut by shape, never
by thread count, so 1, 2 and 4 threads give the same bits. Next: rng.py, then qtensor.py.
"""
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from threading import Lock, local
from typing import Any, TypeAlias

import numpy as np
from threadpoolctl import ThreadpoolController

try:
    import cupy
except ImportError:
    cupy = None

Array: TypeAlias = Any                                    # numpy.ndarray or cupy.ndarray

_blas = ThreadpoolController().select(user_api="blas").lib_controllers
_inside, _before, _blas_lock = 0, [], Lock()              # of one_blas_thread
_pool: ThreadPoolExecutor | None = None
_LARGE = 1 << 14                                          # bytes; malloc keeps smaller ones itself
PAGE = 4096                                               # bytes
_shelf: dict[int, list["_Memory"]] = {}                  # free memory by size
_SLAB, _slab_lock = 1 << 26, Lock()                      # bytes of a piece
_slab = np.empty(0, np.uint8)                             # what is left of the last large piece
_own = local()                                           # scratch memory of each thread
_threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def array_module(x: Array):
    """numpy or cupy, whichever x belongs to."""
    return cupy if cupy is not None and isinstance(x, cupy.ndarray) else np


def device_module(device: str):
    """numpy for "cpu", cupy for "cuda"; "auto": a GPU if one answers.  ValueError, RuntimeError."""
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device {device!r}: expected auto, cpu or cuda.")
    if device == "cpu":
        return np
    why = "CuPy is not installed: pip install -r requirements-gpu.txt"
    if cupy is not None:
        try:
            cupy.cuda.runtime.getDeviceCount()
            return cupy
        except cupy.cuda.runtime.CUDARuntimeError as error:
            why = f"CuPy finds no usable GPU: {error}"
    if device == "auto":
        return np
    raise RuntimeError(f"device cuda: {why}. Or use the device cpu.")


def to_cpu(x: Array) -> np.ndarray:
    """x as a NumPy array; copies from a GPU.  # sync"""
    return x if array_module(x) is np else x.get()


def set_threads(count: int) -> None:
    """Worker threads for the CPU's blocks, 1 to 256; changes speed, never a number.  ValueError."""
    global _pool, _threads
    if not 1 <= count <= 256:
        raise ValueError(f"{count} threads: expected 1 to 256; more than the machine's cores, here "
                         f"{os.cpu_count()}, are of no use.")
    if _pool is not None:
        _pool.shutdown()
    _pool, _threads = None, count


def threads() -> int:
    """Worker threads now in use."""
    return _threads


def map_blocks(function: Callable, count: int, size: int) -> list:
    """[function(slice) for each block of `size` of range(count)], on all threads, results in order.

    The caller works too. BLAS runs on one thread in each worker: its own threads would fight the
    pool's and change the order of float sums.
    """
    blocks = [slice(start, min(start + size, count)) for start in range(0, count, max(1, size))]
    results, todo = [None] * len(blocks), iter(range(len(blocks)))

    def work():                                           # whoever is free takes the next block
        np.setbufsize(1024)                               # longer rows are not copied, to be scaled
        for i in todo:
            results[i] = function(blocks[i])

    with one_blas_thread():
        helpers = min(_threads, len(blocks)) - 1
        others = [_submit(work) for _ in range(helpers)]
        try:
            copy_context().run(work)
        finally:
            for other in others:
                if not other.cancel():                    # else it came too late
                    other.result()
    return results


def begun(function: Callable, *args) -> Callable:
    """Lets a free thread do function(*args); call the result to get what that returns."""
    started = _submit(function, *args)
    return lambda: function(*args) if started.cancel() else started.result()


def _submit(function, *args):
    """To another thread, in a context of its own, with the caller's np.errstate."""
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(_threads - 1, thread_name_prefix="minifqt")
    return _pool.submit(copy_context().run, function, *args)


def empty(shape: tuple, dtype="float32", xp=np) -> Array:
    """An array whose memory, if large, comes from arrays that were let go: no page is new twice.

    A step then allocates nothing large, and pays no page faults. Contents are arbitrary.
    """
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if size < _LARGE or xp is not np:
        return xp.empty(shape, dtype)
    try:
        memory = _shelf[size].pop()
    except (KeyError, IndexError):
        memory = _new_memory(size)
    loan = memory.view(_Loan)
    loan.memory = memory
    return np.ndarray(shape, dtype, loan)


def scratch(use: str, shape: tuple, dtype="float32", xp=np) -> Array:
    """An array of arbitrary contents, valid until this thread next asks for the same use."""
    if xp is not np:
        return xp.empty(shape, dtype)
    arrays = vars(_own).setdefault(use, {})
    array = arrays.get((shape, dtype))
    if array is None:
        size, memory = math.prod(shape) * np.dtype(dtype).itemsize, arrays.get("memory")
        if memory is None or len(memory) < size:
            arrays.clear()                                # those of the smaller memory
            memory = arrays["memory"] = _paged(size)
        array = arrays[shape, dtype] = np.ndarray(shape, dtype, memory)
    return array


class _Memory(np.ndarray):
    """Bytes to lend: of a class of their own, or NumPy would forget the loan between."""


class _Loan(np.ndarray):
    """A view of memory that returns to the shelf when the last array that uses it is gone."""

    memory = None                                         # of views of a loan: they return nothing

    def __del__(self):
        if self.memory is not None:
            _shelf.setdefault(len(self.memory), []).append(self.memory)


def _new_memory(size):
    """Bytes cut from large pieces, which NumPy asks the system to keep in large pages.

    They begin with a page: a vector of 64 bytes then lies in one cache line, not across two.
    """
    global _slab
    room = -(-size // PAGE) * PAGE
    if room > _SLAB // 4:
        return (_paged(size) if _SLAB else np.empty(size, np.uint8)).view(_Memory)
    with _slab_lock:
        if len(_slab) < room:
            _slab = _paged(_SLAB)
        memory, _slab = _slab[:size].view(_Memory), _slab[room:]
    return memory


def _paged(size):
    memory = np.empty(size + PAGE, np.uint8)
    start = -memory.ctypes.data % PAGE
    return memory[start:start + size]


@contextmanager
def nothing_kept():
    """Inside, memory is asked for piece by piece, and none is left from before: to measure it."""
    global _SLAB, _slab
    before, _SLAB = _SLAB, 0
    _shelf.clear()
    try:
        yield
    finally:
        _SLAB, _slab = before, np.empty(0, np.uint8)


@contextmanager
def one_blas_thread():
    """Inside, BLAS runs on the calling thread: its own spin after work and eat a core."""
    global _inside, _before
    with _blas_lock:
        _inside += 1
        if _inside == 1:                                  # the first of all threads
            _before = [library.get_num_threads() for library in _blas]
            for library in _blas:                         # by hand: limit() looks at them all anew
                library.set_num_threads(1)
    try:
        yield
    finally:
        with _blas_lock:
            _inside -= 1
            if _inside == 0:                              # the last
                for library, count in zip(_blas, _before, strict=True):
                    library.set_num_threads(count)


def segment_sum(x: Array, starts: Array) -> Array:
    """Sums of runs of rows: out[i] = Σ x[starts[i]:starts[i + 1]], rows in order.

    x (N, D) float64, starts (N,) ascending, N where there is no such run. A GPU, whose host does
    not know how many there are, returns N rows, those too many 0.
    """
    xp = array_module(x)
    if xp is np:                                          # row after row of all runs at once
        starts = starts[:np.searchsorted(starts, len(x))]
        sizes, total = np.diff(starts, append=len(x)), x[starts]
        for k in range(1, sizes.max()):
            longer = sizes > k
            if longer.all():
                total += x[starts + k]
            else:
                total[longer] += x[starts[longer] + k]
        return total
    stops = xp.append(starts[1:], len(x))
    kernel = cupy.ElementwiseKernel(
        "raw T x, raw int64 start, raw int64 stop, int64 width", "T total",
        "total = 0; for (long long r = start[i / width]; r < stop[i / width]; ++r) "
        "total += x[r * width + i % width];",
        "minifqt_segment_sum")
    return kernel(xp.ascontiguousarray(x), starts, stops, x.shape[1], xp.empty_like(x))
