"""The threads that share a compiled kernel: woken, fed and awaited without a trip through Python.

A kernel begins with `me = seat(counter)` and returns at once if that is negative, takes its tasks
by `take(counter)` and ends with `leave(counter)`. The caller works too, and waits only for those
that have taken a seat. Between kernels a thread listens for a while, awake, before it sleeps: to
wake one costs as much as a small kernel. Next: codes.py, sums.py.
"""
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minifqt.backend import threads
from minifqt.kernels.cpu.choice import compiled

TASKS, SEATS, LEFT, BELL = range(4)                       # what a counter (4,) int64 counts
CLOSED = 1 << 40                                          # subtracted from the seats at the end
SMALL = 1 << 16                                           # numbers, a weight's as a rule
PATIENCE = 400_000                                        # turns of listening: some 200 µs

_jobs: SimpleQueue = SimpleQueue()
_members: list[Thread] = []
_bell = np.zeros(1, np.int64)                             # rung by who is first in a kernel
_bell_address = _bell.ctypes.data
_unheard = np.zeros(1, np.int64)                          # rung for nobody
_unheard_address = _unheard.ctypes.data


def share(kernel, *arguments) -> None:
    """kernel(counter, *arguments) on every thread; each takes its tasks from the counter."""
    begin(kernel, *arguments)()


def run_for(x: np.ndarray):
    """`share`, or `alone` where a pass over x is shorter than the way to another thread."""
    return share if x.size > SMALL else alone


def alone(kernel, *arguments) -> None:
    """kernel(counter, *arguments) on this thread."""
    counter = np.zeros(4, np.int64)
    counter[BELL] = _unheard_address
    kernel(counter, *arguments)


def begin(kernel, *arguments):
    """The other threads begin to share this kernel when they are free; call the result to end it.

    What is between fills their time: Python on this thread, and the ends of other kernels.
    """
    counter, helpers = np.zeros(4, np.int64), threads() - 1
    counter[BELL] = _bell_address
    while len(_members) < helpers:
        _members.append(Thread(target=_work, name="minifqt.team", daemon=True))
        _members[-1].start()
    for _ in range(helpers):
        _jobs.put((kernel, counter, arguments))

    def end():
        kernel(counter, *arguments)
        if helpers:
            close(counter)

    return end


def _work():
    while True:
        heard = int(_bell[0])                             # before asking: a later job rings anew
        if _jobs.empty():
            listen(_bell, heard, PATIENCE)
        kernel, counter, arguments = _jobs.get()
        if counter[SEATS] >= 0:                           # else the caller is done
            with suppress(Exception):                     # the caller meets it too
                kernel(counter, *arguments)
        del kernel, counter, arguments                    # arrays are not kept alive


def _cell(context, builder, kind, array, index):
    data = context.make_array(kind)(context, builder, array).data
    return builder.gep(data, [ir.Constant(ir.IntType(64), index)])


def _add(index, count=1):
    def codegen(context, builder, signature, arguments):
        cell = _cell(context, builder, signature.args[0], arguments[0], index)
        return builder.atomic_rmw("add", cell, ir.Constant(ir.IntType(64), count), "acq_rel")

    return codegen


@intrinsic
def take(typingctx, counter):
    """The next task, for one thread alone."""
    return types.int64(counter), _add(TASKS)


@intrinsic
def seat(typingctx, counter):
    """Which of the threads this is, for scratch of its own; negative if the work is done.

    The first one rings for the others.
    """
    def codegen(context, builder, signature, arguments):
        mine = _add(SEATS)(context, builder, signature, arguments)
        cell = _cell(context, builder, signature.args[0], arguments[0], BELL)
        bell = builder.inttoptr(builder.load(cell), ir.IntType(64).as_pointer())
        first = builder.icmp_signed("==", mine, ir.Constant(ir.IntType(64), 0))
        builder.atomic_rmw("add", bell, builder.zext(first, ir.IntType(64)), "acq_rel")
        return mine

    return types.int64(counter), codegen


@intrinsic
def leave(typingctx, counter):
    """This thread's work is written."""
    return types.int64(counter), _add(LEFT)


@intrinsic
def read(typingctx, cell):
    """cell[0], which another thread changes."""
    def codegen(context, builder, signature, arguments):
        address = _cell(context, builder, signature.args[0], arguments[0], 0)
        return builder.load_atomic(address, "acquire", 8)

    return types.int64(cell), codegen


@intrinsic
def remove_seats(typingctx, counter):
    """How many had a seat; from now on there is none."""
    return types.int64(counter), _add(SEATS, -CLOSED)


@compiled
def close(counter):
    """No more seats; waits until all who sat have left."""
    seated = remove_seats(counter)
    while read(counter[LEFT:]) < seated:
        pass


@compiled
def listen(bell, heard, patience):
    """Waits until the bell shows another number than what was heard, or patience ends."""
    for _ in range(patience):
        if read(bell) != heard:
            break
