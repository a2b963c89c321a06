"""Memory that is used again is never lent twice at a time."""
import numpy as np

from minifqt import backend


def test_memory_is_never_lent_twice_at_a_time():
    """Arrays of a few sizes come and go in random order; what lives keeps what it was given."""
    rng, living = np.random.default_rng(0), []
    for turn in range(3000):
        if living and rng.random() < 0.5:
            array, expected = living.pop(rng.integers(len(living)))
            assert (array == expected).all()
            continue
        shape = (int(rng.choice([100, 5000, 8192, 20_000])), int(rng.integers(1, 3)))
        array = backend.empty(shape, "int32")
        array[:] = turn
        if rng.random() < 0.3:                            # a view keeps the whole alive
            array = array.T[..., 1::2].view("float32")
            expected = np.int32(turn).view("float32")
        else:
            expected = turn
        living.append((array, expected))


def test_a_view_of_a_loan_returns_no_memory():
    array = backend.empty((123_461,), "uint8")
    assert len(array.base[3:]) == 123_458                 # made, and let go
    assert backend.empty((123_461,), "uint8").ctypes.data != array.ctypes.data


def test_memory_that_was_let_go_is_used_again(monkeypatch):
    size = 123_457
    address = backend.empty((size,), "uint8").ctypes.data
    monkeypatch.setattr(backend, "_new_memory", None)     # would raise
    again = backend.empty((size,), "uint8")
    assert again.ctypes.data == address
