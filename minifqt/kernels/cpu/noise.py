"""NumPy's Philox, made where it is used: the same bits as rng.philox, two ways at once.

A core has one multiplier for 64-bit numbers and others for vectors of them; both work at the same
time where instructions of the two kinds lie side by side. While sixteen blocks pass one round in
two vectors, one more passes all ten in ordinary registers. Next: codes.py.
"""
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minifqt.kernels.cpu import choice
from minifqt.kernels.cpu.choice import compiled
from minifqt.rng import INCREMENTS, MULTIPLIERS

ROUNDS, WIDE, VECTORS = 10, 8, 2                          # WIDE blocks in each of VECTORS
SIDE = VECTORS * WIDE                                     # blocks side by side
TURN = SIDE + ROUNDS                                      # and one more for each of their rounds
CHUNK = 16 * 5 * TURN                                     # elements from one buffer of noise
BLOCKS = CHUNK // 16 + 1                                  # of Philox, 16 values each
I32, I64, I128 = (ir.IntType(bits) for bits in (32, 64, 128))
VECTOR = ir.VectorType(I64, WIDE)
LIMBS = choice.has("avx512ifma")


@intrinsic
def round_keys(typingctx, first, second):
    """Address of the two keys of each round, on the stack of the function that asks."""
    def codegen(context, builder, signature, arguments):
        keys = cgutils.alloca_once(builder, I64, 2 * ROUNDS)
        for r in range(ROUNDS):
            for i, (key, increment) in enumerate(zip(arguments, INCREMENTS, strict=True)):
                here = builder.add(key, ir.Constant(I64, r * increment % 2**64))
                builder.store(here, builder.gep(keys, [ir.Constant(I64, 2 * r + i)]))
        return builder.ptrtoint(keys, I64)

    return types.intp(types.uint64, types.uint64), codegen


@intrinsic
def address(typingctx, array):
    """Where a contiguous array begins; unlike `ctypes.data` it counts no reference."""
    def codegen(context, builder, signature, arguments):
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.ptrtoint(data, I64)

    return types.intp(array), codegen


@intrinsic
def whole_block(typingctx, counter, step, keys, out):
    """One block in ordinary registers; the rounds' keys and the four words out by address."""
    def codegen(context, builder, signature, arguments):
        _whole_block(builder, *arguments)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.intp, types.intp), codegen


@intrinsic
def whole_turn(typingctx, counter, step, keys, out):
    """TURN blocks, the first with this counter, as whole_block makes them."""
    def codegen(context, builder, signature, arguments):
        counter, step, keys, out = arguments
        number = lambda v: ir.Constant(I64, v)            # noqa: E731
        state = [[cgutils.alloca_once(builder, VECTOR) for _ in range(4)] for _ in range(VECTORS)]
        for i, rows in enumerate(state):                  # registers
            after = ir.Constant(VECTOR, list(range(i * WIDE, (i + 1) * WIDE)))
            words = builder.add(_spread(builder, counter), after), step, number(0), number(0)
            for row, word in zip(rows, words, strict=True):
                builder.store(_spread(builder, word), row)
        with cgutils.for_range(builder, number(ROUNDS)) as loop:
            here = builder.add(keys, builder.mul(loop.index, number(16)))
            for rows in state:
                words = _round(builder, [builder.load(row) for row in rows], here, 0)
                for row, word in zip(rows, words, strict=True):
                    builder.store(word, row)
            after = builder.add(loop.index, number(SIDE))
            _whole_block(builder, builder.add(counter, after), step, keys,
                         builder.add(out, builder.mul(after, number(32))))
        for i, rows in enumerate(state):                  # word by word → block by block
            a, b, c, d = (builder.load(row) for row in rows)
            ab, cd = (_shuffle(builder, x, y, range(2 * WIDE)) for x, y in ((a, b), (c, d)))
            order = [j + k * WIDE for j in range(WIDE) for k in range(4)]
            _store(builder, _shuffle(builder, ab, cd, order), out, 4 * i * WIDE)
        return context.get_dummy_value()

    return types.void(types.uint64, types.uint64, types.intp, types.intp), codegen


def _whole_block(builder, counter, step, keys, out):
    words = [counter, step, ir.Constant(I64, 0), ir.Constant(I64, 0)]
    for r in range(ROUNDS):
        words = _round(builder, words, keys, r)
    for i, word in enumerate(words):
        _store(builder, word, out, i)


def _round(builder, c, keys, r):
    """IR of round r on four words, numbers or vectors of them; its two keys lie at keys + 16 r."""
    (h0, l0), (h1, l1) = _product(builder, c[0], MULTIPLIERS[0]), _product(builder, c[2],
                                                                           MULTIPLIERS[1])
    k0, k1 = (builder.load(_at(builder, keys, 2 * r + i, I64)) for i in (0, 1))
    if c[0].type == VECTOR:
        k0, k1 = _spread(builder, k0), _spread(builder, k1)
    return [builder.xor(builder.xor(h1, c[1]), k0), l1,
            builder.xor(builder.xor(h0, c[3]), k1), l0]


def _product(builder, a, m):
    """High and low words of a · m, for numbers by the core's own multiplication."""
    if a.type != I64:
        return (by_limbs if LIMBS else by_halves)(builder, a, m)
    both = builder.mul(builder.zext(a, I128), ir.Constant(I128, m))
    high = builder.lshr(both, ir.Constant(I128, 64))
    return builder.trunc(high, I64), builder.trunc(both, I64)


def by_halves(builder, a, m):
    """High and low words of a · m, vectors of them, by five multiplications of 32 bits."""
    half, low_half, low, high, whole = map(_all, (32, 2**32 - 1, m & 2**32 - 1, m >> 32, m))
    first, second = builder.and_(a, low_half), builder.lshr(a, half)
    t = builder.add(builder.mul(first, high), builder.lshr(builder.mul(first, low), half))
    u = builder.add(builder.mul(second, low), builder.and_(t, low_half))
    top = builder.add(builder.mul(second, high), builder.lshr(t, half))
    return builder.add(top, builder.lshr(u, half)), builder.mul(a, whole)


def by_limbs(builder, a, m):
    """The same by AVX-512's multiply-adds of 52 bits: limbs, and sums r₀ + r₁ 2⁵² + r₂ 2¹⁰⁴."""
    low, high, rest = _all(m % 2**52), _all(m >> 52), builder.lshr(a, _all(52))

    def total(*terms):
        r = _all(0)
        for half, x, y in terms:
            f = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(VECTOR, [VECTOR] * 3),
                f"llvm.x86.avx512.vpmadd52{half}.uq.512")
            r = builder.call(f, [r, x, y])                # the lowest 52 bits of x and of y
        return r

    r0 = total(("l", a, low))
    r1 = total(("h", a, low), ("l", a, high), ("l", rest, low))
    r2 = total(("h", a, high), ("h", rest, low), ("l", rest, high))
    top = builder.add(builder.lshr(r1, _all(12)), builder.shl(r2, _all(40)))
    return top, builder.or_(r0, builder.shl(r1, _all(52)))


def _all(value):
    return ir.Constant(VECTOR, [value] * WIDE)


def _spread(builder, word):
    """A vector of this word, or the vector that it is."""
    if word.type == VECTOR:
        return word
    one = builder.insert_element(ir.Constant(VECTOR, ir.Undefined), word, ir.Constant(I32, 0))
    return _shuffle(builder, one, one, [0] * WIDE)


def _shuffle(builder, x, y, places):
    places = list(places)
    return builder.shuffle_vector(x, y, ir.Constant(ir.VectorType(I32, len(places)), places))


def _at(builder, address, word, kind):
    place = builder.add(address, ir.Constant(I64, 8 * word))
    return builder.inttoptr(place, kind.as_pointer())


def _store(builder, value, address, word):
    builder.store(value, _at(builder, address, word, value.type)).align = 8


@compiled
def philox_blocks(key, step, first, count, words):
    """words[:4 · count] = blocks first .. of rng.philox; count ≤ BLOCKS.  words (4 · BLOCKS,)."""
    keys, out = round_keys(key[0], key[1]), address(words)
    done, counter, step = 0, np.uint64(first + 1), np.uint64(step)
    while count - done > TURN // 2:                       # of fewer, one by one is faster
        whole_turn(counter + np.uint64(done), step, keys, out + 32 * done)
        done += TURN
    while done < count:
        whole_block(counter + np.uint64(done), step, keys, out + 32 * done)
        done += 1


@compiled
def noise_of(key, step, first, count, constant, words):
    """The 16-bit noise of elements first .. first + count − 1, in a buffer; constant −1: random."""
    noise = words.view(np.uint16)
    if constant >= 0:
        noise[:count] = constant
        return noise[:count]
    skip = first % 16
    philox_blocks(key, step, first // 16, (skip + count + 15) // 16, words)
    return noise[skip:skip + count]
