"""Noise: a function of (seed, stream name, step, element), held to NumPy's own Philox."""
import hashlib
import types

import numpy as np
import pytest

import minifqt
from minifqt import backend, rng
from minifqt.rng import NonFiniteError, Stream, Streams, nearest, philox

KEYS = [(0, 0), (1, 2), (2**63, 2**64 - 1), (0x0123456789ABCDEF, 0xFEDCBA9876543210)]


def numpy_words(key, step, first, count):
    """Blocks of NumPy's compiled generator, (count, 4)."""
    generator = np.random.Philox(counter=np.array([first, step, 0, 0], np.uint64),
                                 key=np.array(key, np.uint64))
    return generator.random_raw(4 * count).reshape(count, 4)


def expected_key(seed, name):
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")


def another_module():
    """Not numpy but computes alike: what bits() takes the plain path for."""
    module = types.ModuleType("another")
    module.__dict__.update({name: getattr(np, name) for name in np.__all__})
    return module


@pytest.fixture
def restored_threads():
    before = backend.threads()
    yield
    minifqt.set_threads(before)


# ------------------------------------------------------------------------------------------- philox


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("step", [0, 1, 7, 10**9])
@pytest.mark.parametrize(("first", "count"), [(0, 1), (0, 100), (3, 17), (2**40, 5)])
def test_the_plain_philox_is_numpys_bit_for_bit(key, step, first, count):
    words = philox(key, step, first, count)
    assert words.dtype == np.uint64
    assert np.array_equal(words, numpy_words(key, step, first, count))


def test_philox_of_no_blocks_is_empty():
    assert philox((1, 2), 0, 0, 0).shape == (0, 4)


def test_blocks_of_philox_follow_each_other():
    whole = philox((5, 6), 3, 0, 20)
    assert np.array_equal(philox((5, 6), 3, 7, 13), whole[7:])


@pytest.fixture
def compiled_noise():
    """The module, and its buffer full of what a kernel left there."""
    pytest.importorskip("numba", reason="compiled noise needs numba: pip install numba")
    from minifqt.kernels.cpu import noise

    return noise, np.full(4 * noise.BLOCKS, 2**64 - 7, np.uint64)


def test_compiled_philox_is_the_plain_one_for_any_number_of_blocks(compiled_noise):
    """By vectors, by one multiplier, and by what is left of each."""
    noise, words = compiled_noise
    draws = np.random.default_rng(0)
    assert noise.BLOCKS > 5 * noise.TURN                  # five turns, and a remainder
    for count in range(1, noise.BLOCKS + 1):
        key = draws.integers(0, 2**64, 2, np.uint64)
        step, first = (int(draws.integers(0, 2**bits)) for bits in draws.choice([3, 30, 60], 2))
        noise.philox_blocks(key, step, first, count, words)
        plain = philox(tuple(map(int, key)), step, first, count)
        assert np.array_equal(words[:4 * count].reshape(-1, 4), plain), count


@pytest.mark.parametrize("way", ["by_halves", "by_limbs"])
@pytest.mark.parametrize("m", rng.MULTIPLIERS)
def test_vectors_of_64_bits_are_multiplied_exactly(compiled_noise, way, m):
    """Whichever of the two ways this CPU's noise takes."""
    noise, _ = compiled_noise
    if way == "by_limbs" and not noise.LIMBS:
        pytest.skip("this CPU has no multiply-adds of 52 bits (AVX-512 IFMA)")
    from numba import njit, types
    from numba.extending import intrinsic

    @intrinsic
    def multiply(typingctx, a, out):
        def codegen(context, builder, signature, arguments):
            load = builder.load(builder.inttoptr(arguments[0], noise.VECTOR.as_pointer()))
            load.align = 8
            for i, word in enumerate(getattr(noise, way)(builder, load, m)):
                noise._store(builder, word, arguments[1], noise.WIDE * i)
            return context.get_dummy_value()

        return types.void(types.intp, types.intp), codegen

    @njit
    def run(a, out):
        multiply(a.ctypes.data, out.ctypes.data)

    ends = [2**bits + more for bits in (0, 12, 32, 40, 52, 53, 63) for more in (-1, 0, 1)]
    draws = np.random.default_rng(0).integers(0, 2**64, 200, np.uint64)
    numbers = np.array([*ends, 2**64 - 2, 2**64 - 1, 0, *draws], np.uint64)
    for a in numbers.reshape(-1, noise.WIDE):
        out = np.zeros((2, noise.WIDE), np.uint64)
        run(a, out)
        assert [int(h) << 64 | int(low) for h, low in out.T] == [int(v) * m for v in a]


def test_compiled_noise_begins_at_any_element(compiled_noise):
    noise, words = compiled_noise
    draws, key = np.random.default_rng(0), np.array(expected_key(3, "conv1.grad_x"), np.uint64)
    streams = Streams(3)
    streams.step = 5
    stream = streams.stream("conv1.grad_x")
    for skip in range(16):
        for count in (1, 15, 16, 17, noise.CHUNK, int(draws.integers(1, noise.CHUNK))):
            first = 16 * int(draws.integers(0, 2**33)) + skip
            found = noise.noise_of(key, 5, first, count, -1, words)
            assert np.array_equal(found, stream.bits((count,), offset=first))
            assert (noise.noise_of(key, 5, first, count, 9, words) == 9).all()
            assert len(found) == count


# ------------------------------------------------------------------------------------------ streams


@pytest.mark.parametrize("name", ["", "conv1.grad_w", "layer1.0.conv1.grad_x", "Gewichte-ä"])
@pytest.mark.parametrize("seed", [0, 1, 2**70])
def test_the_key_is_the_start_of_the_sha_256_of_seed_and_name(seed, name):
    assert tuple(int(word) for word in Streams(seed).stream(name).key) == expected_key(seed, name)


def test_bits_are_the_words_of_philox_cut_in_four():
    streams = Streams(3)
    streams.step = 11
    stream = streams.stream("conv1.grad_x")
    words = numpy_words(expected_key(3, "conv1.grad_x"), 11, 0, 10)
    bits = stream.bits((160,))
    assert bits.dtype == np.uint16
    assert np.array_equal(bits, words.view("<u2").reshape(-1))
    for i in (0, 1, 2, 3, 4, 17, 159):                    # field i % 4 of word i // 4, low first
        assert bits[i] == int(words.reshape(-1)[i // 4]) >> 16 * (i % 4) & 0xFFFF


def test_large_keys_are_exact():
    names = [f"layer{i}.grad_x" for i in range(200)]
    large = [name for name in names if min(expected_key(0, name)) >= 2**63]
    assert len(large) > 20                                # a quarter; a float64 holds few of these
    for name in large:
        words = numpy_words(expected_key(0, name), 0, 0, 2)
        bits = Streams(0).stream(name).bits((32,))
        assert np.array_equal(bits, words.view("<u2").reshape(-1)), name


@pytest.mark.parametrize("shape", [
    (), (1,), (15,), (16,), (17,), (3, 5), (2, 3, 5, 7), (0,), (4, 0)])
def test_any_shape_is_the_start_of_the_same_sequence(shape):
    stream = Streams(0).stream("a")
    bits = stream.bits(shape)
    assert bits.shape == shape
    assert np.array_equal(bits.reshape(-1), stream.bits((1000,))[:bits.size])


@pytest.mark.parametrize("offset", [0, 1, 3, 4, 15, 16, 17, 31, 100, 160, 517])
@pytest.mark.parametrize("size", [1, 2, 16, 33, 300])
def test_an_offset_is_a_slice_of_the_whole(offset, size):
    stream = Streams(1).stream("grad_x")
    whole = stream.bits((1000,))
    assert np.array_equal(stream.bits((size,), offset=offset), whole[offset:offset + size])


def test_two_ranks_hold_the_two_halves_of_the_batch():
    stream = Streams(1).stream("grad_x")
    whole = stream.bits((6, 5, 5, 3))
    parts = [stream.bits((3, 5, 5, 3), offset=rank * 3 * 5 * 5 * 3) for rank in (0, 1)]
    assert np.array_equal(np.concatenate(parts), whole)


@pytest.mark.parametrize("offset", [0, 5, 16, 77])
@pytest.mark.parametrize("shape", [(1,), (3, 7), (2, 3, 5, 7)])
def test_another_array_module_draws_the_same_bits(shape, offset):
    streams = Streams(4)
    streams.step = 9
    stream = streams.stream("fc.grad_w")
    bits = stream.bits(shape, another_module(), offset)
    assert bits.dtype == np.uint16
    assert np.array_equal(bits, stream.bits(shape, np, offset))


def test_the_same_seed_name_and_step_give_the_same_bits():
    def draw(seed, name, step):
        streams = Streams(seed)
        streams.step = step
        return streams.stream(name).bits((64,))

    assert np.array_equal(draw(0, "a", 5), draw(0, "a", 5))
    for other in ((1, "a", 5), (0, "b", 5), (0, "a", 6)):
        assert not np.array_equal(draw(0, "a", 5), draw(*other)), other


def test_the_step_is_read_when_bits_are_drawn():
    streams = Streams(0)
    stream = streams.stream("a")
    first = stream.bits((32,))
    streams.step = 1
    second = stream.bits((32,))
    streams.step = 0
    assert not np.array_equal(first, second)
    assert np.array_equal(stream.bits((32,)), first)


def test_bits_do_not_depend_on_the_order_of_calls():
    streams = Streams(0)
    a, b = streams.stream("a"), streams.stream("b")
    forth = a.bits((40,)), b.bits((40,))
    back = b.bits((40,)), a.bits((40,))
    assert np.array_equal(forth[0], back[1])
    assert np.array_equal(forth[1], back[0])


@pytest.mark.usefixtures("restored_threads")
@pytest.mark.parametrize("threads", [2, 4])
def test_bits_do_not_depend_on_the_number_of_threads(threads):
    shape = (3, 16 * rng._CHUNK // 2 + 5)                 # two pieces of work, the last not full
    stream = Streams(0).stream("a")
    minifqt.set_threads(1)
    alone = stream.bits(shape)
    minifqt.set_threads(threads)
    assert np.array_equal(stream.bits(shape), alone)


def test_pieces_of_work_join_without_a_seam():
    at, stream = 16 * rng._CHUNK, Streams(0).stream("a")
    whole = stream.bits((at + 64,))
    block = numpy_words(stream.key, 0, rng._CHUNK - 1, 5)
    assert np.array_equal(whole[at - 16:at + 64], block.view("<u2").reshape(-1))


def test_noises_of_streams_steps_and_seeds_are_uncorrelated():
    n = 1 << 16

    def draw(seed, name, step):
        streams = Streams(seed)
        streams.step = step
        return streams.stream(name).bits((n,)).astype(np.float64)

    noises = [draw(*key) for key in (
        (0, "conv1.grad_w", 0), (0, "conv1.grad_x", 0), (0, "conv2.grad_w", 0),
        (0, "conv1.grad_w", 1), (0, "conv1.grad_w", 2), (1, "conv1.grad_w", 0))]
    noises.append(np.roll(noises[0], 1))                  # nor with its own neighbours
    correlation = np.corrcoef(noises) - np.eye(len(noises))
    assert abs(correlation).max() < 5 / np.sqrt(n)        # five standard errors


def test_the_noise_is_uniform():
    n = 1 << 18
    bits = Streams(0).stream("a").bits((n,))
    counts = np.bincount(bits >> 8, minlength=256)        # 256 cells
    chi2 = ((counts - n / 256) ** 2 / (n / 256)).sum()
    # five standard deviations of χ² with 255 degrees of freedom
    assert abs(chi2 - 255) < 5 * np.sqrt(2 * 255)
    low = np.bincount(bits & 255, minlength=256)
    assert abs(((low - n / 256) ** 2 / (n / 256)).sum() - 255) < 5 * np.sqrt(2 * 255)


def test_the_nearest_stream_is_one_half_everywhere():
    stream = nearest(Streams(0), "fc.act")
    bits = stream.bits((3, 4), offset=5)
    assert stream.name == "fc.act"
    assert bits.dtype == np.uint16
    assert bits.shape == (3, 4)
    assert (bits == 32768).all()


def test_a_generator_repeats_for_its_name_and_step():
    streams = Streams(0)

    def draw(name, step):
        return streams.stream(name).generator(step).standard_normal(8)

    first = draw("data.order", 3)
    streams.step = 99                                     # its step is the argument alone
    assert np.array_equal(draw("data.order", 3), first)
    assert not np.array_equal(draw("data.order", 4), first)
    assert not np.array_equal(draw("data.augment", 3), first)


def test_drawing_leaves_numpys_global_generator_alone():
    before = np.random.get_state()[1].copy()              # noqa: NPY002 - looks, does not draw
    Streams(0).stream("a").bits((100,))
    Streams(0).stream("a").generator(0).random(10)
    assert np.array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_a_negative_seed_raises():
    with pytest.raises(ValueError, match="seed -1: expected an integer ≥ 0"):
        Streams(-1)


# --------------------------------------------------------------------------------------- not finite


class DeviceFlag:
    """A truth value on a device: it combines with others, and only get() copies it."""

    def __init__(self, value):
        self.value, self.copied = value, 0

    def __invert__(self):
        return DeviceFlag(not self.value)

    def __or__(self, other):
        return DeviceFlag(self.value or getattr(other, "value", other))

    __ror__ = __or__

    def __bool__(self):
        raise AssertionError("this would wait for the device")

    def get(self):
        self.copied += 1
        return self.value


@pytest.fixture
def device_flags(monkeypatch):
    """Let the rng take DeviceFlag for an array of another module."""
    real = backend.array_module
    for module in (rng, backend):
        monkeypatch.setattr(
            module, "array_module", lambda x: None if isinstance(x, DeviceFlag) else real(x))


def test_on_the_cpu_what_is_not_finite_raises_at_once():
    streams = Streams(0)
    streams.stream("fc.grad_w").require_finite(np.bool_(True))
    with pytest.raises(NonFiniteError, match="fc.grad_w: NaN or infinity") as error:
        streams.stream("fc.grad_w").require_finite(np.bool_(False))
    assert error.value.name == "fc.grad_w"
    assert isinstance(error.value, ValueError)


@pytest.mark.usefixtures("device_flags")
def test_on_a_device_it_is_remembered_without_waiting_and_raised_when_asked():
    streams = Streams(0)
    for name, finite in (("a", True), ("b", False), ("b", True), ("c", False)):
        streams.stream(name).require_finite(DeviceFlag(finite))
    # a later finite b does not clear it; b came before c
    with pytest.raises(NonFiniteError, match="^b: NaN"):
        streams.raise_pending()
    streams.raise_pending()                               # told once


@pytest.mark.usefixtures("device_flags")
def test_nothing_pending_raises_nothing():
    streams = Streams(0)
    streams.raise_pending()
    streams.stream("a").require_finite(DeviceFlag(True))
    streams.raise_pending()


def test_a_stream_is_public_enough_to_subclass():
    class Constant(Stream):
        def bits(self, shape, xp=np, offset=0):           # noqa: ARG002 - constant
            return xp.full(shape, 7, "uint16")

    assert (Constant(Streams(0), "a").bits((2, 2)) == 7).all()
