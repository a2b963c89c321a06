"""The threads that share a compiled kernel: woken and fed without a trip through Python.

`share` runs a kernel on this thread and posts it on the board (board.py); threads that look there
help, and it waits for those who came. What `begin` posts is worked off while nothing shared is
open: a thread that is at it goes to help with what is shared, and comes back. So this thread's
Python, between kernels, costs less. Which thread does a task changes no number.
Next: codes.py, sums.py.
"""
import atexit
import os
from contextlib import suppress
from threading import Event, Lock, Thread

import numpy as np

from minifqt.backend import threads
from minifqt.kernels.cpu import board
from minifqt.kernels.cpu.board import dismiss, serve

PLACES = 33                                               # the first is of what is shared
GONE = 1 << 40                                            # no task has this number
PATIENCE = 10_000                                         # turns of looking at the board: a ms
SMALL = 1 << 16                                           # numbers, a weight's as a rule


def _aligned(rows, size):
    memory = np.zeros(rows * size + size, np.int64)
    start = -(memory.ctypes.data // 8) % size
    return memory[start:start + rows * size].reshape(rows, size)


_posts = _aligned(PLACES, board.WORDS)
_rooms = np.zeros((PLACES, board.ROOM), np.uint8)
_posts[:, board.ARGUMENTS] = _rooms.ctypes.data + board.ROOM * np.arange(PLACES)
_posts[1:, board.FRONT] = _posts.ctypes.data
_counters, _free, _turn = list(_posts), list(range(1, PLACES)), Lock()
_members: list[Thread] = []
_asleep: list[Event] = []


def share(kernel, *arguments) -> None:
    """kernel(counter, *arguments) on every thread; each takes its tasks from the counter."""
    _share(threads(), kernel, arguments)


def _share(count, kernel, arguments):
    if count == 1 or not _turn.acquire(blocking=False):   # another thread of Python is sharing
        return alone(kernel, *arguments)
    counter = _counters[0]
    try:
        _call(count - 1)
        counter[board.LAST], counter[board.POST] = count - 1, board.SHARED
        kernel(counter, *arguments)
    except BaseException:                                 # of memory, as a rule
        dismiss(counter)
        raise
    finally:
        _turn.release()


def run_for(x: np.ndarray):
    """`share`, or `alone` where a pass over x is shorter than the way to another thread."""
    return share if x.size > SMALL else alone


def alone(kernel, *arguments) -> None:
    """kernel(counter, *arguments) on this thread."""
    kernel(np.zeros(board.WORDS, np.int64), *arguments)


def begin(kernel, *arguments):
    """The other threads share this kernel while nothing else is shared; call the result to end it.

    So what is between, Python on this thread as a rule, costs less. Let go, it is given up.
    """
    return Begun(kernel, arguments)


class Begun:
    """A kernel that others are at; it holds its arguments."""

    def __init__(self, kernel, arguments):
        self._kernel, self._arguments, self._place = kernel, arguments, None
        self._count = count = threads()                   # there is scratch for so many
        if count > 1 and _free:
            self._place = _free.pop()
            counter = _counters[self._place]
            counter[board.LAST], counter[board.POST] = count - 1, board.BEGUN
            kernel(counter, *arguments)
            _call(count - 1)

    def __call__(self):
        """Ends it: this thread helps."""
        if self._place is None:
            _share(min(self._count, threads()), self._kernel, self._arguments)
        else:
            self._kernel(_counters[self._place], *self._arguments)
            self._leave()

    def __del__(self):
        if self._place is not None:
            _counters[self._place][board.TAKEN] = GONE
            self._leave()

    def _leave(self):
        dismiss(_counters[self._place])
        _free.append(self._place)
        self._place = None


def _call(helpers):
    """So many threads look at the board, or will soon."""
    while len(_members) < helpers:
        member = Thread(target=_work, args=(len(_members),), name="minifqt.team", daemon=True)
        _members.append(member)
        member.start()
    with suppress(IndexError):                            # another thread of Python took the last
        while _asleep:
            _asleep.pop().set()


def _calm():
    """No helper is inside a kernel, nor will be in one that is posted now: who began it ends it."""
    for counter in _counters if _members else ():
        dismiss(counter)


def _alone_again():
    """In the child of a fork, which has no helpers."""
    global _turn
    _members.clear()
    _asleep.clear()
    _turn = Lock()


atexit.register(_calm)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_calm, after_in_child=_alone_again)


def _work(me):
    called = Event()
    while True:
        serve(_posts, me + 1, PATIENCE)
        _asleep.append(called)                            # who posts from now on calls
        serve(_posts, me + 1, 1)
        called.wait()
        called.clear()
