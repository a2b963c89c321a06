"""Fixtures of several files: what a test may set, and finds as it was afterwards."""
import pytest
from tiny import QUICK, digits

import data
from minifqt import autobits, backend
from minifqt.kernels import blas
from minifqt.kernels.cpu import choice


@pytest.fixture
def set_instructions():
    """choice.set_instructions, undone behind the test."""
    before = choice.instructions()
    yield choice.set_instructions
    choice.set_instructions(before)


@pytest.fixture
def set_threads():
    """backend.set_threads, undone behind the test."""
    before = backend.threads()
    yield backend.set_threads
    backend.set_threads(before)


@pytest.fixture
def small(monkeypatch, tmp_path):
    """The command line on 128 digits, in an empty directory."""
    monkeypatch.setattr(data, "load", lambda *ignored: digits(128))
    monkeypatch.chdir(tmp_path)
    threads = backend.threads()
    yield tmp_path
    backend.set_threads(threads)


@pytest.fixture
def quick(monkeypatch):
    """Automatic bits are chosen from few measurements."""
    for name, value in QUICK:
        monkeypatch.setattr(autobits, name, value)


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


@pytest.fixture(params=choice.supported()[:-1])
def instructions(request, set_instructions):
    """These instructions, while a test runs."""
    set_instructions(request.param)
    return request.param


@pytest.fixture
def sent_to_blas(monkeypatch):
    """Names of the products that go to blas.py, as they go."""
    sent = []

    def watched(name, function):
        def product(*operands):
            sent.append(name)
            return function(*operands)

        return product

    for name in ("matmul", "conv_fprop", "conv_dgrad"):
        monkeypatch.setattr(blas, name, watched(name, getattr(blas, name)))
    return sent


@pytest.fixture
def both_ways(set_instructions):
    """both_ways(function) is function() compiled, then by NumPy."""
    def each(function):
        set_instructions("auto")
        compiled = function()
        set_instructions("numpy")
        return compiled, function()

    return each
