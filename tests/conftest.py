"""Fixtures of several files: what a test may set, and finds as it was afterwards."""
import pytest

from minifqt import backend
from minifqt.kernels.cpu import choice


@pytest.fixture
def set_instructions():
    """choice.set_instructions, undone behind the test."""
    before = choice.instructions()
    yield choice.set_instructions
    choice.set_instructions(before)


@pytest.fixture
def on_threads():
    """on_threads(function) is [function() on 1, 2 and 4 threads]."""
    before = backend.threads()

    def each(function):
        results = []
        for count in (1, 2, 4):
            backend.set_threads(count)
            assert backend.threads() == count
            results.append(function())
        return results

    yield each
    backend.set_threads(before)
